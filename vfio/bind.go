package vfio

import (
	"context"
	"errors"
	"fmt"
	"path"
	"strings"

	"viaduct/internal/journal"
	"viaduct/iommu"
)

// Auto lets [Binder.PlanTake] choose the driver: the variant driver that modules.alias names for the device, else vfio-pci.
const Auto = "auto"

// None as a driver_override matches no driver, so that the device stays without one.
const None = "none"

// Binder takes devices and gives them back.
type Binder struct {
	Host    *iommu.Host
	Journal *journal.Journal // remembers what a taken device had
}

// Change leads one device from one driver to another.
type Change struct {
	Device iommu.Address
	From   string // driver it has; "" if none
	To     string // driver it gets; None for none, "" if that is left to the kernel
	Module string // to be loaded first; To may then be a guess
	Steps  []Step // none: it is as wanted already
}

const stub = "pci-stub"

// record is what the journal keeps of a taken device.
type record struct {
	Vendor   uint16 `json:"vendor"` // an address is no identity: the ids must still be the same
	Device   uint16 `json:"device"`
	Driver   string `json:"driver"`
	Override string `json:"driver_override"`
}

// recorded is what a device had when it was taken.
func (b *Binder) recorded(d *iommu.Device) (r record, known bool, err error) {
	known, err = b.Journal.Get(key(d.Address), &r)
	if !known || r.Vendor != d.Vendor || r.Device != d.Device {
		return record{}, false, err
	}
	return r, true, nil
}

// Forget drops what the journal keeps of VFs that are no more.
func (b *Binder) Forget(vfs []iommu.VF) error {
	var errs []error
	for _, vf := range vfs {
		errs = append(errs, b.Journal.Delete(key(vf.Address)))
	}
	return errors.Join(errs...)
}

func key(a iommu.Address) string { return "taken-" + a.String() }

func overrideOf(a iommu.Address) string { return path.Join(devicePath(a), "driver_override") }

// rebind is the one order in which a device changes drivers: the override first, so that nothing else (udev, a module that
// is loaded) can have the device between unbind and probe. To None it is only unbound.
func rebind(d *iommu.Device, to string) []Step {
	steps := []Step{{Path: overrideOf(d.Address), Value: orNewline(to)}}
	if d.Driver != "" && d.Driver != to {
		steps = append(steps, Step{Path: path.Join("sys/bus/pci/drivers", d.Driver, "unbind"), Value: d.Name})
	}
	if to != None && (d.Driver != to || to == "") {
		steps = append(steps, Step{Path: "sys/bus/pci/drivers_probe", Value: d.Name})
	}
	return steps
}

// orNewline is what clears an attribute: a write of nothing reaches no driver.
func orNewline(s string) string {
	if s == "" {
		return "\n"
	}
	return s
}

// PlanTake plans how a device gets onto a vfio driver; driver is Auto or a driver's name. The override stays.
func (b *Binder) PlanTake(d *iommu.Device, driver string) (Change, error) {
	c := Change{Device: d.Address, From: d.Driver}
	if driver == Auto && iommu.IsVFIODriver(d.Driver) {
		driver = d.Driver // taken already; a better driver is not worth the loss of a guest
	}
	var err error
	if c.To, c.Module, err = chooseVFIO(b.Host, d.Address, driver); err != nil {
		return c, err
	}
	if c.Module != "" {
		c.Steps = append(c.Steps, Step{Module: c.Module})
	}
	if d.Driver != c.To || d.DriverOverride != c.To {
		c.Steps = append(c.Steps, rebind(d, c.To)...)
	}
	return c, nil
}

// PlanGiveBack plans how a device gets back to what it had when it was taken, be that no driver. If that is not known (it
// was not taken by viaduct, or not since the boot), it goes to its home driver, the one that modules.alias names.
func (b *Binder) PlanGiveBack(d *iommu.Device) (Change, error) {
	c := Change{Device: d.Address, From: d.Driver}
	if d.Driver != "" && !iommu.IsVFIODriver(d.Driver) && d.Driver != stub {
		c.To = d.Driver // at home
		if d.DriverOverride != "" {
			c.Steps = []Step{{Path: overrideOf(d.Address), Value: "\n"}}
		}
		return c, nil
	}
	r, known, err := b.recorded(d)
	switch {
	case err != nil:
		return c, err
	case !known && d.Driver == "" && d.DriverOverride == None:
		c.To = None // kept without a driver on purpose
		return c, nil
	case !known:
		if c.To, c.Module, err = chooseHome(b.Host, d.Address); err != nil {
			return c, err
		}
	case r.Driver == "":
		c.To = None
	default:
		c.To = r.Driver
	}
	if c.Module != "" {
		c.Steps = append(c.Steps, Step{Module: c.Module})
	}
	c.Steps = append(c.Steps, rebind(d, c.To)...)
	if c.To != r.Override { // last: until the device is back, anything could have it without
		c.Steps = append(c.Steps, Step{Path: overrideOf(d.Address), Value: orNewline(r.Override)})
	}
	return c, nil
}

