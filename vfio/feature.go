package vfio

import (
	"context"
	"errors"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"viaduct/internal/uapi"
)

// feature asks for a feature of the device, or sets it (VFIO_DEVICE_FEATURE): flags is its number with what to do, and
// data what goes along, which an answer replaces. A device that has no such feature is an ErrUnsupported.
func (d *Device) feature(flags uint32, data []byte, means map[unix.Errno]error) error {
	head := uapi.VfioDeviceFeature{Flags: flags}
	head.Argsz = uint32(int(unsafe.Sizeof(head)) + len(data))
	b := append(bytesOf(&head), data...)
	_, err := d.file.ioctl("VFIO_DEVICE_FEATURE", uapi.VFIO_DEVICE_FEATURE, unsafe.Pointer(&b[0]), means)
	copy(data, b[unsafe.Sizeof(head):])
	return err
}

// getFeature asks for a feature's structure, which v is filled with.
func getFeature[T any](d *Device, number uint32, v *T) error {
	b := bytesOf(v)
	if err := d.feature(number|uapi.VFIO_DEVICE_FEATURE_GET, b, nil); err != nil {
		return err
	}
	*v, _ = at[T](b, 0)
	return nil
}

// setFeature sets a feature, and fills v with the answer.
func setFeature[T any](d *Device, number uint32, v *T, means map[unix.Errno]error) error {
	b := bytesOf(v)
	err := d.feature(number|uapi.VFIO_DEVICE_FEATURE_SET, b, means)
	*v, _ = at[T](b, 0)
	return err
}

// hasFeature reports whether a feature can be set or got.
func (d *Device) hasFeature(number, how uint32) (bool, error) {
	err := d.feature(number|how|uapi.VFIO_DEVICE_FEATURE_PROBE, nil, nil)
	if errors.Is(err, ErrUnsupported) || errors.Is(err, unix.EINVAL) {
		return false, nil
	}
	return err == nil, err
}

// SetToken sets the token that the users of a PF's VFs have to know; the device is the PF, on vfio-pci. It is an
// ErrUnsupported of any other.
func (d *Device) SetToken(token Token) error {
	return d.feature(uapi.VFIO_DEVICE_FEATURE_PCI_VF_TOKEN|uapi.VFIO_DEVICE_FEATURE_SET, token[:], nil)
}

// CanSleep reports whether the device can be put into a state of low power.
func (d *Device) CanSleep() (bool, error) {
	return d.hasFeature(uapi.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY, uapi.VFIO_DEVICE_FEATURE_SET)
}

// Sleep lets the device go into a state of low power. Reading a region wakes it while it is read, and access to a
// mapped one is an ErrFault, until [Device.Wake].
func (d *Device) Sleep() error {
	return d.feature(uapi.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY|uapi.VFIO_DEVICE_FEATURE_SET, nil, sleepMeans)
}

// sleepMeans are what errnos mean of going to sleep: a PF with VFs may not, and one that sleeps cannot again.
var sleepMeans = map[unix.Errno]error{unix.EBUSY: ErrInUse, unix.EINVAL: ErrRefused, unix.EIO: ErrFault}

// Sleeping is a device that sleeps until something wakes it.
type Sleeping struct {
	device *Device
	vector *vector
	close  func() error
}

// SleepUntilWoken is Sleep, of a device that the host's or the device's own events may wake. It is closed by
// the caller or with the device.
func (d *Device) SleepUntilWoken() (*Sleeping, error) {
	v, err := newVector(d.Name() + " wakes")
	if err != nil {
		return nil, err
	}
	a := uapi.VfioDeviceLowPowerEntryWithWakeup{WakeupEventfd: v.fd}
	if err := setFeature(d, uapi.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP, &a, sleepMeans); err != nil {
		return nil, errors.Join(err, v.file.Close())
	}
	s := &Sleeping{device: d, vector: v}
	s.close = sync.OnceValue(func() error {
		d.disown(s)
		return errors.Join(d.Wake(), v.file.Close())
	})
	if err := d.own(s); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// Wait waits until the device was woken.
func (s *Sleeping) Wait(ctx context.Context) error {
	_, err := s.vector.wait(ctx)
	return err
}

// Close wakes the device. Again is no error.
func (s *Sleeping) Close() error { return s.close() }

// Wake wakes the device for good.
func (d *Device) Wake() error {
	return d.feature(uapi.VFIO_DEVICE_FEATURE_LOW_POWER_EXIT|uapi.VFIO_DEVICE_FEATURE_SET, nil, nil)
}
