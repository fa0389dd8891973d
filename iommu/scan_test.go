package iommu

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"viaduct/internal/host/hosttest"
)

// pci is a device's entries below sys/devices, and its link; at is its path there.
func pci(at, modalias string, more hosttest.Tree) hosttest.Tree {
	name := at[strings.LastIndexByte(at, '/')+1:]
	t := hosttest.Tree{
		"sys/bus/pci/devices/" + name:      "-> ../../../devices/" + at,
		"sys/devices/" + at + "/modalias":  modalias + "\n",
		"sys/devices/" + at + "/numa_node": "-1\n",
	}
	for n, content := range more {
		t["sys/devices/"+at+"/"+n] = content
	}
	return t
}

func join(trees ...hosttest.Tree) hosttest.Tree {
	out := hosttest.Tree{"sys/kernel/": ""}
	for _, t := range trees {
		out = out.With(t)
	}
	return out
}

const (
	bridge = "pci:v00008086d00003420sv00000000sd00000000bc06sc04i00"
	nic    = "pci:v00008086d000010C9sv00001AF4sd00001100bc02sc00i00"
	vf     = "pci:v00008086d000010CAsv00001AF4sd00001100bc02sc00i00"
	virtio = "pci:v00001AF4d00001041sv00001AF4sd00001100bc02sc00i00"
	nvme   = "pci:v0000144Dd0000A808sv0000144Dsd0000A801bc01sc08i02"
)

func dev(t testing.TB, name string, id ID) Device {
	return Device{Name: name, Address: addr(t, name), PCI: true, ID: id}
}

var (
	bridgeID = ID{Vendor: 0x8086, Device: 0x3420, Class: 0x060400}
	nicID    = ID{Vendor: 0x8086, Device: 0x10c9, Subvendor: 0x1af4, Subdevice: 0x1100, Class: 0x020000}
	vfID     = ID{Vendor: 0x8086, Device: 0x10ca, Subvendor: 0x1af4, Subdevice: 0x1100, Class: 0x020000}
	virtioID = ID{Vendor: 0x1af4, Device: 0x1041, Subvendor: 0x1af4, Subdevice: 0x1100, Class: 0x020000}
	nvmeID   = ID{Vendor: 0x144d, Device: 0xa808, Subvendor: 0x144d, Subdevice: 0xa801, Class: 0x010802}
)

