package sriov

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"viaduct/iommu"
	"viaduct/vfio"
)

// Wish is what a PF's VFs are to be.
type Wish struct {
	VFs      int // in all, afterwards
	Use      Use
	Settings Settings // of each VF
	Eswitch  Eswitch  // what is not ""
	Offload  string   // of the e-switch's rules to the NIC (hw-tc-offload): on, off, or "" for as it is
	MTU      int      // that VFs are to be able to have; 0 leaves the PF's, which is never lowered
}

// Plan is what it takes to change a PF's number of VFs, in the order of its fields.
type Plan struct {
	PF      *iommu.Device
	Have    int
	Want    int
	Use     Use
	Victims []*iommu.Device // the VFs that go
	Up      []Link          // the PF's own interfaces that are down, and are brought up
	Raise   []MTU           // those whose MTU is too low
	Offload []Offload       // those whose hw-tc-offload is to be another
	Clear   []vfio.Step     // no VFs
	Before  []vfio.Step     // up to the new count
	After   []vfio.Step     // what the new VFs need, and the old settings restored
	Set     []SetPlan       // of each VF
	Notes   []string        // what the user should know and nothing refuses

	Eswitch   Eswitch // what is set of it, before the new count or after
	was       Eswitch // what that undoes
	autoprobe string  // what it was, if it is changed
	settings  Settings
	nvme      string // the controller that shares
	shares    []action
}

// Changes reports whether there is anything to do.
func (p *Plan) Changes() bool {
	return p.Have != p.Want || p.Eswitch != Eswitch{} || len(p.Raise) > 0 || len(p.Offload) > 0
}

// recounts reports whether VFs are made or removed.
func (p *Plan) recounts() bool { return p.Have != p.Want || len(p.Clear) > 0 }

// probeLate reports whether the host's drivers are to have the VFs only when these are ready for one.
func (p *Plan) probeLate() bool {
	return p.Use == UseHome && (p.modeLate() || p.nvme != "" || len(p.settings) > 0)
}

// modeLate reports whether the e-switch is set when the VFs are there.
func (p *Plan) modeLate() bool {
	return p.Eswitch.Mode == switchdev && !slices.Contains(modeFirst, p.PF.Driver)
}

// Steps is the plan in its order, each as a shell command.
func (p *Plan) Steps() []string {
	var out []string
	add := func(steps []vfio.Step) {
		for _, s := range steps {
			out = append(out, s.String())
		}
	}
	for _, l := range p.Up {
		out = append(out, l.commands()...)
	}
	for _, m := range p.Raise {
		out = append(out, fmt.Sprintf("ip link set dev %s mtu %d", m.Name, m.To))
	}
	add(p.Clear)
	for _, o := range p.Offload {
		out = append(out, o.command())
	}
	mode := func(late bool) {
		if p.Eswitch != (Eswitch{}) && p.modeLate() == late {
			out = append(out, p.Eswitch.command(p.PF.Name))
		}
	}
	mode(false)
	for _, a := range p.shares {
		out = append(out, a.command(p.nvme))
	}
	add(p.Before)
	mode(true)
	add(p.After)
	for _, s := range p.Set {
		out = append(out, s.Commands()...)
	}
	return out
}

func attribute(pf iommu.Address, name string) string {
	return path.Join("sys/bus/pci/devices", pf.String(), name)
}

