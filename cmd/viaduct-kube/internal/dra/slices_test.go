package dra

import (
	"fmt"
	"slices"
	"testing"

	resource "k8s.io/api/resource/v1"
	"k8s.io/dynamic-resource-allocation/resourceslice"

	"viaduct/cmd/viaduct-kube/internal/node"
	"viaduct/iommu"
)

func at(t testing.TB, s string) iommu.Address {
	t.Helper()
	a, err := iommu.ParseAddress(s)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// cards are functions: PFs that are published beside their VFs, and cards of two functions in one group.
func cards(t testing.TB, n int) []node.Function {
	t.Helper()
	var out []node.Function
	for i := range n {
		group := i
		pf := at(t, fmt.Sprintf("%04x:%02x:00.0", i/200, i%200))
		one := node.Function{Address: pf, Kind: node.PF, Group: &group, Pool: "net"}
		vfGroup := n + i
		vf := node.Function{Address: at(t, fmt.Sprintf("%04x:%02x:10.0", i/200, i%200)), Kind: node.VF, PF: &pf,
			Group: &vfGroup, Pool: "net"}
		out = append(out, one, vf)
	}
	return out
}

// within checks a pool against the API's limits.
func within(t *testing.T, p *resourceslice.Pool) (devices, sets int) {
	t.Helper()
	names := map[string]bool{}
	for _, s := range p.Slices {
		if len(s.Devices) > 0 && len(s.SharedCounters) > 0 {
			t.Error("a slice has devices and counters")
		}
		if len(s.Devices) > resource.ResourceSliceMaxDevicesWithAdvancedFeatures ||
			len(s.SharedCounters) > resource.ResourceSliceMaxCounterSets {
			t.Errorf("a slice has %d devices, %d sets", len(s.Devices), len(s.SharedCounters))
		}
		for _, set := range s.SharedCounters {
			names[set.Name] = true
		}
		sets += len(s.SharedCounters)
		devices += len(s.Devices)
	}

	for _, s := range p.Slices {
		for _, d := range s.Devices {
			if len(d.ConsumesCounters) > resource.ResourceSliceMaxDeviceCounterConsumptionsPerDevice ||
				len(d.Attributes) > 32 {
				t.Errorf("%s consumes %d, and has %d attributes", d.Name, len(d.ConsumesCounters), len(d.Attributes))
			}
			for _, c := range d.ConsumesCounters {
				if !names[c.CounterSet] {
					t.Errorf("%s consumes of %s, which is not there", d.Name, c.CounterSet)
				}
			}
		}
	}

	return devices, sets
}

// Many functions are published in as many slices as the API's limits take.
func TestPoolLimits(t *testing.T) {
	p := Pool("viaduct.dev", cards(t, 100), &node.Settings{})
	if devices, sets := within(t, &p); devices != 200 || sets != 100 || len(p.Slices) != 13+4 {
		t.Errorf("%d devices, %d sets, %d slices", devices, sets, len(p.Slices))
	}
	if p := Pool("viaduct.dev", nil, &node.Settings{}); len(p.Slices) != 1 || len(p.Slices[0].Devices) > 0 {
		t.Errorf("of nothing: %+v", p)
	}
}

// takes is what a device consumes of each set.
func takes(p *resourceslice.Pool, name string) map[string]int64 {
	out := map[string]int64{}
	for _, s := range p.Slices {
		for _, d := range s.Devices {
			for _, c := range d.ConsumesCounters {
				if d.Name == name {
					value := c.Counters[counter].Value
					out[c.CounterSet] = value.Value()
				}
			}
		}
	}
	return out
}

// has is what a set has.
func has(p *resourceslice.Pool, name string) int64 {
	for _, s := range p.Slices {
		for _, set := range s.SharedCounters {
			if set.Name == name {
				value := set.Counters[counter].Value
				return value.Value()
			}
		}
	}
	return -1
}

// Members of one group exclude each other, and so do a PF and its VFs; VFs do not exclude VFs, and what shares nothing
// counts nothing.
func TestCounters(t *testing.T) {
	pf, group, own, other, alone := at(t, "0000:01:00.0"), 7, 1, 2, 3
	p := Pool("viaduct.dev", []node.Function{
		{Address: pf, Kind: node.PF, Group: &own},
		{Address: at(t, "0000:01:10.0"), Kind: node.VF, PF: &pf, Group: &other},
		{Address: at(t, "0000:01:10.2"), Kind: node.VF, PF: &pf, Group: &group},
		{Address: at(t, "0000:07:00.0"), Kind: node.PCI, Group: &group},
		{Address: at(t, "0000:08:00.0"), Kind: node.PCI, Group: &alone},
	}, &node.Settings{})
	within(t, &p)
	total := has(&p, "pf-0000-01-00-0")
	if total != 2 || has(&p, "group-7") != 1 {
		t.Errorf("the PF's set has %d, the group's %d", total, has(&p, "group-7"))
	}
	for name, want := range map[string]map[string]int64{
		"0000-01-00-0": {"pf-0000-01-00-0": total},
		"0000-01-10-0": {"pf-0000-01-00-0": 1},
		"0000-01-10-2": {"pf-0000-01-00-0": 1, "group-7": 1},
		"0000-07-00-0": {"group-7": 1},
		"0000-08-00-0": {},
	} {
		if got := takes(&p, name); fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%s takes %v, want %v", name, got, want)
		}
	}
}

