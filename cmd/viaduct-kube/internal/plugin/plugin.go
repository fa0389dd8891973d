// Package plugin serves a pool's functions to the kubelet as a device plugin, for what cannot use dynamic resource
// allocation yet. Kubernetes tells a device plugin what to give out and not when it is given back: that is seen in what
// the kubelet says of its pods.
package plugin

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	kubelet "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"

	"viaduct/cmd/lease"
	"viaduct/cmd/viaduct-kube/internal/node"
	"viaduct/iommu"
)

// Options are what a Plugin works with.
type Options struct {
	Host   *iommu.Host
	Domain string // of resources, e.g. viaduct.dev
	Pool   string
	CDIDir string
	Ours   func(*lease.Lease) bool
	Mark   func(whom string) string // words for whom a lease is, which Ours knows again
	Count  func(what, result string, took time.Duration)
	Tell   func(warning bool, reason, text string)
	// Changed is called when what is given out may have changed.
	Changed func()
}

// Plugin gives out one pool's functions.
type Plugin struct {
	kubelet.UnimplementedDevicePluginServer
	Options

	mu       sync.Mutex
	last     []node.Function
	watchers map[chan struct{}]bool
	work     sync.Mutex // one assignment at a time
	unused   map[string]time.Time
}

// New makes a Plugin.
func New(o Options) *Plugin {
	return &Plugin{Options: o, watchers: map[chan struct{}]bool{}, unused: map[string]time.Time{}}
}

// Resource is the name by which pods ask for the pool's functions, and the kind of the functions in CDI.
func (p *Plugin) Resource() string { return node.PoolKind(p.Domain, p.Pool) }

// Saw notes the functions as they are now.
func (p *Plugin) Saw(functions []node.Function) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var mine []node.Function
	for _, f := range functions {
		if f.Pool == p.Pool && !f.Lost {
			mine = append(mine, f)
		}
	}
	if p.last = mine; p.last == nil {
		p.last = []node.Function{}
	}
	for w := range p.watchers {
		select {
		case w <- struct{}{}:
		default:
		}
	}
}

func (p *Plugin) functions() []node.Function {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.last
}

// GetDevicePluginOptions says what the kubelet may ask.
func (p *Plugin) GetDevicePluginOptions(context.Context, *kubelet.Empty) (*kubelet.DevicePluginOptions, error) {
	return &kubelet.DevicePluginOptions{PreStartRequired: true, GetPreferredAllocationAvailable: true}, nil
}

// ListAndWatch tells the kubelet of the functions, and again when they change.
func (p *Plugin) ListAndWatch(_ *kubelet.Empty, stream grpc.ServerStreamingServer[kubelet.ListAndWatchResponse]) error {
	changed := make(chan struct{}, 1)
	p.mu.Lock()
	p.watchers[changed] = true
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		delete(p.watchers, changed)
		p.mu.Unlock()
	}()

	told := ""
	for {
		list := Devices(p.functions())
		// A map's order must not look like a change.
		if text := fmt.Sprint(list); text != told {
			told = text
			if err := stream.Send(&kubelet.ListAndWatchResponse{Devices: list}); err != nil {
				return err
			}
		}
		select {
		case <-stream.Context().Done():
			return nil
		case <-changed:
		}
	}
}

// Devices are functions as the kubelet is told of them: by address, with their health, and where they are near. A
// function whose NUMA node is not known is near none.
func Devices(functions []node.Function) []*kubelet.Device {
	out := []*kubelet.Device{}
	for i := range functions {
		f := &functions[i]
		d := &kubelet.Device{ID: f.Address.String(), Health: kubelet.Healthy}
		if len(f.Wrong) > 0 {
			d.Health = kubelet.Unhealthy
		}
		if f.NUMA != nil {
			d.Topology = &kubelet.TopologyInfo{Nodes: []*kubelet.NUMANode{{ID: int64(*f.NUMA)}}}
		}
		out = append(out, d)
	}
	return out
}

// GetPreferredAllocation proposes functions that are near each other.
func (p *Plugin) GetPreferredAllocation(_ context.Context,
	r *kubelet.PreferredAllocationRequest) (*kubelet.PreferredAllocationResponse, error) {
	out := &kubelet.PreferredAllocationResponse{}
	for _, c := range r.ContainerRequests {
		out.ContainerResponses = append(out.ContainerResponses, &kubelet.ContainerPreferredAllocationResponse{
			DeviceIDs: Prefer(p.functions(), c.AvailableDeviceIDs, c.MustIncludeDeviceIDs, int(c.AllocationSize)),
		})
	}
	return out, nil
}

