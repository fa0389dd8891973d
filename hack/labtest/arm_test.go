//go:build lab

package labtest

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// byID are the n devices with these ids, in order.
func byID(t *testing.T, n int, vendor, device string) []string {
	t.Helper()
	out := of(vendor, device)
	if len(out) != n {
		t.Fatalf("devices with the ids %s:%s are %v, want %d", vendor, device, out, n)
	}
	return out
}

// driver loads the driver of a PF, which must have it then.
func driver(t *testing.T, pf, module string) {
	t.Helper()
	if r := run(t, "modprobe", module); r.status != 0 {
		t.Fatalf("modprobe %s: exit status %d, %s", module, r.status, r.stderr)
	}
	for range 100 {
		if bound(pf) == module {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Fatalf("%s is on %q, want %s", pf, bound(pf), module)
}

// unit checks what list says of the IOMMU, and whether it keeps interrupts apart.
func unit(t *testing.T, isolated bool) {
	t.Helper()
	var got struct {
		IOMMU struct {
			Units              []struct{ Name, Kind string }
			InterruptRemapping *bool `json:"interrupt_remapping"`
		}
	}
	decode(t, do(t, "list", "--json"), &got)
	units := names("/sys/class/iommu")
	if len(units) != 1 || len(got.IOMMU.Units) != 1 || got.IOMMU.Units[0].Name != units[0] ||
		got.IOMMU.Units[0].Kind != os.Getenv("LAB_IOMMU") {
		t.Errorf("units %v, want %v of kind %s", got.IOMMU.Units, units, os.Getenv("LAB_IOMMU"))
	}
	if r := got.IOMMU.InterruptRemapping; r == nil || *r != isolated {
		t.Errorf("interrupts are kept apart: %v, want %v", r, isolated)
	}
}

// taken checks by the kernel's files that a device is on vfio-pci, alone in a group, and has its nodes.
func taken(t *testing.T, address string) (group string) {
	t.Helper()
	group = link(devicesDir, address, "iommu_group")
	if bound(address) != "vfio-pci" || group == "" {
		t.Fatalf("%s is on %q in group %q, want vfio-pci and a group", address, bound(address), group)
	}
	if got := names(groupsDir, group, "devices"); !slices.Equal(got, []string{address}) {
		t.Errorf("%s: its group %s has %v", address, group, got)
	}
	nodes := []string{"/dev/vfio/" + group}
	for _, n := range names(devicesDir, address, "vfio-dev") {
		nodes = append(nodes, "/dev/vfio/devices/"+n)
	}
	for _, n := range nodes {
		if info, err := os.Stat(n); err != nil || info.Mode()&os.ModeCharDevice == 0 {
			t.Errorf("%s: node %s: %v", address, n, err)
		}
	}
	if len(nodes) != 2 {
		t.Errorf("%s has the nodes %v, want its group's and its own", address, nodes)
	}
	return group
}

// open binds a device that is on vfio-pci to an iommufd, as who runs a guest does. The kernel does so only where it keeps
// the device's interrupts apart.
func open(t *testing.T, address string) error {
	t.Helper()
	iommufd, err := os.OpenFile("/dev/iommu", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer iommufd.Close()
	cdev, err := os.OpenFile(filepath.Join("/dev/vfio/devices", names(devicesDir, address, "vfio-dev")[0]),
		os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer cdev.Close()
	const bindIOMMUFD = ';'<<8 | 118 // VFIO_DEVICE_BIND_IOMMUFD of linux/vfio.h
	arg := struct{ argsz, flags, iommufd, devid uint32 }{argsz: 16, iommufd: uint32(iommufd.Fd())}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, cdev.Fd(), bindIOMMUFD, uintptr(unsafe.Pointer(&arg)))
	if errno != 0 {
		return errno
	}
	return nil
}

// fresh checks that a device is in no group, as the kernel leaves those there that never had a driver.
func fresh(t *testing.T, address string) {
	t.Helper()
	if d, g := bound(address), link(devicesDir, address, "iommu_group"); d != "" || g != "" {
		t.Fatalf("%s is on %q in group %q, want neither", address, d, g)
	}
	var got struct{ Ungrouped []struct{ Address string } }
	decode(t, do(t, "list", "--json"), &got)
	for _, d := range got.Ungrouped {
		if d.Address == address {
			return
		}
	}
	t.Errorf("list does not show %s among the devices without a group: %v", address, got.Ungrouped)
}

// life takes a device without a driver, has it open, gives it back, and does so again: the group that the kernel made for
// it when it was first taken, if it had none, stays.
func life(t *testing.T, address string) {
	t.Helper()
	override, group := attr(devicesDir, address, "driver_override"), link(devicesDir, address, "iommu_group")
	for range 2 {
		do(t, "bind", address)
		g := taken(t, address)
		if group != "" && g != group {
			t.Errorf("%s: taken again it is in group %s, was in %s", address, g, group)
		}
		group = g
		if r := run(t, viaduct, "verify", address); r.status != 0 {
			t.Errorf("%s is not opened: %s%s", address, r.stdout, r.stderr)
		}
		do(t, "unbind", address)
		if now := attr(devicesDir, address, "driver_override"); bound(address) != "" || now != override ||
			link(devicesDir, address, "iommu_group") != group {
			t.Errorf("%s given back: on %q with override %q in group %q, want no driver, %q and %s", address,
				bound(address), now, link(devicesDir, address, "iommu_group"), override, group)
		}
	}
}

// TestArm64 takes and gives back devices on a host whose kernel makes a device's group only when it gets its first
// driver: such as nothing has a driver for, and VFs that were made for guests.
func TestArm64(t *testing.T) {
	if _, err := os.Stat(viaduct); err != nil {
		t.Skipf("this is no host of the lab: %v", err)
	}

	unit(t, true)
	for i, address := range byID(t, 2, "1234", "11e8") {
		t.Run("edu"+[]string{" on the root bus", " behind a port"}[i], func(t *testing.T) {
			fresh(t, address)
			life(t, address)
		})
	}

	for _, ids := range [][3]string{{"igb", "8086", "10c9"}, {"nvme", "1b36", "0010"}} {
		module, pf := ids[0], byID(t, 1, ids[1], ids[2])[0]
		t.Run("VFs of "+module, func(t *testing.T) {
			fresh(t, pf)
			driver(t, pf, module)
			do(t, "vf", "create", pf, "2")
			all := vfs(pf)
			if len(all) != 2 {
				t.Fatalf("VFs %v, want 2", all)
			}
			for _, vf := range all {
				// nvme is the VFs' driver too: that it may not have them the kernel finds only after it made their groups.
				if module == "igb" {
					fresh(t, vf)
				}
				life(t, vf)
			}
			do(t, "bind", all[0], all[1])
			if a, b := taken(t, all[0]), taken(t, all[1]); a == b || a == link(devicesDir, pf, "iommu_group") {
				t.Errorf("the VFs are in groups %s and %s, the PF in %s", a, b, link(devicesDir, pf, "iommu_group"))
			}
			do(t, "unbind", all[0], all[1])
			do(t, "vf", "destroy", pf)
			if len(vfs(pf)) != 0 || bound(pf) != module {
				t.Errorf("after destroy: VFs %v, the PF is on %q", vfs(pf), bound(pf))
			}
		})
	}
}

// TestNotIsolated: where nothing keeps interrupts apart a device is taken, and whoever takes it is told that the kernel
// will not let it be opened.
func TestNotIsolated(t *testing.T) {
	unit(t, false)
	pf := byID(t, 1, "8086", "10c9")[0]
	driver(t, pf, "igb")
	do(t, "vf", "create", pf, "1")
	vf := vfs(pf)[0]
	fresh(t, vf)
	r := run(t, viaduct, "bind", vf)
	if said := r.stdout + r.stderr; r.status != 0 || !strings.Contains(said, "interrupts of devices are not isolated") {
		t.Errorf("bind: exit status %d, %s", r.status, said)
	}
	taken(t, vf)
	if err := open(t, vf); !errors.Is(err, unix.EPERM) {
		t.Errorf("it is opened: %v, want %v", err, unix.EPERM)
	}
	do(t, "unbind", vf)

	// Who runs the host may say that its guests are trusted: then a device that never had a driver is opened, and given
	// back.
	for _, module := range []string{"iommufd", "vfio_iommu_type1"} {
		shell(t, "modprobe "+module+"; echo 1 > /sys/module/"+module+"/parameters/allow_unsafe_interrupts")
	}
	life(t, vf)
	for _, address := range of("1234", "11e8") {
		life(t, address)
	}
	do(t, "vf", "destroy", pf)
}
