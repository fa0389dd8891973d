//go:build lab

package kube

import (
	"syscall"
	"testing"

	core "k8s.io/api/core/v1"
)

// TestKubeletRestart: a pod keeps its VF and its container when the kubelet is killed and started again, and the next
// pod gets another one.
func TestKubeletRestart(t *testing.T) {
	served(t)
	claimOf(t, "kept", poolClass)
	makePod(t, newPod("kept", holds, ofClaim("kept")))
	before, group := opened(t, "kept")

	up.kubelet.end(syscall.SIGKILL)
	if err := up.startKubelet(); err != nil {
		t.Fatal(err)
	}
	claimOf(t, "next", poolClass)
	makePod(t, newPod("next", holds, ofClaim("next")))
	if _, other := opened(t, "next"); other == group {
		t.Errorf("both pods have group %s", other)
	}
	unchanged(t, before)
}

// TestDriverRestart: a pod keeps its VF when the driver is killed; one that ends while there is no driver is waited
// for, and its VF is given back when there is one again.
func TestDriverRestart(t *testing.T) {
	first := served(t)
	claimOf(t, "kept", poolClass)
	claimOf(t, "ends", poolClass)
	makePod(t, newPod("kept", holds, ofClaim("kept")))
	makePod(t, newPod("ends", holds, ofClaim("ends")))
	kept, _ := opened(t, "kept")
	opened(t, "ends")
	vf := allocated(t, "ends")

	first.end(syscall.SIGKILL)
	remove(t, "ends")
	serve(t, nil)
	deletePod(t, "ends")
	noLease(t, vf)
	unchanged(t, kept)
}

// unchanged reports that a pod is not the one it was, or its container is another one.
func unchanged(t *testing.T, before *core.Pod) {
	t.Helper()
	now := awaitPod(t, before.Name, "runs", running)
	was, is := before.Status.ContainerStatuses[0], now.Status.ContainerStatuses[0]
	if now.UID != before.UID || is.ContainerID != was.ContainerID || is.RestartCount != was.RestartCount {
		t.Errorf("the pod was %s with %s, and is %s with %s", before.UID, was.ContainerID, now.UID, is.ContainerID)
	}
}
