package lease

import (
	"strings"
	"testing"

	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/holder"
)

const domain = `<domain type='kvm'>
  <name>web</name>
  <devices>
    <disk type='block'><source dev='/dev/sda'/></disk>
    <interface type='network'><mac address='52:54:00:00:00:09'/></interface>
    <interface type='hostdev' managed='no'>
      <mac address='52:54:00:AA:00:01'/>
      <source><address type='pci' domain='0x0000' bus='0x01' slot='0x10' function='0x2'/></source>
      <vlan><tag id='100'/></vlan>
      <address type='pci' domain='0x0000' bus='0x05' slot='0x00' function='0x0'/>
    </interface>
    <hostdev mode='subsystem' type='usb' managed='yes'><source><vendor id='0x1234'/></source></hostdev>
    <hostdev mode='subsystem' type='pci' managed='yes'><source><address bus='0x3' slot='0x0'/></source></hostdev>
  </devices>
</domain>`

func at(t *testing.T, s string) iommu.Address {
	t.Helper()
	a, err := iommu.ParseAddress(s)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// TestParseDomain: the host's devices are found, and nothing else.
func TestParseDomain(t *testing.T) {
	d, err := ParseDomain([]byte(domain))
	if err != nil {
		t.Fatal(err)
	}
	want := []DomainDevice{
		{Address: at(t, "0000:03:00.0"), Managed: true},
		{Address: at(t, "0000:01:10.2"), MAC: "52:54:00:aa:00:01", VLAN: "100"},
	}
	if d.Name != "web" || len(d.Devices) != 2 || d.Devices[0] != want[0] || d.Devices[1] != want[1] {
		t.Errorf("%+v", d)
	}
	for _, bad := range []string{"", "<domain>", strings.Replace(domain, "0x10'", "0xzz'", 1)} {
		if _, err := ParseDomain([]byte(bad)); err == nil {
			t.Errorf("no error for %q", bad)
		}
	}
}

// TestMismatch: a domain starts only with exactly what is assigned to it.
func TestMismatch(t *testing.T) {
	d, err := ParseDomain([]byte(domain))
	if err != nil {
		t.Fatal(err)
	}

	vf := Device{
		LeaseDevice: holder.LeaseDevice{Address: at(t, "0000:01:10.2")},
		PF:          &iommu.Identity{},
		Now:         sriov.Settings{sriov.MAC: "52:54:00:aa:00:01", sriov.VLAN: "100"},
	}

	own := &Lease{LeaseHead: holder.LeaseHead{Guest: "web"}, From: "net", Devices: []Device{vf}}
	vf.Wanted = vf.Now
	other := vf
	other.Now = sriov.Settings{sriov.MAC: "52:54:00:aa:00:02", sriov.VLAN: "100"}
	vlan := vf
	vlan.Now = sriov.Settings{sriov.MAC: "52:54:00:aa:00:01", sriov.VLAN: "7"}
	none := func(iommu.Address) string { return "" }
	for _, c := range []struct {
		name        string
		own         *Lease
		all         []*Lease
		quarantined func(iommu.Address) string
		want        string
	}{
		{"nobody's", nil, nil, none, ""},
		{"its own", own, []*Lease{own}, none, ""},
		{"another's", nil, []*Lease{{LeaseHead: holder.LeaseHead{Guest: "db"}, Devices: []Device{vf}}}, none,
			`is assigned to guest "db"`},
		{"in quarantine", nil, nil, func(iommu.Address) string { return "dirty" }, "is in quarantine: dirty"},
		{"not in the XML", &Lease{LeaseHead: holder.LeaseHead{Guest: "web"},
			Devices: []Device{{LeaseDevice: holder.LeaseDevice{Address: at(t, "0000:09:00.0")}}}}, nil, none,
			"missing in its XML"},
		{"managed", &Lease{LeaseHead: holder.LeaseHead{Guest: "web"},
			Devices: []Device{{LeaseDevice: holder.LeaseDevice{Address: at(t, "0000:03:00.0")}}}}, nil, none,
			"managed='yes'"},
		{"another MAC", &Lease{LeaseHead: holder.LeaseHead{Guest: "web"}, Devices: []Device{other}}, nil, none,
			"52:54:00:aa:00:02 in its lease"},
		{"another VLAN", &Lease{LeaseHead: holder.LeaseHead{Guest: "web"}, Devices: []Device{vlan}}, nil, none,
			"7 in its lease"},
	} {
		got := strings.Join(d.mismatch(c.own, c.all, c.quarantined), "; ")
		if (got == "") != (c.want == "") || !strings.Contains(got, c.want) {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

// FuzzParseDomain: whatever libvirt may be made to hand over, it is read or refused.
func FuzzParseDomain(f *testing.F) {
	f.Add([]byte(domain))
	f.Add([]byte("<domain><devices><hostdev><source><address bus='0x' slot=''/></source></hostdev></devices></domain>"))
	f.Fuzz(func(t *testing.T, text []byte) {
		d, err := ParseDomain(text)
		if (d == nil) == (err == nil) {
			t.Errorf("%v, %v", d, err)
		}
	})
}

const gib = 1 << 30

// TestOverlaps: where a guest's memory cannot be.
func TestOverlaps(t *testing.T) {
	amd := []iommu.Region{
		{Start: 0xfee00000, End: 0xfeefffff, Type: "msi"},
		{Start: 0xfd00000000, End: 0xffffffffff, Type: "reserved"},
	}
	rmrr := []iommu.Region{
		{Start: 0x7d000000, End: 0x7f7fffff, Type: "direct"},
		{Start: 0, End: 0xffffff, Type: "direct-relaxable"},
	}
	for _, c := range []struct {
		memory  uint64
		moves   bool
		regions []iommu.Region
		want    int
	}{
		{8 * gib, false, amd, 0}, {1008 * gib, false, amd, 0}, {1013 * gib, false, amd, 1}, {1013 * gib, true, amd, 0},
		{gib, false, rmrr, 0}, {2 * gib, false, rmrr, 1}, {64 * gib, true, rmrr, 1}, {0, false, rmrr, 0},
	} {
		if got := overlaps(c.memory, c.moves, c.regions); len(got) != c.want {
			t.Errorf("%d GiB, moves %v: %v", c.memory/gib, c.moves, got)
		}
	}
}
