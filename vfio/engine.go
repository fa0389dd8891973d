package vfio

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"viaduct/internal/journal"
	"viaduct/iommu"
)

// DefaultTimeout is how long one write may take.
const DefaultTimeout = 30 * time.Second

// Binder takes devices and gives them back: it plans, writes to the journal what it is going to change, changes it, reads
// back what came of it, and undoes what went wrong. One Binder serves one command; it is closed when that is over.
type Binder struct {
	Host    *iommu.Host
	Journal *journal.Journal     // nil: a captured host, on which nothing can be carried out
	Timeout time.Duration        // how long one write may take; 0 is DefaultTimeout
	Owner   *NodeOwner           // who is to own the nodes of what is taken; nil leaves them as they are
	Others  map[string]Recoverer // for the changes that other packages begin
	Gate    *Gate                // that let the change pass, if one was asked: what it found need not be looked for again

	loading sync.Mutex // of modules
	tried   sync.Map   // modules and aliases that brought no driver

	mu      sync.Mutex
	closed  bool
	locks   *locks
	held    map[iommu.Address]bool // by Lock
	writer  *writer
	self    Proc // known once the writer is started
	aliases []byte
	modules map[string][]string // by alias
}

// Close frees the locks and lets the child that writes end; one that is stuck goes on by itself.
func (b *Binder) Close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	if b.writer != nil {
		b.writer.out.Close()
		b.writer = nil
	}
	if b.locks != nil {
		b.locks.file.Close()
		b.locks = nil
	}
}

func (b *Binder) timeout() time.Duration {
	if b.Timeout > 0 {
		return b.Timeout
	}
	return DefaultTimeout
}

// Result is what came of one device's change.
type Result struct {
	Change
	Err error

	begun bool // it is in the journal
}

// Take takes units, each whole or not at all: if one of a unit's devices fails, the others are put back as they were.
func (b *Binder) Take(ctx context.Context, units [][]*iommu.Device, driver string) []Result {
	return b.each(ctx, opTake, units, func(d *iommu.Device) (Change, error) { return b.PlanTake(d, driver) })
}

// GiveBack gives units back, each device to what it had when it was taken. One that fails is put back as it was.
func (b *Binder) GiveBack(ctx context.Context, units [][]*iommu.Device) []Result {
	return b.each(ctx, opGive, units, b.PlanGiveBack)
}

// Home leads units to the host's drivers, as [Binder.PlanHome] has it. One that fails is put back as it was.
func (b *Binder) Home(ctx context.Context, units [][]*iommu.Device) []Result {
	return b.each(ctx, opGive, units, b.PlanHome)
}

// each plans units, with the modules they need, writes the journal, and has the child make the writes, without waiting for one
// unit before the next. What came of them is looked at when all writes are through: each reader of sysfs makes a probe, which
// adds dozens of files there, wait for a lock.
func (b *Binder) each(ctx context.Context, op string, units [][]*iommu.Device, plan func(*iommu.Device) (Change, error)) []Result {
	results := make([][]Result, len(units))
	locked := b.Lock(ctx, slices.Concat(units...)) // what the caller has locked stays so
	log := openKernelLog(b.Host)
	defer log.close()
	batch := batches.Add(1)
	defer context.AfterFunc(ctx, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.writer != nil {
			b.writer.drop(batch)
		}
	})()
	sideBySide := func(do func(i int, unit []*iommu.Device)) {
		var wg sync.WaitGroup
		for i, unit := range units {
			wg.Go(func() { do(i, unit) })
		}
		wg.Wait()
	}
	sideBySide(func(i int, unit []*iommu.Device) {
		results[i] = make([]Result, len(unit))
		for j, d := range unit {
			r := &results[i][j]
			switch {
			case locked != nil:
				r.Change, r.Err = begin(d), locked
			case b.Journal != nil && d.PCI && !b.holds(d.Address):
				r.Change, r.Err = begin(d), fmt.Errorf("%s is stuck in an earlier change (viaduct recover says why)", d.Name)
			default:
				r.Change, r.Err = b.loaded(ctx, d, plan)
			}
		}
		b.record(op, unit, results[i])
		b.writeUnit(ctx, batch, op, results[i])
	})
	sideBySide(func(i int, unit []*iommu.Device) { b.endUnit(ctx, op, unit, results[i], log) })
	return slices.Concat(results...)
}

