package vfio

import (
	"errors"
	"io/fs"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"viaduct/iommu"
)

// file is an open file of the kernel's: a container, a group, a device. It is closed once, not before what uses it has
// returned, and used no more after that.
type file struct {
	host *iommu.Host
	name string // from the host's root, or what it is of, for errors
	// means are what errnos mean that any request can end with, beside those of a request's own.
	means map[unix.Errno]error

	mu sync.RWMutex
	fd int // below zero when it is closed
}

// nodeMeans are what errnos of a way's own node mean: the kernel has not this way.
var nodeMeans = map[unix.Errno]error{
	unix.ENOENT: ErrUnsupported, unix.ENODEV: ErrUnsupported, unix.ENXIO: ErrUnsupported,
}

// open opens a node.
func open(h *iommu.Host, name string, means map[unix.Errno]error) (*file, error) {
	fd, err := h.OpenNode(name, unix.O_RDWR)
	if err != nil {
		return nil, failure("open", h.Path(name), err, means)
	}
	return &file{host: h, name: h.Path(name), fd: fd}, nil
}

// close closes the file; again is no error.
func (f *file) close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fd < 0 {
		return nil
	}
	fd := f.fd
	f.fd = -1
	return failure("close", f.name, unix.Close(fd), nil)
}

// use has a function use the descriptor.
func (f *file) use(op string, do func(fd int) error) error {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.fd < 0 {
		return &Error{Op: op, Path: f.name, Err: fs.ErrClosed}
	}
	return do(f.fd)
}

// ioctl asks the kernel, op being the request's name. What arg points to is alive until it returns.
func (f *file) ioctl(op string, request uintptr, arg unsafe.Pointer, means map[unix.Errno]error) (n int, err error) {
	err = f.use(op, func(fd int) error {
		n, err = f.host.Ioctl(fd, f.name, request, arg)
		return f.failure(op, err, means)
	})
	return n, err
}

// value is an ioctl whose argument is a number itself.
func (f *file) value(op string, request, value uintptr, means map[unix.Errno]error) (n int, err error) {
	err = f.use(op, func(fd int) error {
		n, err = f.host.IoctlValue(fd, f.name, request, value)
		return f.failure(op, err, means)
	})
	return n, err
}

// failure makes an Error of what a request ended with.
func (f *file) failure(op string, err error, means map[unix.Errno]error) error {
	if errno := asErrno(err); means[errno] == nil && f.means[errno] != nil {
		means = f.means
	}
	return failure(op, f.name, err, means)
}

// asErrno is the errno of an error.
func asErrno(err error) unix.Errno {
	var errno unix.Errno
	_ = errors.As(err, &errno)
	return errno
}