// PlanCount plans how a PF gets to have its VFs. From one number to another, and to another mode of the e-switch, it goes
// through none, which ends all VFs: see [Check]. Nothing is planned of what is right already. A *RangeError, *NotPFError or
// *ForecastError says that it cannot be.
func PlanCount(h *iommu.Host, t *iommu.Topology, pf *iommu.Device, wish Wish) (*Plan, error) {
	n, use := wish.VFs, wish.Use
	if pf.SRIOV == nil {
		return nil, notPF(h, pf)
	}
	if n < 0 || n > pf.SRIOV.Total {
		return nil, &RangeError{pf.Address, n, pf.SRIOV.Total, firmwareHint(h, pf)}
	}
	p := &Plan{PF: pf, Have: len(pf.SRIOV.VFs), Want: n, Use: use, settings: wish.Settings}
	var err error
	if wish.Eswitch != (Eswitch{}) {
		now, err := ReadEswitch(h, pf)
		if err != nil {
			return nil, err
		}
		if now == nil {
			return nil, fmt.Errorf("%s (driver %q) has no e-switch that devlink knows of", pf.Name, pf.Driver)
		}
		p.Eswitch, p.was = wish.Eswitch.differs(now)
	}
	if p.Raise, err = mtusBelow(h, pf, wish.MTU); err != nil {
		return nil, err
	}
	if p.Offload, err = offloadsBut(h, pf, wish.Offload); err != nil {
		return nil, err
	}
	if p.Have == n && p.Eswitch.Mode == "" {
		if n > 0 && len(wish.Settings) > 0 {
			p.Notes = append(p.Notes, "the VFs are there already, and their settings are left as they are (vf set changes them)")
		}
		return p, nil
	}
	if pf.Driver == "" {
		return nil, fmt.Errorf("%s has no driver, and VFs are made by the PF's driver", pf.Address)
	}
	for _, v := range pf.SRIOV.VFs {
		if vf, err := t.Find(v.Address); err == nil {
			p.Victims = append(p.Victims, vf)
		}
	}
	if len(p.Victims) > 0 {
		p.Notes = append(p.Notes, "these VFs go: "+describe(p.Victims))
		p.Clear = append(p.Clear, count(pf, 0))
	}
	if n == 0 {
		return p, nil
	}
	if err := forecast(h, pf, n); err != nil {
		return nil, err
	}
	if p.Up, err = linksDown(h, pf); err != nil {
		return nil, err
	}
	if p.nvme, p.shares, err = planShares(h, pf, n); err != nil {
		return nil, err
	}
	if use != UseHome || p.probeLate() {
		file := attribute(pf.Address, "sriov_drivers_autoprobe")
		if p.autoprobe, err = h.String(file); err != nil {
			return nil, fmt.Errorf("VFs for guests need a kernel that can leave them without a driver: %w", err)
		}
		if p.autoprobe != "0" {
			p.Before = append(p.Before, vfio.Step{Path: file, Value: "0"})
			p.After = append(p.After, vfio.Step{Path: file, Value: p.autoprobe})
		}
	}
	p.Before = append(p.Before, count(pf, n))
	if use != UseHome { // before autoprobe is restored: from then on a module that is loaded takes what has no override
		var overrides []vfio.Step
		for i := range n {
			overrides = append(overrides, vfio.Step{Path: attribute(pf.Address, fmt.Sprintf("virtfn%d/driver_override", i)), Value: vfio.None})
		}
		p.After = append(overrides, p.After...)
	}
	if len(p.settings) > 0 {
		if p.Set, err = planNew(h, pf, n, p.settings); err != nil {
			return nil, err
		}
	}
	if p.nvme != "" {
		p.Notes = append(p.Notes, "then each VF is set online")
	}
	if p.probeLate() {
		p.Notes = append(p.Notes, "then each VF is probed")
	}
	if use == UseVFIO {
		p.Notes = append(p.Notes, "then each VF is taken as by viaduct bind")
	}
	if len(pf.Netdevs) > 0 {
		p.Notes = append(p.Notes, fmt.Sprintf("the link of %s may flap", pf.Netdevs[0]))
	}
	return p, nil
}

func count(pf *iommu.Device, n int) vfio.Step {
	return vfio.Step{Path: attribute(pf.Address, "sriov_numvfs"), Value: strconv.Itoa(n)}
}

