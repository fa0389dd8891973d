package vfio

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"viaduct/internal/uapi"
)

// Kind is a kind of a device's interrupts, by index.
type Kind int

// The kinds of a PCI device.
const (
	INTx Kind = uapi.VFIO_PCI_INTX_IRQ_INDEX
	MSI  Kind = uapi.VFIO_PCI_MSI_IRQ_INDEX
	MSIX Kind = uapi.VFIO_PCI_MSIX_IRQ_INDEX
	// ErrorReport is signalled when the device had an error that it cannot correct (PCIe AER).
	ErrorReport Kind = uapi.VFIO_PCI_ERR_IRQ_INDEX
	// Request is signalled when the host wants the device back: who holds it should close it. It is signalled again
	// every ten seconds until then.
	Request Kind = uapi.VFIO_PCI_REQ_IRQ_INDEX
)

// String is the kind's name.
func (k Kind) String() string {
	if names := []string{"INTx", "MSI", "MSI-X", "error", "request"}; k >= 0 && int(k) < len(names) {
		return names[k]
	}
	return fmt.Sprintf("interrupt index %d", int(k))
}

// InterruptInfo is what the kernel tells of a kind of interrupts (VFIO_DEVICE_GET_IRQ_INFO).
type InterruptInfo struct {
	Kind  Kind
	Count int // of vectors; 0: the device has none
	// EventFD is a kind that can be waited for; Maskable one that can be masked. An AutoMasked one is masked whenever
	// it was signalled, until it is unmasked. Of a Fixed one the vectors are all enabled at once, or none.
	EventFD, Maskable, AutoMasked, Fixed bool
}

// InterruptInfo tells of a kind of the device's interrupts. It is an ErrUnsupported if the device has no such kind.
func (d *Device) InterruptInfo(kind Kind) (InterruptInfo, error) {
	if kind < 0 || int(kind) >= d.info.Interrupts {
		return InterruptInfo{}, fmt.Errorf("vfio: %s: %s: %w", d.Name(), kind, ErrUnsupported)
	}
	i := uapi.VfioIrqInfo{Argsz: uint32(unsafe.Sizeof(uapi.VfioIrqInfo{})), Index: uint32(kind)}
	_, err := d.file.ioctl("VFIO_DEVICE_GET_IRQ_INFO", uapi.VFIO_DEVICE_GET_IRQ_INFO, unsafe.Pointer(&i), nil)
	// Errors cannot be reported by what is no PCIe device, which vfio-pci says so.
	if asErrno(err) == unix.EINVAL {
		return InterruptInfo{Kind: kind}, nil
	}
	if err != nil {
		return InterruptInfo{}, err
	}
	has := func(flag uint32) bool { return i.Flags&flag != 0 }
	return InterruptInfo{
		kind, int(i.Count), has(uapi.VFIO_IRQ_INFO_EVENTFD), has(uapi.VFIO_IRQ_INFO_MASKABLE),
		has(uapi.VFIO_IRQ_INFO_AUTOMASKED), has(uapi.VFIO_IRQ_INFO_NORESIZE),
	}, nil
}

// Interrupts are enabled vectors of one kind, from 0 on. Waiting for them takes no thread: the Go runtime waits.
type Interrupts struct {
	device  *Device
	kind    Kind
	once    sync.Once
	err     error // of closing
	vectors []*vector
}

// vector is one of them: an eventfd.
type vector struct {
	fd   int32 // of file, which owns it
	file *os.File
	turn chan struct{} // who waits has it

	// Made once, as each costs an allocation: who has the turn calls read by raw, and finds in value what it has read.
	raw   syscall.RawConn
	read  func(fd uintptr) bool
	value [8]byte
}

