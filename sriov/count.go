package sriov

import (
	"context"
	"errors"
	"fmt"
	"time"

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
	vfs, err := p.apply(ctx, b, &r)
	if err == nil {
		err = r.ready(ctx, b, p.PF.Address, vfs)
	}
	if _, stuck := errors.AsType[*vfio.StuckError](err); stuck {
		return nil, err
	}
	if err == nil {
		return sharedGroups(p.PF, vfs), b.End(p.PF.Address)
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

// apply makes the plan's changes up to the new VFs, which it returns. They have no driver, but where the kernel gave them one.
func (p *Plan) apply(ctx context.Context, b *vfio.Binder, r *countRecord) ([]*iommu.Device, error) {
	if b.Host.Live() {
		for _, l := range p.Up {
			if err := l.up(); err != nil {
				return nil, err
			}
		}
		for _, m := range p.Raise {
			if err := m.set(m.To); err != nil {
				return nil, err
			}
		}
	}
	if ctx.Err() != nil {
		return nil, fmt.Errorf("%s: interrupted before its VFs were made", p.PF.Name)
	}
	if err := b.Write(p.PF.Address, p.Clear); err != nil {
		return nil, explain(err, p)
	}
	if len(p.Clear) > 0 {
		r.Cleared = true
		if err := errors.Join(r.forget(b, p.PF), b.Begin(opCount, p.PF, nil, *r)); err != nil {
			return nil, err
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
				return nil, err
			}
		}
	}
	if err := mode(false); err != nil || !r.Recounts {
		return nil, err
	}
	if err := doShares(b.Host, p.PF, p.shares); err != nil {
		return nil, err
	}
	if err := b.Write(p.PF.Address, p.Before); err != nil {
		return nil, explain(err, p)
	}
	vfs, err := vfDevices(b.Host, p.PF.Address)
	if err != nil {
		return nil, err
	}
	if err := p.counted(b.Host, vfs); err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, fmt.Errorf("%s: interrupted after its VFs were made", p.PF.Name)
	}
	if err := mode(true); err != nil {
		return nil, err
	}
	if err := p.finish(b, vfs); err != nil {
		return nil, err
	}
	return vfs, settle(ctx, b.Host, p.Up)
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

// counted compares the VFs that are there and the PF's own count with what was asked for: a driver may make fewer and report
// success.
func (p *Plan) counted(h *iommu.Host, vfs []*iommu.Device) error {
	number, err := h.Int(attribute(p.PF.Address, "sriov_numvfs"))
	if err != nil {
		return err
	}
	if len(vfs) != p.Want || number != p.Want {
		return fmt.Errorf("%s: %d VFs were asked for, and its driver %s made %d without an error%s", p.PF.Name, p.Want, p.PF.Driver, number, silentCause(p.PF))
	}
	for i, vf := range vfs {
		if !forGuests(p.VFs[i]) {
			continue
		}
		// A driver that is loaded just now tries each VF, and has its link until the kernel tells it no (really_probe in drivers/base/dd.c).
		for try := 0; vf.Driver != "" && try < 50; try++ {
			time.Sleep(10 * time.Millisecond)
			if vf.Driver, err = iommu.ReadDriver(h, vf.Address); err != nil {
				return err
			}
		}
		if vf.Driver != "" {
			return fmt.Errorf("VF %s was to have no driver and is on %s", vf.Name, vf.Driver)
		}
	}
	return nil
}

// finish makes the writes after the count, and reads them back.
func (p *Plan) finish(b *vfio.Binder, vfs []*iommu.Device) error {
	if err := b.Write(p.PF.Address, p.After); err != nil {
		return err
	}
	for _, s := range p.After {
		got, err := b.Host.String(s.Path)
		if err != nil {
			return err
		}
		if got != s.Value {
			return fmt.Errorf("/%s: wrote %s and read back %s", s.Path, s.Value, got)
		}
	}
	for i, vf := range vfs {
		if forGuests(p.VFs[i]) {
			vf.DriverOverride = vfio.None
		}
	}
	return nil
}

// takeAll puts VFs onto a vfio driver.
func takeAll(ctx context.Context, b *vfio.Binder, vfs []*iommu.Device) error {
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
func sharedGroups(pf *iommu.Device, vfs []*iommu.Device) []string {
	first, notes := map[int]string{pf.Group: pf.Name}, []string(nil)
	for _, vf := range vfs {
		if with, shared := first[vf.Group]; shared && vf.Group >= 0 { // without an IOMMU there is none to share
			notes = append(notes, fmt.Sprintf("%s shares IOMMU group %d with %s: they can only be taken together", vf.Name, vf.Group, with))
		} else {
			first[vf.Group] = vf.Name
		}
	}
	return notes
}
