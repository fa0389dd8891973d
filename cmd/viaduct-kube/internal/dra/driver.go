package dra

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	resource "k8s.io/api/resource/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/dynamic-resource-allocation/kubeletplugin"

	"viaduct/cmd/lease"
	"viaduct/cmd/viaduct-kube/internal/node"
	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio"
)

// Options are what a Driver works with.
type Options struct {
	Host     *iommu.Host
	Name     string // of the driver
	Node     string
	CDIDir   string
	Settings *node.Settings
	// Tell is told what the operator should know of a claim; warning says that something went wrong.
	Tell func(claim kubeletplugin.NamespacedObject, warning bool, reason, text string)
	// Count counts what was done, and how it ended.
	Count func(what, result string, took time.Duration)
	// Changed is called when what is published may have changed.
	Changed func()
	// Fatal is called with an error that ends the driver.
	Fatal func(error)
}

// Driver prepares and unprepares claims. It keeps nothing between its calls: what was prepared is in the node's books,
// so that another process may go on.
type Driver struct {
	Options

	mu       sync.Mutex
	last     []node.Function
	watchers map[chan struct{}]bool
}

// New makes a Driver.
func New(o Options) *Driver { return &Driver{Options: o, watchers: map[chan struct{}]bool{}} }

// Wait is how long an unprepare waits until nobody has a function open.
const wait = 10 * time.Second

// PrepareResourceClaims gives claims their functions: each claim has all of them or none, and what fails is as it was.
func (d *Driver) PrepareResourceClaims(ctx context.Context,
	claims []*resource.ResourceClaim) (map[types.UID]kubeletplugin.PrepareResult, error) {
	out := map[types.UID]kubeletplugin.PrepareResult{}
	for _, c := range claims {
		begun := time.Now()
		devices, err := d.prepare(ctx, c)
		out[c.UID] = kubeletplugin.PrepareResult{Devices: devices, Err: err}
		d.Count("prepare", result(err), time.Since(begun))
		if err != nil {
			d.Tell(nameOf(c), true, "PrepareFailed", err.Error())
		}
	}
	d.Changed()
	return out, nil
}

func result(err error) string {
	if err != nil {
		return "failed"
	}
	return "ok"
}

func nameOf(c *resource.ResourceClaim) kubeletplugin.NamespacedObject {
	return kubeletplugin.NamespacedObject{
		NamespacedName: types.NamespacedName{Namespace: c.Namespace, Name: c.Name}, UID: c.UID,
	}
}

func (d *Driver) prepare(ctx context.Context, claim *resource.ResourceClaim) ([]kubeletplugin.Device, error) {
	plan, err := PlanOf(claim, d.Name, d.Node)
	if err != nil {
		return nil, err
	}
	if len(plan.Devices) == 0 {
		return nil, nil
	}
	var notes []string
	books, err := lease.Open(d.Host, lease.Options{Tell: func(note string) { notes = append(notes, note) }})
	if err != nil {
		return nil, err
	}
	defer books.Close()
	facts, err := node.Read(d.Host, books)
	if err != nil {
		return nil, err
	}
	functions := node.Functions(facts, Ours(d.Name))
	if err := d.served(plan, functions); err != nil {
		return nil, err
	}

	made, fresh, err := books.Assign(ctx, plan.Request)
	if err != nil {
		return nil, err
	}
	out, err := d.give(plan, &made, fresh, functions)
	if err != nil && fresh {
		_, undone := books.Release(context.WithoutCancel(ctx), plan.Request.Guest, 0)
		err = errors.Join(err, undone)
	}
	for _, n := range notes {
		d.Tell(nameOf(claim), false, "Note", n)
	}
	return out, err
}

