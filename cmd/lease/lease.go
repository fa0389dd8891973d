// Package lease assigns a host's devices to guests and gets them back clean, for programs that do beside viaduct what
// `viaduct assign` and `viaduct release` do. Both work on the same books and in the same way: a device that one of them
// has given out the other gives to nobody, and there is one way in which a lease ends.
//
// A program calls [bind.ServeWrites] first in main, as what changes a host runs in a child of its own.
package lease

import (
	"context"
	"fmt"
	"slices"
	"time"

	"viaduct/cmd/internal/declared"
	"viaduct/cmd/internal/hostfile"
	books "viaduct/cmd/internal/lease"
	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/bind"
)

// ErrNoLease is matched by the error of [Books.Release] for a guest that has no lease.
const ErrNoLease = books.ErrNoLease

// Options are what leases are worked on with, beside the host.
type Options struct {
	// Timeout is how long one write may take, and another viaduct is waited for; 0 is [bind.DefaultTimeout].
	Timeout time.Duration
	// Tell is told what the user should know, as sentences; nil: nobody is.
	Tell func(note string)
}

// Books are the leases of a host as it is at one moment. A program opens them for one piece of work, as a command does,
// and closes them: nothing in them is kept up to date.
type Books struct {
	tell        func(string)
	handle      *sriov.Handle
	declaration *hostfile.Host
	manager     *books.Manager
	quarantine  books.Quarantined
}

// Open looks at a host, its leases and what is declared of it. A declaration that cannot be read is an error. The
// caller closes the Books before the host.
func Open(h *iommu.Host, o Options) (*Books, error) { return open(h, o, books.Makes) }

// OpenToRelease is [Open] for work that ends leases, which a declaration that cannot be read does not stop.
func OpenToRelease(h *iommu.Host, o Options) (*Books, error) { return open(h, o, books.Ends) }

func open(h *iommu.Host, o Options, does books.Work) (*Books, error) {
	b := &Books{tell: o.Tell}
	if b.tell == nil {
		b.tell = func(string) {}
	}
	options := books.HandleOptions(h)
	options.Timeout = o.Timeout
	var err error
	if b.handle, err = sriov.Open(h, options); err != nil {
		return nil, err
	}
	if err := b.read(does); err != nil {
		b.Close()
		return nil, err
	}
	return b, nil
}

// read reads what is declared, and the leases.
func (b *Books) read(does books.Work) error {
	file, wrong := hostfile.Load(b.handle.Host())
	use, note, err := books.InForce(b.handle.Host(), file, wrong, does)
	if note != "" {
		b.tell(note)
	}
	if err != nil {
		return err
	}
	if b.declaration = use; use == nil {
		b.declaration = &hostfile.Host{}
	}
	if b.manager, err = books.New(b.handle, books.Options{Declaration: use, Lock: b.lock}); err != nil {
		return err
	}
	b.quarantine, err = b.manager.Book.Quarantined()
	return err
}

// Close ends the work, and unlocks what it has locked.
func (b *Books) Close() { b.handle.Close() }

// lock keeps other viaducts from devices, and finishes or undoes what interrupted ones left of them.
func (b *Books) lock(ctx context.Context, devices []*iommu.Device) error {
	if !b.handle.Changes() {
		return nil
	}
	return books.Lock(ctx, b.handle, devices, func(all []bind.Recovered) {
		for _, r := range all {
			if r.Err != nil {
				b.tell(r.Err.Error())
			} else {
				b.tell(fmt.Sprintf("%s %s", r.Device, r.What))
			}
		}
	})
}

// Topology is the host as it was seen when the Books were opened. The caller does not change it.
func (b *Books) Topology() *iommu.Topology { return b.manager.Topology }

// Pool is what is declared under one name for guests to draw from.
type Pool struct {
	Name    string // "" of the devices that are declared to be taken and have no pool
	Devices []*iommu.Device
	// Err is why the pool has no devices now, or why some that are declared to be taken are not among them; nil if they
	// all are.
	Err error
}

// Pools are the declared pools, by their order, and last the devices that are declared to be taken for guests without
// one. A pool whose devices are not there is among them.
func (b *Books) Pools() []Pool {
	var out []Pool
	for _, name := range declared.Pools(b.declaration) {
		devices, err := b.manager.Declared().Pool(b.declaration, name)
		out = append(out, Pool{Name: name, Devices: devices, Err: err})
	}
	if taken, err := b.manager.Declared().Taken(b.declaration); len(taken) > 0 || err != nil {
		out = append(out, Pool{Devices: taken, Err: err})
	}
	return out
}

// Protected is the refusal of devices of which one is declared in protect, nil if none is.
func (b *Books) Protected(devices ...*iommu.Device) error {
	if len(devices) == 0 {
		return nil
	}
	return b.manager.Declared().Protected(b.declaration, devices)
}

