// Package node is what a cluster may be given of this node: the functions of the declared pools, who has them, what is
// wrong with them, and the files by which containers get them. It knows nothing of Kubernetes' interfaces.
package node

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"viaduct/cmd/lease"
	"viaduct/iommu"
)

// Kind is what a function is.
type Kind string

// The kinds.
const (
	PF  Kind = "pf"
	VF  Kind = "vf"
	PCI Kind = "pci" // neither
)

// Function is one PCI function that the cluster may be given, as it is at one moment.
type Function struct {
	iommu.ID
	Address iommu.Address
	Pool    string // that it is declared in; "" if in none
	Kind    Kind
	Driver  string // "" if it is on none
	VFIO    bool   // the driver makes a VFIO device of it
	NUMA    *int   // nil if that is not known
	Group   *int   // nil if it is in no IOMMU group
	Root    string // the root bus that it is below, e.g. pci0000:00; "" if that is not known
	PF      *iommu.Address
	VFIndex int
	IOMMUFD bool // it can be opened by its own node
	Lease   *lease.Lease
	// Wrong is what speaks against giving it to somebody, or lost it to who has it; none if it is well.
	Wrong []Problem
	// Lost is a function that is not on the host any more, and that a lease still has.
	Lost bool
}

// Reason is a word for what is wrong with a function. It is part of a taint's key.
type Reason string

// The reasons.
const (
	NoDriver   Reason = "driver"     // who has it finds it on another driver than VFIO's
	NoNode     Reason = "node"       // its node is not in /dev
	NotViable  Reason = "group"      // a driver of the host has something of its IOMMU group
	NoPF       Reason = "pf"         // its PF is on no driver
	NoLink     Reason = "link"       // its PF has no link
	Quarantine Reason = "quarantine" // it could not be cleaned after its last guest
	Protected  Reason = "protected"  // it is declared in protect
	OtherGuest Reason = "guest"      // a guest that is not of this cluster has it
	Shared     Reason = "shared"     // another provider on this node gives it out too
	NotThere   Reason = "lost"       // it is gone from the host
)

// Reasons are all reasons.
func Reasons() []Reason {
	return []Reason{
		NoDriver, NoNode, NotViable, NoPF, NoLink, Quarantine, Protected, OtherGuest, Shared, NotThere,
	}
}

// Problem is something that is wrong with a function.
type Problem struct {
	Reason Reason
	Text   string // a sentence without a full stop
}

// Name is the function's name in the cluster, which has to be a DNS label: its address with dashes.
func (f *Function) Name() string { return NameOf(f.Address) }

// NameOf is the name of the function at an address.
func NameOf(a iommu.Address) string {
	return strings.NewReplacer(":", "-", ".", "-").Replace(a.String())
}

// ParseName is the address that a name stands for.
func ParseName(name string) (iommu.Address, error) {
	text := name
	if parts := strings.Split(name, "-"); len(parts) == 4 {
		text = parts[0] + ":" + parts[1] + ":" + parts[2] + "." + parts[3]
	}
	return iommu.ParseAddress(text)
}

// Facts are what is read of the host beside its devices, leases and pools.
type Facts struct {
	Root     map[iommu.Address]string // the root bus of each function
	Link     map[iommu.Address]string // of PFs whose link is down: which interface's
	Nodes    map[iommu.Address][]string
	Missing  map[iommu.Address]string // the node that should be there, and is not
	IOMMUFD  map[iommu.Address]bool
	Keeps    map[iommu.Address]string // why a function is in quarantine
	Guarded  map[iommu.Address]string // why it is protected
	Topology *iommu.Topology
	Pools    []lease.Pool
	Leases   []lease.Lease
}

