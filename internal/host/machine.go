package host

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// machine is the machine that this program runs on.
type machine struct{ root *disk }

func (machine) Operation(string, string) error { return nil }

func (m machine) Write(name, value string) error { return m.root.write(name, value) }

func (m machine) Socket(family int, groups uint32, namespace string) (fd int, err error) {
	open := func() error {
		fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, family)
		return err
	}
	if namespace == "" {
		err = open()
	} else {
		err = m.inside(namespace, open)
	}
	if err != nil || groups == 0 {
		return fd, err
	}

	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		return -1, errors.Join(err, unix.Close(fd))
	}
	return fd, nil
}

// inside does something in a network namespace, on a thread of its own. One that does not get back to where it was
// ends.
func (m machine) inside(namespace string, do func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			done <- err
			return
		}
		defer unix.Close(home)
		there, err := unix.Openat(m.root.fd, namespace, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			runtime.UnlockOSThread()
			done <- err
			return
		}
		defer unix.Close(there)

		if err = unix.Setns(there, unix.CLONE_NEWNET); err == nil {
			err = do()
			if unix.Setns(home, unix.CLONE_NEWNET) != nil {
				// Go ends the thread of a goroutine that ends while it is locked to it.
				done <- err
				return
			}
		}
		runtime.UnlockOSThread()
		done <- err
	}()
	return <-done
}

func (m machine) Open(name string, flags int) (int, error) {
	return unix.Openat(m.root.fd, name, flags|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
}

func (machine) Ioctl(fd int, request uintptr, arg unsafe.Pointer) (int, error) {
	if fd < 0 {
		plain, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return 0, err
		}
		defer unix.Close(plain)
		fd = plain
	}
	for {
		n, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg))
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}

func (machine) IoctlValue(fd int, request, arg uintptr) (int, error) {
	for {
		n, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, arg)
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}

func (m machine) Device(name string) (block bool, number uint64, err error) {
	var st unix.Statx_t
	if err := unix.Statx(m.root.fd, name, unix.AT_STATX_DONT_SYNC, unix.STATX_TYPE, &st); err != nil {
		return false, 0, err
	}
	kind := st.Mode & unix.S_IFMT
	if kind != unix.S_IFBLK && kind != unix.S_IFCHR {
		return false, 0, ErrNoDevice
	}
	return kind == unix.S_IFBLK, uint64(st.Rdev_major)<<32 | uint64(st.Rdev_minor), nil
}

func (m machine) InUse(name string) (bool, error) {
	const flags = unix.O_RDONLY | unix.O_EXCL | unix.O_NONBLOCK | unix.O_CLOEXEC
	fd, err := unix.Openat(m.root.fd, name, flags, 0)
	switch {
	case err == nil:
		unix.Close(fd)
		return false, nil
	case errors.Is(err, unix.EBUSY):
		return true, nil
	case Absent(err) || errors.Is(err, unix.ENOMEDIUM):
		return false, nil
	}
	return false, err
}

// accessACL is the extended attribute that a file's access control list is (acl(5)).
const accessACL = "system.posix_acl_access"

func (m machine) Owner(name string) (Owner, error) {
	fd, err := unix.Openat(m.root.fd, name, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return Owner{}, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return Owner{}, err
	}

	o := Owner{
		UID: int(st.Uid), GID: int(st.Gid), Mode: st.Mode & 0o7777, Regular: st.Mode&unix.S_IFMT == unix.S_IFREG,
	}
	_, err = unix.Getxattr(byDescriptor(fd), accessACL, nil)
	if noACL(err) {
		return o, nil
	}
	o.ACL = true
	return o, err
}

func (m machine) Own(name string, uid, gid int, mode uint32) error {
	fd, err := unix.Openat(m.root.fd, name, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)

	// chmod only masks an access control list, and the next one would let its entries in again.
	if err := unix.Removexattr(byDescriptor(fd), accessACL); err != nil && !noACL(err) {
		return err
	}
	if err := unix.Fchownat(fd, "", uid, gid, unix.AT_EMPTY_PATH); err != nil {
		return err
	}
	return unix.Chmod(byDescriptor(fd), mode)
}

// byDescriptor is the name of the file that a descriptor of O_PATH stands for.
func byDescriptor(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// noACL reports whether a file has no access control list, or its file system knows none.
func noACL(err error) bool { return errors.Is(err, unix.ENODATA) || errors.Is(err, unix.EOPNOTSUPP) }

// WriteFile makes or replaces a file, durably and whole or not at all, and the directories it is in. All may read it: a
// user who can change nothing asks what a change would do, and that depends on what viaduct has written down.
func WriteFile(file string, content []byte) (err error) {
	dir := filepath.Dir(file)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(dir, ".new-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(tmp.Name())
		}
	}()

	if _, err = tmp.Write(content); err == nil {
		err = tmp.Chmod(0o644)
	}
	if err == nil {
		err = tmp.Sync()
	}
	if err = errors.Join(err, tmp.Close()); err != nil {
		return err
	}
	if err = os.Rename(tmp.Name(), file); err != nil {
		return err
	}

	// Without this a power cut may take the new name back.
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
