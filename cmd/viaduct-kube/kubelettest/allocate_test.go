package kubelettest

import (
	"slices"
	"testing"

	core "k8s.io/api/core/v1"
	v1 "k8s.io/api/resource/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/dynamic-resource-allocation/cel"
	"k8s.io/dynamic-resource-allocation/structured"

	"viaduct/cmd/viaduct-kube/internal/dra"
	"viaduct/cmd/viaduct-kube/internal/node"
)

// classes are those of a cluster.
type classes []*v1.DeviceClass

func (c classes) List() ([]*v1.DeviceClass, error) { return c, nil }

func (c classes) Get(string) (*v1.DeviceClass, error) { return c[0], nil }

// cluster is what the scheduler knows of a node's functions, and has allocated of them.
type cluster struct {
	slices []*v1.ResourceSlice
	taken  sets.Set[structured.DeviceID]
}

func newCluster(functions []node.Function) *cluster {
	c := &cluster{taken: sets.New[structured.DeviceID]()}
	pool, name := dra.Pool("viaduct.dev", functions, &node.Settings{}), "n1"
	for _, s := range pool.Slices {
		c.slices = append(c.slices, &v1.ResourceSlice{Spec: v1.ResourceSliceSpec{
			Driver: "viaduct.dev", NodeName: &name, Devices: s.Devices, SharedCounters: s.SharedCounters,
			Pool: v1.ResourcePool{Name: name, Generation: 1, ResourceSliceCount: int64(len(pool.Slices))},
		}})
	}
	return c
}

// allocate gives a claim one function of a type, as the scheduler does; it returns its name, "" if there is none.
func (c *cluster) allocate(t *testing.T, kind string) string {
	t.Helper()
	claim := &v1.ResourceClaim{ObjectMeta: meta.ObjectMeta{Namespace: "default", Name: "nic"}}
	claim.Spec.Devices.Requests = []v1.DeviceRequest{{Name: "nic", Exactly: &v1.ExactDeviceRequest{
		DeviceClassName: "viaduct.dev", AllocationMode: v1.DeviceAllocationModeExactCount, Count: 1,
		Selectors: []v1.DeviceSelector{{CEL: &v1.CELDeviceSelector{
			Expression: `device.attributes["viaduct.dev"].type == "` + kind + `"`,
		}}},
	}}}
	features := structured.Features{DeviceTaints: true, PartitionableDevices: true}
	a, err := structured.NewAllocator(t.Context(), features, structured.AllocatedState{AllocatedDevices: c.taken},
		classes{{ObjectMeta: meta.ObjectMeta{Name: "viaduct.dev"}}}, c.slices, cel.NewCache(10, cel.Features{}))
	if err != nil {
		t.Fatal(err)
	}
	got, err := a.Allocate(t.Context(), &core.Node{ObjectMeta: meta.ObjectMeta{Name: "n1"}}, []*v1.ResourceClaim{claim})
	if err != nil {
		t.Fatal(err)
	}
	if len(got) == 0 {
		return ""
	}
	r := got[0].Devices.Results[0]
	c.taken.Insert(structured.MakeDeviceID(r.Driver, r.Pool, r.Device))
	return r.Device
}

// The scheduler's own allocator gives no two claims what excludes each other, and nothing that is tainted.
func TestAllocate(t *testing.T) {
	pf, group, own, first, second, alone := at(t, "0000:01:00.0"), 7, 1, 2, 3, 4
	functions := func() []node.Function {
		return []node.Function{
			{Address: pf, Kind: node.PF, Group: &own},
			{Address: at(t, "0000:01:10.0"), Kind: node.VF, PF: &pf, Group: &first},
			{Address: at(t, "0000:01:10.2"), Kind: node.VF, PF: &pf, Group: &second},
			{Address: at(t, "0000:07:00.0"), Kind: node.PCI, Group: &group},
			{Address: at(t, "0000:07:00.1"), Kind: node.PCI, Group: &group},
			{Address: at(t, "0000:08:00.0"), Kind: node.PCI, Group: &alone},
		}
	}

	for what, c := range map[string]struct {
		change     func([]node.Function)
		asks, gets []string
	}{
		"one group":          {nil, []string{"pci", "pci", "pci"}, []string{"0000-07-00-0", "0000-08-00-0", ""}},
		"the PF, then a VF":  {nil, []string{"pf", "vf"}, []string{"0000-01-00-0", ""}},
		"the VFs, then a PF": {nil, []string{"vf", "vf", "pf"}, []string{"0000-01-10-0", "0000-01-10-2", ""}},
		"a tainted one": {func(f []node.Function) {
			f[1].Wrong = []node.Problem{{Reason: node.OtherGuest, Text: "a guest has it"}}
		}, []string{"vf", "vf"}, []string{"0000-01-10-2", ""}},
	} {
		all := functions()
		if c.change != nil {
			c.change(all)
		}
		cluster := newCluster(all)
		var got []string
		for _, kind := range c.asks {
			got = append(got, cluster.allocate(t, kind))
		}
		if !slices.Equal(got, c.gets) {
			t.Errorf("%s: %q, want %q", what, got, c.gets)
		}
	}
}
