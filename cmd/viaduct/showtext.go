package main

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"viaduct/cmd/internal/changelog"
	"viaduct/cmd/internal/lease"
	"viaduct/cmd/internal/terminal"
	"viaduct/iommu"
	"viaduct/vfio/holder"
)

// facts are "name   value" lines for people.
type facts struct{ rows []terminal.Row }

// factWidth is where the values begin.
const factWidth = 14

func (f *facts) add(name, format string, a ...any) { f.styled(terminal.Plain, name, format, a...) }

func (f *facts) styled(style terminal.Style, name, format string, a ...any) {
	f.rows = append(f.rows, terminal.Row{Lead: "  " + name, Line: fmt.Sprintf(format, a...), Style: style,
		Hang: factWidth})
}

// text adds a line unless it is not known.
func (f *facts) text(name string, value *string) {
	if value != nil {
		f.add(name, "%s", *value)
	}
}

// list adds a line for each of several values, the name once.
func (f *facts) list(name string, values []string) {
	for _, v := range values {
		f.add(name, "%s", v)
		name = ""
	}
}

func (f *facts) heading(format string, a ...any) {
	f.rows = append(f.rows, terminal.Row{Line: fmt.Sprintf(format, a...), Style: terminal.Bold, Hang: 2})
}

// printDevice is `show` of one device: what matters for a guest first, and then what it is.
func (e *env) printDevice(h *iommu.Host, t *iommu.Topology, d *iommu.Device, v *showView, reset iommu.Reset,
	names *iommu.Names) {
	s := &sight{t: t, names: names, all: true}
	f := &facts{}
	f.heading("%s", strings.TrimSpace(d.Name+"  "+s.nameOf(d)))
	for _, w := range v.Warnings {
		text := w.What
		if w.Hint != nil {
			text += ": " + *w.Hint
		}
		f.styled(terminal.Bad, "warning", "%s", text)
	}
	f.uses(h, v)
	if v.Guest != nil {
		f.styled(terminal.Good, "guest", "%s", leaseText(h, *v.Guest))
	}
	f.add("driver", "%s", driverOf(v))
	f.group(s, d, v)
	if d.PCI {
		f.add("reset", "%s", reset)
	}
	for _, u := range v.USB {
		f.add("usb", "%s  %s", u.Port, cmp.Or(ptr(u.Name), u.Vendor+":"+u.Product))
	}

	f.functions(s, d, v)
	f.changes(h, d)
	f.identity(d, v)
	e.print(&terminal.Table{Rows: f.rows})
}

func driverOf(v *showView) string {
	text := cmp.Or(ptr(v.Driver), "none")
	if v.DriverOverride != nil {
		text += " (driver_override " + *v.DriverOverride + ")"
	}
	return text
}

// uses are who uses the device.
func (f *facts) uses(h *iommu.Host, v *showView) {
	var lines []string
	for _, u := range v.uses {
		switch u.Kind {
		case holder.Lease:
		case holder.Display:
			// The warning says more.
			lines = append(lines, cmp.Or(u.Brief, u.What))
		default:
			lines = append(lines, unbracketed(u.What))
		}
	}
	switch {
	case len(lines) > 0:
		f.list("used by", lines)
	case !holder.Known(h):
		f.add("used by", "not known: a captured host has nobody to ask")
	case v.Holders != nil && v.Guest == nil:
		f.add("used by", "nobody")
	}
}

// unbracketed is "ens1 has address ..." of "(ens1) has address ...", and "mounted on /" of "is mounted on /", where the
// device is not named before it.
func unbracketed(what string) string {
	if name, rest, ok := strings.Cut(what, ") "); ok && strings.HasPrefix(name, "(") {
		return name[1:] + " " + rest
	}
	return strings.TrimPrefix(what, "is ")
}

