package vfio

import (
	"fmt"
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"viaduct/internal/host"
	"viaduct/iommu"
)

// target is a device that is to be opened.
type target struct {
	host    *iommu.Host
	dir     string         // in sysfs, from the host's root
	name    string         // as the kernel knows it: an address, or of a mediated device its UUID
	address *iommu.Address // nil: no PCI device
	group   *int
	own     *node // nil: the kernel made none
	ofGroup *node
	token   *Token
}

// findTarget finds a device by its PCI address, or by its folder in sysfs, as /sys/bus/mdev/devices/UUID.
func findTarget(h *iommu.Host, device string) (*target, error) {
	t := &target{host: h}
	dir := strings.TrimPrefix(path.Clean(device), "/")
	if a, err := iommu.ParseAddress(device); err == nil {
		t.address, dir = &a, path.Join("sys/bus/pci/devices", a.String())
	} else if a, err := iommu.ParseAddress(path.Base(dir)); err == nil {
		t.address = &a
	}
	t.dir, t.name = dir, path.Base(dir)
	there, err := h.Has(dir)
	if err != nil {
		return nil, err
	}
	if !there {
		return nil, fmt.Errorf("vfio: %s: no such device: %w", device, unix.ENODEV)
	}

	group, err := h.LinkBase(path.Join(dir, "iommu_group"))
	if err != nil && !host.Absent(err) {
		return nil, err
	}
	if n, err := strconv.Atoi(group); err == nil {
		t.group = &n
	}
	all, err := nodesAt(h, dir, t.group)
	if err != nil {
		return nil, err
	}
	for _, n := range all {
		made, err := h.Has(n.sign)
		if err != nil {
			return nil, err
		}
		switch {
		case !made || n.unsafe:
		case n.own:
			t.own = &n
		default:
			t.ofGroup = &n
		}
	}

	// A group's node proves only that one of its devices is on a VFIO driver.
	vfio, err := h.Has(path.Join(dir, "vfio-dev"))
	if err != nil {
		return nil, err
	}
	driver, err := h.LinkBase(path.Join(dir, "driver"))
	if err != nil && !host.Absent(err) {
		return nil, err
	}
	if !vfio && !iommu.IsVFIODriver(driver) {
		has := "it has no driver"
		if driver != "" {
			has = "it is on " + driver
		}
		if t.address != nil {
			has += " (viaduct bind " + t.name + " takes it)"
		}
		return nil, fmt.Errorf("vfio: %s: %s: %w", t.name, has, ErrNotBound)
	}
	return t, nil
}

// ways are those by which it can be opened.
func (t *target) ways() ([]Way, error) {
	return waysOf(t.host, t.own != nil, t.ofGroup != nil)
}

// notViable is a NotViableError for the target's group, if a driver of the host has one of its devices.
func (t *target) notViable() error {
	if t.group == nil {
		return nil
	}
	group, err := iommu.ReadGroup(t.host, *t.group)
	if err != nil {
		return nil //nolint:nilerr // then the kernel's own word has to do
	}
	if blockers := group.Blockers(); len(blockers) > 0 {
		return &NotViableError{*t.group, blockers}
	}
	return nil
}

// check compares a node's number with what the kernel says of it: a node of another device would be opened.
func (n *node) check(h *iommu.Host) error {
	want, err := h.String(n.sign)
	if err != nil {
		return err
	}
	_, number, err := h.DeviceNumber(n.path())
	if err != nil {
		return err
	}
	if got := fmt.Sprintf("%d:%d", number>>32, uint32(number)); got != want {
		return fmt.Errorf("%s is device %s, and not %s, which the kernel made: %w", n.file, got, want,
			unix.ENODEV)
	}
	return nil
}