// rich is a host with all kinds of things: see want in TestScanRich.
func rich() hosttest.Tree {
	const port = "pci0000:00/0000:00:01.0"
	const pf = port + "/0000:01:00.0"
	return join(
		pci(port, bridge, hosttest.Tree{
			"driver": "-> ../../../bus/pci/drivers/pcieport", "iommu_group": "-> ../../../kernel/iommu_groups/1",
			"class":                          "0x060400\n",
			"0000:00:01.0:pcie001/subsystem": "-> ../../../../bus/pci_express",
		}),
		pci(pf, nic, hosttest.Tree{
			"driver": "-> ../../../../bus/pci/drivers/igb", "iommu_group": "-> ../../../../kernel/iommu_groups/11",
			"iommu":     "-> ../../../virtual/iommu/ivhd0",
			"numa_node": "1\n", "driver_override": "(null)\n", "revision": "0x01\n", "power_state": "D0\n",
			"reset_method": "flr bus\n", "reset": "\n",
			"boot_vga": "0\n", "current_link_speed": "8.0 GT/s PCIe\n", "max_link_speed": "16.0 GT/s PCIe\n",
			"current_link_width": "4\n", "max_link_width": "8\n",
			"resource":       "0x00000000fe800000 0x00000000fe81ffff 0x0000000000040200\n",
			"sriov_totalvfs": "7\n", "sriov_offset": "128\n", "sriov_stride": "2\n", "sriov_vf_device": "10ca\n",
			"sriov_drivers_autoprobe": "1\n", "sriov_vf_total_msix": "0\n",
			"virtfn0": "-> ../0000:01:10.0", "virtfn1": "-> ../0000:01:10.2",
			"net/eth0/address": "52:54:00:00:00:01\n", "net/eth0/subsystem": "-> ../../../../../../class/net",
			"net/eth0b/address": "52:54:00:00:00:02\n", "net/eth0b/subsystem": "-> ../../../../../../class/net",
			"config": string(configWithSerial()),
		}),
		pci(port+"/0000:01:10.0", vf, hosttest.Tree{
			"driver": "-> ../../../../bus/pci/drivers/vfio-pci", "driver_override": "vfio-pci\n",
			"physfn":      "-> ../0000:01:00.0",
			"iommu_group": "-> ../../../../kernel/iommu_groups/2", "vfio-dev/vfio0/dev": "511:0\n",
		}),
		pci(port+"/0000:01:10.2", vf, hosttest.Tree{"physfn": "-> ../0000:01:00.0"}),
		pci("pci0000:00/0000:00:03.0", virtio, hosttest.Tree{
			"driver": "-> ../../../bus/pci/drivers/virtio-pci", "virtio0/subsystem": "-> ../../../../bus/virtio",
			"virtio0/net/ens3/address":   "52:54:00:00:00:03\n",
			"virtio0/net/ens3/subsystem": "-> ../../../../../../class/net",
		}),
		pci("pci10000:e0/10000:e1:00.0", nvme, hosttest.Tree{
			"driver": "-> ../../../bus/pci/drivers/nvme", "iommu_group": "-> ../../../kernel/iommu_groups/40",
			"nvme/nvme0/subsystem":         "-> ../../../../../class/nvme",
			"nvme/nvme0/nvme0n1/subsystem": "-> ../../../../../../class/block", "nvme/nvme0/nvme0n1/size": "8\n",
		}),
		hosttest.Tree{
			"sys/class/net/eth0":            "-> ../../devices/" + pf + "/net/eth0",
			"sys/class/net/eth0b":           "-> ../../devices/" + pf + "/net/eth0b",
			"sys/class/net/ens3":            "-> ../../devices/pci0000:00/0000:00:03.0/virtio0/net/ens3",
			"sys/class/net/lo":              "-> ../../devices/virtual/net/lo",
			"sys/class/net/bonding_masters": "bond0\n",

			"sys/class/iommu/ivhd0":                              "-> ../../devices/virtual/iommu/ivhd0",
			"sys/class/iommu/dmar1":                              "-> ../../devices/virtual/iommu/dmar1",
			"sys/devices/virtual/iommu/ivhd0/amd-iommu/features": "25bf732fa2295afe:53f\n",
			"sys/devices/virtual/iommu/dmar1/intel-iommu/cap":    "d2008c40660462\n",

			"sys/kernel/irq/1/chip_name": "-\n", "sys/kernel/irq/10/chip_name": "IR-IO-APIC\n",
			"sys/kernel/irq/2/chip_name": "IO-APIC\n",

			"sys/kernel/iommu_groups/1/type":                                                    "DMA\n",
			"sys/kernel/iommu_groups/1/devices/0000:00:01.0":                                    "-> ../../../../devices/" + port,
			"sys/kernel/iommu_groups/1/reserved_regions":                                        "0x00000000fee00000 0x00000000feefffff msi\n",
			"sys/kernel/iommu_groups/2/type":                                                    "identity\n",
			"sys/kernel/iommu_groups/2/devices/0000:01:10.0":                                    "-> ../../../../devices/" + port + "/0000:01:10.0",
			"sys/kernel/iommu_groups/11/devices/0000:01:00.0":                                   "-> ../../../../devices/" + pf,
			"sys/kernel/iommu_groups/30/devices/":                                               "",
			"sys/kernel/iommu_groups/40/type":                                                   "DMA-FQ\n",
			"sys/kernel/iommu_groups/40/devices/10000:e1:00.0":                                  "-> ../../../../devices/pci10000:e0/10000:e1:00.0",
			"sys/kernel/iommu_groups/40/devices/arm-smmu-test":                                  "-> ../../../../devices/platform/arm-smmu-test",
			"sys/kernel/iommu_groups/40/devices/83b8f4f2-509f-382f-3c1e-e6bfe0fa1001":           "-> ../../../../devices/pci10000:e0/10000:e1:00.0/83b8f4f2-509f-382f-3c1e-e6bfe0fa1001",
			"sys/kernel/iommu_groups/40/devices/vanished":                                       "-> ../../../../devices/platform/vanished",
			"sys/devices/platform/arm-smmu-test/driver":                                         "-> ../../../bus/platform/drivers/test",
			"sys/devices/platform/arm-smmu-test/driver_override":                                "test\n",
			"sys/devices/pci10000:e0/10000:e1:00.0/83b8f4f2-509f-382f-3c1e-e6bfe0fa1001/driver": "-> ../../../../bus/mdev/drivers/vfio_mdev",
			"usr/share/misc/pci.ids":                                                            ids,
		},
	)
}

