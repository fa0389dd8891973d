// Package filelock keeps processes apart by bytes of one file, each of which is a lock. A lock belongs to the open file
// (fcntl(2), open file description locks): it is shared with whoever was given the file, and ends with the last of
// them, however that ends.
package filelock

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// Each lock has a second byte, which its owner has as well, and for which others wait: the lock itself is never had by
// somebody who only waits for it.
const queue = 1 << 61

// File is an opened file of locks.
type File struct{ file *os.File }

// Open opens a file of locks, and makes it and its folder if they are not there. The caller closes it.
func Open(name string) (*File, error) {
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	return &File{f}, nil
}

// Of makes a File of one that is open, and whose locks are those of whom it came from.
func Of(f *os.File) *File { return &File{f} }

// OS is the file itself, to be given to another process.
func (l *File) OS() *os.File { return l.file }

// Close frees all locks, unless another has the file as well.
func (l *File) Close() error { return l.file.Close() }

func (l *File) set(cmd int, kind int16, start, length int64) error {
	for {
		err := unix.FcntlFlock(l.file.Fd(), cmd, &unix.Flock_t{Type: kind, Start: start, Len: length})
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// Try takes a lock if nobody has it.
func (l *File) Try(at int64) (bool, error) {
	err := l.set(unix.F_OFD_SETLK, unix.F_WRLCK, at, 1)
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		return false, nil
	}
	if err == nil {
		// Who waits has this for no longer than it takes to let go of it.
		err = l.set(unix.F_OFD_SETLKW, unix.F_WRLCK, at+queue, 1)
	}
	if err != nil {
		return false, fmt.Errorf("lock %s: %w", l.file.Name(), err)
	}
	return true, nil
}

// Wait takes a lock as soon as nobody has it, or fails when the context ends.
func (l *File) Wait(ctx context.Context, at int64) error {
	for {
		if ok, err := l.Try(at); ok || err != nil {
			return err
		}

		free := make(chan error, 1)
		go func() { free <- awaitFree(l.file.Name(), at) }()
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

// awaitFree returns once nobody has a lock. It waits with a file of its own, as the wait cannot be cut off, and nobody
// may close the file below it.
func awaitFree(name string, at int64) error {
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	own := File{f}
	return own.set(unix.F_OFD_SETLKW, unix.F_WRLCK, at+queue, 1)
}

// Free frees a lock.
func (l *File) Free(at int64) {
	_ = l.set(unix.F_OFD_SETLK, unix.F_UNLCK, at+queue, 1)
	_ = l.set(unix.F_OFD_SETLK, unix.F_UNLCK, at, 1)
}

// KeepOnly frees all locks but these.
func (l *File) KeepOnly(kept []int64) {
	var bytes []int64
	for _, at := range kept {
		bytes = append(bytes, at, at+queue)
	}
	slices.Sort(bytes)

	from := int64(0)
	for _, at := range bytes {
		if at > from {
			_ = l.set(unix.F_OFD_SETLK, unix.F_UNLCK, from, at-from)
		}
		from = at + 1
	}
	// 0: to the end.
	_ = l.set(unix.F_OFD_SETLK, unix.F_UNLCK, from, 0)
}
