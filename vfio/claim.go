package vfio

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"viaduct/iommu"
)

// Claim is devices that nobody else has open through VFIO, nor can use, for as long as it lasts. The kernel sees to
// that (drivers/vfio/group.c): a group is opened once, and is not closed while anything that was opened through it is
// open, mapped or on its way over a socket; nor is it opened while a device of it is bound to an iommufd. So it also
// proves what a look at processes cannot.
//
// It does not show a device's own node that is open and was bound to no iommufd yet: that can be bound when the Claim
// has ended. An unbind of the device from its driver waits for that, too.
type Claim struct {
	groups  map[int]*file
	space   *Context // of those whose groups have no nodes
	devices map[iommu.Address]*Device
}

// NewClaim opens the groups of devices which are on VFIO drivers, or where the kernel makes no nodes for groups the
// devices themselves, which resets them. It is an ErrInUse if somebody else has one. The caller closes it.
func NewClaim(h *iommu.Host, devices ...*iommu.Device) (*Claim, error) {
	space, err := NewContext(h, Options{Way: IOMMUFD})
	if err != nil {
		return nil, err
	}
	c := &Claim{groups: map[int]*file{}, space: space, devices: map[iommu.Address]*Device{}}
	for _, d := range devices {
		if err := c.add(h, d); err != nil {
			return nil, errors.Join(fmt.Errorf("vfio: claim %s: %w", d.Name, err), c.Close())
		}
	}
	return c, nil
}

func (c *Claim) add(h *iommu.Host, d *iommu.Device) error {
	all, err := nodes(h, d)
	if err != nil {
		return err
	}
	own := false
	for _, n := range all {
		made, err := h.Has(n.sign)
		switch {
		case err != nil:
			return err
		case made && !n.own:
			return c.addGroup(h, *d.Group, &n)
		}
		own = own || made
	}

	if !own {
		return ErrNotBound
	}
	c.devices[d.Address], err = c.space.Open(d.Name)
	return err
}

func (c *Claim) addGroup(h *iommu.Host, number int, n *node) error {
	if c.groups[number] != nil {
		return nil
	}
	if err := n.check(h); err != nil {
		return err
	}
	f, err := open(h, n.path(), map[unix.Errno]error{unix.EBUSY: ErrInUse})
	if err == nil {
		c.groups[number] = f
	}
	return err
}

// Drop ends the claim on a device, and on all of its group, for the caller to open it. One that is not claimed is no
// error.
func (c *Claim) Drop(d *iommu.Device) error {
	var errs []error
	if device := c.devices[d.Address]; device != nil {
		errs = append(errs, device.Close())
	}
	if d.Group != nil && c.groups[*d.Group] != nil {
		errs = append(errs, c.groups[*d.Group].close())
	}
	return errors.Join(errs...)
}

// Close ends the claim. Again is no error.
func (c *Claim) Close() error {
	var errs []error
	for _, f := range c.groups {
		errs = append(errs, f.close())
	}
	return errors.Join(append(errs, c.space.Close())...)
}
