package iommu

import (
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"viaduct/internal/host"
)

// Grouping computes IOMMU groups the way the kernel does (drivers/iommu/iommu.c, pci_device_group, of Linux 6.12 to
// 7.2), from where devices are and what their config space says. It never looks at the kernel's own groups. Config
// space is read when it is needed, and only of the devices that matter: that wakes them if they sleep.
type Grouping struct {
	host    *Host
	nodes   map[Address]*node
	order   []*node
	buses   map[Address][]*node // by a bus's address 00.0, in that order
	noLinks *bool               // no device has a link to its IOMMU; nil: not looked at
	ivrs    bool
	aliases aliases
	// unsure are the devices that were not known enough for what was computed last, with what was not.
	unsure map[Address]string
}

// node is a device in the tree. What it is, is read when it is asked for.
type node struct {
	at   Address
	up   *node // the bridge above, nil on a root bus
	down []*node
	dma  *node // whose DMA it really does, as behind a Volume Management Device; else itself

	link *bool // whether it has one to an IOMMU
	vf   *bool
	id   *ID

	asked   bool
	config  *Function
	failed  error
	verdict *Isolation
}

// NewGrouping prepares the computation.
func NewGrouping(h *Host) (*Grouping, error) {
	g := &Grouping{host: h, nodes: map[Address]*node{}, buses: map[Address][]*node{}}
	var err error
	if g.ivrs, err = h.Has("sys/firmware/acpi/tables/IVRS"); err != nil {
		return nil, err
	}
	if g.aliases, err = readAliases(h); err != nil {
		return nil, err
	}

	names, err := h.Names(pciDevices)
	if err != nil && !host.Absent(err) || len(names) == 0 {
		if host.Absent(err) {
			err = nil
		}
		return g, err
	}

	for _, name := range names {
		if a, ok := parseAddress(name); ok {
			n := &node{at: a}
			n.dma = n
			g.nodes[a] = n
		}
	}

	all, err := h.Open(pciDevices)
	if err != nil {
		return nil, err
	}
	defer all.Close()
	g.order = slices.SortedFunc(maps.Values(g.nodes), func(a, b *node) int { return a.at.Compare(b.at) })
	for _, n := range g.order {
		target, err := optional(all.Link(n.at.String()))
		if err != nil {
			return nil, err
		}
		g.place(n, pathAddresses(target))
	}

	return g, nil
}

// place puts a device below the last one of those above it that is still there.
func (g *Grouping) place(n *node, chain []Address) {
	bus := busOf(n.at)
	g.buses[bus] = append(g.buses[bus], n)
	if len(chain) < 2 {
		return
	}
	if n.at.Domain >= firstOwnDomain {
		for _, a := range chain {
			if of := g.nodes[a]; of != nil && a.Domain != n.at.Domain {
				n.dma = of
			}
		}
	}
	above := chain[len(chain)-2]
	if above.Domain != n.at.Domain {
		// A root bus that a driver made.
		return
	}
	if n.up = g.nodes[above]; n.up != nil {
		n.up.down = append(n.up.down, n)
	}
}

func busOf(a Address) Address { return Address{Domain: a.Domain, Bus: a.Bus} }

// isVF reports whether a device is a VF.
func (g *Grouping) isVF(n *node) bool { return g.has(n, "physfn", &n.vf) }

// has reports whether a device has a link, and remembers it. What cannot be told is doubted.
func (g *Grouping) has(n *node, link string, memory **bool) bool {
	if *memory != nil {
		return **memory
	}
	_, err := g.host.Link(path.Join(pciDevices, n.at.String(), link))
	if err != nil && !host.Absent(err) && !errors.Is(err, unix.EINVAL) {
		g.doubt(n, "the links of "+devicesHere+" in sysfs cannot be read")
		return false
	}
	*memory = new(err == nil)
	return **memory
}

// id is what a device says it is, as the kernel has it.
func (g *Grouping) id(n *node) ID {
	if n.id == nil {
		text, err := g.host.Steady(path.Join(pciDevices, n.at.String(), "modalias"))
		id, wrong := ParseModalias(text)
		if err != nil || wrong != nil {
			g.doubt(n, "what "+devicesHere+" is cannot be read (its modalias)")
			return ID{}
		}
		n.id = &id
	}
	return *n.id
}

// managed reports whether an IOMMU is in front of a device: else it is in no group. An old kernel has no such links,
// and some captured hosts lack them: then all are.
func (g *Grouping) managed(n *node) bool {
	if g.linked(n) {
		return true
	}
	if g.noLinks == nil {
		g.noLinks = new(!slices.ContainsFunc(g.order, g.linked))
	}
	return *g.noLinks
}

