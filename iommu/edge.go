package iommu

import (
	"fmt"
	"slices"
	"strings"
)

// EdgeKind is how two devices are connected.
type EdgeKind string

// The kinds.
const (
	// EdgePath leads from a device to the bridge above it, or to the root.
	EdgePath EdgeKind = "path"
	// EdgeFunction is between two functions of one slot.
	EdgeFunction EdgeKind = "function"
	// EdgeAlias is between two devices of which one does DMA as the other.
	EdgeAlias EdgeKind = "alias"
)

// Edge is a step of the reason why a group is what it is.
type Edge struct {
	From Address
	// To is nil for the root.
	To   *Address
	Kind EdgeKind
	// Isolated reports whether the IOMMU can tell From from the others at To; nil if that is not known.
	Isolated *bool
	// Reason is a sentence.
	Reason string
	// Cure is what would make it isolated, as a sentence; "" where it is, or where that is not known.
	Cure string
}

// Edges are the reasons why PCI devices are in one group or in several: from each of them up to the root, and between
// those beside each other. What only stands on a bus that isolates nothing has no reasons beside that.
func (g *Grouping) Edges(devices []Address) []Edge {
	g.unsure = map[Address]bool{}
	var members []*node
	for _, a := range devices {
		if n := g.nodes[a]; n != nil && !slices.Contains(members, n) {
			members = append(members, n)
		}
	}
	slices.SortFunc(members, func(a, b *node) int { return a.at.Compare(b.at) })

	var out []Edge
	been := map[*node]bool{}
	for _, m := range members {
		for n := m; n != nil && !been[n]; n = n.up {
			been[n] = true
			out = append(out, g.pathEdge(n))
		}
	}
	for i, m := range members {
		if m.dma != m {
			out = append(out, Edge{m.at, &m.dma.at, EdgeAlias, new(false),
				fmt.Sprintf("%s does its DMA as %s, whose driver made its bus.", m.at, m.dma.at),
				fmt.Sprintf("turn off the mode (e.g. VMD) of %s in the firmware", m.dma.at)})
		}
		for _, other := range members[i+1:] {
			if busOf(m.at) != busOf(other.at) {
				continue
			}
			if yes, why := g.alias(m, other); yes && why != aliasReal {
				out = append(out, aliasEdge(m, other, why))
			}
		}
		if v := g.above(m); g.isVF(m) || v.Known && !v.Isolated {
			continue
		}
		for _, other := range g.siblings(m) {
			// Each pair once; what is no member is on the other side of every pair. VFs count as no functions.
			if j := slices.Index(members, other); (j < 0 || j > i) && !g.isVF(other) {
				out = append(out, g.functionEdge(m, other))
			}
		}
	}
	return out
}

// above is the isolation of the bridge above a device; a root bus isolates.
func (g *Grouping) above(n *node) Isolation {
	if n.up == nil {
		return Isolation{Known: true, Isolated: true}
	}
	return g.isolation(n.up)
}

func (g *Grouping) pathEdge(n *node) Edge {
	if n.up == nil {
		return Edge{n.at, nil, EdgePath, new(true), n.at.String() + " is on a root bus: no bridge is above it.", ""}
	}
	e := Edge{From: n.at, To: &n.up.at, Kind: EdgePath}
	v := g.isolation(n.up)
	e.Reason = fmt.Sprintf("%s %s.", n.up.at, v.Reason)
	if v.Known {
		e.Isolated = &v.Isolated
	}
	if v.Known && !v.Isolated {
		e.Cure = g.portCure(n.up, v.cause)
	}
	return e
}

func (g *Grouping) functionEdge(a, b *node) Edge {
	e := Edge{From: a.at, To: &b.at, Kind: EdgeFunction}
	one, other := g.isolation(a), g.isolation(b)
	switch {
	case one.Isolated || other.Isolated:
		n, v := a, one
		if !one.Isolated {
			n, v = b, other
		}
		e.Isolated = new(true)
		e.Reason = fmt.Sprintf("%s and %s are functions of one device, but %s %s.", a.at, b.at, n.at, v.Reason)
	case !one.Known:
		e.Reason = fmt.Sprintf("%s %s.", a.at, one.Reason)
	case !other.Known:
		e.Reason = fmt.Sprintf("%s %s.", b.at, other.Reason)
	default:
		e.Isolated = new(false)
		e.Reason = fmt.Sprintf("%s and %s are functions of one device, and %s %s.", a.at, b.at, a.at, one.Reason)
		e.Cure = "nothing separates these functions: only a guest that gets them all can have one"
	}
	return e
}

func aliasEdge(a, b *node, why aliasKind) Edge {
	e := Edge{From: a.at, To: &b.at, Kind: EdgeAlias, Isolated: new(false)}
	switch why {
	case aliasFirmware:
		e.Reason = fmt.Sprintf("By the firmware's IVRS table, one of %s and %s does DMA as the other.", a.at, b.at)
		e.Cure = "a newer firmware may leave that alias out of its IVRS table"
	default:
		e.Reason = fmt.Sprintf("By the kernel's list, one of %s and %s does DMA as the other.", a.at, b.at)
		e.Cure = "nothing separates these: the device does DMA with a wrong requester ID"
	}
	return e
}

// portCure says what would have a bridge isolate, or what is below it be elsewhere.
func (g *Grouping) portCure(n *node, why cause) string {
	t, _, _ := g.express(n)
	switch why {
	case causeACSOff:
		line, _ := g.host.String("proc/cmdline")
		for _, parameter := range []string{"disable_acs_redir=", "config_acs="} {
			if strings.Contains(line, parameter) {
				return "take " + parameter + " from the kernel command line, and boot again"
			}
		}
		return "boot again with the IOMMU on: the kernel then turns ACS on, before it groups"
	case causeNoACS:
		if t == RootPort {
			return "use a slot whose port has ACS, as those at the processor mostly have, or a firmware that shows " +
				"ACS (\"ACS\" or \"AER\" in its menu)"
		}
		return "use a slot that is not behind this switch"
	case causeConventional:
		return "use a slot that is not behind this bridge: nothing separates what is"
	case causeVendor:
		return "use another slot, or a newer firmware"
	}
	return ""
}
