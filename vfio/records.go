package vfio

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"viaduct/internal/journal"
	"viaduct/iommu"
)

// The journal has two kinds of records. change-ADDRESS is there while a device changes drivers, written before the first
// write and removed after the last check: one that nobody is at work on is of a run that was interrupted. taken-ADDRESS is
// there as long as a device is taken and says what it had.

// changeRecord is a change that is under way.
type changeRecord struct {
	Op      string          `json:"op"` // take or give, or what a Recoverer knows
	Unit    []iommu.Address `json:"unit"`
	Change  Change          `json:"change,omitzero"`
	Data    json.RawMessage `json:"data,omitempty"` // for the Recoverer
	Command Proc            `json:"command"`
	Writer  *Proc           `json:"writer"`
	Since   time.Time       `json:"since"`
	Stuck   string          `json:"stuck,omitempty"` // the write that had not returned when the command ended
	Nodes   []node          `json:"nodes"`           // what led to the device: they are gone while an unbind waits for who has them open
}

// Recoverer finishes or undoes a change of a device that another package had written down with [Binder.Begin], and says what
// became of it, as in "has its 7 VFs".
type Recoverer func(ctx context.Context, b *Binder, device iommu.Address, data json.RawMessage) (string, error)

// Begin writes down a change of a device that the caller has locked, before its first write. Users are the devices whose users
// the change may have to wait for. End ends it; a run that is killed before leaves it to the Recoverer of this name.
func (b *Binder) Begin(op string, d *iommu.Device, users []*iommu.Device, data any) error {
	text, err := json.Marshal(data)
	if err != nil {
		return err
	}
	return b.put(users, changeRecord{Op: op, Unit: []iommu.Address{d.Address}, Change: begin(d), Data: text})
}

// put completes a record by the run that makes it.
func (b *Binder) put(users []*iommu.Device, r changeRecord) error {
	r.Since = time.Now()
	if b.Host.Live() {
		w, err := b.startedWriter()
		if err != nil {
			return err
		}
		r.Command, r.Writer = b.self, &w.process
		for _, d := range users {
			nodes, err := b.nodesOf(d)
			if err != nil {
				return err
			}
			r.Nodes = append(r.Nodes, nodes...)
		}
	}
	return b.Journal.Put(changeKey(r.Change.Device), r)
}

// nodesOf are the nodes that lead to a device: those that the gate found, else as they are now.
func (b *Binder) nodesOf(d *iommu.Device) ([]node, error) {
	if b.Gate != nil {
		if nodes, known := b.Gate.nodes[d.Address]; known {
			return nodes, nil
		}
	}
	return nodesOf(b.Host, d)
}

// End says that the change of a device is over, done or undone.
func (b *Binder) End(a iommu.Address) error { return b.Journal.Delete(changeKey(a)) }

const (
	opTake = "take"
	opGive = "give"
)

// takenRecord is what a taken device had.
type takenRecord struct {
	Vendor    uint16   `json:"vendor"` // an address is no identity: the ids must still be the same
	Device    uint16   `json:"device"`
	Driver    string   `json:"driver"`
	Override  string   `json:"driver_override"`
	Identity  Identity `json:"identity"`
	NodeOwner string   `json:"node_owner,omitempty"`
	Block     bool     `json:"block,omitempty"` // it had disks
}

func takenKey(a iommu.Address) string  { return "taken-" + a.String() }
func changeKey(a iommu.Address) string { return journal.Changing + a.String() }

// taken is what a device had when it was taken.
func (b *Binder) taken(d *iommu.Device) (r takenRecord, known bool, err error) {
	known, err = b.Journal.Get(takenKey(d.Address), &r)
	if !known || r.Vendor != d.Vendor || r.Device != d.Device {
		return takenRecord{}, false, err
	}
	return r, true, nil
}

// holders are the processes that a change waits for.
func (r *changeRecord) holders(h *iommu.Host) []Holder {
	d := &iommu.Device{Name: r.Change.Device.String(), Address: r.Change.Device}
	nodes := map[node]*iommu.Device{}
	for _, n := range r.Nodes {
		nodes[n] = d
	}
	found, _ := openIn(h, []*iommu.Device{d}, nodes)
	return found
}

// orphan reports whether the child still writes for a command that is over.
func (r *changeRecord) orphan(h *iommu.Host) bool {
	return r.Writer != nil && r.Writer.Alive(h) && !r.Command.Alive(h)
}

func (b *Binder) change(a iommu.Address) (r changeRecord, known bool, err error) {
	known, err = b.Journal.Get(changeKey(a), &r)
	if len(r.Unit) == 0 {
		r.Unit = []iommu.Address{a}
	}
	return r, known, err
}

// Forget drops what the journal keeps of VFs that are no more.
func (b *Binder) Forget(vfs []iommu.VF) error {
	var errs []error
	for _, vf := range vfs {
		errs = append(errs, b.Journal.Delete(takenKey(vf.Address)), b.disown(vf.Address))
	}
	return errors.Join(errs...)
}