// linked reports whether the kernel says which IOMMU is in front of a device. The IOMMU's own function has a folder of
// that name, and no IOMMU in front of it.
func (g *Grouping) linked(n *node) bool { return g.has(n, "iommu", &n.link) }

// inOrder sorts devices as the kernel meets them: by address, as buses are numbered in the order they are found, VFs
// after all others.
func (g *Grouping) inOrder(nodes []*node) {
	slices.SortFunc(nodes, func(a, b *node) int {
		if g.isVF(a) != g.isVF(b) {
			return map[bool]int{true: 1, false: -1}[g.isVF(a)]
		}
		return a.at.Compare(b.at)
	})
}

// devicesHere stands in what is doubted for the names of the devices of which that is so.
const devicesHere = "\x00"

// doubt remembers a device that is not known enough, and why.
func (g *Grouping) doubt(n *node, why string) {
	if g.unsure[n.at] == "" {
		g.unsure[n.at] = why
	}
}

// doubtConfig is for config space that could not be read as far as it matters.
func (g *Grouping) doubtConfig(n *node) {
	g.doubt(n, "config space of "+devicesHere+" "+n.gap())
}

// apart is isolation for the computation: what is not known is doubted.
func (g *Grouping) apart(n *node) bool {
	v := g.isolation(n)
	if !v.Known {
		g.doubtConfig(n)
	}
	return v.Isolated
}

// apartUp reports whether a bridge and all above it isolate (pci_acs_path_enabled).
func (g *Grouping) apartUp(n *node) bool {
	for ; n != nil; n = n.up {
		if !g.apart(n) {
			return false
		}
	}
	return true
}

// senders are the devices as which a device's DMA arrives, from itself upwards (drivers/pci/search.c,
// pci_for_each_dma_alias). That it ends below a bridge at which the IOMMU is (ThunderX2) changes no group: such a
// bridge does not isolate.
func (g *Grouping) senders(n *node) []*node {
	out := []*node{n.dma}
	for b := n.dma.up; b != nil; b = b.up {
		t, express, known := g.express(b)
		if !known {
			g.doubtConfig(b)
		}
		if !express || t == PCIeToPCIBridge || t == PCIToPCIeBridge {
			out = append(out, b)
		}
	}
	return out
}

// alias reports whether the DMA of one of two devices on a bus comes from the other one too, and why
// (pci_devs_are_dma_aliases; drivers/iommu/amd/iommu.c, setup_aliases).
func (g *Grouping) alias(a, b *node) (yes bool, why aliasKind) {
	for _, pair := range [][2]*node{{a, b}, {b, a}} {
		one, other := pair[0], pair[1]
		if g.aliases.unknown != "" {
			g.doubt(one, g.aliases.unknown)
		}
		if as, ok := g.aliases.of(one.at); ok && as == other.at {
			return true, aliasFirmware
		}
		quirk, known := appearsAs(one.at, g.id(one), other.at.devfn())
		if !known {
			g.doubt(one, "as which functions "+devicesHere+" does DMA stands in its own memory alone")
		}
		if quirk {
			return true, aliasQuirk
		}
		if one.dma == other {
			return true, aliasReal
		}
	}
	return false, 0
}

type aliasKind int

const (
	aliasQuirk aliasKind = iota
	aliasFirmware
	aliasReal
)

func sameSlot(a, b *node) bool {
	return busOf(a.at) == busOf(b.at) && a.at.Device == b.at.Device
}

// rest is the device whose group a device comes into: the last one as which its DMA arrives, or the highest bridge
// above that from which nothing isolates.
func (g *Grouping) rest(n *node) *node {
	senders := g.senders(n)
	n = senders[len(senders)-1]
	for b := n.up; b != nil && !g.apartUp(b); b = b.up {
		n = b
	}
	return n
}

// near are the devices that could share a group with what rests at a device: those that are functions of one slot, or
// aliases, of each other, and all below these.
func (g *Grouping) near(rest *node) []*node {
	bus := g.buses[busOf(rest.at)]
	found := []*node{rest}
	for i := 0; i < len(found); i++ {
		for _, n := range bus {
			if slices.Contains(found, n) {
				continue
			}
			alias, _ := g.alias(found[i], n)
			if alias || sameSlot(found[i], n) {
				found = append(found, n)
			}
		}
	}

	var all []*node
	var below func([]*node)
	below = func(nodes []*node) {
		for _, n := range nodes {
			all = append(all, n)
			below(n.down)
		}
	}

	below(found)
	for _, n := range g.nodes {
		// What is behind a device of these, in a domain of its own.
		if n.dma != n && slices.Contains(all, n.dma) {
			all = append(all, n)
		}
	}

	g.inOrder(all)
	return all
}

// groups are the numbers of the groups that devices have come into so far.
type groups map[*node]int

