//go:build lab

package kube

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	core "k8s.io/api/core/v1"
	resource "k8s.io/api/resource/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	watchtools "k8s.io/client-go/tools/watch"
)

// driverName is the name that the driver has in the cluster.
const driverName = "viaduct.dev"

// pciAddress is the attribute that says which function a device is.
const pciAddress = "resource.kubernetes.io/pciBusID"

// claimText is a claim of one device of a class: its name, the class, more of the request, more of the claim.
const claimText = `apiVersion: resource.k8s.io/v1
kind: ResourceClaim
metadata: {name: %s, namespace: default}
spec:
  devices:
    requests:
      - name: device
        exactly:
          deviceClassName: %s%s
%s`

// claimOf makes a claim of one device of a class.
func claimOf(t *testing.T, name, class string) {
	t.Helper()
	has(t, fmt.Sprintf(claimText, name, class, "", ""))
}

// claimAt makes a claim of the function at this address.
func claimAt(t *testing.T, name, pci string) {
	t.Helper()
	has(t, fmt.Sprintf(claimText, name, driverName, fmt.Sprintf(`
          selectors:
            - cel: {expression: 'device.attributes["resource.kubernetes.io"].pciBusID == %q'}`, pci), ""))
}

// claimWith makes a claim of one device of a class with settings, in the form of YAML between braces.
func claimWith(t *testing.T, name, class, settings string) {
	t.Helper()
	has(t, fmt.Sprintf(claimText, name, class, "", `    config:
      - opaque:
          driver: `+driverName+`
          parameters: {apiVersion: viaduct.dev/v1, kind: DeviceConfig, `+settings+"}\n"))
}

// ofClaim gives the pod's container the device of a claim.
func ofClaim(name string) func(*core.Pod) {
	return func(p *core.Pod) {
		p.Spec.ResourceClaims = append(p.Spec.ResourceClaims,
			core.PodResourceClaim{Name: name, ResourceClaimName: &name})
		c := &p.Spec.Containers[0]
		c.Resources.Claims = append(c.Resources.Claims, core.ResourceClaim{Name: name})
	}
}

// holds is a script that opens the group that the container got, says so, and keeps it open.
const holds = `node=$(ls /dev/vfio | grep '^[0-9]')
exec 3<>/dev/vfio/$node
echo opened $node
exec sleep 2000000000`

// opened waits until a pod that runs `holds` has its group open, and returns the group's number.
func opened(t *testing.T, name string) (*core.Pod, string) {
	t.Helper()
	p := awaitPod(t, name, "runs", running)
	awaitWords(t, p, "opened ")
	_, group, _ := strings.Cut(said(t, p), "opened ")
	return p, strings.TrimSpace(group)
}

// allocated is the function that a claim was given, "" if none.
func allocated(t *testing.T, claim string) string {
	t.Helper()
	c, err := await(up.client.ResourceV1().RESTClient(), "resourceclaims", claim, "is allocated",
		func(c *resource.ResourceClaim) bool { return c.Status.Allocation != nil })
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range c.Status.Allocation.Devices.Results {
		for _, d := range devices(t) {
			if d.Name == r.Device {
				return address(d)
			}
		}
	}
	t.Fatalf("claim %s has %+v, which no slice has", claim, c.Status.Allocation)
	return ""
}

// address is that of a device's function.
func address(d resource.Device) string {
	if a, ok := d.Attributes[pciAddress]; ok && a.StringValue != nil {
		return *a.StringValue
	}
	return ""
}

// devices are all that the driver tells of.
func devices(t *testing.T) []resource.Device {
	t.Helper()
	return awaitDevices(t, "are there", func(all []resource.Device) bool { return len(all) > 0 })
}

// awaitDevices waits until what the driver tells of is as wanted.
func awaitDevices(t *testing.T, what string, is func([]resource.Device) bool) []resource.Device {
	t.Helper()
	ctx, stop := within(t)
	defer stop()
	list := cache.NewListWatchFromClient(up.client.ResourceV1().RESTClient(), "resourceslices", "", fields.Everything())
	seen := map[string]*resource.ResourceSlice{}
	var all []resource.Device
	_, err := watchtools.UntilWithSync(ctx, list, &resource.ResourceSlice{}, nil, func(e watch.Event) (bool, error) {
		s, ok := e.Object.(*resource.ResourceSlice)
		if !ok || s.Spec.Driver != driverName {
			return false, nil
		}
		seen[s.Name] = s
		if e.Type == watch.Deleted {
			delete(seen, s.Name)
		}
		all = nil
		for _, name := range slices.Sorted(maps.Keys(seen)) {
			all = append(all, seen[name].Spec.Devices...)
		}
		return is(all), nil
	})
	if err != nil {
		t.Fatalf("waited until the devices %s: %v\nthey are %+v\n%s", what, err, all, up.whatTheySay())
	}
	return all
}

// forget deletes a claim and waits until it is gone.
func forget(t *testing.T, claim string) {
	t.Helper()
	claims := up.client.ResourceV1().ResourceClaims(namespace)
	if err := claims.Delete(context.Background(), claim, meta.DeleteOptions{}); err != nil &&
		!apierrors.IsNotFound(err) {
		t.Fatal(err)
	}
	if err := gone(up.client.ResourceV1().RESTClient(), &resource.ResourceClaim{}, "resourceclaims",
		claim); err != nil {
		t.Fatal(err)
	}
}
