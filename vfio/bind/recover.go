package bind

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"viaduct/internal/filelock"
	"viaduct/internal/journal"
	"viaduct/iommu"
	"viaduct/vfio/holder"
)

// Recovered is what became of a device whose change had been interrupted.
type Recovered struct {
	Device iommu.Address
	What   string
	Err    error // nil if it was finished or undone
}

// UnknownChangeError says that a change was interrupted which this Handle cannot finish or undo: it was opened without
// the Recoverer for it, as one of package bind alone is for changes of VFs. The change's record was left untouched.
type UnknownChangeError struct {
	Device iommu.Address
	Op     string // the name of the Recoverer
}

func (e *UnknownChangeError) Error() string {
	return fmt.Sprintf("%s: a change of another kind (%s) was interrupted; a program that knows such changes, "+
		"e.g. viaduct recover, finishes or undoes it", e.Device, e.Op)
}

// dying is how long a child whose command was killed is waited for in any case: it may only be about to end.
const dying = 200 * time.Millisecond

// Recover finishes or undoes what interrupted runs left: a take that did not get through is undone, unless its whole
// unit is there; a device that was on its way back goes there. What another process is at work on is left alone, and
// what still waits in a write is reported with a *StuckError. [Handle.Prepare] does this for what it locks.
func (b *Handle) Recover(ctx context.Context) ([]Recovered, error) { return b.recoverAll(ctx, dying) }

// RecoverPatiently is Recover that waits, at most for the Handle's timeout, for what still writes for a run that is
// over, and for a moment for runs that were killed just now and are not gone yet.
func (b *Handle) RecoverPatiently(ctx context.Context) ([]Recovered, error) {
	return b.recoverAll(ctx, b.Timeout())
}

// Recovered is what the last Recover did, also one that was made by [Handle.Prepare] or [Handle.Move].
func (b *Handle) Recovered() []Recovered {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.recovered)
}

// Stuck is what the last Recover reported with an error.
func (b *Handle) Stuck() []Recovered {
	return slices.DeleteFunc(b.Recovered(), func(r Recovered) bool { return r.Err == nil })
}

// reason is a change that could not be recovered as a reason to refuse another one.
func (r *Recovered) reason() holder.Reason {
	return holder.Reason{Kind: holder.Stuck, Device: r.Device.String(), Text: r.Err.Error(), Err: r.Err}
}

// StuckIn refuses devices of which one is stuck in a change of an earlier run, or could not be recovered: a
// *holder.RefusedError that wraps why; nil if none is.
func (b *Handle) StuckIn(devices ...iommu.Address) error {
	for _, r := range b.Stuck() {
		if slices.Contains(devices, r.Device) {
			return holder.Because("change "+r.Device.String(), r.reason(), "")
		}
	}
	return nil
}

func (b *Handle) recoverAll(ctx context.Context, patience time.Duration) ([]Recovered, error) {
	if err := b.MayChange(); err != nil {
		return nil, err
	}
	l, err := b.locks.open()
	if err != nil {
		return nil, err
	}
	r := recovery{b: b, locks: l, patience: patience, records: map[iommu.Address]changeRecord{}}
	err = r.claim(ctx)
	for _, first := range slices.SortedFunc(maps.Keys(r.records), iommu.Address.Compare) {
		if _, left := r.records[first]; !left {
			continue
		}
		if err == nil && ctx.Err() != nil {
			// A unit before may have ended this one's change too.
			if _, known, _ := b.change(first); known {
				err = ctx.Err()
			}
		}
		if err != nil || ctx.Err() != nil {
			b.disclaim(first)
			continue
		}
		// What was begun is brought to its end: half of it would have to be undone, VFs that are all there included.
		r.unit(context.WithoutCancel(ctx), first)
	}

	slices.SortFunc(r.out, func(a, b Recovered) int { return a.Device.Compare(b.Device) })
	b.mu.Lock()
	defer b.mu.Unlock()
	b.recovered = r.out
	return slices.Clone(r.out), err
}

// recovery is one run of Recover.
type recovery struct {
	b        *Handle
	locks    *filelock.File
	patience time.Duration // for a child whose command is over
	waited   bool          // for commands that are about to end

	records map[iommu.Address]changeRecord // of devices that are locked now
	out     []Recovered
}

// claim locks the devices that have a record, and reads it: it may have ended since the names were read.
func (r *recovery) claim(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, r.b.Timeout())
	defer cancel()
	keys, err := r.b.journal.Keys(journal.Changing)
	if err != nil {
		return err
	}
	var recorded []iommu.Address
	for _, k := range keys {
		if a, err := iommu.ParseAddress(strings.TrimPrefix(k, journal.Changing)); err == nil {
			recorded = append(recorded, a)
		}
	}

	for _, a := range recorded {
		if r.left(a, recorded) {
			continue
		}
		ours, err := r.lock(ctx, a)
		if err != nil {
			return err
		}
		if !ours {
			continue
		}
		switch record, known, err := r.b.change(a); {
		case err != nil:
			r.out = append(r.out, Recovered{a, "has a record that cannot be read", err})
		case known && record.Stuck != "" && record.Command == r.b.child.command() && record.Writer.Alive(r.b.host):
			// This Handle's own write waits yet.
			r.out = append(r.out, Recovered{a, "is still stuck", r.b.stillStuck(record)})
			continue
		case known:
			r.records[a] = record
			r.b.claim(a)
			continue
		}
		r.b.locks.pass(a)
	}
	return nil
}

