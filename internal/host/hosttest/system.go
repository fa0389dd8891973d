package hosttest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"strings"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"viaduct/internal/host"
)

// This is what a Kernel has beside files: see host.System.

// Operation is asked before each operation of the host.
func (k *Kernel) Operation(op, name string) error {
	if f := k.fault.Load(); f != nil {
		return (*f)(op, path.Clean(name))
	}
	return nil
}

// SetFault has a function asked before each operation.
func (k *Kernel) SetFault(f Fault) { k.fault.Store(&f) }

// Open opens a file that is there.
func (k *Kernel) Open(name string, flags int) (int, error) {
	real, err := k.resolve(name)
	if err != nil {
		return -1, err
	}
	if k.OnOpen != nil {
		if fd, known, err := k.OnOpen(real); known {
			return fd, err
		}
	}
	return unix.Open(k.at(real), flags&^unix.O_EXCL|unix.O_CLOEXEC, 0)
}

// Ioctl knows no device and no interface of its own.
func (k *Kernel) Ioctl(fd int, request uintptr, arg unsafe.Pointer) (int, error) {
	if k.OnIoctl == nil {
		return 0, syscall.ENOTTY
	}
	return k.OnIoctl(fd, request, arg)
}

// IoctlValue has OnIoctl answer, which is pointed to the number.
func (k *Kernel) IoctlValue(fd int, request, arg uintptr) (int, error) {
	return k.Ioctl(fd, request, unsafe.Pointer(&arg))
}

// Device is the number of a device file, which is a file that says "c 511:0" or "b 8:0".
func (k *Kernel) Device(name string) (block bool, number uint64, err error) {
	dir, base := path.Split(name)
	real, err := k.resolve(path.Clean(dir))
	if err != nil {
		return false, 0, err
	}
	name = path.Join(real, base)
	if target, err := os.Readlink(k.at(name)); err == nil {
		name = strings.TrimPrefix(target, "/")
		if !path.IsAbs(target) {
			name = path.Join(real, target)
		}
	}

	b, err := os.ReadFile(k.at(name))
	if err != nil {
		return false, 0, syscall.ENOENT
	}
	var kind string
	var major, minor uint64
	if n, _ := fmt.Sscanf(string(b), "%1s %d:%d", &kind, &major, &minor); n != 3 || kind != "c" && kind != "b" {
		return false, 0, host.ErrNoDevice
	}
	return kind == "b", major<<32 | minor, nil
}

// InUse reports whether a disk is in Busy.
func (k *Kernel) InUse(name string) (bool, error) { return k.Busy[path.Base(name)], nil }

// Owner is who Owners has for a file that is there; root alone for what it has not.
func (k *Kernel) Owner(name string) (host.Owner, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.exists(name) {
		return host.Owner{}, syscall.ENOENT
	}
	o, known := k.Owners[nodeKey(name)]
	if !known {
		o.Mode = 0o600
	}
	st, err := os.Stat(k.at(name))
	o.Regular = err == nil && st.Mode().IsRegular() && !strings.HasPrefix(name, "dev/")
	return o, nil
}

// Own notes the owner of a file that is there.
func (k *Kernel) Own(name string, uid, gid int, mode uint32) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.exists(name) {
		return syscall.ENOENT
	}
	o := k.Owners[nodeKey(name)]
	if uid >= 0 {
		o.UID = uid
	}
	if gid >= 0 {
		o.GID = gid
	}
	k.Owners[nodeKey(name)] = host.Owner{UID: o.UID, GID: o.GID, Mode: mode}
	return nil
}

// nodeKey is what Owners knows a node by.
func nodeKey(name string) string { return path.Base(path.Dir(name)) + "/" + path.Base(name) }

