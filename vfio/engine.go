package vfio

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"viaduct/internal/host"
	"viaduct/internal/journal"
	"viaduct/iommu"
)

// DefaultTimeout is how long one write may take.
const DefaultTimeout = 30 * time.Second

// Binder takes devices and gives them back: it plans, writes to the journal what it is going to change, changes it, reads
// back what came of it, and undoes what went wrong. One Binder serves one command; it is closed when that is over.
type Binder struct {
	Host    *iommu.Host
	Journal *journal.Journal // nil: a captured host, on which nothing can be carried out
	Timeout time.Duration    // how long one write may take; 0 is DefaultTimeout
	Owner   *NodeOwner       // who is to own the nodes of what is taken; nil leaves them as they are

	mu      sync.Mutex
	locks   *locks
	held    map[iommu.Address]bool // by Lock
	writer  *writer
	aliases []byte
	modules map[string][]string // by alias
}

// Close frees the locks and lets the child that writes end; one that is stuck goes on by itself.
func (b *Binder) Close() {
	b.mu.Lock()
	defer b.mu.Unlock()
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
}

// Take takes units, each whole or not at all: if one of a unit's devices fails, the others are put back as they were.
func (b *Binder) Take(ctx context.Context, units [][]*iommu.Device, driver string) []Result {
	return b.each(ctx, opTake, units, func(d *iommu.Device) (Change, error) { return b.PlanTake(d, driver) })
}

// GiveBack gives units back, each device to what it had when it was taken. One that fails is put back as it was.
func (b *Binder) GiveBack(ctx context.Context, units [][]*iommu.Device) []Result {
	return b.each(ctx, opGive, units, b.PlanGiveBack)
}

// The kernel serialises part of a probe, and udev's rules run for each: more than a few at once bring nothing.
const parallel = 8

// each plans all units, with the modules they need, and carries out several at a time.
func (b *Binder) each(ctx context.Context, op string, units [][]*iommu.Device, plan func(*iommu.Device) (Change, error)) []Result {
	results := make([][]Result, len(units))
	locked := b.Lock(ctx, slices.Concat(units...)) // what the caller has locked stays so
	for i, unit := range units {
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
	}
	todo := make(chan int)
	var wg sync.WaitGroup
	for range min(parallel, len(units)) {
		wg.Go(func() {
			for i := range todo {
				b.unit(ctx, op, units[i], results[i])
			}
		})
	}
	for i := range units {
		todo <- i
	}
	close(todo)
	wg.Wait()
	return slices.Concat(results...)
}

// loaded plans, loads the module the plan needs, and plans again now that the driver's name is known.
func (b *Binder) loaded(ctx context.Context, d *iommu.Device, plan func(*iommu.Device) (Change, error)) (Change, error) {
	c, err := plan(d)
	if err != nil || c.Module == "" {
		return c, err
	}
	module := c.Module
	if err := modprobe(ctx, module); err != nil {
		return c, err
	}
	if c, err = plan(d); err == nil && c.Module != "" {
		err = fmt.Errorf("module %s is loaded, but there is no PCI driver %s", module, c.To)
	}
	return c, err
}

// unit carries out the changes of one unit.
func (b *Binder) unit(ctx context.Context, op string, unit []*iommu.Device, results []Result) {
	failed := slices.ContainsFunc(results, func(r Result) bool { return r.Err != nil })
	if failed && op == opTake {
		return // nothing was touched yet
	}
	log := openKernelLog(b.Host)
	defer log.close()
	done := 0
	for i := range results {
		r := &results[i]
		if r.Err == nil && len(r.Steps) > 0 {
			r.Err = b.one(ctx, op, unit, unit[i], r.Change, log)
		}
		if done = i + 1; r.Err != nil && op == opTake {
			failed = true
			break
		}
	}
	if op == opTake && !failed {
		if err := b.nodes(ctx, unit); err != nil {
			results[len(results)-1].Err = err
			failed = true
		}
	}
	if failed && op == opTake { // a group that is not whole is of no use to a guest
		for i := range slices.Backward(results[:done]) {
			r := &results[i]
			if len(r.Steps) == 0 {
				continue
			}
			if err := b.undo(r.Change, r.Err); err != nil {
				r.Err = errors.Join(r.Err, err)
			} else if r.Err == nil {
				r.Err = fmt.Errorf("%s: put back, as its group could not be taken whole", r.Device)
			}
		}
		return
	}
	for i := range results {
		r := &results[i]
		if r.Err == nil {
			r.Err = b.settle(op, r.Change)
		}
	}
}

