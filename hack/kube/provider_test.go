//go:build lab

package kube

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	core "k8s.io/api/core/v1"
	apiresource "k8s.io/apimachinery/pkg/api/resource"
)

// settingsFile says which provider serves each pool.
const settingsFile = "/etc/viaduct/kube.yaml"

// TestProviders: one function has one provider. The driver refuses to serve what another driver publishes, and to
// change over to its device plugin while a pod has a function of that pool.
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

	other := virtualFunctions(functions(firstNIC)[0])[3]
	has(t, fmt.Sprintf(`apiVersion: resource.k8s.io/v1
kind: ResourceSlice
metadata: {name: other}
spec:
  driver: other.test
  nodeName: %s
  pool: {name: other, generation: 1, resourceSliceCount: 1}
  devices: [{name: nic, attributes: {resource.kubernetes.io/pciBusID: {string: %q}}}]
`, node, other))
	refused(t, "other.test")
	refused(t, other)
}

// TestDevicePlugin: with the pool's functions served by the device plugin a pod gets one by a plain resource, and
// names in its environment; none is published for claims.
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
}

// refused runs the driver, which has to refuse, with this word in its reason.
func refused(t *testing.T, word string) {
	t.Helper()
	out, err := exec.Command(driver, "serve", "--node", node, "--kubeconfig", accountConfig(t)).CombinedOutput()
	if err == nil || !strings.Contains(string(out), word) {
		t.Errorf("the driver does not refuse on account of %s: %v\n%s", word, err, out)
	}
}
