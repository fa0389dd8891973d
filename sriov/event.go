package sriov

import "viaduct/vfio/bind"

// event says what came of a plan.
func (p *SetPlan) event(err error) bind.Event {
	from, to := Settings{}, Settings{}
	for _, change := range p.Settings {
		for _, k := range change.Keys {
			was, known := change.From[k]
			if v, wanted := p.Want[k]; wanted && (!known || was != v) {
				to[k] = v
				if known {
					from[k] = was
				}
			}
		}
	}
	return bind.Event{
		Device: p.VF.Name, Label: bind.Label(p.VF), PF: p.port.PF.Name, Subject: bind.Settings,
		From: from.Text(), To: to.Text(), Err: err,
	}
}

// part is the event of a plan that was carried out as a part of a change of the PF.
func (p *SetPlan) part() bind.Event {
	e := p.event(nil)
	e.Part = true
	return e
}
