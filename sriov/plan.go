package sriov

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"

	"viaduct/iommu"
	"viaduct/vfio"
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
	Use      Use      `json:"use"`
	Settings Settings `json:"settings,omitempty"`
}

// Same are n VFs that are alike.
func Same(n int, vf VFWish) []VFWish { return slices.Repeat([]VFWish{vf}, n) }

// anyVF reports whether one of the VFs is such a one.
func anyVF(vfs []VFWish, such func(VFWish) bool) bool { return slices.ContainsFunc(vfs, such) }

func forHost(vf VFWish) bool     { return vf.Use == UseHome }
func forGuests(vf VFWish) bool   { return vf.Use != UseHome }
func onVFIO(vf VFWish) bool      { return vf.Use == UseVFIO }
func hasSettings(vf VFWish) bool { return len(vf.Settings) > 0 }

// Plan is what it takes to change a PF's number of VFs, in the order of its fields.
type Plan struct {
	PF      *iommu.Device
	Have    int
	Want    int
	VFs     []VFWish        // the new ones
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
	nvme      string  // the controller that shares
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
	return anyVF(p.VFs, forHost) && (p.modeLate() || p.nvme != "" || anyVF(p.VFs, hasSettings) || p.autoprobe == "0" || anyVF(p.VFs, forGuests))
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

// autoprobe is the file that says whether the kernel offers new VFs to drivers.
func autoprobe(pf iommu.Address) string { return attribute(pf, "sriov_drivers_autoprobe") }

// PlanCount plans how a PF gets to have its VFs. From one number to another, and to another mode of the e-switch, it goes
// through none, which ends all VFs: see [Check]. Nothing is planned of what is right already. A *RangeError, *NotPFError or
// *ForecastError says that it cannot be.
func PlanCount(h *iommu.Host, t *iommu.Topology, pf *iommu.Device, wish Wish) (*Plan, error) {
	n := len(wish.VFs)
	if pf.SRIOV == nil {
		return nil, notPF(h, pf)
	}
	if n > pf.SRIOV.Total {
		return nil, &RangeError{pf.Address, n, pf.SRIOV.Total, firmwareHint(h, pf)}
	}
	p := &Plan{PF: pf, Have: len(pf.SRIOV.VFs), Want: n, VFs: wish.VFs}
	var err error
	switch {
	case wish.Eswitch == Eswitch{}:
	case !h.Live(): // a captured host's cannot be asked for: where VFs are made it is set
		if p.Have != n {
			p.Eswitch = wish.Eswitch
		}
	default:
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
		p.VFs = nil
		if anyVF(wish.VFs, hasSettings) {
			p.Notes = append(p.Notes, "the VFs are there already, and their settings are left as they are (vf set changes them)")
		}
		if slices.ContainsFunc(pf.SRIOV.VFs, func(v iommu.VF) bool {
			vf, err := t.Find(v.Address)
			return err == nil && v.Index < n && onVFIO(wish.VFs[v.Index]) && !iommu.IsVFIODriver(vf.Driver)
		}) {
			p.Notes = append(p.Notes, "the VFs are there already, and not all on a vfio driver (bind takes them)")
		}
		return p, nil
	}
	if pf.Driver == "" {
		return nil, fmt.Errorf("%s has no driver, and VFs are made by the PF's driver", pf.Address)
	}
	p.Victims = t.VFs(pf)
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
	if err := vectorsLeft(h, pf, wish.VFs); err != nil {
		return nil, err
	}
	if p.Up, err = linksDown(h, pf); err != nil {
		return nil, err
	}
	p.nvme, p.shares, err = planShares(h, pf, n)
	if errors.Is(err, fs.ErrPermission) {
		p.Notes = append(p.Notes, "what queues and interrupts its VFs get is told to root alone")
	} else if err != nil {
		return nil, err
	}
	file := autoprobe(pf.Address)
	if p.autoprobe, err = h.String(file); err != nil && anyVF(p.VFs, forGuests) {
		return nil, fmt.Errorf("VFs for guests need a kernel that can leave them without a driver: %w", err)
	}
	off := p.autoprobe == "1" && (anyVF(p.VFs, forGuests) || p.probeLate())
	if off {
		p.Before = append(p.Before, vfio.Step{Path: file, Value: "0"})
	}
	p.Before = append(p.Before, count(pf, n))
	for i, vf := range p.VFs { // before autoprobe is restored: from then on a module that is loaded takes what has no override
		if forGuests(vf) {
			p.After = append(p.After, vfio.Step{Path: attribute(pf.Address, fmt.Sprintf("virtfn%d/driver_override", i)), Value: vfio.None})
		}
	}
	if off && !p.probeLate() {
		p.After = append(p.After, vfio.Step{Path: file, Value: p.autoprobe})
	}
	if anyVF(p.VFs, hasSettings) {
		if p.Set, err = planNew(h, pf, p.VFs); err != nil {
			return nil, err
		}
	}
	if p.nvme != "" {
		p.Notes = append(p.Notes, "then each VF is set online")
	}
	if p.probeLate() {
		p.Notes = append(p.Notes, "then each VF"+unlessAll(p.VFs, forHost)+" is probed")
	}
	if anyVF(p.VFs, onVFIO) {
		p.Notes = append(p.Notes, "then each VF"+unlessAll(p.VFs, onVFIO)+" is taken as by viaduct bind")
	}
	if len(pf.Netdevs) > 0 {
		p.Notes = append(p.Notes, fmt.Sprintf("the link of %s may flap", pf.Netdevs[0]))
	}
	return p, nil
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
//
// With dry, who cannot see all users may still ask.
func Check(h *iommu.Host, t *iommu.Topology, p *Plan, force []vfio.Kind, dry bool) error {
	if anyVF(p.VFs, onVFIO) && p.recounts() && len(t.Groups) == 0 {
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
	if err != nil && (!dry || !errors.Is(err, vfio.ErrBlind)) {
		return err
	}
	if p.Eswitch.Mode != "" {
		return vfio.Refuse("change the e-switch of "+p.PF.Name, holders, force, "end the users of the PF and of its VFs first")
	}
	return vfio.Refuse(fmt.Sprintf("remove the %d VFs of %s", p.Have, p.PF.Name), holders, force, "end their users first")
}
