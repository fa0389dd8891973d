package sriov

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"

	"viaduct/iommu"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// opCount is the kind of the record of a count that changes.
const opCount = "count"

// countRecord is what it takes to undo a plan, or to finish it.
type countRecord struct {
	Have      int        `json:"have"`
	Want      int        `json:"want"`
	VFs       []VFWish   `json:"vfs,omitempty"` // that are to be
	Recounts  bool       `json:"recounts"`      // VFs are removed or made
	Cleared   bool       `json:"cleared"`       // the old VFs are gone and forgotten: what is there now is new
	Old       []iommu.VF `json:"old,omitempty"` // that were there
	Autoprobe string     `json:"autoprobe,omitempty"`
	Probe     bool       `json:"probe,omitempty"` // the host's drivers get them last
	Online    bool       `json:"online,omitempty"`
	Up        []Link     `json:"up,omitempty"`
	Raised    []MTU      `json:"raised,omitempty"`
	Offload   []Offload  `json:"offload,omitempty"`
	Eswitch   Eswitch    `json:"eswitch,omitzero"` // what it was

	foreign bool // of this run: VFs that are there are not its own
	made    bool // of this run: they are
}

func (p *Plan) record() countRecord {
	return countRecord{
		Have: p.Have, Want: p.Want, VFs: p.VFs, Recounts: p.recounts(), Cleared: p.recounts() && p.Have == 0,
		Old:       p.PF.SRIOV.VFs,
		Autoprobe: p.autoprobe, Probe: p.probeLate(), Online: p.nvme != "",
		Up: p.Up, Raised: p.Raise, Offload: p.Offload, Eswitch: p.was,
	}
}

// forgetOld drops what is known of the VFs that were there: whatever has their addresses now is another VF.
func (s *Handle) forgetOld(r *countRecord, pf *iommu.Device) error {
	return errors.Join(s.Forget(r.Old), s.forgetRequested(pf))
}

// users finds who has taken to using devices since a change was interrupted: what they use is left alone.
type users func([]*iommu.Device) (string, error)

// usersOf names a user of devices, "" if there is none.
func usersOf(h *iommu.Host) users {
	return func(devices []*iommu.Device) (string, error) {
		holders, err := holder.Find(h, devices)
		if len(holders) > 0 {
			return holders[0].String(), nil
		}
		return "", err
	}
}

// revert removes what was made, and restores what the settings were. VFs that went first cannot be brought back. After
// an interruption somebody may use by now what is there, which used tells; right after the change it is nil.
func (s *Handle) revert(r *countRecord, pf iommu.Address, used users) error {
	now, err := iommu.ReadDevice(s.Host(), pf)
	if err != nil {
		return err
	}
	moved, err := r.moved(s.Host(), pf)
	errs := []error{err}

	removable := now.SRIOV != nil && r.Recounts && r.Cleared && len(now.SRIOV.VFs) > 0 && !r.foreign
	if removable && used != nil {
		if err := s.stillUnused(pf, used); err != nil {
			removable, moved = false, false
			errs = append(errs, err)
		}
	}
	if removable {
		if err := s.Write(pf, []bind.Step{count(&now, 0)}); err != nil {
			// And the rest with the next command.
			return errors.Join(append(errs, err)...)
		}
		errs = append(errs, s.Forget(now.SRIOV.VFs))
	}
	errs = append(errs, s.restoreAutoprobe(r, pf))
	if moved {
		errs = append(errs, setEswitch(s.Host(), "pci", pf.String(), r.Eswitch))
	}
	errs = append(errs, r.revertLinks(s.Host(), &now, used))
	return errors.Join(errs...)
}

// stillUnused says why a PF's VFs stay, nil if nobody uses them.
func (s *Handle) stillUnused(pf iommu.Address, used users) error {
	vfs, err := vfDevices(s.Host(), pf)
	if err != nil {
		return err
	}
	who, err := used(vfs)
	if who != "" {
		return fmt.Errorf("its VFs stay, because %s", who)
	}
	return err
}

