//go:build lab

package kube

import (
	"strings"
	"testing"

	core "k8s.io/api/core/v1"
	resource "k8s.io/api/resource/v1"
)

// replacedText is a deployment of one pod that has a VF, which the cluster replaces when it is evicted.
const replacedText = `apiVersion: resource.k8s.io/v1
kind: ResourceClaimTemplate
metadata: {name: replaced, namespace: default}
spec:
  spec:
    devices:
      requests: [{name: device, exactly: {deviceClassName: ` + poolClass + `}}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: replaced, namespace: default}
spec:
  replicas: 1
  selector: {matchLabels: {app: replaced}}
  template:
    metadata: {labels: {app: replaced}}
    spec: POD
`

// TestHealth: a VF is taken off its driver under a pod. The device is tainted, the pod evicted, and its successor gets
// another VF. When the VF is well again, it is offered again.
func TestHealth(t *testing.T) {
	served(t)
	template := "replaced"
	first := newPod("", holds, func(p *core.Pod) {
		p.Spec.ResourceClaims = []core.PodResourceClaim{{Name: "device", ResourceClaimTemplateName: &template}}
		p.Spec.Containers[0].Resources.Claims = []core.ResourceClaim{{Name: "device"}}
	})
	has(t, strings.Replace(replacedText, "POD", text(t, first.Spec), 1))
	pod := awaitLabelled(t, "app=replaced", "runs", running)
	_, group := opened(t, pod.Name)
	vf := inGroup(t, group)

	shell(t, "echo "+vf+" >/sys/bus/pci/drivers/vfio-pci/unbind")
	awaitDevices(t, "have the VF tainted", func(all []resource.Device) bool { return len(taints(all, vf)) > 0 })
	next := awaitLabelled(t, "app=replaced", "is replaced",
		func(p *core.Pod) bool { return p.UID != pod.UID && p.DeletionTimestamp == nil && running(p) })
	if _, other := opened(t, next.Name); other == group {
		t.Errorf("the next pod has group %s, which was lost", other)
	}

	// The release, if not the administrator, has it on its driver again.
	if link(vf, "driver") != "vfio-pci" {
		shell(t, "echo vfio-pci >"+devicesDir+"/"+vf+"/driver_override; echo "+vf+" >/sys/bus/pci/drivers_probe")
	}
	awaitDevices(t, "have the VF without a taint",
		func(all []resource.Device) bool { return len(taints(all, vf)) == 0 })
	claimAt(t, "returned", vf)
	makePod(t, newPod("returned", holds, ofClaim("returned")))
	if _, again := opened(t, "returned"); again != link(vf, "iommu_group") {
		t.Errorf("the pod that asks for %s has group %s", vf, again)
	}
}

// taints are the keys of a function's taints.
func taints(all []resource.Device, pci string) []string {
	var out []string
	for _, d := range all {
		if address(d) == pci {
			for _, t := range d.Taints {
				out = append(out, t.Key+":"+string(t.Effect))
			}
		}
	}
	return out
}

// inGroup is the one function in an IOMMU group.
func inGroup(t *testing.T, group string) string {
	t.Helper()
	return shell(t, "ls /sys/kernel/iommu_groups/"+group+"/devices")
}
