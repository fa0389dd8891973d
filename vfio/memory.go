package vfio

import (
	"fmt"
	"math/bits"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Memory is memory for DMA. It is not Go's, which may move what lies on stacks, but a mapping of its own. Of its
// methods only Bytes may be used while a device writes to it; what a device and the program see of each other's writes,
// and when, is between them, as with any memory that is shared.
type Memory struct {
	page int

	mu    sync.Mutex
	bytes []byte
	uses  int // mappings in contexts
}

// NewMemory makes memory of so many bytes, all zero, of pages of a size in bytes: 0 for the system's own, or that of
// huge pages (2 MiB, 1 GiB), of which the administrator must have set so many aside (vm.nr_hugepages; ENOMEM if not).
// Size is rounded up to whole pages. The caller closes it, after it was unmapped.
func NewMemory(size, page int) (*Memory, error) {
	flags := unix.MAP_PRIVATE | unix.MAP_ANONYMOUS
	own := unix.Getpagesize()
	switch {
	case page == 0 || page == own:
		page = own
	case page < own || page&(page-1) != 0:
		return nil, fmt.Errorf("vfio: pages of %d bytes: %w", page, ErrAlignment)
	default:
		flags |= unix.MAP_HUGETLB | bits.TrailingZeros(uint(page))<<unix.MAP_HUGE_SHIFT
	}
	if size <= 0 || size > 1<<62 {
		return nil, fmt.Errorf("vfio: memory of %d bytes: %w", size, ErrRange)
	}

	size = (size + page - 1) / page * page
	bytes, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil {
		return nil, failure("mmap", fmt.Sprintf("of %d bytes in pages of %d", size, page), err, nil)
	}
	return &Memory{page: page, bytes: bytes}, nil
}

// Size is how many bytes it has.
func (m *Memory) Size() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.bytes)
}

// PageSize is the size of its pages in bytes.
func (m *Memory) PageSize() int { return m.page }

// Bytes are the memory itself. They must not be used after Close.
func (m *Memory) Bytes() []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.bytes
}

// Close gives the memory back. While it is mapped in a context, a device could write to it: that is an ErrInUse, and it
// stays. Again is no error.
func (m *Memory) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.uses > 0 {
		return fmt.Errorf("vfio: memory is mapped in %d places for DMA: unmap it first: %w", m.uses, ErrInUse)
	}
	if m.bytes == nil {
		return nil
	}
	bytes := m.bytes
	m.bytes = nil
	return failure("munmap", "", unix.Munmap(bytes), nil)
}

// mapped has a function map the memory in a context, which holds it from then on if that succeeds.
func (m *Memory) mapped(do func(base uintptr) error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.bytes == nil {
		return fmt.Errorf("vfio: the memory is closed: %w", ErrRange)
	}
	if err := do(uintptr(unsafe.Pointer(unsafe.SliceData(m.bytes)))); err != nil {
		return err
	}
	m.uses++
	return nil
}

// unmapped says that one of its mappings is over.
func (m *Memory) unmapped() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.uses--
}
