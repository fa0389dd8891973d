package sriov

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"viaduct/internal/host"
	"viaduct/internal/shell"
	"viaduct/iommu"
	"viaduct/vfio"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// Wish is what a PF and its VFs are to be.
type Wish struct {
	VFs     []VFWish // all there are to be afterwards, by index
	Eswitch Eswitch  // what is not ""
	Offload string   // of the e-switch's rules to the NIC (hw-tc-offload): on, off, or "" for as it is
	MTU     int      // that VFs are to be able to have; 0 leaves the PF's, which is never lowered
}

// VFWish is what one VF is to be.
type VFWish struct {
	// Use is UseNone if it is "".
	Use      Use      `json:"use"`
	Settings Settings `json:"settings,omitempty"`
}

// Repeat returns n wishes that are alike, none if n is not above zero.
func Repeat(n int, vf VFWish) []VFWish {
	out := make([]VFWish, max(n, 0))
	for i := range out {
		out[i] = VFWish{vf.Use, maps.Clone(vf.Settings)}
	}
	return out
}

// check refuses what no PF can be.
func (w *Wish) check() error {
	for i, vf := range w.VFs {
		if _, err := ParseUse(string(cmp.Or(vf.Use, UseNone))); err != nil {
			return fmt.Errorf("vf%d: driver %q: %w", i, vf.Use, err)
		}
		if _, err := vf.Settings.checked(); err != nil {
			return fmt.Errorf("vf%d: %w", i, err)
		}
	}
	for _, c := range choices {
		if value := *c.of(&w.Eswitch); value != "" && !slices.Contains(c.values, value) {
			return fmt.Errorf("invalid %[2]s %[1]q of the e-switch; want %[3]s", value, c.name,
				strings.Join(c.values, ", "))
		}
	}
	if !slices.Contains([]string{"", on, off}, w.Offload) {
		return fmt.Errorf("invalid hw-tc-offload %q; want on or off", w.Offload)
	}
	if w.MTU < 0 {
		return fmt.Errorf("invalid MTU %d", w.MTU)
	}
	return nil
}

// anyVF reports whether one of the VFs is such a one.
func anyVF(vfs []VFWish, such func(VFWish) bool) bool { return slices.ContainsFunc(vfs, such) }

func forHost(vf VFWish) bool     { return vf.Use == UseHome }
func forGuests(vf VFWish) bool   { return vf.Use != UseHome }
func onVFIO(vf VFWish) bool      { return vf.Use.Driver() != "" }
func hasSettings(vf VFWish) bool { return len(vf.Settings) > 0 }

// Plan is what it takes to change a PF's number of VFs; [Plan.Steps] has its order. It comes from [Handle.PlanCount].
type Plan struct {
	PF      *iommu.Device
	Have    int
	Want    int
	VFs     []VFWish        // the new ones
	Victims []*iommu.Device // the VFs that go
	Up      []Link          // the PF's own interfaces that are down, and are brought up
	Raise   []MTU           // those whose MTU is too low
	Offload []Offload       // those whose hw-tc-offload is to be another
	Clear   []bind.Step     // no VFs
	Before  []bind.Step     // up to the new count
	After   []bind.Step     // what the new VFs need, and the old settings restored
	Set     []SetPlan       // of each VF
	Notes   []string        // what the user should know and nothing refuses
	Unknown []string        // what of the wish a captured host does not tell of, so that it was not compared

	Eswitch   Eswitch // what is set of it, before the new count or after
	was       Eswitch // what that undoes
	mode      string  // of the e-switch when the VFs get their settings, where that is known
	offload   string  // what hw-tc-offload is to be in the end, as a new mode may take it back; "" as it is
	autoprobe string  // what it was, if it is changed
	nvme      string  // the controller that shares
	shares    []action

	by      *Handle   // that planned it
	checked *approval // nil until CheckCount let it pass
}

// Changes reports whether there is anything to do.
func (p *Plan) Changes() bool {
	return p.Have != p.Want || p.Eswitch != Eswitch{} || len(p.Up) > 0 || len(p.Raise) > 0 || len(p.Offload) > 0
}

