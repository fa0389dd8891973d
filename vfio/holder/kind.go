package holder

import (
	"fmt"
	"slices"
	"strings"

	"viaduct/iommu"
)

// Kind is a kind of holder. Each can be overridden by itself.
type Kind string

// The kinds of holders.
const (
	Process   Kind = "process"
	Lease     Kind = "lease"
	Mount     Kind = "mount"
	Swap      Kind = "swap"
	Storage   Kind = "storage"
	Route     Kind = "route"
	Addressed Kind = "address"
	Stacked   Kind = "stack"
	Namespace Kind = "namespace"
	SSH       Kind = "ssh"
	Display   Kind = "display"
	Owner     Kind = "owner"
)

// row is all that there is to know of a kind.
type row struct {
	kind  Kind
	means string // what such a holder is or does, in a few words
	look  *look  // what finds it

	// carriesHost: the host itself stands on the device, which no boot may take before that can be seen.
	carriesHost bool
	// use: the device is in use by that alone. Who only has it in a book may not have started to use it.
	use bool
	// yieldsToRollback: it may be why a rollback is needed, as an address that a DHCP client gave a new VF, and stops
	// none.
	yieldsToRollback bool
	// keepsRoot: one that the host's root file system is on is never overridden.
	keepsRoot bool
	// guests: it is a guest's right to the device, which stops nothing that is done for the guest itself.
	guests bool
}

// look is one way to look, which finds holders of one kind or of several.
type look struct {
	find func(*iommu.Host, []*iommu.Device) ([]Holder, error)
}

var (
	network = &look{netHolders}
	disks   = &look{diskHolders}
	display = &look{Displays}
	open    = &look{Processes}
	leases  = &look{Leases}
	books   = &look{Owners}
)

// kinds is the table of kinds, in the order in which they are named to users.
var kinds = [...]row{
	{kind: Process, means: "a process has the device's node open", look: open, use: true},
	{kind: Lease, means: "the device is assigned to a guest", look: leases, guests: true},
	{kind: Mount, means: "a file system on it is mounted", look: disks, carriesHost: true, use: true, keepsRoot: true},
	{kind: Swap, means: "it is used as swap", look: disks, carriesHost: true, use: true},
	{
		kind: Storage, means: "it is under device-mapper, md, LVM or ZFS, or exported", look: disks,
		carriesHost: true, use: true, keepsRoot: true,
	},
	{
		kind: Route, means: "a route goes over its interface", look: network,
		carriesHost: true, use: true, yieldsToRollback: true,
	},
	{
		kind: Addressed, means: "its interface has an address", look: network,
		carriesHost: true, use: true, yieldsToRollback: true,
	},
	{
		kind: Stacked, means: "its interface is in a bond, bridge or team, or under a VLAN, macvlan or " +
			"tunnel", look: network,
		carriesHost: true, use: true, yieldsToRollback: true,
	},
	{
		kind: Namespace, means: "its interface is in another network namespace", look: network,
		carriesHost: true, use: true, yieldsToRollback: true,
	},
	{
		kind: SSH, means: "an ssh connection to this host goes over it", look: network,
		carriesHost: true, use: true, yieldsToRollback: true,
	},
	{
		kind: Display, means: "it is the display this host started on, or has a framebuffer", look: display,
		carriesHost: true, use: true,
	},
	{kind: Owner, means: "another tool has recorded it", look: books},
}

func (k Kind) row() *row {
	for i := range kinds {
		if kinds[i].kind == k {
			return &kinds[i]
		}
	}
	return &row{kind: k}
}

// Kinds returns all kinds of holders, in the order in which they are named to users.
func Kinds() []Kind { return kindsWhere(func(*row) bool { return true }) }

// YieldToRollback returns the kinds of holders that stop no rollback: what got hold of new VFs, as a DHCP client does,
// may be why it is needed.
func YieldToRollback() []Kind { return kindsWhere(func(r *row) bool { return r.yieldsToRollback }) }

func kindsWhere(such func(*row) bool) []Kind {
	var out []Kind
	for i := range kinds {
		if such(&kinds[i]) {
			out = append(out, kinds[i].kind)
		}
	}
	return out
}

// ParseKind reads a kind's name. Its error names all kinds.
func ParseKind(name string) (Kind, error) {
	if k := Kind(name); slices.Contains(Kinds(), k) {
		return k, nil
	}
	return "", fmt.Errorf("unknown kind %q; the kinds of holders are %s", name, KindNames())
}

// KindNames returns the names of all kinds, separated by commas.
func KindNames() string {
	var names []string
	for _, k := range Kinds() {
		names = append(names, string(k))
	}
	return strings.Join(names, ", ")
}

// Means says in a few words what a holder of this kind is or does, as in "it is used as swap", and what of it cannot be
// overridden.
func (k Kind) Means() string {
	r := k.row()
	if r.keepsRoot {
		return r.means + " (for / and /usr this cannot be overridden)"
	}
	return r.means
}

// CarriesHost reports whether the host itself stands on what such a holder uses.
func (k Kind) CarriesHost() bool { return k.row().carriesHost }

// InUse reports whether a device is in use by such a holder alone, and not only in a book.
func (k Kind) InUse() bool { return k.row().use }

// IsGuests reports whether it is a guest's right to the device, which stops nothing that is done for the guest itself.
func (k Kind) IsGuests() bool { return k.row().guests }
