package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	core "k8s.io/api/core/v1"
	resource "k8s.io/api/resource/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	typedcore "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/record"
	"k8s.io/dynamic-resource-allocation/api/metadata/v1alpha1"
	"k8s.io/dynamic-resource-allocation/api/metadata/v1beta1"
	"k8s.io/dynamic-resource-allocation/deviceattribute"
	"k8s.io/dynamic-resource-allocation/kubeletplugin"
	"k8s.io/dynamic-resource-allocation/resourceslice"

	"viaduct/cmd/lease"
	"viaduct/cmd/viaduct-kube/internal/dra"
	"viaduct/cmd/viaduct-kube/internal/node"
	"viaduct/cmd/viaduct-kube/internal/plugin"
	"viaduct/iommu"
)

// serveOptions are those of serve.
type serveOptions struct {
	common
	node, kubeconfig, metrics, podUID string
}

func serveCommand(ctx context.Context, args []string, stderr io.Writer) error {
	var o serveOptions
	f := flag.NewFlagSet("serve", flag.ContinueOnError)
	o.flags(f)
	f.StringVar(&o.node, "node", os.Getenv("NODE_NAME"), "`name` of this node in the cluster (default $NODE_NAME)")
	f.StringVar(&o.kubeconfig, "kubeconfig", "", "`file` that says how to reach the cluster; leave it out in a pod")
	f.StringVar(&o.metrics, "metrics", "", "`address` to serve metrics at, e.g. 127.0.0.1:9400; none if it is empty")
	f.StringVar(&o.podUID, "pod-uid", os.Getenv("POD_UID"),
		"`uid` of the pod that this runs in, for a rolling update (default $POD_UID)")
	if err := parseOnly(f, args, stderr); err != nil {
		return err
	}
	if o.node == "" {
		return usageError{errors.New("serve: --node is missing: name this node as the cluster does")}
	}

	h, err := iommu.Open("")
	if err != nil {
		return err
	}
	defer h.Close()
	if err := node.Preflight(h, node.Needs(o.kubeletDir, o.cdiDir)); err != nil {
		return fmt.Errorf("this node cannot be served:\n%w", err)
	}

	client, err := connect(o.kubeconfig)
	if err != nil {
		return err
	}

	s, err := newServer(h, client, &o, stderr)
	if err != nil {
		return err
	}

	return s.run(ctx)
}

// connect makes a client of the cluster. Many devices are many objects, which are written without waiting in between.
func connect(kubeconfig string) (kubernetes.Interface, error) {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("find the cluster: %w", err)
	}
	config.QPS, config.Burst = 50, 100
	return kubernetes.NewForConfig(rest.AddUserAgent(config, "viaduct-kube"))
}

// server serves a node.
type server struct {
	*serveOptions
	host     *iommu.Host
	client   kubernetes.Interface
	settings *node.Settings
	dra      *dra.Driver
	plugins  map[string]*plugin.Plugin
	helper   *kubeletplugin.Helper
	kubelet  *plugin.Kubelet
	counts   *metrics
	events   record.EventRecorder
	log      io.Writer
	logMu    sync.Mutex
	changed  chan struct{} // something may be other than it was
	fatal    chan error
	recorded node.Record
	asked    time.Time // when others were asked the last time what they give out
	// What device plugins and drivers of others give out.
	byPlugins, byDrivers []node.Claim
}

func newServer(h *iommu.Host, client kubernetes.Interface, o *serveOptions, log io.Writer) (*server, error) {
	settings, err := node.LoadSettings(o.config)
	if err != nil {
		return nil, err
	}
	s := &server{
		serveOptions: o, host: h, client: client, settings: settings, plugins: map[string]*plugin.Plugin{}, log: log,
		counts: newMetrics(), changed: make(chan struct{}, 1), fatal: make(chan error, 1),
	}
	if s.kubelet, err = plugin.Ask(filepath.Join(o.kubeletDir, plugin.PodResources)); err != nil {
		return nil, err
	}
	s.dra = dra.New(dra.Options{
		Host: h, Name: o.driver, Node: o.node, CDIDir: o.cdiDir, Settings: settings, Tell: s.tellClaim,
		Count: s.counts.count, Changed: s.touch, Fatal: s.fail,
	})
	return s, nil
}

// pluginDir is the folder of the driver's own.
func (s *server) pluginDir() string { return filepath.Join(s.kubeletDir, "plugins", s.driver) }