// recounts reports whether VFs are made or removed.
func (p *Plan) recounts() bool { return p.Have != p.Want || len(p.Clear) > 0 }

// probeLate reports whether the host's drivers are to have the VFs only when these are ready for one.
func (p *Plan) probeLate() bool {
	return anyVF(p.VFs, forHost) &&
		(p.modeLate() || p.nvme != "" || anyVF(p.VFs, hasSettings) || p.autoprobe == "0" || anyVF(p.VFs, forGuests))
}

// modeLate reports whether the e-switch is set when the VFs are there.
func (p *Plan) modeLate() bool {
	return p.Eswitch.Mode == switchdev && !slices.Contains(modeFirst[:], p.PF.Driver)
}

// Steps is the plan in its order.
func (p *Plan) Steps() []bind.Action {
	var out []bind.Action
	add := func(steps []bind.Step) { out = append(out, bind.Actions(steps)...) }
	command := func(commands ...string) {
		for _, c := range commands {
			out = append(out, bind.Action{Command: c})
		}
	}
	mode := func(late bool) {
		if p.Eswitch != (Eswitch{}) && p.modeLate() == late {
			command(p.Eswitch.command(p.PF.Name))
		}
	}

	for _, l := range p.Up {
		command(l.commands()...)
	}
	for _, m := range p.Raise {
		command(fmt.Sprintf("ip link set dev %s mtu %d", shell.Quote(m.Name), m.To))
	}
	add(p.Clear)
	for _, o := range p.Offload {
		command(o.command())
	}
	mode(false)
	for _, a := range p.shares {
		command(a.command(p.nvme))
	}
	add(p.Before)
	mode(true)
	add(p.After)
	for _, s := range p.Set {
		out = append(out, s.Steps()...)
	}
	return out
}

func attribute(pf iommu.Address, name string) string {
	return path.Join("sys/bus/pci/devices", pf.String(), name)
}

// autoprobe is the file that says whether the kernel offers new VFs to drivers.
func autoprobe(pf iommu.Address) string { return attribute(pf, "sriov_drivers_autoprobe") }

// perVF is how much longer a change of the number of VFs may take for each VF.
const perVF = time.Second

// count is the write that gives a PF so many VFs. It takes longer the more VFs are made or removed.
func count(pf *iommu.Device, n int) bind.Step {
	have := 0
	if pf.SRIOV != nil {
		have = len(pf.SRIOV.VFs)
	}
	return bind.Step{
		Path: attribute(pf.Address, "sriov_numvfs"), Value: strconv.Itoa(n), Extra: time.Duration(max(n, have)) * perVF,
	}
}

// PlanCount plans how a PF gets to have its VFs. From one number to another, and to another mode of the e-switch, it
// goes through none, which ends all VFs: see [Handle.CheckCount]. Nothing is planned of what is right already. A
// *RangeError, *NotPFError or *ForecastError says that it cannot be.
func (s *Handle) PlanCount(pf *iommu.Device, wish Wish) (*Plan, error) {
	h, n := s.Host(), len(wish.VFs)
	if err := wish.check(); err != nil {
		return nil, err
	}
	switch {
	case pf.SRIOV == nil:
		return nil, notPF(h, pf)
	case n > pf.SRIOV.Total:
		return nil, &RangeError{pf.Address, n, pf.SRIOV.Total, firmwareHint(h, pf)}
	}
	t, err := s.Topology()
	if err != nil {
		return nil, err
	}

	p := &Plan{
		PF: pf, Have: len(pf.SRIOV.VFs), Want: n, VFs: slices.Clone(wish.VFs), offload: wish.Offload, by: s,
	}
	if err := p.planPF(h, wish); err != nil {
		return nil, err
	}
	if p.Have == n && p.Eswitch.Mode == "" {
		p.VFs = nil
		p.noteAsIs(t, wish)
		if n > 0 && !pf.VFIO {
			// VFs of a PF that has gone down do not work.
			p.Up, err = linksDown(h, pf)
		}
		return p, err
	}
	if pf.Driver == "" {
		return nil, fmt.Errorf("%s has no driver, and only the PF's driver can make VFs", pf.Address)
	}

	p.Victims = t.VFs(pf)
	if len(p.Victims) > 0 {
		p.Notes = append(p.Notes, "these VFs are removed: "+nameVFs(p.Victims))
		p.Clear = append(p.Clear, count(pf, 0))
	}
	if n == 0 {
		return p, nil
	}
	if err := makesVFs(h, pf); err != nil {
		return nil, err
	}
	return p, p.planVFs(h, t)
}

