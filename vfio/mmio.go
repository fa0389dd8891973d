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
// Its methods may be called by several goroutines. It is closed by the caller or with its device. What each of them
// costs besides the access, a lock and the care for one that fails, is little beside the device's answer; where it is
// not, [Mapped.Batch] has it once for many.
type Mapped struct {
	region *Region

	mu    sync.RWMutex
	base  unsafe.Pointer // where its first byte is, or would be
	size  uintptr        // in whole pages
	areas []mappedArea   // by offset; nil when it is closed
}

type mappedArea struct {
	Area
	bytes []byte
}

// Map maps all of a region that can be mapped. It is an ErrUnsupported if nothing can, and on processors other than
// those of amd64 and arm64.
func (r *Region) Map() (*Mapped, error) {
	if len(r.Mappable) == 0 || !canOrder {
		return nil, fmt.Errorf("vfio: map %s, region %d: %w", r.device.Name(), r.Index, ErrUnsupported)
	}
	m := &Mapped{region: r}
	if err := m.reserve(); err != nil {
		return nil, err
	}
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

// reserve finds addresses for all of the region, which stay forbidden where it cannot be mapped: so all of it is found
// from one base.
func (m *Mapped) reserve() error {
	page := int64(unix.Getpagesize())
	size := uintptr((m.region.Size + page - 1) / page * page)
	const flags = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_NORESERVE
	base, err := unix.MmapPtr(-1, 0, nil, size, unix.PROT_NONE, flags)
	if err != nil {
		return m.failure("mmap", err)
	}
	m.base, m.size = base, size
	return nil
}

func (m *Mapped) add(a Area) error {
	r := m.region
	if a.Offset < 0 || a.Size <= 0 || a.Offset > r.Size-a.Size {
		return m.failure("mmap", unix.EINVAL) // over what lies beside it
	}
	prot := 0
	if r.Read {
		prot |= unix.PROT_READ
	}
	if r.Write {
		prot |= unix.PROT_WRITE
	}
	return r.device.file.use("mmap", func(fd int) error {
		p := unsafe.Add(m.base, a.Offset)
		_, err := unix.MmapPtr(fd, r.offset+a.Offset, p, uintptr(a.Size), prot, unix.MAP_SHARED|unix.MAP_FIXED)
		if err != nil {
			return m.failure("mmap", err)
		}
		m.areas = append(m.areas, mappedArea{a, unsafe.Slice((*byte)(p), a.Size)})
		return nil
	})
}

func (m *Mapped) failure(op string, err error) error {
	return failure(op, fmt.Sprintf("%s, region %d", m.region.device.Name(), m.region.Index), err, deviceMeans)
}

// Close unmaps the region. Again is no error.
func (m *Mapped) Close() error {
	m.region.device.disown(m)
	return m.unmap()
}

func (m *Mapped) unmap() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.size == 0 {
		return nil
	}
	base, size := m.base, m.size
	m.base, m.size, m.areas = nil, 0, nil
	return m.failure("munmap", unix.MunmapPtr(base, size))
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
	return 0, m.failed(a, err)
}

// failed is an error of an access.
func (m *Mapped) failed(a access, err error) error {
	op := "load"
	if a.store {
		op = "store"
	}
	return fmt.Errorf("vfio: %s of %d bytes at %#x of region %d of %s: %w",
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
		if fault, is := r.(interface{ Addr() uintptr }); !is || fault.Addr()^uintptr(p) >= uintptr(unix.Getpagesize()) {
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

// Registers are a mapped region within [Mapped.Batch]. They are only for the function that they were given to, in its
// goroutine and until it returns: elsewhere an access that fails ends the process, and one after the region was closed
// meets whatever is mapped there then.
type Registers struct {
	base unsafe.Pointer
	size uint64 // a multiple of each width
}

// Batch has a function make many accesses, to poll a register as fast as it goes, or to read a great many: what each of
// Mapped's methods does besides its access is done once for all. An access that fails ends the function, and is the
// error; otherwise that is what the function returns. A region is not closed meanwhile: who closes it waits. The
// function must neither do so nor call Mapped's other methods.
func (m *Mapped) Batch(do func(r Registers) error) (err error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.areas == nil {
		return fmt.Errorf("vfio: region %d of %s: %w", m.region.Index, m.region.device.Name(), fs.ErrClosed)
	}
	before := debug.SetPanicOnFault(true)
	returned := false
	defer func() {
		debug.SetPanicOnFault(before)
		if !returned {
			err = m.ended(recover())
		}
	}()
	err = do(Registers{m.base, uint64(m.region.Size) &^ 7})
	returned = true
	return err
}

// ended is the error of the access that has ended a function. Whatever else ends one goes on: another panic, and, with
// nothing to recover from, the end of the goroutine.
func (m *Mapped) ended(by any) error {
	switch by := by.(type) {
	case nil:
		return nil
	case access: // of Registers.at
		_, err := m.find(by)
		if err == nil {
			err = ErrRange // it is in the region's last bytes
		}
		return m.failed(by, err)
	case interface{ Addr() uintptr }: // a fault, of which alone the runtime's errors have that
		if in := by.Addr() - uintptr(m.base); in < m.size {
			return fmt.Errorf("vfio: access at %#x of region %d of %s: %w",
				in, m.region.Index, m.region.device.Name(), m.why(int64(in)))
		}
	}
	panic(by)
}

// why is why an access at an offset had a fault.
func (m *Mapped) why(offset int64) error {
	for _, a := range m.areas {
		switch {
		case offset < a.Offset || offset >= a.Offset+a.Size:
		case !m.region.Read || !m.region.Write:
			return ErrUnsupported
		default:
			return ErrFault
		}
	}
	return ErrRange
}

// at is where an access is made. Its errors are panics: with more in it, the compiler would not put it and Load32 into
// what calls them.
func (r Registers) at(offset, width int64) unsafe.Pointer {
	if uint64(offset) >= r.size || offset&(width-1) != 0 {
		panic(access{offset: offset, width: width})
	}
	return unsafe.Add(r.base, offset)
}

// Load8 is as [Mapped.Load8].
func (r Registers) Load8(offset int64) uint8 { return load8(r.at(offset, 1)) }

// Load16 is as [Mapped.Load16].
func (r Registers) Load16(offset int64) uint16 { return load16(r.at(offset, 2)) }

// Load32 is as [Mapped.Load32].
func (r Registers) Load32(offset int64) uint32 { return inline32(r.at(offset, 4)) }

// Load64 is as [Mapped.Load64].
func (r Registers) Load64(offset int64) uint64 { return inline64(r.at(offset, 8)) }

// Store8 is as [Mapped.Store8].
func (r Registers) Store8(offset int64, v uint8) { store8(r.at(offset, 1), v) }

// Store16 is as [Mapped.Store16].
func (r Registers) Store16(offset int64, v uint16) { store16(r.at(offset, 2), v) }

// Store32 is as [Mapped.Store32].
func (r Registers) Store32(offset int64, v uint32) { store32(r.at(offset, 4), v) }

// Store64 is as [Mapped.Store64].
func (r Registers) Store64(offset int64, v uint64) { store64(r.at(offset, 8), v) }
