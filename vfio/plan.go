package vfio

import (
	"fmt"
	"path"

	"viaduct/iommu"
)

// Auto lets a Binder choose the driver: the variant driver that modules.alias names for the device, else vfio-pci.
const Auto = "auto"

// None as a driver_override matches no driver, so that the device stays without one.
const None = "none"

// Change leads one device from one driver to another.
type Change struct {
	Device       iommu.Address `json:"device"`
	ID           iommu.ID      `json:"id"`
	From         string        `json:"from"` // driver it has; "" if none
	FromOverride string        `json:"from_override"`
	To           string        `json:"to"` // driver it gets; None for none, "" if that is left to the kernel
	ToOverride   string        `json:"to_override"`
	Module       string        `json:"-"` // to be loaded first; To may then be a guess
	Steps        []Step        `json:"-"` // none: it is as wanted already
}

func begin(d *iommu.Device) Change {
	return Change{Device: d.Address, ID: d.ID, From: d.Driver, FromOverride: d.DriverOverride}
}

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

// PlanTake plans how a device gets onto a vfio driver; driver is Auto, a driver's name, or None, which takes it from the host and
// leaves it without. The override stays.
func (b *Binder) PlanTake(d *iommu.Device, driver string) (Change, error) {
	c := begin(d)
	if driver == Auto && iommu.IsVFIODriver(d.Driver) {
		driver = d.Driver // taken already; a better driver is not worth the loss of a guest
	}
	var err error
	if c.To, c.Module, err = b.chooseVFIO(d, driver); err != nil {
		return c, err
	}
	c.ToOverride = c.To
	c.plan(d)
	return c, nil
}

// PlanGiveBack plans how a device gets back to what it had when it was taken, be that no driver. If that is not known (it
// was not taken by viaduct, or not since the boot), it goes to its home driver, the one that modules.alias names.
func (b *Binder) PlanGiveBack(d *iommu.Device) (Change, error) {
	c := begin(d)
	if d.Blocks() {
		c.To = d.Driver // at home
		c.plan(d)
		return c, nil
	}
	r, known, err := b.taken(d)
	switch {
	case err != nil:
		return c, err
	case !known && d.Driver == "" && d.DriverOverride == None:
		c.To, c.ToOverride = None, None // kept without a driver on purpose
		return c, nil
	case !known:
		if c.To, c.Module, err = b.chooseHome(d); err != nil {
			return c, err
		}
	case r.Driver == "":
		c.To = None
	default:
		c.To = r.Driver
		if !registered(b.Host, r.Driver) && !b.useless(d.Modalias()) {
			c.Module = d.Modalias() // its module was unloaded meanwhile
		}
	}
	c.ToOverride = r.Override
	c.plan(d)
	return c, nil
}

// PlanHome plans how a device gets to the host's driver, also one that was kept without any: to the one it had when it was
// taken, else to its home driver.
func (b *Binder) PlanHome(d *iommu.Device) (Change, error) {
	if r, known, err := b.taken(d); err != nil || d.Blocks() || known && r.Driver != "" {
		if err != nil {
			return begin(d), err
		}
		return b.PlanGiveBack(d)
	}
	c := begin(d)
	var err error
	if c.To, c.Module, err = b.chooseHome(d); err != nil {
		return c, err
	}
	c.plan(d)
	return c, nil
}

func (c *Change) plan(d *iommu.Device) {
	if c.Module != "" {
		c.Steps = append(c.Steps, Step{Module: c.Module})
	}
	c.Steps = append(c.Steps, c.steps(d)...)
}

// steps lead a device, which may be anywhere in the middle, to where the change ends.
func (c *Change) steps(now *iommu.Device) []Step {
	to := c.To
	if to == "" && now.Blocks() {
		to = now.Driver // left to the kernel, which has chosen
	}
	var steps []Step
	override := now.DriverOverride
	if there := now.Driver == to && to != "" || now.Driver == "" && to == None; !there {
		steps, override = rebind(now, to), to
	}
	if override != c.ToOverride { // last: until the device is there, anything could have it without
		steps = append(steps, Step{Path: overrideOf(now.Address), Value: orNewline(c.ToOverride)})
	}
	return steps
}

// back is the change that undoes this one.
func (c *Change) back() Change {
	u := Change{Device: c.Device, ID: c.ID, From: c.To, FromOverride: c.ToOverride, To: c.From, ToOverride: c.FromOverride}
	if u.To == "" {
		u.To = None
	}
	return u
}

// check compares a device with where the change leads it.
func (c *Change) check(h *iommu.Host) error {
	if err := c.checkDriver(h); err != nil {
		return err
	}
	override, err := iommu.ReadDriverOverride(h, c.Device)
	if err == nil && override != c.ToOverride {
		err = fmt.Errorf("%s: driver_override was set to %q and is %q", c.Device, c.ToOverride, override)
	}
	return err
}

func (c *Change) checkDriver(h *iommu.Host) error {
	driver, err := iommu.ReadDriver(h, c.Device)
	switch {
	case err != nil:
		return err
	case c.To == "", driver == c.To, c.To == None && driver == "":
		return nil
	case driver == "":
		return fmt.Errorf("%s: the kernel did not bind it to %s", c.Device, c.To)
	}
	return fmt.Errorf("%s: bound to %s instead of %s", c.Device, driver, c.To)
}
