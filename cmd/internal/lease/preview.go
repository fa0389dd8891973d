package lease

import (
	"cmp"
	"errors"
	"slices"

	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// Preview is what Assign would do.
type Preview struct {
	Lease   *Lease // that it would make, and nobody has yet; or, again, that the guest has
	Again   bool
	Devices []PreviewDevice // companions, too
}

// PreviewDevice is what Assign would do to a device.
type PreviewDevice struct {
	Device *iommu.Device
	Set    *sriov.SetPlan // of a VF that gets settings; nil otherwise
	Change *bind.Change   // nil: the guest's VMM takes it from where it is
	Reset  *iommu.Reset   // nil: nothing resets it for the guest
}

// Companion reports whether the device is only kept off the host's drivers.
func (d *PreviewDevice) Companion() bool { return d.Device.Role() == iommu.RoleCompanion }

// Steps are the preview in its order, with comments among the commands.
func (p *Preview) Steps() []bind.Action {
	var out []bind.Action
	comment := func(text string) { out = append(out, bind.Action{Command: "# " + text}) }
	for _, of := range p.Devices {
		d := of.Device
		if of.Set != nil {
			out = append(out, of.Set.Steps()...)
		}
		if of.Change == nil {
			comment(d.Name + " is left on " + cmp.Or(d.Driver, "no driver") + ", for the VMM to take it")
			continue
		}
		out = append(out, bind.Actions(of.Change.Steps)...)
		if of.Reset != nil {
			comment(d.Name + " is reset afterwards " + of.Reset.String())
		}
		if of.Companion() {
			comment(d.Name + " is only kept off the host's drivers; the guest does not get it")
		} else if len(of.Change.Steps) == 0 {
			comment(d.Name + " is on " + d.Driver + " already")
		}
	}
	return out
}

// Preview says what Assign would do.
func (m *Manager) Preview(r *Request) (*Preview, error) {
	p := &Preview{Lease: &Lease{LeaseHead: holder.LeaseHead{Guest: r.Guest}, OwnDriver: r.OwnDriver}}
	devices, wanted, err := m.previewDevices(r, p)
	if err != nil {
		return nil, err
	}
	if _, err := m.fits(&Lease{LeaseHead: holder.LeaseHead{Guest: r.Guest}}, devices, r); err != nil {
		return nil, err
	}
	if err := m.clean(p.Lease, devices); err != nil {
		return nil, err
	}
	if _, err := m.unprotected(devices); err != nil {
		return nil, err
	}

	for _, d := range m.touched(devices, false) {
		of := PreviewDevice{Device: d}
		if d.PhysFn != nil && len(wanted[d.Name]) > 0 {
			if of.Set, err = m.planSet(d, wanted[d.Name]); err != nil {
				return nil, err
			}
			for k := range p.Lease.Devices {
				if p.Lease.Devices[k].Address == d.Address {
					p.Lease.Devices[k].Now = of.Set.Want
				}
			}
		}

		if !r.OwnDriver {
			change, err := m.handle.Plan(d, bind.Take(bind.Auto))
			if err != nil {
				return nil, err
			}
			of.Change = &change
			if slices.Contains(devices, d) {
				reset, err := iommu.ResetOf(m.host, m.Topology, d)
				if err != nil {
					return nil, err
				}
				of.Reset = &reset
			}
		}
		p.Devices = append(p.Devices, of)
	}

	return p, nil
}

// previewDevices are the devices that a guest would get, or has, and the settings of each by name. It fills in the
// devices of the preview's lease.
func (m *Manager) previewDevices(r *Request, p *Preview) ([]*iommu.Device, map[string]sriov.Settings, error) {
	l, wanted := p.Lease, map[string]sriov.Settings{}
	all, err := m.all()
	if err != nil {
		return nil, nil, err
	}
	if i := slices.IndexFunc(all, func(l *Lease) bool { return l.Guest == r.Guest }); i >= 0 {
		if err := errors.Join(all[i].moves("assign to"), all[i].same(r)); err != nil {
			return nil, nil, err
		}
		devices, err := m.devices(all[i])
		if err != nil {
			return nil, nil, err
		}
		for k, d := range devices {
			wanted[d.Name] = all[i].Devices[k].Wanted
		}
		l.Devices, p.Again = slices.Clone(all[i].Devices), true
		return devices, wanted, nil
	}

	choices, err := m.choices(r)
	if err != nil {
		return nil, nil, err
	}
	if choices, err = m.draw(all, r, choices, nil); err != nil {
		return nil, nil, err
	}
	var devices []*iommu.Device
	var drawn [][]*iommu.Device
	for _, c := range choices {
		drawn = append(drawn, c.units...)
		for _, d := range handed(c.units) {
			if wanted[d.Name], err = c.settingsFor(d); err != nil {
				return nil, nil, err
			}
			devices = append(devices, d)
		}
	}
	for _, d := range devices {
		l.Devices = append(l.Devices, Device{LeaseDevice: holder.LeaseDevice{Address: d.Address}})
	}

	refusals, _, err := m.ask(&Lease{OwnDriver: r.OwnDriver}, devices, drawn)
	if err := errors.Join(append(refusals, err)...); err != nil {
		return nil, nil, err
	}
	if err := m.resettable(l, drawn); err != nil && !r.NoReset {
		return nil, nil, err
	}
	return devices, wanted, nil
}