func configWithSerial() []byte {
	b := chain(4096, map[int][2]int{0x100: {1, 0x140}, 0x140: {3, 0}})
	copy(b[0x144:], []byte{8, 7, 6, 5, 4, 3, 2, 1})
	return b
}

func richTopology(t testing.TB) *Topology {
	port, pf, vf0, vf1 := dev(t, "0000:00:01.0", bridgeID), dev(t, "0000:01:00.0", nicID), dev(t, "0000:01:10.0",
		vfID), dev(
		t,
		"0000:01:10.2",
		vfID,
	)
	net, disk := dev(t, "0000:00:03.0", virtioID), dev(t, "10000:e1:00.0", nvmeID)
	port.Driver, port.Group = "pcieport", new(1)
	pf.Driver, pf.Group, pf.NUMANode, pf.Netdevs = "igb", new(11), new(1), []string{"eth0", "eth0b"}
	pf.SRIOV = &SRIOV{7, []VF{{0, vf0.Address}, {1, vf1.Address}}}
	vf0.Driver, vf0.DriverOverride, vf0.VFIO, vf0.Group, vf0.PhysFn = "vfio-pci", "vfio-pci", true, new(2), &pf.Address
	vf1.PhysFn, vf1.VFIndex = &pf.Address, 1
	net.Driver, net.Netdevs = "virtio-pci", []string{"ens3"}
	disk.Driver, disk.Group = "nvme", new(40)
	mdev := Device{Name: "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001", Driver: "vfio_mdev", VFIO: true, Group: new(40)}
	platform := Device{Name: "arm-smmu-test", Driver: "test", DriverOverride: "test", Group: new(40)}
	return &Topology{
		Units:              []Unit{{"dmar1", KindVTd}, {"ivhd0", KindAMDVi}},
		InterruptRemapping: new(true),
		Groups: []Group{
			{ID: 1, Type: "DMA", Devices: []Device{port}}, {ID: 2, Type: "identity", Devices: []Device{vf0}},
			{ID: 11, Devices: []Device{pf}}, {ID: 30}, {ID: 40, Type: "DMA-FQ",
				Devices: []Device{disk, mdev, platform}},
		},
		Ungrouped: []Device{net, vf1},
	}
}

func sameTopology(t *testing.T, what string, got, want *Topology) {
	t.Helper()
	if !reflect.DeepEqual(got.Units, want.Units) ||
		!reflect.DeepEqual(got.InterruptRemapping, want.InterruptRemapping) {
		t.Errorf("%s: units %+v, interrupt remapping %v", what, got.Units, got.InterruptRemapping)
	}
	if len(got.Groups) != len(want.Groups) {
		t.Errorf("%s: %d groups, want %d", what, len(got.Groups), len(want.Groups))
	}
	for i := range min(len(got.Groups), len(want.Groups)) {
		if !reflect.DeepEqual(got.Groups[i], want.Groups[i]) {
			t.Errorf("%s: group\n%+v\nwant\n%+v", what, got.Groups[i], want.Groups[i])
		}
	}
	if !reflect.DeepEqual(got.Ungrouped, want.Ungrouped) {
		t.Errorf("%s: ungrouped\n%+v\nwant\n%+v", what, got.Ungrouped, want.Ungrouped)
	}
	got.lookup, want.lookup = nil, nil
	if !t.Failed() && !reflect.DeepEqual(got, want) {
		t.Errorf("%s:\n%+v\nwant\n%+v", what, got, want)
	}
}

func TestScanRich(t *testing.T) {
	for kind, h := range hostsOf(t, rich()) {
		got, err := Scan(h)
		if err != nil {
			t.Fatalf("%s: %v", kind, err)
		}
		sameTopology(t, kind, got, richTopology(t))
	}
}

