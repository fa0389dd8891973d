package declared

import (
	"errors"
	"maps"
	"net"
	"strings"

	"viaduct/cmd/internal/hostfile"
	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/bind"
)

// at is the match of a device by its place.
func at(h *iommu.Host, d *iommu.Device) (hostfile.Match, error) {
	place, err := iommu.PathOf(h, d)
	if err != nil {
		return hostfile.Match{}, err
	}
	sel, err := iommu.ParseSelector("path=" + place)
	return hostfile.Match{Selectors: []iommu.Selector{sel}}, err
}

// describe declares a PF as it is now, in full: also what it began with.
func (m *Manager) describe(d *iommu.Device, full bool) (pf hostfile.PF, err error) {
	if pf.Select, err = at(m.host, d); err != nil {
		return pf, err
	}
	pf.Count = len(d.SRIOV.VFs)
	eswitch, err := sriov.ReadEswitch(m.host, d.Address)
	if err != nil {
		return pf, err
	}
	if eswitch != nil && (full || eswitch.Mode == "switchdev") {
		pf.Eswitch, pf.Inline, pf.Encap = eswitch.Mode, eswitch.Inline, eswitch.Encap
	}
	port, err := sriov.ReadPort(m.host, d)
	if err != nil {
		return pf, err
	}
	macs, err := iommu.PermanentMACs(m.host, d)
	if err != nil {
		return pf, err
	}
	var permanent net.HardwareAddr
	if port != nil {
		permanent, _ = net.ParseMAC(macs[port.Name])
	}

	for _, v := range d.SRIOV.VFs {
		vf, err := m.topology.Find(v.Address)
		if err != nil {
			return pf, err
		}
		info, _ := port.Of(v.Index)
		r := hostfile.VFs{
			Range:    hostfile.Span(v.Index, v.Index),
			Driver:   sriov.UseNone,
			Settings: map[hostfile.Key]hostfile.Valued{},
		}
		switch {
		case vf.VFIO:
			r.Driver = sriov.UseVFIO
		case vf.Blocks():
			r.Driver = sriov.UseHome
		}

		for k, value := range info.Settings {
			if k == sriov.MAC {
				if value == "00:00:00:00:00:00" {
					// It has none, and to set that is not to leave it.
					continue
				}
				if stable, err := sriov.DeriveMAC(permanent, v.Index); err == nil && stable.String() == value {
					value = sriov.StableMAC
				}
			} else if !full && (isDefault(k, value) || k == sriov.Proto && info.Settings[sriov.VLAN] == "0") {
				continue
			}
			r.Settings[k] = hostfile.Value(value)
		}

		if n := len(pf.VFs) - 1; n >= 0 && !full && alike(&pf.VFs[n], &r) {
			pf.VFs[n].Range = pf.VFs[n].Range.To(v.Index)
			continue
		}

		pf.VFs = append(pf.VFs, r)
	}
	return pf, nil
}

func isDefault(k sriov.Key, value string) bool {
	usual, known := k.Default()
	return known && usual == value
}

func alike(a, b *hostfile.VFs) bool {
	return a.Driver == b.Driver && maps.Equal(a.Settings, b.Settings) &&
		(b.Settings[sriov.MAC] == hostfile.Valued{} || b.Settings[sriov.MAC] == hostfile.Value(sriov.StableMAC))
}

// Adopt declares the host as it is now: PFs with VFs, and devices on vfio drivers. Comments say what each is.
func (m *Manager) Adopt() (*hostfile.Host, map[string]string, error) {
	out, comments := &hostfile.Host{}, map[string]string{}
	var all []*iommu.Device
	m.topology.All(func(d *iommu.Device) bool {
		all = append(all, d)
		return true
	})

	names := iommu.OpenNames(m.host)
	defer names.Close()
	// By the first of each.
	units := map[string]bool{}
	for _, d := range all {
		switch {
		case d.SRIOV != nil && len(d.SRIOV.VFs) > 0:
			pf, err := m.describe(d, false)
			if err != nil {
				return nil, nil, err
			}
			if pf.Select, err = m.stable(d); err != nil {
				return nil, nil, err
			}
			out.PFs = append(out.PFs, pf)
			comments[pf.Select.String()] = comment(names, d)
		case m.withoutIOMMU(d):
			// After a boot it would be refused.
		case d.PCI && d.PhysFn == nil && d.VFIO && !units[m.firstOf(d)]:
			// One of a group takes all.
			units[m.firstOf(d)] = true
			match, err := m.stable(d)
			if err != nil {
				return nil, nil, err
			}
			out.Devices = append(out.Devices, hostfile.Device{Select: match, Driver: d.Driver})
			comments[match.String()] = comment(names, d)
		}
	}

	return out, comments, nil
}

// withoutIOMMU reports whether VFIO made the group of a device in its noiommu mode.
func (m *Manager) withoutIOMMU(d *iommu.Device) bool {
	g := m.topology.GroupOf(d)
	return g != nil && g.NoIOMMU
}

// firstOf names what is taken together with a device by the first of it.
func (m *Manager) firstOf(d *iommu.Device) string {
	units, err := bind.Units(m.topology, []*iommu.Device{d})
	if err != nil || len(units) == 0 {
		return d.Name
	}
	return units[0][0].Name
}

func comment(names *iommu.Names, d *iommu.Device) string {
	words := append([]string{d.Name}, d.Netdevs...)
	return strings.TrimSpace(strings.Join(append(words, names.Device(d.Vendor, d.Device)), " "))
}

// stable is the best match for a device: what stays with the card, else its place.
func (m *Manager) stable(d *iommu.Device) (hostfile.Match, error) {
	for _, form := range []iommu.Form{iommu.ByMAC, iommu.ByGUID, iommu.BySerial} {
		selectors, err := iommu.SelectorsOf(m.host, d, form)
		if err != nil {
			return hostfile.Match{}, err
		}
		for _, s := range selectors {
			match := hostfile.Match{Selectors: []iommu.Selector{s}}
			found, err := m.find(match)
			if err != nil && !isUnclear(err) {
				return hostfile.Match{}, err
			}
			err = s.OtherPort(m.host, d)
			if _, other := errors.AsType[*iommu.OtherPortError](err); err != nil && !other {
				return hostfile.Match{}, err
			}
			if found == d && err == nil {
				return match, nil
			}
		}
	}
	return at(m.host, d)
}
