package iommu

import (
	"fmt"
	"slices"
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
	// Of is the device that isolates or does not, or of which that is not known, and Because says so, beginning with a
	// verb.
	Of      Address
	Because string
	// Hint is what would make it isolated, as a sentence; "" where it is, or where that is not known.
	Hint string
	// Fixed reports that the two are together in any slot and with any setting.
	Fixed bool
}

// Edges are the reasons why PCI devices are in one group or in several: from each of them up to the root, and between
// those beside each other. What only stands on a bus that isolates nothing has no reasons beside that, but functions of
// one device, which are together in any other slot too.
func (g *Grouping) Edges(devices []Address) []Edge {
	g.unsure = map[Address]string{}
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
			because := fmt.Sprintf("does its DMA as %s, whose driver made its bus", m.dma.at)
			out = append(out, Edge{
				From: m.at, To: &m.dma.at, Kind: EdgeAlias, Isolated: new(false),
				Of: m.at, Because: because, Reason: fmt.Sprintf("%s %s.", m.at, because),
				Hint: fmt.Sprintf("turn off the mode (e.g. VMD) of %s in the firmware", m.dma.at),
			})
		}
		for _, other := range members[i+1:] {
			if busOf(m.at) != busOf(other.at) {
				continue
			}
			if yes, why := g.alias(m, other); yes && why != aliasReal {
				out = append(out, aliasEdge(m, other, why))
			}
		}
		// Also where a bridge above has them in one group: in another slot they would still be functions of one device.
		if g.isVF(m) {
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

func (g *Grouping) pathEdge(n *node) Edge {
	if n.up == nil {
		const because = "is on a root bus: no bridge is above it"
		return Edge{
			From: n.at, Kind: EdgePath, Isolated: new(true), Of: n.at, Because: because,
			Reason: fmt.Sprintf("%s %s.", n.at, because),
		}
	}
	v := g.isolation(n.up)
	e := Edge{From: n.at, To: &n.up.at, Kind: EdgePath, Of: n.up.at, Because: v.Reason}
	e.Reason = fmt.Sprintf("%s %s.", n.up.at, v.Reason)
	if v.Known {
		e.Isolated = &v.Isolated
	}
	if v.Known && !v.Isolated {
		e.Hint = g.hint(n.up, v)
	}
	return e
}

func (g *Grouping) functionEdge(a, b *node) Edge {
	e := Edge{From: a.at, To: &b.at, Kind: EdgeFunction}
	one, other := g.isolation(a), g.isolation(b)
	n, v := a, one
	if !one.Isolated && other.Isolated || one.Known && !one.Isolated && !other.Known {
		n, v = b, other
	}
	e.Of, e.Because = n.at, v.Reason
	switch {
	case v.Isolated:
		e.Isolated = new(true)
		e.Reason = fmt.Sprintf("%s and %s are functions of one device, but %s %s.", a.at, b.at, n.at, v.Reason)
	case !v.Known:
		e.Reason = fmt.Sprintf("%s %s.", n.at, v.Reason)
	default:
		e.Isolated = new(false)
		e.Reason = fmt.Sprintf("%s and %s are functions of one device, and %s %s.", a.at, b.at, a.at, v.Reason)
		e.Hint, e.Fixed = g.functionHint(a, b)
	}
	return e
}

func aliasEdge(a, b *node, why aliasKind) Edge {
	e := Edge{From: a.at, To: &b.at, Kind: EdgeAlias, Isolated: new(false), Of: a.at}
	e.Because = fmt.Sprintf("does DMA as %s, or the other way round", b.at)
	switch why {
	case aliasFirmware:
		e.Reason = fmt.Sprintf("By the firmware's IVRS table, one of %s and %s does DMA as the other.", a.at, b.at)
		e.Hint = "a newer firmware may leave that alias out of its IVRS table"
	default:
		e.Reason = fmt.Sprintf("By the kernel's list, one of %s and %s does DMA as the other.", a.at, b.at)
		e.Hint, e.Fixed = "nothing separates these: the device does DMA with a wrong requester ID", true
	}
	return e
}
