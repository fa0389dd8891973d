package sriov

import (
	"context"
	"errors"
	"fmt"

	"viaduct/iommu"
	"viaduct/vfio"
)

// Apply carries out a plan that Check let pass, for a PF and VFs that the caller has locked, and reads back what came of it. On
// failure the VFs it made are removed and the old settings restored; VFs that had to go first stay gone, which the error
// says. It returns what the user should know of the new VFs.
func Apply(ctx context.Context, b *vfio.Binder, p *Plan) (notes []string, err error) {
	if !p.Changes() {
		return nil, nil
	}
	r := p.record()
	if err := b.Begin(opCount, p.PF, p.Victims, r); err != nil {
		return nil, err
	}
	err = p.apply(ctx, b, &r)
	if err == nil && r.Recounts {
		err = r.ready(ctx, b, p.PF.Address)
	}
	if _, stuck := errors.AsType[*vfio.StuckError](err); stuck {
		return nil, err
	}
	if err == nil {
		notes, err = sharedGroups(b.Host, p.PF.Address)
		return notes, errors.Join(err, b.End(p.PF.Address))
	}
	undone := r.undo(b, p.PF.Address, false)
	if lost := r.lost(b.Host, p.PF.Address); lost != "" {
		err = errors.Join(err, errors.New(lost))
	}
	if undone != nil { // the record stays, for the next command to try again
		return nil, errors.Join(err, undone)
	}
	return nil, errors.Join(err, b.End(p.PF.Address))
}

// apply makes the plan's changes up to the VFs, which are then there and have no driver, but where the kernel gave them one.
func (p *Plan) apply(ctx context.Context, b *vfio.Binder, r *countRecord) error {
	if b.Host.Live() {
		for _, l := range p.Up {
			if err := l.up(); err != nil {
				return err
			}
		}
		for _, m := range p.Raise {
			if err := m.set(m.To); err != nil {
				return err
			}
		}
	}
	if ctx.Err() != nil {
		return fmt.Errorf("%s: interrupted before its VFs were made", p.PF.Name)
	}
	if err := b.Write(p.PF.Address, p.Clear); err != nil {
		return explain(err, p)
	}
	if len(p.Clear) > 0 {
		r.Cleared = true
		if err := errors.Join(r.forget(b, p.PF), b.Begin(opCount, p.PF, nil, *r)); err != nil {
			return err
		}
	}
	mode := func(late bool) error {
		if p.Eswitch == (Eswitch{}) || p.modeLate() != late {
			return nil
		}
		return setEswitch("pci", p.PF.Name, p.Eswitch)
	}
	if b.Host.Live() {
		for _, o := range p.Offload {
			if err := setTCOffload(o.Name, o.On); err != nil {
				return err
			}
		}
	}
	if err := mode(false); err != nil || !r.Recounts {
		return err
	}
	if err := doShares(b.Host, p.PF, p.shares); err != nil {
		return err
	}
	if err := b.Write(p.PF.Address, p.Before); err != nil {
		return explain(err, p)
	}
	if err := counted(b.Host, p.PF, p.Want); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return fmt.Errorf("%s: interrupted after its VFs were made", p.PF.Name)
	}
	if err := mode(true); err != nil {
		return err
	}
	if err := b.Write(p.PF.Address, p.After); err != nil {
		return err
	}
	if err := settle(ctx, b.Host, p.Up); err != nil {
		return err
	}
	return p.verify(b.Host)
}

func settle(ctx context.Context, h *iommu.Host, up []Link) error {
	if !h.Live() {
		return nil
	}
	var errs []error
	for _, l := range up {
		errs = append(errs, unlessGone(l.settle(ctx)))
	}
	return errors.Join(errs...)
}

// counted compares the links and the PF's own count with what was asked for: a driver may make fewer and report success.
func counted(h *iommu.Host, pf *iommu.Device, want int) error {
	now, err := iommu.ReadDevice(h, pf.Address)
	if err != nil {
		return err
	}
	number, err := h.Int(attribute(pf.Address, "sriov_numvfs"))
	if err != nil {
		return err
	}
	if now.SRIOV == nil || len(now.SRIOV.VFs) != want || number != want {
		return fmt.Errorf("%s: %d VFs were asked for, and its driver %s made %d without an error%s", pf.Name, want, pf.Driver, number, silentCause(pf))
	}
	return nil
}

// verify reads back what the steps after the count set.
func (p *Plan) verify(h *iommu.Host) error {
	for _, s := range p.After {
		got, err := h.String(s.Path)
		if err != nil {
			return err
		}
		if got != s.Value {
			return fmt.Errorf("/%s: wrote %s and read back %s", s.Path, s.Value, got)
		}
	}
	if p.Use == UseHome || p.Want == 0 {
		return nil
	}
	now, err := iommu.ReadDevice(h, p.PF.Address)
	if err != nil {
		return err
	}
	for _, v := range now.SRIOV.VFs {
		driver, err := iommu.ReadDriver(h, v.Address)
		if err != nil {
			return err
		}
		if driver != "" {
			return fmt.Errorf("VF %s was to have no driver and is on %s", v.Address, driver)
		}
	}
	return nil
}

// takeAll puts all VFs of a PF onto a vfio driver.
func takeAll(ctx context.Context, b *vfio.Binder, pf iommu.Address) error {
	vfs, err := vfDevices(b.Host, pf)
	if err != nil {
		return err
	}
	var units [][]*iommu.Device
	for _, vf := range vfs {
		units = append(units, []*iommu.Device{vf})
	}
	var errs []error
	for _, r := range b.Take(ctx, units, vfio.Auto) {
		errs = append(errs, r.Err)
	}
	return errors.Join(errs...)
}

// sharedGroups warns of VFs that cannot be given to a guest by themselves.
func sharedGroups(h *iommu.Host, pf iommu.Address) ([]string, error) {
	now, err := iommu.ReadDevice(h, pf)
	if err != nil {
		return nil, err
	}
	first, notes := map[string]iommu.Address{}, []string(nil)
	for _, a := range append([]iommu.Address{pf}, addresses(now.SRIOV.VFs)...) {
		group, err := h.LinkBase(attribute(a, "iommu_group"))
		if err != nil {
			continue // without an IOMMU there is none to share
		}
		if with, shared := first[group]; shared {
			notes = append(notes, fmt.Sprintf("%s shares IOMMU group %s with %s: they can only be taken together", a, group, with))
		} else {
			first[group] = a
		}
	}
	return notes, nil
}

func addresses(vfs []iommu.VF) []iommu.Address {
	out := make([]iommu.Address, len(vfs))
	for i, v := range vfs {
		out[i] = v.Address
	}
	return out
}
