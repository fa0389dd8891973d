//go:build lab

package labtest

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"viaduct/internal/uapi"
)

// opened is a device that was opened by its group, as a VMM does, with no library between.
type opened struct{ container, group, device int }

func openByGroup(t *testing.T, function string) opened {
	t.Helper()
	ioctl := func(what string, fd int, request, arg uintptr) int {
		n, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, arg)
		if errno != 0 {
			t.Fatalf("%s: %v", what, errno)
		}
		return int(n)
	}
	o := opened{
		container: must(unix.Open("/dev/vfio/vfio", unix.O_RDWR|unix.O_CLOEXEC, 0)),
		group:     must(unix.Open(groupNode(function), unix.O_RDWR|unix.O_CLOEXEC, 0)),
	}
	of := int32(o.container)
	ioctl("set container", o.group, uapi.VFIO_GROUP_SET_CONTAINER, uintptr(unsafe.Pointer(&of)))
	ioctl("set IOMMU", o.container, uapi.VFIO_SET_IOMMU, uapi.VFIO_TYPE1v2_IOMMU)
	name := append([]byte(function), 0)
	o.device = ioctl("get device", o.group, uapi.VFIO_GROUP_GET_DEVICE_FD, uintptr(unsafe.Pointer(&name[0])))
	return o
}

func groupNode(function string) string {
	return "/dev/vfio/" + link(devicesDir, function, "iommu_group")
}

// sent puts a descriptor on its way to nobody who takes it, and closes it here.
func sent(t *testing.T, fd int) (free func()) {
	t.Helper()
	pair := must(unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0))
	check(t, unix.Sendmsg(pair[0], []byte("x"), unix.UnixRights(fd), nil, 0))
	check(t, unix.Close(fd))
	return func() {
		check(t, unix.Close(pair[0]))
		check(t, unix.Close(pair[1]))
	}
}

// hidings are ways to have a device so that a process's list of open files does not show it.
var hidings = []struct {
	name string
	hide func(t *testing.T, function string) (free func())
}{
	{"memory whose descriptors are closed", func(t *testing.T, function string) func() {
		o := openByGroup(t, function)
		bar := must(unix.Mmap(o.device, 0, 4096, unix.PROT_READ, unix.MAP_SHARED))
		for _, fd := range []int{o.device, o.group, o.container} {
			check(t, unix.Close(fd))
		}
		return func() { check(t, unix.Munmap(bar)) }
	}},
	{"descriptor on its way", func(t *testing.T, function string) func() {
		return sent(t, must(unix.Open(groupNode(function), unix.O_RDWR|unix.O_CLOEXEC, 0)))
	}},
	{"table of a thread", func(t *testing.T, function string) func() {
		end, ready, over := make(chan bool), make(chan error), make(chan bool)
		beside(func() {
			defer close(over)
			err := unix.Unshare(unix.CLONE_FILES)
			fd := -1
			if err == nil {
				fd, err = unix.Open(groupNode(function), unix.O_RDWR|unix.O_CLOEXEC, 0)
			}
			ready <- err
			<-end
			_ = unix.Close(fd)
		})
		check(t, <-ready)
		return func() {
			close(end)
			<-over
		}
	}},
	{"name of a program that only looks", func(t *testing.T, function string) func() {
		return heldAs(t, "(udev-worker)", function)
	}},
	{"device whose group is closed", func(t *testing.T, function string) func() {
		o := openByGroup(t, function)
		check(t, unix.Close(o.group))
		check(t, unix.Close(o.container))
		return sent(t, o.device)
	}},
	{"own node, bound to nothing", func(t *testing.T, function string) func() {
		own := names(devicesDir, function, "vfio-dev")
		if len(own) == 0 || !there("/dev/vfio/devices/"+own[0]) {
			// This kernel makes none (CONFIG_VFIO_DEVICE_CDEV).
			return nil
		}
		return sent(t, must(unix.Open("/dev/vfio/devices/"+own[0], unix.O_RDWR|unix.O_CLOEXEC, 0)))
	}},
}