func TestScanSmall(t *testing.T) {
	plain := pci("pci0000:00/0000:00:03.0", virtio, nil)
	alone := dev(t, "0000:00:03.0", virtioID)
	for name, c := range map[string]struct {
		tree hosttest.Tree
		want Topology
	}{
		"no PCI":   {join(), Topology{Units: []Unit{}}},
		"no IOMMU": {join(plain), Topology{Units: []Unit{}, Ungrouped: []Device{alone}}},
		"interrupts plain": {join(plain, hosttest.Tree{"sys/kernel/irq/0/chip_name": "IO-APIC\n"}),
			Topology{Units: []Unit{}, InterruptRemapping: new(false), Ungrouped: []Device{alone}}},
		"interrupts of another architecture": {
			join(plain, hosttest.Tree{"sys/kernel/irq/0/chip_name": "GICv3\n", "sys/kernel/irq/1/": "",
				"sys/kernel/irq/2/chip_name/": ""}),
			Topology{Units: []Unit{}, Ungrouped: []Device{alone}},
		},
	} {
		for kind, h := range hostsOf(t, c.tree) {
			got, err := Scan(h)
			if err != nil {
				t.Fatalf("%s, %s: %v", name, kind, err)
			}
			sameTopology(t, name+", "+kind, got, &c.want)
		}
	}
}

// TestScanMany: enough devices for all workers, some of which vanish.
func TestScanMany(t *testing.T) {
	tree, want := join(), Topology{Units: []Unit{}}
	for i := range 300 {
		d := dev(t, Address{Bus: uint8(i / 32), Device: uint8(i % 32)}.String(), virtioID)
		tree = tree.With(pci("pci0000:00/"+d.Name, virtio, nil))
		if i%7 == 3 {
			tree["sys/devices/pci0000:00/"+d.Name+"/modalias"] = "-> gone"
			continue
		}
		want.Ungrouped = append(want.Ungrouped, d)
	}
	got, err := Scan(hostOf(t, tree))
	if err != nil {
		t.Fatal(err)
	}
	sameTopology(t, "many", got, &want)
}

func TestScanErrors(t *testing.T) {
	one := join(pci("pci0000:00/0000:00:03.0", virtio, nil))
	at := "/sys/bus/pci/devices/0000:00:03.0/"
	const own = "sys/devices/pci0000:00/0000:00:03.0/"
	for name, c := range map[string]struct {
		tree hosttest.Tree
		want string
		is   error
	}{
		"nothing":      {hosttest.Tree{"etc/": ""}, "(is sysfs mounted?)", fs.ErrNotExist},
		"an empty sys": {hosttest.Tree{"sys/": ""}, "/sys/bus/pci/devices", fs.ErrNotExist},
		"modalias unreadable": {one.With(hosttest.Tree{own + "modalias": hosttest.Gone, own + "modalias/": ""}),
			at + "modalias", unix.EISDIR},
		"modalias malformed": {one.With(hosttest.Tree{own + "modalias": "acpi:PNP0A08:\n"}),
			at + "modalias", nil},
		"numa_node malformed": {one.With(hosttest.Tree{own + "numa_node": "x\n"}), at + "numa_node", nil},
		"override unreadable": {one.With(hosttest.Tree{own + "driver_override/": ""}), at + "driver_override",
			unix.EISDIR},
		"driver no link":           {one.With(hosttest.Tree{own + "driver": "igb\n"}), at + "driver", nil},
		"sriov_totalvfs malformed": {one.With(hosttest.Tree{own + "sriov_totalvfs": "\n"}), at + "sriov_totalvfs", nil},
		"virtfn malformed": {one.With(hosttest.Tree{own + "sriov_totalvfs": "1\n", own + "virtfn0": "-> ../x"}),
			at + "virtfn0", nil},
		"devices no directory": {hosttest.Tree{"sys/bus/pci/devices": "", "sys/kernel/": ""},
			"/sys/bus/pci/devices", unix.ENOTDIR},
		"group no number": {one.With(hosttest.Tree{"sys/kernel/iommu_groups/x/devices/": ""}),
			"/sys/kernel/iommu_groups/x", nil},
		"group type unreadable": {one.With(hosttest.Tree{"sys/kernel/iommu_groups/0/type/": ""}),
			"/sys/kernel/iommu_groups/0/type", unix.EISDIR},
		"groups no directory": {one.With(hosttest.Tree{"sys/kernel/iommu_groups": "x"}),
			"/sys/kernel/iommu_groups", unix.ENOTDIR},
		"units no directory":      {one.With(hosttest.Tree{"sys/class/iommu": "x"}), "/sys/class/iommu", unix.ENOTDIR},
		"interrupts no directory": {one.With(hosttest.Tree{"sys/kernel/irq": "x"}), "/sys/kernel/irq", unix.ENOTDIR},
	} {
		for kind, h := range hostsOf(t, c.tree) {
			got, err := Scan(h)
			if err == nil || got != nil || !strings.Contains(err.Error(), c.want) ||
				(c.is != nil && !errors.Is(err, c.is)) {
				t.Errorf("%s, %s: %+v, %v; want an error with %q", name, kind, got, err, c.want)
			}
		}
	}
}

