package kubelettest

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	v1 "k8s.io/api/resource/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/dynamic-resource-allocation/cel"
	"k8s.io/kubernetes/pkg/apis/resource"
	convert "k8s.io/kubernetes/pkg/apis/resource/v1"
	"k8s.io/kubernetes/pkg/apis/resource/validation"
	"sigs.k8s.io/yaml"

	"viaduct/cmd/viaduct-kube/internal/dra"
	"viaduct/cmd/viaduct-kube/internal/manifests"
	"viaduct/cmd/viaduct-kube/internal/node"
	"viaduct/iommu"
)

func at(t *testing.T, s string) iommu.Address {
	t.Helper()
	a, err := iommu.ParseAddress(s)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// many are so many functions: PFs that are published beside VFs, some of which share groups, and of all something is
// wrong.
func many(t *testing.T, pfs, vfs int) []node.Function {
	t.Helper()
	zero := 0
	var wrong []node.Problem
	for _, r := range node.Reasons() {
		wrong = append(wrong, node.Problem{Reason: r, Text: "it is not well"})
	}
	var out []node.Function
	for i := range pfs {
		pf := at(t, fmt.Sprintf("%04x:%02x:00.0", i/200, i%200))
		own := i * (vfs + 1)
		one := node.Function{
			Address: pf, Kind: node.PF, Group: &own, NUMA: &zero, Root: "pci0000:00", Driver: "vfio-pci", VFIO: true,
			Wrong: wrong,
		}
		out = append(out, one)
		for j := range vfs {
			vf, group := one, own+1+j/2
			vf.Address = at(t, fmt.Sprintf("%04x:%02x:%02x.%d", i/200, i%200, 1+j/8, j%8))
			vf.Kind, vf.PF, vf.VFIndex, vf.Group, vf.Pool = node.VF, &pf, j, &group, "net"
			out = append(out, vf)
		}
	}
	return out
}

// The API takes what is published, as much as that is.
func TestAPIValidates(t *testing.T) {
	for _, size := range [][2]int{{0, 0}, {2, 4}, {80, 62}} {
		pool := dra.Pool("viaduct.dev", many(t, size[0], size[1]), &node.Settings{})
		name, devices := "n1", 0
		for i, s := range pool.Slices {
			slice := v1.ResourceSlice{
				ObjectMeta: meta.ObjectMeta{Name: fmt.Sprintf("slice-%d", i)},
				Spec: v1.ResourceSliceSpec{
					Driver: "viaduct.dev", NodeName: &name, Devices: s.Devices, SharedCounters: s.SharedCounters,
					Pool: v1.ResourcePool{Name: name, Generation: 1, ResourceSliceCount: int64(len(pool.Slices))},
				},
			}
			devices += len(s.Devices)
			var internal resource.ResourceSlice
			if err := convert.Convert_v1_ResourceSlice_To_resource_ResourceSlice(&slice, &internal, nil); err != nil {
				t.Fatal(err)
			}
			if errs := validation.ValidateResourceSlice(&internal); len(errs) > 0 {
				t.Errorf("%v, slice %d of %d: %v", size, i, len(pool.Slices), errs.ToAggregate())
			}
		}
		t.Logf("%d devices in %d slices", devices, len(pool.Slices))
	}
}

// The device classes that are printed are those that the API takes, and each selects its own pool's functions.
func TestClasses(t *testing.T) {
	var text bytes.Buffer
	if err := manifests.Print(&text, &manifests.Options{Driver: "viaduct.dev", Namespace: "viaduct",
		Pools: []string{"net", "gpu"}}); err != nil {
		t.Fatal(err)
	}

	functions := many(t, 1, 1) // a PF that is in no pool, and a VF of net
	selected := map[string]string{}
	for doc := range strings.SplitSeq(text.String(), "\n---\n") {
		var class v1.DeviceClass
		if err := yaml.Unmarshal([]byte(doc), &class); err != nil || class.Kind != "DeviceClass" {
			continue
		}
		if err := yaml.UnmarshalStrict([]byte(doc), &class); err != nil {
			t.Fatal(err)
		}
		var internal resource.DeviceClass
		if err := convert.Convert_v1_DeviceClass_To_resource_DeviceClass(&class, &internal, nil); err != nil {
			t.Fatal(err)
		}
		if errs := validation.ValidateDeviceClass(&internal); len(errs) > 0 {
			t.Errorf("%s: %v", class.Name, errs.ToAggregate())
		}
		for i := range functions {
			compiled := cel.GetCompiler(cel.Features{}).CompileCELExpression(class.Spec.Selectors[0].CEL.Expression,
				cel.Options{})
			if compiled.Error != nil {
				t.Fatal(compiled.Error)
			}
			is, _, err := compiled.DeviceMatches(t.Context(),
				cel.Device{Driver: "viaduct.dev", Attributes: dra.Attributes(&functions[i])})
			if err != nil {
				t.Fatal(err)
			}
			if is {
				selected[class.Name] += string(functions[i].Kind) + " "
			}
		}
	}

	want := map[string]string{"viaduct.dev": "pf vf ", "net.viaduct.dev": "vf "}
	if fmt.Sprint(selected) != fmt.Sprint(want) {
		t.Errorf("selected %v, want %v", selected, want)
	}
}
