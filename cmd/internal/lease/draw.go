package lease

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"viaduct/cmd/internal/declared"
	"viaduct/iommu"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// ExhaustedError says that there is nothing left to draw.
type ExhaustedError struct {
	From                               string
	Wanted, Of                         int
	Leased, Quarantined, Used, Refused int
}

func (e *ExhaustedError) Error() string {
	out := []string{
		fmt.Sprintf("pool exhausted: %q has %d, of which %d are assigned (viaduct leases)", e.From, e.Of, e.Leased),
	}
	for _, more := range []struct {
		n    int
		what string
	}{{e.Quarantined, "in quarantine"}, {e.Used, "recorded by another tool"}, {e.Refused, "in use"}} {
		if more.n > 0 {
			out = append(out, fmt.Sprintf("%d %s", more.n, more.what))
		}
	}
	if e.Wanted > 1 {
		out = append(out, fmt.Sprintf("and %d are wanted", e.Wanted))
	}
	return strings.Join(out, ", ")
}

// source is what a guest may draw from: units of devices, each of which it gets whole. A VF is a unit by itself where
// its PF isolates it, as PFs do. What is on a driver of the host is drawn only from a pool, or when it is named by
// itself.
func (m *Manager) source(from string) ([][]*iommu.Device, error) {
	var devices []*iommu.Device
	if slices.Contains(declared.Pools(m.declaration), from) {
		var err error
		if devices, err = m.declared.Pool(m.declaration, from); err != nil {
			return nil, err
		}
		if devices, err = m.separate(devices); err != nil {
			return nil, err
		}
		return m.whole(devices)
	}

	noPool := "there is no pool of that name"
	if all := declared.Pools(m.declaration); len(all) > 0 {
		noPool = "the pools are " + strings.Join(all, ", ")
	}
	sel, err := iommu.ParseArgument(from)
	if err != nil {
		return nil, fmt.Errorf("%w; and %s", err, noPool)
	}
	found, err := sel.Resolve(m.host, m.Topology)
	if err != nil {
		return nil, fmt.Errorf("%w; and %s", err, noPool)
	}

	for _, d := range found {
		if err := sel.OtherPort(m.host, d); err != nil {
			return nil, err
		}
		switch {
		case len(found) > 1 && d.Role() == iommu.RoleCompanion:
			// Which only its own name can mean.
			err = fmt.Errorf("everything that %s matches is part of the host itself: a guest gets such a device "+
				"only if the selector names it alone", from)
		case bind.Takable(d) != nil:
			err = bind.Takable(d)
		case d.VFIO:
			devices = append(devices, d)
		case d.SRIOV != nil && len(d.SRIOV.VFs) > 0:
			var vfs []*iommu.Device
			for _, vf := range m.Topology.VFs(d) {
				if !vf.Blocks() {
					vfs = append(vfs, vf)
				}
			}
			if len(vfs) == 0 {
				err = errors.New(
					"all VFs of " + from + " are on drivers of the host: to take one of them, it must be " +
						"named alone",
				)
				break
			}
			if vfs, err = m.separate(vfs); err == nil {
				devices = append(devices, vfs...)
			}
		case d.SRIOV != nil && d.SRIOV.Total > 0:
			why := holder.Reason{Kind: holder.VFs, Device: d.Name, Text: d.Name + " is a PF without VFs"}
			err = holder.Because("draw from "+d.Name, why,
				"viaduct vf create "+d.Name+" N; or, to assign the PF itself, viaduct bind "+d.Name+" first")
		case d.Blocks() && len(found) > 1:
			err = errors.New(
				"everything that " + from + " names are on drivers of the host: to take one of them, it must be " +
					"named alone",
			)
		default:
			devices = append(devices, d)
		}
	}

	if len(devices) == 0 && err != nil {
		return nil, err
	}
	return m.whole(devices)
}