// A captured tree that lacks what it leads to, or has folders where the kernel has links, is told to be such, and no host
// without devices or groups. What vanishes on a running host is left out.
func TestNotWhole(t *testing.T) {
	whole := hosttest.Made(hosttest.PCI{At: "0000:00:01.0", ID: "8086:10c9", Class: "020000", Driver: "igb", Group: 1})
	const link, own = "sys/bus/pci/devices/0000:00:01.0", "sys/devices/pci0000:00/0000:00:01.0"
	for name, c := range map[string]struct {
		tree hosttest.Tree
		says string
	}{
		"whole": {whole, ""},
		"links followed": {whole.With(hosttest.Tree{link: hosttest.Gone, link + "/modalias": "x\n"}),
			link + " is a folder"},
		"no devices behind": {whole.With(hosttest.Tree{own: hosttest.Gone}), "whose modalias is missing"},
		"an empty folder":   {hosttest.Tree{link + "/": "", "sys/kernel/": ""}, link + " is a folder"},
		"driver followed": {whole.With(hosttest.Tree{own + "/driver": hosttest.Gone, own + "/driver/": ""}),
			"/driver is a folder"},
		"group followed": {whole.With(hosttest.Tree{own + "/iommu_group": hosttest.Gone,
			own + "/iommu_group/": ""}), "/iommu_group is a folder"},
		"groups left out": {whole.With(hosttest.Tree{"sys/kernel/iommu_groups": hosttest.Gone}),
			"/sys/kernel/iommu_groups is missing"},
		"no groups, no IOMMU": {whole.With(hosttest.Tree{"sys/kernel/iommu_groups": hosttest.Gone,
			own + "/iommu_group": hosttest.Gone}), ""},
		"interfaces followed": {whole.With(hosttest.Tree{
			"sys/class/net/eth0/address": "52:54:00:00:00:01\n", "sys/class/net/bonding_masters": "bond0\n",
		}), "sys/class/net/eth0 is a folder"},
		"no such devices": {hosttest.Tree{"sys/bus/pci/devices/": "", "sys/kernel/": ""}, ""},
	} {
		for kind, h := range hostsOf(t, c.tree) {
			_, err := Scan(h)
			if c.says == "" && err != nil || c.says != "" &&
				(!errors.Is(err, ErrNotWhole) || !strings.Contains(err.Error(), c.says)) {
				t.Errorf("%s, %s: %v", name, kind, err)
			}
		}
	}

	k := hosttest.NewKernel(t, whole)
	gone := k.Dir() + "/sys/bus/pci/devices/0000:00:1f.0"
	if err := os.Symlink("../../../devices/pci0000:00/0000:00:1f.0", gone); err != nil {
		t.Fatal(err)
	}
	topology, err := Scan(&Host{k.Host()})
	if err != nil || len(topology.Groups) != 1 || len(topology.Ungrouped) != 0 {
		t.Errorf("a running host: %+v, %v", topology, err)
	}
}

