package lease

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"viaduct/iommu"
	"viaduct/vfio/holder"
)

// Restore makes the leases again that outlive a boot. One whose devices are not there is left for later.
func (m *Manager) Restore(ctx context.Context) (done []string, err error) {
	keys, err := m.Book.State.Keys(holder.LeasePrefix)
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, k := range keys {
		var l Lease
		if known, err := m.Book.Run.Get(k, &l); err != nil || known && l.Ready {
			errs = append(errs, err)
			continue
		}
		if known, err := m.Book.State.Get(k, &l); err != nil || !known {
			errs = append(errs, err)
			continue
		}
		if l.Moving != "" {
			// Where its guest is, the move says.
			continue
		}
		if err := m.Again(ctx, l.Guest); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", l.Guest, err))
			continue
		}
		done = append(done, l.Guest)
	}
	return done, errors.Join(errs...)
}

// Again makes what a guest's lease says, whatever became of it: after a boot, or before its VMM starts.
func (m *Manager) Again(ctx context.Context, guest string) error {
	mine, err := m.Book.lockGuest(ctx, guest, m.handle.Timeout())
	if err != nil {
		return err
	}
	defer mine.Close()
	l, err := m.known(guest)
	if err != nil {
		return err
	}
	if l.Moving == Leaving {
		return l.moves("start")
	}
	if _, err := m.devices(l); err != nil {
		return err
	}
	l.Maker = m.self()
	if err := m.Book.put(l); err != nil {
		return err
	}
	_, err = m.finish(ctx, l, nil)
	return err
}

// relocate finds the devices of a lease of an earlier boot: a VF is that of its index of the PF, wherever that is now.
func (m *Manager) relocate(l *Lease) error {
	for i := range l.Devices {
		dev := &l.Devices[i]
		want := dev.Identity
		if want == nil {
			want = dev.PF
		}
		if want == nil {
			// A record of a snapshot may say anything.
			dev.Nowhere = true
			continue
		}
		var err error
		found := false
		m.Topology.All(func(d *iommu.Device) bool {
			if !d.PCI || d.PhysFn != nil {
				return true
			}
			var same bool
			if same, err = m.declared.Same(want, d); !same || err != nil {
				return err == nil
			}
			if dev.PF == nil {
				dev.Address, found = d.Address, true
			} else if n := slices.IndexFunc(m.Topology.VFs(d), func(vf *iommu.Device) bool {
				return vf.VFIndex == dev.Index
			}); n >= 0 {
				dev.Address, found = m.Topology.VFs(d)[n].Address, true
			}
			return !found
		})
		if err != nil {
			return err
		}
		dev.Nowhere = !found
	}

	return nil
}