func (s *server) recordFile() string { return filepath.Join(s.pluginDir(), "providers.json") }

// run serves until the context ends.
func (s *server) run(ctx context.Context) error {
	defer s.kubelet.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for _, dir := range []string{s.pluginDir(), filepath.Join(s.kubeletDir, "plugins_registry")} {
		if err := os.MkdirAll(dir, 0o750); err != nil {
			return err
		}
	}
	stopEvents := s.recordEvents()
	defer stopEvents()
	functions, err := s.check(ctx)
	if err != nil {
		return err
	}
	if err := s.start(ctx, functions); err != nil {
		return err
	}
	defer s.helper.Stop()

	var plugins sync.WaitGroup
	defer plugins.Wait()
	defer cancel()
	for _, p := range s.plugins {
		plugins.Go(func() { _ = p.Serve(ctx, filepath.Join(s.kubeletDir, "device-plugins")) })
	}
	if s.metrics != "" {
		if err := s.serveMetrics(ctx); err != nil {
			return err
		}
	}
	s.say("serving %d functions of node %s", len(functions), s.node)
	return s.watch(ctx)
}

// check refuses to serve what somebody else serves, or a pod has by another provider.
func (s *server) check(ctx context.Context) ([]node.Function, error) {
	functions, facts, err := s.look()
	if err != nil {
		return nil, err
	}
	for _, p := range facts.Pools {
		if p.Name != "" && s.settings.Provider(p.Name) != node.Nobody {
			if err := node.CheckPool(p.Name); err != nil {
				return nil, err
			}
		}
	}
	if s.recorded, err = node.ReadRecord(s.recordFile()); err != nil {
		return nil, err
	}
	if err := s.settings.Changed(functions, s.recorded, dra.Ours(s.driver)); err != nil {
		return nil, err
	}
	if err := s.askOthers(ctx, functions); err != nil {
		return nil, err
	}
	if err := s.settings.RefuseShared(functions, s.others()); err != nil {
		return nil, err
	}
	s.recorded = s.settings.NewRecord(functions, s.recorded)
	return functions, s.recorded.Write(s.recordFile())
}

// askAgain is how often others are asked what they give out on this node. Neither they nor the kubelet tell.
const askAgain = time.Minute

// askOthers asks what other providers give out on this node: device plugins, of which the kubelet tells, and drivers of
// dynamic resource allocation. Of those that cannot be asked it stays known what they gave out before.
func (s *server) askOthers(ctx context.Context, functions []node.Function) error {
	s.asked = time.Now()
	isGroup := func(id string) bool { return s.host.Exists("dev/vfio/" + id) }
	if plugins, err := s.kubelet.Claims(ctx, s.driver, functions, isGroup); err == nil {
		s.byPlugins = plugins
	} else {
		// The kubelet may start later, and has no plugins then.
		s.say("cannot ask the kubelet what other device plugins give out: %v", err)
	}
	drivers, err := s.publishedByOthers(ctx)
	if err != nil {
		return fmt.Errorf("list what other drivers publish: %w", err)
	}
	s.byDrivers = drivers
	return nil
}

func (s *server) others() []node.Claim { return slices.Concat(s.byPlugins, s.byDrivers) }

// publishedByOthers is what other drivers publish of this node.
func (s *server) publishedByOthers(ctx context.Context) ([]node.Claim, error) {
	list, err := s.client.ResourceV1().ResourceSlices().List(ctx, meta.ListOptions{
		FieldSelector: resource.ResourceSliceSelectorNodeName + "=" + s.node,
	})
	if err != nil {
		return nil, err
	}
	var out []node.Claim
	for i := range list.Items {
		spec := &list.Items[i].Spec
		if spec.Driver == s.driver || spec.NodeName == nil || *spec.NodeName != s.node {
			continue
		}
		for _, d := range spec.Devices {
			id := d.Attributes[deviceattribute.StandardDeviceAttributePCIBusID].StringValue
			if id == nil {
				continue
			}
			if a, err := iommu.ParseAddress(*id); err == nil {
				out = append(out, node.Claim{Provider: "driver " + spec.Driver, Address: a})
			}
		}
	}
	return out, nil
}

// share notes which functions others give out too: they may have begun to after this driver.
func (s *server) share(ctx context.Context, functions []node.Function) {
	if time.Since(s.asked) >= askAgain {
		if err := s.askOthers(ctx, functions); err != nil {
			s.say("%v", err)
		}
	}
	s.settings.Share(functions, s.others())
}

