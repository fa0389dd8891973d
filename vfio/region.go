package vfio

import (
	"errors"
	"fmt"
	"io"
	"unsafe"

	"golang.org/x/sys/unix"

	"viaduct/internal/uapi"
)

// The regions of a PCI device, by index. Those from VGA+1 on are of its driver: see [RegionInfo].
const (
	BAR0   = uapi.VFIO_PCI_BAR0_REGION_INDEX // to BAR0+5
	ROM    = uapi.VFIO_PCI_ROM_REGION_INDEX
	Config = uapi.VFIO_PCI_CONFIG_REGION_INDEX // configuration space
	VGA    = uapi.VFIO_PCI_VGA_REGION_INDEX
)

// RegionInfo is what the kernel tells of a region (VFIO_DEVICE_GET_REGION_INFO).
type RegionInfo struct {
	Index       int
	Size        int64 // in bytes; 0: the device has no such region
	Read, Write bool
	// Mappable are the parts that can be mapped, in order.
	Mappable []Area
	// Type and Subtype say what a region of a driver's own is: if bit 31 of Type is set, its low 16 bits are the PCI
	// vendor whose Subtype it is (VFIO_REGION_TYPE_PCI_VENDOR_TYPE). Both 0 for the other regions.
	Type, Subtype uint32

	offset int64 // in the device's file
}

// Area is a part of a region, in bytes.
type Area struct{ Offset, Size int64 }

// Region is a region of a device. It lives as long as the device.
type Region struct {
	RegionInfo
	device *Device
}

// Region finds a region of the device by its index. It is an ErrUnsupported if the device has none of that index.
func (d *Device) Region(index int) (*Region, error) {
	if index < 0 || index >= d.info.Regions {
		return nil, fmt.Errorf("vfio: %s: its regions are 0 to %d, and not %d: %w",
			d.Name(), d.info.Regions-1, index, ErrUnsupported)
	}
	ask := uapi.VfioRegionInfo{Index: uint32(index)}
	const op = "VFIO_DEVICE_GET_REGION_INFO"
	b, err := d.file.sized(op, uapi.VFIO_DEVICE_GET_REGION_INFO, bytesOf(&ask))
	if err != nil {
		// vfio-pci says so of VGA where the device has none.
		if asErrno(err) == unix.EINVAL {
			return nil, fmt.Errorf("%w (%w)", err, ErrUnsupported)
		}
		return nil, err
	}
	info, err := decodeRegion(b)
	if err != nil {
		return nil, fmt.Errorf("%s: region %d: %w", d.Name(), index, err)
	}
	return &Region{info, d}, nil
}

// bytesOf is a copy of a structure's bytes.
func bytesOf[T any](v *T) []byte {
	return append([]byte(nil), unsafe.Slice((*byte)(unsafe.Pointer(v)), unsafe.Sizeof(*v))...)
}

// ReadAt reads from the region as [io.ReaderAt] says. The kernel does the reading, in pieces of its choice: registers
// whose width matters are for [Region.Map]. Where the kernel lets nobody read, as in the MSI-X table, all bits are 1.
// It is an ErrFault while the memory of the device is off.
func (r *Region) ReadAt(p []byte, offset int64) (n int, err error) {
	return r.transfer(transfer{"pread", unix.Pread, io.EOF}, r.Read, p, offset)
}

// WriteAt writes to the region as [io.WriterAt] says, and otherwise as ReadAt.
func (r *Region) WriteAt(p []byte, offset int64) (n int, err error) {
	return r.transfer(transfer{"pwrite", unix.Pwrite, io.ErrShortWrite}, r.Write, p, offset)
}

// transfer is a way to transfer bytes: the system call, and the error of its end.
type transfer struct {
	op  string
	do  func(fd int, p []byte, offset int64) (int, error)
	end error
}

func (r *Region) transfer(t transfer, can bool, p []byte, offset int64) (n int, err error) {
	fail := func(err error) (int, error) {
		return n, fmt.Errorf("vfio: at %#x of region %d: %w", offset+int64(n), r.Index, err)
	}
	switch {
	case !can:
		return fail(&Error{Op: t.op, Path: r.device.Name(), Err: unix.EACCES, Means: ErrUnsupported})
	case offset < 0:
		return fail(&Error{Op: t.op, Path: r.device.Name(), Err: unix.EINVAL, Means: ErrRange})
	}
	short := int64(len(p)) > r.Size-offset
	if short {
		p = p[:max(0, r.Size-offset)]
	}

	err = r.device.file.use(t.op, func(fd int) error {
		for n < len(p) {
			some, err := t.do(fd, p[n:], r.offset+offset+int64(n))
			switch {
			case errors.Is(err, unix.EINTR):
			case err != nil:
				return failure(t.op, r.device.Name(), err, deviceMeans)
			case some == 0:
				return io.ErrUnexpectedEOF
			default:
				n += some
			}
		}
		return nil
	})
	if err != nil {
		return fail(err)
	}
	if short {
		err = t.end
	}
	return n, err
}
