package vfio

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"viaduct/internal/host"
	"viaduct/internal/uapi"
)

// Device is a device that was opened in a Context. Opening and closing it resets it, if it has a way to be reset; bus
// mastering is off then. Its methods may be called by several goroutines.
type Device struct {
	context *Context
	target  *target
	file    *file
	id      uint32 // in an iommufd
	info    DeviceInfo

	closing sync.Once
	failed  error // of closing

	mu      sync.Mutex
	closed  bool
	parts   []io.Closer // mapped regions and interrupts, which end with the device
	vectors map[Kind]bool
}

// DeviceInfo is what the kernel tells of a device as a whole (VFIO_DEVICE_GET_INFO).
type DeviceInfo struct {
	PCI        bool
	Reset      bool // Device.Reset can work
	Regions    int  // by index from 0; of PCI devices the indexes have names: see BAR0
	Interrupts int  // kinds, by index from 0: see INTx
	// Atomics are the widths, in bits, of AtomicOps that the root port completes for it: 32, 64, 128.
	Atomics []int
}

// Open opens a device: by its PCI address, as 0000:01:00.0 or 01:00.0, or by its folder in sysfs, as
// /sys/bus/mdev/devices/UUID for a mediated device. The first one decides the way of the context, and everything is
// mapped for those that follow too.
//
// It is an ErrNotBound if no VFIO driver has the device, ErrNotViable if a driver of the host has one of its group,
// ErrInUse if another process has it or its group, ErrNotIsolated if its interrupts cannot be kept apart, ErrToken if
// it is a VF whose PF is used by VFIO too, and ErrUnsupported if the host has not the way that was asked for. The
// caller closes the device; closing the context does so too.
func (c *Context) Open(device string) (*Device, error) { return c.open(device, nil) }

// OpenToken opens a VF whose PF is on vfio-pci and has set that token, or the PF itself, which sets it: see
// [Device.SetToken]. A context that may choose takes the way of containers, as iommufd takes no token before Linux
// 6.17. Otherwise it is as Open.
func (c *Context) OpenToken(device string, token Token) (*Device, error) {
	return c.open(device, &token)
}

func (c *Context) open(device string, token *Token) (*Device, error) {
	t, err := findTarget(c.host, device)
	if err != nil {
		return nil, err
	}
	t.token = token

	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, &Error{Op: "open", Path: t.name, Err: fs.ErrClosed}
	}
	if slices.ContainsFunc(c.devices, func(d *Device) bool { return d.target.dir == t.dir }) {
		return nil, fmt.Errorf("vfio: open %s: it is open in this context: %w", t.name, ErrInUse)
	}
	s := c.space
	if s == nil {
		if s, err = c.newSpace(t); err != nil {
			return nil, err
		}
	}
	d, err := c.attach(s, t)
	if err != nil {
		if c.space == nil {
			err = errors.Join(err, s.close())
		}
		return nil, fmt.Errorf("vfio: open %s: %w", t.name, err)
	}
	c.space = s
	c.devices = append(c.devices, d)
	return d, nil
}

// newSpace makes the space that suits a context's first device.
func (c *Context) newSpace(t *target) (space, error) {
	way := c.options.Way
	switch {
	case way != "":
	case c.options.DirtyTracking:
		way = IOMMUFD
	default:
		ways, err := t.ways()
		if err != nil {
			return nil, err
		}
		if len(ways) == 0 {
			return nil, fmt.Errorf("vfio: %s: the kernel made no node for it: %w", t.name, ErrUnsupported)
		}
		way = ways[0]
		if t.token != nil && slices.Contains(ways, Container) {
			// Before Linux 6.17 iommufd takes no tokens.
			way = Container
		}
	}
	if way == IOMMUFD {
		return newIOMMUFD(c.host, c.options.DirtyTracking)
	}
	return newContainer(c.host)
}

func (c *Context) attach(s space, t *target) (*Device, error) {
	f, id, err := s.attach(t)
	if err != nil {
		return nil, err
	}
	d := &Device{context: c, target: t, file: f, id: id}
	if d.info, err = d.readInfo(); err != nil {
		return nil, errors.Join(err, f.close(), s.detached(t))
	}
	return d, nil
}

func (d *Device) readInfo() (DeviceInfo, error) {
	b := make([]byte, unsafe.Sizeof(uapi.VfioDeviceInfo{}))
	b, err := d.file.sized("VFIO_DEVICE_GET_INFO", uapi.VFIO_DEVICE_GET_INFO, b)
	if err != nil {
		return DeviceInfo{}, err
	}
	return decodeDevice(b)
}

// Name is the device's address, or what else the kernel calls it.
func (d *Device) Name() string { return d.target.name }

// Info is what the kernel told of the device when it was opened.
func (d *Device) Info() DeviceInfo {
	info := d.info
	info.Atomics = slices.Clone(info.Atomics)
	return info
}

// ResetMethods are the ways to reset a PCI device that the kernel uses, in its order (sysfs' reset_method, since Linux
// 5.15); none if it has none or does not tell.
func (d *Device) ResetMethods() ([]string, error) {
	text, err := d.context.host.String(path.Join(d.target.dir, "reset_method"))
	if host.Absent(err) {
		return nil, nil
	}
	return strings.Fields(text), err
}

// Close ends the device's mapped regions and interrupts and closes it. The last device of a context takes all mappings
// along. Again is no error.
func (d *Device) Close() error {
	d.closing.Do(func() { d.failed = d.close() })
	return d.failed
}

func (d *Device) close() error {
	d.mu.Lock()
	d.closed = true
	parts := d.parts
	d.parts = nil
	d.mu.Unlock()

	var errs []error
	for _, p := range slices.Backward(parts) {
		errs = append(errs, p.Close())
	}
	return errors.Join(append(errs, d.context.leave(d))...)
}

// leave closes a device's file, and the space with the last one.
func (c *Context) leave(d *Device) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	err := errors.Join(d.file.close(), c.space.detached(d.target))
	c.devices = slices.DeleteFunc(c.devices, func(o *Device) bool { return o == d })
	if len(c.devices) > 0 {
		return err
	}
	return errors.Join(err, c.endSpace())
}

// own has a part of the device closed with it.
func (d *Device) own(part io.Closer) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return &Error{Op: "use", Path: d.Name(), Err: fs.ErrClosed}
	}
	d.parts = append(d.parts, part)
	return nil
}

// disown forgets a part that was closed by itself.
func (d *Device) disown(part io.Closer) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.parts = slices.DeleteFunc(d.parts, func(o io.Closer) bool { return o == part })
}

// deviceMeans are what errnos mean that any request to a device can end with: it is gone, or does not answer, or
// another request has it.
var deviceMeans = map[unix.Errno]error{unix.ENODEV: ErrFault, unix.EIO: ErrFault, unix.EAGAIN: ErrInUse}
