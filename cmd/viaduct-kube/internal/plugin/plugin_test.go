package plugin

import (
	"slices"
	"testing"

	"viaduct/cmd/viaduct-kube/internal/node"
	"viaduct/iommu"
)

// functions are on NUMA nodes 0 and 1 and below two PFs each, and one is nowhere.
func functions(t *testing.T) []node.Function {
	t.Helper()
	var out []node.Function
	for _, f := range []struct {
		at, pf string
		numa   int
	}{
		{"0000:01:10.0", "0000:01:00.0", 0}, {"0000:01:10.2", "0000:01:00.0", 0}, {"0000:02:10.0", "0000:02:00.0", 0},
		{"0000:81:10.0", "0000:81:00.0", 1}, {"0000:81:10.2", "0000:81:00.0", 1}, {"0000:05:00.0", "", -1},
	} {
		one := node.Function{Kind: node.PCI, Pool: "net"}
		one.Address, _ = iommu.ParseAddress(f.at)
		if f.pf != "" {
			pf, err := iommu.ParseAddress(f.pf)
			if err != nil {
				t.Fatal(err)
			}
			one.PF, one.NUMA, one.Kind = &pf, &f.numa, node.VF
		}
		out = append(out, one)
	}
	return out
}

// Functions that are near each other are preferred: those of one NUMA node, and there of one PF.
func TestPrefer(t *testing.T) {
	all := []string{"0000:05:00.0", "0000:81:10.2", "0000:81:10.0", "0000:02:10.0", "0000:01:10.2", "0000:01:10.0"}
	for _, c := range []struct {
		available, must []string
		size            int
		want            []string
	}{
		{all, nil, 2, []string{"0000:01:10.0", "0000:01:10.2"}},
		{all, nil, 3, []string{"0000:01:10.0", "0000:01:10.2", "0000:02:10.0"}},
		{all, []string{"0000:81:10.0"}, 2, []string{"0000:81:10.0", "0000:81:10.2"}},
		{all, []string{"0000:02:10.0"}, 2, []string{"0000:02:10.0", "0000:01:10.0"}},
		{[]string{"0000:02:10.0", "0000:81:10.2", "0000:81:10.0"}, nil, 2, []string{"0000:81:10.0", "0000:81:10.2"}},
		{[]string{"0000:01:10.0"}, nil, 2, []string{"0000:01:10.0"}},
		{nil, nil, 1, nil},
	} {
		if got := Prefer(functions(t), c.available, c.must, c.size); !slices.Equal(got, c.want) {
			t.Errorf("%d of %q with %q: %q, want %q", c.size, c.available, c.must, got, c.want)
		}
	}
}

// The kubelet is told of no NUMA node where none is known, and of a function of which something is wrong that it is.
func TestDevices(t *testing.T) {
	all := functions(t)
	all[1].Wrong = []node.Problem{{Reason: node.NoLink, Text: "no link"}}
	list := Devices(all)
	if len(list) != 6 || list[5].Topology != nil || list[3].Topology.Nodes[0].ID != 1 ||
		list[0].Topology.Nodes[0].ID != 0 ||
		list[1].Health != "Unhealthy" || list[0].Health != "Healthy" || list[0].ID != "0000:01:10.0" {
		t.Errorf("%v", list)
	}
}

// Variables have the names that others read: dots and slashes become underscores, dashes stay.
func TestEnvNames(t *testing.T) {
	want := []string{"PCIDEVICE_VIADUCT_DEV_NET-A", "PCI_RESOURCE_VIADUCT_DEV_NET-A"}
	if got := EnvNames("viaduct.dev/net-a"); !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
}
