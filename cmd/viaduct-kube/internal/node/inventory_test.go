package node

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"viaduct/cmd/lease"
	"viaduct/iommu"
)

func address(t *testing.T, s string) iommu.Address {
	t.Helper()
	a, err := iommu.ParseAddress(s)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func ours(l *lease.Lease) bool { return strings.HasPrefix(l.For, "ours") }

// host is a PF with two VFs, which are a pool, and a card of two functions that share a group with a bridge of the host.
func host(t *testing.T) *Facts {
	t.Helper()
	zero := 0
	pf := address(t, "0000:01:00.0")
	vf := func(index int) iommu.Device {
		a := address(t, []string{"0000:01:10.0", "0000:01:10.2"}[index])
		return iommu.Device{
			Name: a.String(), Address: a, PCI: true, PhysFn: &pf, VFIndex: index, NUMANode: &zero,
			ID: iommu.ID{Vendor: 0x8086, Device: 0x10ca, Class: 0x020000},
		}
	}

	function := func(s string, class uint32) iommu.Device {
		a := address(t, s)
		return iommu.Device{Name: s, Address: a, PCI: true, ID: iommu.ID{Class: class}}
	}

	topology := &iommu.Topology{Groups: []iommu.Group{
		{ID: 1, Devices: []iommu.Device{{Name: pf.String(), Address: pf, PCI: true, Driver: "igb",
			SRIOV: &iommu.SRIOV{Total: 7}}}},
		{ID: 2, Devices: []iommu.Device{vf(0)}}, {ID: 3, Devices: []iommu.Device{vf(1)}},
		{ID: 7, Devices: []iommu.Device{
			function("0000:07:00.0", 0x030000), function("0000:07:00.1", 0x040300), function("0000:00:1f.0", 0x060100),
		}},
	}}

	for i := range topology.Groups {
		for j := range topology.Groups[i].Devices {
			topology.Groups[i].Devices[j].Group = &topology.Groups[i].ID
		}
	}

	find := func(s string) *iommu.Device {
		d, err := topology.Find(address(t, s))
		if err != nil {
			t.Fatal(err)
		}
		return d
	}

	return &Facts{
		Topology: topology,
		Pools: []lease.Pool{
			{Name: "net", Devices: []*iommu.Device{find("0000:01:10.0"), find("0000:01:10.2")}},
			{Devices: []*iommu.Device{find("0000:07:00.0")}},
		},
	}
}

func wrongOf(functions []Function) []string {
	var out []string
	for _, f := range functions {
		for _, p := range f.Wrong {
			out = append(out, f.Address.String()+" "+string(p.Reason))
		}
	}
	return out
}

// A declared device comes with what is handed over of its group, and with nothing of the host's.
func TestFunctions(t *testing.T) {
	f := host(t)
	var got []string
	for _, one := range Functions(f, ours) {
		got = append(got, one.Name()+" "+string(one.Kind)+" "+one.Pool)
	}
	want := []string{"0000-01-10-0 vf net", "0000-01-10-2 vf net", "0000-07-00-0 pci ", "0000-07-00-1 pci "}
	if !slices.Equal(got, want) {
		t.Errorf("functions %q, want %q", got, want)
	}
	for _, name := range []string{"0000:01:10.0", "10000:e1:00.3"} {
		a := address(t, name)
		if back, err := ParseName(NameOf(a)); err != nil || back != a {
			t.Errorf("%s is called %s, which is %s, %v", a, NameOf(a), back, err)
		}
	}
	if a, err := ParseName("0000-01-zz-0"); err == nil {
		t.Errorf("no name is %s", a)
	}
}

// What is wrong with a function is said with its reason, and of a lease only once it is ready.
func TestWrong(t *testing.T) {
	vf := address(t, "0000:01:10.0")
	pf := address(t, "0000:01:00.0")
	leased := func(whom string, ready bool) []lease.Lease {
		return []lease.Lease{{Guest: "g", For: whom, Ready: ready, From: []string{vf.String()},
			Devices: []lease.Device{{Address: vf}}}}
	}

	onVFIO := func(f *Facts) {
		d, _ := f.Topology.Find(vf)
		d.Driver, d.VFIO = "vfio-pci", true
	}

	for what, c := range map[string]struct {
		change func(*Facts)
		want   []string
	}{
		"nothing":         {func(*Facts) {}, nil},
		"somebody else's": {func(f *Facts) { f.Leases = leased("", true) }, []string{"0000:01:10.0 guest"}},
		"ours, on no driver": {func(f *Facts) { f.Leases = leased("ours", true) },
			[]string{"0000:01:10.0 driver"}},
		"ours, to be made in a boot": {func(f *Facts) { f.Leases = leased("ours", false) }, nil},
		"ours": {func(f *Facts) {
			f.Leases = leased("ours", true)
			onVFIO(f)
		}, nil},
		"without a node": {func(f *Facts) {
			f.Leases = leased("ours", true)
			onVFIO(f)
			f.Missing = map[iommu.Address]string{vf: "/dev/vfio/2"}
		}, []string{"0000:01:10.0 node"}},
		"no link": {func(f *Facts) { f.Link = map[iommu.Address]string{pf: "eth0"} },
			[]string{"0000:01:10.0 link", "0000:01:10.2 link"}},
		"in quarantine": {func(f *Facts) { f.Keeps = map[iommu.Address]string{vf: "why"} },
			[]string{"0000:01:10.0 quarantine"}},
		"its PF has no driver": {func(f *Facts) {
			d, _ := f.Topology.Find(pf)
			d.Driver = ""
		}, []string{"0000:01:10.0 pf", "0000:01:10.2 pf"}},
		"gone": {func(f *Facts) {
			f.Leases = leased("ours", true)
			f.Pools = f.Pools[1:]
		}, []string{"0000:01:10.0 lost"}},
	} {
		f := host(t)
		c.change(f)
		if got := wrongOf(Functions(f, ours)); !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, want %q", what, got, c.want)
		}
	}
}

