package dra

import (
	"strings"
	"testing"

	resource "k8s.io/api/resource/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"viaduct/cmd/viaduct-kube/internal/node"
	"viaduct/sriov"
)

// claim is one that has been allocated these devices, each for a request of its own: a, b and so on.
func claim(uid string, devices ...string) *resource.ResourceClaim {
	c := &resource.ResourceClaim{ObjectMeta: meta.ObjectMeta{Namespace: "default", Name: "nic", UID: types.UID(uid)}}
	c.Status.Allocation = &resource.AllocationResult{}
	for i, d := range devices {
		c.Status.Allocation.Devices.Results = append(c.Status.Allocation.Devices.Results,
			resource.DeviceRequestAllocationResult{
				Request: string(rune('a' + i)), Driver: "viaduct.dev", Pool: "n1", Device: d,
			})
	}
	c.Status.ReservedFor = []resource.ResourceClaimConsumerReference{{Resource: "pods", Name: "web"}}
	return c
}

// with adds a configuration.
func with(c *resource.ResourceClaim, source resource.AllocationConfigSource, text string,
	requests ...string) *resource.ResourceClaim {
	one := resource.DeviceAllocationConfiguration{Source: source, Requests: requests}
	one.Opaque = &resource.OpaqueDeviceConfiguration{Driver: "viaduct.dev", Parameters: runtime.RawExtension{
		Raw: []byte(`{"apiVersion":"viaduct.dev/v1","kind":"DeviceConfig",` + text + `}`),
	}}
	c.Status.Allocation.Devices.Config = append(c.Status.Allocation.Devices.Config, one)
	return c
}

const (
	ofClass = resource.AllocationConfigSourceClass
	ofClaim = resource.AllocationConfigSourceClaim
)

// A claim's plan has its devices by address, and of each what class and claim say, the claim above the class.
func TestPlan(t *testing.T) {
	c := claim("uid-1", "0000-01-10-0", "0000-01-10-2")
	other := c.Status.Allocation.Devices.Results[0]
	other.Driver = "gpu.example.com"
	c.Status.Allocation.Devices.Results = append(c.Status.Allocation.Devices.Results, other)
	with(c, ofClaim, `"vlan":100`, "a")
	with(c, ofClass, `"vlan":5,"settings":{"trust":"on"},"backend":"iommufd"`)
	p, err := PlanOf(c, "viaduct.dev", "n1")
	if err != nil {
		t.Fatal(err)
	}
	r := p.Request
	if r.Guest != "uid-1" || !r.Persist || r.For != "pod default/web by claim default/nic of viaduct.dev" ||
		len(r.Sources) != 2 {
		t.Errorf("%+v", r)
	}
	for i, vlan := range []string{"100", "5"} {
		s := r.Sources[i].Settings
		if s[sriov.VLAN] != vlan || s["trust"] != "on" || p.Devices[i].Backend != node.IOMMUFD {
			t.Errorf("%d: %v, %+v", i, s, p.Devices[i])
		}
	}
	if r.Sources[0].From != "0000:01:10.0" || p.Devices[1].Address.String() != "0000:01:10.2" {
		t.Errorf("%+v, %+v", r.Sources, p.Devices)
	}
}

// What cannot be is refused before anything is touched.
func TestPlanRefuses(t *testing.T) {
	yes := true
	admin := claim("u", "0000-01-10-0")
	admin.Status.Allocation.Devices.Results[0].AdminAccess = &yes
	elsewhere := claim("u", "0000-01-10-0")
	elsewhere.Status.Allocation.Devices.Results[0].Pool = "n2"
	alike := with(claim("u", "0000-01-10-0", "0000-01-10-2"), ofClaim, `"mac":"02:00:00:00:00:01"`)
	for want, c := range map[string]*resource.ResourceClaim{
		"admin access":           admin,
		"this is node n1":        elsewhere,
		"one MAC address":        alike,
		"invalid":                claim("u", "gpu0"),
		`unknown field "colour"`: with(claim("u", "0000-01-10-0"), ofClaim, `"colour":"red"`),
		`unknown backend "both"`: with(claim("u", "0000-01-10-0"), ofClaim, `"backend":"both"`),
		"msix cannot be set":     with(claim("u", "0000-01-10-0"), ofClaim, `"settings":{"msix":"4"}`),
		"vlan":                   with(claim("u", "0000-01-10-0"), ofClaim, `"vlan":5000`),
	} {
		if p, err := PlanOf(c, "viaduct.dev", "n1"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %+v, %v", want, p, err)
		}
	}
	if _, err := PlanOf(&resource.ResourceClaim{}, "viaduct.dev", "n1"); err == nil {
		t.Error("one that is not allocated")
	}
}
