package bind

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"viaduct/iommu"
	"viaduct/vfio"
	"viaduct/vfio/holder"
)

// Units are what must be taken together with the given devices: the endpoints of their groups, each group once. Bridges
// are left alone. A device without a group is a unit of its own. The given devices are handed over, whatever their
// class; companions among the others are only kept off the host's drivers ([iommu.Device.Role]).
func Units(t *iommu.Topology, devices []*iommu.Device) ([][]*iommu.Device, error) {
	for _, d := range devices {
		if d.Role() == iommu.RoleCompanion {
			d.As = iommu.RoleGuest
		}
	}

	var out [][]*iommu.Device
	seen := map[string]bool{}
	for _, d := range devices {
		members := []*iommu.Device{d}
		if d.Group != nil {
			g, err := t.Group(*d.Group)
			if err != nil {
				return nil, err
			}
			members = g.Endpoints()
		}
		if len(members) == 0 || seen[members[0].Name] {
			continue
		}
		for _, m := range members {
			seen[m.Name] = true
		}
		out = append(out, members)
	}
	return out, nil
}

// Singly makes a unit of each device, as a VF is one by itself.
func Singly(devices []*iommu.Device) [][]*iommu.Device {
	var out [][]*iommu.Device
	for _, d := range devices {
		out = append(out, []*iommu.Device{d})
	}
	return out
}

// Takable says why no guest can have a device by itself, whoever uses it: an [holder.ErrRefused], nil if one can.
func Takable(d *iommu.Device) error {
	why := holder.Reason{Kind: holder.Unsuitable, Device: d.Name}
	hint := ""
	switch d.Role() {
	case iommu.RolePort:
		why.Text = d.Name + " is a bridge, which a guest cannot have"
	case iommu.RoleChild:
		why.Text = fmt.Sprintf("%s is behind %s, whose driver makes its bus: a guest can have only everything "+
			"behind that", d.Name, d.Parent)
		hint = "name " + d.Parent.String() + " instead"
	default:
		return nil
	}
	return holder.Because("take "+d.Name, why, hint)
}

// Verdict is what came of asking whether a unit may go where it is to go.
type Verdict struct {
	Unit []*iommu.Device
	// Refused is a *holder.RefusedError that names every reason, nil if the unit may go.
	Refused error
	// Overridden are the holders that were a reason to refuse, had force not overridden them.
	Overridden []holder.Holder
	// Notes are what who takes the unit should know, as sentences.
	Notes []string
}

// Check asks, for each unit, whether it may go where it is to go, by one look at who uses them. Asked are the devices
// that somebody named; the rest of a unit comes along. What the host itself uses, PFs with VFs, bridges and devices
// that no IOMMU is in front of are not taken, and what a guest has open is not given back: the write would wait for the
// guest. On a dry run who cannot see all users ([holder.ErrBlind]) is told of those that can be seen.
func (b *Handle) Check(units [][]*iommu.Device, asked []*iommu.Device, g Goal, force []holder.Kind) ([]Verdict, error) {
	t, err := b.Topology()
	if err != nil {
		return nil, err
	}
	if g.takes() {
		for _, d := range asked {
			if err := Takable(d); err != nil {
				return nil, err
			}
		}
	}
	all := slices.Concat(units...)
	for _, unit := range units {
		all = append(all, childrenOf(t, unit)...)
	}
	holders, err := b.holders(all, g)
	if err != nil {
		return nil, err
	}

	out := make([]Verdict, len(units))
	for i, unit := range units {
		c := check{b: b, topology: t, unit: unit, goal: g, force: force, verdict: &out[i]}
		if c.verdict.Unit = unit; len(unit) == 0 {
			continue
		}
		c.run(asked, holders)
		if note := InterruptNote(t); i == 0 && note != "" && g.takes() && c.verdict.Refused == nil {
			c.verdict.Notes = append(c.verdict.Notes, note)
		}
		b.keepAnswer(unit, g, out[i].Refused == nil)
	}
	return out, nil
}

// InterruptNote is what who gives devices of a host to guests should know where their interrupts are not kept apart; ""
// where they are, or where that is not known.
func InterruptNote(t *iommu.Topology) string {
	if t.InterruptRemapping == nil || *t.InterruptRemapping {
		return ""
	}
	if t.LateGroups() {
		return "interrupts of devices are not isolated on this host (no ITS), so VFIO will refuse to open the device"
	}
	return "interrupt remapping is off on this host, so VFIO will refuse to open the device"
}

// childrenOf are the devices that go with a unit, as they are behind the driver of one of it.
func childrenOf(t *iommu.Topology, unit []*iommu.Device) []*iommu.Device {
	var out []*iommu.Device
	t.All(func(d *iommu.Device) bool {
		if d.Parent != nil && slices.ContainsFunc(unit, func(p *iommu.Device) bool { return p.Address == *d.Parent }) {
			out = append(out, d)
		}
		return true
	})
	return out
}

