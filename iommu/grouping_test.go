package iommu

import (
	"encoding/binary"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"testing"

	"viaduct/internal/host/hosttest"
)

// part is a function of a made-up host: where it is, below which others, and what its config space says.
type part struct {
	path  string // the addresses from the root bus down, the last its own
	ids   string // vendor:device, or vendor:device:subvendor:subdevice; 1234:0001 if it is ""
	class uint32
	kind  PortType // conventional PCI if it is none
	many  bool     // the header's bit
	acs   string   // capability/control, both in hexadecimal; "" for none
	bytes map[int]uint32
	pf    string // of a VF
}

// none is that of conventional PCI.
const none PortType = 0xf

func (p part) address() string {
	return p.path[strings.LastIndex(p.path, "/")+1:]
}

func (p part) config() string {
	size := 0x1000
	if p.kind == none {
		size = 0x100
	}

	b := make([]byte, size)
	put := func(at int, v uint32) { binary.LittleEndian.PutUint32(b[at:], v) }
	id := p.id()
	put(0, uint32(id.Device)<<16|uint32(id.Vendor))
	put(8, id.Class<<8)
	if id.Class>>8 == 0x0604 {
		b[0x0e] = 1
	}
	if p.many {
		b[0x0e] |= 0x80
	}

	if p.kind != none {
		b[0x06], b[0x34] = 0x10, 0x40
		put(0x40, 0x0010|uint32(p.kind)<<20|2<<16)
	}

	if p.acs != "" {
		var capability, control uint32
		if _, err := fmt.Sscanf(p.acs, "%x/%x", &capability, &control); err != nil {
			panic(err)
		}
		put(0x100, 0x0001000d)
		put(0x104, control<<16|capability)
	}

	for at, v := range p.bytes {
		put(at, v)
	}

	return string(b)
}

func (p part) id() ID {
	id := ID{Vendor: 0x1234, Device: 1, Class: p.class}
	_, _ = fmt.Sscanf(strings.ReplaceAll(p.ids, ":", " "), "%x %x %x %x", &id.Vendor, &id.Device, &id.Subvendor,
		&id.Subdevice)
	if id.Class == 0 && (p.kind == RootPort || p.kind == UpstreamPort || p.kind == DownstreamPort ||
		p.kind == PCIeToPCIBridge) {
		id.Class = 0x060400
	}
	return id
}

// tree is the host.
func tree(parts []part) hosttest.Tree {
	t := hosttest.Tree{"sys/kernel/": "", "sys/class/net/": ""}
	for _, p := range parts {
		domain, _, _ := strings.Cut(p.path, ":")
		dir := "sys/devices/pci" + domain + ":00/" + p.path
		t["sys/bus/pci/devices/"+p.address()] = "-> ../../../" + strings.TrimPrefix(dir, "sys/")
		t[dir+"/modalias"] = p.id().Modalias() + "\n"
		t[dir+"/config"] = p.config()
		if p.pf != "" {
			for _, other := range parts {
				if other.address() == p.pf {
					pf := path.Join(path.Dir(dir), p.pf)
					t[dir+"/physfn"] = "-> ../" + p.pf
					t[pf+"/sriov_totalvfs"] = "8\n"
					t[pf+"/virtfn0"] = "-> ../" + p.address()
				}
			}
		}
	}
	return t
}

func openTree(t *testing.T, tree hosttest.Tree) (*Host, *Topology) {
	t.Helper()
	h, err := Open(tree.Dir(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = h.Close() })
	top, err := Scan(h)
	if err != nil {
		t.Fatal(err)
	}
	return h, top
}

