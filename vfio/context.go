package vfio

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sync"

	"viaduct/internal/host"
	"viaduct/iommu"
)

// Way is a way into VFIO.
type Way string

// The ways. A kernel has either or both (CONFIG_VFIO_DEVICE_CDEV with CONFIG_IOMMUFD; CONFIG_VFIO_CONTAINER).
const (
	// IOMMUFD is /dev/iommu and the node of a device itself, since Linux 6.6.
	IOMMUFD Way = "iommufd"
	// Container is /dev/vfio/vfio and the node of a group. It is what kernels before that have, and what noiommu mode
	// is not: devices that no IOMMU is in front of cannot be opened by this package.
	Container Way = "container"
)

const (
	iommuNode     = "dev/iommu"
	containerNode = "dev/vfio/vfio"
)

// Ways are those by which a device, which is on a VFIO driver, can be opened on this host, the better one first. It
// looks whether the kernel has made the nodes, and opens none. A device on no VFIO driver has none.
func Ways(h *iommu.Host, d *iommu.Device) ([]Way, error) {
	all, err := nodes(h, d)
	if err != nil {
		return nil, err
	}
	var own, group bool
	for _, n := range all {
		made, err := h.Has(n.sign)
		if err != nil {
			return nil, err
		}
		own, group = own || made && n.own, group || made && !n.own && !n.unsafe
	}

	return waysOf(h, own, group)
}

// waysOf are those of a device that has a node of its own, or of its group, as far as the kernel has them.
func waysOf(h *iommu.Host, own, group bool) ([]Way, error) {
	var out []Way
	for _, w := range []struct {
		way  Way
		made bool
		node string
	}{{IOMMUFD, own, iommuNode}, {Container, group, containerNode}} {
		if !w.made {
			continue
		}
		has, err := h.Has(w.node)
		if err != nil {
			return nil, err
		}
		if has {
			out = append(out, w.way)
		}
	}
	return out, nil
}

// Options are those of a Context.
type Options struct {
	// Way is the way that it takes; "" leaves that to the first device that is opened: the better one that it has.
	Way Way
	// DirtyTracking has the IOMMU note what devices write to, for [Context.Dirty]. It takes iommufd, and an IOMMU that
	// can: else the device's open is an ErrUnsupported.
	DirtyTracking bool
}

// Context is an address space for DMA, with the devices that were opened in it: each of them reaches the memory that is
// mapped, at the addresses it is mapped at, and no other. Its methods may be called by several goroutines.
type Context struct {
	host    *iommu.Host
	options Options

	mu       sync.Mutex
	closed   bool
	space    space // nil until the first device is opened
	devices  []*Device
	mappings []Mapping // by IOVA
}

// space is the kernel's side of a Context, of either way.
type space interface {
	way() Way
	// attach opens a device: its file, and its id in the space.
	attach(t *target) (f *file, id uint32, err error)
	// detached is told that a device's file was closed.
	detached(t *target) error
	info() (Info, error)
	mapDMA(iova, vaddr, size uint64, access Access) error
	unmapDMA(iova, size uint64) error
	// ownsGroup reports whether the space has opened a group.
	ownsGroup(group int) bool
	// hotReset resets all that is reset with a device, which are of those groups.
	hotReset(d *Device, groups []int) error
	close() error
}

// NewContext makes a context without devices. Nothing is opened before the first [Context.Open]. The caller closes it.
func NewContext(h *iommu.Host, o Options) (*Context, error) {
	switch {
	case !h.Live():
		return nil, fmt.Errorf("vfio: devices of a captured host cannot be opened: %w", iommu.ErrReadOnly)
	case o.Way != "" && o.Way != IOMMUFD && o.Way != Container:
		return nil, fmt.Errorf("vfio: invalid way %q: want %s or %s", o.Way, IOMMUFD, Container)
	case o.DirtyTracking && o.Way == Container:
		return nil, fmt.Errorf("vfio: dirty tracking by the IOMMU needs iommufd: %w", ErrUnsupported)
	}
	return &Context{host: h, options: o}, nil
}

// Way is the way that the context has taken; "" before its first device was opened.
func (c *Context) Way() Way {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.space == nil {
		return c.options.Way
	}
	return c.space.way()
}

// Close closes all devices of the context, unmaps all memory, and frees what it had of the kernel. The memory stays the
// caller's. Again is no error.
func (c *Context) Close() error {
	c.mu.Lock()
	devices := slices.Clone(c.devices)
	c.closed = true
	c.mu.Unlock()
	var errs []error
	for _, d := range slices.Backward(devices) {
		errs = append(errs, d.Close())
	}

	return errors.Join(errs...)
}

// endSpace frees what the context has of the kernel, which unmaps what is mapped.
func (c *Context) endSpace() error {
	err := c.space.close()
	c.space = nil
	for _, m := range c.mappings {
		m.Memory.unmapped()
	}
	c.mappings = nil
	return err
}

// current is the context's space; nil before its first device and after its last.
func (c *Context) current() space {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.space
}

// ready is an error of a context that is closed, or has no device yet.
func (c *Context) ready(op string) error {
	switch {
	case c.closed:
		return &Error{Op: op, Err: fs.ErrClosed}
	case c.space == nil:
		return fmt.Errorf("vfio: %s: %w", op, ErrNoDevice)
	}
	return nil
}

