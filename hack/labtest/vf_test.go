//go:build lab

package labtest

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// The devices of hack/lab.d/hosts/zoo.
const (
	uplink = "0000:01:00.0" // igb, carries the default route
	spare  = "0000:02:00.0" // igb
	nvme   = "0000:09:00.0"
)

func netdev(t *testing.T, address string) string {
	t.Helper()
	n := names(devicesDir, address, "net")
	if len(n) != 1 {
		t.Fatalf("%s has network interfaces %v, want one", address, n)
	}
	return n[0]
}

// TestVFs is the life of VFs on a NIC: made for guests, taken, given back, removed; after each step the kernel's files
// are looked at.
func TestVFs(t *testing.T) {
	pf := netdev(t, spare)
	shell(t, "ip link set "+pf+" up; modprobe -r igbvf || true")
	autoprobe := attr(devicesDir, spare, "sriov_drivers_autoprobe")

	do(t, "vf", "create", pf, "7")
	all := vfs(spare)
	if len(all) != 7 || attr(devicesDir, spare, "sriov_numvfs") != "7" {
		t.Fatalf("VFs %v, sriov_numvfs %s; want 7", all, attr(devicesDir, spare, "sriov_numvfs"))
	}
	if now := attr(devicesDir, spare, "sriov_drivers_autoprobe"); now != autoprobe {
		t.Errorf("sriov_drivers_autoprobe is %s, was %s", now, autoprobe)
	}
	none := func(when string) {
		t.Helper()
		for _, vf := range all {
			if bound(vf) != "" || attr(devicesDir, vf, "driver_override") != "none" {
				t.Errorf("%s: %s is on %q with override %q, want no driver and none", when, vf, bound(vf),
					attr(devicesDir, vf, "driver_override"))
			}
		}
	}
	none("after create")
	shell(t, "modprobe igbvf; udevadm trigger --action=add; udevadm settle")
	if !slices.Contains(names("/sys/bus/pci/drivers"), "igbvf") {
		t.Fatal("igbvf did not load")
	}
	none("after the VFs' own driver was loaded")

	before := fingerprint()
	if out := do(t, "vf", "create", pf, "7"); !strings.Contains(out, "already") || fingerprint() != before {
		t.Errorf("creating what is there: %s", out)
	}

	do(t, "vf", "set", pf+"/vf3", "mac=52:54:00:aa:bb:03")
	if out := shell(t, "ip link show "+pf); !strings.Contains(out, "vf 3") ||
		!strings.Contains(out, "52:54:00:aa:bb:03") {
		t.Errorf("the MAC address of VF 3 is not as set:\n%s", out)
	}

	do(t, "bind", pf+"/vf3", all[5])
	for i, vf := range all {
		want := map[int]string{3: "vfio-pci", 5: "vfio-pci"}[i]
		if bound(vf) != want {
			t.Errorf("after bind: VF %d is on %q, want %q", i, bound(vf), want)
		}
	}
	group := link(devicesDir, all[3], "iommu_group")
	if _, err := os.Stat("/dev/vfio/" + group); err != nil {
		t.Errorf("no node for the group of a taken device: %v", err)
	}
	if got := do(t, "bind", pf+"/vf3"); !strings.Contains(got, "already") {
		t.Errorf("bind a second time: %s", got)
	}

	// Somebody has VF 3 open: nothing that would end it may happen.
	node, err := os.OpenFile("/dev/vfio/"+group, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	before = fingerprint()
	for _, args := range [][]string{{"vf", "destroy", pf}, {"vf", "create", pf, "3"}, {"unbind", pf + "/vf3"}} {
		r := run(t, viaduct, args...)
		if r.status != 3 || !strings.Contains(r.stderr, strconv.Itoa(os.Getpid())) || fingerprint() != before {
			t.Errorf("%v with a VF open in process %d: exit status %d, %s", args, os.Getpid(), r.status, r.stderr)
		}
	}
	node.Close()

	do(t, "unbind", pf+"/vf3")
	if bound(all[3]) != "" || attr(devicesDir, all[3], "driver_override") != "none" {
		t.Errorf("after unbind VF 3 is on %q with override %q; it had no driver and none before", bound(all[3]),
			attr(devicesDir, all[3], "driver_override"))
	}

	do(t, "vf", "create", pf, "2")
	if all = vfs(spare); len(all) != 2 {
		t.Errorf("from 7 to 2 VFs: %v", all)
	}
	none("after a change of the count")
	do(t, "vf", "destroy", pf)
	if left := vfs(spare); len(left) != 0 || attr(devicesDir, spare, "sriov_numvfs") != "0" {
		t.Errorf("after destroy: VFs %v", left)
	}
	if now := attr(devicesDir, spare, "sriov_drivers_autoprobe"); now != autoprobe {
		t.Errorf("in the end sriov_drivers_autoprobe is %s, was %s", now, autoprobe)
	}

	do(t, "vf", "create", spare, "2", "--driver", "home")
	shell(t, "udevadm settle")
	for _, vf := range vfs(spare) {
		if bound(vf) != "igbvf" {
			t.Errorf("--driver home: %s is on %q", vf, bound(vf))
		}
	}
	home := vfs(spare)[0]
	do(t, "bind", home)
	if bound(home) != "vfio-pci" {
		t.Errorf("taken from igbvf: on %q", bound(home))
	}
	do(t, "unbind", home)
	if bound(home) != "igbvf" || attr(devicesDir, home, "driver_override") != "(null)" ||
		len(names(devicesDir, home, "net")) != 1 {
		t.Errorf("given back to igbvf: on %q, override %q", bound(home), attr(devicesDir, home, "driver_override"))
	}
	do(t, "vf", "destroy", spare)

	do(t, "vf", "create", spare, "3", "--driver", "vfio")
	if got := byDriver("vfio-pci"); !slices.Equal(got, vfs(spare)) || len(got) != 3 {
		t.Errorf("--driver vfio: %v are on vfio-pci, want %v", got, vfs(spare))
	}
	do(t, "vf", "destroy", spare)
}

// TestNVMeVFs does the same on a PF that is no NIC.
func TestNVMeVFs(t *testing.T) {
	do(t, "vf", "create", nvme, "8")
	all := vfs(nvme)
	if len(all) != 8 {
		t.Fatalf("VFs %v, want 8", all)
	}

	for _, vf := range all {
		if bound(vf) != "" {
			t.Errorf("%s met driver %s", vf, bound(vf))
		}
	}

	secondary := shell(t, "nvme list-secondary /dev/"+names(devicesDir, nvme, "nvme")[0]+" -o json")
	var list struct {
		Controllers []struct {
			State int `json:"secondary-controller-state"`
			VF    int `json:"virtual-function-number"`
			VQ    int `json:"num-virtual-queues"`
			VI    int `json:"num-virtual-interrupts"`
		} `json:"secondary-controllers"`
	}

	decode(t, secondary, &list)
	ready := 0
	for _, c := range list.Controllers {
		if c.State == 1 && c.VF > 0 && c.VQ == 2 && c.VI == 1 {
			ready++
		}
	}

	if ready != 8 {
		t.Errorf("%d of 8 VFs are online with 2 queues and an interrupt: %s", ready, secondary)
	}

	do(t, "bind", nvme+"/vf0", nvme+"/vf7")
	if got := byDriver("vfio-pci"); !slices.Equal(got, []string{all[0], all[7]}) {
		t.Errorf("on vfio-pci: %v", got)
	}

	do(t, "unbind", nvme+"/vf0", nvme+"/vf7")
	if got := byDriver("vfio-pci"); len(got) != 0 {
		t.Errorf("left on vfio-pci: %v", got)
	}

	r := run(t, viaduct, "bind", nvme)
	if r.status != 3 || !strings.Contains(r.stderr, "8 VFs") || bound(nvme) != "nvme" {
		t.Errorf("bind of a PF with VFs: exit status %d, %s", r.status, r.stderr)
	}

	r = run(t, viaduct, "vf", "set", nvme+"/vf0", "mac=52:54:00:00:00:09")
	if r.status != 1 || !strings.Contains(r.stderr, "no network interface") {
		t.Errorf("a MAC address for an NVMe VF: exit status %d, %s", r.status, r.stderr)
	}

	do(t, "vf", "destroy", nvme)
	if len(vfs(nvme)) != 0 {
		t.Errorf("after destroy: %v", vfs(nvme))
	}

	do(t, "vf", "create", nvme, "4", "--driver", "home")
	for _, vf := range vfs(nvme) {
		if state := attr(devicesDir, vf, "nvme", strings.Join(names(devicesDir, vf, "nvme"), ""), "state"); bound(
			vf,
		) != "nvme" ||
			state != "live" {
			t.Errorf("%s for the host: on %q, %q", vf, bound(vf), state)
		}
	}

	do(t, "vf", "destroy", nvme)
}

// TestManyVFs makes as many VFs as a PF can have, on a vfio driver, and removes them.
func TestManyVFs(t *testing.T) {
	pf := shell(t,
		"for p in /sys/bus/pci/drivers/nvme/0000:*; do [ \"$(cat $p/sriov_totalvfs)\" != 127 ] || basename $p; done")
	do(t, "vf", "create", pf, "127", "--driver", "vfio")
	if n := len(byDriver("vfio-pci")); n != 127 || len(vfs(pf)) != 127 {
		t.Errorf("%d VFs, %d on vfio-pci, want 127", len(vfs(pf)), n)
	}
	do(t, "vf", "destroy", pf)
	if left, _ := filepath.Glob("/run/viaduct/*.json"); len(vfs(pf)) != 0 || len(left) != 0 {
		t.Errorf("after destroy: %d VFs, records %v", len(vfs(pf)), left)
	}
}

// TestVirtioVFs makes VFs of a virtio NIC and gives one to a QEMU, which opens it through VFIO.
func TestVirtioVFs(t *testing.T) {
	pf := shell(t,
		"for p in /sys/bus/pci/drivers/virtio-pci/0000:*; do [ ! -e $p/sriov_totalvfs ] || basename $p; done")
	do(t, "vf", "create", pf, "4", "--driver", "vfio")
	all := vfs(pf)
	if len(all) != 4 {
		t.Fatalf("%v, want 4 VFs", all)
	}
	for _, vf := range all {
		if driver := bound(vf); driver != "vfio-pci" && driver != "virtio_vfio_pci" {
			t.Errorf("%s is on %q", vf, driver)
		}
	}
	qemu := guest(t, "four", all...)
	if r := run(t, viaduct, "vf", "destroy", pf); r.status != 3 || !strings.Contains(r.stderr, "guest \"four\"") ||
		len(vfs(pf)) != 4 {
		t.Errorf("destroy while a guest has them: exit status %d, %s", r.status, r.stderr)
	}
	qemu.end()
	do(t, "vf", "destroy", pf)
	if n := len(vfs(pf)); n != 0 {
		t.Errorf("%d VFs are left", n)
	}
}

// TestUplink: the NIC that carries the default route gets VFs, and is not taken itself, also not through a bond, and
// not when the route is IPv6 or in another table.
func TestUplink(t *testing.T) {
	pf := netdev(t, uplink)
	shell(t, "ip link set "+pf+" up; ip addr add 10.0.2.15/24 dev "+pf+"; ip route add default via 10.0.2.2 dev "+pf)
	refuse := func(what string, args ...string) {
		t.Helper()
		before := fingerprint()
		r := run(t, viaduct, args...)
		if r.status != 3 || !strings.Contains(r.stderr, "default route") || fingerprint() != before {
			t.Errorf("%s: exit status %d, want 3 and nothing changed: %s", what, r.status, r.stderr)
		}
	}
	refuse("bind of the uplink", "bind", pf)
	refuse("bind of the uplink by address", "bind", uplink)
	refuse("one uplink refuses all", "bind", spare, uplink)
	do(t, "vf", "create", pf, "4")
	if got := vfs(uplink); len(got) != 4 {
		t.Errorf("VFs of the uplink: %v, want 4", got)
	}
	if route := shell(t, "ip route show default"); !strings.Contains(route, pf) {
		t.Errorf("the default route is gone: %q", route)
	}
	do(t, "vf", "destroy", pf)

	shell(t, "ip route del default; ip route add default via 10.0.2.2 dev "+pf+" table 77")
	refuse("default route in table 77", "bind", pf)
	shell(t, "ip route del default table 77; ip addr flush dev "+pf+"; ip -6 route add default dev "+pf)
	refuse("IPv6 default route", "bind", pf)
	shell(
		t,
		"ip -6 route del default dev "+pf+"; ip link set "+pf+
			" down; modprobe bonding max_bonds=0; ip link add b0 type bond; "+
			"ip link set "+pf+" master b0; ip link add link b0 name b0.7 type vlan id 7; ip link set b0 up; ip link set b0.7 up; "+
			"ip addr add 10.7.0.2/24 dev b0.7; ip route add default via 10.7.0.1 dev b0.7",
	)
	refuse("default route over a VLAN on a bond", "bind", pf)
	shell(t, "ip link del b0.7; ip link del b0")

	do(t, "bind", pf) // nothing holds it any more
	if bound(uplink) != "vfio-pci" {
		t.Errorf("the free NIC is on %q", bound(uplink))
	}
	do(t, "unbind", uplink)
	shell(t, "udevadm settle") // it is named anew
	if bound(uplink) != "igb" || netdev(t, uplink) != pf || attr(devicesDir, uplink, "driver_override") != "(null)" {
		t.Errorf("given back: on %q, override %q", bound(uplink), attr(devicesDir, uplink, "driver_override"))
	}
}

// TestDisk: a disk with a file system or swap in use is not taken.
func TestDisk(t *testing.T) {
	disk := shell(t, "ls /dev/nvme*n1")
	for _, use := range []struct{ what, begin, end, says string }{
		{"mounted", "mkfs.ext4 -q " + disk + "; mkdir -p /run/mnt; mount " + disk + " /run/mnt", "umount /run/mnt",
			"mounted on /run/mnt"},
		{"mounted partition", "echo ';' | sfdisk -q " + disk + "; udevadm settle; mkfs.ext4 -qF " + disk +
			"p1; mount " + disk + "p1 /run/mnt", "umount /run/mnt; wipefs -qa " + disk, "mounted on /run/mnt"},
		{"swap", "udevadm settle; mkswap -q -f " + disk + "; swapon " + disk, "swapoff " + disk, "swap"},
	} {
		shell(t, use.begin)
		before := fingerprint()
		r := run(t, viaduct, "bind", nvme)
		if r.status != 3 || !strings.Contains(r.stderr, use.says) || fingerprint() != before {
			t.Errorf("bind of a disk, %s: exit status %d, %s", use.what, r.status, r.stderr)
		}
		shell(t, use.end)
	}
	root := filepath.Base(shell(t, "readlink -f /sys/class/block/vda/device/.."))
	before := fingerprint()
	if r := run(t, viaduct, "bind", root); r.status != 3 || !strings.Contains(r.stderr, "mounted on /") ||
		fingerprint() != before {
		t.Errorf("bind of the disk the host runs on: exit status %d, %s", r.status, r.stderr)
	}
	do(t, "bind", nvme)
	do(t, "unbind", nvme)
	if bound(nvme) != "nvme" {
		t.Errorf("given back: on %q", bound(nvme))
	}
}

// TestUnit: what shares a group is taken and given back together; bridges stay.
func TestUnit(t *testing.T) {
	const e1000, edu = "0000:07:01.0", "0000:07:02.0"
	bridge := filepath.Base(filepath.Dir(shell(t, "readlink -f "+devicesDir+"/"+e1000)))
	dry := do(t, "bind", edu, "--dry-run", "--steps")
	if bound(edu) != "" || bound(e1000) != "e1000" || !strings.Contains(dry, "/sys/bus/pci/drivers/e1000/unbind") {
		t.Errorf("a dry run: %s is on %q, %s on %q\n%s", edu, bound(edu), e1000, bound(e1000), dry)
	}
	was := bound(bridge)
	do(t, "bind", edu)
	if bound(edu) != "vfio-pci" || bound(e1000) != "vfio-pci" || bound(bridge) != was {
		t.Errorf("bind: %q, %q, bridge on %q (was %q)", bound(edu), bound(e1000), bound(bridge), was)
	}
	do(t, "unbind", "group="+link(devicesDir, edu, "iommu_group"))
	if bound(edu) != "" || bound(e1000) != "e1000" || attr(devicesDir, e1000, "driver_override") != "(null)" ||
		attr(devicesDir, edu, "driver_override") != "(null)" {
		t.Errorf("unbind: %q, %q", bound(edu), bound(e1000))
	}
	if r := run(t, viaduct, "bind", bridge); r.status != 3 || !strings.Contains(r.stderr, "bridge") {
		t.Errorf("bind of a bridge: exit status %d, %s", r.status, r.stderr)
	}
}