// leaseText is a guest with what its lease says of it.
func leaseText(h *iommu.Host, guest string) string {
	if l, err := lease.BookOf(h).Get(guest); err == nil && l != nil {
		return fmt.Sprintf("%s, from %s, since %s", guest, l.DrawnFrom(), l.Made.UTC().Format(time.DateTime))
	}
	return guest
}

// group says what a guest that gets the device gets with it, and what that takes.
func (f *facts) group(s *sight, d *iommu.Device, v *showView) {
	if v.Group == nil {
		f.add("group", "none: no IOMMU is in front of it, so no guest can have it")
		return
	}
	g, err := s.t.Group(v.Group.ID)
	if err != nil {
		return
	}
	text, _ := groupHeading(g)
	_, text, _ = strings.Cut(text, ": ")
	f.add("group", "%d, %s", g.ID, text)

	label := map[iommu.Role]string{
		iommu.RoleGuest: "goes along", iommu.RoleCompanion: "kept off", iommu.RolePort: "stays",
		iommu.RoleChild: "behind",
	}
	by := map[iommu.Role][]string{}
	for i := range g.Devices {
		if m := &g.Devices[i]; m.Name != d.Name {
			line := strings.Join(strings.Fields(m.Name+" "+className(m)+" "+s.nameOf(m)), " ")
			if m.Driver != "" {
				line += " (" + m.Driver + ")"
			}
			by[m.Role()] = append(by[m.Role()], line)
		}
	}
	for _, role := range []iommu.Role{iommu.RoleGuest, iommu.RoleChild, iommu.RoleCompanion, iommu.RolePort} {
		f.list(label[role], by[role])
	}
	if d.Role() == iommu.RoleCompanion {
		f.add("role", "companion: it is only kept off the host's drivers, unless it is named itself")
	}
}

// functions are its VFs, or whose VF it is.
func (f *facts) functions(s *sight, d *iommu.Device, v *showView) {
	if v.PhysFn != nil {
		f.add("VF", "%d of %s", *v.VFIndex, v.PhysFn)
	}
	if v.SRIOV == nil {
		return
	}
	f.add("VFs", "%d of %d", v.SRIOV.Enabled, v.SRIOV.Total)
	var lines []string
	for _, vf := range s.t.VFs(d) {
		lines = append(lines, fmt.Sprintf("vf%d  %s  %s", vf.VFIndex, vf.Name, cmp.Or(vf.Driver, "no driver")))
	}
	f.list("", lines)
}

// changes are the last changes of it that viaduct has written down.
func (f *facts) changes(h *iommu.Host, d *iommu.Device) {
	const few = 3
	all, err := changelog.Read(h)
	if err != nil {
		// For root alone.
		return
	}
	all = slices.DeleteFunc(all, func(e changelog.Entry) bool { return ptr(e.Device) != d.Name })
	var lines []string
	for _, e := range slices.Backward(all[max(len(all)-few, 0):]) {
		line := when(e.Time) + " " + e.User + ": " + e.Text()
		if e.Result != changelog.Done {
			line += ", " + string(e.Result)
		}
		lines = append(lines, line)
	}
	f.list("changed", lines)
}

// identity is what it is and where.
func (f *facts) identity(d *iommu.Device, v *showView) {
	for _, class := range sortedKeys(v.ClassDevices) {
		var names []string
		for _, n := range v.ClassDevices[class] {
			if mac := v.MACs[n]; class == "net" && mac != "" {
				n += " (" + mac + ")"
			}
			names = append(names, n)
		}
		f.add(class, "%s", strings.Join(names, ", "))
	}

	if d.PCI {
		f.add("class", "%s (%s)", className(d), *v.Class)
		f.add("ids", "%s, subsystem %s:%s, revision %s", idText(d), v.SubsystemVendor, v.SubsystemDevice, v.Revision)
	}

	f.text("serial", v.Serial)
	if v.Path != "" {
		f.add("path", "%s", v.Path)
	}

	f.text("iommu", v.Unit)
	if v.NUMANode != nil {
		f.add("numa node", "%d", *v.NUMANode)
	}

	f.text("power", v.PowerState)
	if v.Link != nil {
		f.add("link", "%s x%d (at most %s x%d)", v.Link.Speed, v.Link.Width, v.Link.MaxSpeed, v.Link.MaxWidth)
	}

	for _, b := range v.BARs {
		f.add(fmt.Sprintf("bar %d", b.Index), "%s %s%s", size(b.Size), b.Kind,
			map[bool]string{true: " prefetchable"}[b.Prefetchable])
	}
}

