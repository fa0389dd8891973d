// Package kubelettest has the device plugin served to the kubelet's own code: its registration server and its client of
// device plugins. It is a module of its own, as Kubernetes itself is needed for that alone.
package kubelettest

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"k8s.io/klog/v2"
	api "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
	kubelet "k8s.io/kubernetes/pkg/kubelet/cm/devicemanager/plugin/v1beta1"

	"viaduct/cmd/lease"
	"viaduct/cmd/viaduct-kube/internal/node"
	"viaduct/cmd/viaduct-kube/internal/plugin"
	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

const (
	pf  = "0000:01:00.0"
	vf0 = "0000:01:10.0"
	vf1 = "0000:01:10.2"
)

// newKernel is a host whose PF has two VFs, which are declared as a pool.
func newKernel(t *testing.T) *hosttest.Kernel {
	t.Helper()
	k := hosttest.NewSmallLab(t, "0000:00:05.0", pf)
	k.ResetVFs = true
	for _, w := range [][2]string{{"sriov_drivers_autoprobe", "0"}, {"sriov_numvfs", "2"}} {
		if err := k.Write("sys/bus/pci/devices/"+pf+"/"+w[0], w[1]); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(k.Dir(), "etc/viaduct/host.yaml")
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	declared := "pfs:\n  - select: " + pf + "\n    count: 2\n    vfs:\n      - {driver: none, pool: net}\n"
	if err := os.WriteFile(file, []byte(declared), 0o644); err != nil {
		t.Fatal(err)
	}
	return k
}

// manager is what the kubelet's device manager is to its client.
type manager struct {
	connected chan kubelet.DevicePlugin
	gone      chan string
	lists     chan *api.ListAndWatchResponse
}

func newManager() *manager {
	return &manager{
		make(chan kubelet.DevicePlugin, 10), make(chan string, 10), make(chan *api.ListAndWatchResponse, 100),
	}
}

func (m *manager) CleanupPluginDirectory(klog.Logger, string) error { return nil }

func (m *manager) PluginConnected(_ context.Context, _ string, p kubelet.DevicePlugin) error {
	m.connected <- p
	return nil
}

func (m *manager) PluginDisconnected(_ klog.Logger, name, _ string) { m.gone <- name }

func (m *manager) PluginListAndWatchReceiver(_ klog.Logger, _ string, r *api.ListAndWatchResponse) {
	m.lists <- r
}

// next is what comes of a channel, which is waited for.
func next[T any](t *testing.T, what string, from chan T) (out T) {
	t.Helper()
	select {
	case out = <-from:
	case <-time.After(time.Minute):
		t.Fatalf("waited in vain for %s", what)
	}
	return out
}

func ours(l *lease.Lease) bool { return strings.HasSuffix(l.For, " of viaduct.dev") }

// look looks at the host and tells the plugin, as the driver's loop does.
func look(t *testing.T, k *hosttest.Kernel, p *plugin.Plugin) []lease.Lease {
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
	p.Saw(node.Functions(f, ours))
	return f.Leases
}

// start starts the kubelet's registration server.
func start(t *testing.T, dir string, m *manager) kubelet.Server {
	t.Helper()
	s, err := kubelet.NewServer(klog.Background(), filepath.Join(dir, "kubelet.sock"), m, m)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start(klog.Background()); err != nil {
		t.Fatal(err)
	}
	return s
}

func health(r *api.ListAndWatchResponse) string {
	var out []string
	for _, d := range r.Devices {
		out = append(out, d.ID+" "+d.Health)
	}
	return strings.Join(out, ", ")
}

func allocate(p kubelet.DevicePlugin, ids ...string) (*api.ContainerAllocateResponse, error) {
	r, err := p.API().Allocate(context.Background(), &api.AllocateRequest{
		ContainerRequests: []*api.ContainerAllocateRequest{{DevicesIds: ids}},
	})
	if err != nil {
		return nil, err
	}
	return r.ContainerResponses[0], nil
}

// The kubelet registers the plugin, lists and allocates its functions, hears of their health, and finds it again when
// it has started anew; what no pod has any more is taken back, and is as it was.
func TestKubelet(t *testing.T) {
	k, cdi := newKernel(t), t.TempDir()
	dir, err := os.MkdirTemp("", "dp") // the path of a socket has an end
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	p := plugin.New(plugin.Options{
		Host: &iommu.Host{Host: k.Host()}, Domain: "viaduct.dev", Pool: "net", CDIDir: cdi, Ours: ours,
		Mark:  func(whom string) string { return whom + " of viaduct.dev" },
		Count: func(string, string, time.Duration) {}, Changed: func() {},
		Tell: func(_ bool, reason, text string) { t.Log(reason, text) },
	})
	look(t, k, p)
	m := newManager()
	server := start(t, dir, m)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- p.Serve(ctx, dir) }()
	defer func() {
		cancel()
		<-ended
	}()
	client := next(t, "the plugin", m.connected)
	if got := health(next(t, "the list", m.lists)); client.Resource() != "viaduct.dev/net" ||
		got != vf0+" Healthy, "+vf1+" Healthy" {
		t.Errorf("%s has %s", client.Resource(), got)
	}

	preferred, err := client.API().GetPreferredAllocation(t.Context(), &api.PreferredAllocationRequest{
		ContainerRequests: []*api.ContainerPreferredAllocationRequest{
			{AvailableDeviceIDs: []string{vf1, vf0}, AllocationSize: 1},
		},
	})
	if err != nil || !slices.Equal(preferred.ContainerResponses[0].DeviceIDs, []string{vf0}) {
		t.Errorf("preferred %v, %v", preferred, err)
	}
	got, err := allocate(client, vf0)
	if err != nil || len(got.CdiDevices) != 1 || got.CdiDevices[0].Name != "viaduct.dev/net="+vf0 ||
		got.Envs["PCIDEVICE_VIADUCT_DEV_NET"] != vf0 || got.Envs["PCI_RESOURCE_VIADUCT_DEV_NET"] != vf0 ||
		len(got.Devices)+len(got.Mounts)+len(got.Annotations) > 0 {
		t.Fatalf("allocated %v, %v", got, err)
	}
	spec, err := os.ReadFile(filepath.Join(cdi, "viaduct.dev-pool-net.json"))
	if err != nil || !strings.Contains(string(spec), `"name": "`+vf0+`"`) || strings.Contains(string(spec), vf1) {
		t.Errorf("containers get %s, %v", spec, err)
	}
	if _, err := client.API().PreStartContainer(t.Context(),
		&api.PreStartContainerRequest{DevicesIds: []string{vf0}}); err != nil {
		t.Errorf("before the container starts: %v", err)
	}

	byHand, err := lease.Open(&iommu.Host{Host: k.Host()}, lease.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer byHand.Close()
	if _, _, err := byHand.Assign(t.Context(), lease.Request{Guest: "web",
		Sources: []lease.Source{{From: vf1}}}); err != nil {
		t.Fatal(err)
	}
	if got, err := allocate(client, vf1); err == nil || !strings.Contains(err.Error(), `assigned to guest "web"`) {
		t.Errorf("what a guest has was allocated: %v, %v", got, err)
	}
	look(t, k, p)
	if got := health(next(t, "the list with a guest's", m.lists)); got != vf0+" Healthy, "+vf1+" Unhealthy" {
		t.Errorf("with a guest's: %s", got)
	}

	if err := server.Stop(klog.Background()); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(dir, "kubelet.sock")); err != nil {
		t.Fatal(err)
	}
	server = start(t, dir, m)
	defer func() { _ = server.Stop(klog.Background()) }()
	next(t, "the plugin, after the kubelet has started again", m.connected)
	if got := health(next(t, "the list again", m.lists)); got != vf0+" Healthy, "+vf1+" Unhealthy" {
		t.Errorf("again: %s", got)
	}

	// The pod is known, and then it is gone.
	inUse := func(used map[string]string, now time.Time) []lease.Lease {
		if err := p.InUse(t.Context(), look(t, k, p), used, now); err != nil {
			t.Error(err)
		}
		return slices.DeleteFunc(look(t, k, p), func(l lease.Lease) bool { return !ours(&l) })
	}
	now := time.Now()
	if l := inUse(map[string]string{vf0: "default/web"}, now); len(l) != 1 ||
		l[0].For != "pod default/web by viaduct.dev/net of viaduct.dev" {
		t.Errorf("of a pod: %+v", l)
	}
	if l := inUse(nil, now); len(l) != 1 {
		t.Errorf("just now: %+v", l)
	}
	if l := inUse(nil, now.Add(2*time.Minute)); len(l) > 0 {
		t.Errorf("two minutes later: %+v", l)
	}
	a, _ := iommu.ParseAddress(vf0)
	if driver, err := iommu.ReadDriver(&iommu.Host{Host: k.Host()}, a); err != nil || driver != "" {
		t.Errorf("afterwards it is on %q, %v", driver, err)
	}
}
