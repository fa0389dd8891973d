package main

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"viaduct/cmd/internal/terminal"
	"viaduct/iommu"
	"viaduct/vfio/holder"
)

// sight makes the rows of `list` for people.
type sight struct {
	t     *iommu.Topology
	names *iommu.Names
	keep  map[string]bool // nil is all
	all   bool            // nothing is hidden or folded
	uses  map[string][]holder.Holder

	called map[[2]uint16]string // by vendor and device
}

// Where a list is too wide, names are cut first, and then the uses and drivers.
var listShrink = []terminal.Shrink{{Column: 2, Least: 18}, {Column: 4, Least: 18}, {Column: 3, Least: 10},
	{Column: 2, Least: 8}}

// groups are the devices by their IOMMU groups.
func (s *sight) groups() *terminal.Table {
	table := &terminal.Table{Indent: 2, Shrink: listShrink, Wrap: true}
	table.Rows = make([]terminal.Row, 0, 2*len(s.t.Groups)+len(s.t.Ungrouped))
	var hidden hidden
	for i := range s.t.Groups {
		g := &s.t.Groups[i]
		shown := s.shown(g.Devices)
		if s.keep == nil && !s.all && len(g.Handed()) == 0 && len(g.Children()) == 0 {
			hidden.groups++
			continue
		}
		if len(shown) > 0 {
			text, style := groupHeading(g)
			s.add(table, text, style, shown)
		}
	}

	var loose []*iommu.Device
	for _, d := range s.shown(s.t.Ungrouped) {
		if role := d.Role(); s.keep == nil && !s.all && (role == iommu.RolePort || role == iommu.RoleCompanion) {
			hidden.devices++
			continue
		}
		loose = append(loose, d)
	}
	if len(loose) > 0 {
		s.add(table, "NO GROUP: no IOMMU is in front of it, so no guest can have it", terminal.Plain, loose)
	}
	return finish(table, hidden, "ADDRESS", "CLASS", "DEVICE", "DRIVER", "USED BY")
}

// hidden counts what is not shown: bridges, and the host's own devices.
type hidden struct{ groups, devices int }

// finish puts the header over what is shown, and the count of what is not below it.
func finish(table *terminal.Table, hidden hidden, columns ...string) *terminal.Table {
	if len(table.Rows) > 0 {
		head := terminal.Cells(columns...)
		for i := range head.Cells {
			head.Cells[i].Style = terminal.Bold
		}
		table.Rows = slices.Insert(table.Rows, 0, head)
	}
	var what []string
	if hidden.groups > 0 {
		what = append(what, count(hidden.groups, "group"))
	}
	if hidden.devices > 0 {
		what = append(what, count(hidden.devices, "device"))
	}
	if len(what) > 0 {
		line := "Not shown: " + strings.Join(what, " and ") + ", bridges and the host's own (--all)"
		table.Rows = append(table.Rows, terminal.Row{Line: line, Style: terminal.Dim})
	}
	return table
}

// shown are the devices that have a row: those that were named, and of VFs those that are not folded under their PF.
func (s *sight) shown(devices []iommu.Device) []*iommu.Device {
	var out []*iommu.Device
	for i := range devices {
		d := &devices[i]
		if s.wanted(d) && !s.folded(d) {
			out = append(out, d)
		}
	}
	return out
}

func (s *sight) wanted(d *iommu.Device) bool { return s.keep == nil || s.keep[d.Name] }

// folded reports whether a VF is told of in its PF's lines: it is alone in its group but for other VFs of the PF, or in
// the PF's own.
func (s *sight) folded(d *iommu.Device) bool {
	if d.PhysFn == nil || s.all || s.keep != nil && !s.keep[d.PhysFn.String()] {
		return false
	}
	g := s.t.GroupOf(d)
	if g == nil {
		return true
	}
	of := func(o iommu.Device) bool {
		return o.PCI && o.Address == *d.PhysFn || o.PhysFn != nil && *o.PhysFn == *d.PhysFn
	}
	return !slices.ContainsFunc(g.Devices, func(o iommu.Device) bool { return !of(o) })
}

// groupHeading says what it takes to give a guest the group.
func groupHeading(g *iommu.Group) (string, terminal.Style) {
	head := "GROUP " + strconv.Itoa(g.ID) + ": "
	switch n := len(g.Blockers()); {
	case g.NoIOMMU:
		return head + "no IOMMU protects the host from it (noiommu mode)", terminal.Bad
	case len(g.Handed()) == 0 && len(g.Children()) == 0:
		return head + "nothing for a guest", terminal.Dim
	case n > 0:
		return head + "takes " + count(n, "device") + " off the host", terminal.Bold
	}
	return head + "takes no device off the host", terminal.Bold
}

// add adds a heading and the rows of its devices.
func (s *sight) add(table *terminal.Table, heading string, style terminal.Style, devices []*iommu.Device) {
	table.Rows = append(table.Rows, terminal.Row{Line: heading, Style: style, Hang: 2})
	for _, d := range devices {
		table.Rows = append(table.Rows, s.row(d, d.Name))
		if line := s.vfs(d); line != "" {
			table.Rows = append(table.Rows, terminal.Row{Line: "    " + line, Hang: 6})
		}
	}
}

