//go:build lab

package kube

import (
	"context"
	"os"
	"testing"

	apps "k8s.io/api/apps/v1"
	core "k8s.io/api/core/v1"
	resource "k8s.io/api/resource/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	watchtools "k8s.io/client-go/tools/watch"
)

// The driver's image, twice: one program by two names.
const (
	oldDriver = "viaduct.test/driver:1"
	newDriver = "viaduct.test/driver:2"
)

// TestRollout: the driver as its manifests run it, in a pod of a daemon set. A rolling update goes by under a pod
// with a VF, which keeps it; the next pod gets one, and both are given back.
func TestRollout(t *testing.T) {
	declare(t, declared)
	program, err := os.ReadFile(driver)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{oldDriver, newDriver} {
		if err := loadImage(name, []file{{name: "viaduct-kube", content: program}}, "/viaduct-kube"); err != nil {
			t.Fatal(err)
		}
	}
	set := rollOut(t, oldDriver)
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(daemonWords(t, set.GetNamespace()))
		}
		hasNot(t, set)
		forgetDevices(t)
	})
	awaitDevices(t, "are published", func(all []resource.Device) bool { return len(all) >= 7 })
	claimOf(t, "kept", poolClass)
	makePod(t, newPod("kept", holds, ofClaim("kept")))
	kept, group := opened(t, "kept")

	rollOut(t, newDriver)
	awaitRollout(t, set.GetNamespace())
	unchanged(t, kept)
	claimOf(t, "next", poolClass)
	makePod(t, newPod("next", holds, ofClaim("next")))
	if _, other := opened(t, "next"); other == group {
		t.Errorf("both pods have group %s", other)
	}
	for _, name := range []string{"kept", "next"} {
		vf := allocated(t, name)
		deletePod(t, name)
		noLease(t, vf)
	}
}

// rollOut makes what the manifests have, with this image, and returns the daemon set.
func rollOut(t *testing.T, image string) *unstructured.Unstructured {
	t.Helper()
	var set *unstructured.Unstructured
	for _, o := range manifests(t, "--image", image) {
		if err := up.set(o); err != nil {
			t.Fatal(err)
		}
		if o.GetKind() == "DaemonSet" {
			set = o
		}
	}
	return set
}

// awaitRollout waits until all pods of the daemon set are new ones, and ready.
func awaitRollout(t *testing.T, space string) {
	t.Helper()
	list := cache.NewListWatchFromClient(up.client.AppsV1().RESTClient(), "daemonsets", space, fields.Everything())
	ctx, stop := within(t)
	defer stop()
	var last *apps.DaemonSet
	_, err := watchtools.UntilWithSync(ctx, list, &apps.DaemonSet{}, nil, func(e watch.Event) (bool, error) {
		d, ok := e.Object.(*apps.DaemonSet)
		if !ok {
			return false, nil
		}
		last = d
		s := d.Status
		return s.ObservedGeneration == d.Generation && s.UpdatedNumberScheduled == 1 && s.NumberAvailable == 1 &&
			s.CurrentNumberScheduled == 1, nil
	})
	if err != nil {
		t.Fatalf("waited for the rollout: %v\n%+v\n%s", err, last, daemonWords(t, space))
	}
}

// daemonWords are what the driver's pods say.
func daemonWords(t *testing.T, space string) string {
	t.Helper()
	pods, err := up.client.CoreV1().Pods(space).List(context.Background(), meta.ListOptions{})
	if err != nil {
		return err.Error()
	}
	out := ""
	for i := range pods.Items {
		p := &pods.Items[i]
		out += p.Name + ": " + said(t, p) + statusOf(p)
	}
	return out
}

func statusOf(p *core.Pod) string {
	out := string(p.Status.Phase) + " " + p.Status.Message + "\n"
	for _, c := range p.Status.ContainerStatuses {
		out += c.State.String() + "\n"
	}
	return out
}
