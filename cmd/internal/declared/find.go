package declared

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"viaduct/cmd/internal/hostfile"
	"viaduct/iommu"
	"viaduct/vfio/holder"
)

// find is the one device that a match names.
func (m *Manager) find(match hostfile.Match) (*iommu.Device, error) {
	all, err := m.all(match)
	return one(match, all, err)
}

// findPF is the one PF that a match names: only PFs can stand there.
func (m *Manager) findPF(match hostfile.Match) (*iommu.Device, error) {
	all, err := m.all(match)
	d, err := one(match, iommu.OnlyPFs(all), err)
	if err != nil {
		return nil, err
	}
	for _, s := range match.Selectors {
		if err := s.OtherPort(m.host, d); err != nil {
			return nil, err
		}
	}
	return d, nil
}

// pfs are the declared PFs, each in an entry of its own: what names several is one for each that is there, by its
// place. Where none is there, the entry is kept as one that names nothing.
func (m *Manager) pfs(s *hostfile.Host) ([]hostfile.PF, error) {
	var out []hostfile.PF
	for _, pf := range s.PFs {
		if len(pf.All) == 0 {
			out = append(out, pf)
			continue
		}
		each := pf.All
		pf.All = nil
		seen := map[string]bool{}
		for _, match := range each {
			all, err := m.all(match)
			if err != nil && !errors.Is(err, iommu.ErrNotFound) {
				return nil, fmt.Errorf("%s: %w", pf.At, err)
			}
			all = slices.DeleteFunc(slices.Clone(all), func(d *iommu.Device) bool { return d.SRIOV == nil })
			if len(all) == 0 {
				pf.Select = match
				out = append(out, pf)
			}
			for _, d := range all {
				if seen[d.Name] {
					continue
				}
				seen[d.Name] = true
				if pf.Select, err = at(m.host, d); err != nil {
					return nil, err
				}
				out = append(out, pf)
			}
		}
	}

	return out, nil
}

// isUnclear reports whether an error of find says that a match names nothing that is there, or several devices.
func isUnclear(err error) bool {
	_, several := errors.AsType[*iommu.AmbiguousError](err)
	return several || errors.Is(err, iommu.ErrNotFound)
}

func one(match hostfile.Match, all []*iommu.Device, err error) (*iommu.Device, error) {
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

// all are the devices that a match names, at least one; an ErrNotFound if there is none.
func (m *Manager) all(match hostfile.Match) ([]*iommu.Device, error) {
	return resolve(m.host, m.topology, match)
}

// guard is what must not be touched.
type guard struct {
	manager *Manager
	names   map[string]string // why, by device
	never   map[string]bool   // whether that is declared
	unseen  []string          // what is declared in protect, and is not there, or not known by that yet
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
			g.names[d.Name], g.never[d.Name] = "it is declared at "+p.At.String()+" in protect", true
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
		why := holder.Reason{Kind: holder.Protected, Device: d.Name, Text: g.names[d.Name]}
		return holder.Because("change "+d.Name, why, "")
	}
	return nil
}

// take refuses to take devices that are protected.
func (g *guard) take(unit []*iommu.Device) error {
	refused := &holder.RefusedError{What: "take " + unit[0].Name}
	for _, d := range unit {
		add := func(text string) {
			why := holder.Reason{Kind: holder.Protected, Device: d.Name, Text: text}
			refused.Reasons = append(refused.Reasons, why)
		}
		if why := g.names[d.Name]; why != "" {
			add(d.Name + ": " + why)
		} else if base := d.Class >> 16; g.manager.options.Boot && len(g.unseen) > 0 && d.Driver == "" &&
			(base == 0x01 || base == 0x02) {
			add(fmt.Sprintf("%s has no driver yet, and no device matches %s, which protect names: it may be this one",
				d.Name, strings.Join(g.unseen, " or ")))
		} else if g.manager.options.Boot && !g.any && d.PhysFn == nil && d.Class>>16 == 0x02 && !d.VFIO {
			add(d.Name + " is a NIC, and viaduct does not know which NICs this host needs: run viaduct apply once " +
				"while it is " +
				"up, or name some in protect")
		}
	}
	if len(refused.Reasons) == 0 {
		return nil
	}
	return refused
}
