package vfio

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/iommu"
)

// Two viaducts at once are kept apart device by device: each device is one byte of one lock file, at an offset made of its
// address. The locks belong to the open file (fcntl(2), open file description locks), which the child that writes shares:
// while it still writes for a command that was killed, nobody else comes between.

type locks struct{ file *os.File }

func openLocks(dir string) (*locks, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	return &locks{f}, nil
}

// offset is a device's byte.
func offset(a iommu.Address) int64 {
	return int64(a.Domain)<<16 | int64(a.Bus)<<8 | int64(a.Device)<<3 | int64(a.Function)
}

func (l *locks) set(cmd int, kind int16, start, length int64) error {
	for {
		err := unix.FcntlFlock(l.file.Fd(), cmd, &unix.Flock_t{Type: kind, Start: start, Len: length})
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// try takes a device's lock if it is free.
func (l *locks) try(a iommu.Address) (bool, error) {
	err := l.set(unix.F_OFD_SETLK, unix.F_WRLCK, offset(a), 1)
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("lock %s: %w", l.file.Name(), err)
	}
	return true, nil
}

// wait takes a device's lock, or fails when the context ends.
func (l *locks) wait(ctx context.Context, a iommu.Address) error {
	for {
		if ok, err := l.try(a); ok || err != nil {
			return err
		}
		free := make(chan error, 1)
		go func() { free <- awaitFree(l.file.Name(), a) }()
		select {
		case err := <-free:
			if err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// awaitFree returns once nobody has the device. It waits with a file of its own, as the wait cannot be cut off, and nobody
// may close the file below it.
func awaitFree(name string, a iommu.Address) error {
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	own := locks{f}
	return own.set(unix.F_OFD_SETLKW, unix.F_WRLCK, offset(a), 1)
}

func (l *locks) free(a iommu.Address) { _ = l.set(unix.F_OFD_SETLK, unix.F_UNLCK, offset(a), 1) }

// keepOnly frees all devices but these.
func (l *locks) keepOnly(devices []iommu.Address) {
	slices.SortFunc(devices, iommu.Address.Compare)
	at := int64(0)
	for _, a := range devices {
		if o := offset(a); o > at {
			_ = l.set(unix.F_OFD_SETLK, unix.F_UNLCK, at, o-at)
		}
		at = offset(a) + 1
	}
	_ = l.set(unix.F_OFD_SETLK, unix.F_UNLCK, at, 0) // 0: to the end
}

// Lock keeps every other viaduct from changing these devices until Close. It waits for one that does, at most for the
// Binder's Timeout, but not for a write that is known to be stuck: that device is left out, and [Binder.Recover] reports it.
// Devices are locked in the order of their addresses, so that two commands never wait for each other.
func (b *Binder) Lock(ctx context.Context, devices []*iommu.Device) error {
	l, err := b.openLocks()
	if l == nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, b.timeout())
	defer cancel()
	devices = slices.Clone(devices)
	slices.SortFunc(devices, func(a, b *iommu.Device) int { return a.Address.Compare(b.Address) })
	for _, d := range devices {
		if !d.PCI {
			continue
		}
		ok, err := l.try(d.Address)
		if err == nil && !ok {
			if r, known, readErr := b.change(d.Address); readErr == nil && known && r.Stuck != "" && r.orphan(b.Host) {
				continue
			}
			err = l.wait(ctx, d.Address)
		}
		if errors.Is(err, context.DeadlineExceeded) {
			if r, known, err := b.change(d.Address); err == nil && known && r.orphan(b.Host) {
				continue
			}
			return b.busy(d.Address)
		}
		if err != nil {
			return err
		}
		b.hold(d.Address)
	}
	return nil
}

// TryLock locks a device as Lock does, unless another viaduct has it.
func (b *Binder) TryLock(d *iommu.Device) (bool, error) {
	l, err := b.openLocks()
	if l == nil {
		return false, err
	}
	ok, err := l.try(d.Address)
	if ok {
		b.hold(d.Address)
	}
	return ok, err
}

func (b *Binder) hold(a iommu.Address) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.held == nil {
		b.held = map[iommu.Address]bool{}
	}
	b.held[a] = true
}

// holds reports whether Lock has the device.
func (b *Binder) holds(a iommu.Address) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.held[a]
}

// release frees a device that was locked in passing, not by Lock.
func (b *Binder) release(a iommu.Address) {
	if !b.holds(a) {
		b.locks.free(a)
	}
}

// busy says who is changing a device.
func (b *Binder) busy(a iommu.Address) error {
	r, known, err := b.change(a)
	if err != nil || !known {
		return fmt.Errorf("%s: another viaduct has been changing it for %s; try again, or with a longer --timeout", a, b.timeout())
	}
	return fmt.Errorf("%s: another viaduct (pid %d) has been changing it since %s; try again, or with a longer --timeout",
		a, r.Command.PID, r.Since.Format(time.TimeOnly))
}

func (b *Binder) openLocks() (*locks, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.locks != nil || b.Journal == nil {
		return b.locks, nil
	}
	var err error
	b.locks, err = openLocks(b.Journal.Dir())
	return b.locks, err
}