// loaded plans, loads the module the plan needs, and plans again now that the driver's name is known.
func (b *Binder) loaded(ctx context.Context, d *iommu.Device, plan func(*iommu.Device) (Change, error)) (Change, error) {
	c, err := plan(d)
	if err != nil || c.Module == "" {
		return c, err
	}
	b.loading.Lock()
	defer b.loading.Unlock()
	if c, err = plan(d); err != nil || c.Module == "" { // loaded for another device meanwhile
		return c, err
	}
	for c.Module != "" {
		module := c.Module
		failed := modprobe(ctx, module, b.timeout())
		next, err := plan(d)
		if err != nil {
			return c, err
		}
		if failed == nil && next.Module == module {
			failed = fmt.Errorf("module %s is loaded, but there is no PCI driver %s", module, c.To)
		}
		if failed != nil { // then without it, where there is another way
			b.tried.Store(module, true)
			if next, err = plan(d); err != nil || next.Module == module {
				return c, errors.Join(failed, err)
			}
		}
		c = next
	}
	return c, nil
}

// useless reports whether a module or alias was loaded, or tried to be, and brought no driver.
func (b *Binder) useless(module string) bool {
	_, tried := b.tried.Load(module)
	return tried
}

func failed(results []Result) bool {
	return slices.ContainsFunc(results, func(r Result) bool { return r.Err != nil })
}

// record writes the journal for a unit, before its first write.
func (b *Binder) record(op string, unit []*iommu.Device, results []Result) {
	if op == opTake && failed(results) {
		return
	}
	r := changeRecord{Op: op}
	for _, d := range unit {
		r.Unit = append(r.Unit, d.Address)
	}
	for i, d := range unit {
		if results[i].Err == nil && len(results[i].Steps) > 0 {
			r.Change = results[i].Change
			results[i].Err = b.recordOne(d, r)
			results[i].begun = results[i].Err == nil
		}
	}
}

func (b *Binder) recordOne(d *iommu.Device, r changeRecord) error {
	if err := b.put([]*iommu.Device{d}, r); err != nil || r.Op != opTake {
		return err
	}
	if err := b.remember(d); err != nil {
		return errors.Join(err, b.End(d.Address))
	}
	if b.Owner == nil && !iommu.IsVFIODriver(d.Driver) {
		return b.disown(d.Address) // whom it belonged to when it was last taken is somebody else
	}
	return b.own(d)
}

// writeUnit makes the writes of one unit.
func (b *Binder) writeUnit(ctx context.Context, batch int64, op string, results []Result) {
	for i := range results {
		r := &results[i]
		if op == opTake && failed(results) {
			return // a group that is not whole is of no use to a guest
		}
		if r.begun {
			r.Err = b.one(ctx, batch, r.Change)
		}
	}
}

// endUnit looks at what came of a unit's writes, waits for its nodes, and ends what succeeded or undoes it all.
func (b *Binder) endUnit(ctx context.Context, op string, unit []*iommu.Device, results []Result, log *kernelLog) {
	for i := range results {
		if r := &results[i]; r.begun {
			if r.Err == nil {
				r.Err = r.check(b.Host)
			}
			r.Err = log.explain(r.Device, r.Err)
		}
	}
	if op == opTake && !failed(results) {
		results[len(results)-1].Err = b.nodes(ctx, unit, results)
	}
	if op == opTake && failed(results) {
		b.putBack(results)
		return
	}
	for i := range results {
		switch r := &results[i]; {
		case !r.begun:
		case r.Err != nil:
			r.Err = errors.Join(r.Err, b.undo(r.Change, r.Err))
		case op == opGive:
			r.Err = b.awaitHome(ctx, unit[i])
			fallthrough
		default:
			r.Err = errors.Join(r.Err, b.settle(op, r.Change))
		}
	}
}

// putBack undoes what was begun, in reverse order.
func (b *Binder) putBack(results []Result) {
	for i := range slices.Backward(results) {
		r := &results[i]
		if !r.begun {
			continue
		}
		if err := b.undo(r.Change, r.Err); err != nil {
			r.Err = errors.Join(r.Err, err)
		} else if r.Err == nil {
			r.Err = fmt.Errorf("%s: put back, as its group could not be taken whole", r.Device)
		}
	}
}

// one makes the writes of a device that is in the journal.
func (b *Binder) one(ctx context.Context, batch int64, c Change) error {
	if ctx.Err() != nil {
		return fmt.Errorf("%s: interrupted before it was touched", c.Device)
	}
	r := c.request()
	r.Batch = batch
	return b.stuck(b.send(r))
}

// batches tells the requests of one interrupted call from all others, as those that undo what it did.
var batches atomic.Int64

// stuck writes down what a device's write waits for: the device is the child's until it returns.
func (b *Binder) stuck(err error) error {
	stuck, ok := errors.AsType[*StuckError](err)
	if !ok {
		return err
	}
	r, _, readErr := b.change(stuck.Device)
	if readErr != nil {
		return errors.Join(err, readErr)
	}
	stuck.Holders = r.holders(b.Host)
	r.Stuck = stuck.What
	return errors.Join(err, b.Journal.Put(changeKey(stuck.Device), r))
}