// beside runs a function on a thread that is not the process's first, whose files /proc/PID/fd shows, and ends with it.
func beside(f func()) {
	go func() {
		// A goroutine that ends while it is locked takes its thread along.
		runtime.LockOSThread()
		if unix.Gettid() != os.Getpid() {
			f()
			return
		}
		over := make(chan bool)
		beside(func() {
			defer close(over)
			f()
		})
		<-over
		runtime.UnlockOSThread()
	}()
}

// grant lets another user into a node by an access control list (acl(5)), and reports whether one can.
func grant(t *testing.T, node string, user uint32) bool {
	t.Helper()
	list := []byte{2, 0, 0, 0}
	for _, e := range []struct {
		tag, may uint16
		id       uint32
	}{{1, 6, ^uint32(0)}, {2, 6, user}, {4, 0, ^uint32(0)}, {16, 6, ^uint32(0)}, {32, 0, ^uint32(0)}} {
		list = append(list, byte(e.tag), 0, byte(e.may), 0, byte(e.id), byte(e.id>>8), byte(e.id>>16), byte(e.id>>24))
	}
	err := unix.Setxattr(node, "system.posix_acl_access", list, 0)
	if err == unix.EOPNOTSUPP {
		t.Log("this kernel's /dev has no access control lists")
		return false
	}
	check(t, err)
	return true
}

// private fails if anybody but root may open a node.
func private(t *testing.T, node string) {
	t.Helper()
	if owner := shell(t, "stat -c '%u %a' "+node); owner != "0 600" {
		t.Errorf("%s belongs to %s", node, owner)
	}
	if _, err := unix.Getxattr(node, "system.posix_acl_access", nil); err == nil {
		t.Errorf("%s has an access control list", node)
	}
}

// TestLeaseHidden: a device that somebody has whom no look at processes shows is not given back, nor lent: the kernel is
// asked. What the guest was let into is root's alone then; and it goes on when he is gone.
func TestLeaseHidden(t *testing.T) {
	pf := ports()[0]
	do(t, "vf", "create", pf, "1", "--driver", "vfio")
	t.Cleanup(func() { do(t, "vf", "destroy", pf) })
	vf := vfs(pf)[0]
	lend := []string{"assign", "tenant", "--from", vf, "--vlan", "7", "--node-owner", "65534"}
	for _, w := range hidings {
		t.Run(w.name, func(t *testing.T) {
			fresh := shown(t, pf, 0)
			do(t, lend...)
			had := shown(t, pf, 0)
			grant(t, groupNode(vf), 1000)
			free := w.hide(t, vf)
			if free == nil {
				t.Log("this kernel has no nodes of devices")
				do(t, "release", "tenant")
				return
			}
			node := groupNode(vf)

			r := status(t, 3, "release", "tenant", "--timeout", "3s")
			if now := shown(t, pf, 0); now != had {
				t.Errorf("its settings changed meanwhile: %s", now)
			}
			if !strings.Contains(r.stderr, "/proc does not show") {
				t.Errorf("it is no hiding place: %s", r.stderr)
			}
			if there(node) {
				private(t, node)
			}
			if l := leases(t)["tenant"]; len(l.Devices) != 1 {
				t.Errorf("its lease: %+v", l)
			}

			free()
			var got []struct{ Result string }
			decode(t, do(t, "release", "tenant", "--wait", "20s", "--json"), &got)
			if len(got) != 1 || got[0].Result != "clean" || bound(vf) != "vfio-pci" || shown(t, pf, 0) != fresh {
				t.Errorf("%+v, on %q, %s", got, bound(vf), shown(t, pf, 0))
			}
			private(t, groupNode(vf))

			// and as it was before anybody asks for it
			if free = w.hide(t, vf); strings.HasPrefix(w.name, "own node") {
				check(t, os.Chown("/dev/vfio/devices/"+names(devicesDir, vf, "vfio-dev")[0], 65534, 65534))
			}
			r = status(t, 3, append(lend, "--timeout", "3s")...)
			if now := shown(t, pf, 0); now != fresh {
				t.Errorf("what somebody has was set for the next: %s", now)
			}
			free()
			do(t, lend...)
			do(t, "release", "tenant")
		})
	}
}