// Prefer chooses so many of the available functions: those that must be among them, and else those of one NUMA node and
// of one PF, where as many are left; in the order of their addresses.
func Prefer(functions []node.Function, available, must []string, size int) []string {
	type place struct{ numa, pf string }
	at := map[string]place{}
	for i := range functions {
		f := &functions[i]
		where := place{numa: "unknown"}
		if f.NUMA != nil {
			where.numa = fmt.Sprint(*f.NUMA)
		}
		if f.PF != nil {
			where.pf = f.PF.String()
		}
		at[f.Address.String()] = where
	}
	out := slices.Clone(must)
	rest := slices.DeleteFunc(slices.Clone(available), func(id string) bool { return slices.Contains(must, id) })
	inNUMA, ofPF := map[string]int{}, map[place]int{}
	for _, id := range rest {
		inNUMA[at[id].numa]++
		ofPF[at[id]]++
	}

	chosen := map[string]bool{}
	chosenPF := map[place]bool{}
	for _, id := range must {
		chosen[at[id].numa], chosenPF[at[id]] = true, true
	}
	rank := func(id string) int {
		n, missing := 0, size-len(must)
		if !chosen[at[id].numa] {
			n += 4
			if inNUMA[at[id].numa] < missing {
				n += 8
			}
		}
		if !chosenPF[at[id]] {
			n++
			if ofPF[at[id]] < missing {
				n++
			}
		}
		return n
	}
	for len(out) < size && len(rest) > 0 {
		best := slices.MinFunc(rest, func(a, b string) int {
			return cmp.Or(rank(a)-rank(b), strings.Compare(a, b))
		})
		out = append(out, best)
		chosen[at[best].numa], chosenPF[at[best]] = true, true
		rest = slices.DeleteFunc(rest, func(id string) bool { return id == best })
	}
	return out
}

// Allocate assigns functions to a container. It gets them by their CDI names, which stay right when a boot changes the
// numbers of IOMMU groups, as the kubelet gives what it was told once to each start of the container.
func (p *Plugin) Allocate(ctx context.Context, r *kubelet.AllocateRequest) (*kubelet.AllocateResponse, error) {
	begun := time.Now()
	out, err := p.allocate(ctx, r)
	p.Count("allocate", result(err), time.Since(begun))
	if err != nil {
		p.Tell(true, "AllocateFailed", err.Error())
	}
	p.Changed()
	return out, err
}

func result(err error) string {
	if err != nil {
		return "failed"
	}
	return "ok"
}

func (p *Plugin) allocate(ctx context.Context, r *kubelet.AllocateRequest) (*kubelet.AllocateResponse, error) {
	p.work.Lock()
	defer p.work.Unlock()
	out := &kubelet.AllocateResponse{}
	var fresh []string
	for _, c := range r.ContainerRequests {
		made, err := p.assign(ctx, c.DevicesIds)
		fresh = append(fresh, made...)
		if err != nil {
			return nil, errors.Join(err, p.release(context.WithoutCancel(ctx), fresh))
		}
		out.ContainerResponses = append(out.ContainerResponses, p.response(c.DevicesIds))
	}
	return out, nil
}

// response is what a container gets.
func (p *Plugin) response(ids []string) *kubelet.ContainerAllocateResponse {
	out := &kubelet.ContainerAllocateResponse{Envs: map[string]string{}}
	for _, id := range ids {
		out.CdiDevices = append(out.CdiDevices, &kubelet.CDIDevice{Name: p.Resource() + "=" + id})
	}
	for _, name := range EnvNames(p.Resource()) {
		// Only what was asked for: KubeVirt takes one after the other.
		out.Envs[name] = strings.Join(ids, ",")
	}
	return out
}

// EnvNames are the variables that tell a container its functions' addresses: those that the SR-IOV network device
// plugin's and Kata's users read, and KubeVirt.
func EnvNames(resource string) []string {
	name := strings.ToUpper(strings.NewReplacer("/", "_", ".", "_").Replace(resource))
	return []string{"PCIDEVICE_" + name, "PCI_RESOURCE_" + name}
}

// PreStartContainer makes sure that a container has its functions: after a boot they are to be assigned again.
func (p *Plugin) PreStartContainer(ctx context.Context,
	r *kubelet.PreStartContainerRequest) (*kubelet.PreStartContainerResponse, error) {
	p.work.Lock()
	defer p.work.Unlock()
	_, err := p.assign(ctx, r.DevicesIds)
	if err != nil {
		p.Tell(true, "PreStartFailed", err.Error())
		return nil, err
	}
	return &kubelet.PreStartContainerResponse{}, nil
}

// Guest is the name of the lease of a function.
func (p *Plugin) guest(id string) string { return p.Domain + "-" + id }

