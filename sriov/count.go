package sriov

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/internal/host"
	"viaduct/iommu"
	"viaduct/vfio/bind"
)

// ErrUnchecked is matched by errors of a plan that [Handle.CheckCount] did not let pass, or not when all that it
// changes was locked.
const ErrUnchecked = host.Error("check the plan first, when the PF and the VFs that are removed are locked")

// ErrChanged is matched by errors of a plan whose PF has other VFs by now.
const ErrChanged = host.Error("its VFs have changed since that was planned")

// Apply carries out a plan that [Handle.CheckCount] let pass, once, and reads back what came of it. On failure the VFs
// it made are removed and the old settings restored; VFs that had to go first stay gone, which the error says, and VFs
// that something else made meanwhile stay. It returns what the user should know of the new VFs. An error of a plan that
// is not carried out is an [ErrUnchecked], an [ErrChanged] or a [bind.ErrRan].
func (s *Handle) Apply(ctx context.Context, p *Plan) (notes []string, err error) {
	if p, err = s.approved(p); err != nil || !p.Changes() {
		return nil, err
	}
	r := p.record()
	r.foreign = true
	if err := s.Begin(opCount, p.PF, p.Victims, r); err != nil {
		return nil, err
	}
	event := bind.Event{
		Device: p.PF.Name, Label: bind.Label(p.PF), Subject: bind.VFs, Begins: true,
		From: strconv.Itoa(p.Have), To: strconv.Itoa(p.Want),
	}
	s.Tell(event)
	defer func() {
		event.Begins, event.Err = false, err
		s.Tell(event)
	}()

	vfs, err := s.makeVFs(ctx, p, &r)
	if err == nil {
		made := event
		made.Begins, made.Part = false, true
		s.Tell(made)
		notes, err = s.ready(ctx, &r, p.PF.Address, vfs)
	}
	if bind.IsStuck(err) {
		return nil, err
	}
	if err == nil {
		return append(notes, sharedGroups(p.PF, vfs)...), s.End(p.PF.Address)
	}

	// Right after they were made, the new VFs are nobody's.
	var used users
	if !r.made {
		used = usersOf(s.Host())
	}
	undone := s.revert(&r, p.PF.Address, used)
	if lost := r.lost(s.Host(), p.PF.Address); lost != "" {
		err = errors.Join(err, errors.New(lost))
	}
	if undone != nil {
		// The record stays, for the next command to try again.
		return nil, errors.Join(err, undone)
	}
	return nil, errors.Join(err, s.End(p.PF.Address))
}

// approved is the plan that CheckCount let pass, if it is still one for the PF as it is.
func (s *Handle) approved(p *Plan) (*Plan, error) {
	if err := s.MayChange(); err != nil {
		return nil, err
	}
	if p == nil || p.by != s || p.checked == nil {
		return nil, fmt.Errorf("sriov: %w", ErrUnchecked)
	}
	a := p.checked
	if err := s.locked(a.plan); err != nil {
		return nil, err
	}
	if a.ran.Swap(true) {
		return nil, fmt.Errorf("sriov: the plan for %s: %w", a.plan.PF.Name, bind.ErrRan)
	}

	now, err := iommu.ReadDevice(s.Host(), a.plan.PF.Address)
	if err != nil {
		return nil, err
	}
	other := func(vf iommu.VF) bool {
		its := func(d *iommu.Device) bool { return d.Address == vf.Address }
		return len(a.plan.Clear) > 0 && !slices.ContainsFunc(a.plan.Victims, its)
	}
	if now.SRIOV == nil || len(now.SRIOV.VFs) != a.plan.Have || slices.ContainsFunc(now.SRIOV.VFs, other) {
		return nil, fmt.Errorf("%s: %w", now.Name, ErrChanged)
	}
	return a.plan, nil
}

// makeVFs makes the plan's changes up to the new VFs, which it returns. They have no driver, but where the kernel gave
// them one.
func (s *Handle) makeVFs(ctx context.Context, p *Plan, r *countRecord) ([]*iommu.Device, error) {
	if err := s.preparePF(p); err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, fmt.Errorf("%s: interrupted before its VFs were made", p.PF.Name)
	}
	if err := s.clear(p, r); err != nil {
		return nil, err
	}
	for _, o := range p.Offload {
		if err := setTCOffload(s.Host(), p.PF.Address, o.Name, o.On); err != nil {
			return nil, err
		}
	}
	if err := s.setMode(p, early); err != nil {
		return nil, err
	}
	if !r.Recounts {
		return nil, errors.Join(settleAll(ctx, s.Host(), p.Up)...)
	}

	if err := doShares(s.Host(), p.PF, p.shares); err != nil {
		return nil, err
	}
	if err := s.recount(p, r); err != nil {
		return nil, err
	}
	vfs, err := vfDevices(s.Host(), p.PF.Address)
	if err != nil {
		return nil, err
	}
	if err := p.counted(s.Host(), vfs); err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, fmt.Errorf("%s: interrupted after its VFs were made", p.PF.Name)
	}
	if err := s.setMode(p, late); err != nil {
		return nil, err
	}
	if err := s.overrideVFs(p, vfs); err != nil {
		return nil, err
	}
	return vfs, errors.Join(settleAll(ctx, s.Host(), p.Up)...)
}

// recount makes the writes up to the new count. What is there when they fail may be something else's, which is certain
// where the kernel says that there are VFs already, and as long as none were asked for.
func (s *Handle) recount(p *Plan, r *countRecord) error {
	last := max(len(p.Before)-1, 0)
	if err := s.Write(p.PF.Address, p.Before[:last]); err != nil {
		return explain(s.Host(), err, p)
	}
	r.foreign = false
	if err := s.Write(p.PF.Address, p.Before[last:]); err != nil {
		r.foreign = errors.Is(err, unix.EBUSY)
		return explain(s.Host(), err, p)
	}
	r.made = true
	return nil
}