// Quarantined says why a device is in quarantine; "" if it is not.
func (b *Books) Quarantined(d *iommu.Device) string { return b.quarantine.Why(b.handle.Host(), d) }

// Lease is devices that are assigned to a guest.
type Lease struct {
	Guest string
	For   string // whom the guest is for; "" if nobody said
	// State is making, reserved, active, dead, lost, incoming or leaving, as `viaduct leases` tells it; Why says more.
	State, Why string
	// Ready reports whether its devices are configured and taken; false while it is made, also again after a boot.
	Ready   bool
	From    []string // what its devices were drawn from
	Devices []Device
}

// Device is a device of a lease.
type Device struct {
	Address iommu.Address // where it is in this boot
	// Settings are what a VF has had since it was assigned, as far as its driver tells.
	Settings sriov.Settings
}

// Has reports whether a lease has the device at an address.
func (l *Lease) Has(a iommu.Address) bool {
	return slices.ContainsFunc(l.Devices, func(d Device) bool { return d.Address == a })
}

func view(of *books.Lease) Lease {
	out := Lease{Guest: of.Guest, For: of.For, Ready: of.Ready}
	for _, s := range of.Sources {
		out.From = append(out.From, s.From)
	}
	for _, d := range of.Devices {
		if !d.Nowhere {
			out.Devices = append(out.Devices, Device{Address: d.Address, Settings: d.Now})
		}
	}
	return out
}

// Leases are all leases, by guest. Those of an earlier boot that are still to be made have what they are going to have.
func (b *Books) Leases() ([]Lease, error) {
	looks, err := b.manager.Look()
	var out []Lease
	for _, l := range looks {
		one := view(l.Lease)
		one.State, one.Why = string(l.State), l.Why
		out = append(out, one)
	}
	return out, err
}

// Source is what some of a guest's devices are drawn from.
type Source struct {
	From     string         // a pool, or a selector; an address names one device
	Count    int            // how many; 0 is one
	Settings sriov.Settings // that the VFs are to have
}

// Request is what a guest asks for.
type Request struct {
	Guest   string // its name, by which its lease is released
	For     string // whom it is for, in words that a refusal can quote
	Sources []Source
	// Persist has the lease outlive the boot. Else it ends when the process that has the devices open has ended, or
	// when nobody has opened them within TTL; 0 for no limit.
	Persist bool
	TTL     time.Duration
}

// Assign gives a guest devices: it draws and configures them, and takes them for VFIO. All of that is done or nothing:
// what fails leaves devices as they were, and no lease. Asked again for the same guest it finishes what is there and
// returns the same lease, after a boot too; fresh is false then. A request that differs is refused. Errors match
// [holder.ErrRefused] where something forbids it.
func (b *Books) Assign(ctx context.Context, r Request) (l Lease, fresh bool, err error) {
	ask := &books.Request{Guest: r.Guest, For: r.For, Persist: r.Persist, TTL: r.TTL}
	for _, s := range r.Sources {
		ask.Sources = append(ask.Sources, books.Source{
			From: s.From, Count: max(s.Count, 1), Settings: hostfile.Plain(s.Settings),
		})
	}
	made, fresh, notes, err := b.manager.Assign(ctx, ask)
	for _, n := range notes {
		b.tell(n)
	}
	if err != nil {
		return Lease{}, false, err
	}
	return view(made), fresh, nil
}

// Certificate is what came of a device when its lease ended.
type Certificate struct {
	Address iommu.Address
	// Clean reports whether it was reset, has its settings back, and is free for the next. Else Why says why not.
	Clean      bool
	Why        string
	Quarantine bool           // nobody is given it until `viaduct release --quarantined`
	Reset      string         // the ways to reset it, the first of which the kernel took
	Settings   sriov.Settings // what it has now, read back
	Note       string         // what was not cleaned, or is not known
}

// Release ends a guest's lease. It waits, at most for the given time, until nobody has its devices open; then it resets
// them, gives them their settings back and gives them back to the host's driver if they came from one. Who still has
// one is a refusal, and the lease stays. What cannot be cleaned goes into quarantine: that is an error beside the
// certificates, and the lease has ended. A guest without a lease is an [ErrNoLease].
func (b *Books) Release(ctx context.Context, guest string, wait time.Duration) ([]Certificate, error) {
	all, err := b.manager.Release(ctx, guest, wait)
	var out []Certificate
	for _, c := range all {
		out = append(out, Certificate{
			Address: c.Address, Clean: c.Result == books.Clean, Why: c.Why,
			Quarantine: c.Result == books.InQuarantine, Reset: c.Reset, Settings: c.Settings, Note: c.Note,
		})
	}
	return out, err
}

// Ended reports whether a guest has no lease.
func (b *Books) Ended(guest string) (bool, error) {
	l, err := b.manager.Book.Get(guest)
	return l == nil && err == nil, err
}