func there(file string) bool {
	_, err := os.Stat(file)
	return err == nil
}

// TestLeaseOwner: neither a guest's user nor a list of others is left in a device that went into quarantine.
func TestLeaseOwner(t *testing.T) {
	pf := ports()[0]
	do(t, "vf", "create", pf, "1", "--driver", "vfio")
	t.Cleanup(func() { do(t, "vf", "destroy", pf) })
	vf := vfs(pf)[0]
	do(t, "assign", "tenant", "--from", vf, "--node-owner", "65534")
	node := groupNode(vf)
	grant(t, node, 1000)
	shell(t, "echo > "+filepath.Join(devicesDir, vf, "reset_method"))
	status(t, 1, "release", "tenant")
	private(t, node)
	shell(t, "chmod 660 "+node)
	if _, err := unix.Getxattr(node, "system.posix_acl_access", nil); err == nil {
		t.Errorf("the list works again")
	}
	shell(t, "chmod 600 "+node+"; echo default > "+filepath.Join(devicesDir, vf, "reset_method"))
	do(t, "release", "--quarantined", vf)
	private(t, node)
}

// TestKillsLease: assign and release are killed at each of their writes in turn, the command, the child that writes, or
// both, for two functions that are reset together and for a device whose group has a companion. What is left of it is
// released in the end, and then all of the group is as it was.
func TestKillsLease(t *testing.T) {
	pair := of("8086", "100e")
	every := 6
	if everyWrite() {
		every = 1
	}

	kills := 0
	for _, unit := range []struct {
		from    string
		options []string
	}{{pair[0], nil}, {"0000:00:1f.3", []string{"--no-reset"}}} {
		group := names(groupsDir, link(devicesDir, unit.from, "iommu_group"), "devices")
		state := func() string {
			var out []string
			for _, d := range group {
				out = append(out, d+" "+deviceState(d))
			}
			return strings.Join(out, ", ")
		}
		home := state()
		lend := append([]string{"assign", "tenant", "--from", unit.from}, unit.options...)
		for _, op := range []string{"assign", "release"} {
			for i, whom := range []string{"parent", "child", "both"} {
				for n := 1; ; n++ {
					if (n+i)%every != 0 {
						continue
					}
					command := lend
					if op == "release" {
						do(t, lend...)
						command = []string{"release", "tenant"}
					}
					killed, rest := killAt(t, n, whom, command...)
					said := rest()
					settle(t)
					if now := state(); now != home {
						t.Errorf("%s of %s killed at write %d of %s: %q, was %q\n%s", whom, unit.from, n, op, now, home,
							said)
					}
					if !killed {
						break
					}
					kills++
				}
			}
		}
	}

	t.Logf("%d kills", kills)
}

// settle releases whatever a lease is left of, as a person would that finds it.
func settle(t *testing.T) {
	t.Helper()
	do(t, "recover")
	if _, left := leases(t)["tenant"]; left {
		run(t, viaduct, "release", "tenant")
	}
	var books struct {
		Leases     []any
		Quarantine []struct{ Address string }
	}
	decode(t, do(t, "leases", "--json"), &books)
	var foul []string
	for _, q := range books.Quarantine {
		foul = append(foul, q.Address)
	}
	if len(foul) > 0 {
		do(t, append([]string{"release", "--quarantined"}, foul...)...)
	}
	if len(books.Leases) > 0 {
		t.Errorf("leases are left: %v", books.Leases)
	}
	if left, _ := filepath.Glob("/run/viaduct/change-*"); len(left) > 0 {
		t.Errorf("records are left: %v", left)
	}
}