// row is a device's line, which begins with its address or, in a tree, with the branch to it.
func (s *sight) row(d *iommu.Device, first string) terminal.Row {
	r := terminal.Cells(first, className(d), s.nameOf(d), d.Driver, "")
	use, style := s.use(d)
	r.Cells[4] = terminal.Cell{Text: use, Style: style}
	switch {
	case d.VFIO:
		r.Cells[3].Style = terminal.Good
	case d.Role() == iommu.RolePort || d.Role() == iommu.RoleCompanion:
		for i := range r.Cells {
			r.Cells[i].Style = terminal.Dim
		}
	}
	return r
}

// className is the class of a device in words; what is no PCI device has none.
func className(d *iommu.Device) string {
	if !d.PCI {
		return ""
	}
	return iommu.ClassName(d.Class)
}

// nameOf is what people call a device: its vendor and model, or its ids.
func (s *sight) nameOf(d *iommu.Device) string {
	if !d.PCI {
		return ""
	}
	key := [2]uint16{d.Vendor, d.Device}
	name, ok := s.called[key]
	if !ok {
		name = cmp.Or(modelName(s.names.Vendor(d.Vendor), s.names.Device(d.Vendor, d.Device)), idText(d))
		if s.called == nil {
			s.called = map[[2]uint16]string{}
		}
		s.called[key] = name
	}
	return name
}

// learnNames looks up the names of all devices that have a row.
func (s *sight) learnNames() {
	s.t.All(func(d *iommu.Device) bool {
		if s.wanted(d) && !s.folded(d) {
			s.nameOf(d)
		}
		return true
	})
}

// modelName puts a vendor's name before a model's. Of both, what is in brackets is what they are sold as.
func modelName(vendor, model string) string {
	if _, sold, ok := strings.Cut(model, "["); ok {
		if inner, _, closed := strings.Cut(sold, "]"); closed && inner != "" {
			model = inner
		}
	}
	if _, sold, ok := strings.Cut(vendor, "["); ok {
		vendor, _, _ = strings.Cut(sold, "]")
	}
	vendor, _, _ = strings.Cut(vendor, ",")
	for {
		short := vendor
		for _, end := range []string{" Corporation", " Corp.", " Inc.", " Inc", " Co.", " Co", " Ltd.", " Ltd",
			" Limited", " Technologies", " Semiconductor", " Electronics"} {
			short = strings.TrimSuffix(short, end)
		}
		if short == vendor {
			break
		}
		vendor = short
	}
	if model == "" || vendor == "" || strings.HasPrefix(model, vendor) {
		return model
	}
	return vendor + " " + model
}

// use is who uses a device and why, in a few words, with the interfaces that it is known by.
func (s *sight) use(d *iommu.Device) (string, terminal.Style) {
	var words []string
	style := terminal.Plain
	for _, u := range s.uses[d.Name] {
		words = append(words, cmp.Or(u.Brief, u.What))
		switch {
		case u.Kind == holder.Lease || u.Guest != "":
			style = terminal.Good
		case u.Kind.CarriesHost() && style == terminal.Plain:
			style = terminal.Warn
		}
	}
	text := strings.Join(words, ", ")
	if len(d.Netdevs) > 0 {
		text = strings.TrimSuffix(strings.Join(d.Netdevs, ",")+": "+text, ": ")
	}
	if text != "" {
		return text, style
	}
	switch {
	case d.Parent != nil:
		return "goes with " + d.Parent.String(), style
	case d.PhysFn != nil:
		return "vf" + strconv.Itoa(d.VFIndex) + " of " + d.PhysFn.String(), style
	}
	return "", style
}

// vfs is what is to be said of a PF's VFs: how many there are, and what becomes of them.
func (s *sight) vfs(d *iommu.Device) string {
	if d.SRIOV == nil {
		return ""
	}
	text := fmt.Sprintf("%d of %d VFs", len(d.SRIOV.VFs), d.SRIOV.Total)
	by := map[string][]int{}
	guests := []int{}
	for _, vf := range s.t.VFs(d) {
		if !s.folded(vf) {
			continue
		}
		what := cmp.Or(vf.Driver, "no driver")
		for _, u := range s.uses[vf.Name] {
			if u.Brief != "" {
				what = u.Brief
			}
			if u.Kind == holder.Lease {
				guests = append(guests, vf.VFIndex)
				break
			}
		}
		by[what] = append(by[what], vf.VFIndex)
	}

	const few = 4
	if named := len(by); named > few && len(guests) > few {
		// A line for each guest would be the whole list.
		for what := range by {
			if strings.HasPrefix(what, "guest ") {
				delete(by, what)
			}
		}
		by[count(len(guests), "guest")] = guests
	}
	order := slices.SortedFunc(maps.Keys(by), func(a, b string) int { return cmp.Compare(by[a][0], by[b][0]) })
	for i, what := range order {
		order[i] = terminal.Fold("vf", by[what]) + " " + what
	}
	if len(order) > 0 {
		text += ": " + strings.Join(order, "; ")
	}
	return text
}