// groupsBy are the groups of a host, each as its addresses without the domain 0000; "?" is for what is not known.
func groupsBy(t *testing.T, tree hosttest.Tree) string {
	t.Helper()
	h, top := openTree(t, tree)
	g, err := NewGrouping(h)
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	top.All(func(d *Device) bool {
		c := g.Of(d.Address)
		var names []string
		for _, m := range c.Members {
			names = append(names, strings.TrimPrefix(m.String(), "0000:"))
		}
		if !c.Known {
			names = []string{"?" + strings.TrimPrefix(d.Name, "0000:")}
			if len(c.Unread) == 0 {
				t.Errorf("%s is not known, and nothing is said of why", d.Name)
			}
		}
		found[strings.Join(names, " ")] = true
		return true
	})
	return strings.Join(slices.Sorted(maps.Keys(found)), ", ")
}

const (
	port = "0000:00:01.0"
	on   = "5d/1d"
)

func TestGroups(t *testing.T) {
	for name, c := range map[string]struct {
		parts []part
		want  string
	}{
		"a port that isolates": {
			[]part{{path: port, kind: RootPort, acs: on}, {path: port + "/0000:01:00.0"}},
			"00:01.0, 01:00.0",
		},
		"a port without ACS": {
			[]part{{path: port, kind: RootPort}, {path: port + "/0000:01:00.0"}},
			"00:01.0 01:00.0",
		},
		"ACS that is off in part": {
			[]part{{path: port, kind: RootPort, acs: "1d/19"}, {path: port + "/0000:01:00.0"}},
			"00:01.0 01:00.0",
		},
		"what ACS has not got is on": {
			[]part{{path: port, kind: RootPort, acs: "0c/0c"}, {path: port + "/0000:01:00.0"}},
			"00:01.0, 01:00.0",
		},
		"two functions without ACS": {
			[]part{{path: port, kind: RootPort, acs: on}, {path: port + "/0000:01:00.0", many: true},
				{path: port + "/0000:01:00.1"}},
			"00:01.0, 01:00.0 01:00.1",
		},
		"two functions with ACS": {
			[]part{
				{path: port, kind: RootPort, acs: on}, {path: port + "/0000:01:00.0", many: true, acs: "c/c"},
				{path: port + "/0000:01:00.1", acs: "c/c"},
			},
			"00:01.0, 01:00.0, 01:00.1",
		},
		"one of two functions with ACS": {
			[]part{
				{path: port, kind: RootPort, acs: on}, {path: port + "/0000:01:00.0", many: true, acs: "c/c"},
				{path: port + "/0000:01:00.1"}, {path: port + "/0000:01:00.2"},
			},
			"00:01.0, 01:00.0, 01:00.1 01:00.2",
		},
		"a VF is no function of its slot": {
			[]part{
				{path: port, kind: RootPort, acs: on}, {path: port + "/0000:01:00.0", many: true},
				{path: port + "/0000:01:00.1", pf: "0000:01:00.0"}, {path: port + "/0000:01:00.2"},
			},
			"00:01.0, 01:00.0 01:00.2, 01:00.1",
		},
		"a switch that does not isolate": {
			[]part{
				{path: port, kind: RootPort, acs: on}, {path: port + "/0000:01:00.0", kind: UpstreamPort},
				{path: port + "/0000:01:00.0/0000:02:00.0", kind: DownstreamPort},
				{path: port + "/0000:01:00.0/0000:02:01.0", kind: DownstreamPort},
				{path: port + "/0000:01:00.0/0000:02:00.0/0000:03:00.0"},
				{path: port + "/0000:01:00.0/0000:02:01.0/0000:04:00.0"},
			},
			"00:01.0, 01:00.0, 02:00.0 03:00.0, 02:01.0 04:00.0",
		},
		"the ports of a switch are functions of one slot": {
			[]part{
				{path: port, kind: RootPort, acs: on}, {path: port + "/0000:01:00.0", kind: UpstreamPort},
				{path: port + "/0000:01:00.0/0000:02:00.0", kind: DownstreamPort, many: true},
				{path: port + "/0000:01:00.0/0000:02:00.1", kind: DownstreamPort},
				{path: port + "/0000:01:00.0/0000:02:00.0/0000:03:00.0"},
				{path: port + "/0000:01:00.0/0000:02:00.1/0000:04:00.0"},
			},
			"00:01.0, 01:00.0, 02:00.0 02:00.1 03:00.0 04:00.0",
		},
		"a switch that isolates below a port that does not": {
			[]part{
				{path: port, kind: RootPort}, {path: port + "/0000:01:00.0", kind: UpstreamPort},
				{path: port + "/0000:01:00.0/0000:02:00.0", kind: DownstreamPort, acs: on},
				{path: port + "/0000:01:00.0/0000:02:00.0/0000:03:00.0"},
			},
			"00:01.0 01:00.0 02:00.0 03:00.0",
		},
		"an upstream port that says it is a downstream port": {
			[]part{
				{path: port, kind: RootPort, acs: on}, {path: port + "/0000:01:00.0", kind: DownstreamPort},
				{path: port + "/0000:01:00.0/0000:02:00.0", kind: DownstreamPort, acs: on},
				{path: port + "/0000:01:00.0/0000:02:00.0/0000:03:00.0"},
			},
			"00:01.0, 01:00.0, 02:00.0, 03:00.0",
		},
		"conventional PCI behind a bridge": {
			[]part{
				{path: port, kind: RootPort, acs: on}, {path: port + "/0000:01:00.0", kind: PCIeToPCIBridge},
				{path: port + "/0000:01:00.0/0000:02:01.0", kind: none},
				{path: port + "/0000:01:00.0/0000:02:02.0", kind: none},
			},
			"00:01.0, 01:00.0 02:01.0 02:02.0",
		},
		"the functions of the chipset": {
			[]part{
				{path: "0000:00:1f.0", kind: none, many: true, class: 0x060100},
				{path: "0000:00:1f.3", kind: none, class: 0x0c0500},
				{path: "0000:00:1e.0", kind: none},
			},
			"00:1e.0, 00:1f.0 00:1f.3",
		},
		"more than eight functions": {
			[]part{
				{path: port, kind: RootPort, acs: on}, {path: port + "/0000:01:00.0", many: true},
				{path: port + "/0000:01:01.0"}, {path: port + "/0000:01:01.1"},
			},
			"00:01.0, 01:00.0, 01:01.0 01:01.1",
		},
		"a disk behind VMD": {
			[]part{
				{path: "0000:00:0e.0", kind: IntegratedEndpoint},
				{path: "0000:00:0e.0/pci10000:00/10000:00:01.0", kind: RootPort, acs: on},
				{path: "0000:00:0e.0/pci10000:00/10000:00:01.0/10000:01:00.0"},
			},
			"00:0e.0 10000:00:01.0 10000:01:00.0",
		},
		"a vouched card": {
			[]part{
				{path: port, kind: RootPort, acs: on}, {path: port + "/0000:01:00.0", many: true, ids: "8086:1521"},
				{path: port + "/0000:01:00.1", ids: "8086:1521"},
			},
			"00:01.0, 01:00.0, 01:00.1",
		},
		"a maker whose other cards are not": {
			[]part{
				{path: port, kind: RootPort, acs: on}, {path: port + "/0000:01:00.0", many: true, acs: "c/c",
					ids: "8088:9999"},
				{path: port + "/0000:01:00.1", acs: "c/c", ids: "8088:9999"},
				{path: port + "/0000:01:00.2", ids: "8088:1001"},
			},
			"00:01.0, 01:00.0 01:00.1, 01:00.2",
		},
		"a port of Intel's chipset whose switch is on, and one whose is not": {
			[]part{
				{path: port, kind: RootPort, ids: "8086:1c10", bytes: map[int]uint32{0xd8: 1 << 26}},
				{path: port + "/0000:01:00.0"},
				{path: "0000:00:02.0", kind: RootPort, ids: "8086:1c10"}, {path: "0000:00:02.0/0000:02:00.0"},
			},
			"00:01.0, 00:02.0 02:00.0, 01:00.0",
		},
		"ACS in dwords": {
			[]part{
				{path: port, kind: RootPort, ids: "8086:a110", acs: "f/0", bytes: map[int]uint32{0x108: 0xf}},
				{path: port + "/0000:01:00.0"},
				{path: "0000:00:02.0", kind: RootPort, ids: "8086:a110", acs: "f/f"},
				{path: "0000:00:02.0/0000:02:00.0"},
			},
			"00:01.0, 00:02.0 02:00.0, 01:00.0",
		},
		"a port that isolates without ACS, and another of the same maker": {
			[]part{
				{path: port, kind: RootPort, ids: "1d17:0721"}, {path: port + "/0000:01:00.0"},
				{path: "0000:00:02.0", kind: RootPort, ids: "1d17:0800", acs: on}, {path: "0000:00:02.0/0000:02:00.0"},
			},
			"00:01.0, 00:02.0 02:00.0, 01:00.0",
		},
		"part of an Intel processor": {
			[]part{{path: "0000:00:02.0", kind: IntegratedEndpoint, many: true, ids: "8086:4680"},
				{path: "0000:00:02.1", kind: IntegratedEndpoint, ids: "8086:4681"}},
			"00:02.0, 00:02.1",
		},
		"part of another's": {
			[]part{{path: "0000:00:02.0", kind: IntegratedEndpoint, many: true},
				{path: "0000:00:02.1", kind: IntegratedEndpoint}},
			"00:02.0 00:02.1",
		},
		"DMA as function 1": {
			[]part{
				{path: port, kind: RootPort, acs: on}, {path: port + "/0000:01:00.0", ids: "1b4b:9123", many: true,
					acs: "c/c"},
				{path: port + "/0000:01:00.1", acs: "c/c"}, {path: port + "/0000:01:00.2", acs: "c/c"},
			},
			"00:01.0, 01:00.0 01:00.1, 01:00.2",
		},
		"DMA as another device": {
			[]part{
				{path: "0000:00:0e.0", kind: none, ids: "9005:0285:9005:02bb"}, {path: "0000:00:01.0", kind: none},
				{path: "0000:00:02.0", kind: none},
			},
			"00:01.0 00:0e.0, 00:02.0",
		},
		"DMA as it itself knows": {
			[]part{
				{path: port, kind: RootPort, acs: on}, {path: port + "/0000:01:00.0", many: true},
				{path: port + "/0000:01:00.1", ids: "11f8:8531", class: 0x068000},
			},
			"?00:01.0, ?01:00.0, ?01:00.1",
		},
		"a switch whose source validation is broken": {
			[]part{
				{path: port, kind: RootPort, ids: "111d:8090", acs: "1d/1c"}, {path: port + "/0000:01:00.0"},
				{path: "0000:00:02.0", kind: RootPort, ids: "111d:8090", acs: "1d/18"},
				{path: "0000:00:02.0/0000:02:00.0"},
			},
			"00:01.0, 00:02.0 02:00.0, 01:00.0",
		},
		"an event collector": {
			[]part{{path: "0000:00:03.0", kind: IntegratedEndpoint, many: true},
				{path: "0000:00:03.1", kind: EventCollector}},
			"00:03.0 00:03.1",
		},
	} {
		if got := groupsBy(t, tree(c.parts)); got != c.want {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
}

// ivrsOf is a table with these device entries, in hexadecimal.
func ivrsOf(entries string) string {
	block := hosttest.IVRSBlock("10 00", "0200 4000 0000f0fd00000000 0000 0000 00000000 "+entries)
	return string(hosttest.ACPITable("IVRS", 2, "43302000 0000000000000000", block))
}

// The firmware's aliases join, if they are on the same bus. Where the table should be and cannot be read, nothing is
// known of devices with others on their bus.
func TestFirmwareAliases(t *testing.T) {
	parts := []part{
		{path: "0000:00:01.0", kind: none}, {path: "0000:00:02.0", kind: none}, {path: "0000:00:03.0", kind: none},
		{path: "0000:00:04.0", kind: RootPort, acs: on}, {path: "0000:00:04.0/0000:01:00.0"},
	}
	const alone = "00:01.0, 00:02.0, 00:03.0, 00:04.0, 01:00.0"
	for name, c := range map[string]struct{ entries, want string }{
		"none":           {"03080000" + "04ffff00", alone},
		"one":            {"42180000" + "00080000", "00:01.0 00:03.0, 00:02.0, 00:04.0, 01:00.0"},
		"of another bus": {"42000100" + "00100000", alone},
		"a range":        {"43080000" + "00180000" + "04170000", "00:01.0 00:02.0 00:03.0, 00:04.0, 01:00.0"},
		"an ended range": {"43080000" + "00180000" + "03080000" + "04170000", alone},
		"itself":         {"42080000" + "00080000", alone},
		"the last of two": {"42180000" + "00080000" + "42180000" + "00100000",
			"00:01.0, 00:02.0 00:03.0, 00:04.0, 01:00.0"},
	} {
		host := tree(parts)
		host["sys/firmware/acpi/tables/IVRS"] = ivrsOf(c.entries)
		if got := groupsBy(t, host); got != c.want {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
	host := tree(parts)
	host["sys/class/iommu/ivhd0/"] = ""
	if got, want := groupsBy(t, host), "01:00.0, ?00:01.0, ?00:02.0, ?00:03.0, ?00:04.0"; got != want {
		t.Errorf("without the table: %s, want %s", got, want)
	}
}

// AMD's chipset isolates where there is an IVRS table.
func TestSouthbridge(t *testing.T) {
	parts := []part{
		{path: "0000:00:14.0", kind: none, many: true, ids: "1002:4385"},
		{path: "0000:00:14.2", kind: none, ids: "1002:4383"},
		{path: "0000:00:14.5", kind: none, ids: "1022:1234"},
	}
	for ivrs, want := range map[bool]string{false: "00:14.0 00:14.2 00:14.5", true: "00:14.0, 00:14.2, 00:14.5"} {
		host := tree(parts)
		if ivrs {
			host["sys/firmware/acpi/tables/IVRS"] = ivrsOf("")
		}
		if got := groupsBy(t, host); got != want {
			t.Errorf("IVRS %v: %s, want %s", ivrs, got, want)
		}
	}
}

// Where config space ends at 64 bytes, as for users without CAP_SYS_ADMIN, or at 256, nothing is known that hangs on the
// rest; what does not is.
func TestPartOfConfig(t *testing.T) {
	parts := []part{
		{path: port, kind: RootPort, acs: on}, {path: port + "/0000:01:00.0"},
		{path: "0000:00:02.0"}, {path: "0000:00:03.0", many: true}, {path: "0000:00:03.1"},
	}
	for size, want := range map[int]string{
		0x1000: "00:01.0, 00:02.0, 00:03.0 00:03.1, 01:00.0",
		0x100:  "00:02.0, ?00:01.0, ?00:03.0, ?00:03.1, ?01:00.0",
		0x40:   "00:02.0, ?00:01.0, ?00:03.0, ?00:03.1, ?01:00.0",
		0x10:   "00:02.0, ?00:01.0, ?00:03.0, ?00:03.1, ?01:00.0",
	} {
		host := tree(parts)
		for name, content := range host {
			if path.Base(name) == "config" && len(content) > size {
				host[name] = content[:size]
			}
		}
		if got := groupsBy(t, host); got != want {
			t.Errorf("%#x bytes: %s, want %s", size, got, want)
		}
	}
}

// What no IOMMU is in front of is in no group, and joins none.
func TestUnmanaged(t *testing.T) {
	parts := []part{{path: port, kind: RootPort}, {path: port + "/0000:01:00.0"}, {path: port + "/0000:01:00.1"}}
	host := tree(parts)
	host["sys/class/iommu/smmu3.0/"] = ""
	for _, p := range []string{port, port + "/0000:01:00.0"} {
		host["sys/devices/pci0000:00/"+p+"/iommu"] = "-> /sys/class/iommu/smmu3.0"
	}
	if got, want := groupsBy(t, host), ", 00:01.0 01:00.0"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// A group of a captured host of the lab is the kernel's, and config space is read of those devices alone that matter.
func TestGroupsOfLab(t *testing.T) {
	host := hosttest.Load(t, "../internal/host/hosttest/testdata/why.txt")
	h, top := openTree(t, host)
	g, err := NewGrouping(h)
	if err != nil {
		t.Fatal(err)
	}
	for i := range top.Groups {
		want := top.Groups[i].Devices
		for j := range want {
			c := g.Of(want[j].Address)
			if !c.Known || !slices.EqualFunc(c.Members, want,
				func(a Address, d Device) bool { return a == d.Address }) {
				t.Errorf("group %d, by %s: %v, known %v", top.Groups[i].ID, want[j].Name, c.Members, c.Known)
			}
		}
	}

	for name := range host {
		if path.Base(name) == "config" && !strings.Contains(name, "0000:00:05.0/config") &&
			!strings.Contains(name, "0000:01:00.0/config") {
			host[name] = host[name][:64]
		}
	}
	h, top = openTree(t, host)
	if g, err = NewGrouping(h); err != nil {
		t.Fatal(err)
	}
	d, err := top.Find(Address{Bus: 1})
	if err != nil {
		t.Fatal(err)
	}
	if c := g.Of(d.Address); !c.Known || len(c.Members) != 1 {
		t.Errorf("%+v", c)
	}
}

// What could not be read is named as what it is: config space, the firmware's table, or a device's own memory.
func TestMissing(t *testing.T) {
	const dir = "sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0"
	parts := []part{
		{path: port, kind: RootPort, acs: on}, {path: port + "/0000:01:00.0", many: true},
		{path: port + "/0000:01:00.1"},
	}

	const table = "the firmware's IVRS table, by which devices do DMA as others, "
	for name, c := range map[string]struct {
		parts []part
		more  hosttest.Tree
		want  []string
	}{
		"nothing": {parts, nil, nil},
		"config space": {parts, hosttest.Tree{dir + "/config": hosttest.Gone},
			[]string{"config space of 0000:01:00.0 is not there, or was not captured"}},
		"part of it": {parts, hosttest.Tree{dir + "/config": parts[1].config()[:64]},
			[]string{"config space of 0000:01:00.0 could be read only in part (that takes root)"}},
		"no table": {parts, hosttest.Tree{"sys/class/iommu/ivhd0/x": ""},
			[]string{table + "is not there, or was not captured"}},
		"a table cut short": {parts, hosttest.Tree{"sys/firmware/acpi/tables/IVRS": "IVRS"},
			[]string{table + "cannot be read: "}},
		"a device's memory": {append(parts[:2:2], part{path: port + "/0000:01:00.1", ids: "11f8:4000",
			class: 0x068000}), nil,
			[]string{"as which functions 0000:01:00.1 does DMA stands in its own memory alone"}},
	} {
		h, _ := openTree(t, tree(c.parts).With(c.more))
		g, err := NewGrouping(h)
		if err != nil {
			t.Fatal(err)
		}
		got := g.Of(Address{Bus: 1})
		if len(got.Missing) != len(c.want) || got.Known != (len(c.want) == 0) {
			t.Errorf("%s: %+v, want %q", name, got, c.want)
			continue
		}
		for i, want := range c.want {
			if !strings.HasPrefix(got.Missing[i], want) {
				t.Errorf("%s: %q, want %q", name, got.Missing[i], want)
			}
		}
	}
}