// Functions are all functions that the cluster may be given, by address, and those that it has been given and are gone.
// Ours tells leases of this cluster from others.
func Functions(f *Facts, ours func(*lease.Lease) bool) []Function {
	var out []Function
	seen := map[iommu.Address]bool{}
	for _, p := range f.Pools {
		for _, d := range p.Devices {
			for _, one := range together(f.Topology, d) {
				if !one.PCI || seen[one.Address] {
					continue
				}
				seen[one.Address] = true
				out = append(out, f.function(one, p.Name, ours))
			}
		}
	}

	for i := range f.Leases {
		l := &f.Leases[i]
		if !ours(l) {
			continue
		}
		for _, from := range l.From {
			a, err := iommu.ParseAddress(from)
			if err != nil || seen[a] {
				continue
			}
			seen[a] = true
			text := a.String() + " is not on the host, or not declared any more"
			out = append(out, Function{
				Address: a, Kind: PCI, Lost: true, Lease: l, Wrong: []Problem{{NotThere, text}},
			})
		}
	}
	slices.SortFunc(out, func(a, b Function) int { return a.Address.Compare(b.Address) })
	return out
}

// together are the functions that a guest gets with a declared device: itself, and what is handed over of its group.
func together(t *iommu.Topology, d *iommu.Device) []*iommu.Device {
	g := t.GroupOf(d)
	if d.PhysFn != nil || g == nil {
		return []*iommu.Device{d}
	}
	return g.Handed()
}

func (f *Facts) function(d *iommu.Device, pool string, ours func(*lease.Lease) bool) Function {
	out := Function{
		ID: d.ID, Address: d.Address, Pool: pool, Kind: PCI, Driver: d.Driver, VFIO: d.VFIO, NUMA: d.NUMANode,
		Group: d.Group, Root: f.Root[d.Address], PF: d.PhysFn, VFIndex: d.VFIndex, IOMMUFD: f.IOMMUFD[d.Address],
	}
	switch {
	case d.PhysFn != nil:
		out.Kind = VF
	case d.SRIOV != nil:
		out.Kind = PF
	}
	for i := range f.Leases {
		if f.Leases[i].Has(d.Address) {
			out.Lease = &f.Leases[i]
		}
	}
	out.Wrong = f.wrong(d, &out, ours)
	return out
}

// wrong is what is wrong with a function.
func (f *Facts) wrong(d *iommu.Device, one *Function, ours func(*lease.Lease) bool) []Problem {
	var out []Problem
	add := func(reason Reason, text string) {
		if text != "" {
			out = append(out, Problem{reason, text})
		}
	}
	if one.Lease != nil && !ours(one.Lease) {
		add(OtherGuest, d.Name+" is assigned to guest "+one.Lease.Guest+", which is not of this cluster")
	} else if one.Lease != nil && one.Lease.Ready {
		if !d.VFIO {
			add(NoDriver, d.Name+" is on "+cmp.Or(d.Driver, "no driver")+", although it is assigned to a pod")
		} else if missing := f.Missing[d.Address]; missing != "" {
			add(NoNode, missing+" of "+d.Name+" is missing")
		}
	}

	if with := f.Topology.KeptWith(d); with != nil {
		add(NotViable, d.Name+" shares its IOMMU group with "+with.Name+", which the host keeps")
	}
	add(Quarantine, f.Keeps[d.Address])
	add(Protected, f.Guarded[d.Address])
	if d.PhysFn == nil {
		return out
	}
	if pf, err := f.Topology.Find(*d.PhysFn); err == nil && pf.Driver == "" {
		add(NoPF, "PF "+pf.Name+" of "+d.Name+" is on no driver")
	}
	if down := f.Link[*d.PhysFn]; down != "" && d.Class>>16 == 0x02 {
		add(NoLink, down+", the PF of "+d.Name+", has no link")
	}
	return out
}

// Has reports whether something of that kind is wrong with the function.
func (f *Function) Has(reason Reason) bool {
	return slices.ContainsFunc(f.Wrong, func(p Problem) bool { return p.Reason == reason })
}

// Taken says who has the function.
func (f *Function) Taken() error {
	whom := ""
	if f.Lease.For != "" {
		whom = " (" + f.Lease.For + ")"
	}
	return fmt.Errorf("%s is assigned to guest %q%s", f.Address, f.Lease.Guest, whom)
}

// Why is all that is wrong with a function, as one text; "" if nothing is.
func (f *Function) Why() string {
	var out []string
	for _, p := range f.Wrong {
		out = append(out, p.Text)
	}
	return strings.Join(out, "; ")
}