// describe names VFs with what they are to somebody: their driver and interface.
func describe(vfs []*iommu.Device) string {
	var out []string
	for _, d := range vfs {
		what := []string{fmt.Sprintf("vf%d", d.VFIndex)}
		if d.Driver != "" {
			what = append(what, d.Driver)
		}
		out = append(out, d.Name+" ("+strings.Join(append(what, d.Netdevs...), ", ")+")")
	}
	return strings.Join(out, ", ")
}

// Check refuses a plan that would end VFs which somebody uses, as [vfio.Holders] tells; force overrides kinds of users. The
// PF's own users are no reason to refuse: a PF that carries the host's traffic is the normal case.
func Check(h *iommu.Host, t *iommu.Topology, p *Plan, force []vfio.Kind) error {
	if p.Use == UseVFIO && p.Want > 0 && p.recounts() && len(t.Groups) == 0 {
		return &vfio.RefusedError{What: "make VFs on a vfio driver", Reasons: []string{"no IOMMU is active on this host"}}
	}
	users := p.Victims
	if p.Eswitch.Mode != "" { // which makes the PF's own interface anew
		users = append([]*iommu.Device{p.PF}, users...)
	}
	if len(users) == 0 {
		return nil
	}
	holders, err := vfio.Holders(h, users)
	if err != nil {
		return err
	}
	if p.Eswitch.Mode != "" {
		return vfio.Refuse("change the e-switch of "+p.PF.Name, holders, force, "end the users of the PF and of its VFs first")
	}
	return vfio.Refuse(fmt.Sprintf("remove the %d VFs of %s", p.Have, p.PF.Name), holders, force, "end their users first")
}

// opCount is the kind of the record of a count that changes.
const opCount = "count"

type countRecord struct {
	Have      int       `json:"have"`
	Want      int       `json:"want"`
	Use       Use       `json:"use"`
	Autoprobe string    `json:"autoprobe,omitempty"`
	Up        []Link    `json:"up,omitempty"`
	Raised    []MTU     `json:"raised,omitempty"`
	Offload   []Offload `json:"offload,omitempty"`
	Eswitch   Eswitch   `json:"eswitch,omitzero"` // what it was
	Settings  Settings  `json:"settings,omitempty"`
}

// Recoverers finish or undo what this package's interrupted changes left; for [vfio.Binder].
var Recoverers = map[string]vfio.Recoverer{opCount: recoverCount, opSet: recoverSet}

// Apply carries out a plan that Check let pass, for a PF and VFs that the caller has locked, and reads back what came of it. On
// failure the VFs it made are removed and the old settings restored; VFs that had to go first stay gone, which the error
// says. It returns what the user should know of the new VFs.
func Apply(ctx context.Context, b *vfio.Binder, p *Plan) (notes []string, err error) {
	if !p.Changes() {
		return nil, nil
	}
	r := countRecord{p.Have, p.Want, p.Use, p.autoprobe, p.Up, p.Raise, p.Offload, p.was, p.settings}
	if err := b.Begin(opCount, p.PF, p.Victims, r); err != nil {
		return nil, err
	}
	err = p.apply(ctx, b)
	if err == nil && p.recounts() {
		err = p.finish(ctx, b)
	}
	if _, stuck := errors.AsType[*vfio.StuckError](err); stuck {
		return nil, err
	}
	if err != nil {
		err = errors.Join(err, r.undo(b, p.PF.Address))
		if lost := r.lost(b.Host, p.PF.Address); lost != "" {
			err = errors.Join(err, errors.New(lost))
		}
	} else {
		notes, err = sharedGroups(b.Host, p.PF.Address)
	}
	return notes, errors.Join(err, b.End(p.PF.Address))
}

