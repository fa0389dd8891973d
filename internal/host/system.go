package host

import (
	"context"
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// System is what a running host has beside its file trees: a kernel to ask, and files to make and remove. The machine
// that this program runs on is one; tests have another, which can also let any operation fail. Names are relative to
// the host's root, as those of Dir are.
type System interface {
	// Operation is asked before each operation, also before those of the file trees; an error fails it.
	Operation(op, name string) error
	// Write is a write(2) to an existing file.
	Write(name, value string) error
	// Socket opens a netlink socket of a family that hears these multicast groups, in the network namespace that a file
	// stands for, or in this process's if namespace is "". The caller closes it.
	Socket(family int, groups uint32, namespace string) (int, error)
	// Open opens a device file, or another that is not to be read whole. The caller closes it.
	Open(name string, flags int) (int, error)
	// Ioctl is ioctl(2) for a descriptor that Open gave, or of a plain socket if fd is below zero.
	Ioctl(fd int, request uintptr, arg unsafe.Pointer) (int, error)
	// IoctlValue is ioctl(2) of a request whose argument is a number itself, for a descriptor that Open gave.
	IoctlValue(fd int, request, arg uintptr) (int, error)
	// Device is the number of a device file: see Host.DeviceNumber.
	Device(name string) (block bool, number uint64, err error)
	// InUse reports whether a disk is in exclusive use.
	InUse(name string) (bool, error)
	// Owner is who may open a file.
	Owner(name string) (Owner, error)
	// Own gives a file an owner, a group (-1 leaves either) and a mode, and takes its access control list away.
	Own(name string, uid, gid int, mode uint32) error
	// Modprobe loads a module, or with an alias what it stands for. It returns when the context ends, whatever the
	// kernel does.
	Modprobe(ctx context.Context, module string) error
}

// Real reports whether this is the machine that this program runs on: the only host that has this program's own
// processes.
func (h *Host) Real() bool {
	_, real := h.system.(machine)
	return real
}

// Writable is an error that matches EROFS where a folder is on a file system that is mounted read-only, as those of a
// container are; nothing else is asked.
func (h *Host) Writable(dir string) error {
	if err := h.ask("access", dir); err != nil {
		return err
	}
	if err := unix.Access(h.Path(dir), unix.W_OK); errors.Is(err, unix.EROFS) {
		return h.fail("write to", dir, err)
	}
	return nil
}

// ask asks the system whether an operation may be, and refuses all on a captured host.
func (h *Host) ask(op, name string) error {
	if h.system == nil {
		return h.fail(op, name, ErrReadOnly)
	}
	if err := h.system.Operation(op, name); err != nil {
		return h.fail(op, name, err)
	}
	return nil
}

// Socket opens a netlink socket of a family, as unix.NETLINK_ROUTE, that hears these multicast groups. The caller
// closes it.
func (h *Host) Socket(family int, groups uint32) (int, error) { return h.SocketIn("", family, groups) }

// SocketIn is Socket in the network namespace that a file stands for, as proc/1/ns/net.
func (h *Host) SocketIn(namespace string, family int, groups uint32) (int, error) {
	if err := h.ask("socket", namespace); err != nil {
		return -1, err
	}

	fd, err := h.system.Socket(family, groups, namespace)
	if err != nil {
		return -1, h.fail("socket", namespace, err)
	}
	return fd, nil
}

// OpenNode opens a device file for what is neither read nor written as a whole. The caller closes it with unix.Close.
func (h *Host) OpenNode(name string, flags int) (int, error) {
	if err := h.ask("open", name); err != nil {
		return -1, err
	}

	fd, err := h.system.Open(name, flags)
	if err != nil {
		return -1, h.fail("open", name, err)
	}
	return fd, nil
}

// Ioctl is ioctl(2) for a descriptor of OpenNode, and for a plain network socket if fd is below zero. Name is what the
// error names. What arg points to has to be kept alive by the caller.
func (h *Host) Ioctl(fd int, name string, request uintptr, arg unsafe.Pointer) (int, error) {
	if err := h.ask("ioctl", name); err != nil {
		return 0, err
	}

	n, err := h.system.Ioctl(fd, request, arg)
	if err != nil {
		return 0, h.fail("ioctl", name, err)
	}
	return n, nil
}

// IoctlValue is Ioctl of a request whose argument is a number itself, for a descriptor of OpenNode.
func (h *Host) IoctlValue(fd int, name string, request, arg uintptr) (int, error) {
	if err := h.ask("ioctl", name); err != nil {
		return 0, err
	}

	n, err := h.system.IoctlValue(fd, request, arg)
	if err != nil {
		return 0, h.fail("ioctl", name, err)
	}
	return n, nil
}

// ErrNoDevice says that a file is no device file.
var ErrNoDevice = errors.New("not a device file")

// DeviceNumber is the number of the device file that name leads to, links followed: the major number in the upper 32
// bits, the minor one in the lower; ErrNoDevice for any other file. It waits for no network file system.
func (h *Host) DeviceNumber(name string) (block bool, number uint64, err error) {
	if err := h.ask("stat", name); err != nil {
		return false, 0, err
	}
	if block, number, err = h.system.Device(name); err != nil {
		return false, 0, h.fail("stat", name, err)
	}
	return block, number, nil
}

// InUse reports whether a disk is in exclusive use (open(2), O_EXCL on block devices): mounted, or part of something
// larger. One that is not there is not.
func (h *Host) InUse(name string) (bool, error) {
	if err := h.ask("exclusive", name); err != nil {
		return false, err
	}
	used, err := h.system.InUse(name)
	if err != nil {
		return false, h.fail("exclusive", name, err)
	}
	return used, nil
}

// Owner is who may open a file.
type Owner struct {
	UID, GID int
	Mode     uint32 // the permissions
	ACL      bool   // an access control list lets in others
	Regular  bool   // it is a regular file, which can be read without waiting for anybody
}

// Private reports whether nobody but root may open the file.
func (o Owner) Private() bool { return o.UID == 0 && o.Mode&0o077 == 0 && !o.ACL }

// Owner is who may open a file that is there.
func (h *Host) Owner(name string) (Owner, error) {
	if err := h.ask("stat", name); err != nil {
		return Owner{}, err
	}
	o, err := h.system.Owner(name)
	if err != nil {
		return Owner{}, h.fail("stat", name, err)
	}
	return o, nil
}

// Own gives a file an owner, a group (-1 leaves either) and a mode, takes its access control list away, and reads back
// that so it is.
func (h *Host) Own(name string, uid, gid int, mode uint32) error {
	if err := h.ask("own", name); err != nil {
		return err
	}
	if err := h.system.Own(name, uid, gid, mode); err != nil {
		return h.fail("own", name, err)
	}

	now, err := h.Owner(name)
	if err != nil {
		return err
	}
	if now.Mode != mode || now.ACL || uid >= 0 && now.UID != uid || gid >= 0 && now.GID != gid {
		return h.fail("own", name, fmt.Errorf("it has become owner %d:%d, mode %04o, list %v instead",
			now.UID, now.GID, now.Mode, now.ACL))
	}
	return nil
}

// Modprobe loads a module by its name, or those of an alias less what the administrator's files blacklist, with
// dependencies and options, which is why it is not done by finit_module(2). It returns when the context ends, also when
// the kernel does not let go of the program that loads.
func (h *Host) Modprobe(ctx context.Context, module string) error {
	if err := h.ask("modprobe", module); err != nil {
		return err
	}
	return h.system.Modprobe(ctx, module)
}

// Replace makes or replaces a file, durably and whole or not at all, and the directories it is in.
func (h *Host) Replace(name string, content []byte) error {
	if err := h.ask("replace", name); err != nil {
		return err
	}
	return WriteFile(h.Path(name), content)
}

// Remove removes a file; it is no error if there is none.
func (h *Host) Remove(name string) error {
	if err := h.ask("remove", name); err != nil {
		return err
	}
	if err := unix.Unlink(h.Path(name)); err != nil && !Absent(err) {
		return h.fail("remove", name, err)
	}
	return nil
}
