package vfio

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"

	"viaduct/internal/uapi"
	"viaduct/iommu"
)

// container is the space of the way by groups: /dev/vfio/vfio with an IOMMU of type1, version 2.
type container struct {
	file   *file
	groups map[int]*group
}

// group is an open group, which the kernel opens once.
type group struct {
	file    *file
	devices int
}

func newContainer(h *iommu.Host) (*container, error) {
	f, err := open(h, containerNode, nodeMeans)
	if err != nil {
		return nil, err
	}
	c := &container{file: f, groups: map[int]*group{}}
	if err := c.check(); err != nil {
		return nil, errors.Join(err, f.close())
	}
	return c, nil
}

func (c *container) check() error {
	version, err := c.file.value("VFIO_GET_API_VERSION", uapi.VFIO_GET_API_VERSION, 0, nil)
	if err != nil {
		return err
	}
	if version != uapi.VFIO_API_VERSION {
		return fmt.Errorf("vfio: %s has version %d of VFIO: %w", c.file.name, version, ErrUnsupported)
	}
	has, err := c.file.value("VFIO_CHECK_EXTENSION", uapi.VFIO_CHECK_EXTENSION, uapi.VFIO_TYPE1v2_IOMMU, nil)
	if err == nil && has == 0 {
		err = fmt.Errorf("vfio: %s has no IOMMU of type1 (module vfio_iommu_type1): %w", c.file.name, ErrUnsupported)
	}
	return err
}

func (c *container) way() Way { return Container }

func (c *container) attach(t *target) (*file, uint32, error) {
	if t.ofGroup == nil {
		return nil, 0, fmt.Errorf("the kernel made no node for its group (CONFIG_VFIO_GROUP): %w", ErrUnsupported)
	}
	g := c.groups[*t.group]
	if g == nil {
		var err error
		if g, err = c.openGroup(t); err != nil {
			return nil, 0, err
		}
		c.groups[*t.group] = g
	}

	g.devices++
	f, err := g.openDevice(t)
	if err != nil {
		return nil, 0, errors.Join(err, c.detached(t))
	}
	return f, 0, nil
}

func (c *container) openGroup(t *target) (*group, error) {
	if err := t.ofGroup.check(t.host); err != nil {
		return nil, err
	}
	f, err := open(t.host, t.ofGroup.path(), map[unix.Errno]error{unix.EBUSY: ErrInUse})
	if err != nil {
		return nil, err
	}
	if err := c.add(f, t); err != nil {
		return nil, errors.Join(err, f.close())
	}
	return &group{file: f}, nil
}

// add puts a group into the container. The IOMMU can be chosen only when there is one.
func (c *container) add(f *file, t *target) error {
	status := uapi.VfioGroupStatus{Argsz: uint32(unsafe.Sizeof(uapi.VfioGroupStatus{}))}
	_, err := f.ioctl("VFIO_GROUP_GET_STATUS", uapi.VFIO_GROUP_GET_STATUS, unsafe.Pointer(&status), nil)
	if err != nil {
		return err
	}
	if status.Flags&uapi.VFIO_GROUP_FLAGS_VIABLE == 0 {
		if err := t.notViable(); err != nil {
			return err
		}
		return &NotViableError{Group: *t.group}
	}

	err = c.file.use("VFIO_GROUP_SET_CONTAINER", func(fd int) error {
		of := int32(fd)
		means := map[unix.Errno]error{unix.EPERM: ErrInUse, unix.EBUSY: ErrInUse}
		_, err := f.ioctl("VFIO_GROUP_SET_CONTAINER", uapi.VFIO_GROUP_SET_CONTAINER, unsafe.Pointer(&of), means)
		return err
	})
	if err != nil {
		if viable := t.notViable(); viable != nil {
			return errors.Join(viable, err)
		}
		return err
	}
	if len(c.groups) > 0 {
		return nil
	}
	means := map[unix.Errno]error{unix.EPERM: ErrNotIsolated, unix.ENODEV: ErrUnsupported}
	if _, err = c.file.value("VFIO_SET_IOMMU", uapi.VFIO_SET_IOMMU, uapi.VFIO_TYPE1v2_IOMMU, means); err != nil {
		_, undone := f.value("VFIO_GROUP_UNSET_CONTAINER", uapi.VFIO_GROUP_UNSET_CONTAINER, 0, nil)
		return errors.Join(err, undone)
	}
	return nil
}

