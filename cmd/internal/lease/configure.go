package lease

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"viaduct/internal/host"
	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/bind"
)

// byPF calls do for each PF of a lease's VFs, with them.
func (m *Manager) byPF(l *Lease, do func(pf *iommu.Device, devices []*Device) error) error {
	of := map[iommu.Address][]*Device{}
	var order []*iommu.Device
	for i := range l.Devices {
		d, err := m.Topology.Find(l.Devices[i].Address)
		if err != nil {
			continue
		}
		pf := m.Topology.PFOf(d)
		if pf == nil {
			continue
		}
		if of[pf.Address] == nil {
			order = append(order, pf)
		}
		of[pf.Address] = append(of[pf.Address], &l.Devices[i])
	}

	for _, pf := range order {
		if err := do(pf, of[pf.Address]); err != nil {
			return err
		}
	}
	return nil
}

// before writes down what VFs have, before the first change, for the scrub.
func (m *Manager) before(l *Lease) error {
	changed := false
	err := m.byPF(l, func(pf *iommu.Device, devices []*Device) error {
		port, err := sriov.ReadPort(m.host, pf)
		if err != nil {
			return err
		}
		asked, err := m.handle.LastRequested(pf)
		if err != nil {
			return err
		}
		own, _ := m.declared.Settings(m.declaration, pf)
		for _, d := range devices {
			now, known := port.Of(d.Index)
			if !known || d.Before != nil {
				continue
			}
			d.Before, changed = maps.Clone(now.Settings), true
			for k := range d.Wanted {
				// What the driver does not report was as it was last set, or as VFs begin.
				for _, was := range []sriov.Settings{asked[d.Index], own[d.Index], sriov.DefaultSettings()} {
					if v, known := was[k]; known && d.Before[k] == "" && v != sriov.StableMAC {
						d.Before[k] = v
					}
				}
			}
		}
		return nil
	})

	if err != nil || !changed {
		return err
	}
	return m.put(l)
}

// noMAC is how a driver tells that a VF has no address, and makes one up.
const noMAC = "00:00:00:00:00:00"

// configure gives a lease's VFs what they are to have, and notes what they have then.
func (m *Manager) configure(ctx context.Context, l *Lease, devices []*iommu.Device) (notes []string, err error) {
	return notes, m.byPF(l, func(pf *iommu.Device, vfs []*Device) error {
		for _, d := range vfs {
			if len(d.Wanted) == 0 {
				continue
			}
			vf := devices[slices.IndexFunc(devices, func(x *iommu.Device) bool { return x.Address == d.Address })]
			unverified, err := m.set(ctx, vf, d.Wanted)
			if err != nil {
				return err
			}
			notes = append(notes, sriov.Unverified(vf, unverified)...)
		}

		port, err := sriov.ReadPort(m.host, pf)
		if err != nil {
			return err
		}
		for _, d := range vfs {
			now, _ := port.Of(d.Index)
			d.Now = maps.Clone(d.Wanted)
			if now.Settings != nil {
				d.Now = now.Settings
			}
			mac := d.Now[sriov.MAC]
			if l.Moving == "" && mac != "" && strings.Trim(mac, "0:") == "" && len(mac) == len(noMAC) {
				notes = append(notes, fmt.Sprintf("%s (vf%d) has no MAC address, so the guest gets another one "+
					"at each start: use --mac stable", d.Address, d.Index))
			}
		}
		return nil
	})
}

// undo brings the devices of a lease that could not be made back to what they were, and ends it.
func (m *Manager) undo(ctx context.Context, l *Lease) error {
	if err := m.unmake(ctx, l); err != nil {
		return err
	}
	return m.Book.drop(l)
}

// unmake brings the devices of a lease that could not be made back to what they were.
func (m *Manager) unmake(ctx context.Context, l *Lease) error {
	// That of the command may be over.
	ctx = context.WithoutCancel(ctx)
	for i := range l.Devices {
		d, err := m.Topology.Find(l.Devices[i].Address)
		if err != nil {
			continue
		}
		if l.configured() {
			// Then its PF is locked.
			err = m.restore(ctx, &l.Devices[i], d)
		}
		if err := errors.Join(err, m.giveBack(ctx, &l.Devices[i], d)); err != nil {
			return err
		}
	}

	return m.giveBackCompanions(ctx, m.present(l))
}

// restore gives a VF the settings that it had before it was assigned.
func (m *Manager) restore(ctx context.Context, dev *Device, d *iommu.Device) error {
	if len(dev.Before) == 0 || d.PhysFn == nil {
		return nil
	}
	_, err := m.set(ctx, d, dev.Before)
	return err
}

// set gives a VF settings, and names those that its driver does not report.
func (m *Manager) set(ctx context.Context, vf *iommu.Device, want sriov.Settings) (unverified []sriov.Key, err error) {
	plan, err := m.planSet(vf, want)
	if err != nil {
		return nil, err
	}
	return m.handle.Set(ctx, plan)
}

func (m *Manager) planSet(vf *iommu.Device, want sriov.Settings) (*sriov.SetPlan, error) {
	return m.handle.PlanSet(m.Topology.PFOf(vf), vf, want)
}

// giveBack gives a device back to what it had, if that was no vfio driver.
func (m *Manager) giveBack(ctx context.Context, dev *Device, d *iommu.Device) error {
	if !dev.Home {
		return nil
	}
	if err := m.handle.Refresh([]*iommu.Device{d}); err != nil || !d.VFIO {
		return err
	}
	return m.home(ctx, d)
}

// home gives devices of which nobody has to be asked back to the host.
func (m *Manager) home(ctx context.Context, devices ...*iommu.Device) error {
	var errs []error
	for _, result := range m.handle.DoUnasked(ctx, bind.Singly(devices), bind.GiveBack()) {
		errs = append(errs, result.Err)
	}
	return errors.Join(errs...)
}

// giveBackCompanions gives back what was kept off the host's drivers in the groups of a lease's devices, where nothing
// of the group is on a VFIO driver any more.
func (m *Manager) giveBackCompanions(ctx context.Context, devices []*iommu.Device) error {
	companions := m.companions(devices)
	if len(companions) == 0 {
		return nil
	}
	taken := map[int]bool{}
	for _, d := range devices {
		g := m.Topology.GroupOf(d)
		if g == nil {
			continue
		}
		for _, other := range g.Endpoints() {
			if !other.PCI || other.Role() == iommu.RoleCompanion {
				continue
			}
			// Without the override, whose reading waits for a write that does.
			driver, err := iommu.ReadDriver(m.host, other.Address)
			if err != nil && !host.Absent(err) {
				return err
			}
			made := m.host.Exists(path.Join("sys/bus/pci/devices", other.Name, "vfio-dev"))
			taken[g.ID] = taken[g.ID] || made || iommu.IsVFIODriver(driver)
		}
	}

	companions = slices.DeleteFunc(companions, func(c *iommu.Device) bool { return taken[*c.Group] })
	back := func() error {
		if err := m.handle.Refresh(companions); err != nil {
			return err
		}
		return m.home(context.WithoutCancel(ctx), companions...)
	}
	err := back()
	if err == nil || bind.IsStuck(err) {
		return err
	}
	// No lease has them, which would be released again: so once more, as what writes may have been killed.
	if back() == nil {
		return nil
	}
	return fmt.Errorf("%w (viaduct unbind gives it back)", err)
}