// revertLinks puts the PF's own interfaces back, as far as they are still there.
func (r *countRecord) revertLinks(h *iommu.Host, pf *iommu.Device, used users) error {
	if len(r.Up)+len(r.Raised)+len(r.Offload) == 0 {
		return nil
	}
	if used != nil {
		if err := iommu.ReadNetdevs(h, pf); err != nil {
			return err
		}
		if who, err := used([]*iommu.Device{pf}); err != nil || who != "" {
			return err
		}
	}

	var errs []error
	for _, o := range r.Offload {
		errs = append(errs, unlessGone(setTCOffload(h, pf.Address, o.Name, !o.On)))
	}
	for _, m := range r.Raised {
		errs = append(errs, unlessGone(m.set(h, m.From)))
	}
	for _, l := range r.Up {
		errs = append(errs, unlessGone(l.down(h)))
	}
	return errors.Join(errs...)
}

// vfDevices are a PF's VFs as they are now, with their interfaces where a driver of the host makes some.
func vfDevices(h *iommu.Host, pf iommu.Address) ([]*iommu.Device, error) {
	now, err := iommu.ReadDevice(h, pf)
	if err != nil || now.SRIOV == nil {
		return nil, err
	}
	var out []*iommu.Device
	for _, v := range now.SRIOV.VFs {
		vf, err := iommu.ReadDevice(h, v.Address)
		if err == nil && vf.Blocks() {
			err = iommu.ReadNetdevs(h, &vf)
		}
		if err != nil {
			return nil, err
		}
		vf.PhysFn, vf.VFIndex = &pf, v.Index
		out = append(out, &vf)
	}
	return out, nil
}

// moved reports whether the e-switch is no longer what it was.
func (r *countRecord) moved(h *iommu.Host, pf iommu.Address) (bool, error) {
	if r.Eswitch == (Eswitch{}) {
		return false, nil
	}
	now, err := ReadEswitch(h, pf)
	if err != nil || now == nil {
		return false, err
	}
	back, _ := r.Eswitch.differs(now)
	return back != Eswitch{}, nil
}

// lost says which VFs an undone change cost.
func (r *countRecord) lost(h *iommu.Host, pf iommu.Address) string {
	now, err := iommu.ReadDevice(h, pf)
	if err != nil || now.SRIOV == nil || len(now.SRIOV.VFs) == r.Have {
		return ""
	}
	return fmt.Sprintf("%s had %d VFs before and has %d now", pf, r.Have, len(now.SRIOV.VFs))
}

// restoreAutoprobe puts autoprobe back.
func (s *Handle) restoreAutoprobe(r *countRecord, pf iommu.Address) error {
	file := autoprobe(pf)
	if now, err := s.Host().String(file); r.Autoprobe == "" || err == nil && now == r.Autoprobe {
		return nil
	}
	return s.Write(pf, []bind.Step{{Path: file, Value: r.Autoprobe}})
}

// recoverCount finishes a change whose VFs are all there, or gone where that was wanted, and undoes every other, and
// one that cannot be finished. What cannot be undone either is told once: a record that stays would keep the PF from
// all further changes.
func recoverCount(ctx context.Context, b *bind.Handle, pf iommu.Address, data json.RawMessage) (string, error) {
	s := wrap(b)
	var r countRecord
	if err := json.Unmarshal(data, &r); err != nil {
		return "has a record that cannot be read", err
	}
	now, err := iommu.ReadDevice(s.Host(), pf)
	if err != nil {
		return "cannot be read", err
	}
	moved, err := r.moved(s.Host(), pf)
	if err != nil {
		return "cannot be read", err
	}
	if now.SRIOV == nil {
		return "no longer has VFs, and cannot have any", errors.Join(s.forgetOld(&r, &now), s.restoreAutoprobe(&r, pf))
	}
	if err := s.cleared(&r, &now); err != nil {
		return "is not done", err
	}

	change := fmt.Sprintf("its change from %d to %d VFs was interrupted", r.Have, r.Want)
	if r.Recounts && r.Cleared && len(now.SRIOV.VFs) == r.Want && (r.Eswitch == (Eswitch{}) || moved) {
		err := s.finish(ctx, &r, pf)
		if err == nil || bind.IsStuck(err) {
			return fmt.Sprintf("has %d VFs: %s", r.Want, change), err
		}
		change += ", and could not be finished: " + err.Error()
	}
	err = s.revert(&r, pf, usersOf(s.Host()))
	if err != nil && !bind.IsStuck(err) {
		err = errors.Join(err, s.End(pf))
	}
	if lost := r.lost(s.Host(), pf); lost != "" {
		return lost + ": " + change, err
	}
	return "is as it was: " + change, err
}

