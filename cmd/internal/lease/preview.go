package lease

import (
	"cmp"
	"errors"
	"slices"

	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// Preview is what Assign would do, with comments among the commands.
func (m *Manager) Preview(r *Request) ([]bind.Action, error) {
	steps, _, err := m.PreviewLease(r)
	return steps, err
}

// PreviewLease is Preview with the lease that Assign would make, which nobody has.
func (m *Manager) PreviewLease(r *Request) (steps []bind.Action, l *Lease, err error) {
	l = &Lease{LeaseHead: holder.LeaseHead{Guest: r.Guest}, OwnDriver: r.OwnDriver}
	steps, err = m.preview(r, l)
	return steps, l, err
}

// preview fills in the lease's devices.
func (m *Manager) preview(r *Request, l *Lease) ([]bind.Action, error) {
	all, err := m.all()
	if err != nil {
		return nil, err
	}
	var devices []*iommu.Device
	wanted := map[string]sriov.Settings{} // by device
	if i := slices.IndexFunc(all, func(l *Lease) bool { return l.Guest == r.Guest }); i >= 0 {
		if err := all[i].same(r); err != nil {
			return nil, err
		}
		if devices, err = m.devices(all[i]); err != nil {
			return nil, err
		}
		for k, d := range devices {
			wanted[d.Name] = all[i].Devices[k].Wanted
		}
		l.Devices = slices.Clone(all[i].Devices)
	} else {
		choices, err := m.choices(r)
		if err != nil {
			return nil, err
		}
		choices, err = m.draw(all, r, choices, nil)
		if err != nil {
			return nil, err
		}
		var drawn [][]*iommu.Device
		for _, c := range choices {
			drawn = append(drawn, c.units...)
			for _, d := range handed(c.units) {
				if wanted[d.Name], err = c.settingsFor(d); err != nil {
					return nil, err
				}
				devices = append(devices, d)
			}
		}
		for _, d := range devices {
			l.Devices = append(l.Devices, Device{LeaseDevice: holder.LeaseDevice{Address: d.Address}})
		}
		refusals, _, err := m.ask(&Lease{OwnDriver: r.OwnDriver}, devices, drawn)
		if err := errors.Join(append(refusals, err)...); err != nil {
			return nil, err
		}
		if err := m.resettable(l, drawn); err != nil && !r.NoReset {
			return nil, err
		}
	}

	if _, err := m.fits(&Lease{LeaseHead: holder.LeaseHead{Guest: r.Guest}}, devices, r); err != nil {
		return nil, err
	}
	var out []bind.Action
	comment := func(text string) { out = append(out, bind.Action{Command: "# " + text}) }
	for _, d := range m.touched(devices, false) {
		if d.PhysFn != nil && len(wanted[d.Name]) > 0 {
			plan, err := m.planSet(d, wanted[d.Name])
			if err != nil {
				return nil, err
			}
			out = append(out, plan.Steps()...)
			for k := range l.Devices {
				if l.Devices[k].Address == d.Address {
					l.Devices[k].Now = plan.Want
				}
			}
		}

		if r.OwnDriver {
			comment(d.Name + " is left on " + cmp.Or(d.Driver, "no driver") + ", for the VMM to take it")
			continue
		}
		change, err := m.handle.Plan(d, bind.Take(bind.Auto))
		if err != nil {
			return nil, err
		}
		out = append(out, bind.Actions(change.Steps)...)
		if slices.Contains(devices, d) {
			reset, err := iommu.ResetOf(m.host, m.Topology, d)
			if err != nil {
				return nil, err
			}
			comment(d.Name + " is reset afterwards " + reset.String())
		}
		if d.Role() == iommu.RoleCompanion {
			comment(d.Name + " is only kept off the host's drivers; the guest does not get it")
		} else if len(change.Steps) == 0 {
			comment(d.Name + " is on " + d.Driver + " already")
		}
	}
	return out, nil
}