// served refuses functions that this driver does not serve. A claim that has them already keeps them.
func (d *Driver) served(p *Plan, functions []node.Function) error {
	for _, want := range p.Devices {
		i := slices.IndexFunc(functions, func(f node.Function) bool { return f.Address == want.Address })
		switch {
		case i < 0:
			return fmt.Errorf("%s is not a device that host.yaml declares for guests", want.Address)
		case functions[i].Lease != nil && functions[i].Lease.Guest == p.Request.Guest:
		case functions[i].Lease != nil:
			return functions[i].Taken()
		case !d.Settings.Serves(node.DRA, &functions[i]):
			return fmt.Errorf("%s is served by the provider %s, not by DRA (%s)", want.Address,
				d.Settings.Provider(functions[i].Pool), node.SettingsFile)
		}
	}
	return nil
}

// give writes down what containers get of a lease, and tells the kubelet.
func (d *Driver) give(p *Plan, made *lease.Lease, fresh bool, before []node.Function) ([]kubeletplugin.Device, error) {
	spec := node.NewSpec(d.kind())
	var out []kubeletplugin.Device
	for i, want := range p.Devices {
		now, err := where(p, made, fresh, i)
		if err != nil {
			return nil, err
		}
		found, err := iommu.ReadDevice(d.Host, now.Address)
		if err != nil {
			return nil, err
		}
		nodes, err := d.nodes(&found, want.Backend)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", now.Address, err)
		}
		name := p.Request.Guest + "-" + want.Result.Device
		spec.Add(name, nodes)
		out = append(out, kubeletplugin.Device{
			Requests: []string{want.Result.Request}, PoolName: want.Result.Pool, DeviceName: want.Result.Device,
			ShareID: want.Result.ShareID, CDIDeviceIDs: []string{spec.Kind + "=" + name},
			Metadata: metadata(&found, now, before),
		})
	}
	return out, spec.Write(d.CDIDir, d.specName(p.Request.Guest))
}

// nodes are those that a container gets of a function.
func (d *Driver) nodes(of *iommu.Device, b node.Backend) ([]string, error) {
	ways, err := vfio.Ways(d.Host, of)
	if err != nil {
		return nil, err
	}
	if b == node.IOMMUFD && !slices.Contains(ways, vfio.IOMMUFD) {
		return nil, errors.New("this node has no iommufd: ask for the backend group")
	}
	all, err := vfio.Nodes(d.Host, of)
	if err != nil {
		return nil, err
	}
	return node.Pick(all, b)
}

// where is which of a lease's devices a plan's function is. One that a boot has moved is still the same function, and
// has another address.
func where(p *Plan, made *lease.Lease, fresh bool, i int) (lease.Device, error) {
	want := p.Devices[i].Address
	for _, d := range made.Devices {
		if d.Address == want {
			return d, nil
		}
	}
	if fresh || len(made.Devices) != len(p.Devices) {
		return lease.Device{}, fmt.Errorf("%s is not what was assigned: delete the pod, so that the claim is "+
			"allocated again", want)
	}
	return made.Devices[i], nil
}

// metadata is what a pod is told of a function: what was published, as it is now.
func metadata(d *iommu.Device, now lease.Device, before []node.Function) *kubeletplugin.DeviceMetadata {
	f := node.Function{
		ID: d.ID, Address: d.Address, Kind: node.PCI, Driver: d.Driver, VFIO: true, NUMA: d.NUMANode, Group: d.Group,
	}
	if i := slices.IndexFunc(before, func(f node.Function) bool { return f.Address == d.Address }); i >= 0 {
		f = before[i]
		f.Driver, f.VFIO, f.Group = d.Driver, d.VFIO, d.Group
	}
	out := &kubeletplugin.DeviceMetadata{Attributes: map[string]resource.DeviceAttribute{}}
	for name, value := range Attributes(&f) {
		if name != "iommufd" {
			out.Attributes[string(name)] = value
		}
	}
	if mac := now.Settings[sriov.MAC]; mac != "" {
		out.NetworkData = &resource.NetworkDeviceData{HardwareAddress: mac}
	}
	return out
}