// cleared does what the interrupted run may not have come to after it had removed the VFs that were there: it forgets
// them. New VFs are made only when that is done and written down, so where there are any, what is known by their
// addresses is theirs.
func (s *Handle) cleared(r *countRecord, pf *iommu.Device) error {
	if !r.Recounts || r.Cleared || len(pf.SRIOV.VFs) > 0 {
		return nil
	}
	if err := s.forgetOld(r, pf); err != nil {
		return err
	}
	r.Cleared = true
	return nil
}

// finish makes new VFs fit for use: what was not done of it before an interruption.
func (s *Handle) finish(ctx context.Context, r *countRecord, pf iommu.Address) error {
	vfs, err := vfDevices(s.Host(), pf)
	if err != nil {
		return err
	}
	if len(vfs) != len(r.VFs) {
		return fmt.Errorf("%s has %d VFs by now", pf, len(vfs))
	}
	for i, vf := range vfs {
		if forGuests(r.VFs[i]) && vf.Driver == "" && vf.DriverOverride == "" {
			step := bind.Step{Path: attribute(vf.Address, "driver_override"), Value: bind.None}
			if err := s.Write(pf, []bind.Step{step}); err != nil {
				return err
			}
			vf.DriverOverride = bind.None
		}
	}

	if !r.Probe {
		if err := s.restoreAutoprobe(r, pf); err != nil {
			return err
		}
	}

	if err := errors.Join(settleAll(ctx, s.Host(), r.Up)...); err != nil {
		return err
	}
	_, err = s.ready(ctx, r, pf, vfs)
	return err
}

// ready gives new VFs their settings, and then to the driver they are for.
func (s *Handle) ready(ctx context.Context, r *countRecord, pf iommu.Address,
	vfs []*iommu.Device) (notes []string, err error) {
	if len(vfs) == 0 {
		return nil, nil
	}
	if notes, err = s.setNew(ctx, pf, vfs, r.VFs); err != nil {
		return nil, err
	}
	if r.Online {
		if err := setOnline(s.Host(), pf, r.Want); err != nil {
			return nil, err
		}
	}

	taken, home := map[string][]*iommu.Device{}, []*iommu.Device(nil)
	for i, vf := range vfs {
		use := r.VFs[i].Use
		if driver := use.Driver(); driver != "" {
			taken[driver] = append(taken[driver], vf)
		}
		if use == UseHome {
			home = append(home, vf)
		}
	}
	if err := s.takeAll(ctx, taken); err != nil {
		return nil, err
	}
	if r.Probe {
		if err := s.probeAll(r, pf, home); err != nil {
			return nil, err
		}
	}
	more, err := s.atHome(home)
	return append(notes, more...), err
}

// probeAll lets the host's drivers have VFs, and puts autoprobe back, without which the kernel probes none. Each probe
// is a request of its own: one that takes long, or is stuck, keeps no other.
func (s *Handle) probeAll(r *countRecord, pf iommu.Address, vfs []*iommu.Device) error {
	if err := s.Write(pf, []bind.Step{{Path: autoprobe(pf), Value: "1"}}); err != nil {
		return err
	}
	errs := make([]error, len(vfs))
	var wg sync.WaitGroup
	for i, vf := range vfs {
		if vf.Driver == "" {
			wg.Go(func() { errs[i] = s.Write(pf, []bind.Step{{Path: "sys/bus/pci/drivers_probe", Value: vf.Name}}) })
		}
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return s.restoreAutoprobe(r, pf)
}

// atHome reads back which drivers VFs for the host have. One without a driver may get one as soon as its module is
// loaded, which is told; one on a VFIO driver is not the host's.
func (s *Handle) atHome(vfs []*iommu.Device) (notes []string, err error) {
	for _, vf := range vfs {
		now, err := iommu.ReadDevice(s.Host(), vf.Address)
		switch {
		case err != nil:
			return nil, err
		case now.VFIO:
			return nil, fmt.Errorf("VF %s is for the host, but the kernel bound it to %s%s", vf.Name, now.Driver,
				claimedBy(s.Host(), now.ID))
		case now.Driver == "":
			notes = append(notes,
				fmt.Sprintf("VF %s has no driver of the host yet: no loaded driver supports it", vf.Name))
		}
	}
	return notes, nil
}

// claimedBy says where vfio-pci.ids= claims a VF, "" if it does not.
func claimedBy(h *iommu.Host, id iommu.ID) string {
	if where := holder.ClaimedByID(h, id)[id]; where != "" {
		return ", because vfio-pci.ids= in " + where + " claims it"
	}
	return ""
}
