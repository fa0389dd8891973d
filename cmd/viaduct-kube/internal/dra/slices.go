// Package dra serves functions to a cluster by dynamic resource allocation: it publishes them, and prepares and
// unprepares what claims are allocated.
package dra

import (
	"fmt"
	"slices"
	"strconv"

	resource "k8s.io/api/resource/v1"
	apiresource "k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/dynamic-resource-allocation/deviceattribute"
	"k8s.io/dynamic-resource-allocation/resourceslice"

	"viaduct/cmd/viaduct-kube/internal/node"
	"viaduct/iommu"
)

// mostText is how long a text may be in an attribute (resource.DeviceAttributeMaxValueLength).
const mostText = resource.DeviceAttributeMaxValueLength

// Pool is what a node publishes: its functions with what they are, what excludes what, and what is wrong with them. The
// order depends on nothing else than their addresses, so that what changes in one changes nothing of the others.
func Pool(driver string, functions []node.Function, s *node.Settings) resourceslice.Pool {
	var served []*node.Function
	for i := range functions {
		if s.Serves(node.DRA, &functions[i]) {
			served = append(served, &functions[i])
		}
	}
	counters := newCounters(served)

	var out resourceslice.Pool
	for sets := range slices.Chunk(counters.sets, resource.ResourceSliceMaxCounterSets) {
		out.Slices = append(out.Slices, resourceslice.Slice{SharedCounters: sets})
	}
	for some := range slices.Chunk(served, resource.ResourceSliceMaxDevicesWithAdvancedFeatures) {
		slice := resourceslice.Slice{}
		for _, f := range some {
			slice.Devices = append(slice.Devices, resource.Device{
				Name: f.Name(), Attributes: Attributes(f), ConsumesCounters: counters.of[f.Address],
				Taints: taints(driver, f, s),
			})
		}
		out.Slices = append(out.Slices, slice)
	}
	if out.Slices == nil {
		// Which says that the driver runs, and has nothing.
		out.Slices = []resourceslice.Slice{{}}
	}
	return out
}

// Attributes are what a function is. What is not known has none; pool alone is there always, as classes select by it.
func Attributes(f *node.Function) map[resource.QualifiedName]resource.DeviceAttribute {
	out := map[resource.QualifiedName]resource.DeviceAttribute{}
	text := func(name resource.QualifiedName, value string) {
		if value != "" && len(value) <= mostText {
			out[name] = resource.DeviceAttribute{StringValue: &value}
		}
	}
	number := func(name resource.QualifiedName, value *int) {
		if value != nil {
			n := int64(*value)
			out[name] = resource.DeviceAttribute{IntValue: &n}
		}
	}
	out["pool"] = resource.DeviceAttribute{StringValue: &f.Pool}
	text("type", string(f.Kind))
	text(deviceattribute.StandardDeviceAttributePCIBusID, f.Address.String())
	if f.Lost {
		return out
	}

	text(deviceattribute.StandardDeviceAttributePCIeRoot, f.Root)
	number(deviceattribute.StandardDeviceAttributeNUMANode, f.NUMA)
	number("iommuGroup", f.Group)
	text("driver", f.Driver)
	text("vendor", fmt.Sprintf("%04x", f.Vendor))
	text("device", fmt.Sprintf("%04x", f.Device))
	text("subvendor", fmt.Sprintf("%04x", f.Subvendor))
	text("subdevice", fmt.Sprintf("%04x", f.Subdevice))
	text("class", fmt.Sprintf("%06x", f.Class))
	if f.PF != nil {
		text("pf", f.PF.String())
		number("vfIndex", &f.VFIndex)
	}
	if f.VFIO {
		out["iommufd"] = resource.DeviceAttribute{BoolValue: &f.IOMMUFD}
	}
	return out
}

// taints are one for each reason for which something is wrong with a function, none for those that are ignored.
func taints(driver string, f *node.Function, s *node.Settings) []resource.DeviceTaint {
	var out []resource.DeviceTaint
	for _, p := range f.Wrong {
		effect := s.Effect(p.Reason)
		if effect == node.Ignore || slices.ContainsFunc(out, func(t resource.DeviceTaint) bool {
			return t.Key == taintKey(driver, p.Reason)
		}) {
			continue
		}
		out = append(out, resource.DeviceTaint{
			Key: taintKey(driver, p.Reason), Value: "true", Effect: resource.DeviceTaintEffect(effect),
		})
	}
	return out
}

func taintKey(driver string, r node.Reason) string { return driver + "/" + string(r) }

// counters say which functions exclude each other.
type counters struct {
	sets []resource.CounterSet
	of   map[iommu.Address][]resource.DeviceCounterConsumption
}

// newCounters makes a counter for each IOMMU group that several functions are in, of which one pod gets all, and for
// each PF that is published beside VFs of its own: the PF takes all that there is, and a VF one. Two are what a device
// may consume.
func newCounters(functions []*node.Function) *counters {
	out := &counters{of: map[iommu.Address][]resource.DeviceCounterConsumption{}}
	groups := map[int][]*node.Function{}
	vfs := map[iommu.Address][]*node.Function{}
	for _, f := range functions {
		if f.Group != nil {
			groups[*f.Group] = append(groups[*f.Group], f)
		}
		if f.PF != nil {
			vfs[*f.PF] = append(vfs[*f.PF], f)
		}
	}

	for _, f := range functions {
		if f.Group == nil {
			continue
		}
		if all := groups[*f.Group]; len(all) > 1 && all[0] == f {
			out.add("group-"+strconv.Itoa(*f.Group), 1, all, 1)
		}
	}
	for _, f := range functions {
		if its := vfs[f.Address]; len(its) > 0 {
			name := "pf-" + f.Name()
			out.add(name, len(its), its, 1)
			out.consume(f, name, len(its))
		}
	}
	return out
}

// counter is the one counter that each set has.
const counter = "owners"

// add makes a set of which each of some functions consumes so much.
func (c *counters) add(name string, total int, each []*node.Function, takes int) {
	c.sets = append(c.sets, resource.CounterSet{Name: name, Counters: count(total)})
	for _, f := range each {
		c.consume(f, name, takes)
	}
}

func (c *counters) consume(f *node.Function, set string, n int) {
	c.of[f.Address] = append(c.of[f.Address], resource.DeviceCounterConsumption{CounterSet: set, Counters: count(n)})
}

func count(n int) map[string]resource.Counter {
	return map[string]resource.Counter{counter: {Value: *quantity(n)}}
}

func quantity(n int) *apiresource.Quantity {
	return apiresource.NewQuantity(int64(n), apiresource.DecimalSI)
}
