package vfio

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"

	"viaduct/internal/uapi"
	"viaduct/iommu"
)

// Reset resets the device alone, by the first of its ResetMethods that works. Its interrupts stay enabled, its bus
// mastering does not. It is an ErrUnsupported if it cannot be reset alone: see [Device.HotReset].
func (d *Device) Reset() error {
	means := map[unix.Errno]error{unix.EINVAL: ErrUnsupported, unix.EAGAIN: ErrInUse}
	_, err := d.file.value("VFIO_DEVICE_RESET", uapi.VFIO_DEVICE_RESET, 0, means)
	return err
}

// Dependent is a function that a hot reset of a device resets too; the device itself is one of them.
type Dependent struct {
	Address iommu.Address
	// Owned is a function that the context has, or may reset, as no other process can have it.
	Owned bool
}

// HotResetInfo are the functions that share a bus or slot with a device, and are reset together with it. It is an
// ErrUnsupported if the bus cannot be reset.
func (d *Device) HotResetInfo() ([]Dependent, error) {
	d.context.mu.Lock()
	defer d.context.mu.Unlock()
	dependents, _, err := d.hotResetInfo()
	return dependents, err
}

// hotResetInfo also returns the group of each dependent, by the way that tells it.
func (d *Device) hotResetInfo() ([]Dependent, []int, error) {
	b, err := d.askHotReset()
	if err != nil {
		return nil, nil, err
	}
	flags, all, err := decodeHotReset(b)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", d.Name(), err)
	}

	ids := flags&uapi.VFIO_PCI_HOT_RESET_FLAG_DEV_ID != 0
	var out []Dependent
	var groups []int
	for _, one := range all {
		dep := Dependent{Address: iommu.Address{
			Domain: uint32(one.Segment), Bus: one.Bus, Device: one.Devfn >> 3, Function: one.Devfn & 7,
		}}
		if ids {
			dep.Owned = one.GroupId != math.MaxUint32 // VFIO_PCI_DEVID_NOT_OWNED
		} else {
			groups = append(groups, int(one.GroupId))
			dep.Owned = d.context.space.ownsGroup(int(one.GroupId))
		}
		out = append(out, dep)
	}
	return out, groups, nil
}

// askHotReset asks with room for what the kernel says there is.
func (d *Device) askHotReset() ([]byte, error) {
	const (
		op   = "VFIO_DEVICE_GET_PCI_HOT_RESET_INFO"
		most = 1 << 16
		head = int(unsafe.Sizeof(uapi.VfioPciHotResetInfo{}))
		each = int(unsafe.Sizeof(uapi.VfioPciDependentDevice{}))
	)
	means := map[unix.Errno]error{unix.ENODEV: ErrUnsupported, unix.EPERM: ErrNotOwned}
	for room := 16; ; {
		b := make([]byte, head+room*each)
		info := (*uapi.VfioPciHotResetInfo)(unsafe.Pointer(&b[0]))
		info.Argsz = uint32(len(b))
		_, err := d.file.ioctl(op, uapi.VFIO_DEVICE_GET_PCI_HOT_RESET_INFO, unsafe.Pointer(&b[0]), means)
		if errors.Is(err, unix.ENOSPC) && int(info.Count) > room && info.Count <= most {
			room = int(info.Count)
			continue
		}
		return b, err
	}
}

// decodeHotReset decodes the answer to VFIO_DEVICE_GET_PCI_HOT_RESET_INFO.
func decodeHotReset(b []byte) (flags uint32, all []uapi.VfioPciDependentDevice, err error) {
	head, ok := at[uapi.VfioPciHotResetInfo](b, 0)
	if ok {
		all, ok = list[uapi.VfioPciDependentDevice](b, uint64(unsafe.Sizeof(head)), head.Count)
	}
	if !ok {
		return 0, nil, errShort("information about a hot reset", b)
	}
	return head.Flags, all, nil
}

// HotReset resets all functions that share a bus or slot with the device, together. It is a NotOwnedError if one of
// them is not the context's, or is on a driver of the host: then nothing is reset. The context owns a function that it
// has opened, and, without opening them, those of the same IOMMU group.
func (d *Device) HotReset() error {
	d.context.mu.Lock()
	defer d.context.mu.Unlock()
	dependents, groups, err := d.hotResetInfo()
	if err != nil {
		return err
	}

	var others []iommu.Address
	for _, o := range dependents {
		if !o.Owned {
			others = append(others, o.Address)
		}
	}

	if len(others) > 0 {
		return &NotOwnedError{d.Name(), others}
	}

	slices.Sort(groups)
	err = d.context.space.hotReset(d, slices.Compact(groups))
	if errors.Is(err, unix.EINVAL) {
		// So the kernel says of functions that are on no VFIO driver.
		for _, o := range dependents {
			if _, err := findTarget(d.context.host, o.Address.String()); errors.Is(err, ErrNotBound) {
				others = append(others, o.Address)
			}
		}
		if len(others) > 0 {
			return &NotOwnedError{d.Name(), others}
		}
	}

	return err
}

// resetTogether is VFIO_DEVICE_PCI_HOT_RESET, with descriptors of the groups that are reset.
func (f *file) resetTogether(fds []int32) error {
	head := uapi.VfioPciHotReset{Count: uint32(len(fds))}
	head.Argsz = uint32(int(unsafe.Sizeof(head)) + 4*len(fds))
	b := bytesOf(&head)
	for _, fd := range fds {
		b = append(b, bytesOf(&fd)...)
	}
	_, err := f.ioctl("VFIO_DEVICE_PCI_HOT_RESET", uapi.VFIO_DEVICE_PCI_HOT_RESET, unsafe.Pointer(&b[0]), nil)
	return err
}