// Interrupts enables the first vectors of a kind. INTx, MSI and MSI-X exclude each other, and a
// kind that is enabled is an ErrInUse until it is closed. It is an ErrUnsupported if
// the device has fewer, or the host has none left. They are closed by the caller or with the device.
func (d *Device) Interrupts(kind Kind, count int) (*Interrupts, error) {
	info, err := d.InterruptInfo(kind)
	if err != nil {
		return nil, err
	}
	if count < 1 || count > info.Count || !info.EventFD {
		return nil, fmt.Errorf("vfio: %s has %d vectors of %s, and not %d: %w",
			d.Name(), info.Count, kind, count, ErrUnsupported)
	}
	if err := d.useKind(kind); err != nil {
		return nil, err
	}
	i := &Interrupts{device: d, kind: kind}
	if err := i.start(count); err != nil {
		d.freeKind(kind)
		return nil, err
	}
	if err := d.own(i); err != nil {
		return nil, errors.Join(err, i.Close())
	}
	return i, nil
}

// slot is the kind that stands for those that exclude each other.
func (k Kind) slot() Kind {
	if k == MSI || k == MSIX {
		return INTx
	}
	return k
}

// useKind refuses a kind that is enabled, or that excludes one that is: the kernel would take the vectors from who has
// them.
func (d *Device) useKind(kind Kind) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.vectors[kind.slot()] {
		return fmt.Errorf("vfio: %s: %s: interrupts are enabled already; close them first: %w", d.Name(), kind,
			ErrInUse)
	}
	if d.vectors == nil {
		d.vectors = map[Kind]bool{}
	}
	d.vectors[kind.slot()] = true
	return nil
}

func (d *Device) freeKind(kind Kind) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.vectors, kind.slot())
}

// start makes and enables the vectors.
func (i *Interrupts) start(count int) error {
	for range count {
		v, err := newVector(i.device.Name() + " " + i.kind.String())
		if err != nil {
			return errors.Join(err, i.closeVectors())
		}
		i.vectors = append(i.vectors, v)
	}
	if err := i.enable(); err != nil {
		return errors.Join(err, i.closeVectors())
	}
	return nil
}

func newVector(name string) (*vector, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, failure("eventfd", "", err, nil)
	}
	v := &vector{fd: int32(fd), file: os.NewFile(uintptr(fd), name), turn: make(chan struct{}, 1)}
	if v.raw, err = v.file.SyscallConn(); err != nil {
		return nil, errors.Join(err, v.file.Close())
	}
	v.read = func(fd uintptr) bool {
		_, _ = unix.Read(int(fd), v.value[:]) // EAGAIN: nothing was signalled
		return true
	}
	v.turn <- struct{}{}
	return v, nil
}

func (i *Interrupts) enable() error {
	fds := make([]int32, len(i.vectors))
	for n, v := range i.vectors {
		fds[n] = v.fd
	}
	n, err := i.device.setIRQs(i.kind, uapi.VFIO_IRQ_SET_DATA_EVENTFD|uapi.VFIO_IRQ_SET_ACTION_TRIGGER, 0, len(fds),
		fds)
	if err == nil && n > 0 {
		// So vfio-pci says that the host has no more (vfio_msi_enable in drivers/vfio/pci/vfio_pci_intrs.c).
		err = fmt.Errorf("vfio: %s: the host has %d vectors of %s left, and not %d: %w",
			i.device.Name(), n, i.kind, len(fds), ErrUnsupported)
	}
	return err
}

// setIRQs is VFIO_DEVICE_SET_IRQS.
func (d *Device) setIRQs(kind Kind, flags uint32, start, count int, fds []int32) (int, error) {
	head := uapi.VfioIrqSet{Flags: flags, Index: uint32(kind), Start: uint32(start), Count: uint32(count)}
	head.Argsz = uint32(int(unsafe.Sizeof(head)) + 4*len(fds))
	b := bytesOf(&head)
	for _, fd := range fds {
		b = binary.NativeEndian.AppendUint32(b, uint32(fd))
	}
	return d.file.ioctl("VFIO_DEVICE_SET_IRQS", uapi.VFIO_DEVICE_SET_IRQS, unsafe.Pointer(&b[0]), nil)
}

