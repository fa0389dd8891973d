package iommu

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"viaduct/internal/host/hosttest"
)

func TestParsePortName(t *testing.T) {
	vf := func(pf, vf int) PortName { return PortName{Function: true, PF: pf, VF: &vf} }
	wire := PortName{Wire: true}
	for name, want := range map[string]PortName{
		"p0": wire, "p1s2": wire, "l2p3": wire, "pf0vf3": vf(0, 3), "pf1vf12": vf(1, 12),
		"pf0": {Function: true}, "pf1sf2": {Function: true, PF: 1}, "pf0vf": {Function: true},
		"c1pf0vf3": {Function: true}, "": {}, "eth0": {}, "port1": {},
	} {
		got := parsePortName(name)
		same := got.Wire == want.Wire && got.Function == want.Function && (got.VF == nil) == (want.VF == nil) &&
			(got.VF == nil || *got.VF == *want.VF && got.PF == want.PF)
		if !same {
			t.Errorf("%q: %+v, want %+v", name, got, want)
		}
	}
}

// A function's own interfaces are those of its device link: no representor, no subfunction's, no USB device's.
func TestOwnInterfaces(t *testing.T) {
	const at, pci = "sys/devices/pci0000:00/0000:00:01.0", "sys/bus/pci/devices/0000:00:01.0"
	tree := hosttest.Tree{
		pci:              "-> ../../../devices/pci0000:00/0000:00:01.0",
		at + "/modalias": "pci:v000015B3d00001017sv00000000sd00000000bc02sc00i00\n",
		"sys/kernel/":    "",
	}
	add := func(name, below, port string) {
		tree["sys/class/net/"+name] = "-> ../../devices/pci0000:00/0000:00:01.0/" + below + "net/" + name
		tree[at+"/"+below+"net/"+name+"/address"] = "02:00:00:00:00:01\n"
		if port != "" {
			tree[at+"/"+below+"net/"+name+"/phys_port_name"] = port + "\n"
		}
	}
	add("a-rep", "", "pf0vf0")
	add("b-own", "", "p0")
	add("c-sf", "mlx5_core.sf.2/", "")
	add("d-usb", "usb1/1-1/1-1:1.0/", "")
	add("e-sfrep", "", "pf0sf88")
	for kind, h := range tree.Hosts(t) {
		topology, err := Scan(&Host{h})
		if err != nil {
			t.Fatal(err)
		}
		d := topology.Ungrouped[0]
		if !slices.Equal(d.Netdevs, []string{"b-own"}) || !slices.Equal(slices.Sorted(slices.Values(d.Ports)),
			[]string{"a-rep", "c-sf", "d-usb", "e-sfrep"}) {
			t.Errorf("%s: own %v, ports %v", kind, d.Netdevs, d.Ports)
		}
	}

	tree = hosttest.Tree{
		pci:              "-> ../../../devices/pci0000:00/0000:00:01.0",
		at + "/modalias": "pci:v00001AF4d00001041sv00000000sd00000000bc02sc00i00\n",
		"sys/kernel/":    "",
	}
	add("one", "virtio0/", "")
	topology, err := Scan(&Host{tree.Host(t)})
	if err != nil || !slices.Equal(topology.Ungrouped[0].Netdevs, []string{"one"}) {
		t.Errorf("virtio: %+v, %v", topology, err)
	}
}

// An interface's alternative names name its device, here and in a snapshot.
func TestAlternativeNames(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	long := "an-alternative-name-may-be-longer"
	k.Net.Alternative = map[string]string{"uplink0": "enp1s0", long: "enp1s0"}
	live := &Host{k.Host()}
	var b bytes.Buffer
	if err := Capture(live, &b); err != nil {
		t.Fatal(err)
	}

	file := filepath.Join(t.TempDir(), "host.tar.gz")
	if err := os.WriteFile(file, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}

	captured, err := Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer captured.Close()
	for _, h := range []*Host{live, captured} {
		topology, err := Scan(h)
		if err != nil {
			t.Fatal(err)
		}
		for name, want := range map[string]string{"uplink0": "0000:01:00.0", long: "0000:01:00.0",
			"enp1s0": "0000:01:00.0", "uplink1": ""} {
			sel, err := ParseSelector(name)
			if err != nil {
				t.Fatal(err)
			}
			d, err := sel.One(h, topology)
			if want == "" && !errors.Is(err, ErrNotFound) || want != "" && (err != nil || d.Name != want) {
				t.Errorf("live %v: %s is %+v, %v", h.Live(), name, d, err)
			}
		}
	}
}

// What is read by the name of an interface that another device's has meanwhile, as at boot, is not this device's.
func TestNameOfAnother(t *testing.T) {
	const one, two = "0000:01:00.0", "0000:02:00.0"
	nic := func(at, name, mac string) hosttest.PCI {
		return hosttest.PCI{At: at, ID: "8086:10c9", Class: "020000", Driver: "igb", Group: 1, Files: hosttest.Tree{
			"net/" + name + "/address": mac + "\n", "net/" + name + "/addr_assign_type": "0\n",
			"net/" + name + "/device": "-> ../..", "net/" + name + "/subsystem": "-> ../../../../../../class/net",
			"net/" + name + "/flags": "0x1003\n", "net/" + name + "/mtu": "1500\n", "net/" + name + "/ifindex": "2\n",
		}}
	}
	const dir1, dir2 = "devices/pci0000:00/0000:00:01.0/" + one, "devices/pci0000:00/0000:00:02.0/" + two
	k := hosttest.NewKernel(t, hosttest.Made(
		nic("0000:00:01.0/"+one, "eth0", "52:54:00:00:00:01"), nic("0000:00:02.0/"+two, "eth1", "52:54:00:00:00:02"),
	).With(hosttest.Tree{
		"sys/class/net/eth0": "-> ../../" + dir1 + "/net/eth0", "sys/class/net/eth1": "-> ../../" + dir2 + "/net/eth1",
	}))
	h := &Host{Host: k.Host()}
	a, err := ParseAddress(one)
	if err != nil {
		t.Fatal(err)
	}
	d, err := ReadDevice(h, a)
	if err != nil {
		t.Fatal(err)
	}
	if err := ReadNetdevs(h, &d); err != nil {
		t.Fatal(err)
	}

	rename := func(dir, from, to string) {
		err := errors.Join(os.Rename(k.Dir()+"/sys/"+dir+"/net/"+from, k.Dir()+"/sys/"+dir+"/net/"+to),
			os.Remove(k.Dir()+"/sys/class/net/"+from),
			os.Symlink("../../"+dir+"/net/"+to, k.Dir()+"/sys/class/net/"+to))
		if err != nil {
			t.Error(err)
		}
	}
	var once sync.Once
	k.SetFault(func(string, string) error {
		once.Do(func() { rename(dir1, "eth0", "enp1s0"); rename(dir2, "eth1", "eth0") })
		return nil
	})
	macs, err := PermanentMACs(h, &d)
	k.Revive()
	if err != nil || len(macs) != 1 || macs["enp1s0"] != "52:54:00:00:00:01" {
		t.Errorf("%v, %v", macs, err)
	}
}