// ErrNoDevice says that a context has to have a device before it can be asked or given memory.
const ErrNoDevice = host.Error("no device was opened in the context yet")

// Info is what the IOMMU in front of a context's devices can map.
type Info struct {
	// PageSizes are the sizes of pages, in bytes, as bits; nil by a way that does not tell (iommufd).
	PageSizes *uint64
	// Alignment is what addresses and sizes of mappings have to be multiples of, in bytes.
	Alignment uint64
	// Ranges are the addresses that can be mapped, in order. What lies between them is reserved. They are nil if the
	// kernel does not tell, as type1 before Linux 5.4.
	Ranges []Range
	// Left is how many more mappings can be made; nil where that is not limited or not told.
	Left *uint32
}

// Width is how many bits the highest address has that can be mapped: the width of the IOMMU's addresses, unless that is
// cut by a reserved range. 0 if nothing can be mapped.
func (i Info) Width() int { return width(i.Ranges) }

// Reserved are the ranges below the highest address that can be mapped which cannot be.
func (i Info) Reserved() []Range { return gaps(i.Ranges) }

// Info asks the kernel what can be mapped. It depends on the devices that the context has: each may bring reserved
// ranges along. An ErrNoDevice before the first was opened.
func (c *Context) Info() (Info, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.ready("Info"); err != nil {
		return Info{}, err
	}
	return c.space.info()
}

// Access is what devices may do with memory.
type Access int

// Kinds of access, which may be combined.
const (
	Read      Access = 1 << iota // the device reads it
	Write                        // the device writes to it
	ReadWrite = Read | Write
)

// Mapping is a part of a Memory at an address for DMA.
type Mapping struct {
	IOVA   uint64
	Memory *Memory
	Offset int // within the memory, in bytes
	Size   int // in bytes; 0 is the rest of the memory
	Access Access
}

func (m *Mapping) span() Range { return Range{m.IOVA, m.IOVA + uint64(m.Size) - 1} }

// Map maps memory for the devices of the context: all of it, or nothing. An address that is not aligned is an
// ErrAlignment; one that the IOMMU does not allow, or that is mapped already, an ErrRange; more of them than its driver
// allows an ErrLimit; memory that may not be locked for want of RLIMIT_MEMLOCK is an ENOMEM. The memory stays mapped
// until [Context.Unmap] or [Context.Close], and cannot be closed until then.
func (c *Context) Map(mappings ...Mapping) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.ready("Map"); err != nil {
		return err
	}
	info, err := c.space.info()
	if err != nil {
		return err
	}

	if info.Left != nil && len(mappings) > int(*info.Left) {
		return fmt.Errorf("vfio: map %d times, when %d are left: %w", len(mappings), *info.Left, ErrLimit)
	}

	// All that is known to be wrong is told before the kernel is asked.
	mappings = slices.Clone(mappings) // whose sizes are filled in
	noted := 0
	for err == nil && noted < len(mappings) {
		if err = c.note(&mappings[noted], info); err == nil {
			noted++
		}
	}
	done := 0
	for err == nil && done < noted {
		if err = c.mapOne(mappings[done]); err == nil {
			done++
		}
	}
	if err == nil {
		return nil
	}
	for i, m := range mappings[:noted] {
		if i < done {
			if undone := c.space.unmapDMA(m.IOVA, uint64(m.Size)); undone != nil {
				// It stays mapped, and is known to be.
				err = errors.Join(err, undone)
				continue
			}
			m.Memory.unmapped()
		}
		c.forget(m)
	}
	return err
}

// note adds a mapping to those that there are, by address, if it may be made. It fills in its size.
func (c *Context) note(m *Mapping, info Info) error {
	i, err := placeOf(c.mappings, m, info)
	if err == nil {
		c.mappings = slices.Insert(c.mappings, i, *m)
	}
	return err
}

// forget takes a mapping away again.
func (c *Context) forget(m Mapping) {
	if i, found := find(c.mappings, m.IOVA); found {
		c.mappings = slices.Delete(c.mappings, i, i+1)
	}
}

func (c *Context) mapOne(m Mapping) error {
	return m.Memory.mapped(func(base uintptr) error {
		return c.space.mapDMA(m.IOVA, uint64(base)+uint64(m.Offset), uint64(m.Size), m.Access)
	})
}

// fill gives a mapping the size that it is to have.
func (m *Mapping) fill() {
	if m.Size == 0 {
		m.Size = m.Memory.Size() - m.Offset
	}
}

// Unmap unmaps what was mapped between two addresses: whole mappings, as the kernel cuts none. It is an ErrRange if
// nothing begins at the address or a mapping reaches beyond the end; then nothing is unmapped.
func (c *Context) Unmap(iova, size uint64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.ready("Unmap"); err != nil {
		return err
	}
	first, end, err := within(c.mappings, iova, size)
	if err != nil {
		return err
	}

	for first < end {
		m := c.mappings[first]
		if err := c.space.unmapDMA(m.IOVA, uint64(m.Size)); err != nil {
			return err
		}
		m.Memory.unmapped()
		c.mappings = slices.Delete(c.mappings, first, first+1)
		end--
	}
	return nil
}

// Mappings are those of the context, by address.
func (c *Context) Mappings() []Mapping {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.mappings)
}