func (p *Plan) apply(ctx context.Context, b *vfio.Binder) error {
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
	if err := mode(false); err != nil {
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

// finish makes new VFs fit for use, and forgets the old ones: whatever has their addresses now is another VF.
func (p *Plan) finish(ctx context.Context, b *vfio.Binder) error {
	if err := errors.Join(b.Forget(p.PF.SRIOV.VFs), forgetAsked(b, p.PF)); err != nil || p.Want == 0 {
		return err
	}
	if err := configure(ctx, b, p.PF.Address, p.settings); err != nil {
		return err
	}
	if err := setOnline(b.Host, p.PF, p.Want); err != nil {
		return err
	}
	switch {
	case p.Use == UseVFIO:
		return takeAll(ctx, b, p.PF.Address)
	case p.probeLate():
		return probeAll(b, p.PF.Address)
	}
	return nil
}

func settle(ctx context.Context, h *iommu.Host, up []Link) error {
	if !h.Live() {
		return nil
	}
	var errs []error
	for _, l := range up {
		errs = append(errs, l.settle(ctx))
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

// probeAll lets the host's drivers have all VFs of a PF.
func probeAll(b *vfio.Binder, pf iommu.Address) error {
	now, err := iommu.ReadDevice(b.Host, pf)
	if err != nil {
		return err
	}
	var steps []vfio.Step
	for _, v := range now.SRIOV.VFs {
		steps = append(steps, vfio.Step{Path: "sys/bus/pci/drivers_probe", Value: v.Address.String()})
	}
	return b.Write(pf, steps)
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

// undo removes what was made, and restores what the settings were. VFs that went first cannot be brought back.
func (r *countRecord) undo(b *vfio.Binder, pf iommu.Address) error {
	now, err := iommu.ReadDevice(b.Host, pf)
	if err != nil {
		return err
	}
	moved, err := r.moved(b.Host, pf)
	errs := []error{err}
	if have := len(now.SRIOV.VFs); have > 0 && (have != r.Have || moved) {
		errs = append(errs, b.Write(pf, []vfio.Step{count(&now, 0)}), b.Forget(now.SRIOV.VFs))
	}
	errs = append(errs, r.restore(b, pf))
	if b.Host.Live() {
		if moved && errors.Join(errs...) == nil {
			errs = append(errs, setEswitch("pci", pf.String(), r.Eswitch))
		}
		for _, o := range r.Offload {
			errs = append(errs, setTCOffload(o.Name, !o.On))
		}
		for _, m := range r.Raised {
			errs = append(errs, m.set(m.From))
		}
		for _, l := range r.Up {
			errs = append(errs, l.down())
		}
	}
	return errors.Join(errs...)
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
	file := attribute(pf, "sriov_drivers_autoprobe")
	if now, err := b.Host.String(file); r.Autoprobe == "" || err == nil && now == r.Autoprobe {
		return nil
	}
	return b.Write(pf, []vfio.Step{{Path: file, Value: r.Autoprobe}})
}

// recoverCount finishes a change whose VFs are all there, or gone where that was wanted, and undoes every other.
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
	if now.SRIOV == nil || len(now.SRIOV.VFs) != r.Want || r.Eswitch != (Eswitch{}) && !moved {
		what, err := fmt.Sprintf("is as it was: its change from %d to %d VFs had been interrupted", r.Have, r.Want), r.undo(b, pf)
		if lost := r.lost(b.Host, pf); lost != "" {
			what = fmt.Sprintf("has no VFs: its change from %d to %d had been interrupted", r.Have, r.Want)
		}
		return what, err
	}
	if r.Use != UseHome {
		for _, v := range now.SRIOV.VFs {
			vf, err := iommu.ReadDevice(b.Host, v.Address)
			if err != nil {
				return "cannot be read", err
			}
			if vf.Driver == "" && vf.DriverOverride == "" {
				file := attribute(v.Address, "driver_override")
				if err := b.Write(pf, []vfio.Step{{Path: file, Value: vfio.None}}); err != nil {
					return "is not done", err
				}
			}
		}
	}
	return fmt.Sprintf("has %d VFs: its change from %d had been interrupted", r.Want, r.Have),
		errors.Join(r.restore(b, pf), settle(ctx, b.Host, r.Up), configure(ctx, b, pf, r.Settings), setOnline(b.Host, &now, r.Want))
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
