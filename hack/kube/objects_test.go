//go:build lab

package kube

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
	"k8s.io/client-go/tools/cache"
	watchtools "k8s.io/client-go/tools/watch"
)

// namespace is where the tests make what they make.
const namespace = "default"

// await watches one object until it is as wanted, and returns it.
func await[T any, P interface {
	*T
	runtime.Object
}](client rest.Interface, resource, name, what string, is func(P) bool) (P, error) {
	ctx, stop := context.WithTimeout(context.Background(), patience)
	defer stop()
	space := namespace
	if resource == "nodes" { // which are in none
		space = ""
	}
	list := cache.NewListWatchFromClient(client, resource, space, fields.OneTermEqualSelector("metadata.name", name))
	var last P
	_, err := watchtools.UntilWithSync(ctx, list, P(new(T)), nil, func(e watch.Event) (bool, error) {
		o, ok := e.Object.(P)
		if !ok || e.Type == watch.Deleted {
			return false, nil
		}
		last = o
		return is(o), nil
	})
	if err != nil {
		return last, fmt.Errorf("waited until %s %s %s: %w", resource, name, what, err)
	}
	return last, nil
}

// gone waits until there is no such object.
func gone(client rest.Interface, o runtime.Object, resource, name string) error {
	ctx, stop := context.WithTimeout(context.Background(), patience)
	defer stop()
	list := cache.NewListWatchFromClient(client, resource, namespace,
		fields.OneTermEqualSelector("metadata.name", name))
	_, err := watchtools.UntilWithSync(ctx, list, o,
		func(s cache.Store) (bool, error) { return len(s.ListKeys()) == 0, nil },
		func(e watch.Event) (bool, error) { return e.Type == watch.Deleted, nil })
	if err != nil {
		return fmt.Errorf("waited until there is no %s %s: %w", resource, name, err)
	}
	return nil
}

// within is the time that something may take.
func within(t *testing.T) (context.Context, context.CancelFunc) {
	return context.WithTimeout(t.Context(), patience)
}

// nodeReady waits for the node, and for the account that its pods have.
func (c *cluster) nodeReady() error {
	_, err := await(c.client.CoreV1().RESTClient(), "nodes", node, "is ready", func(n *core.Node) bool {
		for _, c := range n.Status.Conditions {
			if c.Type == core.NodeReady {
				return c.Status == core.ConditionTrue
			}
		}
		return false
	})
	if err != nil {
		return err
	}
	_, err = await(c.client.CoreV1().RESTClient(), "serviceaccounts", "default", "is there",
		func(*core.ServiceAccount) bool { return true })
	return err
}

// newPod is a pod of one container that runs a script.
func newPod(name, script string, change ...func(*core.Pod)) *core.Pod {
	none, grace := false, int64(1)
	p := &core.Pod{
		ObjectMeta: meta.ObjectMeta{Name: name, Namespace: namespace},
		Spec: core.PodSpec{
			HostNetwork: true, AutomountServiceAccountToken: &none, TerminationGracePeriodSeconds: &grace,
			Containers: []core.Container{{
				Name: "main", Image: image, ImagePullPolicy: core.PullNever, Command: []string{"/bin/sh", "-c", script},
			}},
		},
	}
	for _, f := range change {
		f(p)
	}
	return p
}

func (c *cluster) makePod(p *core.Pod) error {
	_, err := c.client.CoreV1().Pods(namespace).Create(context.Background(), p, meta.CreateOptions{})
	return err
}

// makePod makes a pod that is gone when the test ends.
func makePod(t *testing.T, p *core.Pod) {
	t.Helper()
	if err := up.makePod(p); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { deletePod(t, p.Name) })
}

// deletePod deletes a pod, if it is there, and waits until nothing of it is left.
func deletePod(t *testing.T, name string) {
	t.Helper()
	err := up.client.CoreV1().Pods(namespace).Delete(context.Background(), name, meta.DeleteOptions{})
	if apierrors.IsNotFound(err) {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := gone(up.client.CoreV1().RESTClient(), &core.Pod{}, "pods", name); err != nil {
		t.Fatalf("%v\n%s", err, up.whatTheySay())
	}
}

// awaitPod waits until a pod is as wanted.
func awaitPod(t *testing.T, name, what string, is func(*core.Pod) bool) *core.Pod {
	t.Helper()
	p, err := await(up.client.CoreV1().RESTClient(), "pods", name, what, is)
	if err != nil {
		t.Fatalf("%v\nit is %+v\n%s\n%s", err, p, events(name), up.whatTheySay())
	}
	return p
}

func running(p *core.Pod) bool {
	return p.Status.Phase == core.PodRunning && len(p.Status.ContainerStatuses) == 1 &&
		p.Status.ContainerStatuses[0].State.Running != nil
}

// unschedulable is a pod for which the scheduler found no place.
func unschedulable(p *core.Pod) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == core.PodScheduled && c.Status == core.ConditionFalse {
			return c.Reason == core.PodReasonUnschedulable
		}
	}
	return false
}

