package iommu

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"viaduct/internal/host/hosttest"
	"viaduct/internal/journal"
)

// nicsTree is a host of NICs at 0000:00:01.0 and on, each with the files of its one interface, eth1 and on.
func nicsTree(files ...map[string]string) hosttest.Tree {
	tree := hosttest.Tree{"sys/kernel/": ""}
	for i, of := range files {
		n := string(rune('1' + i))
		at := "sys/devices/pci0000:00/0000:00:0" + n + ".0"
		tree["sys/bus/pci/devices/0000:00:0"+n+".0"] = "-> ../../../devices/pci0000:00/0000:00:0" + n + ".0"
		tree[at+"/modalias"] = "pci:v00008086d00001572sv00000000sd00000000bc02sc00i00\n"
		if of == nil {
			continue
		}
		tree["sys/class/net/eth"+n] = "-> ../../devices/pci0000:00/0000:00:0" + n + ".0/net/eth" + n
		for name, content := range of {
			tree[at+"/net/eth"+n+"/"+name] = content
		}
	}
	return tree
}

// mac= is the address that a device's interface was made with. What it shows may be borrowed, and is no match then; nor
// is it where nobody knows.
func TestPermanentMAC(t *testing.T) {
	const one, two, three = "02:00:00:00:00:01", "02:00:00:00:00:02", "02:00:00:00:00:03"
	bonded := func(kind string) map[string]string {
		out := map[string]string{"address": one + "\n", "master": "-> ../../../../virtual/net/bond0"}
		if kind != "" {
			out["addr_assign_type"] = kind + "\n"
		}
		return out
	}

	bond := hosttest.Tree{"proc/net/bonding/bond0": "Ethernet Channel Bonding Driver\n\nSlave Interface: eth1\nPermanent HW addr: " +
		one + "\n\nSlave Interface: eth2\nMII Status: up\nPermanent HW addr: " + two + "\n"}
	for name, c := range map[string]struct {
		tree hosttest.Tree
		want map[string]string // device by address
	}{
		"ports of a bond": {
			nicsTree(bonded("3"), bonded("3")).With(bond), map[string]string{one: "0000:00:01.0", two: "0000:00:02.0"},
		},
		"of an older snapshot": {
			nicsTree(bonded(""), bonded("")).With(bond), map[string]string{one: "0000:00:01.0", two: "0000:00:02.0"},
		},
		"a bond that says nothing": {nicsTree(bonded("3"), bonded("")), map[string]string{one: "", two: ""}},
		"its own": {nicsTree(map[string]string{"address": one + "\n", "addr_assign_type": "0\n"}),
			map[string]string{one: "0000:00:01.0"}},
		"not said": {nicsTree(map[string]string{"address": one + "\n"}),
			map[string]string{one: "0000:00:01.0"}},
		"random": {nicsTree(map[string]string{"address": one + "\n", "addr_assign_type": "1\n"}),
			map[string]string{one: ""}},
		"set": {
			nicsTree(map[string]string{"address": three + "\n", "addr_assign_type": "3\n"}),
			map[string]string{three: ""},
		},
	} {
		for kind, h := range c.tree.Hosts(t) {
			host := &Host{h}
			topology, err := Scan(host)
			if err != nil {
				t.Fatal(err)
			}
			for mac, want := range c.want {
				sel, err := ParseSelector("mac=" + mac)
				if err != nil {
					t.Fatal(err)
				}
				d, err := sel.One(host, topology)
				if want == "" && !errors.Is(err, ErrNotFound) || want != "" && (err != nil || d.Name != want) {
					t.Errorf("%s: %s: mac=%s is %+v, %v, want %q", name, kind, mac, d, err, want)
				}
			}
		}
	}
}

// A snapshot has the permanent addresses that only the running kernel tells, as of the ports of a team.
func TestCapturedMAC(t *testing.T) {
	const own, shared = "52:54:00:00:00:02", "52:54:00:00:00:99"
	k := hosttest.NewLab(t, nil)
	k.Net.Permanent = map[string]string{"enp2s0": own}
	if err := os.WriteFile(filepath.Join(k.Dir(), "sys/class/net/enp2s0/address"), []byte(shared+"\n"),
		0o600); err != nil {
		t.Fatal(err)
	}

	kind := filepath.Join(k.Dir(), "sys/class/net/enp2s0/addr_assign_type")
	if err := os.WriteFile(kind, []byte("3\n"), 0o600); err != nil {
		t.Fatal(err)
	}

	h := &Host{k.Host()}
	for _, from := range []string{"the host", "its snapshot"} {
		// And what is captured of a snapshot.
		captured, topology := snapshotOf(t, h)
		for mac, want := range map[string]bool{own: true, shared: false} {
			sel, err := ParseSelector("mac=" + mac)
			if err != nil {
				t.Fatal(err)
			}
			if d, err := sel.One(captured, topology); (err == nil) != want || want && d.Name != "0000:02:00.0" {
				t.Errorf("of %s: mac=%s is %+v, %v", from, mac, d, err)
			}
		}
		h = captured
	}
}

