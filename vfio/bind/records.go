package bind

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"viaduct/internal/host"
	"viaduct/internal/journal"
	"viaduct/iommu"
	"viaduct/vfio/holder"
)

// The journal has two kinds of records. change-ADDRESS is there while a device changes drivers, written before the
// first write and removed after the last check: one that nobody is at work on is of a run that was interrupted.
// taken-ADDRESS is there as long as a device is taken and says what it had.

const (
	opTake = "take"
	opGive = "give"
)

func takenKey(a iommu.Address) string  { return journal.Taken + a.String() }
func changeKey(a iommu.Address) string { return journal.Changing + a.String() }

// changeRecord is a change that is under way.
type changeRecord struct {
	Op      string          `json:"op"` // take or give, or what a Recoverer knows
	Unit    []iommu.Address `json:"unit"`
	Change  Change          `json:"change,omitzero"`
	Data    json.RawMessage `json:"data,omitempty"` // for the Recoverer
	Command holder.Proc     `json:"command"`
	Writer  *holder.Proc    `json:"writer"`
	Since   time.Time       `json:"since"`
	Stuck   string          `json:"stuck,omitempty"` // the write that had not returned when the command ended
	Nodes   []holder.Node   `json:"nodes"`           // of the device: an unbind that waits has taken them away
}

// Recoverer finishes or undoes a change of a device that another package had written down with [Handle.Begin], and says
// what became of it, as in "has its 7 VFs". Unless it returns an error, the change is ended then as [Handle.End] does.
type Recoverer func(ctx context.Context, b *Handle, device iommu.Address, data json.RawMessage) (string, error)

// Begin writes down a change of a device, which is to be locked, before its first write. Users are the devices whose
// users the change may have to wait for. [Handle.End] ends it; a run that is killed before leaves it to the Recoverer
// of this name, which is to be among the Handle's Options. Begun again, a change has the new data. What an interrupted
// run left of the device has to be recovered first ([ErrInterrupted]).
func (b *Handle) Begin(op string, d *iommu.Device, users []*iommu.Device, data any) error {
	if err := errors.Join(b.MayChange(), b.locked(d.Address)); err != nil {
		return err
	}
	if b.options.Recoverers[op] == nil {
		return fmt.Errorf("bind: the Handle lacks the Recoverer %q that finishes or undoes the change", op)
	}
	text, err := json.Marshal(data)
	if err != nil {
		return err
	}
	return b.put(users, changeRecord{Op: op, Unit: []iommu.Address{d.Address}, Change: from(d), Data: text})
}

// ErrInterrupted is matched by errors that say that an interrupted change of a device has to be recovered first.
const ErrInterrupted = host.Error("an earlier change of it was interrupted: recover it first")

// End says that the change of a device, which was begun, is over, done or undone.
func (b *Handle) End(a iommu.Address) error {
	if err := errors.Join(b.MayChange(), b.locked(a), b.mayWrite(a)); err != nil {
		return err
	}
	return b.end(a)
}

// end drops the record of a change that is over, whoever began it.
func (b *Handle) end(a iommu.Address) error {
	if err := b.journal.Delete(changeKey(a)); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.begun, a)
	return nil
}

// put completes a record by the run that makes it, and writes it down.
func (b *Handle) put(users []*iommu.Device, r changeRecord) error {
	a := r.Change.Device
	if b.mayWrite(a) != nil {
		if _, known, err := b.change(a); err != nil || known {
			return errors.Join(err, fmt.Errorf("%s: %w", a, ErrInterrupted))
		}
	}
	w, err := b.child.get()
	if err != nil {
		return err
	}
	r.Since, r.Command, r.Writer = time.Now(), b.child.command(), &w.process
	for _, d := range users {
		nodes, err := holder.Nodes(b.host, d)
		if err != nil {
			return err
		}
		r.Nodes = append(r.Nodes, nodes...)
	}
	return b.putRecord(r)
}

// putRecord writes down a record, from which on the device may be written to. One that was perhaps written, as its
// error came late, is this run's too.
func (b *Handle) putRecord(r changeRecord) error {
	b.claim(r.Change.Device)
	return b.journal.Put(changeKey(r.Change.Device), r)
}