// events are what was told of an object.
func events(name string) string {
	list, err := up.client.CoreV1().Events(namespace).List(context.Background(),
		meta.ListOptions{FieldSelector: "involvedObject.name=" + name})
	if err != nil {
		return err.Error()
	}
	var b strings.Builder
	for _, e := range list.Items {
		fmt.Fprintf(&b, "event: %s %s: %s\n", e.InvolvedObject.Kind, e.Reason, e.Message)
	}
	return b.String()
}

// said is what the pod's container has printed so far, without the runtime's times and marks.
func said(t *testing.T, p *core.Pod) string {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/var/log/pods/%s_%s_%s/*/*.log", p.Namespace, p.Name, p.UID))
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			if words := strings.SplitN(line, " ", 4); len(words) == 4 {
				b.WriteString(words[3])
			}
		}
	}
	return b.String()
}

// awaitWords waits until the pod's container has printed this.
func awaitWords(t *testing.T, p *core.Pod, words string) {
	t.Helper()
	err := until("pod "+p.Name+" says "+words, up.kubelet, func() error {
		if text := said(t, p); !strings.Contains(text, words) {
			return fmt.Errorf("it says %q", text)
		}
		return nil
	})
	if err != nil {
		t.Fatalf("%v\n%s", err, events(p.Name))
	}
}

// clientFor is the client for an object's kind.
func (c *cluster) clientFor(o *unstructured.Unstructured) (dynamic.ResourceInterface, error) {
	mapper := restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(c.client.Discovery()))
	kind := o.GroupVersionKind()
	m, err := mapper.RESTMapping(kind.GroupKind(), kind.Version)
	if err != nil {
		return nil, err
	}
	if o.GetNamespace() == "" {
		return c.objects.Resource(m.Resource), nil
	}
	return c.objects.Resource(m.Resource).Namespace(o.GetNamespace()), nil
}

// set makes or changes an object, as `kubectl apply` does.
func (c *cluster) set(o *unstructured.Unstructured) error {
	client, err := c.clientFor(o)
	if err != nil {
		return err
	}
	options := meta.ApplyOptions{FieldManager: "lab", Force: true}
	if _, err := client.Apply(context.Background(), o.GetName(), o, options); err != nil {
		return fmt.Errorf("apply %s %s: %w", o.GetKind(), o.GetName(), err)
	}
	return nil
}

// parse reads the objects of a text.
func parse(text string) ([]*unstructured.Unstructured, error) {
	var out []*unstructured.Unstructured
	d := yaml.NewYAMLOrJSONDecoder(strings.NewReader(text), 4096)
	for {
		o := &unstructured.Unstructured{}
		if err := d.Decode(&o.Object); errors.Is(err, io.EOF) {
			return out, nil
		} else if err != nil {
			return out, err
		}
		if len(o.Object) > 0 {
			out = append(out, o)
		}
	}
}

// has makes the objects of a text for as long as the test runs.
func has(t *testing.T, text string) {
	t.Helper()
	objects, err := parse(text)
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range objects {
		if err := up.set(o); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { hasNot(t, o) })
	}
}

// hasNot deletes an object with all that was made on its account, and waits until it is gone: the next test may make one
// of that name.
func hasNot(t *testing.T, o *unstructured.Unstructured) {
	t.Helper()
	client, err := up.clientFor(o)
	if err != nil {
		t.Fatal(err)
	}
	foreground := meta.DeletePropagationForeground
	err = client.Delete(context.Background(), o.GetName(), meta.DeleteOptions{PropagationPolicy: &foreground})
	if apierrors.IsNotFound(err) {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	err = until(o.GetKind()+" "+o.GetName()+" is gone", nil, func() error {
		_, err := client.Get(context.Background(), o.GetName(), meta.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return cmp.Or(err, errors.New("it is still there"))
	})
	if err != nil {
		t.Fatalf("%v\n%s", err, up.whatTheySay())
	}
}

// awaitLabelled waits until a pod with the label is as wanted.
func awaitLabelled(t *testing.T, label, what string, is func(*core.Pod) bool) *core.Pod {
	t.Helper()
	ctx, stop := within(t)
	defer stop()
	list := cache.NewFilteredListWatchFromClient(up.client.CoreV1().RESTClient(), "pods", namespace,
		func(o *meta.ListOptions) { o.LabelSelector = label })
	e, err := watchtools.UntilWithSync(ctx, list, &core.Pod{}, nil, func(e watch.Event) (bool, error) {
		p, ok := e.Object.(*core.Pod)
		return ok && e.Type != watch.Deleted && is(p), nil
	})
	if err != nil {
		t.Fatalf("waited until a pod with %s %s: %v\n%s", label, what, err, up.whatTheySay())
	}
	return e.Object.(*core.Pod)
}

// text is a value as JSON, which is YAML too.
func text(t *testing.T, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
