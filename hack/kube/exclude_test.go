//go:build lab

package kube

import "testing"

// TestGroup: of two pods that each ask for a function of one IOMMU group one gets it and the other one waits, until the
// first is gone.
func TestGroup(t *testing.T) {
	served(t)
	both := functions(sharedNIC)
	if link(both[0], "iommu_group") != link(both[1], "iommu_group") {
		t.Fatalf("%s and %s are not in one group", both[0], both[1])
	}
	first, second := "group-a", "group-b"
	claimAt(t, first, both[0])
	claimAt(t, second, both[1])
	makePod(t, newPod(first, holds, ofClaim(first)))
	opened(t, first)
	makePod(t, newPod(second, holds, ofClaim(second)))
	awaitPod(t, second, "waits", unschedulable)
	deletePod(t, first)
	forget(t, first)
	opened(t, second)
}

// TestPF: a PF and its VFs exclude each other, in both orders.
func TestPF(t *testing.T) {
	served(t)
	pf := functions(firstNIC)[1]
	vf := virtualFunctions(pf)[0]
	for _, order := range [][]string{{pf, vf}, {vf, pf}} {
		claimAt(t, "pf-first", order[0])
		claimAt(t, "pf-second", order[1])
		makePod(t, newPod("pf-first", holds, ofClaim("pf-first")))
		opened(t, "pf-first")
		makePod(t, newPod("pf-second", holds, ofClaim("pf-second")))
		awaitPod(t, "pf-second", "waits", unschedulable)
		deletePod(t, "pf-second")
		deletePod(t, "pf-first")
		forget(t, "pf-first")
		forget(t, "pf-second")
	}
}
