package lease

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"viaduct/iommu"
	"viaduct/vfio/holder"
)

// Reclaim releases all leases that are dead, those of different PFs side by side: a reset takes the kernel a tenth of a
// second.
func (m *Manager) Reclaim(ctx context.Context) ([]Certificate, error) {
	looks, err := m.Look()
	if err != nil {
		return nil, err
	}
	var devices []*iommu.Device
	byPF := map[iommu.Address][]*Lease{}
	for _, look := range looks {
		if look.State != Dead {
			continue
		}
		mine, err := m.Book.tryGuest(look.Guest)
		if err != nil {
			return nil, err
		}
		if mine == nil {
			// Somebody is at work on it.
			continue
		}
		defer mine.Close()
		l, err := m.stillDead(look.Guest)
		if err != nil {
			return nil, err
		}

		if l == nil {
			continue
		}
		present := m.present(l)
		devices = append(devices, present...)
		var pf iommu.Address // that of all VFs of several PFs, and of what is none, is the same: none
		if of := m.pfs(present); len(of) == 1 {
			pf = of[0].Address
		}
		byPF[pf] = append(byPF[pf], l)
	}

	if len(devices) == 0 {
		return nil, nil
	}
	var errs []error
	if err := m.lock(ctx, m.touched(devices, true)); err != nil {
		// One that is stuck keeps no other.
		errs = append(errs, err)
		for pf, leases := range byPF {
			var some []*iommu.Device
			for _, l := range leases {
				some = append(some, m.present(l)...)
			}
			if err := m.lock(ctx, m.touched(some, true)); err != nil {
				errs = append(errs, err)
				delete(byPF, pf)
			}
		}
	}

	out, err := m.endAll(ctx, byPF)
	return out, errors.Join(append(errs, err)...)
}

// stillDead is a guest's lease, now that nobody else is at work on it, with a device of it there; nil if it is
// somebody's again.
func (m *Manager) stillDead(guest string) (*Lease, error) {
	l, err := m.Book.Get(guest)
	if l == nil || err != nil {
		return nil, err
	}
	present := m.present(l)
	holders, err := holder.Processes(m.host, present)
	if err != nil && !errors.Is(err, holder.ErrTooMany) {
		return nil, err
	}
	if state, _ := m.state(l, holders, l.Age(m.host)); state != Dead || len(present) == 0 {
		return nil, nil
	}
	return l, nil
}

// endAll ends leases, those of different PFs side by side, and those that are not of one PF after them.
func (m *Manager) endAll(ctx context.Context, byPF map[iommu.Address][]*Lease) ([]Certificate, error) {
	var mu sync.Mutex
	var out []Certificate
	var errs []error
	var wg sync.WaitGroup
	work := func(leases []*Lease) {
		for _, l := range leases {
			some, err := m.end(ctx, l, time.Now())
			mu.Lock()
			out, errs = append(out, some...), append(errs, err)
			mu.Unlock()
		}
	}

	for pf, leases := range byPF {
		if pf != (iommu.Address{}) {
			wg.Go(func() { work(leases) })
		}
	}
	wg.Wait()
	work(byPF[iommu.Address{}])
	slices.SortFunc(out, func(a, b Certificate) int { return a.Address.Compare(b.Address) })
	return out, errors.Join(errs...)
}