// What is wrong is a taint, with the effect of the settings; what is not known has no attribute; and only what DRA serves
// is published.
func TestDevices(t *testing.T) {
	zero, group, pf := 0, 9, at(t, "0000:01:00.0")
	functions := []node.Function{
		{
			Address: at(t, "0000:01:10.0"), Kind: node.VF, PF: &pf, VFIndex: 3, Pool: "net", NUMA: &zero, Group: &group,
			Root: "pci0000:00", Driver: "vfio-pci", VFIO: true,
			ID: iommu.ID{Vendor: 0x8086, Device: 0x10ca, Class: 0x020000},
			Wrong: []node.Problem{{Reason: node.NoLink}, {Reason: node.NoDriver}, {Reason: node.NoDriver},
				{Reason: node.NoPF}},
		},
		{Address: at(t, "0000:02:00.0"), Kind: node.PCI},
		{Address: at(t, "0000:03:00.0"), Kind: node.PCI, Pool: "old"},
	}

	s := &node.Settings{
		Pools:  map[string]node.Provider{"old": node.DevicePlugin},
		Taints: map[node.Reason]node.Effect{node.NoPF: node.Ignore},
	}

	p := Pool("viaduct.dev", functions, s)
	if len(p.Slices) != 1 || len(p.Slices[0].Devices) != 2 {
		t.Fatalf("%+v", p)
	}

	vf, plain := p.Slices[0].Devices[0], p.Slices[0].Devices[1]
	var taints []string
	for _, t := range vf.Taints {
		taints = append(taints, t.Key+" "+string(t.Effect))
	}

	if want := []string{"viaduct.dev/link NoSchedule", "viaduct.dev/driver NoExecute"}; !slices.Equal(taints, want) {
		t.Errorf("taints %q", taints)
	}

	got := map[string]string{}
	for name, a := range vf.Attributes {
		switch {
		case a.StringValue != nil:
			got[string(name)] = *a.StringValue
		case a.IntValue != nil:
			got[string(name)] = fmt.Sprint(*a.IntValue)
		case a.BoolValue != nil:
			got[string(name)] = fmt.Sprint(*a.BoolValue)
		}
	}

	want := map[string]string{
		"resource.kubernetes.io/pciBusID": "0000:01:10.0", "resource.kubernetes.io/pcieRoot": "pci0000:00",
		"resource.kubernetes.io/numaNode": "0", "iommuGroup": "9", "driver": "vfio-pci", "vendor": "8086",
		"device":    "10ca",
		"subvendor": "0000", "subdevice": "0000", "class": "020000", "type": "vf", "pf": "0000:01:00.0", "vfIndex": "3",
		"pool": "net", "iommufd": "false",
	}

	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("attributes\n%v, want\n%v", got, want)
	}

	for _, none := range []resource.QualifiedName{"resource.kubernetes.io/numaNode", "iommuGroup", "driver", "pf",
		"vfIndex", "iommufd"} {
		if _, known := plain.Attributes[none]; known {
			t.Errorf("%s of a device of which it is not known", none)
		}
	}
}