// preparePF brings the PF's interfaces up, and their MTU.
func (s *Handle) preparePF(p *Plan) error {
	for _, l := range p.Up {
		if err := l.up(s.Host()); err != nil {
			return err
		}
	}
	for _, m := range p.Raise {
		if err := m.set(s.Host(), m.To); err != nil {
			return err
		}
	}
	return nil
}

// clear removes the VFs that are there, and forgets what was known of them: whatever has their addresses from now on is
// another VF. Only then it is written down that they are gone, so that this is done once.
func (s *Handle) clear(p *Plan, r *countRecord) error {
	if len(p.Clear) == 0 {
		return nil
	}
	if err := s.Write(p.PF.Address, p.Clear); err != nil {
		return explain(s.Host(), err, p)
	}
	if err := s.forgetOld(r, p.PF); err != nil {
		return err
	}
	r.Cleared = true
	return s.Begin(opCount, p.PF, nil, *r)
}

// moment is when the e-switch is set: before the VFs are made, or after.
type moment bool

const (
	early moment = false
	late  moment = true
)

// setMode sets the e-switch if this is the moment for it. With a new mode an interface may be another, whose
// hw-tc-offload is as the driver begins: it is set again.
func (s *Handle) setMode(p *Plan, now moment) error {
	if p.Eswitch == (Eswitch{}) || moment(p.modeLate()) != now {
		return nil
	}
	if err := setEswitch(s.Host(), "pci", p.PF.Name, p.Eswitch); err != nil || p.offload == "" {
		return err
	}
	d, _, err := portOf(s.Host(), p.PF.Address)
	if err != nil {
		return err
	}
	offloads, err := offloadsBut(s.Host(), d, p.offload)
	if err != nil {
		return err
	}
	for _, o := range offloads {
		if err := setTCOffload(s.Host(), p.PF.Address, o.Name, o.On); err != nil {
			return err
		}
	}
	return nil
}

// counted compares the VFs that are there and the PF's own count with what was asked for: a driver may make fewer and
// report success.
func (p *Plan) counted(h *iommu.Host, vfs []*iommu.Device) error {
	number, err := h.Int(attribute(p.PF.Address, "sriov_numvfs"))
	if err != nil {
		return err
	}
	if len(vfs) != p.Want || number != p.Want {
		return fmt.Errorf("%s: its driver %s made %d VFs instead of %d, without an error%s",
			p.PF.Name, p.PF.Driver, number, p.Want, silentCause(p.PF))
	}

	for i, vf := range vfs {
		if !forGuests(p.VFs[i]) {
			continue
		}
		if err := awaitNoDriver(h, vf); err != nil {
			return err
		}
		// One that a VFIO driver has never met the host's own.
		if vf.Driver != "" && !vf.VFIO {
			return fmt.Errorf("VF %s is on %s, and must have no driver", vf.Name, vf.Driver)
		}
	}
	return nil
}

// awaitNoDriver waits for a moment while a VF has a driver. A driver that is loaded just now tries each VF, and has its
// link until the kernel tells it no (really_probe in drivers/base/dd.c), of which there is no event.
func awaitNoDriver(h *iommu.Host, vf *iommu.Device) error {
	for try := 0; vf.Driver != "" && !vf.VFIO && try < 50; try++ {
		time.Sleep(10 * time.Millisecond)
		now, err := iommu.ReadDevice(h, vf.Address)
		if err != nil {
			return err
		}
		vf.Driver, vf.VFIO = now.Driver, now.VFIO
	}
	return nil
}

// overrideVFs makes the writes after the count, and reads them back.
func (s *Handle) overrideVFs(p *Plan, vfs []*iommu.Device) error {
	if err := s.Write(p.PF.Address, p.After); err != nil {
		return err
	}
	for _, step := range p.After {
		got, err := s.Host().String(step.Path)
		if err != nil {
			return err
		}
		if got != step.Value {
			return fmt.Errorf("/%s: wrote %s and read back %s", step.Path, step.Value, got)
		}
	}
	for i, vf := range vfs {
		if forGuests(p.VFs[i]) && !p.PF.VFIO {
			vf.DriverOverride = bind.None
		}
	}
	return nil
}

// takeAll puts VFs, which were just made, onto VFIO drivers.
func (s *Handle) takeAll(ctx context.Context, vfs map[string][]*iommu.Device) error {
	var errs []error
	for driver, some := range vfs {
		for _, r := range s.DoUnasked(ctx, bind.Singly(some), bind.Take(driver)) {
			errs = append(errs, r.Err)
		}
	}
	return errors.Join(errs...)
}

// sharedGroups warns of VFs that cannot be given to a guest by themselves. Without an IOMMU there are no groups to
// share.
func sharedGroups(pf *iommu.Device, vfs []*iommu.Device) []string {
	var notes []string
	first := map[int]string{}
	if pf.Group != nil {
		first[*pf.Group] = pf.Name
	}
	for _, vf := range vfs {
		if vf.Group == nil {
			continue
		}
		if with, shared := first[*vf.Group]; shared {
			notes = append(
				notes,
				fmt.Sprintf("%s shares IOMMU group %d with %s: they can be taken only together", vf.Name, *vf.Group,
					with),
			)
		} else {
			first[*vf.Group] = vf.Name
		}
	}
	return notes
}
