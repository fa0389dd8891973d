//go:build lab

package kube

import (
	"slices"
	"strings"
	"testing"

	core "k8s.io/api/core/v1"
	apiresource "k8s.io/apimachinery/pkg/api/resource"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// poolClass is the device class of the pool of VFs, groupClass that of all functions.
const (
	poolClass = "net." + driverName
	allClass  = driverName
)

// TestClaim: a pod gets a VF by a claim, with a MAC address and a VLAN. It opens the VF's group, and when the pod is
// gone the VF is as it was before.
func TestClaim(t *testing.T) {
	served(t)
	claimWith(t, "web", poolClass, `mac: "52:54:00:aa:00:01", vlan: 100`)
	makePod(t, newPod("web", holds, ofClaim("web")))
	_, group := opened(t, "web")

	vf := allocated(t, "web")
	if want := link(vf, "iommu_group"); group != want {
		t.Errorf("the pod has group %s, and %s is in %s", group, vf, want)
	}
	if line := shown(t, vf); !strings.Contains(line, "52:54:00:aa:00:01") || !strings.Contains(line, "vlan 100") {
		t.Errorf("the VF is %s", line)
	}
	if out := do(t, "leases"); !strings.Contains(out, vf) {
		t.Errorf("the node's books have no lease of %s:\n%s", vf, out)
	}

	deletePod(t, "web")
	if out := do(t, "leases"); strings.Contains(out, vf) {
		t.Errorf("the pod is gone, and there is a lease:\n%s", out)
	}
	if line := shown(t, vf); strings.Contains(line, "52:54:00:aa:00:01") || strings.Contains(line, "vlan 100") {
		t.Errorf("the pod is gone, and the VF is %s", line)
	}
	if got := link(vf, "driver"); got != "vfio-pci" {
		t.Errorf("the pod is gone, and the VF is on %q", got)
	}
}

// TestLimits: a pod gets a VF by a plain resource, as it would of a device plugin.
func TestLimits(t *testing.T) {
	served(t)
	name := extendedResource(t, poolClass)
	makePod(t, newPod("limits", holds, func(p *core.Pod) {
		p.Spec.Containers[0].Resources.Limits = core.ResourceList{core.ResourceName(name): apiresource.MustParse("1")}
	}))
	_, group := opened(t, "limits")
	vfs := virtualFunctions(functions(firstNIC)[0])
	if !slices.ContainsFunc(vfs, func(vf string) bool { return link(vf, "iommu_group") == group }) {
		t.Errorf("the pod has group %s, which no VF is in", group)
	}
}

// extendedResource is the resource by which a class can be asked for.
func extendedResource(t *testing.T, class string) string {
	t.Helper()
	c, err := up.client.ResourceV1().DeviceClasses().Get(t.Context(), class, meta.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if c.Spec.ExtendedResourceName == nil {
		t.Fatalf("class %s has no extended resource", class)
	}
	return *c.Spec.ExtendedResourceName
}

// virtualFunctions are the addresses of a PF's VFs.
func virtualFunctions(pf string) []string {
	var out []string
	for _, f := range functions("0x10ca") {
		if link(f, "physfn") == pf {
			out = append(out, f)
		}
	}
	return out
}