// start starts what the kubelet calls.
func (s *server) start(ctx context.Context, functions []node.Function) (err error) {
	s.dra.Saw(functions)
	for pool, provider := range s.settings.Pools {
		if provider != node.DevicePlugin {
			continue
		}
		s.plugins[pool] = plugin.New(plugin.Options{
			Host: s.host, Domain: s.driver, Pool: pool, CDIDir: s.cdiDir, Ours: dra.Ours(s.driver),
			Mark:  func(whom string) string { return dra.Mark(whom, s.driver) },
			Count: s.counts.count, Tell: s.tell, Changed: s.touch,
		})
		s.plugins[pool].Saw(functions)
	}

	s.helper, err = kubeletplugin.Start(ctx, s.dra,
		kubeletplugin.DriverName(s.driver),
		kubeletplugin.KubeClient(s.client),
		kubeletplugin.NodeName(s.node),
		kubeletplugin.RollingUpdate(types.UID(s.podUID)),
		kubeletplugin.RegistrarDirectoryPath(filepath.Join(s.kubeletDir, "plugins_registry")),
		kubeletplugin.PluginDataDirectoryPath(s.pluginDir()),
		kubeletplugin.CDIDirectory(s.cdiDir),
		// KubeVirt 1.9 reads the older one alone.
		kubeletplugin.EnableDeviceMetadata(true, []schema.GroupVersion{
			v1beta1.SchemeGroupVersion, v1alpha1.SchemeGroupVersion,
		}),
	)
	return err
}

// look looks at the host, and writes down what containers get of it.
func (s *server) look() ([]node.Function, *node.Facts, error) {
	books, err := lease.Open(s.host, lease.Options{})
	if err != nil {
		return nil, nil, err
	}
	defer books.Close()
	facts, err := node.Read(s.host, books)
	if err != nil {
		return nil, nil, err
	}
	functions := node.Functions(facts, dra.Ours(s.driver))
	return functions, facts, node.WritePools(s.cdiDir, s.driver, functions, facts.Nodes)
}

// again is how often the host is looked at although nothing was heard of it: not all that matters comes with an event.
const again = 10 * time.Second

// settle is how long after an event the host is looked at, as many come together.
const settle = 200 * time.Millisecond

// registrationWait is how long the kubelet is waited for before anything is published.
const registrationWait = time.Minute

// watch publishes the functions, and again when they change.
func (s *server) watch(ctx context.Context) error {
	go s.hear(ctx)
	s.registered(ctx)
	tick := time.NewTicker(again)
	defer tick.Stop()
	for {
		if err := s.publish(ctx); err != nil {
			s.tell(true, "LookFailed", err.Error())
		}
		select {
		case <-ctx.Done():
			return nil
		case err := <-s.fatal:
			return err
		case <-tick.C:
		case <-s.changed:
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(settle):
			}
		}
	}
}

