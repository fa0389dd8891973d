package main

import (
	"bufio"
	"encoding/json"
	"io"
	"slices"

	"viaduct/iommu"
)

// The types in this file are the JSON contract: fields are added, never changed or removed. README.md documents them.

type iommuView struct {
	Present            bool       `json:"present"`
	Units              []unitView `json:"units"`
	InterruptRemapping *bool      `json:"interrupt_remapping"`
}

type unitView struct {
	Name string         `json:"name"`
	Kind iommu.UnitKind `json:"kind"`
}

type groupView struct {
	ID       int          `json:"id"`
	Type     *string      `json:"type"`
	Viable   bool         `json:"viable"`
	Blockers []string     `json:"blockers"`
	Devices  []deviceView `json:"devices"`
}

type deviceView struct {
	Address        string         `json:"address"`
	Vendor         *string        `json:"vendor"`
	Device         *string        `json:"device"`
	Class          *string        `json:"class"`
	Name           *string        `json:"name"`
	Driver         *string        `json:"driver"`
	DriverOverride *string        `json:"driver_override"`
	Role           iommu.Role     `json:"role"`
	NUMANode       *int           `json:"numa_node"`
	Netdevs        []string       `json:"netdevs"`
	PhysFn         *iommu.Address `json:"physfn"`
	VFIndex        *int           `json:"vf_index"`
	SRIOV          *sriovView     `json:"sriov"`
}

type sriovView struct {
	Total   int `json:"total"`
	Enabled int `json:"enabled"`
}

// writeList writes {"iommu": iommuView, "groups": [groupView...], "ungrouped": [deviceView...]}, one group or device a
// line and one at a time: a host with thousands of VFs would otherwise be in memory several times over.
func writeList(w *bufio.Writer, t *iommu.Topology, names *iommu.Names, keep map[string]bool) {
	// Which ends each value with a newline.
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	v := iommuView{
		Present:            present(t),
		Units:              []unitView{},
		InterruptRemapping: t.InterruptRemapping,
	}
	for _, u := range t.Units {
		v.Units = append(v.Units, unitView(u))
	}
	// The writer keeps the first error, and tells it at the end.
	put := func(before string, v any) {
		w.WriteString(before)
		_ = e.Encode(v)
	}
	put(`{"iommu":`, v)
	w.WriteString(`,"groups":[`)
	comma := ""
	for i := range t.Groups {
		if g := groupOf(&t.Groups[i], names, keep); keep == nil || len(g.Devices) > 0 {
			put(comma, &g)
			comma = ","
		}
	}

	w.WriteString(`],"ungrouped":[`)
	comma = ""
	for i := range t.Ungrouped {
		if d := &t.Ungrouped[i]; keep == nil || keep[d.Name] {
			put(comma, deviceOf(d, names))
			comma = ","
		}
	}
	w.WriteString("]}\n")
}

// present reports whether an IOMMU is in use.
func present(t *iommu.Topology) bool {
	real := func(g iommu.Group) bool { return !g.NoIOMMU }
	return len(t.Units) > 0 || slices.ContainsFunc(t.Groups, real)
}

func groupOf(g *iommu.Group, names *iommu.Names, keep map[string]bool) groupView {
	v := groupView{ID: g.ID, Type: known(g.Type), Blockers: []string{}, Devices: deviceViews(g.Devices, names, keep)}
	for _, d := range g.Blockers() {
		v.Blockers = append(v.Blockers, d.Name)
	}
	v.Viable = len(v.Blockers) == 0 && !g.NoIOMMU
	return v
}

func deviceViews(devices []iommu.Device, names *iommu.Names, keep map[string]bool) []deviceView {
	views := make([]deviceView, 0, len(devices))
	for i := range devices {
		if keep == nil || keep[devices[i].Name] {
			views = append(views, deviceOf(&devices[i], names))
		}
	}
	return views
}

func deviceOf(d *iommu.Device, names *iommu.Names) deviceView {
	v := deviceView{
		Address: d.Name, Driver: known(d.Driver), DriverOverride: known(d.DriverOverride), Netdevs: d.Netdevs,
		PhysFn: d.PhysFn, Name: known(deviceName(names, d)), Role: d.Role(),
	}
	if v.Netdevs == nil {
		v.Netdevs = []string{}
	}
	if d.PCI {
		v.Vendor, v.Device, v.Class = hex(4, uint32(d.Vendor)), hex(4, uint32(d.Device)), hex(6, d.Class)
	}
	v.NUMANode = d.NUMANode
	if d.PhysFn != nil {
		v.VFIndex = &d.VFIndex
	}
	if d.SRIOV != nil {
		v.SRIOV = &sriovView{Total: d.SRIOV.Total, Enabled: len(d.SRIOV.VFs)}
	}
	return v
}

// known makes an empty text null: not known, or not there.
func known(s string) *string {
	if s == "" {
		return nil
	}
	return &s
}

func hex(digits int, n uint32) *string {
	b := make([]byte, digits)
	for i := range b {
		b[i] = "0123456789abcdef"[n>>(4*(digits-1-i))&15]
	}
	s := string(b)
	return &s
}

func writeJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}
