package vfio

import (
	"errors"
	"fmt"
	"io/fs"
	"runtime/debug"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Mapped is a region that is mapped into the process: each Load and each Store is one access of that width on the bus,
// which the processor neither splits nor merges nor repeats. On processors that reorder them, a Store happens after all
// earlier writes to memory, and what is read after a Load is read after it, as with the kernel's readl and writel.
//
// An access fails, and the process goes on, while the device's memory is off, while it sleeps, and when it is gone
// (ErrFault); also where the region cannot be mapped (ErrRange), and at an offset that is not a multiple of the width
// (ErrAlignment). A device that does not answer in time reads as all ones, which is no error.
//
// Its methods may be called by several goroutines. It is closed by the caller or with its device.
type Mapped struct {
	region *Region

	mu    sync.RWMutex
	areas []mappedArea // by offset; nil when it is closed
}

type mappedArea struct {
	Area
	bytes []byte
}

// Map maps all of a region that can be mapped. It is an ErrUnsupported if nothing can.
func (r *Region) Map() (*Mapped, error) {
	if len(r.Mappable) == 0 {
		return nil, fmt.Errorf("vfio: map %s, region %d: %w", r.device.Name(), r.Index, ErrUnsupported)
	}
	m := &Mapped{region: r}
	for _, a := range r.Mappable {
		if err := m.add(a); err != nil {
			return nil, errors.Join(err, m.unmap())
		}
	}
	if err := r.device.own(m); err != nil {
		return nil, errors.Join(err, m.unmap())
	}
	return m, nil
}

func (m *Mapped) add(a Area) error {
	r := m.region
	prot := 0
	if r.Read {
		prot |= unix.PROT_READ
	}
	if r.Write {
		prot |= unix.PROT_WRITE
	}
	return r.device.file.use("mmap", func(fd int) error {
		b, err := unix.Mmap(fd, r.offset+a.Offset, int(a.Size), prot, unix.MAP_SHARED)
		if err != nil {
			return failure("mmap", fmt.Sprintf("%s, region %d", r.device.Name(), r.Index), err, deviceMeans)
		}
		m.areas = append(m.areas, mappedArea{a, b})
		return nil
	})
}

// Close unmaps the region. Again is no error.
func (m *Mapped) Close() error {
	m.region.device.disown(m)
	return m.unmap()
}

func (m *Mapped) unmap() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	var errs []error
	for _, a := range m.areas {
		errs = append(errs, failure("munmap", m.region.device.Name(), unix.Munmap(a.bytes), nil))
	}
	m.areas = nil
	return errors.Join(errs...)
}

// Load8 reads 8 bits at an offset of the region.
func (m *Mapped) Load8(offset int64) (uint8, error) {
	v, err := m.access(access{offset: offset, width: 1})
	return uint8(v), err
}

// Load16 reads 16 bits, as a little-endian number, which they are in PCI.
func (m *Mapped) Load16(offset int64) (uint16, error) {
	v, err := m.access(access{offset: offset, width: 2})
	return uint16(v), err
}

// Load32 reads 32 bits.
func (m *Mapped) Load32(offset int64) (uint32, error) {
	v, err := m.access(access{offset: offset, width: 4})
	return uint32(v), err
}

// Load64 reads 64 bits.
func (m *Mapped) Load64(offset int64) (uint64, error) {
	return m.access(access{offset: offset, width: 8})
}

// Store8 writes 8 bits at an offset of the region. That it has arrived is certain when something was loaded after it.
func (m *Mapped) Store8(offset int64, v uint8) error {
	_, err := m.access(access{offset, 1, true, uint64(v)})
	return err
}

// Store16 writes 16 bits.
func (m *Mapped) Store16(offset int64, v uint16) error {
	_, err := m.access(access{offset, 2, true, uint64(v)})
	return err
}

// Store32 writes 32 bits.
func (m *Mapped) Store32(offset int64, v uint32) error {
	_, err := m.access(access{offset, 4, true, uint64(v)})
	return err
}

// Store64 writes 64 bits.
func (m *Mapped) Store64(offset int64, v uint64) error {
	_, err := m.access(access{offset, 8, true, v})
	return err
}

// access is one load or store.
type access struct {
	offset, width int64
	store         bool
	value         uint64 // to store
}

func (m *Mapped) access(a access) (v uint64, err error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	p, err := m.find(a)
	if err == nil {
		var ok bool
		if v, ok = a.do(p); ok {
			return v, nil
		}
		err = ErrFault
	}
	op := "load"
	if a.store {
		op = "store"
	}
	return 0, fmt.Errorf("vfio: %s of %d bytes at %#x of region %d of %s: %w",
		op, a.width, a.offset, m.region.Index, m.region.device.Name(), err)
}

// find is where in memory an access is made.
func (m *Mapped) find(a access) (unsafe.Pointer, error) {
	switch {
	case m.areas == nil:
		return nil, fs.ErrClosed
	case a.offset&(a.width-1) != 0:
		return nil, ErrAlignment
	case !a.store && !m.region.Read || a.store && !m.region.Write:
		return nil, ErrUnsupported
	}
	for i := range m.areas {
		if in := a.offset - m.areas[i].Offset; in >= 0 && in <= m.areas[i].Size-a.width {
			return unsafe.Pointer(&m.areas[i].bytes[in]), nil
		}
	}
	return nil, ErrRange
}

// do makes an access, and reports whether it succeeded. Of one that does not, the kernel sends a signal (SIGBUS), which
// becomes a panic in this goroutine and ends here. Any other panic goes on.
func (a access) do(p unsafe.Pointer) (v uint64, ok bool) {
	before := debug.SetPanicOnFault(true)
	defer func() {
		debug.SetPanicOnFault(before)
		if ok {
			return
		}
		// Of the runtime's errors, those of a fault have an address.
		r := recover()
		if fault, is := r.(interface{ Addr() uintptr }); !is || fault.Addr() != uintptr(p) {
			panic(r)
		}
	}()

	switch {
	case a.store && a.width == 1:
		store8(p, uint8(a.value))
	case a.store && a.width == 2:
		store16(p, uint16(a.value))
	case a.store && a.width == 4:
		store32(p, uint32(a.value))
	case a.store:
		store64(p, a.value)
	case a.width == 1:
		v = uint64(load8(p))
	case a.width == 2:
		v = uint64(load16(p))
	case a.width == 4:
		v = uint64(load32(p))
	default:
		v = load64(p)
	}
	return v, true
}
