package main

import (
	"fmt"
	"slices"
	"strconv"

	"viaduct/cmd/internal/terminal"
	"viaduct/iommu"
)

// tree are the devices as they hang together, with the numbers of buses on the branches to them.
func (s *sight) tree(parents map[string]string) *terminal.Table {
	children := map[string][]*iommu.Device{}
	s.t.All(func(d *iommu.Device) bool {
		children[parents[d.Name]] = append(children[parents[d.Name]], d)
		return true
	})

	for _, below := range children {
		slices.SortFunc(below, func(a, b *iommu.Device) int { return iommu.CompareDevices(*a, *b) })
	}

	has := s.branches(children)
	table := &terminal.Table{Shrink: treeShrink, Wrap: true}
	var draw func(parent, indent string)
	draw = func(parent, indent string) {
		below := slices.DeleteFunc(slices.Clone(children[parent]), func(d *iommu.Device) bool { return !has[d.Name] })
		for i, d := range below {
			branch, next := "├─", "│    "
			if i == len(below)-1 {
				branch, next = "└─", "     "
			}
			bus := "─── "
			if i == 0 || below[i-1].Address.Bus != d.Address.Bus {
				bus = fmt.Sprintf("%02x─ ", d.Address.Bus)
			}
			if parent == "" {
				branch, next, bus = "", "", ""
			}
			table.Rows = append(table.Rows, s.treeRow(d, indent+branch+bus+d.Name))
			if line := s.vfs(d); line != "" {
				text := indent + next + "  " + line
				table.Rows = append(table.Rows, terminal.Row{Line: text, Hang: terminal.Width(indent+next) + 4})
			}
			draw(d.Name, indent+next)
		}
	}

	draw("", "")
	return finish(table, s.undrawn(has), "ADDRESS", "GROUP", "CLASS", "DEVICE", "DRIVER", "USED BY")
}

// Where a tree is too wide, names are cut first, and then the uses and drivers.
var treeShrink = []terminal.Shrink{{Column: 3, Least: 14}, {Column: 5, Least: 16}, {Column: 4, Least: 8}}

// undrawn counts what is not drawn and not told of in a PF's line.
func (s *sight) undrawn(has map[string]bool) hidden {
	var out hidden
	s.t.All(func(d *iommu.Device) bool {
		if s.keep == nil && !has[d.Name] && !s.folded(d) {
			out.devices++
		}
		return true
	})
	return out
}

// treeRow is a device's row, with its group behind its address.
func (s *sight) treeRow(d *iommu.Device, first string) terminal.Row {
	r := s.row(d, first)
	group := terminal.Cell{Style: r.Cells[0].Style}
	if d.Group != nil {
		group.Text = strconv.Itoa(*d.Group)
	}
	r.Cells = slices.Insert(r.Cells, 1, group)
	return r
}

// branches are the devices that are drawn: those that are wanted and what is above them.
func (s *sight) branches(children map[string][]*iommu.Device) map[string]bool {
	has := map[string]bool{}
	var look func(d *iommu.Device) bool
	look = func(d *iommu.Device) bool {
		own := s.wanted(d) && !s.folded(d)
		if role := d.Role(); s.keep == nil && !s.all && (role == iommu.RolePort || role == iommu.RoleCompanion) {
			own = false
		}
		for _, below := range children[d.Name] {
			own = look(below) || own
		}
		has[d.Name] = own
		return own
	}
	for _, d := range children[""] {
		look(d)
	}
	return has
}