// assign assigns functions, each by a lease of its own, and writes down what containers get by their names. It returns
// those that had none before.
func (p *Plugin) assign(ctx context.Context, ids []string) (fresh []string, err error) {
	for _, id := range ids {
		made, err := p.assignOne(ctx, id, "")
		if err != nil {
			return fresh, err
		}
		if made {
			fresh = append(fresh, id)
		}
	}
	return fresh, p.write()
}

func (p *Plugin) assignOne(ctx context.Context, id, whom string) (fresh bool, err error) {
	if !p.has(id) {
		return false, fmt.Errorf("%s is not a device of pool %s", id, p.Pool)
	}

	address, err := iommu.ParseAddress(id)
	if err != nil {
		return false, err
	}

	books, err := lease.Open(p.Host, lease.Options{Tell: func(note string) { p.Tell(false, "Note", note) }})
	if err != nil {
		return false, err
	}
	defer books.Close()
	r := lease.Request{
		Guest: p.guest(id), For: p.Mark(cmp.Or(whom, "a pod by "+p.Resource())), Persist: true,
		Sources: []lease.Source{{From: id}},
	}

	of, err := leaseOf(books, address)
	switch {
	case err != nil:
		return false, err
	case of != nil && of.Guest != r.Guest:
		other := node.Function{Address: address, Lease: of}
		return false, other.Taken()
	case of != nil && whom == "":
		r.For = of.For
	}

	made, fresh, err := books.Assign(ctx, r)
	if err == nil && fresh && !made.Has(address) {
		_, undone := books.Release(ctx, r.Guest, 0)
		err = errors.Join(fmt.Errorf("%s is not what was assigned", id), undone)
	}

	return fresh, err
}

// leaseOf is the lease that has a function; nil if none has.
func leaseOf(books *lease.Books, a iommu.Address) (*lease.Lease, error) {
	all, err := books.Leases()
	if err != nil {
		return nil, err
	}
	for i := range all {
		if all[i].Has(a) {
			return &all[i], nil
		}
	}
	return nil, nil
}

// write writes the pool's CDI specification as the kernel's numbers are now.
func (p *Plugin) write() error {
	books, err := lease.Open(p.Host, lease.Options{})
	if err != nil {
		return err
	}
	defer books.Close()
	facts, err := node.Read(p.Host, books)
	if err != nil {
		return err
	}
	return node.WritePools(p.CDIDir, p.Domain, node.Functions(facts, p.Ours), facts.Nodes)
}

// release takes functions back.
func (p *Plugin) release(ctx context.Context, ids []string) error {
	var errs []error
	for _, id := range ids {
		errs = append(errs, p.releaseOne(ctx, id))
	}
	return errors.Join(errs...)
}

func (p *Plugin) releaseOne(ctx context.Context, id string) error {
	books, err := lease.OpenToRelease(p.Host, lease.Options{})
	if err != nil {
		return err
	}
	defer books.Close()
	begun := time.Now()
	done, err := books.Release(ctx, p.guest(id), 0)
	if errors.Is(err, lease.ErrNoLease) {
		return nil
	}
	p.Count("release", result(err), time.Since(begun))
	for _, c := range done {
		if !c.Clean {
			p.Tell(true, "NotCleaned", c.Address.String()+": "+c.Why)
		}
	}
	return err
}

// grace is how long a function that no pod has is kept for the pod that it was just allocated to.
const grace = time.Minute

// InUse takes back what no pod has any more. Used names the pods by function, as the kubelet tells.
func (p *Plugin) InUse(ctx context.Context, leases []lease.Lease, used map[string]string, now time.Time) error {
	p.work.Lock()
	defer p.work.Unlock()
	var errs []error
	seen := map[string]bool{}
	for i := range leases {
		l := &leases[i]
		id, mine := strings.CutPrefix(l.Guest, p.Domain+"-")
		if !mine || !p.Ours(l) || !p.has(id) {
			continue
		}
		seen[id] = true
		if pod := used[id]; pod != "" {
			delete(p.unused, id)
			if whom := "pod " + pod + " by " + p.Resource(); l.For != p.Mark(whom) && l.Ready {
				_, err := p.assignOne(ctx, id, whom)
				errs = append(errs, err)
			}
			continue
		}
		if since, known := p.unused[id]; !known {
			p.unused[id] = now
		} else if now.Sub(since) >= grace && l.State != "active" {
			delete(p.unused, id)
			errs = append(errs, p.releaseOne(ctx, id))
			p.Changed()
		}
	}

	maps.DeleteFunc(p.unused, func(id string, _ time.Time) bool { return !seen[id] })
	return errors.Join(errs...)
}

func (p *Plugin) has(id string) bool {
	return slices.ContainsFunc(p.functions(), func(f node.Function) bool { return f.Address.String() == id })
}