// keepAnswer remembers whether a unit that is locked may go somewhere.
func (b *Handle) keepAnswer(unit []*iommu.Device, g Goal, may bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.may == nil {
		b.may = map[iommu.Address]Goal{}
	}
	g.owner = nil
	for _, d := range unit {
		if delete(b.may, d.Address); may && d.PCI && b.Holds(d.Address) {
			b.may[d.Address] = g
		}
	}
}

// useAnswer reports whether a unit may go somewhere, once.
func (b *Handle) useAnswer(unit []*iommu.Device, g Goal) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	g.owner = nil
	may := true
	for _, d := range unit {
		if to, asked := b.may[d.Address]; d.PCI {
			may = may && asked && to == g
			delete(b.may, d.Address)
		}
	}
	return may
}

// holders are those that matter to a goal: whatever uses what is taken, and who has open what is given back.
func (b *Handle) holders(devices []*iommu.Device, g Goal) ([]holder.Holder, error) {
	looks := []func(*iommu.Host, []*iommu.Device) ([]holder.Holder, error){holder.Find}
	if !g.takes() {
		looks = []func(*iommu.Host, []*iommu.Device) ([]holder.Holder, error){holder.Processes, holder.Leases}
	}
	var out []holder.Holder
	for _, look := range looks {
		found, err := look(b.host, devices)
		if err != nil && (!b.DryRun() && b.host.Live() || !errors.Is(err, holder.ErrBlind)) {
			return nil, err
		}
		out = append(out, found...)
	}
	return out, nil
}

// check is the check of one unit.
type check struct {
	b        *Handle
	topology *iommu.Topology
	unit     []*iommu.Device
	goal     Goal
	force    []holder.Kind

	verdict *Verdict
	refused holder.RefusedError
}

func (c *check) run(asked []*iommu.Device, holders []holder.Holder) {
	what := "give back "
	if c.goal.takes() {
		what = "take "
		c.canBeTaken(asked)
		c.siblings(asked)
		c.resets(asked)
	} else {
		c.refused.Hint = "end the guest, or run viaduct release, first"
	}
	c.users(holders)
	if !c.goal.takes() {
		c.keepsVFs()
	}
	c.stuck()

	if len(c.refused.Reasons) > 0 {
		c.refused.What = what + c.named(asked)
		c.verdict.Refused = &c.refused
	}
}

// add adds a reason about a device; hint is what the user can do, "" if nothing.
func (c *check) add(kind holder.ReasonKind, device, hint, format string, a ...any) {
	r := holder.Reason{Kind: kind, Device: device, Hint: hint, Text: fmt.Sprintf(format, a...)}
	c.refused.Reasons = append(c.refused.Reasons, r)
}

// isVFOf tells the VFs of a PF.
func isVFOf(pf *iommu.Device) func(*iommu.Device) bool {
	return func(d *iommu.Device) bool { return d.PhysFn != nil && *d.PhysFn == pf.Address }
}

// canBeTaken adds why VFIO would not take the unit.
func (c *check) canBeTaken(asked []*iommu.Device) {
	for _, d := range c.unit {
		switch {
		case !d.PCI:
			c.add(holder.Group, d.Name, "", "%s shares the group and is not a PCI device", d.Name)
		case d.Group == nil && c.topology.LateGroups() && d.Driver == "":
			c.getsGroup(d)
		case d.Group == nil && len(c.topology.Groups) == 0 && len(c.topology.Units) == 0:
			c.add(holder.IOMMU, d.Name, iommu.WhyOff(c.b.host, c.topology).String(),
				"%s is in no IOMMU group, because no IOMMU is active on this host", d.Name)
		case d.Group == nil:
			c.add(holder.IOMMU, d.Name, "", "%s is in no IOMMU group: the IOMMU does not cover it", d.Name)
		case d.SRIOV != nil && len(d.SRIOV.VFs) > 0 && slices.ContainsFunc(asked, isVFOf(d)):
			hint := fmt.Sprintf("the slot does not isolate the functions of the card (ACS): viaduct show "+
				"group=%d; another slot, or a setting of the firmware, may", *d.Group)
			c.add(holder.Group, d.Name, hint, "%s is in the IOMMU group of its VFs, and VFIO does not accept a PF "+
				"with VFs",
				d.Name)
		case d.SRIOV != nil && len(d.SRIOV.VFs) > 0:
			c.add(holder.VFs, d.Name, "viaduct vf destroy "+d.Name,
				"%s is a PF with %d VFs, and VFIO does not accept a PF with VFs", d.Name, len(d.SRIOV.VFs))
		}
	}

	if group := c.topology.GroupOf(c.unit[0]); group != nil {
		if group.NoIOMMU {
			c.add(holder.IOMMU, c.unit[0].Name, "",
				"group %d has no IOMMU: VFIO made it in its noiommu mode", group.ID)
		}
		for _, m := range group.Blockers() {
			if m.IsBridge() {
				c.add(holder.Group, m.Name, "",
					"bridge %s of the group is on %s, so the group is not viable", m.Name, m.Driver)
			}
		}
	}
}