// makesVFs refuses a PF on a VFIO driver that makes no VFs: vfio-pci does so only when it is let
// (drivers/vfio/pci/vfio_pci.c, enable_sriov).
func makesVFs(h *iommu.Host, pf *iommu.Device) error {
	if !pf.VFIO {
		return nil
	}
	if pf.Driver == "vfio-pci" {
		may, err := h.String("sys/module/vfio_pci/parameters/enable_sriov")
		if may == "Y" {
			return nil
		}
		if err != nil && !host.Absent(err) {
			return err
		}
	}

	leases, err := holder.Leases(h, []*iommu.Device{pf})
	if err != nil && !errors.Is(err, holder.ErrBlind) {
		return err
	}
	give := ": give it"
	if len(leases) > 0 {
		give = fmt.Sprintf(", and it %s: end that (viaduct release %s), and then give it",
			leases[0].What, shell.Quote(leases[0].Guest))
	}
	return fmt.Errorf("%s is on %s, which cannot make VFs%s back to its own driver (viaduct unbind %s)",
		pf.Name, pf.Driver, give, pf.Name)
}

// planPF plans what is set of the PF itself.
func (p *Plan) planPF(h *iommu.Host, wish Wish) (err error) {
	if err := p.planEswitch(h, wish.Eswitch); err != nil {
		return err
	}
	if p.mode = wish.Eswitch.Mode; p.mode == "" {
		if p.mode, err = modeOf(h, p.PF); err != nil {
			return err
		}
	}

	p.Raise, err = mtusBelow(h, p.PF, wish.MTU)
	if !h.Live() && host.Absent(err) {
		p.Unknown = append(p.Unknown, "its MTU")
	} else if err != nil {
		return err
	}
	p.Offload, err = offloadsBut(h, p.PF, wish.Offload)
	if !h.Live() && host.Absent(err) {
		p.Unknown = append(p.Unknown, tcFeature)
		return nil
	}
	return err
}

// planEswitch plans what is set of the PF's e-switch. Where a captured host does not tell of it, it is set if VFs are
// made.
func (p *Plan) planEswitch(h *iommu.Host, wish Eswitch) error {
	if wish == (Eswitch{}) {
		return nil
	}
	now, known, err := readEswitchOf(h, p.PF.Address)
	switch {
	case err != nil:
		return err
	case !known && p.Have != p.Want:
		p.Eswitch = wish
	case !known:
		p.Unknown = append(p.Unknown, "its e-switch")
	case now == nil && wish == Eswitch{Mode: legacy}:
		// Which is all that it has.
	case now == nil:
		return fmt.Errorf("%s (driver %q) has no e-switch that devlink can change", p.PF.Name, p.PF.Driver)
	default:
		p.Eswitch, p.was = wish.differs(now)
	}
	return nil
}

// noteAsIs says what is left as it is, where the number of VFs is right.
func (p *Plan) noteAsIs(t *iommu.Topology, wish Wish) {
	if anyVF(wish.VFs, hasSettings) {
		p.Notes = append(p.Notes,
			"the VFs exist already, and keep their settings (vf set changes them)")
	}
	for _, v := range p.PF.SRIOV.VFs {
		vf, err := t.Find(v.Address)
		if err == nil && v.Index < len(wish.VFs) && onVFIO(wish.VFs[v.Index]) && !vf.VFIO {
			p.Notes = append(p.Notes, "the VFs exist already, and not all are on a vfio driver (bind takes them)")
			return
		}
	}
}

