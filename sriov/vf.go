// Package sriov makes and removes virtual functions and sets what a PF decides for them.
package sriov

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"

	"viaduct/internal/journal"
	"viaduct/iommu"
	"viaduct/vfio"
)

// Use is what new VFs are for: the driver they get.
type Use string

// The uses of new VFs. UseNone and UseVFIO keep the host's own driver from ever seeing them.
const (
	UseNone Use = "none" // no driver until one is asked for: for guests
	UseVFIO Use = "vfio" // a vfio driver at once: for guests
	UseHome Use = "home" // the host's own driver
)

// Plan is what it takes to change a PF's number of VFs.
type Plan struct {
	PF     iommu.Device
	Have   int
	Want   int
	Use    Use
	Before []vfio.Step // up to the new count
	After  []vfio.Step // what the new VFs need, and the old settings restored
	Notes  []string    // what the user should know and nothing refuses

	emptied bool // the VFs there were are gone
}

// Steps is the plan in its order.
func (p *Plan) Steps() []vfio.Step { return slices.Concat(p.Before, p.After) }

func attribute(pf iommu.Address, name string) string {
	return path.Join("sys/bus/pci/devices", pf.String(), name)
}

// RangeError says that a PF cannot have so many VFs.
type RangeError struct {
	PF          iommu.Address
	Want, Total int
}

func (e *RangeError) Error() string {
	return fmt.Sprintf("%s can have 0 to %d VFs, not %d", e.PF, e.Total, e.Want)
}

// NotPFError says that a device has no VFs to make.
type NotPFError struct {
	Device iommu.Address
	VFOf   *iommu.Address // it is a VF itself
}

func (e *NotPFError) Error() string {
	if e.VFOf != nil {
		return fmt.Sprintf("%s is a VF of %s; VFs are made on the PF", e.Device, e.VFOf)
	}
	return fmt.Sprintf("%s is no PF: it has no SR-IOV capability", e.Device)
}

// PlanCount plans how a PF gets to have n VFs in all. From one number to another it goes through none, which ends all VFs;
// [Check] refuses that while one is in use. Nothing is planned when the number is right already.
func PlanCount(h *iommu.Host, pf *iommu.Device, n int, use Use) (*Plan, error) {
	if pf.SRIOV == nil {
		return nil, &NotPFError{pf.Address, pf.PhysFn}
	}
	if n < 0 || n > pf.SRIOV.Total {
		return nil, &RangeError{pf.Address, n, pf.SRIOV.Total}
	}
	p := &Plan{PF: *pf, Have: len(pf.SRIOV.VFs), Want: n, Use: use}
	if p.Have == n {
		return p, nil
	}
	if pf.Driver == "" {
		return nil, fmt.Errorf("%s has no driver, and VFs are made by the PF's driver", pf.Address)
	}
	numvfs := attribute(pf.Address, "sriov_numvfs")
	if p.Have > 0 {
		p.Before = append(p.Before, vfio.Step{Path: numvfs, Value: "0"})
	}
	if n == 0 {
		return p, nil
	}
	if use != UseHome {
		autoprobe, err := h.String(attribute(pf.Address, "sriov_drivers_autoprobe"))
		if err != nil {
			return nil, fmt.Errorf("VFs for guests need a kernel that can leave them without a driver: %w", err)
		}
		if autoprobe != "0" {
			file := attribute(pf.Address, "sriov_drivers_autoprobe")
			p.Before = append(p.Before, vfio.Step{Path: file, Value: "0"})
			p.After = append(p.After, vfio.Step{Path: file, Value: autoprobe})
		}
	}
	p.Before = append(p.Before, vfio.Step{Path: numvfs, Value: strconv.Itoa(n)})
	if use != UseHome { // before autoprobe is restored: from then on a module that is loaded takes what has no override
		var overrides []vfio.Step
		for i := range n {
			overrides = append(overrides, vfio.Step{Path: attribute(pf.Address, fmt.Sprintf("virtfn%d/driver_override", i)), Value: vfio.None})
		}
		p.After = append(overrides, p.After...)
	}
	if use == UseVFIO {
		p.Notes = append(p.Notes, "then each VF is taken as by viaduct bind")
	}
	if len(pf.Netdevs) > 0 {
		p.Notes = append(p.Notes, fmt.Sprintf("the link of %s may flap", pf.Netdevs[0]))
	}
	return p, nil
}

// Check refuses a plan that would end VFs which somebody uses: open in a process, under a file system, or with the host's
// default route. The PF's own users are no reason to refuse: a PF that carries the host's traffic is the normal case.
func Check(h *iommu.Host, t *iommu.Topology, p *Plan) error {
	if p.Use == UseVFIO && p.Want > 0 && p.Have != p.Want && len(t.Groups) == 0 {
		return &vfio.RefusedError{What: "make VFs on a vfio driver", Reasons: []string{"no IOMMU is active on this host"}}
	}
	if p.Have == 0 || p.Have == p.Want {
		return nil
	}
	var vfs []*iommu.Device
	for _, v := range p.PF.SRIOV.VFs {
		if vf, err := t.Find(v.Address); err == nil {
			vfs = append(vfs, vf)
		}
	}
	holders, err := vfio.Holders(h, vfs)
	if err != nil || len(holders) == 0 {
		return err
	}
	refused := &vfio.RefusedError{What: fmt.Sprintf("remove the %d VFs of %s", p.Have, p.PF.Name), Cure: "end their users first"}
	for _, holder := range holders {
		refused.Reasons = append(refused.Reasons, holder.String())
	}
	return refused
}