// Take carries out PlanTake and remembers what the device had. When a step fails, the device is put back as it was.
func (b *Binder) Take(ctx context.Context, d *iommu.Device, driver string) (Change, error) {
	c, err := b.loaded(ctx, func() (Change, error) { return b.PlanTake(d, driver) })
	if err != nil || len(c.Steps) == 0 {
		return c, err
	}
	_, had, err := b.recorded(d)
	if err != nil {
		return c, err
	}
	// An older record of a device that has no driver now is what an interrupted run left: it knows better.
	put := !iommu.IsVFIODriver(d.Driver) && (!had || d.Driver != "")
	if put {
		if err := b.Journal.Put(key(d.Address), record{d.Vendor, d.Device, d.Driver, d.DriverOverride}); err != nil {
			return c, err
		}
	}
	if err := b.carryOut(ctx, d, c); err != nil {
		now, readErr := iommu.ReadDevice(b.Host, d.Address)
		if put && !had && readErr == nil && now.Driver == d.Driver && now.DriverOverride == d.DriverOverride {
			err = errors.Join(err, b.Journal.Delete(key(d.Address)))
		}
		return c, err
	}
	return c, nil
}

// GiveBack carries out PlanGiveBack. When a step fails, the device is put back as it was.
func (b *Binder) GiveBack(ctx context.Context, d *iommu.Device) (Change, error) {
	c, err := b.loaded(ctx, func() (Change, error) { return b.PlanGiveBack(d) })
	if err != nil {
		return c, err
	}
	if err := b.carryOut(ctx, d, c); err != nil {
		return c, err
	}
	return c, b.Journal.Delete(key(d.Address))
}

// loaded plans, loads the module the plan needs, and plans again now that the driver's name is known.
func (b *Binder) loaded(ctx context.Context, plan func() (Change, error)) (Change, error) {
	c, err := plan()
	if err != nil || c.Module == "" {
		return c, err
	}
	if err := (Step{Module: c.Module}).Do(ctx, b.Host); err != nil {
		return c, err
	}
	module := c.Module
	if c, err = plan(); err == nil && c.Module != "" {
		err = fmt.Errorf("module %s is loaded, but there is no PCI driver %s", module, c.To)
	}
	return c, err
}

// carryOut does the steps and reads back what came of them; on failure it undoes.
func (b *Binder) carryOut(ctx context.Context, d *iommu.Device, c Change) error {
	var failed error
	for _, s := range c.Steps {
		if failed = s.Do(ctx, b.Host); failed != nil {
			break
		}
		if strings.HasSuffix(s.Path, "drivers_probe") { // which succeeds even when nothing was bound
			if failed = b.check(c); failed != nil {
				break
			}
		}
	}
	if failed == nil && len(c.Steps) > 0 {
		failed = b.check(c)
	}
	if failed == nil {
		return nil
	}
	if err := b.restore(d); err != nil {
		return fmt.Errorf("%w; and it could not be put back as it was: %w", failed, err)
	}
	return failed
}

// check reads the driver link.
func (b *Binder) check(c Change) error {
	now, err := iommu.ReadDevice(b.Host, c.Device)
	if err != nil {
		return err
	}
	switch {
	case c.To == "", c.To == now.Driver, c.To == None && now.Driver == "":
		return nil
	case now.Driver == "":
		return fmt.Errorf("%s: the kernel did not bind it to %s (its log says why: dmesg)", c.Device, c.To)
	}
	return fmt.Errorf("%s: bound to %s instead of %s", c.Device, now.Driver, c.To)
}

// restore puts a device back to the driver and override it had. It has no context: that of the command may be over.
func (b *Binder) restore(was *iommu.Device) error {
	now, err := iommu.ReadDevice(b.Host, was.Address)
	if err != nil {
		return err
	}
	to := was.Driver
	if to == "" {
		to = None
	}
	var steps []Step
	if now.Driver != was.Driver {
		steps = rebind(&now, to)
	}
	if len(steps) > 0 || now.DriverOverride != was.DriverOverride {
		steps = append(steps, Step{Path: overrideOf(was.Address), Value: orNewline(was.DriverOverride)})
	}
	for _, s := range steps {
		if err := s.Do(context.Background(), b.Host); err != nil {
			return err
		}
	}
	return b.check(Change{Device: was.Address, To: to})
}