func TestTopology(t *testing.T) {
	top := richTopology(t)
	if g, err := top.Group(11); err != nil || g != &top.Groups[2] {
		t.Errorf("group 11: %v, %v", g, err)
	}

	for _, id := range []int{0, 3, 41, -1} {
		if g, err := top.Group(id); !errors.Is(err, ErrNotFound) || g != nil {
			t.Errorf("group %d: %v, %v", id, g, err)
		}
	}

	if d, err := top.Find(addr(t, "0000:01:10.2")); err != nil || d != &top.Ungrouped[1] {
		t.Errorf("%v, %v", d, err)
	}
	if d, err := top.Find(Address{}); !errors.Is(err, ErrNotFound) || d != nil { // the mdev's address is zero
		t.Errorf("%v, %v", d, err)
	}

	for id, want := range map[int][2][]string{1: {{}, {}}, 2: {{}, {"0000:01:10.0"}},
		11: {{"0000:01:00.0"}, {"0000:01:00.0"}}, 40: {{"10000:e1:00.0", "arm-smmu-test"},
			{"10000:e1:00.0", "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001", "arm-smmu-test"}}} {
		g, err := top.Group(id)
		if err != nil {
			t.Fatal(err)
		}
		if got := [2][]string{deviceNames(g.Blockers()), deviceNames(g.Endpoints())}; !reflect.DeepEqual(got, want) {
			t.Errorf("group %d: blockers and endpoints %v, want %v", id, got, want)
		}
	}

	got, err := Parents(hostOf(t, rich()), top)
	want := map[string]string{
		"0000:01:00.0": "0000:00:01.0",
		"0000:01:10.0": "0000:01:00.0",
		"0000:01:10.2": "0000:01:00.0",
	}

	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("parents %v, %v", got, err)
	}
}

func richDetails(t testing.TB) map[string]*Details {
	port, pool := []Address{addr(t, "0000:00:01.0")}, 0
	return map[string]*Details{
		"0000:00:01.0": {
			Modalias:     bridge,
			ResetMethods: []string{},
			ClassDevices: map[string][]string{},
			MACs:         map[string]string{},
			Path:         "0000:00:01.0",
			Parents:      []Address{},
		},
		"0000:01:00.0": {
			Modalias: nic, Revision: 1, PowerState: "D0", ResetMethods: []string{"flr", "bus"}, Unit: "ivhd0",
			Path: "0000:00:01.0/00.0", Parents: port,
			ClassDevices: map[string][]string{
				"net": {"eth0", "eth0b"},
			}, MACs: map[string]string{"eth0": "52:54:00:00:00:01", "eth0b": "52:54:00:00:00:02"},
			Link: &Link{"8.0 GT/s PCIe", "16.0 GT/s PCIe", 4, 8}, BARs: []BAR{{Size: 128 << 10}},
			VFs: &VFDetails{Offset: 128, Stride: 2, VFDevice: 0x10ca, Autoprobe: new(true), MSIXPool: &pool},
		},
		"0000:01:10.0": {
			Modalias:     vf,
			ResetMethods: []string{},
			ClassDevices: map[string][]string{},
			MACs:         map[string]string{},
			Path:         "0000:00:01.0/00.0/vf0",
			Parents:      port,
			VFIODevice:   "vfio0",
		},
		"0000:01:10.2": {
			Modalias:     vf,
			ResetMethods: []string{},
			ClassDevices: map[string][]string{},
			MACs:         map[string]string{},
			Path:         "0000:00:01.0/00.0/vf1",
			Parents:      port,
		},
		"0000:00:03.0": {
			Modalias:     virtio,
			ResetMethods: []string{},
			ClassDevices: map[string][]string{"net": {"ens3"}},
			MACs:         map[string]string{"ens3": "52:54:00:00:00:03"},
			Path:         "0000:00:03.0",
			Parents:      []Address{},
		},
		"10000:e1:00.0": {
			Modalias:     nvme,
			ResetMethods: []string{},
			ClassDevices: map[string][]string{"nvme": {"nvme0"}, "block": {"nvme0n1"}},
			MACs:         map[string]string{},
			Path:         "10000:e1:00.0",
			Parents:      []Address{},
		},
	}
}

