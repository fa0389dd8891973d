package bind

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"viaduct/internal/host"
	"viaduct/iommu"
)

// Result is what came of one device's change.
type Result struct {
	Change
	// Err is nil if the device is where it is to be.
	Err error
}

// unit is devices that go together, and how far they have come. They are taken whole or not at all, and given back each
// for itself, which is begun for all or none.
type unit struct {
	b       *Handle
	goal    Goal
	devices []*iommu.Device
	results []*Result // by device
	state   state
}

// state is how far a unit has come.
type state int

const (
	planned  state = iota // nothing of it is written down or changed
	recorded              // what it is going to change is in the journal
	written               // its writes were made, or one failed
	over                  // nothing more is to be done for it: it has arrived, was put back, or waits in a write
)

// ErrUnasked is matched by errors of devices of which [Handle.Check] did not say that they may go there, or not when
// they were locked.
const ErrUnasked = host.Error("check who uses it first, when it is locked")

// Do brings units where they are to go that [Handle.Check] let pass while they were locked; each time that it did
// allows for one. Others are an [ErrUnasked]. What is taken is taken whole or not at all: if one of a unit's devices
// fails, the others are put back as they were. What is given back is so device by device.
//
// All units are planned, with the modules they need, and written down; the child makes their writes, without waiting
// for one unit before the next. What came of them is looked at when all writes are through: each reader of sysfs makes
// a probe, which adds dozens of files there, wait for a lock.
func (b *Handle) Do(ctx context.Context, units [][]*iommu.Device, g Goal) []Result {
	var asked [][]*iommu.Device
	var out []Result
	for _, unit := range units {
		if b.MayChange() == nil && !b.useAnswer(unit, g) {
			for _, d := range unit {
				out = append(out, Result{from(d), fmt.Errorf("bind: %s: %w", d.Name, ErrUnasked)})
			}
			continue
		}
		asked = append(asked, unit)
	}
	return append(out, b.DoUnasked(ctx, asked, g)...)
}

// DoUnasked is [Handle.Do] for units that nobody has to be asked about: VFs that were just made, and devices of which
// the caller knows that their user is gone. It locks them, unless that was done.
func (b *Handle) DoUnasked(ctx context.Context, units [][]*iommu.Device, g Goal) []Result {
	var out []*Result
	var all []*unit
	for _, devices := range units {
		if len(devices) == 0 {
			continue
		}
		if !g.takes() {
			// What is no PCI device was not taken.
			devices = slices.DeleteFunc(slices.Clone(devices), func(d *iommu.Device) bool { return !d.PCI })
		}
		u := newUnit(b, g, devices)
		all, out = append(all, u), append(out, u.results...)
	}

	if err := b.Lock(ctx, slices.Concat(units...)); err != nil {
		for _, r := range out {
			r.Err = err
		}
		return results(out)
	}
	log := openKernelLog(b.host)
	defer log.close()
	batch := batches.Add(1)
	defer context.AfterFunc(ctx, func() { b.child.drop(batch) })()

	sideBySide(all, func(u *unit) { u.begin(ctx, batch) })
	sideBySide(all, func(u *unit) {
		written := u.state == written
		if u.end(ctx, log); written {
			u.tell()
		}
	})
	return results(out)
}

// batches tells the requests of one interrupted call from all others, as those that undo what it did.
var batches atomic.Int64

func sideBySide[T any](all []T, do func(T)) {
	var wg sync.WaitGroup
	for _, one := range all {
		wg.Go(func() { do(one) })
	}
	wg.Wait()
}

func results(all []*Result) []Result {
	out := make([]Result, len(all))
	for i, r := range all {
		out[i] = *r
	}
	return out
}

func newUnit(b *Handle, g Goal, devices []*iommu.Device) *unit {
	u := &unit{b: b, goal: g, devices: devices}
	for _, d := range devices {
		u.results = append(u.results, &Result{Change: from(d)})
	}
	return u
}

func (u *unit) failed() bool {
	return slices.ContainsFunc(u.results, func(r *Result) bool { return r.Err != nil })
}

// begin plans the unit, writes down what it is going to change, and makes the writes.
func (u *unit) begin(ctx context.Context, batch int64) {
	for i, d := range u.devices {
		u.plan(ctx, i, d)
	}
	if u.failed() && u.goal.takes() {
		u.leave()
		return
	}

	u.record()
	if u.state != recorded {
		return
	}
	u.state = written
	if !u.goal.takes() {
		sideBySide(u.changing(), func(r *Result) { r.Err = u.b.write(ctx, batch, r.Change) })
		return
	}
	for _, r := range u.changing() {
		if r.Err = u.b.write(ctx, batch, r.Change); r.Err != nil {
			// A group that is not whole is of no use to a guest.
			return
		}
	}
}

