package migrate

import (
	"encoding/json"
	"slices"
	"testing"

	"viaduct/cmd/internal/vmm"
	"viaduct/iommu"
	"viaduct/sriov"
)

func example() (*Guest, *Facts) {
	yes := true
	g := &Guest{Name: "web", From: "net", VM: &vmm.Machine{Standby: "br0", Memory: 1 << 40, CPU: "host", Words: true},
		Devices: []GuestDevice{{Address: "0000:01:10.0", PF: "0000:01:00.0",
			Settings: sriov.Settings{"mac": theAddress, "vlan": "7"}}}}
	f := &Facts{Host: "b", Arch: "x86_64", Kernel: "6.12", CPU: &CPU{Vendor: "GenuineIntel", Flags: []string{"avx"}},
		Remapping: &yes,
		Units:     []Unit{{Name: "dmar0", Bits: 48}}, Memory: &Memory{Total: 1 << 42, Available: 1 << 41},
		Ports: []Port{{Address: "0000:01:00.0", Netdev: "eth0", MTU: 1500, Carrier: &yes,
			VFs: []VF{{Address: "0000:01:10.0", Pool: "net", Free: true, Unit: "dmar0",
				Regions: []iommu.Region{{Start: 0, End: 1, Type: "reserved"}}}}}},
		Bridges: []iommu.Bridge{{Name: "br0", Up: true, Filtering: true, PVID: 7, MTU: 1500,
			Ports: []iommu.BridgePort{{Name: "eth0", VLANs: []iommu.PortVLAN{{ID: 7}}}}}}}
	return g, f
}

// What the guest's own QEMU, and the other host's, answered counts.
func TestAsked(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*Guest, *Facts)
		check  string
		want   Result
	}{
		"it runs":      {func(g *Guest, _ *Facts) { g.State.Status = "running" }, "running", OK},
		"it is paused": {func(g *Guest, _ *Facts) { g.State.Status = "paused" }, "running", Refuse},
		"another move": {func(g *Guest, _ *Facts) { g.State.Status, g.State.Migration = "running", "active" },
			"running", Refuse},
		"a job": {func(g *Guest, _ *Facts) { g.State.Status, g.State.Jobs = "running", 1 }, "running", Refuse},
		"its VF keeps it": {func(g *Guest, _ *Facts) {
			g.State.Blocked = []string{"0000:01:10.0: VFIO migration is not supported in kernel"}
		}, "blocked", OK},
		"a disk keeps it": {func(g *Guest, _ *Facts) {
			g.State.Blocked = []string{"The vvfat (rw) format used by node 'x' does not support live migration"}
		}, "blocked", Refuse},
		"no disk there": {func(g *Guest, _ *Facts) { g.State.Disks = []Disk{{Path: "/a", There: new(bool)}} },
			"disks", Refuse},
		"a disk, unasked":   {func(g *Guest, _ *Facts) { g.State.Disks = []Disk{{Path: "/a"}} }, "disks", Unknown},
		"it has not its VF": {func(g *Guest, _ *Facts) { g.State.Primary = new(bool) }, "pair", Refuse},
		"no pair":           {func(*Guest, *Facts) {}, "pair", Refuse},
		"an older QEMU": {func(g *Guest, f *Facts) { g.State.Version, f.QEMU = "9.2.0", &QEMU{Version: "8.2.1"} },
			"qemu-version", Refuse},
		"a newer QEMU": {func(g *Guest, f *Facts) { g.State.Version, f.QEMU = "9.2.0", &QEMU{Version: "10.0.2"} },
			"qemu-version", OK},
		"no such machine": {func(g *Guest, f *Facts) {
			g.State.Machine, f.QEMU = "pc-q35-9.2",
				&QEMU{Machines: []string{"q35"}}
		}, "machine", Refuse},
		"such a machine": {func(g *Guest, f *Facts) {
			g.State.Machine, f.QEMU = "pc-q35-9.2", &QEMU{Machines: []string{"pc-q35-9.2"}}
		}, "machine", OK},
		"QEMU does not take it": {func(_ *Guest, f *Facts) { f.QEMU = &QEMU{Refused: "CPU model"} },
			"qemu-start", Refuse},
		"it is heard": {func(_ *Guest, f *Facts) { f.Heard = map[string]string{theAddress: "eth0"} },
			"same-network", OK},
		"it is not heard":        {func(_ *Guest, f *Facts) { f.Heard = map[string]string{} }, "same-network", Warn},
		"nobody has its address": {func(_ *Guest, f *Facts) { f.Live = true }, "address", OK},
	} {
		g, to := example()
		_, from := example()
		g.State = &VMState{}
		c.change(g, to)
		lines := Check(g, from, to, Wish{}).Lines
		i := slices.IndexFunc(lines, func(l Line) bool { return l.Check == c.check })
		if i < 0 || lines[i].Result != c.want {
			t.Errorf("%s: %s is to be %s: %+v", name, c.check, c.want, lines)
		}
	}
}

// Whatever another host, or a snapshot, tells of itself, nothing panics.
func FuzzCheck(f *testing.F) {
	g, facts := example()
	b, err := json.Marshal(facts)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b, "failover")
	f.Add([]byte(`{"iommus":[{"name":"dmar0","address_bits":-1}],"pfs":[{"vfs":[{"pool":"net"}]}]}`), "vfio")
	f.Fuzz(func(t *testing.T, text []byte, by string) {
		var other Facts
		if json.Unmarshal(text, &other) != nil {
			return
		}
		_, here := example()
		if r := Check(g, here, &other, Wish{By: Way(by)}); len(r.Lines) == 0 {
			t.Error("no lines")
		}
		_ = Check(g, &other, here, Wish{})
	})
}
