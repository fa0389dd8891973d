package sriov

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"viaduct/iommu"
	"viaduct/vfio"
)

// opCount is the kind of the record of a count that changes.
const opCount = "count"

// countRecord is what it takes to undo a plan, or to finish it.
type countRecord struct {
	Have      int        `json:"have"`
	Want      int        `json:"want"`
	VFs       []VFWish   `json:"vfs,omitempty"` // that are to be
	Recounts  bool       `json:"recounts"`      // VFs are removed or made
	Cleared   bool       `json:"cleared"`       // those that were there are gone: what is there now was made by this change
	Old       []iommu.VF `json:"old,omitempty"` // that were there
	Autoprobe string     `json:"autoprobe,omitempty"`
	Probe     bool       `json:"probe,omitempty"` // the host's drivers get them last
	Online    bool       `json:"online,omitempty"`
	Up        []Link     `json:"up,omitempty"`
	Raised    []MTU      `json:"raised,omitempty"`
	Offload   []Offload  `json:"offload,omitempty"`
	Eswitch   Eswitch    `json:"eswitch,omitzero"` // what it was
}

func (p *Plan) record() countRecord {
	return countRecord{
		Have: p.Have, Want: p.Want, VFs: p.VFs, Recounts: p.recounts(), Cleared: p.recounts() && p.Have == 0, Old: p.PF.SRIOV.VFs,
		Autoprobe: p.autoprobe, Probe: p.probeLate(), Online: p.nvme != "",
		Up: p.Up, Raised: p.Raise, Offload: p.Offload, Eswitch: p.was,
	}
}

// Recoverers finish or undo what this package's interrupted changes left; for [vfio.Binder].
var Recoverers = map[string]vfio.Recoverer{opCount: recoverCount, opSet: recoverSet}

// forget drops what is known of the VFs that were there: whatever has their addresses now is another VF.
func (r *countRecord) forget(b *vfio.Binder, pf *iommu.Device) error {
	return errors.Join(b.Forget(r.Old), forgetAsked(b, pf))
}

// undo removes what was made, and restores what the settings were. VFs that went first cannot be brought back. After an
// interruption somebody may use by now what is there: that is left alone.
func (r *countRecord) undo(b *vfio.Binder, pf iommu.Address, late bool) error {
	now, err := iommu.ReadDevice(b.Host, pf)
	if err != nil {
		return err
	}
	moved, err := r.moved(b.Host, pf)
	errs := []error{err}
	removable := now.SRIOV != nil && r.Recounts && r.Cleared && len(now.SRIOV.VFs) > 0
	if removable && late {
		vfs, err := vfDevices(b.Host, pf)
		users := ""
		if err == nil {
			users, err = used(b.Host, vfs)
		}
		if users != "" {
			err = fmt.Errorf("its VFs stay, as %s", users)
		}
		if err != nil {
			removable, moved = false, false
			errs = append(errs, err)
		}
	}
	if removable {
		if err := b.Write(pf, []vfio.Step{count(&now, 0)}); err != nil {
			return errors.Join(append(errs, err)...) // and the rest with the next command
		}
		errs = append(errs, b.Forget(now.SRIOV.VFs))
	}
	errs = append(errs, r.restore(b, pf))
	if b.Host.Live() {
		if moved {
			errs = append(errs, setEswitch("pci", pf.String(), r.Eswitch))
		}
		errs = append(errs, r.undoLinks(b.Host, &now, late))
	}
	return errors.Join(errs...)
}

// undoLinks puts the PF's own interfaces back, as far as they are still there.
func (r *countRecord) undoLinks(h *iommu.Host, pf *iommu.Device, late bool) error {
	if len(r.Up)+len(r.Raised)+len(r.Offload) == 0 {
		return nil
	}
	var errs []error
	if late {
		var err error
		if pf.Netdevs, err = iommu.Netdevs(h, pf.Address); err != nil {
			return err
		}
		if users, err := used(h, []*iommu.Device{pf}); err != nil || users != "" {
			return err
		}
	}
	for _, o := range r.Offload {
		errs = append(errs, unlessGone(setTCOffload(o.Name, !o.On)))
	}
	for _, m := range r.Raised {
		errs = append(errs, unlessGone(m.set(m.From)))
	}
	for _, l := range r.Up {
		errs = append(errs, unlessGone(l.down()))
	}
	return errors.Join(errs...)
}

