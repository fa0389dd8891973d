package vfio

import (
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"

	"viaduct/internal/uapi"
	"viaduct/iommu"
)

// iommufd is the space of the way by a device's own node: an IOAS of /dev/iommu.
type iommufd struct {
	file *file
	ioas uint32
	// tracking has devices attached to page tables that note what they write to.
	tracking bool
	// tables are those page tables, one for each IOMMU that cannot share one; tracks says that they do so now.
	tables []uint32
	tracks bool
}

func newIOMMUFD(h *iommu.Host, dirty bool) (*iommufd, error) {
	f, err := open(h, iommuNode, nodeMeans)
	if err != nil {
		return nil, err
	}
	a := uapi.IommuIoasAlloc{Size: uint32(unsafe.Sizeof(uapi.IommuIoasAlloc{}))}
	if _, err := f.ioctl("IOMMU_IOAS_ALLOC", uapi.IOMMU_IOAS_ALLOC, unsafe.Pointer(&a), nil); err != nil {
		return nil, errors.Join(err, f.close())
	}
	return &iommufd{file: f, ioas: a.OutIoasId, tracking: dirty}, nil
}

func (s *iommufd) way() Way { return IOMMUFD }

func (s *iommufd) attach(t *target) (*file, uint32, error) {
	if t.own == nil {
		return nil, 0, fmt.Errorf("the kernel made no node for the device (CONFIG_VFIO_DEVICE_CDEV): %w",
			ErrUnsupported)
	}
	if err := t.own.check(t.host); err != nil {
		return nil, 0, err
	}
	f, err := open(t.host, t.own.path(), map[unix.Errno]error{unix.EBUSY: ErrInUse})
	if err != nil {
		return nil, 0, err
	}
	f.means = deviceMeans
	id, err := s.bind(f, t)
	if err == nil {
		err = s.attachTable(f, id)
	}
	if err != nil {
		return nil, 0, errors.Join(err, f.close())
	}
	return f, id, nil
}

// bind has the kernel claim the device for the space. It answers EPERM for a group that is another's, and for
// interrupts that are not isolated.
func (s *iommufd) bind(f *file, t *target) (id uint32, err error) {
	b := uapi.VfioDeviceBindIommufd{Argsz: uint32(unsafe.Sizeof(uapi.VfioDeviceBindIommufd{}))}
	var pin runtime.Pinner
	defer pin.Unpin()
	means := map[unix.Errno]error{unix.EBUSY: ErrInUse, unix.EPERM: ErrNotIsolated, unix.EACCES: ErrToken}
	if t.token != nil {
		pin.Pin(t.token)
		b.Flags, b.TokenUuidPtr = uapi.VFIO_DEVICE_BIND_FLAG_TOKEN, uint64(uintptr(unsafe.Pointer(t.token)))
		means[unix.EINVAL] = ErrToken
	}
	err = s.file.use("VFIO_DEVICE_BIND_IOMMUFD", func(fd int) error {
		b.Iommufd = int32(fd)
		_, err := f.ioctl("VFIO_DEVICE_BIND_IOMMUFD", uapi.VFIO_DEVICE_BIND_IOMMUFD, unsafe.Pointer(&b), means)
		return err
	})
	switch {
	case errors.Is(err, unix.EPERM):
		if viable := t.notViable(); viable != nil {
			return 0, viable
		}
		if t.opened() {
			return 0, &Error{"VFIO_DEVICE_BIND_IOMMUFD", f.name, unix.EPERM, ErrInUse}
		}
	case errors.Is(err, unix.EINVAL) && (t.opened() || t.ofGroup == nil && t.token == nil):
		return 0, &Error{"VFIO_DEVICE_BIND_IOMMUFD", f.name, unix.EINVAL, ErrInUse}
	}
	return b.OutDevid, err
}

// opened reports whether a device of the target's group is open by its own node: then its group's cannot be opened
// (vfio_device_block_group in drivers/vfio/group.c). The kernel says EINVAL of a device that is open already
// (vfio_df_open in drivers/vfio/vfio_main.c), as of a token.
func (t *target) opened() bool {
	if t.ofGroup == nil {
		return false
	}
	f, err := open(t.host, t.ofGroup.path(), nil)
	if err == nil {
		_ = f.close()
	}
	return errors.Is(err, unix.EBUSY)
}