// Apply carries out a plan that Check let pass, and reads back what came of it. On failure the VFs it made are removed
// and the old settings restored; VFs that had to go first stay gone, which the error says.
func Apply(ctx context.Context, h *iommu.Host, j *journal.Journal, p *Plan) error {
	if p.Have == p.Want {
		return nil
	}
	b := &vfio.Binder{Host: h, Journal: j}
	defer b.Close()
	err := p.apply(ctx, h)
	if err == nil {
		err = b.Forget(p.PF.SRIOV.VFs) // whatever has their addresses now is another VF
	}
	if err == nil && p.Use == UseVFIO && p.Want > 0 {
		err = takeAll(ctx, b, p.PF.Address)
	}
	if err == nil {
		return nil
	}
	return errors.Join(err, p.undo(h, b))
}

func (p *Plan) apply(ctx context.Context, h *iommu.Host) error {
	for _, s := range p.Before {
		if err := s.Do(ctx, h); err != nil && path.Base(s.Path) == "sriov_numvfs" {
			return explain(err, p)
		} else if err != nil {
			return err
		}
		p.emptied = p.emptied || (s.Value == "0" && path.Base(s.Path) == "sriov_numvfs")
	}
	if err := counted(h, p.PF.Address, p.Want); err != nil {
		return err
	}
	for _, s := range p.After {
		if err := s.Do(ctx, h); err != nil {
			return err
		}
	}
	return p.verify(h)
}

// counted compares the links and the PF's own count with what was asked for: a driver may make fewer and report success.
func counted(h *iommu.Host, pf iommu.Address, want int) error {
	now, err := iommu.ReadDevice(h, pf)
	if err != nil {
		return err
	}
	number, err := h.Int(attribute(pf, "sriov_numvfs"))
	if err != nil {
		return err
	}
	if now.SRIOV == nil || len(now.SRIOV.VFs) != want || number != want {
		return fmt.Errorf("%s: %d VFs were asked for, and its driver made %d", pf, want, number)
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
		vf, err := iommu.ReadDevice(h, v.Address)
		if err != nil {
			return err
		}
		if vf.Driver != "" {
			return fmt.Errorf("VF %s was to have no driver and is on %s", vf.Name, vf.Driver)
		}
	}
	return nil
}

// takeAll puts all VFs of a PF onto a vfio driver.
func takeAll(ctx context.Context, b *vfio.Binder, pf iommu.Address) error {
	now, err := iommu.ReadDevice(b.Host, pf)
	if err != nil {
		return err
	}
	var units [][]*iommu.Device
	for _, v := range now.SRIOV.VFs {
		vf, err := iommu.ReadDevice(b.Host, v.Address)
		if err != nil {
			return err
		}
		vf.PhysFn, vf.VFIndex = &pf, v.Index
		units = append(units, []*iommu.Device{&vf})
	}
	var errs []error
	for _, r := range b.Take(ctx, units, vfio.Auto) {
		errs = append(errs, r.Err)
	}
	return errors.Join(errs...)
}

// undo removes what was made and restores autoprobe.
func (p *Plan) undo(h *iommu.Host, b *vfio.Binder) error {
	var errs []error
	now, err := iommu.ReadDevice(h, p.PF.Address)
	if err != nil {
		return err
	}
	if p.Want > 0 && len(now.SRIOV.VFs) > 0 && (p.Have == 0 || p.emptied) {
		errs = append(errs, h.Write(attribute(p.PF.Address, "sriov_numvfs"), "0"), b.Forget(now.SRIOV.VFs))
	}
	for _, s := range p.After {
		if path.Base(s.Path) != "sriov_drivers_autoprobe" {
			continue
		}
		errs = append(errs, h.Write(s.Path, s.Value))
	}
	if now, err = iommu.ReadDevice(h, p.PF.Address); err == nil && len(now.SRIOV.VFs) != p.Have {
		err = fmt.Errorf("%s had %d VFs before and has %d now", p.PF.Address, p.Have, len(now.SRIOV.VFs))
	}
	return errors.Join(append(errs, err)...)
}

// explain adds the likely cure to the errnos of a write to sriov_numvfs (drivers/pci/iov.c, sriov_numvfs_store).
func explain(err error, p *Plan) error {
	cures := map[unix.Errno]string{
		unix.ENOMEM: "there is no room for the VFs' memory ranges or bus numbers: turn on SR-IOV and \"Above 4G decoding\" in the firmware, or boot with pci=realloc",
		unix.ENOENT: "driver " + p.PF.Driver + " cannot make VFs",
		unix.EBUSY:  "something else made VFs meanwhile: see viaduct vf list " + p.PF.Name,
	}
	for errno, cure := range cures {
		if errors.Is(err, errno) {
			return fmt.Errorf("%w (%s)", err, cure)
		}
	}
	return err
}