// planVFs plans how new VFs are made, and what they need.
func (p *Plan) planVFs(h *iommu.Host, t *iommu.Topology) (err error) {
	if err := errors.Join(forecast(h, p.PF, p.Want), vectorsLeft(h, p.PF, p.VFs)); err != nil {
		return err
	}
	if err := p.ready(h); err != nil {
		return err
	}
	if p.Up, err = linksDown(h, p.PF); err != nil {
		return err
	}
	p.nvme, p.shares, err = planShares(h, p.PF, p.Want)
	if errors.Is(err, fs.ErrPermission) {
		p.Notes = append(p.Notes, "only root can read the queues and interrupts that its VFs get")
	} else if err != nil {
		return err
	}
	if err := p.planWrites(h); err != nil {
		return err
	}

	if anyVF(p.VFs, hasSettings) {
		if p.Set, err = planNew(h, p.PF, p.VFs, p.mode); err != nil {
			return err
		}
	}
	p.noteNew()
	if note := bind.InterruptNote(t); note != "" && anyVF(p.VFs, onVFIO) {
		p.Notes = append(p.Notes, note)
	}
	return nil
}

// planWrites plans the writes around the new count: autoprobe is off while VFs are made that the host's drivers are not
// to have, or not yet, and comes back when each VF has an override. From then on a module that is loaded takes what has
// none.
func (p *Plan) planWrites(h *iommu.Host) (err error) {
	file := autoprobe(p.PF.Address)
	if p.autoprobe, err = h.String(file); err != nil && anyVF(p.VFs, forGuests) {
		return fmt.Errorf("VFs for guests need a kernel with sriov_drivers_autoprobe: %w", err)
	}
	turnOff := p.autoprobe == "1" && (anyVF(p.VFs, forGuests) || p.probeLate())
	if turnOff {
		p.Before = append(p.Before, bind.Step{Path: file, Value: "0"})
	}
	p.Before = append(p.Before, count(p.PF, p.Want))

	// The kernel gives VFs of a PF on a VFIO driver an override for that driver, and binds them at once.
	for i, vf := range p.VFs {
		if forGuests(vf) && !p.PF.VFIO {
			override := attribute(p.PF.Address, fmt.Sprintf("virtfn%d/driver_override", i))
			p.After = append(p.After, bind.Step{Path: override, Value: bind.None})
		}
	}
	if turnOff && !p.probeLate() {
		p.After = append(p.After, bind.Step{Path: file, Value: p.autoprobe})
	}
	return nil
}

// noteNew says what else is done with new VFs.
func (p *Plan) noteNew() {
	if p.PF.VFIO {
		p.Notes = append(p.Notes, fmt.Sprintf("%s is on %s, which gets its VFs at once", p.PF.Name, p.PF.Driver))
	}
	if anyVF(p.VFs, func(vf VFWish) bool { return vf.Settings[SpoofChk] == on && vf.Settings[MAC] == "" }) {
		p.Notes = append(p.Notes, "spoofchk is on for VFs without an address: the driver may drop "+
			"everything they send")
	}

	if p.nvme != "" {
		p.Notes = append(p.Notes, "then each VF is set online")
	}
	if p.probeLate() {
		p.Notes = append(p.Notes, "then each VF"+unlessAll(p.VFs, forHost)+" is probed")
	}
	if anyVF(p.VFs, onVFIO) {
		p.Notes = append(p.Notes, "then each VF"+unlessAll(p.VFs, onVFIO)+" is taken as viaduct bind does")
	}
	if len(p.PF.Netdevs) > 0 {
		p.Notes = append(p.Notes, fmt.Sprintf("the link of %s may flap while its VFs change", p.PF.Netdevs[0]))
	}
}

// unlessAll says which VFs are such, where that are not all.
func unlessAll(vfs []VFWish, such func(VFWish) bool) string {
	var indexes []string
	for i, vf := range vfs {
		if such(vf) {
			indexes = append(indexes, strconv.Itoa(i))
		}
	}
	if len(indexes) == len(vfs) {
		return ""
	}
	return " of " + strings.Join(indexes, ", ")
}

