package declared

import (
	"errors"
	"fmt"
	"slices"

	"viaduct/cmd/internal/hostfile"
	"viaduct/iommu"
)

// Pools are the names of the pools that are declared, in their order.
func Pools(s *hostfile.Host) []string {
	var out []string
	for k := range s.PFs {
		for _, r := range s.PFs[k].VFs {
			if r.Pool != "" && !slices.Contains(out, r.Pool) {
				out = append(out, r.Pool)
			}
		}
	}
	return out
}

// errNotMade is the error of a pool that has no VFs yet.
type errNotMade struct{}

func (errNotMade) Error() string { return "its VFs do not exist yet (viaduct apply makes them)" }

func (errNotMade) Is(target error) bool { return target == iommu.ErrNotFound }

// Pool are the VFs of a pool that are there. PFs that are missing, or are other devices than they were when they were
// last applied, add none. If no VF is left it is an error, and an ErrNotFound if it is known that there is none. A PF
// that cannot be looked at is an error, too.
func (m *Manager) Pool(s *hostfile.Host, name string) ([]*iommu.Device, error) {
	var out []*iommu.Device
	var last error
	pfs, err := m.pfs(s)
	if err != nil {
		return nil, err
	}
	for k := range pfs {
		pf := &pfs[k]
		if !slices.ContainsFunc(pf.VFs, func(r hostfile.VFs) bool { return r.Pool == name }) {
			continue
		}
		i := &Item{Name: pf.Select.String()}
		if !m.found(i, pf.Select, m.findPF) {
			if i.unreadable() {
				return nil, fmt.Errorf("pool %q: %w", name, i.Err)
			}
			last = i.Err
			continue
		}
		each := pf.Each()
		for _, vf := range m.topology.VFs(i.Device) {
			if vf.VFIndex < len(each) && each[vf.VFIndex].Pool == name {
				out = append(out, vf)
			}
		}
	}

	if len(out) == 0 {
		if last == nil {
			last = errNotMade{}
		}
		return nil, fmt.Errorf("pool %q: %w", name, last)
	}
	return out, nil
}

// unreadable reports whether what was looked for may be there: the look itself failed.
func (i *Item) unreadable() bool { return i.State == Refused && !isUnclear(i.Err) }

// PoolOf is the pool that a device is of; "" if it is known to be of none.
func (m *Manager) PoolOf(s *hostfile.Host, d *iommu.Device) (string, error) {
	if d.PhysFn == nil {
		return "", nil
	}
	pfs, err := m.pfs(s)
	if err != nil {
		return "", err
	}
	for k := range pfs {
		pf := &pfs[k]
		each := pf.Each()
		if d.VFIndex >= len(each) || each[d.VFIndex].Pool == "" {
			continue
		}
		i := &Item{Name: pf.Select.String()}
		switch {
		case m.found(i, pf.Select, m.findPF) && i.Device.Address == *d.PhysFn:
			return each[d.VFIndex].Pool, nil
		case i.unreadable():
			return "", fmt.Errorf("what pool %s is of is not known: %w", d.Name, i.Err)
		}
	}
	return "", nil
}

// Taken are the devices that are declared to be taken and are there, as they were when they were last applied. The
// error is of those that could not be looked at.
func (m *Manager) Taken(s *hostfile.Host) ([]*iommu.Device, error) {
	var out []*iommu.Device
	var errs []error
	for k := range s.Devices {
		dev := &s.Devices[k]
		i := &Item{Name: dev.Select.String(), At: dev.At}
		switch {
		case m.found(i, dev.Select, m.find):
			if !slices.Contains(out, i.Device) {
				out = append(out, i.Device)
			}
		case i.unreadable():
			errs = append(errs, fmt.Errorf("%s: %w", i.Name, i.Err))
		}
	}
	return out, errors.Join(errs...)
}

// Kept says why no guest can have a VF whose IOMMU group has something else that the host keeps.
func Kept(vf, with *iommu.Device) string {
	return fmt.Sprintf("no guest can have %s (vf%d): it shares IOMMU group %d with %s, which the host keeps", vf.Name,
		vf.VFIndex, *vf.Group, with.Name)
}

// Protected refuses to take devices that are declared in protect.
func (m *Manager) Protected(s *hostfile.Host, unit []*iommu.Device) error {
	guard, err := m.guard(s)
	if err != nil {
		return err
	}
	return guard.take(unit)
}