// ErrNotBegun is matched by errors that say that a change has to be written down before its first write.
const ErrNotBegun = host.Error("its change was not started")

// mayWrite is an ErrNotBegun for a device without a record.
func (b *Handle) mayWrite(a iommu.Address) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.begun[a] {
		return fmt.Errorf("bind: %s: %w", a, ErrNotBegun)
	}
	return nil
}

// change is the record of a device's change that is under way.
func (b *Handle) change(a iommu.Address) (r changeRecord, known bool, err error) {
	known, err = b.journal.Get(changeKey(a), &r)
	if len(r.Unit) == 0 {
		r.Unit = []iommu.Address{a}
	}
	return r, known, err
}

// waitsFor are the processes that a change waits for, as far as they can be seen.
func (r *changeRecord) waitsFor(h *iommu.Host) []holder.Holder {
	found, _ := holder.OpenIn(h, r.Change.Device, r.Nodes)
	return found
}

// orphan reports whether the child still writes for a command that is over.
func (r *changeRecord) orphan(h *iommu.Host) bool {
	return r.Writer != nil && r.Writer.Alive(h) && !r.Command.Alive(h)
}

// takenRecord is what a taken device had. An address is no identity: the ids must still be the same.
type takenRecord struct {
	Vendor    uint16         `json:"vendor"`
	Device    uint16         `json:"device"`
	Driver    string         `json:"driver"`
	Override  string         `json:"driver_override"`
	Identity  iommu.Identity `json:"identity"`
	NodeOwner string         `json:"node_owner,omitempty"`
	Block     bool           `json:"block,omitempty"` // it had disks
}

// taken is what a device had when it was taken.
func (b *Handle) taken(d *iommu.Device) (r takenRecord, known bool, err error) {
	known, err = b.journal.Get(takenKey(d.Address), &r)
	if !known || r.Vendor != d.Vendor || r.Device != d.Device {
		return takenRecord{}, false, err
	}
	return r, true, nil
}

// Taken is what was written down of a device when it was taken; nothing of one that was not.
func (b *Handle) Taken(d *iommu.Device) (iommu.Identity, error) {
	id, _, err := iommu.Recorded(b.host, d)
	return id, err
}

// remember records what a device has before it is taken. A record of a device that has no driver now is what knows
// better: of one that viaduct took and something else unbound.
func (b *Handle) remember(d *iommu.Device, owner *NodeOwner) error {
	old, known, err := b.taken(d)
	if err != nil {
		return err
	}
	if known && owner != nil && owner.Text != old.NodeOwner {
		old.NodeOwner = owner.Text
		if err := b.journal.Put(takenKey(d.Address), old); err != nil {
			return err
		}
	}
	if d.VFIO || known && d.Driver == "" {
		return nil
	}

	disks, err := holder.Disks(b.host, d)
	if err != nil {
		return err
	}
	id, err := iommu.Identify(b.host, d)
	if err != nil {
		return err
	}
	r := takenRecord{
		Vendor: d.Vendor, Device: d.Device, Driver: d.Driver, Override: d.DriverOverride,
		Identity: id, Block: len(disks) > 0,
	}
	if owner != nil {
		r.NodeOwner = owner.Text
	}
	return b.journal.Put(takenKey(d.Address), r)
}

// forgetTaken drops what is known of a device that is no longer taken.
func (b *Handle) forgetTaken(a iommu.Address) error {
	return errors.Join(b.journal.Delete(takenKey(a)), b.dropRules(a, ""))
}

// Forget drops what the journal keeps of VFs that are no more.
func (b *Handle) Forget(vfs []iommu.VF) error {
	errs := []error{b.MayChange()}
	if errs[0] != nil {
		return errs[0]
	}
	for _, vf := range vfs {
		errs = append(errs, b.forgetTaken(vf.Address))
		if b.mayWrite(vf.Address) == nil {
			// A change of it could not be ended.
			errs = append(errs, b.end(vf.Address))
		}
	}
	return errors.Join(errs...)
}
