package declared

import (
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"viaduct/cmd/internal/hostfile"
	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/bind"
)

const (
	pf    = "0000:01:00.0"
	pfDir = "sys/bus/pci/devices/" + pf
)

// newManager is a manager on a kernel's host as it is now.
func newManager(t *testing.T, k *hosttest.Kernel, o Options) *Manager {
	t.Helper()
	s, err := sriov.Open(&iommu.Host{Host: k.Host()}, bind.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	m, err := New(s, o)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// again is the same manager on the host as it is now.
func again(t *testing.T, m *Manager) *Manager {
	t.Helper()
	n := *m
	var err error
	if n.topology, err = m.handle.Scan(); err != nil {
		t.Fatal(err)
	}
	return &n
}

func parse(t *testing.T, text string) *hostfile.Host {
	t.Helper()
	s, err := hostfile.Parse("host.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func plan(t *testing.T, m *Manager, text string) []*Item {
	t.Helper()
	items, err := m.Plan(parse(t, text))
	if err != nil {
		t.Fatal(err)
	}
	return items
}

func apply(t *testing.T, m *Manager, text string) error {
	t.Helper()
	items := plan(t, m, text)
	for _, i := range items {
		if i.Err != nil {
			t.Fatal(i.Err)
		}
		if err := m.handle.Lock(context.Background(), i.Devices()); err != nil {
			t.Fatal(err)
		}
	}
	m.Check(items)
	for _, i := range items {
		if i.State == Refused {
			return i.Err
		}
	}
	err := m.Apply(context.Background(), items, func(*Item, error) {})
	return errors.Join(err, m.Remember(items))
}

// state is how many VFs there are, and their drivers and overrides.
func state(t *testing.T, k *hosttest.Kernel) string {
	t.Helper()
	var out []string
	a, _ := iommu.ParseAddress(pf)
	h := &iommu.Host{Host: k.Host()}
	d, err := iommu.ReadDevice(h, a)
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range d.SRIOV.VFs {
		vf, err := iommu.ReadDevice(h, v.Address)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, vf.Driver+"/"+vf.DriverOverride)
	}
	return strings.Join(out, " ")
}

const mixed = "pfs:\n  - select: " + pf +
	"\n    count: 3\n    vfs:\n      - {range: 0, driver: vfio}\n      - {range: 1, driver: home}\n"

func TestApply(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	m := newManager(t, k, Options{})
	if err := apply(t, m, mixed); err != nil {
		t.Fatal(err)
	}
	const want = "vfio-pci/vfio-pci igbvf/ /none"
	if got := state(t, k); got != want {
		t.Fatalf("%s, want %s", got, want)
	}
	k.Log = nil
	m = again(t, m)
	if err := apply(t, m, mixed); err != nil || len(k.Log) != 0 {
		t.Errorf("again: %v, wrote %q", err, k.Log)
	}
	other := strings.ReplaceAll(
		strings.ReplaceAll(strings.ReplaceAll(mixed, "driver: vfio", "driver: x"), "driver: home", "driver: vfio"),
		"driver: x",
		"driver: home",
	)
	m = again(t, m)
	if err := apply(t, m, other); err != nil {
		t.Fatal(err)
	}
	if got := state(t, k); got != "igbvf/ vfio-pci/vfio-pci /none" {
		t.Errorf("with the drivers changed: %s", got)
	}
	m = again(t, m)
	if err := m.Undo(func(iommu.Address, error) {}); err != nil {
		t.Fatal(err)
	}
	if got := state(t, k); got != want {
		t.Errorf("after undo: %s, want %s", got, want)
	}
	if _, known, err := m.Last(); known || err != nil {
		t.Errorf("there is more to undo: %v", err)
	}

	// What a boot or the watch service does is not undone, and neither is what an apply found that had nothing to do.
	m = again(t, m)
	m.options.Boot = true
	if err := apply(t, m, other); err != nil {
		t.Fatal(err)
	}
	if _, known, err := m.Last(); known || err != nil {
		t.Errorf("a boot is to be undone: %v", err)
	}
	m.options.Boot = false
	for _, step := range []struct {
		text string
		undo bool
	}{{mixed, true}, {mixed, false}} {
		m = again(t, m)
		if err := apply(t, m, step.text); err != nil {
			t.Fatal(err)
		}
		if _, known, err := m.Last(); known != step.undo || err != nil {
			t.Errorf("there is something to undo: %v (%v), want %v", known, err, step.undo)
		}
	}
}

// A guest's VF is left with what it has by an undo of what was applied before or while the guest had it.
func TestLeasedUndo(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	m := newManager(t, k, Options{})
	if err := apply(t, m, mixed); err != nil {
		t.Fatal(err)
	}
	m = again(t, m)
	vf := m.topology.VFs(found(t, m))[2]
	own := sriov.Settings{sriov.VLAN: "100"}
	m.options.Leased = func() (map[iommu.Address]Guest, error) {
		return map[iommu.Address]Guest{vf.Address: {Settings: own}}, nil
	}
	m.exact = true
	item := plan(t, m, mixed+"      - {range: 2, vlan: 7, trust: on}\n")[0]
	if len(item.take) != 1 || item.take[bind.Auto][0].Name != vf.Name {
		t.Errorf("the guest's VF is to be taken, and nothing else: %v", item.take)
	}
	leased, _ := m.Guests()
	wish, _ := m.wish(&parse(t, mixed+"      - {range: 2, vlan: 7, trust: on}\n").PFs[0], found(t, m), false, leased)
	if got := wish.VFs[2].Settings; !maps.Equal(got, own) {
		t.Errorf("an undo gives the guest's VF %v, want %v", got, own)
	}
	m.exact = false
	wish, _ = m.wish(&parse(t, mixed+"      - {range: 2, vlan: 7, trust: on}\n").PFs[0], found(t, m), false, leased)
	if got := wish.VFs[2].Settings; got[sriov.VLAN] != "100" || got[sriov.Trust] != "on" {
		t.Errorf("an apply gives the guest's VF %v", got)
	}
}

func found(t *testing.T, m *Manager) *iommu.Device {
	t.Helper()
	d, err := m.topology.Find(mustParse(t, pf))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// What fails in the middle is put back as it was, VFs that had to go included.
func TestApplyFails(t *testing.T) {
	for _, fails := range []string{"vfio-pci", "override of VF 3"} {
		k := hosttest.NewLab(t, nil)
		m := newManager(t, k, Options{})
		if err := apply(t, m, strings.ReplaceAll(mixed, "driver: vfio", "driver: none")); err != nil {
			t.Fatal(err)
		}
		was := state(t, k)
		if fails == "vfio-pci" {
			k.Probe["vfio-pci"] = unix.EINVAL
		} else {
			k.Fail[pfDir+"/virtfn3/driver_override"] = unix.EACCES
		}
		m = again(t, m)
		err := apply(t, m, "pfs:\n  - select: "+pf+"\n    count: 4\n    vfs:\n      - {driver: vfio}\n")
		if err == nil {
			t.Fatalf("%s: it went through: %s", fails, state(t, k))
		}
		if got := state(t, k); got != was {
			t.Errorf("%s: %s, was %s: %v", fails, got, was, err)
		}
		if keys, _ := m.run.Keys(applying); len(keys) > 0 {
			t.Errorf("%s: records %q", fails, keys)
		}
	}
}

// Whatever write an apply is killed at, the next command brings the PF back.
func TestRecover(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	m := newManager(t, k, Options{})
	if err := apply(t, m, mixed); err != nil {
		t.Fatal(err)
	}
	was := state(t, k)
	items := plan(t, again(t, m), strings.ReplaceAll(mixed, "count: 3", "count: 5"))
	before, err := again(t, m).before(items[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(m.run.Put(applying+pf, before), k.Write(pfDir+"/sriov_numvfs",
		"0")); err != nil { // as far as that it came
		t.Fatal(err)
	}
	out, err := again(t, m).Recover()
	if err != nil || len(out) != 1 || out[0].Err != nil {
		t.Fatalf("%v, %v", out, err)
	}
	if got := state(t, k); got != was {
		t.Errorf("%s, was %s", got, was)
	}
	if interrupted, err := m.Interrupted(); interrupted || err != nil {
		t.Error("the record is left")
	}
}

func TestPlanStates(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	m := newManager(t, k, Options{})
	one := func(text string) *Item {
		t.Helper()
		return plan(t, again(t, m), text)[0]
	}
	for _, c := range []struct {
		text  string
		state State
		says  string
	}{
		{"pfs:\n  - {select: " + pf + ", count: 0}\n", OK, ""},
		{"pfs:\n  - {select: " + pf + ", count: 2}\n", Differs, ""},
		{"pfs:\n  - {select: \"0000:7f:00.0\", count: 2}\n", Missing, "no such device"},
		{"pfs:\n  - {select: \"mac=52:54:00:ff:ff:ff\", count: 2}\n", Missing, "no device has this permanent MAC"},
		{"pfs:\n  - {select: \"8086:10c9\", count: 2}\n", Refused, "matches 2 devices"},
		{"pfs:\n  - {select: " + pf + ", count: 99}\n", Refused, "0 to 7 VFs"},
		{"pfs:\n  - {select: " + pf + ", count: 2}\nprotect:\n  - 8086:10c9\n", Refused, "in protect"},
		{"devices:\n  - {select: " + pf + "}\nprotect:\n  - " + pf + "\n", Refused, "in protect"},
		{"devices:\n  - {select: " + pf + "}\n", Differs, ""},
	} {
		i := one(c.text)
		if i.State != c.state || c.says != "" && (i.Err == nil || !strings.Contains(i.Err.Error(), c.says)) {
			t.Errorf("%s: %s, %v, want %s and %q", c.text, i.State, i.Err, c.state, c.says)
		}
		if (i.State == Differs) != (len(i.Steps) > 0) {
			t.Errorf("%s: %s with steps %q", c.text, i.State, i.Steps)
		}
	}
	if i := one("pfs:\n  - {select: " + pf + ", count: 0}\n"); len(i.Notes) != 1 ||
		!strings.Contains(i.Notes[0], "another device at the next boot") {
		t.Errorf("a bare address: %q", i.Notes)
	}

	// A boot takes no NIC of which nothing is known, and none that carried the host.
	m.options.Boot = true
	if i := one("devices:\n  - {select: " + pf + "}\n"); i.State != Refused ||
		!strings.Contains(i.Err.Error(), "does not know which NICs") {
		t.Errorf("a boot without a record: %s, %v", i.State, i.Err)
	}
	d, err := m.topology.Find(mustParse(t, pf))
	if err != nil {
		t.Fatal(err)
	}
	if err := m.state.Put(protectedKey, []protected{{d.Address, identify(t, m, d),
		"carries the default route"}}); err != nil {
		t.Fatal(err)
	}
	if i := one("devices:\n  - {select: " + pf + "}\n"); i.State != Refused ||
		!strings.Contains(i.Err.Error(), "carries the default route") {
		t.Errorf("a boot, and a device that carried the host: %s, %v", i.State, i.Err)
	}
	if i := one("pfs:\n  - {select: " + pf + ", count: 2}\n"); i.State != Differs {
		t.Errorf("VFs of a PF that carried the host: %s, %v", i.State, i.Err)
	}
	// What must never be touched may be named by what it does not have before its driver.
	if err := m.state.Put(protectedKey, []protected{}); err != nil {
		t.Fatal(err)
	}
	mine := found(t, m)
	driver := mine.Driver
	mine.Driver = ""
	for _, protect := range []string{"mac=52:54:00:99:99:99", pf} {
		if i := plan(t, m, "devices:\n  - {select: path="+place(t, m,
			mine)+"}\nprotect:\n  - "+protect+"\n")[0]; i.State != Refused {
			t.Errorf("a NIC without a driver, with %s protected, is %s: %v", protect, i.State, i.Err)
		}
	}
	mine.Driver = driver
	m.options.Boot = false
	if err := m.state.Delete(protectedKey); err != nil {
		t.Fatal(err)
	}

	// The initramfs cannot ask what a device is for.
	early := parse(t, "devices:\n  - {select: path="+place(t, m, mine)+", initramfs: true}\nprotect:\n  - "+pf+"\n")
	override := mine.DriverOverride
	for _, mine.Driver = range []string{"vfio-pci", driver} { // taken already, or not
		mine.DriverOverride = mine.Driver
		if got, err := m.Initramfs(early); err == nil || !strings.Contains(err.Error(), "in protect") {
			t.Errorf("what is protected, and on %s, is kept from its driver by the initramfs: %v, %v", mine.Driver, got,
				err)
		}
	}
	mine.DriverOverride = override
	early.Protect = nil
	if got, err := m.Initramfs(early); err == nil || !strings.Contains(err.Error(), "does not know which NICs") {
		t.Errorf("a NIC is kept from its driver by the initramfs: %v, %v", got, err)
	}
	if err := m.state.Put(protectedKey, []protected{}); err != nil {
		t.Fatal(err)
	}
	if got, err := m.Initramfs(early); err != nil || len(got) != 1 {
		t.Errorf("%v, %v", got, err)
	}

	// A card in another slot is the same if it is found by a number of its own, also when nobody knew that number the
	// last time; and its number is known by whatever name udev has given its interface meanwhile.
	id := identify(t, m, mine)
	mac := slices.Collect(maps.Values(id.MACs))[0]
	mine.Netdevs = []string{"eth0"}
	if again := identify(t, m, mine); !reflect.DeepEqual(again, id) {
		t.Errorf("after its interface was named it is %v, was %v", again, id)
	}
	byMAC := "pfs:\n  - {select: mac=" + mac + ", count: 2}\n"
	if err := m.state.Put(knownKey("mac="+mac), known{Identity: iommu.Identity{ID: mine.ID,
		Path: "0000:00:1f.0/00.0"}}); err != nil {
		t.Fatal(err)
	}
	if i := one(byMAC); i.State != Differs {
		t.Errorf("a card in another slot, found by its MAC address, is %s: %v", i.State, i.Err)
	}

	// Another card at the address that was declared.
	if err := m.Remember(plan(t, again(t, m), "pfs:\n  - {select: "+pf+", count: 0}\n")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(k.Dir(), pfDir, "modalias"),
		[]byte("pci:v000015B3d00001017sv000015B3sd00000020bc02sc00i00\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if i := one("pfs:\n  - {select: " + pf + ", count: 2}\n"); i.State != Changed ||
		!strings.Contains(i.Err.Error(), "15b3:1017") {
		t.Errorf("another card in the slot: %s, %v", i.State, i.Err)
	}
	m.options.Accept = true
	if i := one("pfs:\n  - {select: " + pf + ", count: 2}\n"); i.State != Differs {
		t.Errorf("accepted: %s, %v", i.State, i.Err)
	}
}

func place(t *testing.T, m *Manager, d *iommu.Device) string {
	t.Helper()
	p, err := iommu.PathOf(m.host, d)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func mustParse(t *testing.T, s string) iommu.Address {
	t.Helper()
	a, err := iommu.ParseAddress(s)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// VFs of PFs that others bond are made early and get their drivers late. (Unproven on hardware: no emulated NIC has
// switchdev.)
func TestAfterBond(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	k.Net.Eswitch = map[string][3]int{pf: {}}
	m := newManager(t, k, Options{})
	text := "pfs:\n  - select: " + pf +
		"\n    count: 2\n    eswitch: switchdev\n    after_bond: true\n    vfs:\n      - {range: 0, driver: vfio}\n      - {range: 1, driver: home}\n"
	early := plan(t, m, text)[0]
	if got, want := strings.Join(bind.Commands(early.Steps), "\n"), strings.ReplaceAll(`ip link set dev enp1s0 addrgenmode none
ip link set dev enp1s0 up
ip link set dev enp1s0 addrgenmode eui64
echo 0 > /DIR/sriov_drivers_autoprobe
echo 2 > /DIR/sriov_numvfs
devlink dev eswitch set pci/`+pf+` mode switchdev
echo none > /DIR/virtfn0/driver_override
echo none > /DIR/virtfn1/driver_override
echo 1 > /DIR/sriov_drivers_autoprobe`, "DIR", pfDir); got != want || !early.Waits {
		t.Errorf("early, waits %v:\n%s\nwant\n%s", early.Waits, got, want)
	}

	if err := apply(t, m, text); err != nil {
		t.Fatal(err)
	}
	if k.Net.Eswitch[pf][0] != 1 {
		t.Errorf("the e-switch is %v", k.Net.Eswitch[pf])
	}

	m = again(t, m)
	if i := plan(t, m, text)[0]; i.State != OK {
		t.Errorf("early, when it is done: %s %q", i.State, i.Steps)
	}

	m.options.Late = true
	late := plan(t, m, text)[0]
	if got, want := strings.Join(bind.Commands(late.Steps), "\n"), `echo vfio-pci > /sys/bus/pci/devices/0000:01:10.0/driver_override
echo 0000:01:10.0 > /sys/bus/pci/drivers_probe
echo > /sys/bus/pci/devices/0000:01:10.2/driver_override
echo 0000:01:10.2 > /sys/bus/pci/drivers_probe`; got != want || late.Waits {
		t.Errorf("late:\n%s\nwant\n%s", got, want)
	}
}

// A plan against what was adopted is empty, and names devices by what stays with them.
func TestAdopt(t *testing.T) {
	// One that is down would be brought up.
	const up = "sys/devices/pci0000:00/0000:00:06.0/0000:02:00.0/net/enp2s0/flags"
	k := hosttest.NewLab(t, hosttest.Tree{up: "0x1003\n"})
	m := newManager(t, k, Options{})
	s, comments, err := m.Adopt()
	if err != nil {
		t.Fatal(err)
	}
	text, err := s.YAML(comments)
	if err != nil {
		t.Fatal(err)
	}
	if len(s.PFs) != 1 || s.PFs[0].Count != 3 || len(s.PFs[0].VFs) != 3 ||
		strings.Contains(string(text), "select: \""+pf) {
		t.Errorf("%s", text)
	}
	for _, i := range plan(t, again(t, m), string(text)) {
		if i.State != OK {
			t.Errorf("%s: %s %v %q\n%s", i.Name, i.State, i.Err, i.Steps, text)
		}
	}
}

// What the host's own files name is needed, mounted or not.
func TestNeeded(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	for name, content := range map[string]string{
		"etc/fstab":     "# /dev/sdz1 /old ext4\nUUID=1-2 / ext4\n/dev/mapper/vg-data /srv ext4 noauto\nLABEL=\"a/b\" none swap\ntmpfs /tmp tmpfs\n",
		"etc/crypttab":  "secret /dev/sdc3 none luks\n",
		"proc/cmdline":  "quiet root=/dev/cciss/c0d0p1 resume=PARTUUID=9 ip=::::host:enp9s0:dhcp BOOTIF=01-52-54-00-AA-BB-CC\n",
		"dev/.unneeded": "",
	} {
		if err := errors.Join(os.MkdirAll(filepath.Join(k.Dir(), filepath.Dir(name)), 0o755),
			os.WriteFile(filepath.Join(k.Dir(), name), []byte(content), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	for link, target := range map[string]string{
		"disk/by-uuid/1-2": "../../sda1", "mapper/vg-data": "../dm-3", `disk/by-label/a\x2fb`: "../../sdb2",
		"disk/by-partuuid/9": "../../nvme0n1p2",
	} {
		file := filepath.Join(k.Dir(), "dev", link)
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.Symlink(target, file)); err != nil {
			t.Fatal(err)
		}
	}
	n := needed(&iommu.Host{Host: k.Host()})
	for _, disk := range []string{"sda1", "dm-3", "sdb2", "sdc3", "cciss!c0d0p1", "nvme0n1p2"} {
		if n.disks[disk] == "" {
			t.Errorf("%s is not needed: %v", disk, n.disks)
		}
	}
	if len(n.disks) != 6 || n.links["enp9s0"] == "" || n.links["52:54:00:aa:bb:cc"] == "" {
		t.Errorf("%v, %v", n.disks, n.links)
	}
}

func TestImport(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	for name, content := range map[string]string{
		"etc/driverctl.d/pci-0000:01:00.0":  "vfio-pci\n",
		"etc/driverctl.d/pci-0000:7f:00.0":  "vfio-pci\n",
		"etc/driverctl.d/pci-0000:03:00.0":  "uio_pci_generic\n",
		"etc/netplan/10-a.yaml":             "network:\n  ethernets:\n    enp9s0:\n      virtual-function-count: 4\n      embedded-switch-mode: switchdev\n      delay-virtual-functions-rebind: true\n    enp8s0: {match: {macaddress: 52:54:00:aa:00:01}}\n    vf1: {link: enp8s0}\n    vf2: {link: enp8s0}\n    plain: {dhcp4: true}\n  vlans:\n    v: {id: 5, link: vf1, renderer: sriov}\n",
		"etc/systemd/network/10-x.link":     "[Match]\nPermanentMACAddress=52:54:00:AA:00:02\n[Link]\nSR-IOVVirtualFunctions=3\n[SR-IOV]\nVirtualFunction=0\nVLANId=7\nTrust=yes\nLinkState=auto\nMACAddress=52:54:00:bb:00:00\n",
		"etc/systemd/network/20-x.network":  "# c\n[Match]\nPermanentMACAddress=52:54:00:aa:00:02\n[SR-IOV]\nVirtualFunction=1\nMACSpoofCheck=no\nFuture=1\n",
		"usr/lib/systemd/network/10-x.link": "[Match]\nName=hidden\n[Link]\nSR-IOVVirtualFunctions=9\n",
		"usr/lib/systemd/network/99-d.link": "[Match]\nOriginalName=*\n[Link]\nNamePolicy=keep\n",
	} {
		file := filepath.Join(k.Dir(), name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755),
			os.WriteFile(file, []byte(content), 0o600)); err != nil {
			t.Fatal(err)
		}
	}

	m := newManager(t, k, Options{})
	d, err := m.topology.Find(mustParse(t, pf))
	if err != nil {
		t.Fatal(err)
	}

	first, err := m.stable(d)
	if err != nil {
		t.Fatal(err)
	}

	for source, want := range map[string]struct{ text, note string }{
		"driverctl": {"devices:\n  - select: \"" + first.String() +
			"\"\n    driver: vfio-pci\n  - select: \"0000:7f:00.0\"\n    driver: vfio-pci\n", "uio_pci_generic"},
		"netplan": {"pfs:\n  - select: \"mac=52:54:00:aa:00:01\"\n    count: 2\n    vfs:\n      - driver: home\n" +
			"  - select: enp9s0\n    count: 4\n    eswitch: switchdev\n    after_bond: true\n    vfs:\n      - driver: home\n", "VLAN v"},
		"systemd": {"pfs:\n  - select: \"mac=52:54:00:aa:00:02\"\n    count: 3\n    vfs:\n      - range: 0\n        driver: home\n        mac: \"52:54:00:bb:00:00\"\n        vlan: 7\n        trust: on\n        link: auto\n" +
			"      - range: 1\n        driver: home\n        spoofchk: off\n      - range: 2\n        driver: home\n",
			"Future="},
	} {
		s, notes, err := m.Import(source)
		if err != nil {
			t.Errorf("%s: %v", source, err)
			continue
		}
		text, err := s.YAML(nil)
		if err != nil || string(text) != want.text || !strings.Contains(strings.Join(notes, "\n"), want.note) {
			t.Errorf("%s: %v\n%s\nwant\n%s\nnotes %q", source, err, text, want.text, notes)
		}
		if _, err := hostfile.Parse("imported", text); err != nil {
			t.Errorf("%s: %v", source, err)
		}
	}
}

func identify(t *testing.T, m *Manager, d *iommu.Device) iommu.Identity {
	t.Helper()
	id, err := iommu.Identify(m.host, d)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// What a declaration does not name any more is found by what was written down when it was last applied, if that is
// there once.
func TestFoundByRecord(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	m := newManager(t, k, Options{})
	mine := plan(t, m, "pfs:\n  - {select: enp1s0, count: 2}\n")[0]
	if mine.Device == nil {
		t.Fatal(mine.Err)
	}
	remembered := func(identity iommu.Identity) *Item {
		t.Helper()
		if err := m.state.Put(knownKey("oldname0"), known{Address: mine.Device.Address,
			Identity: identity}); err != nil {
			t.Fatal(err)
		}
		return plan(t, m, "pfs:\n  - {select: oldname0, count: 2}\n")[0]
	}
	identity := identify(t, m, mine.Device)
	if i := remembered(identity); i.State != Differs || i.Device.Name != pf ||
		!strings.Contains(strings.Join(i.Notes, " "), "by the record of the last apply") {
		t.Errorf("%v, %v, notes %q", i.State, i.Err, i.Notes)
	}
	identity.MACs, identity.Serial = map[string]string{"oldname0": "02:00:00:00:ff:ff"}, ""
	if i := remembered(identity); i.State != Missing {
		t.Errorf("another card: %v, %v", i.State, i.Err)
	}
}

// Of two cards that only their places tell apart, neither is taken for the other when root buses are numbered anew.
func TestRenumbered(t *testing.T) {
	card := func(root, bus string, group int) []hosttest.PCI {
		port := "0000:" + root + ":00.0"
		return []hosttest.PCI{
			{At: port, ID: "8086:2030", Class: "060400", Driver: "pcieport", Group: group},
			{At: port + "/0000:" + bus + ":00.0", ID: "10de:20b5", Class: "030200", Driver: "nvidia", Group: group + 1},
		}
	}

	numbered := func(root, bus, serial string, group int) []hosttest.PCI {
		both := card(root, bus, group)
		both[1].Class, both[1].Files = "010802", hosttest.Tree{"nvme/nvme" + bus + "/serial": serial + "\n"}
		return both
	}

	const text = "devices:\n  - select: path=0000:17:00.0/00.0\n"
	for name, c := range map[string]struct {
		now  []hosttest.PCI
		want State
	}{
		"as it was": {slices.Concat(card("17", "18", 1), card("3a", "3b", 3)), Differs},
		"a third one": {slices.Concat(card("17", "18", 1), card("3a", "3b", 3), card("5d", "5e", 5)),
			Differs},
		"all moved":                   {slices.Concat(card("16", "17", 1), card("39", "3a", 3)), Missing},
		"the other is where this was": {slices.Concat(card("16", "18", 1), card("17", "3b", 3)), Changed},
		"one is gone":                 {card("17", "18", 1), Changed},
		"one with a number is gone":   {numbered("17", "18", "S1", 1), Differs},
		"another number is there": {slices.Concat(numbered("17", "18", "S2", 1), numbered("3a", "3b", "S1", 3)),
			Changed},
	} {
		first := hosttest.NewKernel(t, hosttest.Made(slices.Concat(card("17", "18", 1), card("3a", "3b", 3))...))
		if strings.Contains(name, "number") {
			first = hosttest.NewKernel(t, hosttest.Made(slices.Concat(numbered("17", "18", "S1", 1),
				numbered("3a", "3b", "S2", 3))...))
		}
		m := newManager(t, first, Options{})
		if err := m.Remember(plan(t, m, text)); err != nil {
			t.Fatal(err)
		}
		record, err := first.Host().Read("var/lib/viaduct/" + knownKey("path=0000:17:00.0/00.0") + ".json")
		if err != nil {
			t.Fatal(err)
		}
		k := hosttest.NewKernel(t, hosttest.Made(c.now...).With(hosttest.Tree{
			"var/lib/viaduct/" + knownKey("path=0000:17:00.0/00.0") + ".json": string(record),
		}))
		if i := plan(t, newManager(t, k, Options{}), text)[0]; i.State != c.want {
			t.Errorf("%s: %s, %v", name, i.State, i.Err)
		}
	}
}

// Members of one group that are declared twice agree, or the file says how they can.
func TestGroupDeclaredTwice(t *testing.T) {
	const gpu, audio = "0000:03:00.0", "0000:03:00.1"
	entry := func(address, more string) string { return "  - select: " + address + "\n" + more }
	for name, c := range map[string]struct{ text, says string }{
		"alike":         {entry(gpu, "    driver: vfio-pci\n") + entry(audio, "    driver: vfio-pci\n"), ""},
		"one leaves it": {entry(gpu, "") + entry(audio, "    driver: vfio-pci\n"), ""},
		"another driver": {entry(gpu, "    driver: vfio-pci\n") + entry(audio, "    driver: other-vfio\n"),
			"so they need the same driver: it is vfio-pci at"},
		"another owner": {entry(gpu, "    node_owner: root\n") + entry(audio, "    node_owner: nobody\n"),
			"so they need the same node_owner: it is root at"},
		"the companion too": {entry(gpu, "") + entry("0000:00:14.0", ""), ""},
	} {
		k := hosttest.NewBoard(t)
		m := newManager(t, k, Options{})
		items := plan(t, m, "devices:\n"+c.text)
		if c.says != "" {
			if items[1].State != Refused || !strings.Contains(items[1].Err.Error(), c.says) {
				t.Errorf("%s: %s, %v", name, items[1].State, items[1].Err)
			}
			continue
		}

		if items[0].State != Differs || items[1].State != Differs || len(items[1].Steps) > 0 ||
			len(items[1].Notes) == 0 {
			t.Errorf("%s: %+v, %+v", name, items[0], items[1])
		}
		if err := apply(t, again(t, m), "devices:\n"+c.text); err != nil {
			t.Errorf("%s: %v", name, err)
		}

		for _, i := range plan(t, again(t, m), "devices:\n"+c.text) {
			if i.State != OK {
				t.Errorf("%s: %s is %s: %v %q", name, i.Name, i.State, i.Err, i.Steps)
			}
		}

		smbus, err := iommu.ReadDevice(&iommu.Host{Host: k.Host()}, iommu.Address{Device: 0x14})
		if want := map[bool]string{true: "vfio-pci"}[name == "the companion too"]; err != nil || smbus.Driver != want {
			t.Errorf("%s: the companion is on %q, %v", name, smbus.Driver, err)
		}
	}
}

// The file can say that devices have another role than their class says.
func TestRoles(t *testing.T) {
	k := hosttest.NewBoard(t)
	text := "roles:\n  - {select: class=0c05, role: guest}\n  - {select: 0000:03:00.1, role: companion}\n  - {select: 0000:7f:00.0, role: guest}\n"
	if err := k.Host().Replace(hostfile.File, []byte(text)); err != nil {
		t.Fatal(err)
	}

	h := &iommu.Host{Host: k.Host()}
	topology, err := iommu.Scan(h)
	if err == nil {
		err = Roles(h, topology)
	}
	if err != nil {
		t.Fatal(err)
	}

	g, err := topology.Group(12)
	if err != nil {
		t.Fatal(err)
	}

	var handed []string
	for _, d := range g.Handed() {
		handed = append(handed, d.Name)
	}

	if want := []string{"0000:00:14.0", "0000:03:00.0"}; !slices.Equal(handed, want) {
		t.Errorf("handed over are %q, want %q", handed, want)
	}
	if err := k.Host().Replace(hostfile.File, []byte("roles:\n  - {select: class=0c05, role: port}\n")); err != nil {
		t.Fatal(err)
	}
	if _, err := hostfile.Load(h); err == nil || !strings.Contains(err.Error(), "port") {
		t.Errorf("a role that there is not: %v", err)
	}
}