// changing are the results of the devices that are to be written to.
func (u *unit) changing() []*Result {
	return slices.DeleteFunc(slices.Clone(u.results), func(r *Result) bool { return len(r.Steps) == 0 || r.Err != nil })
}

func (u *unit) plan(ctx context.Context, i int, d *iommu.Device) {
	r := u.results[i]
	if !d.PCI {
		r.Err = noPCI(d)
		return
	}
	if !u.b.Holds(d.Address) {
		r.Err = fmt.Errorf("%s is stuck in an earlier change (viaduct recover says why)", d.Name)
		return
	}
	r.Change, r.Err = u.b.loaded(ctx, d, u.goal)
}

func noPCI(d *iommu.Device) error {
	return fmt.Errorf("%s is not a PCI device, of which the driver could be changed", d.Name)
}

// leave ends a unit of which nothing was touched, as one of its devices cannot go. The others say so.
func (u *unit) leave() {
	u.state = over
	i := slices.IndexFunc(u.results, func(r *Result) bool { return r.Err != nil })
	why := "its group cannot be taken whole without"
	if !u.goal.takes() {
		why = "what becomes of its group cannot be written down, because of"
	}
	for _, r := range u.results {
		if r.Err == nil {
			r.Err = fmt.Errorf("%s: left as it was, because %s %s", r.Device, why, u.devices[i].Name)
		}
	}
}

// record writes the unit down before its first write. A unit that cannot be written down whole is not touched.
func (u *unit) record() {
	r := changeRecord{Op: u.goal.op()}
	todo := u.changing()
	for i, d := range u.devices {
		if u.goal.takes() || slices.Contains(todo, u.results[i]) {
			r.Unit = append(r.Unit, d.Address)
		}
	}
	failed := false
	for i, d := range u.devices {
		if !slices.Contains(todo, u.results[i]) {
			continue
		}
		r.Change = u.results[i].Change
		if u.results[i].Err = u.b.recordOne(d, r, u.goal); u.results[i].Err != nil {
			failed = true
			break
		}
	}
	if !failed {
		u.state = recorded
		return
	}

	for _, r := range todo {
		// Not that of an interrupted run.
		if u.b.mayWrite(r.Device) == nil {
			r.Err = errors.Join(r.Err, u.b.unrecord(r.Change))
		}
	}
	u.leave()
}

// recordOne writes down one device's change, and, of one that is taken, what it had and whose its nodes are.
func (b *Handle) recordOne(d *iommu.Device, r changeRecord, g Goal) error {
	if err := b.put([]*iommu.Device{d}, r); err != nil || !g.takes() {
		return err
	}
	if err := b.remember(d, g.owner); err != nil {
		return err
	}
	if g.owner == nil && !d.VFIO {
		// Whom it belonged to when it was last taken is somebody else.
		return b.dropRules(d.Address, "")
	}
	if d.Role() == iommu.RoleCompanion {
		return nil
	}
	return b.own(d, g.owner)
}

// unrecord drops what was written down of a change of which nothing was made.
func (b *Handle) unrecord(c Change) error {
	return errors.Join(b.dropTaken(c), b.end(c.Device))
}

// end looks at what came of the unit's writes, waits for its nodes, and ends what succeeded or puts it all back.
func (u *unit) end(ctx context.Context, log *kernelLog) {
	if u.state != written {
		return
	}
	u.state = over
	if !u.goal.takes() {
		sideBySide(u.results, func(r *Result) { u.endGiven(ctx, log, r) })
		return
	}
	for _, r := range u.results {
		if len(r.Steps) > 0 {
			if r.Err == nil && !u.failed() {
				r.Err = r.check(u.b.host)
			}
			r.Err = log.explain(r.Device, r.Err)
		}
	}
	if !u.failed() {
		u.readGroups()
	}
	if !u.failed() {
		last := u.results[len(u.results)-1]
		last.Err = u.b.nodes(ctx, u.devices, u.results, u.goal.owner)
	}
	if u.failed() {
		u.putBack()
		return
	}

	for _, r := range u.changing() {
		r.Err = u.b.finish(r.Change)
	}
}

// endGiven looks at what came of one device that is given back, and ends that or puts it back.
func (u *unit) endGiven(ctx context.Context, log *kernelLog, r *Result) {
	if len(r.Steps) == 0 || u.b.mayWrite(r.Device) != nil {
		// It was not begun.
		return
	}
	if r.Err == nil {
		r.Err = r.check(u.b.host)
	}
	if r.Err = log.explain(r.Device, r.Err); r.Err != nil {
		r.Err = errors.Join(r.Err, u.b.putBack(r.Change, r.Err))
		return
	}
	i := slices.Index(u.results, r)
	r.Err = errors.Join(u.b.awaitHome(ctx, u.devices[i]), u.b.finish(r.Change))
}