// left reports whether a device is left to whoever has the first of its unit: who has that has the unit.
func (r *recovery) left(a iommu.Address, recorded []iommu.Address) bool {
	record, known, err := r.b.change(a)
	if r.b.Holds(a) || err != nil || !known || record.Unit[0] == a || !slices.Contains(recorded, record.Unit[0]) ||
		record.Op == opGive {
		// What is given back is so each for itself.
		return false
	}
	_, claimed := r.records[record.Unit[0]]
	return !claimed
}

// lock locks a device for its recovery, unless another has it. A child that still writes for a command that is over is
// waited for a while, and else told of.
func (r *recovery) lock(ctx context.Context, a iommu.Address) (bool, error) {
	if r.b.Holds(a) {
		return true, nil
	}
	if ok, err := r.locks.Try(offset(a)); ok || err != nil {
		return ok, err
	}
	record, known, err := r.b.change(a)
	if err != nil || !known {
		return false, nil
	}
	if record.Command.Alive(r.b.host) && r.patience > dying && !r.waited {
		// It may have been killed a moment ago. For all that were, one moment is enough.
		r.waited = true
		if r.await(ctx, a, dying) {
			return true, nil
		}
		if record, known, err = r.b.change(a); err != nil || !known {
			return false, nil
		}
	}
	if record.Command.Alive(r.b.host) {
		return false, nil
	}

	patience := r.patience
	if record.Stuck != "" {
		patience = dying
	}
	if r.await(ctx, a, patience) {
		return true, nil
	}
	record, known, err = r.b.change(a)
	if err == nil && known && record.orphan(r.b.host) {
		r.out = append(r.out, Recovered{a, "is still stuck", r.b.stillStuck(record)})
	}
	return false, nil
}

// await locks a device if it becomes free in time.
func (r *recovery) await(ctx context.Context, a iommu.Address, patience time.Duration) bool {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return r.locks.Wait(ctx, offset(a)) == nil
}

// unit recovers the unit that a device with a record is of, unless it went with a unit before.
func (r *recovery) unit(ctx context.Context, first iommu.Address) {
	record, ok := r.records[first]
	if !ok {
		return
	}

	var members []changeRecord
	whole := true
	for _, a := range record.Unit {
		if m, ok := r.records[a]; ok {
			members = append(members, m)
			delete(r.records, a)
		} else if _, known, err := r.b.change(a); known || err != nil {
			// Another has it, or its write is stuck: half a unit is not recovered, unless each is for itself.
			whole = record.Op == opGive && whole
		}
	}
	var out []Recovered
	switch {
	case !whole:
	case record.Op == opTake || record.Op == opGive:
		out = r.b.recoverUnit(members)
	default:
		out = append(out, r.b.recoverOther(ctx, record))
	}
	r.out = append(r.out, out...)

	for _, m := range members {
		a := m.Change.Device
		// What waits in a write is the child's, which shares the lock: it stays with both.
		if !slices.ContainsFunc(out, func(r Recovered) bool { return r.Device == a && IsStuck(r.Err) }) {
			r.b.disclaim(a)
		}
	}
}

// claim makes an interrupted run's change of a device, which is locked, this run's to finish or to undo.
func (b *Handle) claim(a iommu.Address) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.begun == nil {
		b.begun = map[iommu.Address]bool{}
	}
	b.begun[a] = true
}

// disclaim ends that, whatever came of it.
func (b *Handle) disclaim(a iommu.Address) {
	b.mu.Lock()
	delete(b.begun, a)
	b.mu.Unlock()
	b.locks.pass(a)
}

// resume makes the records those of this run, which is at work on them now: should its own write wait, others are told
// of it.
func (b *Handle) resume(records []changeRecord) error {
	w, err := b.child.get()
	if err != nil {
		return err
	}
	for i := range records {
		r := &records[i]
		r.Command, r.Writer, r.Stuck = b.child.command(), &w.process, ""
		if err := b.putRecord(*r); err != nil {
			return err
		}
	}
	return nil
}

func (b *Handle) stillStuck(r changeRecord) error {
	what := r.Stuck
	if what == "" {
		what = fmt.Sprintf("a write of viaduct (pid %d), which was killed,", r.Command.PID)
	}
	return &StuckError{
		Device:  r.Change.Device,
		What:    what,
		Writer:  *r.Writer,
		Since:   r.Since,
		Holders: r.waitsFor(b.host),
	}
}