// Count is how many vectors there are.
func (i *Interrupts) Count() int { return len(i.vectors) }

// Wait waits until a vector was signalled, and returns how often it was since it was last waited for. It ends with the
// context's error, or with fs.ErrClosed when they are closed.
func (i *Interrupts) Wait(ctx context.Context, vector int) (uint64, error) {
	v, err := i.vector(vector)
	if err != nil {
		return 0, err
	}
	n, err := v.wait(ctx)
	if err != nil && ctx.Err() == nil {
		err = fmt.Errorf("vfio: wait for %s of %s: %w", i.kind, i.device.Name(), err)
	}
	return n, err
}

// wait waits for a vector, one after the other.
func (v *vector) wait(ctx context.Context) (uint64, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	select {
	case <-v.turn:
		defer func() { v.turn <- struct{}{} }()
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	if n := v.due(); n > 0 {
		return n, nil
	}

	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		_ = v.file.SetReadDeadline(time.Unix(1, 0))
	})
	_, err := v.file.Read(v.value[:])
	if !stop() {
		<-done
		_ = v.file.SetReadDeadline(time.Time{})
	}
	switch {
	case err == nil:
		return binary.NativeEndian.Uint64(v.value[:]), nil
	case errors.Is(err, os.ErrDeadlineExceeded):
		return 0, ctx.Err()
	case errors.Is(err, fs.ErrClosed):
		return 0, fs.ErrClosed
	}
	return 0, err
}

// due is how often a vector was signalled already. Who has to wait loses nothing by asking that first; who has not is
// spared what it takes to be stopped by a context, which is most of the time from the signal to here.
func (v *vector) due() uint64 {
	clear(v.value[:])
	if err := v.raw.Read(v.read); err != nil {
		return 0 // it is closed, which waiting will tell
	}
	return binary.NativeEndian.Uint64(v.value[:])
}

func (i *Interrupts) vector(n int) (*vector, error) {
	if n < 0 || n >= len(i.vectors) {
		return nil, fmt.Errorf("vfio: %s of %s: vector %d of %d: %w", i.kind, i.device.Name(), n, len(i.vectors),
			ErrRange)
	}
	return i.vectors[n], nil
}

// Mask keeps a vector from being signalled; of vfio-pci only INTx can be masked this way.
func (i *Interrupts) Mask(vector int) error { return i.act(vector, uapi.VFIO_IRQ_SET_ACTION_MASK) }

// Unmask lets a vector be signalled; one that is still due is at once.
func (i *Interrupts) Unmask(vector int) error { return i.act(vector, uapi.VFIO_IRQ_SET_ACTION_UNMASK) }

// Trigger has the kernel signal a vector, as if the device had: to test who waits.
func (i *Interrupts) Trigger(vector int) error {
	return i.act(vector, uapi.VFIO_IRQ_SET_ACTION_TRIGGER)
}

func (i *Interrupts) act(vector int, action uint32) error {
	if _, err := i.vector(vector); err != nil {
		return err
	}
	_, err := i.device.setIRQs(i.kind, uapi.VFIO_IRQ_SET_DATA_NONE|action, vector, 1, nil)
	return err
}

// Close disables the vectors, and ends who waits for them. Again is no error.
func (i *Interrupts) Close() error {
	i.once.Do(func() {
		i.device.disown(i)
		// No vector from 0 on is what disables them all.
		_, err := i.device.setIRQs(i.kind, uapi.VFIO_IRQ_SET_DATA_NONE|uapi.VFIO_IRQ_SET_ACTION_TRIGGER, 0, 0, nil)
		i.err = errors.Join(err, i.closeVectors())
		i.device.freeKind(i.kind)
	})
	return i.err
}

func (i *Interrupts) closeVectors() error {
	var errs []error
	for _, v := range i.vectors {
		errs = append(errs, v.file.Close())
	}
	return errors.Join(errs...)
}
