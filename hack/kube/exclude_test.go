//go:build lab

package kube

import (
	"path/filepath"
	"strings"
	"testing"

	resource "k8s.io/api/resource/v1"
)

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

// vfsOrPF is a host whose card is for pods by its VFs, or as a whole.
const (
	byVFs = `pfs:
  - select: mac=52:54:00:00:01:02
    count: 7
    vfs:
      - driver: vfio
        pool: net
`
	asPF = `devices:
  - select: mac=52:54:00:00:01:02
`
)

// TestPF: a PF and its VFs exclude each other. No host has both declared; while a pod has a VF the host cannot be
// made one that gives out the PF, and while a pod has the PF none that gives out VFs, and either refusal names the
// pod's claim.
func TestPF(t *testing.T) {
	pf := functions(firstNIC)[1]
	served(t)
	declare(t, byVFs)
	awaitDevices(t, "are the VFs", func(all []resource.Device) bool { return offered(all, "vf") == 7 })
	if _, status := try(viaduct, "plan", "-f", both(t)); status != 2 {
		t.Errorf("a host that has PF and VFs declared: status %d", status)
	}

	claimOf(t, "vf", poolClass)
	makePod(t, newPod("vf", holds, ofClaim("vf")))
	opened(t, "vf")
	write(t, "/etc/viaduct/host.yaml", asPF)
	if out, status := try(viaduct, "apply"); status != 3 || !strings.Contains(out, "a PF with 7 VFs") {
		t.Errorf("apply takes the PF away from under a pod's VF: status %d\n%s", status, out)
	}
	if out, status := try(viaduct, "vf", "destroy", pf); status != 3 || !strings.Contains(out, "default/vf") {
		t.Errorf("vf destroy takes a pod's VF away: status %d\n%s", status, out)
	}
	deletePod(t, "vf")
	do(t, "vf", "destroy", pf)
	do(t, "apply")
	awaitDevices(t, "are the PF", func(all []resource.Device) bool {
		return offered(all, "pf") == 1 && offered(all, "vf") == 0
	})

	claimAt(t, "pf", pf)
	makePod(t, newPod("pf", holds, ofClaim("pf")))
	if _, group := opened(t, "pf"); group != link(pf, "iommu_group") {
		t.Errorf("the pod has group %s", group)
	}
	claimOf(t, "later", poolClass)
	makePod(t, newPod("later", holds, ofClaim("later")))
	awaitPod(t, "later", "waits", unschedulable)
	write(t, "/etc/viaduct/host.yaml", byVFs)
	if out, status := try(viaduct, "apply"); status != 3 || !strings.Contains(out, "default/pf") {
		t.Errorf("apply takes the PF away from a pod: status %d\n%s", status, out)
	}
	deletePod(t, "pf")
	do(t, "unbind", pf)
	do(t, "apply")
	opened(t, "later")
}

// both is a file that declares the PF as well as its VFs.
func both(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "both.yaml")
	write(t, file, byVFs+asPF)
	return file
}

// offered is how many functions of a type are published.
func offered(all []resource.Device, kind string) int {
	n := 0
	for _, d := range all {
		if v := d.Attributes["type"].StringValue; v != nil && *v == kind {
			n++
		}
	}
	return n
}