// Modprobe registers the driver that a module in Modules brings.
func (k *Kernel) Modprobe(ctx context.Context, module string) error {
	k.mu.Lock()
	driver, known := k.Modules[module]
	hangs := k.Hang[module]
	k.mu.Unlock()
	if hangs {
		<-ctx.Done()
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if !known || driver == "" {
		return fmt.Errorf("modprobe %s: %w", module, errors.New("module not found"))
	}
	k.Register(driver)
	name := strings.ReplaceAll(module, "-", "_")
	if link := path.Join("sys/module", name, "drivers", "pci:"+driver); !k.exists(link) {
		k.link(link, path.Join(sysDrivers, driver))
	}
	return nil
}

// makeNodes makes the nodes of a device that a VFIO driver has: its own, and its group's if this is the first of that.
func (k *Kernel) makeNodes(dev string) {
	name := fmt.Sprintf("vfio%d", k.vfio)
	k.put(fmt.Sprintf("%s/vfio-dev/%s/dev", dev, name), fmt.Sprintf("511:%d\n", k.vfio))
	k.put("dev/vfio/devices/"+name, fmt.Sprintf("c 511:%d\n", k.vfio))
	k.vfio++
	if group, err := os.Readlink(k.at(dev + "/iommu_group")); err == nil {
		id := path.Base(group)
		if late := k.LateGroups[path.Base(dev)]; late != "" {
			id = late
		}
		k.put(path.Join("sys/class/vfio", id, "dev"), fmt.Sprintf("244:%s\n", id))
		k.put(path.Join("dev/vfio", id), fmt.Sprintf("c 244:%s\n", id))
	}
}

// removeNodes removes them again: the group's with the last of it.
func (k *Kernel) removeNodes(dev, driver string) {
	if !strings.Contains(driver, "vfio") {
		return
	}
	for _, n := range k.names(dev + "/vfio-dev") {
		k.must(os.RemoveAll(k.at("dev/vfio/devices/" + n)))
		delete(k.Owners, "devices/"+n)
	}
	k.takeAway(dev + "/vfio-dev")
	group, err := k.resolve(dev + "/iommu_group")
	if err != nil {
		return
	}
	for _, address := range k.names(group + "/devices") {
		if other := k.device(address); other != dev && strings.Contains(k.driver(other), "vfio") {
			return
		}
	}

	for _, id := range []string{path.Base(group), "noiommu-" + path.Base(group)} {
		k.must(os.RemoveAll(k.at(path.Join("sys/class/vfio", id))))
		k.must(os.RemoveAll(k.at(path.Join("dev/vfio", id))))
		delete(k.Owners, "vfio/"+id)
	}
}

// ErrKilled is what every operation fails with once a Kernel's program was killed.
var ErrKilled = errors.New("killed")

// KillAt has every operation fail from the n-th such operation on, counted from 0, as if the program had been killed
// before it: nothing it does after that has an effect. Revive ends that.
func (k *Kernel) KillAt(n int, such func(op, name string) bool) {
	k.count(n, such, func() error { return ErrKilled }, func() error {
		if k.killed.Load() {
			return ErrKilled
		}
		return nil
	})
}

// FailAt has the n-th such operation, counted from 0, fail with an error, and no other. Revive ends that, and tells
// whether there were so many.
func (k *Kernel) FailAt(n int, such func(op, name string) bool, err error) {
	k.count(n, such, func() error { return err }, func() error { return nil })
}

// count answers the n-th such operation with hit, and all others with other.
func (k *Kernel) count(n int, such func(op, name string) bool, hit, other func() error) {
	k.killed.Store(false)
	var left atomic.Int64
	left.Store(int64(n))
	k.SetFault(func(op, name string) error {
		if such(op, name) && left.Add(-1) == -1 {
			k.killed.Store(true)
			return hit()
		}
		return other()
	})
}

// Revive lets all operations be again, and reports whether one failed for KillAt or FailAt.
func (k *Kernel) Revive() bool {
	k.fault.Store(nil)
	return k.killed.Load()
}