// nameVFs names VFs with what they are to somebody: their driver and interface.
func nameVFs(vfs []*iommu.Device) string {
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

// CheckCount refuses, with a *holder.RefusedError, a plan that would end VFs which somebody uses, as [holder.Find]
// tells; force overrides kinds of users. [Handle.Apply] carries out no other plan than one that it let pass when the PF
// and the VFs that go were locked. The PF's own users are no reason to refuse: a PF that carries the host's traffic is
// the normal case. On a dry run, and on a captured host, who cannot see all users is told of those that can be seen.
func (s *Handle) CheckCount(p *Plan, force []holder.Kind) error {
	if p == nil || p.by != s {
		return errors.New("sriov: a Plan comes from PlanCount of the same Handle")
	}
	p.checked = nil
	if err := s.users(p, force); err != nil {
		return err
	}
	if s.Changes() && s.locked(p) == nil {
		p.checked = &approval{plan: p.clone()}
	}
	return nil
}

// approval is a plan as it was when CheckCount let it pass, whatever is done with the Plan afterwards. It is carried
// out once.
type approval struct {
	plan *Plan
	ran  atomic.Bool
}

func (p *Plan) clone() *Plan {
	c := *p
	c.VFs, c.Victims = slices.Clone(p.VFs), slices.Clone(p.Victims)
	c.Up, c.Raise, c.Offload = slices.Clone(p.Up), slices.Clone(p.Raise), slices.Clone(p.Offload)
	c.Clear, c.Before, c.After = slices.Clone(p.Clear), slices.Clone(p.Before), slices.Clone(p.After)
	return &c
}

// locked is a bind.ErrNotLocked for a plan whose PF or VFs another may change.
func (s *Handle) locked(p *Plan) error {
	for _, d := range append([]*iommu.Device{p.PF}, p.Victims...) {
		if !s.Holds(d.Address) {
			return fmt.Errorf("sriov: %s: %w", d.Name, bind.ErrNotLocked)
		}
	}
	return nil
}

// forVFIO refuses VFs on a VFIO driver where no IOMMU would be in front of them.
func forVFIO(h *iommu.Host, t *iommu.Topology) error {
	refuse := func(hint, why string) error {
		return holder.Because("make VFs on a vfio driver", holder.Reason{Kind: holder.IOMMU, Text: why}, hint)
	}
	if len(t.Groups)+len(t.Units) == 0 {
		return refuse(iommu.WhyOff(h, t).String(), "no IOMMU is active on this host")
	}
	unsafe, err := vfio.NoIOMMU(h)
	if err != nil {
		return err
	}
	if unsafe && t.LateGroups() {
		return refuse("echo N > /"+vfio.NoIOMMUFile, "VFIO's noiommu mode is on, in which the kernel may make groups "+
			"for them that no IOMMU is in front of")
	}
	return nil
}

// users refuses a plan for who uses what it ends.
func (s *Handle) users(p *Plan, force []holder.Kind) error {
	t, err := s.Topology()
	if err != nil {
		return err
	}
	if anyVF(p.VFs, onVFIO) && p.recounts() {
		if err := forVFIO(s.Host(), t); err != nil {
			return err
		}
	}

	users := p.Victims
	what, hint := fmt.Sprintf("remove the %d VFs of %s", p.Have, p.PF.Name), "end their users first"
	if p.Eswitch.Mode != "" {
		// Which makes the PF's own interface anew.
		users = append([]*iommu.Device{p.PF}, users...)
		what, hint = "change the e-switch of "+p.PF.Name, "end the users of the PF and of its VFs first"
	}
	if len(users) == 0 {
		return nil
	}
	holders, err := holder.Find(s.Host(), users)
	if err != nil && (s.Changes() || !errors.Is(err, holder.ErrBlind)) {
		return err
	}
	return holder.Refuse(what, holders, force, hint)
}