// attachTable gives the device the space's page table.
func (s *iommufd) attachTable(f *file, device uint32) error {
	if !s.tracking {
		return s.attachTo(f, s.ioas)
	}
	for _, table := range s.tables {
		err := s.attachTo(f, table)
		if !errors.Is(err, unix.EINVAL) {
			return err
		}
	}

	a := uapi.IommuHwptAlloc{
		Size: uint32(unsafe.Sizeof(uapi.IommuHwptAlloc{})), Flags: uapi.IOMMU_HWPT_ALLOC_DIRTY_TRACKING,
		DevId: device, PtId: s.ioas, DataType: uapi.IOMMU_HWPT_DATA_NONE,
	}
	if _, err := s.file.ioctl("IOMMU_HWPT_ALLOC", uapi.IOMMU_HWPT_ALLOC, unsafe.Pointer(&a), nil); err != nil {
		return err
	}
	err := s.attachTo(f, a.OutHwptId)
	if err == nil && s.tracks {
		err = s.trackTable(a.OutHwptId, true)
	}
	if err != nil {
		// A table that a device is attached to stays until that is closed.
		return errors.Join(err, s.destroy(a.OutHwptId))
	}
	s.tables = append(s.tables, a.OutHwptId)
	return nil
}

func (s *iommufd) attachTo(f *file, table uint32) error {
	a := uapi.VfioDeviceAttachIommufdPt{Argsz: uint32(unsafe.Sizeof(uapi.VfioDeviceAttachIommufdPt{})), PtId: table}
	means := map[unix.Errno]error{unix.EPERM: ErrNotIsolated, unix.EADDRINUSE: ErrRange}
	const op = "VFIO_DEVICE_ATTACH_IOMMUFD_PT"
	_, err := f.ioctl(op, uapi.VFIO_DEVICE_ATTACH_IOMMUFD_PT, unsafe.Pointer(&a), means)
	return err
}

func (s *iommufd) destroy(id uint32) error {
	d := uapi.IommuDestroy{Size: uint32(unsafe.Sizeof(uapi.IommuDestroy{})), Id: id}
	_, err := s.file.ioctl("IOMMU_DESTROY", uapi.IOMMU_DESTROY, unsafe.Pointer(&d), nil)
	return err
}

// detached does nothing: a closed device has left its page table.
func (s *iommufd) detached(*target) error { return nil }

func (s *iommufd) info() (Info, error) {
	const most = 1 << 16
	var pin runtime.Pinner
	defer pin.Unpin()
	for room := uint32(16); ; {
		ranges := make([]uapi.IommuIovaRange, room)
		r := uapi.IommuIoasIovaRanges{
			Size: uint32(unsafe.Sizeof(uapi.IommuIoasIovaRanges{})), IoasId: s.ioas, NumIovas: room,
			AllowedIovas: pointer(&pin, ranges),
		}
		_, err := s.file.ioctl("IOMMU_IOAS_IOVA_RANGES", uapi.IOMMU_IOAS_IOVA_RANGES, unsafe.Pointer(&r), nil)
		if errors.Is(err, unix.EMSGSIZE) && r.NumIovas > room && r.NumIovas <= most {
			room = r.NumIovas
			continue
		}
		if err != nil {
			return Info{}, err
		}

		info := Info{Alignment: r.OutIovaAlignment}
		for _, one := range ranges[:min(r.NumIovas, room)] {
			info.Ranges = append(info.Ranges, Range{one.Start, one.Last})
		}
		return info, nil
	}
}

func (s *iommufd) mapDMA(iova, vaddr, size uint64, access Access) error {
	m := uapi.IommuIoasMap{
		Size: uint32(unsafe.Sizeof(uapi.IommuIoasMap{})), Flags: uapi.IOMMU_IOAS_MAP_FIXED_IOVA, IoasId: s.ioas,
		UserVa: vaddr, Length: size, Iova: iova,
	}
	if access&Read != 0 {
		m.Flags |= uapi.IOMMU_IOAS_MAP_READABLE
	}
	if access&Write != 0 {
		m.Flags |= uapi.IOMMU_IOAS_MAP_WRITEABLE
	}
	_, err := s.file.ioctl("IOMMU_IOAS_MAP", uapi.IOMMU_IOAS_MAP, unsafe.Pointer(&m), mapMeans)
	return err
}

func (s *iommufd) unmapDMA(iova, size uint64) error {
	m := uapi.IommuIoasUnmap{
		Size: uint32(unsafe.Sizeof(uapi.IommuIoasUnmap{})), IoasId: s.ioas, Iova: iova, Length: size,
	}
	means := map[unix.Errno]error{unix.ENOENT: ErrRange}
	_, err := s.file.ioctl("IOMMU_IOAS_UNMAP", uapi.IOMMU_IOAS_UNMAP, unsafe.Pointer(&m), means)
	return err
}

// ownsGroup is not asked: by this way the kernel tells of devices.
func (s *iommufd) ownsGroup(int) bool { return false }

func (s *iommufd) hotReset(d *Device, _ []int) error { return d.file.resetTogether(nil) }

func (s *iommufd) close() error { return s.file.close() }