// TestCapture: a snapshot of a host answers as the host does.
func TestCapture(t *testing.T) {
	source := hostOf(t, rich())
	var b bytes.Buffer
	if err := Capture(source, &b); err != nil {
		t.Fatal(err)
	}

	file := filepath.Join(t.TempDir(), "snapshot")
	if err := os.WriteFile(file, b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}

	snapshot, err := Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer snapshot.Close()
	for what, h := range map[string]*Host{"host": source, "snapshot": snapshot} {
		got, err := Scan(h)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		sameTopology(t, what, got, richTopology(t))
		for name, want := range richDetails(t) {
			got, err := ReadDetails(h, addr(t, name))
			if name == "0000:01:00.0" && err == nil && (got.CanReset == nil || !*got.CanReset) {
				t.Errorf("%s: %s cannot be reset", what, name)
			}
			got.CanReset = nil
			if err != nil || !reflect.DeepEqual(got, want) {
				t.Errorf("%s: %s:\n%+v, %v\nwant\n%+v", what, name, got, err, want)
			}
		}
		names := OpenNames(h)
		if names.Device(0x8086, 0x10ca) != "82576 Virtual Function" || names.Vendor(0x8086) != "Intel Corporation" {
			t.Errorf("%s: names %q, %q", what, names.Device(0x8086, 0x10ca), names.Vendor(0x8086))
		}
		if s, err := ReadSerial(h, addr(t, "0000:01:00.0")); s != "01-02-03-04-05-06-07-08" || err != nil {
			t.Errorf("%s: serial %q, %v", what, s, err)
		}
		if r, err := ReservedRegions(h, 1); err != nil ||
			!reflect.DeepEqual(r, []Region{{0xfee00000, 0xfeefffff, "msi"}}) {
			t.Errorf("%s: regions %v, %v", what, r, err)
		}
	}
}

// TestCaptureNames: a vendor's name is kept when its device has none.
func TestCaptureNames(t *testing.T) {
	tree := join(pci("pci0000:00/0000:00:03.0", "pci:v00008086d00001234sv00000000sd00000000bc02sc00i00", nil),
		hosttest.Tree{"usr/share/misc/pci.ids": ids})
	file := filepath.Join(t.TempDir(), "snapshot")
	f, err := os.Create(file)
	if err == nil {
		err = errors.Join(Capture(hostOf(t, tree), f), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	h, err := Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	if n := OpenNames(h); n.Vendor(0x8086) != "Intel Corporation" || n.Device(0x8086, 0x1234) != "" ||
		n.Vendor(0x1af4) != "" {
		t.Errorf("%q, %q", n.Vendor(0x8086), n.Device(0x8086, 0x1234))
	}
}

func TestDetailsErrors(t *testing.T) {
	const vf0 = "sys/devices/pci0000:00/0000:00:01.0/0000:01:10.0/"
	const own = "sys/devices/pci0000:00/0000:00:03.0/"
	for name, c := range map[string]struct {
		change hosttest.Tree
		device string
		path   string
		ok     bool
		is     error
	}{
		"no such device":         {nil, "0000:09:00.0", "", false, ErrNotFound},
		"VF of itself":           {hosttest.Tree{vf0 + "physfn": "-> ../0000:01:10.0"}, "0000:01:10.0", "", true, nil},
		"VF that its PF has not": {hosttest.Tree{"sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0/virtfn1": hosttest.Gone}, "0000:01:10.2", "", true, nil},
		"resource malformed":     {hosttest.Tree{own + "resource": "x\n"}, "0000:00:03.0", "", false, nil},
		"revision malformed":     {hosttest.Tree{own + "revision": "x\n"}, "0000:00:03.0", "", false, nil},
		"power_state unreadable": {hosttest.Tree{own + "power_state/": ""}, "0000:00:03.0", "", false, unix.EISDIR},
		"sriov_vf_device missing": {hosttest.Tree{own + "sriov_offset": "1\n", own + "sriov_stride": "1\n"},
			"0000:00:03.0", "0000:00:03.0", true, nil},
	} {
		got, err := ReadDetails(hostOf(t, rich().With(c.change)), addr(t, c.device))
		switch {
		case c.ok && (err != nil || got.Path != c.path):
			t.Errorf("%s: %+v, %v", name, got, err)
		case !c.ok && (err == nil || (c.is != nil && !errors.Is(err, c.is))):
			t.Errorf("%s: %v", name, err)
		}
	}
}

// The PF of each VF is the one that links to it, and what is no VF has none.
func TestPFOf(t *testing.T) {
	top := richTopology(t)
	top.All(func(d *Device) bool {
		pf := top.PFOf(d)
		if (pf == nil) != (d.PhysFn == nil) || pf != nil && top.VFs(pf)[d.VFIndex] != d {
			t.Errorf("%s: %v", d.Name, pf)
		}
		return true
	})
}
