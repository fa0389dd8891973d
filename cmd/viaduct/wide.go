package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"

	"viaduct/iommu"
)

// This file is `list -o wide`: every device with all that is known without a look at it, for programs that read text.

func listRows(t *iommu.Topology, names *iommu.Names, keep map[string]bool) [][]string {
	rows := [][]string{{"GROUP", "TYPE", "ADDRESS", "ID", "CLASS", "DRIVER", "NETDEV", "VF", "NAME"}}
	add := func(group, kind string, d *iommu.Device) {
		if keep != nil && !keep[d.Name] {
			return
		}
		driver := d.Driver
		if d.Blocks() && d.Group != nil {
			driver += " *"
		}
		id, class, name := "", "", ""
		if d.PCI {
			id, class, name = idText(d), (*hex(6, d.Class))[:4], deviceName(names, d)
		}
		rows = append(rows,
			[]string{group, kind, d.Name, id, class, driver, strings.Join(d.Netdevs, ","), vfText(d), name})
	}

	for i := range t.Groups {
		g := &t.Groups[i]
		for j := range g.Devices {
			add(strconv.Itoa(g.ID), g.Type, &g.Devices[j])
		}
	}

	for i := range t.Ungrouped {
		add("", "", &t.Ungrouped[i])
	}
	return rows
}

func idText(d *iommu.Device) string {
	return *hex(4, uint32(d.Vendor)) + ":" + *hex(4, uint32(d.Device))
}

func deviceName(names *iommu.Names, d *iommu.Device) string {
	if !d.PCI {
		return ""
	}
	return names.Device(d.Vendor, d.Device)
}

// vfText is "3/7" on a PF with 3 of 7 VFs enabled, and "vf2" on a VF.
func vfText(d *iommu.Device) string {
	switch {
	case d.SRIOV != nil:
		return fmt.Sprintf("%d/%d", len(d.SRIOV.VFs), d.SRIOV.Total)
	case d.PhysFn != nil:
		return "vf" + strconv.Itoa(d.VFIndex)
	}
	return ""
}

// writeTable aligns columns; an empty cell is "-". The last column is not padded.
func writeTable(w io.Writer, rows [][]string) {
	widths := make([]int, len(rows[0]))
	for _, r := range rows {
		for i, c := range r {
			widths[i] = max(widths[i], len(c), 1)
		}
	}
	var line []byte
	for _, r := range rows {
		line = line[:0]
		for i, c := range r {
			if c == "" {
				c = "-"
			}
			line = append(line, c...)
			for n := len(c); i < len(r)-1 && n < widths[i]+2; n++ {
				line = append(line, ' ')
			}
		}
		w.Write(append(line, '\n'))
	}
}

// writeTree draws the devices as they hang together; a device's line is its own, bridges above a selected device are
// kept.
func writeTree(w io.Writer, h *iommu.Host, t *iommu.Topology, names *iommu.Names, keep map[string]bool) error {
	parents, err := iommu.Parents(h, t)
	if err != nil {
		return err
	}
	children := map[string][]*iommu.Device{}
	t.All(func(d *iommu.Device) bool {
		children[parents[d.Name]] = append(children[parents[d.Name]], d)
		return true
	})
	for _, name := range slices.Collect(maps.Keys(keep)) {
		for up := parents[name]; up != ""; up = parents[up] {
			keep[up] = true
		}
	}

	var draw func(parent, indent string)
	draw = func(parent, indent string) {
		below := slices.DeleteFunc(slices.Clone(children[parent]),
			func(d *iommu.Device) bool { return keep != nil && !keep[d.Name] })
		slices.SortFunc(below, func(a, b *iommu.Device) int { return iommu.CompareDevices(*a, *b) })
		for i, d := range below {
			branch, next := "├─ ", "│  "
			if i == len(below)-1 {
				branch, next = "└─ ", "   "
			}
			if parent == "" {
				branch, next = "", ""
			}
			fmt.Fprintf(w, "%s%s%s\n", indent, branch, treeLine(d, names))
			draw(d.Name, indent+next)
		}
	}

	draw("", "")
	return nil
}

func treeLine(d *iommu.Device, names *iommu.Names) string {
	s := d.Name
	if d.Group != nil {
		s += fmt.Sprintf("  group %d", *d.Group)
	}
	if d.PCI {
		s += "  " + idText(d)
	}
	if d.Driver != "" {
		s += "  " + d.Driver
	}
	if v := vfText(d); v != "" {
		s += "  " + v
	}
	if len(d.Netdevs) > 0 {
		s += "  " + strings.Join(d.Netdevs, ",")
	}
	if n := deviceName(names, d); n != "" {
		s += "  (" + n + ")"
	}
	return s
}
