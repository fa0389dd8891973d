package lease

import (
	"context"
	"fmt"
	"maps"
	"os"
	"slices"

	"viaduct/cmd/internal/declared"
	"viaduct/cmd/internal/hostfile"
	"viaduct/internal/shell"
	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/holder"
)

// Options are what leases are worked on with, beside the host.
type Options struct {
	// Declaration is for its pools, and what it protects; nil: nothing is declared.
	Declaration *hostfile.Host
	// Lock locks devices for as long as the Handle is open; nil: the Handle's.
	Lock func(context.Context, []*iommu.Device) error
}

// Manager is what leases are worked on with.
type Manager struct {
	Topology *iommu.Topology // the host as the Handle last saw it
	Book     *Book

	handle      *sriov.Handle
	host        *iommu.Host
	declaration *hostfile.Host
	lock        func(context.Context, []*iommu.Device) error
	declared    *declared.Manager
	states      map[string]capturedState // of a captured host's leases, by guest
}

// New makes a Manager, which works on the host as the Handle last saw it.
func New(s *sriov.Handle, o Options) (*Manager, error) {
	t, err := s.Topology()
	if err != nil {
		return nil, err
	}
	d, err := declared.New(s, declared.Options{})
	if err != nil {
		return nil, err
	}
	states, err := readStates(s.Host())
	if err != nil {
		return nil, err
	}
	m := &Manager{
		Topology: t, Book: BookOf(s.Host()), handle: s, host: s.Host(), declaration: o.Declaration, lock: o.Lock,
		declared: d, states: states,
	}
	if m.declaration == nil {
		m.declaration = &hostfile.Host{}
	}
	if m.lock == nil {
		m.lock = s.Lock
	}
	return m, nil
}

// Host is the host whose leases these are.
func (m *Manager) Host() *iommu.Host { return m.host }

// Declared is what works with the declared host, beside the leases.
func (m *Manager) Declared() *declared.Manager { return m.declared }

// all are all leases; those that are still to be made in this boot hold what they are going to have.
func (m *Manager) all() ([]*Lease, error) {
	all, err := m.Book.All()
	for _, l := range all {
		if l.Persist && !l.Ready {
			if err := m.relocate(l); err != nil {
				return nil, fmt.Errorf("where the devices of guest %q are now is not known: %w", l.Guest, err)
			}
		}
	}
	return all, err
}

// put writes a lease down, or what it is a part of.
func (m *Manager) put(l *Lease) error {
	if l.save != nil {
		return l.save()
	}
	return m.Book.put(l)
}

// known is a guest's lease, with the devices it has, or is going to have, in this boot.
func (m *Manager) known(guest string) (*Lease, error) {
	all, err := m.all()
	if err != nil {
		return nil, err
	}
	none := &NoLeaseError{Guest: guest}
	for _, l := range all {
		if l.Guest == guest {
			return l, nil
		}
		none.Have = append(none.Have, l.Guest)
	}
	return nil, none
}

// present are the devices of a lease that are there.
func (m *Manager) present(l *Lease) []*iommu.Device {
	var out []*iommu.Device
	for _, d := range l.Devices {
		if found, err := m.Topology.Find(d.Address); err == nil && found.ID == d.ID && !d.Nowhere {
			out = append(out, found)
		}
	}
	return out
}

// devices are a lease's devices as the scan found them.
func (m *Manager) devices(l *Lease) ([]*iommu.Device, error) {
	var out []*iommu.Device
	for i := range l.Devices {
		d, err := m.Topology.Find(l.Devices[i].Address)
		if err != nil || d.ID != l.Devices[i].ID || l.Devices[i].Nowhere {
			return nil, fmt.Errorf("%s of %s is lost: the device is gone (viaduct release %s ends the lease)",
				l.Devices[i].Address, l.Guest, shell.Quote(l.Guest))
		}
		out = append(out, d)
	}
	return out, nil
}

// touched are the devices that work on a lease's devices touches: these, the companions in their groups, and, if their
// settings change, the PFs of VFs, whose lock the settings are under.
func (m *Manager) touched(devices []*iommu.Device, settings bool) []*iommu.Device {
	out := append(slices.Clone(devices), m.companions(devices)...)
	if settings {
		out = append(out, m.pfs(devices)...)
	}
	return out
}

// pfs are the PFs of VFs.
func (m *Manager) pfs(devices []*iommu.Device) []*iommu.Device {
	var out []*iommu.Device
	for _, d := range devices {
		if pf := m.Topology.PFOf(d); pf != nil && !slices.Contains(out, pf) {
			out = append(out, pf)
		}
	}
	return out
}

// companions are what is only kept off the host's drivers, in the groups of devices that are handed over.
func (m *Manager) companions(devices []*iommu.Device) []*iommu.Device {
	var out []*iommu.Device
	seen := map[int]bool{}
	for _, d := range devices {
		g := m.Topology.GroupOf(d)
		if g == nil || seen[g.ID] {
			continue
		}
		seen[g.ID] = true
		for _, c := range g.Endpoints() {
			if c.Role() == iommu.RoleCompanion && !slices.Contains(devices, c) {
				out = append(out, c)
			}
		}
	}
	return out
}

// handed are those of some units' devices that a guest gets.
func handed(units [][]*iommu.Device) []*iommu.Device {
	return slices.DeleteFunc(slices.Concat(units...), func(d *iommu.Device) bool { return d.Role() != iommu.RoleGuest })
}

// configured reports whether a lease's VFs get settings.
func (l *Lease) configured() bool {
	return slices.ContainsFunc(l.Devices, func(d Device) bool { return len(d.Wanted) > 0 })
}

func (m *Manager) self() holder.Proc { return holder.NameProcess(m.host, os.Getpid()) }

// describe is a device as a lease has it. What cannot be identified is not assigned: nobody could find it again.
func (m *Manager) describe(d *iommu.Device, want sriov.Settings) (Device, error) {
	out := Device{LeaseDevice: holder.LeaseDevice{Address: d.Address}, ID: d.ID, Index: index(d), Home: !d.VFIO}
	if d.PhysFn == nil {
		id, err := iommu.Identify(m.host, d)
		out.Identity = &id
		return out, err
	}
	out.Wanted = maps.Clone(want)
	id, err := iommu.Identify(m.host, m.Topology.PFOf(d))
	out.PF = &id
	return out, err
}

// index is a VF's index, -1 of what is not a VF.
func index(d *iommu.Device) int {
	if d.PhysFn == nil {
		return -1
	}
	return d.VFIndex
}