// registered waits until the kubelet has taken the driver: what is published before that is scheduled at once, and the
// kubelet, which cannot prepare it, tries again only after a minute. A kubelet that does not come is not waited for: no
// pod is on its node.
func (s *server) registered(ctx context.Context) {
	ctx, stop := context.WithTimeout(ctx, registrationWait)
	defer stop()
	// The helper has no event for it.
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		if status := s.helper.RegistrationStatus(); status != nil && status.PluginRegistered || len(s.fatal) > 0 {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (s *server) publish(ctx context.Context) error {
	begun := time.Now()
	functions, facts, err := s.look()
	s.counts.count("look", resultOf(err), time.Since(begun))
	if err != nil {
		return err
	}
	for _, unseen := range facts.Unseen() {
		s.tell(true, "LookFailed", unseen)
	}
	s.share(ctx, functions)
	s.counts.see(functions, s.settings)
	s.dra.Saw(functions)
	for _, p := range s.plugins {
		p.Saw(functions)
	}
	if now := s.settings.NewRecord(functions, s.recorded); fmt.Sprint(now) != fmt.Sprint(s.recorded) {
		if err := now.Write(s.recordFile()); err != nil {
			return err
		}
		s.recorded = now
	}
	err = s.helper.PublishResources(ctx, resourceslice.DriverResources{
		Pools: map[string]resourceslice.Pool{s.node: dra.Pool(s.driver, functions, s.settings)},
	})
	return errors.Join(err, s.reclaim(ctx, facts.Leases))
}

func resultOf(err error) string {
	if err != nil {
		return "failed"
	}
	return "ok"
}

// reclaim takes back what pods had from a device plugin.
func (s *server) reclaim(ctx context.Context, leases []lease.Lease) error {
	if len(s.plugins) == 0 {
		return nil
	}
	used, err := s.kubelet.Used(ctx, s.driver)
	if err != nil {
		return fmt.Errorf("ask the kubelet which devices its pods have: %w", err)
	}
	var errs []error
	for _, p := range s.plugins {
		errs = append(errs, p.InUse(ctx, leases, used[p.Resource()], time.Now()))
	}
	return errors.Join(errs...)
}

// hear waits for what the kernel tells of its devices (NETLINK_KOBJECT_UEVENT, group 1). Without it the host is looked
// at now and then.
func (s *server) hear(ctx context.Context) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_KOBJECT_UEVENT)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1})
	}
	if err != nil {
		s.say("the kernel's events cannot be heard, so changes are seen within %s: %v", again, err)
		return
	}
	events := os.NewFile(uintptr(fd), "uevent")
	defer events.Close()
	stop := context.AfterFunc(ctx, func() { _ = events.Close() })
	defer stop()
	buf := make([]byte, 8192)
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if ctx.Err() != nil {
			return
		}
		if errors.Is(err, unix.EBADF) {
			return
		}
		if err == nil && concerns(string(buf[:n])) {
			s.touch()
		}
	}
}

// concerns reports whether an event is of a device that could be given out. Of a link that is lost there is none.
func concerns(event string) bool {
	return strings.Contains(event, "SUBSYSTEM=pci\x00") || strings.Contains(event, "SUBSYSTEM=vfio")
}

// touch has the host looked at soon.
func (s *server) touch() {
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

func (s *server) fail(err error) {
	select {
	case s.fatal <- err:
	default:
	}
}

// say tells the operator.
func (s *server) say(format string, a ...any) {
	s.logMu.Lock()
	defer s.logMu.Unlock()
	fmt.Fprintf(s.log, time.Now().UTC().Format(time.RFC3339)+" "+format+"\n", a...)
}

// recordEvents has events written to the cluster until stop is called.
func (s *server) recordEvents() (stop func()) {
	b := record.NewBroadcaster()
	b.StartRecordingToSink(&typedcore.EventSinkImpl{Interface: s.client.CoreV1().Events("")})
	s.events = b.NewRecorder(scheme.Scheme, core.EventSource{Component: "viaduct-kube", Host: s.node})
	return b.Shutdown
}

// tell tells the operator, in the log and as an event of the node.
func (s *server) tell(warning bool, reason, text string) {
	s.event(&core.ObjectReference{Kind: "Node", Name: s.node, UID: types.UID(s.node)}, warning, reason, text)
}

// tellClaim tells of a claim.
func (s *server) tellClaim(claim kubeletplugin.NamespacedObject, warning bool, reason, text string) {
	if claim.Name == "" {
		s.tell(warning, reason, text)
		return
	}
	s.event(&core.ObjectReference{
		APIVersion: "resource.k8s.io/v1", Kind: "ResourceClaim", Namespace: claim.Namespace, Name: claim.Name,
		UID: claim.UID,
	}, warning, reason, text)
}

func (s *server) event(of *core.ObjectReference, warning bool, reason, text string) {
	kind := core.EventTypeNormal
	if warning {
		kind = core.EventTypeWarning
	}
	s.say("%s %s/%s: %s: %s", of.Kind, of.Namespace, of.Name, reason, text)
	if s.events != nil {
		// An event's message has an end (core/validation).
		s.events.Event(of, kind, reason, text[:min(len(text), 1000)])
	}
}

// serveMetrics serves metrics until the context ends.
func (s *server) serveMetrics(ctx context.Context) error {
	listener, err := net.Listen("tcp", s.metrics)
	if err != nil {
		return fmt.Errorf("serve metrics: %w", err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) { s.counts.write(w) })
	web := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	context.AfterFunc(ctx, func() { _ = web.Close() })
	go func() {
		if err := web.Serve(listener); err != nil && !errors.Is(err, http.ErrServerClosed) {
			s.fail(fmt.Errorf("serve metrics: %w", err))
		}
	}()
	return nil
}