func (d *Driver) kind() string { return d.Name + "/claim" }

func (d *Driver) specName(uid string) string { return d.Name + "-claim-" + uid }

// UnprepareResourceClaims takes functions back: they are reset, and have their settings and drivers back. A claim that
// has none is no error.
func (d *Driver) UnprepareResourceClaims(ctx context.Context,
	claims []kubeletplugin.NamespacedObject) (map[types.UID]error, error) {
	out := map[types.UID]error{}
	for _, c := range claims {
		begun := time.Now()
		out[c.UID] = d.unprepare(ctx, c)
		d.Count("unprepare", result(out[c.UID]), time.Since(begun))
		if err := out[c.UID]; err != nil {
			d.Tell(c, true, "UnprepareFailed", err.Error())
		}
	}
	d.Changed()
	return out, nil
}

func (d *Driver) unprepare(ctx context.Context, claim kubeletplugin.NamespacedObject) error {
	uid := string(claim.UID)
	books, err := lease.OpenToRelease(d.Host, lease.Options{})
	if err != nil {
		return err
	}
	defer books.Close()
	done, err := books.Release(ctx, uid, wait)
	if errors.Is(err, lease.ErrNoLease) {
		err = nil
	}
	for _, c := range done {
		switch {
		case c.Clean && c.Note != "":
			d.Tell(claim, false, "Cleaned", c.Address.String()+" is clean: "+c.Note)
		case c.Clean:
			d.Tell(claim, false, "Cleaned", c.Address.String()+" is clean")
		default:
			d.Tell(claim, true, "NotCleaned", c.Address.String()+": "+c.Why)
		}
	}
	if err != nil {
		// Of what went into quarantine the claim is rid, and nobody else gets it.
		if ended, other := books.Ended(uid); !ended || other != nil {
			return errors.Join(err, other)
		}
	}
	return node.Remove(d.CDIDir, d.specName(uid))
}

// HandleError ends the driver if it cannot go on.
func (d *Driver) HandleError(_ context.Context, err error, msg string) {
	d.Tell(kubeletplugin.NamespacedObject{}, true, "PublishFailed", msg+": "+err.Error())
	if !errors.Is(err, kubeletplugin.ErrRecoverable) {
		d.Fatal(fmt.Errorf("%s: %w", msg, err))
	}
}

// Saw notes the functions as they are now, for who watches their health.
func (d *Driver) Saw(functions []node.Function) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.last = functions
	for w := range d.watchers {
		select {
		case w <- struct{}{}:
		default:
		}
	}
}

// resend is how often health is told again: the kubelet forgets it after 30 s.
const resend = 10 * time.Second

// WatchHealthStatus tells the kubelet how functions are: at once, when that changes, and now and then.
func (d *Driver) WatchHealthStatus(ctx context.Context, reports chan<- kubeletplugin.DeviceHealthReport) error {
	changed := make(chan struct{}, 1)
	d.mu.Lock()
	d.watchers[changed] = true
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		delete(d.watchers, changed)
		d.mu.Unlock()
	}()
	again := time.NewTicker(resend)
	defer again.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case reports <- d.health():
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-again.C:
		}
	}
}

func (d *Driver) health() kubeletplugin.DeviceHealthReport {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out kubeletplugin.DeviceHealthReport
	for i := range d.last {
		f := &d.last[i]
		if !d.Settings.Serves(node.DRA, f) {
			continue
		}
		h := kubeletplugin.DeviceHealth{
			PoolName: d.Node, DeviceName: f.Name(), Health: kubeletplugin.HealthStatusHealthy, LastUpdated: time.Now(),
		}
		if len(f.Wrong) > 0 {
			h.Health, h.Message = kubeletplugin.HealthStatusUnhealthy, f.Why()
		}
		out.Devices = append(out.Devices, h)
	}
	return out
}
