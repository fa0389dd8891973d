//go:build lab

package kube

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	core "k8s.io/api/core/v1"
	resource "k8s.io/api/resource/v1"
	apiresource "k8s.io/apimachinery/pkg/api/resource"
)

// settingsFile says which provider serves each pool.
const settingsFile = "/etc/viaduct/kube.yaml"

// TestProviders: one function has one provider. The driver refuses to change over to its device plugin while a pod has a
// function of that pool, and to serve what another driver publishes; if that begins later, no pod gets it.
func TestProviders(t *testing.T) {
	last := served(t)
	claimOf(t, "has", poolClass)
	makePod(t, newPod("has", holds, ofClaim("has")))
	opened(t, "has")
	vf := allocated(t, "has")
	last.end(os.Interrupt)

	write(t, settingsFile, "pools: {net: device-plugin}\n")
	t.Cleanup(func() { _ = os.Remove(settingsFile) })
	refused(t, vf)
	if err := os.Remove(settingsFile); err != nil {
		t.Fatal(err)
	}
	last = serve(t, nil)
	deletePod(t, "has")
	noLease(t, vf)

	other := virtualFunctions(functions(firstNIC)[0])[3]
	published, err := parse(fmt.Sprintf(`apiVersion: resource.k8s.io/v1
kind: ResourceSlice
metadata: {name: other}
spec:
  driver: other.test
  nodeName: %s
  pool: {name: other, generation: 1, resourceSliceCount: 1}
  devices: [{name: nic, attributes: {resource.kubernetes.io/pciBusID: {string: %q}}}]
`, node, other))
	if err != nil {
		t.Fatal(err)
	}
	if err := up.set(published[0]); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { hasNot(t, published[0]) })
	awaitDevices(t, "have what is shared tainted", func(all []resource.Device) bool {
		return slices.Contains(taints(all, other), driverName+"/shared:NoSchedule")
	})
	last.end(os.Interrupt)
	refused(t, "other.test")
	refused(t, other)

	hasNot(t, published[0])
	serve(t, nil)
	awaitDevices(t, "are well", func(all []resource.Device) bool { return len(taints(all, other)) == 0 })
}

// TestDevicePlugin: with the pool's functions served by the device plugin a pod gets one by a plain resource, and
// names in its environment; none is published for claims, and another driver refuses to publish them. When the pod is
// gone the VF is given back.
func TestDevicePlugin(t *testing.T) {
	served(t).end(os.Interrupt)
	write(t, settingsFile, "pools: {net: device-plugin}\n")
	t.Cleanup(func() { _ = os.Remove(settingsFile) })
	serve(t, nil)
	name := core.ResourceName(extendedResource(t, poolClass))
	if _, err := await(up.client.CoreV1().RESTClient(), "nodes", node, "has the resource", func(n *core.Node) bool {
		q := n.Status.Allocatable[name]
		return q.Value() == 7
	}); err != nil {
		t.Fatal(err)
	}
	makePod(t, newPod("plugin", "env | grep PCI; "+holds, func(p *core.Pod) {
		p.Spec.Containers[0].Resources.Limits = core.ResourceList{name: apiresource.MustParse("1")}
	}))
	p, group := opened(t, "plugin")
	for _, variable := range []string{"PCIDEVICE_VIADUCT_DEV_NET=", "PCI_RESOURCE_VIADUCT_DEV_NET="} {
		if want := variable + inGroup(t, group) + "\n"; !strings.Contains(said(t, p), want) {
			t.Errorf("the pod does not have %s:\n%s", want, said(t, p))
		}
	}
	for _, d := range devices(t) {
		if *d.Attributes["pool"].StringValue == "net" {
			t.Errorf("%s is published for claims too", address(d))
		}
	}

	refused(t, string(name), "--driver", "other.test", "--config", os.DevNull)

	// Nobody tells of the pod's end: the driver sees that no pod has the VF any more.
	vf := inGroup(t, group)
	deletePod(t, "plugin")
	if err := until("the VF is given back", up.driver, func() error {
		if out := do(t, "leases"); strings.Contains(out, vf) {
			return errors.New(out)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// refused runs the driver, which has to refuse, with this word in its reason.
func refused(t *testing.T, word string, options ...string) {
	t.Helper()
	ctx, stop := within(t)
	defer stop()
	line := append([]string{"serve", "--node", node, "--kubeconfig", accountConfig(t)}, options...)
	out, err := exec.CommandContext(ctx, driver, line...).CombinedOutput()
	if err == nil || !strings.Contains(string(out), word) {
		t.Errorf("the driver does not refuse on account of %s: %v\n%s", word, err, out)
	}
}
