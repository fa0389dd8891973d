package bind

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"viaduct/internal/filelock"
	"viaduct/internal/host"
	"viaduct/iommu"
)

// Two processes at once are kept apart device by device: each device is one byte of one lock file, at an offset made of
// its address. The child that writes shares the locks: while it still writes for a command that was killed, nobody else
// comes between.

// offset is a device's byte.
func offset(a iommu.Address) int64 {
	return int64(a.Domain)<<16 | int64(a.Bus)<<8 | int64(a.Device)<<3 | int64(a.Function)
}

// locks are those of one Handle. The file is opened when it is needed first.
type locks struct {
	name string

	mu     sync.Mutex
	file   *filelock.File
	held   map[iommu.Address]bool // by Lock, and not only in passing
	closed bool
}

func (l *locks) open() (*filelock.File, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, errors.New("bind: the Handle is closed")
	}
	if l.file != nil {
		return l.file, nil
	}

	var err error
	l.file, err = filelock.Open(l.name)
	return l.file, err
}

func (l *locks) close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	if l.file == nil {
		return nil
	}
	f := l.file
	l.file = nil
	return f.Close()
}

func (l *locks) hold(a iommu.Address) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.held == nil {
		l.held = map[iommu.Address]bool{}
	}
	l.held[a] = true
}

func (l *locks) holds(a iommu.Address) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.held[a]
}

// pass frees a device that was locked in passing, not by Lock.
func (l *locks) pass(a iommu.Address) {
	if f, err := l.open(); err == nil && !l.holds(a) {
		f.Free(offset(a))
	}
}

// Holds reports whether Lock has the device.
func (b *Handle) Holds(a iommu.Address) bool { return b.locks.holds(a) }

// Lock keeps every other process from changing these devices until Close. It waits for one that does, at most for the
// Handle's timeout, but not for a write that is known to be stuck: that device is left out, and [Handle.Recover]
// reports it. Devices are locked in the order of their addresses, so that two commands never wait for each other. A
// *BusyError says who has one.
func (b *Handle) Lock(ctx context.Context, devices []*iommu.Device) error {
	return b.LockAt(ctx, AddressesOf(devices)...)
}

// AddressesOf are the addresses of those of the devices that are PCI devices.
func AddressesOf(devices []*iommu.Device) []iommu.Address {
	var all []iommu.Address
	for _, d := range devices {
		if d.PCI {
			all = append(all, d.Address)
		}
	}
	return all
}

// LockAt is Lock for devices of which only the addresses are known.
func (b *Handle) LockAt(ctx context.Context, devices ...iommu.Address) error {
	if err := b.MayChange(); err != nil {
		return err
	}
	l, err := b.locks.open()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, b.Timeout())
	defer cancel()

	for _, a := range slices.SortedFunc(slices.Values(devices), iommu.Address.Compare) {
		stuck, err := b.lockOne(ctx, l, a)
		if err != nil {
			return err
		}
		if !stuck {
			b.locks.hold(a)
		}
	}
	return nil
}

// lockOne locks one device; stuck is true if it is left to a write that waits.
func (b *Handle) lockOne(ctx context.Context, l *filelock.File, a iommu.Address) (stuck bool, err error) {
	ok, err := l.Try(offset(a))
	if ok || err != nil {
		return false, err
	}
	if r, known, err := b.change(a); err == nil && known && r.Stuck != "" && r.orphan(b.host) {
		return true, nil
	}

	err = l.Wait(ctx, offset(a))
	if !errors.Is(err, context.DeadlineExceeded) {
		return false, err
	}
	r, known, err := b.change(a)
	if err == nil && known && r.orphan(b.host) {
		return true, nil
	}
	busy := &BusyError{Device: a, Waited: b.Timeout()}
	if err == nil && known {
		busy.PID, busy.Since = r.Command.PID, r.Since
	}
	return false, busy
}

// TryLock locks a device as Lock does, unless another process has it.
func (b *Handle) TryLock(a iommu.Address) (bool, error) {
	if err := b.MayChange(); err != nil {
		return false, err
	}
	l, err := b.locks.open()
	if err != nil {
		return false, err
	}
	ok, err := l.Try(offset(a))
	if ok {
		b.locks.hold(a)
	}
	return ok, err
}

// BusyError says that another process has been changing a device for as long as it was waited for.
type BusyError struct {
	Device iommu.Address
	Waited time.Duration
	PID    int       // 0 if it is not known
	Since  time.Time // zero with that
}

func (e *BusyError) Error() string {
	const hint = "try again, or use a longer --timeout"
	if e.PID == 0 {
		return fmt.Sprintf("%s: another viaduct has been changing it for %s; %s", e.Device, e.Waited, hint)
	}
	return fmt.Sprintf("%s: another viaduct (pid %d) has been changing it since %s; %s",
		e.Device, e.PID, e.Since.Format(time.TimeOnly), hint)
}

// ErrNotLocked is matched by errors that say that a device has to be locked before it is changed.
const ErrNotLocked = host.Error("lock it first")

// locked is an ErrNotLocked for a device that Lock has not.
func (b *Handle) locked(a iommu.Address) error {
	if !b.Holds(a) {
		return fmt.Errorf("bind: %s: %w", a, ErrNotLocked)
	}
	return nil
}

func (l *locks) unhold(a iommu.Address) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.held, a)
}
