package lease

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"time"

	"viaduct/internal/filelock"
)

// The books are locked while a device is chosen, and each guest's lease while it is worked on.

const books = 0 // the lock of the books; guests' are above

func byteOf(guest string) int64 {
	h := fnv.New64a()
	h.Write([]byte(guest))
	return int64(h.Sum64()>>2) + 1
}

func (b *Book) lockFile() (*filelock.File, error) { return filelock.Open(b.Run.Dir() + "/lock-leases") }

// lock takes a lock, for which it waits until the context ends; the caller closes the file.
func (b *Book) lock(ctx context.Context, at int64) (*filelock.File, error) {
	f, err := b.lockFile()
	if err != nil {
		return nil, err
	}
	if err := f.Wait(ctx, at); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// lockAll keeps everybody else from the books.
func (b *Book) lockAll(ctx context.Context, most time.Duration) (*filelock.File, error) {
	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	f, err := b.lock(ctx, books)
	if err != nil {
		return nil, fmt.Errorf("lock the records of all leases: %w", err)
	}
	return f, nil
}

// lockGuest keeps everybody else from a guest's lease.
func (b *Book) lockGuest(ctx context.Context, guest string, most time.Duration) (*filelock.File, error) {
	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	f, err := b.lock(ctx, byteOf(guest))
	if errors.Is(err, context.DeadlineExceeded) {
		return nil, fmt.Errorf(
			"%s: another viaduct has been working on its lease for %s; try again, or use a longer --timeout",
			guest,
			most,
		)
	}
	return f, err
}

// tryGuest is lockGuest without waiting; nil if somebody else has it.
func (b *Book) tryGuest(guest string) (*filelock.File, error) {
	f, err := b.lockFile()
	if err != nil {
		return nil, err
	}
	if ok, err := f.Try(byteOf(guest)); !ok || err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
