package iommu

import (
	"path"
	"slices"

	"viaduct/internal/host"
)

// Role is what becomes of a device when a guest gets its IOMMU group.
type Role string

// The roles.
const (
	// RoleGuest is that of a device that is handed over.
	RoleGuest Role = "guest"
	// RoleCompanion is that of a device that is only kept off the host's drivers, as the group is viable only then: the
	// host's own bridges to ISA and memory, SMBus, flash. It is of no use to a guest, and could harm the host.
	RoleCompanion Role = "companion"
	// RolePort is that of a bridge, which the kernel manages itself and which stays as it is.
	RolePort Role = "port"
	// RoleChild is that of a device behind another one's driver, as a disk behind a Volume Management Device: it comes
	// and goes with that driver, and is the guest's with that device.
	RoleChild Role = "child"
)

// companions are the classes whose devices are part of the host's own machinery: base class and subclass, or 0xff for
// all of a base class that is not a port (PCI Code and ID Assignment Specification).
var companions = []struct{ base, sub uint32 }{
	{0x06, 0xff}, // host, ISA, LPC and other bridges
	{0x05, 0x80}, // other memory, as flash for the firmware
	{0x08, 0xff}, // system peripherals: timers, interrupt and DMA controllers, IOMMUs
	{0x0c, 0x05}, // SMBus
	{0x0c, 0x80}, // other serial buses, as SPI to the flash
}

// Role is what becomes of the device when a guest gets its group: As, where somebody has set it, else what its class
// says.
func (d *Device) Role() Role {
	switch {
	case d.IsBridge():
		return RolePort
	case d.Parent != nil:
		return RoleChild
	case d.As != "":
		return d.As
	case !d.PCI || d.PhysFn != nil:
		return RoleGuest
	}
	base, sub := d.Class>>16, d.Class>>8&0xff
	for _, c := range companions {
		if c.base == base && (c.sub == 0xff || c.sub == sub) {
			return RoleCompanion
		}
	}
	return RoleGuest
}

// cardsOwn makes companions by class the guest's where they are another function of a card that is: a graphics card's
// USB-C controller, without which the card cannot be reset as a whole. Functions on a root bus are the host's own.
func cardsOwn(h *Host, groups []Group) error {
	for _, g := range groups {
		for i := range g.Devices {
			d := &g.Devices[i]
			if d.Role() != RoleCompanion {
				continue
			}
			of := func(other Device) bool { return d.Sibling(&other) && other.Role() == RoleGuest }
			if !slices.ContainsFunc(g.Devices, of) {
				continue
			}

			target, err := optional(h.Link(path.Join(pciDevices, d.Name)))
			if err != nil {
				return err
			}
			if len(pathAddresses(target)) > 1 {
				d.As = RoleGuest
			}
		}
	}
	return nil
}

// firstOwnDomain is where the domains begin that drivers number themselves (drivers/pci/controller/vmd.c,
// vmd_find_free_domain): those of the firmware have 16 bits.
const firstOwnDomain = 0x10000

// readParents finds the devices behind another device's driver. Only those in a domain of a driver's own are asked for
// where they are.
func readParents(h *Host, devices []Device) error {
	for i := range devices {
		d := &devices[i]
		if !d.PCI || d.Address.Domain < firstOwnDomain {
			continue
		}
		target, err := h.Link(path.Join(pciDevices, d.Name))
		if host.Absent(err) {
			continue
		}
		if err != nil {
			return err
		}

		for _, above := range pathAddresses(target) {
			if above.Domain != d.Address.Domain {
				d.Parent = &above
			}
		}
	}
	return nil
}
