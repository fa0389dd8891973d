package host

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// The calls that look things up in sysfs, without telling Go's scheduler: they never wait for anything but memory, and
// on a slow machine the scheduler would hand the thread's work on at each of them. Reading an attribute may wait for a
// driver, so only the steady ones are read this way.

// cstring copies name to buf, which the kernel reads; false if it does not fit.
func cstring(buf *[256]byte, name string) bool { return copy(buf[:len(buf)-1], name) == len(name) }

func rawOpenat(dir int, name string, flags int) (int, error) {
	var buf [256]byte
	if !cstring(&buf, name) {
		return unix.Openat(dir, name, flags, 0)
	}
	fd, _, errno := unix.RawSyscall6(unix.SYS_OPENAT, uintptr(dir), uintptr(unsafe.Pointer(&buf)), uintptr(flags), 0, 0,
		0)
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}

func rawReadlinkat(dir int, name string, b []byte) (int, error) {
	var buf [256]byte
	if !cstring(&buf, name) {
		return unix.Readlinkat(dir, name, b)
	}
	n, _, errno := unix.RawSyscall6(unix.SYS_READLINKAT, uintptr(dir), uintptr(unsafe.Pointer(&buf)),
		uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), 0, 0)
	if errno != 0 {
		return -1, errno
	}
	return int(n), nil
}

func rawRead(fd int, b []byte) (int, error) {
	n, _, errno := unix.RawSyscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

func rawGetdents(fd int, b []byte) (int, error) {
	n, _, errno := unix.RawSyscall(unix.SYS_GETDENTS64, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

func rawClose(fd int) { _, _, _ = unix.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0) }
