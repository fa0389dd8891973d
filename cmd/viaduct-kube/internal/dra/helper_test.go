package dra

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	core "k8s.io/api/core/v1"
	resource "k8s.io/api/resource/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
	"k8s.io/dynamic-resource-allocation/api/metadata/v1alpha1"
	"k8s.io/dynamic-resource-allocation/api/metadata/v1beta1"
	"k8s.io/dynamic-resource-allocation/kubeletplugin"
	"k8s.io/dynamic-resource-allocation/resourceslice"
	health "k8s.io/kubelet/pkg/apis/dra-health/v1"
	kubelet "k8s.io/kubelet/pkg/apis/dra/v1"

	"viaduct/cmd/lease"
	"viaduct/cmd/viaduct-kube/internal/node"
	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

// site is a node with the helper's servers, a fake API server and the test as its kubelet.
type site struct {
	client *fake.Clientset
	dir    string
	cdi    string
	driver *Driver
	helper *kubeletplugin.Helper
	conn   *grpc.ClientConn
}

func newSite(t *testing.T, k *hosttest.Kernel, claims ...*resource.ResourceClaim) *site {
	t.Helper()
	s := &site{client: fake.NewClientset(&core.Node{ObjectMeta: meta.ObjectMeta{Name: "n1", UID: "node-uid"}}),
		cdi: t.TempDir()}
	// What the fake does not do as the API server does: names that begin with a prefix.
	var made atomic.Int64
	s.client.PrependReactor("create", "resourceslices", func(a clienttesting.Action) (bool, runtime.Object, error) {
		slice := a.(clienttesting.CreateAction).GetObject().(*resource.ResourceSlice)
		if slice.Name == "" {
			slice.Name = fmt.Sprintf("%s%d", slice.GenerateName, made.Add(1))
		}
		return false, nil, nil
	})

	var err error
	// The path of a socket has an end.
	if s.dir, err = os.MkdirTemp("", "dra"); err != nil {
		t.Fatal(err)
	}

	t.Cleanup(func() { os.RemoveAll(s.dir) })
	for _, c := range claims {
		if _, err := s.client.ResourceV1().ResourceClaims(c.Namespace).Create(t.Context(), c,
			meta.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}

	s.driver = newDriver(t, k, s.cdi, &node.Settings{})
	s.helper, err = kubeletplugin.Start(t.Context(), s.driver,
		kubeletplugin.DriverName("viaduct.dev"), kubeletplugin.KubeClient(s.client), kubeletplugin.NodeName("n1"),
		kubeletplugin.RegistrarDirectoryPath(s.dir), kubeletplugin.PluginDataDirectoryPath(s.dir),
		kubeletplugin.CDIDirectory(s.cdi),
		kubeletplugin.EnableDeviceMetadata(true, []schema.GroupVersion{v1beta1.SchemeGroupVersion,
			v1alpha1.SchemeGroupVersion}),
	)

	if err != nil {
		t.Fatal(err)
	}

	t.Cleanup(s.helper.Stop)
	s.conn, err = grpc.NewClient("unix://"+filepath.Join(s.dir, "dra.sock"),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}

	t.Cleanup(func() { s.conn.Close() })
	return s
}

// The kubelet prepares and unprepares a claim through the helper; a pod is told of its device in both versions.
func TestHelper(t *testing.T) {
	k := newKernel(t)
	c := claim("uid-1", n0)
	s := newSite(t, k, c)
	client := kubelet.NewDRAPluginClient(s.conn)
	asked := []*kubelet.Claim{{Namespace: "default", Name: "nic", Uid: "uid-1"}}
	for range 2 {
		r, err := client.NodePrepareResources(t.Context(), &kubelet.NodePrepareResourcesRequest{Claims: asked})
		if err != nil || r.Claims["uid-1"].Error != "" {
			t.Fatalf("%v, %v", r, err)
		}
		d := r.Claims["uid-1"].Devices
		if len(d) != 1 || d[0].DeviceName != n0 || d[0].PoolName != "n1" || len(d[0].CdiDeviceIds) != 2 ||
			d[0].CdiDeviceIds[0] != "viaduct.dev/claim=uid-1-"+n0 {
			t.Errorf("%v", d)
		}
	}
	var told string
	err := filepath.WalkDir(s.dir, func(file string, d os.DirEntry, err error) error {
		if err == nil && strings.Contains(filepath.Base(file), "metadata.json") && d.Type().IsRegular() {
			text, err := os.ReadFile(file)
			told += string(text)
			return err
		}
		return err
	})
	beta, alpha := strings.Index(told, "metadata.resource.k8s.io/v1beta1"),
		strings.Index(told, "metadata.resource.k8s.io/v1alpha1")
	if err != nil || beta < 0 || alpha < beta || strings.Count(told, vf0) != 2 {
		t.Errorf("a pod is told\n%s, %v", told, err)
	}

	for range 2 {
		r, err := client.NodeUnprepareResources(t.Context(), &kubelet.NodeUnprepareResourcesRequest{Claims: asked})
		if err != nil || r.Claims["uid-1"].Error != "" {
			t.Fatalf("%v, %v", r, err)
		}
	}
	if files, err := os.ReadDir(s.cdi); err != nil || len(files) > 0 {
		t.Errorf("left for containers: %v, %v", files, err)
	}
}

// functions are those of a host now.
func functions(t *testing.T, k *hosttest.Kernel) []node.Function {
	t.Helper()
	h := &iommu.Host{Host: k.Host()}
	b, err := lease.Open(h, lease.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	f, err := node.Read(h, b)
	if err != nil {
		t.Fatal(err)
	}
	return node.Functions(f, Ours("viaduct.dev"))
}

// await waits until the fake API server has what is wanted of this driver.
func (s *site) await(t *testing.T, what string, is func([]resource.Device) bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	w, err := s.client.ResourceV1().ResourceSlices().Watch(ctx, meta.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	list, err := s.client.ResourceV1().ResourceSlices().List(ctx, meta.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}

	has := map[string][]resource.Device{}
	for _, one := range list.Items {
		has[one.Name] = one.Spec.Devices
	}

	for {
		var all []resource.Device
		for _, name := range sorted(has) {
			all = append(all, has[name]...)
		}
		if is(all) {
			return
		}
		select {
		case e := <-w.ResultChan():
			one := e.Object.(*resource.ResourceSlice)
			if has[one.Name] = one.Spec.Devices; e.Type == watch.Deleted {
				delete(has, one.Name)
			}
		case <-ctx.Done():
			t.Fatalf("%s: %+v", what, all)
		}
	}
}

func sorted[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

// What a node has is published, is tainted when it is lost, and is returned; the kubelet hears of its health.
func TestPublish(t *testing.T) {
	k := newKernel(t)
	s := newSite(t, k, claim("uid-1", n0))
	publish := func() {
		all := functions(t, k)
		s.driver.Saw(all)
		err := s.helper.PublishResources(t.Context(), resourceslice.DriverResources{
			Pools: map[string]resourceslice.Pool{"n1": Pool("viaduct.dev", all, &node.Settings{})},
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	tainted := func(all []resource.Device) []string {
		var out []string
		for _, d := range all {
			for _, taint := range d.Taints {
				out = append(out, d.Name+" "+taint.Key+" "+string(taint.Effect))
			}
		}
		return out
	}

	publish()
	s.await(t, "two devices, none tainted", func(all []resource.Device) bool {
		return len(all) == 2 &&
			len(tainted(all)) == 0
	})
	if _, err := prepare(s.driver, claim("uid-1", n0)); err != nil {
		t.Fatal(err)
	}
	if err := k.Write("sys/bus/pci/drivers/vfio-pci/unbind", vf0); err != nil {
		t.Fatal(err)
	}
	publish()
	lost := []string{n0 + " viaduct.dev/driver NoExecute"}
	s.await(t, "the lost one is tainted", func(all []resource.Device) bool { return slices.Equal(tainted(all), lost) })

	stream, err := health.NewDRAResourceHealthClient(s.conn).NodeWatchResources(t.Context(),
		&health.NodeWatchResourcesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	report, err := stream.Recv()
	if err != nil || len(report.Devices) != 2 || report.Devices[0].Health != health.HealthStatus_UNHEALTHY ||
		!strings.Contains(report.Devices[0].Message, "no driver") ||
		report.Devices[1].Health != health.HealthStatus_HEALTHY {
		t.Errorf("health %v, %v", report, err)
	}

	if err := unprepare(s.driver, "uid-1"); err != nil {
		t.Log(err)
	}
	publish()
	report, err = stream.Recv()
	if err != nil || report.Devices[0].Health != health.HealthStatus_HEALTHY {
		t.Errorf("health afterwards: %v, %v", report, err)
	}
	s.await(t, "it is returned", func(all []resource.Device) bool { return len(tainted(all)) == 0 })

	// One that somebody has started by hand is for no pod.
	b, err := lease.Open(&iommu.Host{Host: k.Host()}, lease.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if _, _, err := b.Assign(t.Context(), lease.Request{Guest: "web",
		Sources: []lease.Source{{From: vf1}}}); err != nil {
		t.Fatal(err)
	}
	publish()
	byHand := []string{n1 + " viaduct.dev/guest NoSchedule"}
	s.await(t, "a guest by hand", func(all []resource.Device) bool { return slices.Equal(tainted(all), byHand) })
	if _, err := prepare(s.driver, claim("uid-2", n1)); err == nil {
		t.Error("a pod got what a guest has")
	}
}