// getsGroup lets a device pass that is in no group because it never had a driver: the kernel makes its group when it is
// bound. In VFIO's noiommu mode that would be one without an IOMMU.
func (c *check) getsGroup(d *iommu.Device) {
	unsafe, err := vfio.NoIOMMU(c.b.host)
	switch {
	case err != nil:
		c.add(holder.Unseen, d.Name, "", "read whether VFIO's noiommu mode is on: %v", err)
	case unsafe:
		c.add(holder.IOMMU, d.Name, "echo N > /"+vfio.NoIOMMUFile, "%s is in no IOMMU group yet, and VFIO's noiommu "+
			"mode is on, in which the kernel may make one for it that no IOMMU is in front of", d.Name)
	default:
		c.verdict.Notes = append(c.verdict.Notes, fmt.Sprintf("%s is in no IOMMU group yet: the kernel makes its "+
			"group when it is bound", d.Name))
	}
}

// resets notes which of the asked devices nothing resets between one guest and the next. VFs always can be.
func (c *check) resets(asked []*iommu.Device) {
	for _, d := range c.unit {
		if !has(asked, d) || d.PhysFn != nil || !d.PCI {
			continue
		}
		reset, err := iommu.ResetOf(c.b.host, c.topology, d)
		why := reset.Problem(func(o *iommu.Device) bool { return has(c.unit, o) || has(asked, o) })
		switch {
		case err != nil:
			c.verdict.Notes = append(c.verdict.Notes, fmt.Sprintf("%s: viaduct cannot tell how it is reset: %s",
				d.Name, err))
		case why != "":
			c.verdict.Notes = append(c.verdict.Notes, fmt.Sprintf("%s: %s; what a guest leaves in it, the next one "+
				"finds", d.Name, why))
		}
	}
}

// siblings notes what else the cards of the asked devices have that belongs to them, as a graphics card's audio, and is
// in another group.
func (c *check) siblings(asked []*iommu.Device) {
	for _, d := range c.unit {
		if !has(asked, d) {
			continue
		}
		c.topology.All(func(other *iommu.Device) bool {
			if d.Sibling(other) && !other.Together(d) && !has(asked, other) && other.Class>>16 != d.Class>>16 &&
				other.Role() == iommu.RoleGuest && !other.VFIO {
				c.verdict.Notes = append(c.verdict.Notes, fmt.Sprintf("%s is on the same card as %s, in "+
					"another group: it stays with the host unless it is taken too", other.Name, d.Name))
			}
			return true
		})
	}
}

// users adds who uses the unit. Who has a device that is where it is to be is no reason against bringing it there.
func (c *check) users(holders []holder.Holder) {
	touched := append(slices.Clone(c.unit), childrenOf(c.topology, c.unit)...)
	for _, h := range holders {
		i := slices.IndexFunc(touched, func(d *iommu.Device) bool { return d.Name == h.Device })
		if i < 0 {
			continue
		}
		if c.goal.reached(touched[i]) {
			if h.Kind == holder.Display {
				// VFIO will not get its memory.
				c.verdict.Notes = append(c.verdict.Notes, h.String())
			}
			continue
		}

		if reason := h.Against(c.force); reason != nil {
			c.refused.Reasons = append(c.refused.Reasons, *reason)
		} else {
			c.verdict.Overridden = append(c.verdict.Overridden, h)
		}
	}
}

// reached reports whether a device is where it is to go, as far as its users matter.
func (g Goal) reached(d *iommu.Device) bool {
	switch {
	case !g.takes():
		return !d.VFIO
	case d.Role() == iommu.RoleCompanion:
		return !d.Blocks()
	}
	return d.VFIO && (g.driver == Auto || g.driver == d.Driver)
}

// keepsVFs adds the VFs of a PF on a VFIO driver, which would go with that.
func (c *check) keepsVFs() {
	for _, d := range c.unit {
		if d.SRIOV != nil && len(d.SRIOV.VFs) > 0 && d.VFIO {
			c.add(holder.VFs, d.Name, "", "%s has %d VFs, which its driver would remove", d.Name, len(d.SRIOV.VFs))
		}
	}
}

// stuck adds the writes that the unit's devices wait for.
func (c *check) stuck() {
	for _, r := range c.b.Stuck() {
		if slices.ContainsFunc(c.unit, func(d *iommu.Device) bool { return d.PCI && d.Address == r.Device }) {
			c.refused.Reasons = append(c.refused.Reasons, r.reason())
		}
	}
}

func has(devices []*iommu.Device, d *iommu.Device) bool {
	return slices.ContainsFunc(devices, func(other *iommu.Device) bool { return other.Name == d.Name })
}

// named are the devices of the unit that were asked for.
func (c *check) named(asked []*iommu.Device) string {
	var out []string
	for _, d := range c.unit {
		if has(asked, d) {
			out = append(out, d.Name)
		}
	}
	return strings.Join(out, " ")
}

// Refusals joins the errors of the units that are refused, nil if none is.
func Refusals(verdicts []Verdict) error {
	var errs []error
	for _, v := range verdicts {
		errs = append(errs, v.Refused)
	}
	return errors.Join(errs...)
}
