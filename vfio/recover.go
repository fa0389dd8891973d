package vfio

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"viaduct/internal/journal"
	"viaduct/iommu"
)

// Recovered is what became of a device whose change had been interrupted.
type Recovered struct {
	Device iommu.Address
	What   string
	Err    error
}

// dying is how long a child whose command was killed is waited for in any case: it may only be about to end.
const dying = 200 * time.Millisecond

// Recover finishes or undoes what interrupted runs left: a take that did not get through is undone, unless its whole unit is
// there; a device that was on its way back goes there. What another viaduct is at work on is left alone, and what still waits
// in a write is reported with a *StuckError, with wait only after the Binder's Timeout.
func (b *Binder) Recover(ctx context.Context, wait bool) ([]Recovered, error) {
	l, err := b.openLocks()
	if l == nil {
		return nil, err
	}
	keys, err := b.Journal.Keys(journal.Changing)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, b.timeout())
	defer cancel()
	records := map[iommu.Address]changeRecord{}
	var recorded []iommu.Address
	for _, k := range keys {
		if a, err := iommu.ParseAddress(strings.TrimPrefix(k, journal.Changing)); err == nil {
			recorded = append(recorded, a)
		}
	}
	var out []Recovered
	for _, a := range recorded {
		ok := b.holds(a)
		if r, known, err := b.change(a); !ok && err == nil && known && r.Unit[0] != a && records[r.Unit[0]].Op == "" && slices.Contains(recorded, r.Unit[0]) {
			continue // whoever has the first of a unit has the unit
		}
		if !ok {
			if ok, err = l.try(a); err != nil {
				return nil, err
			}
		}
		r, known, err := b.change(a) // it may have ended since the names were read
		if !ok && err == nil && known && !r.Command.Alive(b.Host) {
			patience := dying
			if wait && r.Stuck == "" {
				patience = b.timeout()
			}
			ctx, cancel := context.WithTimeout(ctx, patience)
			ok = l.wait(ctx, a) == nil
			cancel()
			r, known, err = b.change(a)
			if !ok && err == nil && known && r.orphan(b.Host) {
				out = append(out, Recovered{a, "is still stuck", b.stillStuck(r)})
			}
		}
		switch {
		case !ok:
			continue
		case err != nil:
			out = append(out, Recovered{a, "has a record that cannot be read", err})
		case !known:
		default:
			records[a] = r
			continue
		}
		b.release(a)
	}
	for _, first := range slices.SortedFunc(maps.Keys(records), iommu.Address.Compare) {
		r, ok := records[first]
		if !ok {
			continue // it went with the unit of one before
		}
		var unit []changeRecord
		whole := true
		for _, a := range r.Unit {
			if m, ok := records[a]; ok {
				unit = append(unit, m)
				delete(records, a)
			} else if _, known, err := b.change(a); known || err != nil {
				whole = false // another has it, or its write is stuck: half a unit is not recovered
			}
		}
		if !whole {
			for _, m := range unit {
				b.release(m.Change.Device)
			}
			continue
		}
		if r.Op == opTake || r.Op == opGive {
			out = append(out, b.recoverUnit(unit)...)
		} else {
			out = append(out, b.recoverOther(ctx, r))
		}
		for _, m := range unit {
			b.release(m.Change.Device)
		}
	}
	slices.SortFunc(out, func(a, b Recovered) int { return a.Device.Compare(b.Device) })
	return out, nil
}

func (b *Binder) stillStuck(r changeRecord) error {
	what := r.Stuck
	if what == "" {
		what = fmt.Sprintf("a write of viaduct (pid %d), which was killed,", r.Command.PID)
	}
	return &StuckError{Device: r.Change.Device, What: what, Writer: *r.Writer, Since: r.Since, Holders: r.holders(b.Host)}
}

func (b *Binder) recoverOther(ctx context.Context, r changeRecord) Recovered {
	a := r.Change.Device
	other := b.Others[r.Op]
	if other == nil {
		return Recovered{a, "was left alone", fmt.Errorf("%s: a change of another kind (%s) was interrupted", a, r.Op)}
	}
	now, err := iommu.ReadDevice(b.Host, a)
	if errors.Is(err, iommu.ErrNotFound) || err == nil && now.ID != r.Change.ID {
		return Recovered{a, "is gone", b.End(a)}
	}
	what, err := other(ctx, b, a, r.Data)
	if err == nil {
		err = b.End(a)
	}
	if err != nil {
		err = fmt.Errorf("%s: %w", a, err)
	}
	return Recovered{a, what, err}
}

func (b *Binder) recoverUnit(unit []changeRecord) []Recovered {
	whole := true
	for i := range unit {
		c := &unit[i].Change
		whole = whole && c.check(b.Host) == nil
	}
	var out []Recovered
	for i := range unit {
		c := &unit[i].Change
		r := Recovered{Device: c.Device}
		now, err := iommu.ReadDevice(b.Host, c.Device)
		switch {
		case errors.Is(err, iommu.ErrNotFound) || err == nil && now.ID != c.ID:
			r.What, r.Err = "is gone", errors.Join(b.End(c.Device), b.Journal.Delete(takenKey(c.Device)), b.disown(c.Device))
		case err != nil:
			r.What, r.Err = "cannot be read", err
		case unit[i].Op == opGive || whole:
			r.What = "has arrived: its change had been interrupted"
			if r.Err = b.arrive(c); r.Err == nil {
				r.Err = b.settle(unit[i].Op, *c)
			}
		default:
			r.What, r.Err = "was put back: its change had been interrupted", b.undo(*c, nil)
		}
		if r.Err != nil {
			r.Err = fmt.Errorf("%s: %w", c.Device, r.Err)
		}
		out = append(out, r)
	}
	return out
}
