package sriov

import (
	"context"
	"fmt"
	"maps"

	"viaduct/internal/journal"
	"viaduct/iommu"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// Handle changes devices and VFs of one host. It is a [bind.Handle] with the recoverers for changes of VFs.
type Handle struct {
	*bind.Handle
	journal *journal.Journal
}

// Open opens a host for changes of its devices and VFs. It is as [bind.Open], whose conditions it has; the caller
// closes the Handle.
func Open(h *iommu.Host, o bind.Options) (*Handle, error) {
	own := map[string]bind.Recoverer{opCount: recoverCount, opSet: recoverSet}
	for name := range own {
		if _, taken := o.Recoverers[name]; taken {
			return nil, fmt.Errorf("sriov: the name %q belongs to its own Recoverer", name)
		}
	}
	maps.Copy(own, o.Recoverers)
	o.Recoverers = own
	b, err := bind.Open(h, o)
	if err != nil {
		return nil, err
	}
	return wrap(b), nil
}

// wrap is a Handle over one of package bind.
func wrap(b *bind.Handle) *Handle { return &Handle{b, journal.In(b.Host().Host, journal.Dir)} }

// Make gives a PF the VFs of a wish, and no others: it locks the PF and the VFs that go, finishes what interrupted runs
// left of them, plans, refuses to end VFs that somebody uses ([holder.ErrRefused], unless force overrides their kinds),
// and carries the plan out, which it returns with what the user should know of the new VFs in its Notes. On failure all
// is as it was, but for VFs that had to go first. On a dry run, and on a captured host, the plan is all.
func (s *Handle) Make(ctx context.Context, pf iommu.Address, wish Wish, force ...holder.Kind) (*Plan, error) {
	d, err := s.lockPF(ctx, pf)
	if err != nil {
		return nil, err
	}
	plan, err := s.PlanCount(d, wish)
	if err != nil {
		return nil, err
	}
	if s.Changes() && len(plan.Victims) > 0 {
		// Who had a VF until it was locked may have changed it.
		if err := s.Lock(ctx, plan.Victims); err != nil {
			return plan, err
		}
		if err := s.StuckIn(bind.AddressesOf(plan.Victims)...); err != nil {
			return plan, err
		}
		if d, err = s.find(pf); err != nil {
			return plan, err
		}
		if plan, err = s.PlanCount(d, wish); err != nil {
			return nil, err
		}
	}
	if err := s.CheckCount(plan, force); err != nil || !s.Changes() {
		return plan, err
	}

	notes, err := s.Apply(ctx, plan)
	plan.Notes = append(plan.Notes, notes...)
	return plan, err
}

// SetVF gives a VF settings: all of them or, undone, none. It names the keys that the PF's driver takes and does not
// report. On a dry run, and on a captured host, it fails: [Handle.PlanSet] plans.
func (s *Handle) SetVF(ctx context.Context, vf iommu.Address, want Settings) (unverified []Key, err error) {
	d, err := s.find(vf)
	if err != nil {
		return nil, err
	}
	if d.PhysFn == nil {
		return nil, &NotVFError{vf}
	}

	pf, err := s.lockPF(ctx, *d.PhysFn)
	if err != nil {
		return nil, err
	}
	if err := s.LockAt(ctx, vf); err != nil {
		return nil, err
	}
	if d, err = s.find(vf); err != nil {
		return nil, err
	}
	plan, err := s.PlanSet(pf, d, want)
	if err != nil {
		return nil, err
	}
	return s.Set(ctx, plan)
}

// lockPF locks a PF, finishes what interrupted runs left, and looks at the host as it is then.
func (s *Handle) lockPF(ctx context.Context, pf iommu.Address) (*iommu.Device, error) {
	if !s.Changes() {
		t, err := s.Topology()
		if err != nil {
			return nil, err
		}
		return t.Find(pf)
	}

	if err := s.LockAt(ctx, pf); err != nil {
		return nil, err
	}
	if _, err := s.Recover(ctx); err != nil {
		return nil, err
	}
	if err := s.StuckIn(pf); err != nil {
		return nil, err
	}
	return s.find(pf)
}

// find is a device as it is now.
func (s *Handle) find(a iommu.Address) (*iommu.Device, error) {
	t, err := s.Scan()
	if err != nil {
		return nil, err
	}
	return t.Find(a)
}