// assign computes the groups of devices in the order in which the kernel meets them.
func (g *Grouping) assign(nodes []*node) groups {
	of := groups{}
	next := 1
	for _, n := range nodes {
		if !g.managed(n) {
			continue
		}
		id := g.join(of, n)
		if id == 0 {
			id = next
			next++
		}
		of[n] = id
	}
	return of
}

// join is the group that is there for a device, 0 if it begins one (pci_device_group).
func (g *Grouping) join(of groups, n *node) int {
	for _, s := range g.senders(n) {
		if n = s; of[n] != 0 {
			return of[n]
		}
	}
	for b := n.up; b != nil && !g.apartUp(b); b = b.up {
		if n = b; of[n] != 0 {
			return of[n]
		}
	}
	been := map[*node]bool{}
	if id := g.ofAliases(of, n, been); id != 0 {
		return id
	}
	return g.ofFunctions(of, n, been)
}

// ofAliases is the group of a device or of its aliases (get_pci_alias_group).
func (g *Grouping) ofAliases(of groups, n *node, been map[*node]bool) int {
	if been[n] {
		return 0
	}
	been[n] = true
	if of[n] != 0 {
		return of[n]
	}
	for _, other := range g.buses[busOf(n.at)] {
		if other == n {
			continue
		}
		if yes, _ := g.alias(n, other); !yes {
			continue
		}
		if id := g.ofAliases(of, other, been); id != 0 {
			return id
		}
		if id := g.ofFunctions(of, other, been); id != 0 {
			return id
		}
	}
	return 0
}

// ofFunctions is the group of another function of the same slot, if neither isolates (get_pci_function_alias_group).
func (g *Grouping) ofFunctions(of groups, n *node, been map[*node]bool) int {
	siblings := g.siblings(n)
	if len(siblings) == 0 {
		return 0
	}
	many, known := g.multifunction(n)
	if !known {
		g.doubtConfig(n)
	}
	if !many || g.apart(n) {
		return 0
	}
	for _, other := range siblings {
		if g.apart(other) {
			continue
		}
		if id := g.ofAliases(of, other, been); id != 0 {
			return id
		}
	}
	return 0
}

// siblings are the other functions of a device's slot.
func (g *Grouping) siblings(n *node) []*node {
	var out []*node
	for _, other := range g.buses[busOf(n.at)] {
		if other != n && sameSlot(n, other) {
			out = append(out, other)
		}
	}
	return out
}

// Computed is the group that a device is in by what its config space and that of others says.
type Computed struct {
	// Known is false where config space, or the firmware's table of aliases, could not be read as far as it matters.
	Known bool
	// Unread are the devices that are not known enough for that.
	Unread []Address
	// Missing says, each in words that begin a sentence or follow a colon, what could not be read; nil if Known.
	Missing []string
	// Members are the addresses of the group's devices, sorted: none of a device that no IOMMU is in front of.
	Members []Address
}

// Of computes the group of the PCI device at an address.
func (g *Grouping) Of(a Address) Computed {
	n := g.nodes[a]
	g.unsure = map[Address]string{}
	if n == nil || !g.managed(n) {
		// Of what is in a group although it seems that no IOMMU is in front of it nothing is known.
		grouped, err := g.host.Has(path.Join(pciDevices, a.String(), "iommu_group"))
		c := Computed{Known: n != nil && !grouped && err == nil && len(g.unsure) == 0, Unread: []Address{a}}
		if c.Missing = g.missing(); !c.Known && len(c.Missing) == 0 {
			c.Missing = []string{"which IOMMU is in front of " + a.String() + " is not told"}
		}
		return c
	}
	of := g.assign(g.near(g.rest(n)))
	if len(g.unsure) > 0 {
		return Computed{Unread: slices.SortedFunc(maps.Keys(g.unsure), Address.Compare), Missing: g.missing()}
	}
	c := Computed{Known: true}
	for other, id := range of {
		if id == of[n] {
			c.Members = append(c.Members, other.at)
		}
	}
	slices.SortFunc(c.Members, Address.Compare)
	return c
}

// missing says what was doubted, each thing once.
func (g *Grouping) missing() []string {
	const most = 4
	of := map[string][]string{}
	var order []string
	for _, a := range slices.SortedFunc(maps.Keys(g.unsure), Address.Compare) {
		why := g.unsure[a]
		if of[why] == nil {
			order = append(order, why)
		}
		of[why] = append(of[why], a.String())
	}
	for i, why := range order {
		names := of[why]
		if len(names) > most {
			names = append(names[:most:most], fmt.Sprintf("%d others", len(names)-most))
		}
		order[i] = strings.Replace(why, devicesHere, strings.Join(names, ", "), 1)
	}
	return order
}