// request is what the child is to do for a change: its modules are loaded.
func (c *Change) request() request {
	steps := slices.DeleteFunc(slices.Clone(c.Steps), func(s Step) bool { return s.Module != "" })
	return request{Device: c.Device, Steps: steps, Change: c}
}

// Write makes writes for a device whose change was begun with [Binder.Begin], one after the other until one fails. One that
// does not return within the Binder's Timeout is a *StuckError, and the device the child's until it does.
func (b *Binder) Write(a iommu.Address, steps []Step) error {
	if len(steps) == 0 {
		return nil
	}
	return b.stuck(b.send(request{Device: a, Steps: steps}))
}

// send has the child make writes, or makes them itself on a host where there is nothing to block.
func (b *Binder) send(r request) error {
	if !b.Host.Live() {
		return carryOut(b.Host, r.Steps, r.Change, func(int) bool { return true })
	}
	w, err := b.startedWriter()
	if err != nil {
		return err
	}
	r.Timeout = b.timeout()
	return w.run(r)
}

// carryOut makes writes until begin, asked before each, says no. A probe succeeds even when nothing was bound: what follows it
// is done only if the change has come about.
func carryOut(h *iommu.Host, steps []Step, c *Change, begin func(step int) bool) error {
	for i, s := range steps {
		if !begin(i) {
			return nil // and nobody is there to be told
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

// Start starts the child that writes, which takes as long as a scan does. Without it the child is started when it is needed.
func (b *Binder) Start() { go func() { _, _ = b.startedWriter() }() }

func (b *Binder) startedWriter() (*writer, error) {
	l, err := b.openLocks()
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil, errors.New("vfio: the Binder is closed")
	}
	if b.writer != nil {
		select {
		case <-b.writer.ended:
		default:
			return b.writer, nil
		}
	}
	b.self = NameProcess(b.Host, os.Getpid())
	b.writer, err = startWriter(b.Host, l)
	return b.writer, err
}

// undo puts a device back as it was before the change and ends the change's record. It has no context: that of the command
// may be over. A device with a stuck write is left alone.
func (b *Binder) undo(c Change, why error) error {
	if _, stuck := errors.AsType[*StuckError](why); stuck {
		return nil
	}
	u := c.back()
	if err := b.arrive(&u); err != nil {
		return fmt.Errorf("%s could not be put back as it was: %w", c.Device, err)
	}
	var r takenRecord
	if known, err := b.Journal.Get(takenKey(c.Device), &r); err != nil {
		return err
	} else if known && r.Driver == c.From && r.Override == c.FromOverride { // made for this change, or no longer of use
		if err := errors.Join(b.Journal.Delete(takenKey(c.Device)), b.disown(c.Device)); err != nil {
			return err
		}
	}
	return b.Journal.Delete(changeKey(c.Device))
}

// arrive leads a device from wherever it is to where the change ends.
func (b *Binder) arrive(c *Change) error {
	now, err := iommu.ReadDevice(b.Host, c.Device)
	if err != nil {
		return err
	}
	there := *c
	if there.Steps = c.steps(&now); len(there.Steps) == 0 {
		return nil
	}
	if err := b.send(there.request()); err != nil {
		return err
	}
	return there.check(b.Host)
}

// settle ends a change that succeeded.
func (b *Binder) settle(op string, c Change) error {
	if op == opGive {
		if err := errors.Join(b.Journal.Delete(takenKey(c.Device)), b.disown(c.Device)); err != nil {
			return err
		}
	}
	return b.Journal.Delete(changeKey(c.Device))
}

// remember records what a device has before it is taken. A record of a device that has no driver now is what knows better:
// of one that viaduct took and something else unbound.
func (b *Binder) remember(d *iommu.Device) error {
	old, known, err := b.taken(d)
	if known && err == nil && b.Owner != nil && b.Owner.Text != old.NodeOwner {
		old.NodeOwner = b.Owner.Text
		err = b.Journal.Put(takenKey(d.Address), old)
	}
	if err != nil || iommu.IsVFIODriver(d.Driver) || (known && d.Driver == "") {
		return err
	}
	r := takenRecord{
		Vendor: d.Vendor, Device: d.Device, Driver: d.Driver, Override: d.DriverOverride, Identity: b.Identify(d),
	}
	disks, err := blockDevices(b.Host, d)
	if err != nil {
		return err
	}
	r.Block = len(disks) > 0
	if b.Owner != nil {
		r.NodeOwner = b.Owner.Text
	}
	return b.Journal.Put(takenKey(d.Address), r)
}