// recoverOther has another package finish or undo its change.
func (b *Handle) recoverOther(ctx context.Context, r changeRecord) Recovered {
	a := r.Change.Device
	other := b.options.Recoverers[r.Op]
	if other == nil {
		return Recovered{a, "was left alone", &UnknownChangeError{a, r.Op}}
	}
	now, err := iommu.ReadDevice(b.host, a)
	if r.Change.gone(&now, err) {
		return Recovered{a, "is gone", b.end(a)}
	}

	if err := b.resume([]changeRecord{r}); err != nil {
		return Recovered{a, "is not done", err}
	}

	// The device is this Handle's while it is recovered.
	held := b.Holds(a)
	b.locks.hold(a)
	what, err := other(ctx, b, a, r.Data)
	if err == nil {
		err = b.end(a)
	}
	if !held {
		b.locks.unhold(a)
	}
	if err != nil {
		err = fmt.Errorf("%s: %w", a, err)
	}
	return Recovered{a, what, err}
}

// arrived reports whether all of a unit is where it was to go.
func (b *Handle) arrived(unit []changeRecord) (bool, error) {
	for i := range unit {
		c := &unit[i].Change
		now, err := iommu.ReadDevice(b.host, c.Device)
		if c.gone(&now, err) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		if !c.is(&now) {
			return false, nil
		}
	}
	if unit[0].Op != opTake {
		return true, nil
	}

	// One that has no record had nothing to be done, or was put back.
	for _, a := range unit[0].Unit {
		if slices.ContainsFunc(unit, func(r changeRecord) bool { return r.Change.Device == a }) {
			continue
		}
		now, err := iommu.ReadDevice(b.host, a)
		if errors.Is(err, iommu.ErrNotFound) {
			return false, nil
		}
		if kept := now.DriverOverride == None || now.Driver == stub; err != nil || !now.VFIO && !kept {
			return false, err
		}
	}
	return true, nil
}

// givenBack reports whether a unit that is given back was begun: its first write comes when all of it are written down.
// One that has no record is either not written down yet, or home.
func (b *Handle) givenBack(unit []changeRecord) (begun bool, err error) {
	if unit[0].Op != opGive || len(unit) == len(unit[0].Unit) {
		return true, nil
	}
	for i := range unit {
		c := &unit[i].Change
		now, err := iommu.ReadDevice(b.host, c.Device)
		if err != nil || now.Driver != c.From || now.DriverOverride != c.FromOverride {
			// Of one that is gone, or does not answer, its own recovery tells.
			return true, nil
		}
	}

	for _, a := range unit[0].Unit {
		if slices.ContainsFunc(unit, func(r changeRecord) bool { return r.Change.Device == a }) {
			continue
		}
		if _, recorded, err := b.change(a); recorded || err != nil {
			// It is another's, or waits in its write.
			return true, nil
		}
		now, err := iommu.ReadDevice(b.host, a)
		if errors.Is(err, iommu.ErrNotFound) {
			continue
		}
		if err != nil {
			return false, err
		}
		if _, taken, err := b.taken(&now); err != nil || taken || now.VFIO {
			return false, err
		}
	}
	return true, nil
}

// recoverUnit finishes a unit that is on its way back, or that is where it was to go as a whole, and puts back any
// other.
func (b *Handle) recoverUnit(unit []changeRecord) []Recovered {
	var out []Recovered
	whole, err := b.arrived(unit)
	if err != nil {
		// Then nothing is known of the unit, and its records stay.
		for i := range unit {
			a := unit[i].Change.Device
			out = append(out, Recovered{a, "cannot be read", fmt.Errorf("%s: %w", a, err)})
		}
		return out
	}

	if begun, err := b.givenBack(unit); err != nil || !begun {
		for i := range unit {
			c := &unit[i].Change
			r := Recovered{c.Device, "is as it was: its change was interrupted before it started", err}
			if err == nil {
				r.Err = b.end(c.Device)
			}
			out = append(out, r)
		}
		return out
	}

	if err := b.resume(unit); err != nil {
		for i := range unit {
			out = append(out, Recovered{unit[i].Change.Device, "is not done", err})
		}
		return out
	}
	for i := range unit {
		c := &unit[i].Change
		c.op = unit[i].Op
		r := Recovered{Device: c.Device}
		now, err := iommu.ReadDevice(b.host, c.Device)
		switch {
		case c.gone(&now, err):
			r.What, r.Err = "is gone", errors.Join(b.end(c.Device), b.forgetTaken(c.Device))
		case err != nil:
			r.What, r.Err = "cannot be read", err
		case c.op == opGive || whole:
			r.What = "is where it was going: its change was interrupted"
			if r.Err = b.arrive(c); r.Err == nil {
				r.Err = b.finish(*c)
			}
		default:
			r.What, r.Err = "was put back: its change was interrupted", b.putBack(*c, nil)
		}
		if r.Err != nil {
			r.Err = fmt.Errorf("%s: %w", c.Device, r.Err)
		}
		out = append(out, r)
	}
	return out
}
