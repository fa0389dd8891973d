package bind

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"viaduct/iommu"
)

// request is a sequence of writes for a device, each made when the one before it succeeded, with the change to be
// checked.
type request struct {
	ID     int64
	Device iommu.Address // which the lock is for
	Steps  []Step
	Change *Change         // nil: the caller checks
	Times  []time.Duration // how long each write may take
	Batch  int64           // that it can be taken back with; 0 for what is not
	Drop   bool            // instead of all that: what was not begun yet of the batch is not to be
}

// request is what the child is to do for a change: its modules are loaded.
func (c *Change) request() request {
	steps := slices.DeleteFunc(slices.Clone(c.Steps), func(s Step) bool { return s.Module != "" })
	return request{Device: c.Device, Steps: steps, Change: c}
}

// write makes the writes of a device that is in the journal.
func (b *Handle) write(ctx context.Context, batch int64, c Change) error {
	if ctx.Err() != nil {
		return fmt.Errorf("%s: interrupted before it was touched", c.Device)
	}
	r := c.request()
	r.Batch = batch
	return b.noteStuck(b.send(r))
}

// Write makes writes for a device whose change was begun with [Handle.Begin] (else it is an [ErrNotBegun]), one after
// the other until one fails. One that does not return within the time for it is a *StuckError, and the device the
// child's until it does. Errors wrap the errno, and end with what the kernel says of the device, where it says
// anything.
func (b *Handle) Write(a iommu.Address, steps []Step) error {
	if err := errors.Join(b.MayChange(), b.locked(a), b.mayWrite(a)); err != nil {
		return err
	}
	for _, s := range steps {
		if s.Module != "" || s.Path == "" {
			return fmt.Errorf("bind: %s: %q is not a write to a file", a, s)
		}
	}
	if len(steps) == 0 {
		return nil
	}
	log := openKernelLog(b.host)
	defer log.close()
	return log.explain(a, b.noteStuck(b.send(request{Device: a, Steps: steps})))
}

// send has the child make writes.
func (b *Handle) send(r request) error {
	w, err := b.child.get()
	if err != nil {
		return err
	}
	for _, s := range r.Steps {
		r.Times = append(r.Times, b.timeoutOf(s))
	}
	return w.run(r)
}

// carryOut makes writes until begin, asked before each, says no. A probe succeeds even when nothing was bound: what
// follows it is done only if the change has come about.
func carryOut(h *iommu.Host, steps []Step, c *Change, begin func(step int) bool) error {
	for i, s := range steps {
		if !begin(i) {
			// And nobody is there to be told.
			return nil
		}
		if err := h.Write(s.Path, s.Value); err != nil {
			return err
		}
		if c != nil && strings.HasSuffix(s.Path, "drivers_probe") && i+1 < len(steps) {
			if err := c.checkDriver(h); err != nil {
				return err
			}
		}
	}
	return nil
}
