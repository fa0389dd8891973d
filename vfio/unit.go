package vfio

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"viaduct/iommu"
)

// Units are what must be taken together with the given devices: the endpoints of their groups, each group once. Bridges are
// left alone. A device without a group is a unit of its own.
func Units(t *iommu.Topology, devices []*iommu.Device) ([][]*iommu.Device, error) {
	var out [][]*iommu.Device
	seen := map[string]bool{}
	for _, d := range devices {
		members := []*iommu.Device{d}
		if d.Group >= 0 {
			g, err := t.Group(d.Group)
			if err != nil {
				return nil, err
			}
			members = g.Endpoints()
		}
		if len(members) == 0 || seen[members[0].Name] {
			continue
		}
		for _, m := range members {
			seen[m.Name] = true
		}
		out = append(out, members)
	}
	return out, nil
}

// Gate is what is asked before the first write: for each unit whether it may be changed, by one look at the host's users.
type Gate struct {
	Host     *iommu.Host
	Topology *iommu.Topology
	Asked    []*iommu.Device // what the user named; the rest of a unit comes along
	Force    []Kind          // kinds of holders to override
	Driver   string          // that is to be taken with; "" is Auto
	DryRun   bool            // who cannot see all holders may still ask
	Passed   []Holder        // those that Force overrode, for the user to know
	Stuck    []Recovered     // what Recover reported

	nodes map[iommu.Address][]node // that GiveBack found
}

// Take refuses, with a *RefusedError a unit that names every reason, what must not be or cannot be taken: devices the host
// itself uses, PFs with VFs, bridges, devices that no IOMMU is in front of. A nil error lets the unit pass.
func (g *Gate) Take(units [][]*iommu.Device) ([]error, error) {
	holders, err := Holders(g.Host, slices.Concat(units...))
	if err != nil && (!g.DryRun || !errors.Is(err, ErrBlind)) {
		return nil, err
	}
	out := make([]error, len(units))
	for i, unit := range units {
		out[i] = g.take(unit, holders)
	}
	for _, d := range g.Asked {
		if d.IsBridge() {
			return nil, refused("take "+d.Name, []string{d.Name + " is a bridge, which no guest can have"}, "")
		}
	}
	return out, nil
}

func (g *Gate) take(unit []*iommu.Device, holders []Holder) error {
	var reasons []string
	cure := ""
	add := func(format string, a ...any) { reasons = append(reasons, fmt.Sprintf(format, a...)) }
	for _, d := range unit {
		switch {
		case !d.PCI:
			add("%s shares the group and is no PCI device", d.Name)
		case d.Group < 0 && len(g.Topology.Groups) == 0:
			add("%s is in no IOMMU group, because no IOMMU is active on this host", d.Name)
			cure = "turn on AMD-Vi or VT-d in the firmware; an Intel host may need intel_iommu=on on the kernel command line"
		case d.Group < 0:
			add("%s is in no IOMMU group: the IOMMU does not cover it", d.Name)
		case d.SRIOV != nil && len(d.SRIOV.VFs) > 0:
			add("%s is a PF with %d VFs, and VFIO takes no such PF", d.Name, len(d.SRIOV.VFs))
			cure = "viaduct vf destroy " + d.Name
		}
	}
	if unit[0].Group >= 0 {
		if group, err := g.Topology.Group(unit[0].Group); err == nil {
			for _, m := range group.Blockers() {
				if m.IsBridge() {
					add("bridge %s of the group is on %s and so keeps the group from being viable", m.Name, m.Driver)
				}
			}
		}
	}
	reasons = append(reasons, g.unforced(unit, holders, g.taken)...)
	return refused("take "+g.what(unit), append(reasons, g.stuck(unit)...), cure)
}

// GiveBack refuses to give back what a guest still has: the write would wait for the guest.
func (g *Gate) GiveBack(units [][]*iommu.Device) ([]error, error) {
	holders, nodes, err := processHolders(g.Host, slices.Concat(units...))
	g.nodes = nodes
	if err != nil && (!g.DryRun || !errors.Is(err, ErrBlind)) {
		return nil, err
	}
	leased, err := LeaseHolders(g.Host, slices.Concat(units...))
	if err != nil {
		return nil, err
	}
	holders = append(holders, leased...)
	out := make([]error, len(units))
	for i, unit := range units {
		reasons := g.unforced(unit, holders, func(d *iommu.Device) bool { return !iommu.IsVFIODriver(d.Driver) })
		for _, d := range unit {
			if d.SRIOV != nil && len(d.SRIOV.VFs) > 0 && iommu.IsVFIODriver(d.Driver) {
				reasons = append(reasons, fmt.Sprintf("%s has %d VFs, which would go with its driver", d.Name, len(d.SRIOV.VFs)))
			}
		}
		reasons = append(reasons, g.stuck(unit)...)
		out[i] = refused("give back "+g.what(unit), reasons, "end the guest, or release what is assigned to it, first")
	}
	return out, nil
}

// taken reports whether a device is taken already, by the driver that is wanted.
func (g *Gate) taken(d *iommu.Device) bool {
	return iommu.IsVFIODriver(d.Driver) && (g.Driver == "" || g.Driver == Auto || g.Driver == d.Driver)
}

// unforced are the holders of a unit that are not overridden, as sentences. Who has a device that is where it is to be is no
// reason against bringing it there.
func (g *Gate) unforced(unit []*iommu.Device, holders []Holder, there func(*iommu.Device) bool) []string {
	var reasons []string
	for _, h := range holders {
		i := slices.IndexFunc(unit, func(d *iommu.Device) bool { return d.Name == h.Device })
		if i < 0 || there(unit[i]) {
			continue
		}
		if reason := unforced([]Holder{h}, g.Force); len(reason) > 0 {
			reasons = append(reasons, reason...)
		} else {
			g.Passed = append(g.Passed, h)
		}
	}
	return reasons
}

func (g *Gate) stuck(unit []*iommu.Device) []string {
	var out []string
	for _, r := range g.Stuck {
		if r.Err != nil && slices.ContainsFunc(unit, func(d *iommu.Device) bool { return d.PCI && d.Address == r.Device }) {
			out = append(out, r.Err.Error())
		}
	}
	return out
}

// what names the devices of a unit that were asked for.
func (g *Gate) what(unit []*iommu.Device) string {
	var out []string
	for _, d := range unit {
		if slices.ContainsFunc(g.Asked, func(a *iommu.Device) bool { return a.Name == d.Name }) {
			out = append(out, d.Name)
		}
	}
	return strings.Join(out, " ")
}

func refused(what string, reasons []string, cure string) error {
	if len(reasons) == 0 {
		return nil
	}
	return &RefusedError{What: what, Reasons: reasons, Cure: cure}
}