// one writes the record, makes the writes and checks.
func (b *Binder) one(ctx context.Context, op string, unit []*iommu.Device, d *iommu.Device, c Change, log *kernelLog) error {
	if ctx.Err() != nil {
		return fmt.Errorf("%s: interrupted before it was touched", d.Name)
	}
	r := changeRecord{Op: op, Change: c, Command: self(b.Host), Since: time.Now()}
	for _, d := range unit {
		r.Unit = append(r.Unit, d.Address)
	}
	if b.Host.Live() {
		w, err := b.startedWriter()
		if err != nil {
			return err
		}
		r.Writer = &w.process
		if r.Nodes, err = nodesOf(b.Host, d); err != nil {
			return err
		}
	}
	if op == opTake {
		if err := errors.Join(b.remember(d), b.own(d)); err != nil {
			return err
		}
	}
	if err := b.Journal.Put(changeKey(d.Address), r); err != nil {
		return err
	}
	err := b.write(c)
	if err == nil {
		return nil
	}
	if stuck, ok := errors.AsType[*StuckError](err); ok { // the device is the child's until the write returns
		stuck.Holders = r.holders(b.Host)
		r.Stuck = stuck.What
		return errors.Join(err, b.Journal.Put(changeKey(d.Address), r))
	}
	if why := log.about(d.Name); why != "" {
		err = fmt.Errorf("%w; the kernel says: %s", err, why)
	}
	if op == opGive {
		err = errors.Join(err, b.undo(c, nil))
	}
	return err
}

// write makes a change's writes, and looks after the probe, which succeeds even when nothing was bound.
func (b *Binder) write(c Change) error {
	steps := slices.DeleteFunc(slices.Clone(c.Steps), func(s Step) bool { return s.Module != "" })
	probed := 1 + slices.IndexFunc(steps, func(s Step) bool { return strings.HasSuffix(s.Path, "drivers_probe") })
	for _, part := range [][]Step{steps[:probed], steps[probed:]} {
		if len(part) == 0 {
			continue
		}
		if err := b.run(c.Device, part); err != nil {
			return err
		}
		if err := b.check(c); err != nil {
			return err
		}
	}
	return b.checkOverride(c)
}

func (b *Binder) startedWriter() (*writer, error) {
	l, err := b.openLocks()
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.writer != nil {
		select {
		case <-b.writer.ended:
		default:
			return b.writer, nil
		}
	}
	b.writer, err = startWriter(b.Host, l)
	return b.writer, err
}

// run makes writes in the child; on any host but the running one there is nothing that could block.
func (b *Binder) run(a iommu.Address, steps []Step) error {
	if !b.Host.Live() {
		for _, s := range steps {
			if err := b.Host.Write(s.Path, s.Value); err != nil {
				return err
			}
		}
		return nil
	}
	w, err := b.startedWriter()
	if err != nil {
		return err
	}
	return w.run(a, steps, b.timeout())
}

// check reads the driver link.
func (b *Binder) check(c Change) error {
	driver, err := b.Host.LinkBase(path.Join(devicePath(c.Device), "driver"))
	if host.Absent(err) && b.Host.Exists(devicePath(c.Device)) {
		driver, err = "", nil
	}
	if err != nil {
		return err
	}
	return c.check(driver)
}

func (b *Binder) checkOverride(c Change) error {
	now, err := b.Host.String(overrideOf(c.Device))
	if now == "(null)" {
		now = ""
	}
	if err == nil && now != c.ToOverride {
		err = fmt.Errorf("%s: driver_override was set to %q and is %q", c.Device, c.ToOverride, now)
	}
	return err
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
	return b.write(there)
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
	_, known, err := b.taken(d)
	if err != nil || iommu.IsVFIODriver(d.Driver) || (known && d.Driver == "") {
		return err
	}
	r := takenRecord{
		Vendor: d.Vendor, Device: d.Device, Driver: d.Driver, Override: d.DriverOverride, Identity: b.identify(d),
	}
	if b.Owner != nil {
		r.NodeOwner = b.Owner.Text
	}
	return b.Journal.Put(takenKey(d.Address), r)
}

// identify is what can be said of a device while its own driver has it. What cannot be read is left out.
func (b *Binder) identify(d *iommu.Device) Identity {
	id := Identity{ID: d.ID}
	id.Path, _ = iommu.PathOf(b.Host, d)
	if d.PhysFn == nil { // a VF has no number of its own, and reading config space takes time
		id.Serial, _ = iommu.ReadSerial(b.Host, d.Address)
	}
	if len(d.Netdevs) > 0 {
		id.MACs = permanentMACs(b.Host, d.Netdevs)
	}
	return id
}