// readGroups reads the groups of devices that had none before they were bound. Nothing else of such a group may be the
// host's.
func (u *unit) readGroups() {
	for i, d := range u.devices {
		if r := u.results[i]; d.Group == nil && r.To != None && r.To != stub {
			r.Err = u.b.joinGroup(d)
		}
	}
}

func (b *Handle) joinGroup(d *iommu.Device) error {
	now, err := iommu.ReadDevice(b.host, d.Address)
	if err != nil {
		return err
	}
	if now.Group == nil {
		return fmt.Errorf("%s: the kernel made no IOMMU group for it: there is no IOMMU in front of it", d.Name)
	}

	group, err := iommu.ReadGroup(b.host, *now.Group)
	if err != nil {
		return err
	}
	if group.NoIOMMU {
		return fmt.Errorf("%s: the kernel put it into group %d, which has no IOMMU", d.Name, group.ID)
	}
	for _, other := range group.Blockers() {
		return fmt.Errorf("%s: the kernel put it into group %d, together with %s on driver %s of the host", d.Name,
			group.ID,
			other.Name, other.Driver)
	}
	d.Group = now.Group
	return nil
}

// putBack puts back what was begun, in reverse order.
func (u *unit) putBack() {
	for _, r := range slices.Backward(u.results) {
		if len(r.Steps) == 0 {
			continue
		}
		if err := u.b.putBack(r.Change, r.Err); err != nil {
			r.Err = errors.Join(r.Err, err)
		} else if r.Err == nil {
			r.Err = fmt.Errorf("%s: put back, because its group could not be taken whole", r.Device)
		}
	}
	for _, r := range u.results {
		if r.Err == nil {
			r.Err = fmt.Errorf("%s: left as it was, because its group could not be taken whole", r.Device)
		}
	}
}

// loaded plans, loads the module the plan needs, and plans again now that the driver's name is known.
func (b *Handle) loaded(ctx context.Context, d *iommu.Device, g Goal) (Change, error) {
	c, err := b.Plan(d, g)
	if err != nil || c.Module == "" {
		return c, err
	}

	b.modules.loading.Lock()
	defer b.modules.loading.Unlock()
	if c, err = b.Plan(d, g); err != nil {
		// Loaded for another device meanwhile.
		return c, err
	}
	for c.Module != "" {
		module := c.Module
		failed := b.load(ctx, module)
		next, err := b.Plan(d, g)
		if err != nil {
			return c, errors.Join(failed, err)
		}
		if failed == nil && next.Module == module {
			failed = fmt.Errorf("module %s is loaded, but there is no PCI driver %s", module, c.To)
		}
		if failed != nil {
			// Then without it, where there is another way.
			b.modules.tried.Store(module, true)
			if next, err = b.Plan(d, g); err != nil || next.Module == module {
				return c, errors.Join(failed, err)
			}
		}
		c = next
	}
	return c, nil
}

func (b *Handle) load(ctx context.Context, module string) error {
	ctx, cancel := context.WithTimeout(ctx, b.Timeout())
	defer cancel()
	return b.host.Modprobe(ctx, module)
}

// putBack puts a device back as it was before the change and ends the change's record. It has no context: that of the
// command may be over. A device with a stuck write is left alone.
func (b *Handle) putBack(c Change, why error) error {
	if IsStuck(why) {
		return nil
	}
	u := c.back()
	if err := b.arrive(&u); err != nil {
		return fmt.Errorf("%s could not be put back as it was: %w", c.Device, err)
	}
	if err := b.dropTaken(c); err != nil {
		return err
	}
	return b.end(c.Device)
}

// dropTaken drops what is known of a device from when it was taken, if that was for this change, or is no longer of
// use.
func (b *Handle) dropTaken(c Change) error {
	var r takenRecord
	known, err := b.journal.Get(takenKey(c.Device), &r)
	if err != nil || !known || r.Driver != c.From || r.Override != c.FromOverride {
		return err
	}
	return b.forgetTaken(c.Device)
}

// arrive leads a device from wherever it is to where the change ends.
func (b *Handle) arrive(c *Change) error {
	now, err := iommu.ReadDevice(b.host, c.Device)
	if err != nil {
		return err
	}
	there := *c
	if there.Steps = c.steps(&now); len(there.Steps) == 0 {
		return nil
	}
	if err := b.noteStuck(b.send(there.request())); err != nil {
		return err
	}
	return there.check(b.host)
}

// finish ends a change that succeeded.
func (b *Handle) finish(c Change) error {
	if c.op == opGive {
		if err := b.forgetTaken(c.Device); err != nil {
			return err
		}
	}
	return b.end(c.Device)
}