// What the kernel refused to tell when a snapshot was taken is not known there, nor in what is captured of that: no
// address or name is said to be no device's.
func TestUntold(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	k.SetFault(func(op, _ string) error { return map[string]error{"message": unix.EIO}[op] })
	h := &Host{k.Host()}
	for range 2 {
		captured, topology := snapshotOf(t, h)
		for _, text := range []string{"mac=02:00:00:00:ff:ff", "uplink0"} {
			sel, err := ParseSelector(text)
			if err != nil {
				t.Fatal(err)
			}
			if d, err := sel.One(captured, topology); err == nil || errors.Is(err, ErrNotFound) {
				t.Errorf("%s is %+v, %v", text, d, err)
			}
		}
		h = captured
	}
}

// A device that viaduct has taken is found by what it showed before; another one in its place is not.
func TestRecordedMAC(t *testing.T) {
	record := func(device uint16) string {
		b, err := json.Marshal(map[string]any{
			"vendor": 0x8086, "device": device,
			"identity": Identity{Serial: "S1", MACs: map[string]string{"eth1": "02:00:00:00:00:01"}},
		})
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}

	for device, found := range map[uint16]bool{0x1572: true, 0x1573: false} {
		tree := nicsTree(nil).With(hosttest.Tree{
			journal.Dir + "/taken-0000:00:01.0.json":                 record(device),
			"sys/devices/pci0000:00/0000:00:01.0/driver":             "-> ../../../bus/pci/drivers/vfio-pci",
			"sys/devices/pci0000:00/0000:00:01.0/vfio-dev/vfio0/dev": "511:0\n",
			"sys/bus/pci/drivers/vfio-pci/":                          "",
		})
		h := &Host{tree.Host(t)}
		topology, err := Scan(h)
		if err != nil {
			t.Fatal(err)
		}
		for _, text := range []string{"mac=02:00:00:00:00:01", "serial=s1"} {
			sel, err := ParseSelector(text)
			if err != nil {
				t.Fatal(err)
			}
			if d, err := sel.One(h, topology); (err == nil) != found || found && d.Name != "0000:00:01.0" {
				t.Errorf("%s: %+v, %v", text, d, err)
			}
		}
	}
}

// Where only a PF can stand, its VFs, which may have its ids, are not meant.
func TestOnlyPFs(t *testing.T) {
	pf := Address{Bus: 1}
	vf := func(n uint8) Device {
		return Device{Name: "vf", PCI: true, Address: Address{Bus: 1, Device: n},
			ID: ID{Vendor: 0x8086, Device: 0x46d1}, PhysFn: &pf}
	}
	all := []Device{
		vf(1), {Name: "pf", PCI: true, Address: pf, ID: ID{Vendor: 0x8086, Device: 0x46d1}, SRIOV: &SRIOV{Total: 7}},
		vf(2),
	}
	sel, err := ParseSelector("8086:46d1")
	if err != nil {
		t.Fatal(err)
	}
	if d, err := sel.PF(nil, &Topology{Ungrouped: all}); err != nil || d.Name != "pf" {
		t.Errorf("%+v, %v", d, err)
	}
	if d, err := sel.PF(nil, &Topology{Ungrouped: all[:1]}); err != nil || d.Name != "vf" {
		t.Errorf("without a PF: %+v, %v", d, err)
	}
	if d, err := sel.PF(nil, &Topology{Ungrouped: append(all, all[1])}); err == nil {
		t.Errorf("two PFs: %+v", d)
	}
}

// snapshotOf is a snapshot of a host, opened.
func snapshotOf(t *testing.T, h *Host) (*Host, *Topology) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "host.vsnap")
	var b bytes.Buffer
	if err := errors.Join(Capture(h, &b), os.WriteFile(file, b.Bytes(), 0o600)); err != nil {
		t.Fatal(err)
	}
	captured, err := Open(file)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { captured.Close() })
	topology, err := Scan(captured)
	if err != nil {
		t.Fatal(err)
	}
	return captured, topology
}
