//go:build lab

package kube

import (
	"fmt"
	"os"
	"testing"

	core "k8s.io/api/core/v1"
)

// groupFile is where the first boot leaves which group the pod had.
const groupFile = state + "/group"

// TestBeforeReboot: a pod with a VF, on which the node's power goes. TestAfterReboot goes on.
func TestBeforeReboot(t *testing.T) {
	if os.Getenv("KUBE_BOOT") != "before" {
		t.Skip("KUBE_BOOT is not before: hack/kube/run says so of the first of two boots")
	}
	served(t)
	claim, err := parse(fmt.Sprintf(claimText, "stays", poolClass, "", ""))
	if err != nil {
		t.Fatal(err)
	}
	if err := up.set(claim[0]); err != nil {
		t.Fatal(err)
	}
	if err := up.makePod(newPod("stays", holds, ofClaim("stays"))); err != nil {
		t.Fatal(err)
	}
	_, group := opened(t, "stays")
	write(t, groupFile, group)
}

// TestAfterReboot: the node is up again, and the kernel has given its groups other numbers. The pod comes back with
// its VF.
func TestAfterReboot(t *testing.T) {
	if os.Getenv("KUBE_BOOT") != "after" {
		t.Skip("KUBE_BOOT is not after: hack/kube/run says so of the second of two boots")
	}
	before, err := os.ReadFile(groupFile)
	if err != nil {
		t.Fatal(err)
	}
	endDriver(t)
	serve(t, nil)
	p := awaitPod(t, "stays", "runs again", func(p *core.Pod) bool {
		return running(p) && p.Status.ContainerStatuses[0].RestartCount > 0
	})
	vf := allocated(t, "stays")
	now := link(vf, "iommu_group")
	if now == string(before) {
		t.Fatalf("the groups have the numbers that they had: %s is in %s", vf, now)
	}
	awaitWords(t, p, "opened "+now)
	deletePod(t, "stays")
	noLease(t, vf)
}