// whole are the units of devices, but for those with a member that is no PCI device, which cannot be taken.
func (m *Manager) whole(devices []*iommu.Device) ([][]*iommu.Device, error) {
	units, err := bind.Units(m.Topology, devices)
	if err != nil {
		return nil, err
	}
	var out [][]*iommu.Device
	refused := &holder.RefusedError{What: "assign it"}
	for _, unit := range units {
		i := slices.IndexFunc(unit, func(d *iommu.Device) bool { return !d.PCI })
		if i < 0 {
			out = append(out, unit)
		} else {
			refused.Reasons = append(refused.Reasons, holder.Reason{
				Kind: holder.Group, Device: unit[i].Name,
				Text: fmt.Sprintf("%s, in IOMMU group %d, is not a PCI device", unit[i].Name, *unit[i].Group),
			})
		}
	}
	if len(out) == 0 && len(refused.Reasons) > 0 {
		return nil, refused
	}
	return out, nil
}

// separate are those VFs that a guest can have: nothing else in their IOMMU groups is kept by the host.
func (m *Manager) separate(vfs []*iommu.Device) ([]*iommu.Device, error) {
	var out []*iommu.Device
	refused := &holder.RefusedError{What: "assign a VF"}
	for _, vf := range vfs {
		if with := m.Topology.KeptWith(vf); with != nil {
			refused.Reasons = append(refused.Reasons, holder.Reason{
				Kind: holder.Group, Device: vf.Name, Text: declared.Kept(vf, with),
			})
		} else {
			out = append(out, vf)
		}
	}
	if len(out) == 0 && len(refused.Reasons) > 0 {
		return nil, refused
	}
	return out, nil
}

// draw draws what a request wants of each of its choices, which then has these as its units.
func (m *Manager) draw(all []*Lease, r *Request, choices []choice, skip map[string]bool) ([]choice, error) {
	leased := map[iommu.Address]bool{}
	for _, l := range all {
		for _, d := range l.Devices {
			leased[d.Address] = leased[d.Address] || !d.Nowhere
		}
	}

	var out []choice
	for _, c := range choices {
		units, err := m.free(leased, r, &c, skip)
		if err != nil {
			return nil, err
		}
		for _, d := range slices.Concat(units...) {
			// Nobody gets it twice, whatever pools it is in.
			leased[d.Address] = true
		}
		out = append(out, choice{c.Source, units})
	}
	return out, nil
}

// free are the units of a choice that nobody has, as many as are wanted, the best first: on the guest's NUMA node, on a
// vfio driver already, without any, and by address. Those that are skipped were seen to be in use.
func (m *Manager) free(leased map[iommu.Address]bool, r *Request, c *choice,
	skip map[string]bool) ([][]*iommu.Device, error) {
	units := c.units
	quarantine, err1 := m.Book.Quarantined()
	owners, err2 := holder.Owners(m.host, slices.Concat(units...))
	if m.handle.DryRun() && errors.Is(err2, holder.ErrBlind) {
		// Who cannot see all may still ask.
		err2 = nil
	}
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	e := &ExhaustedError{From: c.From, Wanted: c.Count, Of: len(units)}
	var out [][]*iommu.Device
	for _, unit := range units {
		has := func(what func(*iommu.Device) bool) bool { return slices.ContainsFunc(unit, what) }
		switch {
		case has(func(d *iommu.Device) bool { return leased[d.Address] }):
			e.Leased++
		case has(func(d *iommu.Device) bool { return quarantine.Why(m.host, d) != "" }):
			e.Quarantined++
		case has(func(d *iommu.Device) bool {
			return slices.ContainsFunc(owners, func(h holder.Holder) bool { return h.Device == d.Name })
		}):
			e.Used++
		case has(func(d *iommu.Device) bool { return skip[d.Name] }):
			e.Refused++
		default:
			out = append(out, unit)
		}
	}

	if len(out) < c.Count {
		return nil, e
	}
	if slices.Contains(declared.Pools(m.declaration), c.From) {
		// libvirt draws from the head of the network that a pool may be made into, whoever has that.
		slices.Reverse(out)
	}
	rank := func(unit []*iommu.Device) int {
		d, n := handed([][]*iommu.Device{unit})[0], 0
		if r.NUMA != nil && (d.NUMANode == nil || *d.NUMANode != *r.NUMA) {
			n += 4
		}
		switch {
		case d.VFIO:
		case d.Driver == "":
			n++
		default:
			n += 2
		}
		return n
	}

	slices.SortStableFunc(out, func(a, b []*iommu.Device) int { return rank(a) - rank(b) })
	return out[:c.Count], nil
}