func (g *group) openDevice(t *target) (*file, error) {
	name := t.name
	if t.token != nil {
		name += " vf_token=" + t.token.String()
	}
	text, err := unix.ByteSliceFromString(name)
	if err != nil {
		return nil, err
	}
	means := map[unix.Errno]error{unix.EACCES: ErrToken, unix.EBUSY: ErrInUse, unix.ENODEV: ErrNotBound,
		unix.EPERM: ErrNotIsolated}
	if t.token != nil {
		means[unix.EINVAL] = ErrToken
	}
	fd, err := g.file.ioctl("VFIO_GROUP_GET_DEVICE_FD", uapi.VFIO_GROUP_GET_DEVICE_FD, unsafe.Pointer(&text[0]), means)
	if errors.Is(err, unix.EPERM) {
		// Where iommufd stands in for the container (CONFIG_IOMMUFD_VFIO_CONTAINER), it is asked only now.
		if viable := t.notViable(); viable != nil {
			return nil, viable
		}
	}
	if err != nil {
		return nil, err
	}
	return &file{host: t.host, name: t.name, fd: fd, means: deviceMeans}, nil
}

func (c *container) detached(t *target) error {
	g := c.groups[*t.group]
	if g.devices--; g.devices > 0 {
		return nil
	}
	delete(c.groups, *t.group)
	// Which takes it out of the container.
	return g.file.close()
}

func (c *container) info() (Info, error) {
	b := make([]byte, unsafe.Sizeof(uapi.VfioIommuType1Info{}))
	b, err := c.file.sized("VFIO_IOMMU_GET_INFO", uapi.VFIO_IOMMU_GET_INFO, b)
	if err != nil {
		return Info{}, err
	}
	return decodeType1(b)
}

func (c *container) mapDMA(iova, vaddr, size uint64, access Access) error {
	m := uapi.VfioIommuType1DmaMap{
		Argsz: uint32(unsafe.Sizeof(uapi.VfioIommuType1DmaMap{})), Vaddr: vaddr, Iova: iova, Size: size,
	}
	if access&Read != 0 {
		m.Flags |= uapi.VFIO_DMA_MAP_FLAG_READ
	}
	if access&Write != 0 {
		m.Flags |= uapi.VFIO_DMA_MAP_FLAG_WRITE
	}
	_, err := c.file.ioctl("VFIO_IOMMU_MAP_DMA", uapi.VFIO_IOMMU_MAP_DMA, unsafe.Pointer(&m), mapMeans)
	return err
}

// mapMeans are what errnos of mapping mean: type1 says EEXIST, EINVAL for reserved ranges and bad alignment, and ENOSPC
// for too many mappings (drivers/vfio/vfio_iommu_type1.c); iommufd EADDRINUSE (drivers/iommu/iommufd/io_pagetable.c).
var mapMeans = map[unix.Errno]error{
	unix.ENOSPC: ErrLimit, unix.EEXIST: ErrRange, unix.EADDRINUSE: ErrRange, unix.EINVAL: ErrRange,
	unix.EOVERFLOW: ErrRange,
}

func (c *container) unmapDMA(iova, size uint64) error {
	m := uapi.VfioIommuType1DmaUnmap{
		Argsz: uint32(unsafe.Sizeof(uapi.VfioIommuType1DmaUnmap{})), Iova: iova, Size: size,
	}
	_, err := c.file.ioctl("VFIO_IOMMU_UNMAP_DMA", uapi.VFIO_IOMMU_UNMAP_DMA, unsafe.Pointer(&m), nil)
	if err == nil && m.Size != size {
		return fmt.Errorf("vfio: of %#x bytes at %#x the kernel unmapped %#x: %w", size, iova, m.Size, ErrRange)
	}
	return err
}

func (c *container) ownsGroup(group int) bool { return c.groups[group] != nil }

func (c *container) hotReset(d *Device, groups []int) error {
	fds := make([]int32, len(groups))
	for i, n := range groups {
		// They stay open, as the context is locked.
		fds[i] = int32(c.groups[n].file.fd)
	}
	return d.file.resetTogether(fds)
}

func (c *container) close() error {
	var errs []error
	for _, g := range c.groups {
		errs = append(errs, g.file.close())
	}
	return errors.Join(append(errs, c.file.close())...)
}
