package declared

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"viaduct/cmd/internal/hostfile"
	"viaduct/iommu"
	"viaduct/vfio/holder"
)

// index finds devices by what takes long to read, with one look at each. VFs are not in it: they are declared below
// their PF.
type index struct {
	macs, paths, serials map[string][]*iommu.Device
}

// find is the one device that a match names.
func (m *Manager) find(match hostfile.Match) (*iommu.Device, error) {
	all, err := m.all(match)
	if err != nil {
		return nil, err
	}
	if len(all) > 1 {
		var names []string
		for _, d := range all {
			names = append(names, d.Name)
		}
		return nil, &iommu.AmbiguousError{Selector: match.String(), Candidates: names}
	}
	return all[0], nil
}

// all are the devices that all selectors of a match name, at least one; an ErrNotFound if there is none.
func (m *Manager) all(match hostfile.Match) ([]*iommu.Device, error) {
	var all []*iommu.Device
	for n, s := range match.Selectors {
		some, err := m.resolve(s)
		if err != nil {
			return nil, err
		}
		if n > 0 {
			some = slices.DeleteFunc(slices.Clone(all), func(d *iommu.Device) bool { return !slices.Contains(some, d) })
		}
		if all = some; len(all) == 0 {
			return nil, &iommu.NotFoundError{Selector: match.String(), What: "no device is all of this"}
		}
	}
	return all, nil
}

// resolve are the devices of a selector. A device on a vfio driver has no interface to ask for its MAC address: it is
// found by what was written down when it was taken.
func (m *Manager) resolve(s iommu.Selector) ([]*iommu.Device, error) {
	var by *map[string][]*iommu.Device
	if m.index == nil {
		m.index = &index{}
	}
	switch s.Form() {
	case iommu.ByMAC:
		by = &m.index.macs
	case iommu.ByPath:
		by = &m.index.paths
	case iommu.BySerial:
		by = &m.index.serials
	default:
		return s.Resolve(m.host, m.topology)
	}

	if *by == nil {
		*by = map[string][]*iommu.Device{}
		m.topology.All(func(d *iommu.Device) bool {
			if d.PCI && d.PhysFn == nil {
				keys, _ := m.keys(s.Form(),
					d) // of one that cannot be asked nothing is known, and it is not found by it
				for _, k := range keys {
					(*by)[k] = append((*by)[k], d)
				}
			}
			return true
		})
	}

	if found := (*by)[strings.ToLower(s.Value())]; len(found) > 0 {
		return found, nil
	}
	return s.Resolve(m.host,
		m.topology) // which says what there is instead, and knows addresses that are no permanent ones
}

// keys are what a device is found by.
func (m *Manager) keys(form iommu.Form, d *iommu.Device) ([]string, error) {
	switch form {
	case iommu.ByPath:
		p, err := iommu.PathOf(m.host, d)
		return []string{p}, err
	case iommu.BySerial:
		serial, err := iommu.ReadSerial(m.host, d.Address)
		if err != nil || serial != "" || !d.VFIO {
			return some(strings.ToLower(serial)), err
		}
		taken, err := m.handle.Taken(d)
		return some(strings.ToLower(taken.Serial)), err
	}
	if own := slices.Collect(maps.Values(iommu.MACs(m.host, d))); len(own) > 0 || !d.VFIO {
		return own, nil
	}
	taken, err := m.handle.Taken(d)
	return slices.Collect(maps.Values(taken.MACs)), err
}

func some(key string) []string {
	if key == "" {
		return nil
	}
	return []string{key}
}

// guard is what must not be touched.
type guard struct {
	manager *Manager
	names   map[string]string // why, by device
	never   map[string]bool   // whether that is declared
	unseen  []string          // what is declared as never to be touched, and is not there, or not known by that yet
	any     bool              // something is protected at all
}

// guard reads what is protected: by the declaration, and at boot by what carried the host when it ran.
func (m *Manager) guard(s *hostfile.Host) (*guard, error) {
	g := &guard{manager: m, names: map[string]string{}, never: map[string]bool{}}
	for _, p := range s.Protect {
		all, err := m.all(p.Match)
		if err != nil && !errors.Is(err, iommu.ErrNotFound) {
			return nil, fmt.Errorf("%s: %w", p.At, err)
		}
		if len(all) == 0 {
			g.unseen = append(g.unseen, p.Match.String())
		}
		for _, d := range all {
			g.any = true
			g.names[d.Name], g.never[d.Name] = "it is declared at "+p.At.String()+" as never to be touched", true
		}
	}
	if m.options.Boot {
		if err := m.recorded(g); err != nil {
			return nil, err
		}
	}
	return g, nil
}

// declared refuses a PF that is protected by name. What only carried the host may have VFs: that is the normal case.
func (g *guard) declared(d *iommu.Device) error {
	if g.never[d.Name] {
		return &holder.RefusedError{What: "change " + d.Name, Reasons: []string{g.names[d.Name]}}
	}
	return nil
}

// take refuses to take devices that are protected.
func (g *guard) take(unit []*iommu.Device) error {
	var reasons []string
	for _, d := range unit {
		if why := g.names[d.Name]; why != "" {
			reasons = append(reasons, d.Name+": "+why)
		} else if base := d.Class >> 16; g.manager.options.Boot && len(g.unseen) > 0 && d.Driver == "" &&
			(base == 0x01 || base == 0x02) {
			reasons = append(reasons, fmt.Sprintf("%s has no driver yet, and nothing is known as %s, which protect "+
				"names: it may be that", d.Name, strings.Join(g.unseen, " or ")))
		} else if g.manager.options.Boot && !g.any && d.PhysFn == nil && d.Class>>16 == 0x02 && !d.VFIO {
			reasons = append(reasons, d.Name+" is a NIC, and nothing says which NICs this host needs: run viaduct "+
				"apply once while it is up, or name some in protect")
		}
	}
	if len(reasons) == 0 {
		return nil
	}
	return &holder.RefusedError{What: "take " + unit[0].Name, Reasons: reasons}
}