// used names a user of devices, "" if there is none.
func used(h *iommu.Host, devices []*iommu.Device) (string, error) {
	holders, err := vfio.Holders(h, devices)
	if len(holders) > 0 {
		return holders[0].String(), nil
	}
	return "", err
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
			vf.Netdevs, err = iommu.Netdevs(h, v.Address)
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
	now, err := ReadEswitch(h, &iommu.Device{Name: pf.String()})
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

// restore puts autoprobe back.
func (r *countRecord) restore(b *vfio.Binder, pf iommu.Address) error {
	file := autoprobe(pf)
	if now, err := b.Host.String(file); r.Autoprobe == "" || err == nil && now == r.Autoprobe {
		return nil
	}
	return b.Write(pf, []vfio.Step{{Path: file, Value: r.Autoprobe}})
}

// recoverCount finishes a change whose VFs are all there, or gone where that was wanted, and undoes every other, and one that
// cannot be finished. What cannot be undone either is told once: a record that stays would keep the PF from all further changes.
func recoverCount(ctx context.Context, b *vfio.Binder, pf iommu.Address, data json.RawMessage) (string, error) {
	var r countRecord
	if err := json.Unmarshal(data, &r); err != nil {
		return "has a record that cannot be read", err
	}
	now, err := iommu.ReadDevice(b.Host, pf)
	if err != nil {
		return "cannot be read", err
	}
	moved, err := r.moved(b.Host, pf)
	if err != nil {
		return "cannot be read", err
	}
	if now.SRIOV == nil {
		return "has no VFs any more, and can have none", errors.Join(r.forget(b, &now), r.restore(b, pf))
	}
	if r.Recounts && len(now.SRIOV.VFs) == 0 {
		r.Cleared = true
	}
	if r.Cleared {
		if err := r.forget(b, &now); err != nil {
			return "is not done", err
		}
	}
	change := fmt.Sprintf("its change from %d to %d VFs had been interrupted", r.Have, r.Want)
	if r.Recounts && r.Cleared && len(now.SRIOV.VFs) == r.Want && (r.Eswitch == (Eswitch{}) || moved) {
		err := r.finish(ctx, b, pf)
		if _, stuck := errors.AsType[*vfio.StuckError](err); err == nil || stuck {
			return fmt.Sprintf("has %d VFs: %s", r.Want, change), err
		}
		change += ", and could not be finished: " + err.Error()
	}
	err = r.undo(b, pf, true)
	if _, stuck := errors.AsType[*vfio.StuckError](err); err != nil && !stuck {
		err = errors.Join(err, b.End(pf))
	}
	if lost := r.lost(b.Host, pf); lost != "" {
		return lost + ": " + change, err
	}
	return "is as it was: " + change, err
}

// finish makes new VFs fit for use: what was not done of it before an interruption.
func (r *countRecord) finish(ctx context.Context, b *vfio.Binder, pf iommu.Address) error {
	vfs, err := vfDevices(b.Host, pf)
	if err != nil {
		return err
	}
	if len(vfs) != len(r.VFs) {
		return fmt.Errorf("%s has %d VFs by now", pf, len(vfs))
	}
	for i, vf := range vfs {
		if forGuests(r.VFs[i]) && vf.Driver == "" && vf.DriverOverride == "" {
			if err := b.Write(pf, []vfio.Step{{Path: attribute(vf.Address, "driver_override"), Value: vfio.None}}); err != nil {
				return err
			}
			vf.DriverOverride = vfio.None
		}
	}
	if !r.Probe {
		if err := r.restore(b, pf); err != nil {
			return err
		}
	}
	if err := settle(ctx, b.Host, r.Up); err != nil {
		return err
	}
	return r.ready(ctx, b, pf, vfs)
}

// ready gives new VFs their settings, and then to the driver they are for.
func (r *countRecord) ready(ctx context.Context, b *vfio.Binder, pf iommu.Address, vfs []*iommu.Device) error {
	if len(vfs) == 0 {
		return nil
	}
	if err := configure(ctx, b, pf, vfs, r.VFs); err != nil {
		return err
	}
	if r.Online {
		if err := setOnline(b.Host, pf, r.Want); err != nil {
			return err
		}
	}
	var taken, home []*iommu.Device
	for i, vf := range vfs {
		switch r.VFs[i].Use {
		case UseVFIO:
			taken = append(taken, vf)
		case UseHome:
			home = append(home, vf)
		}
	}
	if err := takeAll(ctx, b, taken); err != nil || !r.Probe {
		return err
	}
	return r.probeAll(b, pf, home)
}

// probeAll lets the host's drivers have VFs, and puts autoprobe back, without which the kernel probes none.
func (r *countRecord) probeAll(b *vfio.Binder, pf iommu.Address, vfs []*iommu.Device) error {
	steps := []vfio.Step{{Path: autoprobe(pf), Value: "1"}}
	for _, vf := range vfs {
		if vf.Driver == "" {
			steps = append(steps, vfio.Step{Path: "sys/bus/pci/drivers_probe", Value: vf.Name})
		}
	}
	if err := b.Write(pf, steps); err != nil {
		return err
	}
	return r.restore(b, pf)
}
