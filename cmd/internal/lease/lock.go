package lease

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// The books are locked while a device is chosen, and each guest's lease while it is worked on. A lock is a byte of a file, and
// belongs to the open file (fcntl(2), open file description locks): it ends with the process, however that ends.

const books = 0 // the byte of the books; guests' are above

func byteOf(guest string) int64 {
	h := fnv.New64a()
	h.Write([]byte(guest))
	return int64(h.Sum64()>>2) + 1
}

// lock takes a byte's lock; the caller closes the file. It waits until the context ends.
func (b *Book) lock(ctx context.Context, at int64) (*os.File, error) {
	if b.Run == nil {
		return os.Open(os.DevNull)
	}
	dir := b.Run.Dir()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock-leases"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	got := make(chan error, 1)
	go func() {
		for {
			err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLKW, &unix.Flock_t{Type: unix.F_WRLCK, Start: at, Len: 1})
			if !errors.Is(err, unix.EINTR) {
				got <- err
				return
			}
		}
	}()
	select {
	case err := <-got:
		if err != nil {
			return nil, errors.Join(fmt.Errorf("lock %s: %w", f.Name(), err), f.Close())
		}
		return f, nil
	case <-ctx.Done():
		return nil, ctx.Err() // the file stays open as long as the lock is waited for
	}
}

// lockAll keeps everybody else from the books.
func (b *Book) lockAll(ctx context.Context, most time.Duration) (*os.File, error) {
	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	f, err := b.lock(ctx, books)
	if err != nil {
		return nil, fmt.Errorf("the books of all leases are locked: %w", err)
	}
	return f, nil
}

// lockGuest keeps everybody else from a guest's lease.
func (b *Book) lockGuest(ctx context.Context, guest string, most time.Duration) (*os.File, error) {
	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	f, err := b.lock(ctx, byteOf(guest))
	if errors.Is(err, context.DeadlineExceeded) {
		return nil, fmt.Errorf("%s: another viaduct has been at work on its lease for %s; try again, or with a longer --timeout", guest, most)
	}
	return f, err
}

// tryGuest is lockGuest without waiting; nil if somebody else has it.
func (b *Book) tryGuest(guest string) *os.File {
	if b.Run == nil {
		return nil
	}
	f, err := os.OpenFile(filepath.Join(b.Run.Dir(), "lock-leases"), os.O_RDWR, 0)
	if err != nil {
		return nil
	}
	if unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Start: byteOf(guest), Len: 1}) != nil {
		f.Close()
		return nil
	}
	return f
}
