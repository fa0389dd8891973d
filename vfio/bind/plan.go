package bind

import (
	"errors"
	"fmt"
	"path"
	"slices"

	"viaduct/internal/host"
	"viaduct/iommu"
	"viaduct/vfio/holder"
)

// Change leads one device from one driver to another.
type Change struct {
	Device       iommu.Address `json:"device"`
	Name         string        `json:"-"` // the device's, which is all that one that is no PCI device has
	ID           iommu.ID      `json:"id"`
	From         string        `json:"from"` // driver it has; "" if none
	FromOverride string        `json:"from_override"`
	To           string        `json:"to"` // driver it gets; None for none, "" if that is left to the kernel
	ToOverride   string        `json:"to_override"`
	Module       string        `json:"-"` // to be loaded first, "" if none; To may then be a guess
	Steps        []Step        `json:"-"` // none: it is as wanted already
	Role         iommu.Role    `json:"-"` // that the device has in its group
	op           string
}

// from is a change that begins where a device is.
func from(d *iommu.Device) Change {
	return Change{
		Device: d.Address, Name: d.Name, ID: d.ID, From: d.Driver, FromOverride: d.DriverOverride, Role: d.Role(),
	}
}

func overrideOf(a iommu.Address) string { return path.Join(devicePath(a), "driver_override") }

// rebind is the one order in which a device changes drivers: the override first, so that nothing else (udev, a module
// that is loaded) can have the device between unbind and probe. To None it is only unbound.
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

// Plan plans how a device gets where it is to go. It changes nothing, and no steps say that it is there already.
func (b *Handle) Plan(d *iommu.Device, g Goal) (Change, error) {
	if !d.PCI {
		return from(d), noPCI(d)
	}
	if err := g.check(); err != nil {
		return from(d), err
	}
	var c Change
	var err error
	switch g.to {
	case toTake:
		c, err = b.planTake(d, g.driver)
	case toHome:
		c, err = b.planHome(d)
	default:
		c, err = b.planGiveBack(d)
	}
	c.op = g.op()
	return c, err
}

// planTake plans how a device gets onto a VFIO driver, or to none. The override stays.
func (b *Handle) planTake(d *iommu.Device, driver string) (Change, error) {
	c := from(d)
	bus, err := b.onBusOfGuests(d)
	if err != nil {
		return c, err
	}
	if d.Role() == iommu.RoleCompanion && !bus {
		// Off the host's drivers, which are kept from it, is all that it must be.
		if c.To, c.ToOverride = d.Driver, d.DriverOverride; d.Driver == "" || d.Blocks() {
			c.To, c.ToOverride = None, None
		}
		c.plan(d)
		return c, nil
	}

	if driver == Auto && d.VFIO {
		// Taken already; a better driver is not worth the loss of a guest.
		driver = d.Driver
	}
	if c.To, c.Module, err = b.modules.vfio(d, driver); err != nil {
		return c, err
	}
	c.ToOverride = c.To
	c.plan(d)
	return c, nil
}

// onBusOfGuests reports whether a companion is on the bus of a device of its group that is reset only with that bus:
// the kernel does so only when all that is on it is on VFIO drivers (vfio_pci_dev_set_resettable).
func (b *Handle) onBusOfGuests(companion *iommu.Device) (bool, error) {
	if companion.Role() != iommu.RoleCompanion || companion.Group == nil {
		return false, nil
	}
	t, err := b.Topology()
	if err != nil {
		return false, err
	}
	group, err := t.Group(*companion.Group)
	if err != nil {
		return false, err
	}
	for _, d := range group.Endpoints() {
		if d.Role() != iommu.RoleGuest || !d.PCI {
			continue
		}
		reset, err := iommu.ResetOf(b.host, t, d)
		if err != nil {
			return false, err
		}
		with := func(o *iommu.Device) bool { return o.Address == companion.Address }
		if reset.Way == iommu.ResetBus && slices.ContainsFunc(reset.With, with) {
			return true, nil
		}
	}
	return false, nil
}

func (b *Handle) planGiveBack(d *iommu.Device) (Change, error) {
	c := from(d)
	if d.Blocks() {
		// At home.
		c.To = d.Driver
		c.plan(d)
		return c, nil
	}

	r, known, err := b.taken(d)
	switch {
	case err != nil:
		return c, err
	case !known && d.Driver == "" && d.DriverOverride == None:
		// Kept without a driver on purpose.
		c.To, c.ToOverride = None, None
		return c, nil
	case !known:
		if c.To, c.Module, err = b.modules.home(d); err != nil {
			return c, err
		}
	case r.Driver == "":
		c.To = None
	default:
		c.To = r.Driver
		there, err := registered(b.host, r.Driver)
		if err != nil {
			return c, err
		}
		if !there && !b.modules.useless(d.Modalias()) {
			// Its module was unloaded meanwhile.
			c.Module = d.Modalias()
		}
	}
	c.ToOverride = r.Override
	c.plan(d)
	return c, nil
}

func (b *Handle) planHome(d *iommu.Device) (Change, error) {
	r, known, err := b.taken(d)
	if err != nil {
		return from(d), err
	}
	if d.Blocks() || known && r.Driver != "" {
		return b.planGiveBack(d)
	}

	c := from(d)
	if c.To, c.Module, err = b.modules.home(d); err != nil {
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
		// Left to the kernel, which has chosen.
		to = now.Driver
	}

	var steps []Step
	override := now.DriverOverride
	if there := now.Driver == to && to != "" || now.Driver == "" && to == None; !there {
		steps, override = rebind(now, to), to
	}
	// Last: until the device is there, anything could have it without.
	if override != c.ToOverride {
		steps = append(steps, Step{Path: overrideOf(now.Address), Value: orNewline(c.ToOverride)})
	}
	return steps
}

// back is the change that undoes this one.
func (c *Change) back() Change {
	u := Change{
		Device: c.Device, ID: c.ID, From: c.To, FromOverride: c.ToOverride, To: c.From, ToOverride: c.FromOverride,
	}
	if u.To == "" {
		u.To = None
	}
	return u
}

// is reports whether a device is where the change leads it.
func (c *Change) is(now *iommu.Device) bool {
	there := now.Driver == c.To || c.To == None && now.Driver == "" || c.To == "" && !now.VFIO
	return there && now.DriverOverride == c.ToOverride
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
	if c.To == "" {
		now, err := iommu.ReadDevice(h, c.Device)
		if err == nil && now.VFIO {
			err = c.claimed(h, now.Driver)
		}
		return err
	}

	driver, err := iommu.ReadDriver(h, c.Device)
	switch {
	case err != nil:
		return err
	case driver == c.To, c.To == None && driver == "":
		return nil
	case driver == "":
		return fmt.Errorf("%s: the kernel did not bind it to %s", c.Device, c.To)
	}
	return fmt.Errorf("%s: bound to %s instead of %s", c.Device, driver, c.To)
}

// claimed says why a device that was given to the kernel's choice is on a VFIO driver.
func (c *Change) claimed(h *iommu.Host, driver string) error {
	err := fmt.Errorf("%s: the kernel bound it to %s again", c.Device, driver)
	if where := holder.ClaimedByID(h, c.ID)[c.ID]; where != "" {
		return fmt.Errorf(
			"%w, because vfio-pci.ids= in %s claims it (take it out there, or name the driver with driver_override)",
			err,
			where,
		)
	}
	return err
}

// gone reports whether a device is no more, or is another.
func (c *Change) gone(now *iommu.Device, err error) bool {
	return errors.Is(err, iommu.ErrNotFound) || host.Absent(err) || err == nil && now.ID != c.ID
}