// printGroup is `show group=N`.
func (e *env) printGroup(h *iommu.Host, t *iommu.Topology, g *iommu.Group, v showGroupView, names *iommu.Names) {
	s := &sight{t: t, names: names, all: true, uses: e.usesOf(h, t, nil)}
	table := &terminal.Table{Indent: 2, Shrink: listShrink, Wrap: true}
	text, style := groupHeading(g)
	var members []*iommu.Device
	for i := range g.Devices {
		members = append(members, &g.Devices[i])
	}
	s.add(table, text, style, members)
	table = finish(table, hidden{}, "ADDRESS", "CLASS", "DEVICE", "DRIVER", "USED BY")

	f := &facts{}
	f.text("type", known(g.Type))
	var regions []string
	for _, r := range v.ReservedRegions {
		regions = append(regions, fmt.Sprintf("%s - %s  %s", r.Start, r.End, r.Type))
	}
	f.list("reserved", regions)
	if w, direct := directWarning(v.ReservedRegions); direct {
		f.styled(terminal.Bad, "warning", "%s: %s", w.What, *w.Hint)
	}
	table.Rows = append(table.Rows, f.rows...)
	e.print(table)
}

// warnings are what will go wrong when a guest gets the device.
func warnings(h *iommu.Host, t *iommu.Topology, d *iommu.Device, v *showView,
	reset iommu.Reset) ([]warningView, error) {
	out := []warningView{}
	if d.Group != nil {
		regions, err := iommu.ReservedRegions(h, *d.Group)
		if err != nil {
			return nil, err
		}
		if w, direct := directWarning(viewRegions(regions)); direct {
			out = append(out, w)
		}
	}
	for _, u := range v.uses {
		if u.Kind == holder.Display {
			what, hint, _ := strings.Cut(u.What, ": ")
			hint = cmp.Or(hint, "use another screen or a serial console first, or another card for the guest")
			out = append(out, warningView{"it " + what, &hint})
		}
	}
	its := func(o *iommu.Device) bool { return o.Together(d) }
	if problem := reset.Problem(its); d.Group != nil && d.Role() == iommu.RoleGuest && problem != "" {
		hint := "assign --no-reset leaves what this guest wrote into it for the next one"
		if reset.Way == iommu.ResetBus {
			hint = "take these too, or accept that the next guest finds what this one left in it (assign --no-reset)"
		}
		out = append(out, warningView{problem, &hint})
	}
	return out, nil
}

// directWarning is that of memory that the firmware maps one to one for a device, as RMRRs and IVMDs have it: VFIO
// refuses such a device (drivers/iommu/iommu.c, require_direct).
func directWarning(regions []regionView) (warningView, bool) {
	for _, r := range regions {
		if r.Type == "direct" {
			hint := "turn off what needs it in the firmware's setup (shared memory of the card, legacy USB or " +
				"network boot), or put the card into another slot"
			what := fmt.Sprintf("QEMU will refuse it: the firmware keeps memory mapped for it (%s - %s, direct)",
				r.Start, r.End)
			return warningView{what, &hint}, true
		}
	}
	return warningView{}, false
}

func viewRegions(regions []iommu.Region) []regionView {
	out := []regionView{}
	for _, r := range regions {
		out = append(out, regionOf(r))
	}
	return out
}
