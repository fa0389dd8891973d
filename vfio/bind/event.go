package bind

import "viaduct/iommu"

// Subject is what of a device a change is about.
type Subject string

// The subjects.
const (
	Driver   Subject = "driver"   // From and To are drivers, "" for none
	VFs      Subject = "vfs"      // of a PF: From and To are how many
	Settings Subject = "settings" // of a VF: From and To are KEY=VALUE words
)

// Event says how far a change is, for who keeps a log or shows progress. A Handle keeps none.
type Event struct {
	Device   string // its name
	PF       string // a VF's PF; "" of other devices
	Label    string // what people call it: its network interface, else its name
	Subject  Subject
	From, To string
	Begins   bool  // it was only begun; another event says what came of it
	Part     bool  // of a change of the PF, which has an event of its own
	Err      error // why it is not at To; nil if it is
}

// Label is what people call a device: its first network interface, else its name.
func Label(d *iommu.Device) string {
	if len(d.Netdevs) > 0 {
		return d.Netdevs[0]
	}
	return d.Name
}

// Tell says an event to who opened the Handle: see [Options].
func (b *Handle) Tell(e Event) {
	if b.options.Tell != nil {
		b.options.Tell(e)
	}
}

// tell says what came of a unit's devices that were written to.
func (u *unit) tell() {
	for i, r := range u.results {
		if len(r.Steps) > 0 {
			e := Event{Device: r.Name, Label: Label(u.devices[i]), Subject: Driver, From: r.From, To: r.To, Err: r.Err}
			if e.To == None {
				e.To = ""
			}
			e.PF, e.Part = u.b.partOf(u.devices[i])
			u.b.Tell(e)
		}
	}
}

// partOf is the PF of a VF, and whether that is being changed, of which the VF's change is a part, then.
func (b *Handle) partOf(d *iommu.Device) (pf string, part bool) {
	if d.PhysFn == nil {
		return "", false
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return d.PhysFn.String(), b.begun[*d.PhysFn]
}