// A container gets one backend's nodes, the group's under the kernel's present number, and never both.
func TestCDI(t *testing.T) {
	nodes := []string{"/dev/vfio/7", "/dev/vfio/devices/vfio0"}
	for b, want := range map[Backend][]string{
		Group: {"/dev/vfio/vfio", "/dev/vfio/7"}, IOMMUFD: {"/dev/iommu", "/dev/vfio/devices/vfio0"},
	} {
		if got, err := Pick(nodes, b); err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %q, %v", b, got, err)
		}
	}
	for _, none := range [][]string{nil, {"/dev/vfio/noiommu-0"}, {"/dev/vfio/devices/vfio0"}} {
		if got, err := Pick(none, Group); err == nil {
			t.Errorf("of %q: %q", none, got)
		}
	}

	dir := t.TempDir()
	functions := Functions(host(t), ours)
	vf := address(t, "0000:01:10.0")
	for _, number := range []string{"/dev/vfio/7", "/dev/vfio/107"} {
		if err := WritePools(dir, "viaduct.dev", functions, map[iommu.Address][]string{vf: {number}}); err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(filepath.Join(dir, "viaduct.dev-pool-net.json"))
		if err != nil {
			t.Fatal(err)
		}
		var s Spec
		if err := json.Unmarshal(text, &s); err != nil {
			t.Fatal(err)
		}
		if s.Kind != "viaduct.dev/net" || len(s.Devices) != 1 || s.Devices[0].Name != vf.String() ||
			s.Devices[0].Edits.Nodes[1].Path != number {
			t.Errorf("%s", text)
		}
	}
	if err := WritePools(dir, "viaduct.dev", nil, nil); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("of no pools: %v, %v", left, err)
	}
}

// Settings say who serves what, and what is not known in them is refused.
func TestSettings(t *testing.T) {
	s, err := ParseSettings([]byte("pools: {old: device-plugin}\ntaints: {link: NoExecute}\n"))
	if err != nil || s.Provider("old") != DevicePlugin || s.Provider("net") != DRA || s.Effect(NoLink) != NoExecute ||
		s.Effect(NoDriver) != NoExecute || s.Effect(Quarantine) != NoSchedule {
		t.Errorf("%+v, %v", s, err)
	}
	for _, wrong := range []string{
		"pool: {}", "pools: {net: both}", "taints: {colour: NoExecute}", "taints: {link: Kill}",
		"pools: {'': device-plugin}",
	} {
		if s, err := ParseSettings([]byte(wrong)); err == nil {
			t.Errorf("%s: %+v", wrong, s)
		}
	}
	if s, err := LoadSettings(filepath.Join(t.TempDir(), "none")); err != nil || s.Provider("net") != DRA {
		t.Errorf("without a file: %+v, %v", s, err)
	}
	for pool, ok := range map[string]bool{"net": true, "gpu-a": true, "Net": false, "a_b": false, "": false,
		"1a": false, "a-": false} {
		if err := CheckPool(pool); (err == nil) != ok {
			t.Errorf("%q: %v", pool, err)
		}
	}
}

// A function has one provider: another one of this node's is refused while a pod has it, and others' always.
func TestOneProvider(t *testing.T) {
	f := host(t)
	vf := address(t, "0000:01:10.0")
	f.Leases = []lease.Lease{{Guest: "g", For: "ours pod a/b", Ready: true, Devices: []lease.Device{{Address: vf}}}}
	functions := Functions(f, ours)
	dra, old := &Settings{}, &Settings{Pools: map[string]Provider{"net": DevicePlugin}}
	file := filepath.Join(t.TempDir(), "providers.json")
	if err := dra.NewRecord(functions, nil).Write(file); err != nil {
		t.Fatal(err)
	}
	record, err := ReadRecord(file)
	if err != nil || record[vf.String()] != DRA || len(record) != 4 {
		t.Fatalf("%v, %v", record, err)
	}
	if err := dra.Changed(functions, record, ours); err != nil {
		t.Error(err)
	}
	if err := old.Changed(functions, record, ours); err == nil || !strings.Contains(err.Error(), "ours pod a/b") ||
		strings.Contains(err.Error(), "0000:01:10.2") {
		t.Errorf("another provider: %v", err)
	}

	claims := []Claim{{"intel.com/vfs", vf}, {"driver sriovnetwork.k8snetworkplumbingwg.io", vf},
		{"other/one", address(t, "0000:99:00.0")}}
	err = dra.RefuseShared(functions, claims)
	if err == nil || !strings.Contains(err.Error(), "intel.com/vfs gives out 0000:01:10.0 too") ||
		!strings.Contains(err.Error(), "driver sriovnetwork") || strings.Contains(err.Error(), "other/one") {
		t.Errorf("%v", err)
	}
	if err := (&Settings{Pools: map[string]Provider{"net": Nobody}}).RefuseShared(functions, claims); err != nil {
		t.Errorf("that nobody serves here: %v", err)
	}
}
