package main

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"

	"viaduct/cmd/internal/lease"
	"viaduct/cmd/internal/terminal"

	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/holder"
)

type vfListView struct {
	PFs     []pfView `json:"pfs"`
	Unknown []string `json:"unknown"` // of settings, holders and leases, what a captured host does not tell
}

type pfView struct {
	Address   string         `json:"address"`
	Name      *string        `json:"name"`
	Driver    *string        `json:"driver"`
	Netdevs   []string       `json:"netdevs"`
	Total     int            `json:"total"`
	Enabled   int            `json:"enabled"`
	Autoprobe *bool          `json:"autoprobe"`
	Eswitch   *sriov.Eswitch `json:"eswitch"`
	Uplinks   []string       `json:"uplinks"`
	VFs       []vfView       `json:"vfs"`
}

type vfView struct {
	Index          int            `json:"index"`
	Address        string         `json:"address"`
	Group          *int           `json:"group"`
	Driver         *string        `json:"driver"`
	DriverOverride *string        `json:"driver_override"`
	Netdevs        []string       `json:"netdevs"`
	MAC            *string        `json:"mac"`
	Settings       sriov.Settings `json:"settings"` // null where a captured host does not tell
	Statistics     *sriov.Stats   `json:"statistics"`
	Representor    *string        `json:"representor"`
	Lease          *string        `json:"lease"`     // the guest it is assigned to
	Holders        []string       `json:"holders"`   // as settings
	KeptWith       *string        `json:"kept_with"` // what the host keeps of its group, so that no guest can have it
}

func runVFList(e *env, sel []iommu.Selector, wide bool) error {
	h, t, err := e.look()
	if err != nil {
		return err
	}
	defer h.Close()
	keep, err := selection(h, t, sel)
	if err != nil {
		return err
	}
	names := iommu.OpenNames(h)
	defer names.Close()
	view := vfListView{PFs: []pfView{}}
	of, err := pfsAndVFs(t, keep)
	if err != nil {
		return err
	}
	t.All(func(d *iommu.Device) bool {
		if d.SRIOV == nil || keep != nil && of[d.Name] == nil && !keep[d.Name] {
			return true
		}
		var pf pfView
		if pf, err = viewPF(h, t, names, d); err != nil {
			return false
		}
		if keep != nil && !keep[d.Name] {
			pf.VFs = slices.DeleteFunc(pf.VFs, func(v vfView) bool { return !slices.Contains(of[d.Name], v.Address) })
		}
		view.PFs = append(view.PFs, pf)
		if none := sriov.CheckInterface(h, d); none != nil && d.Driver != "" {
			e.note("%v", none)
		}
		return true
	})

	if err != nil {
		return err
	}
	if view.Unknown = view.unknownOf(lease.BookOf(h)); len(view.Unknown) > 0 {
		e.note("not captured of this host, and not known of its VFs: %s", strings.Join(view.Unknown, ", "))
	}
	switch {
	case e.json:
		e.printJSON(view)
	case wide:
		e.printText(func(w *bufio.Writer) { writeTable(w, wideVFs(view)) })
	case len(view.PFs) == 0:
		e.note("no device of this host can have VFs (none has the SR-IOV capability)")
	default:
		e.print(tableOfVFs(view))
	}
	return nil
}

// pfsAndVFs are, of devices that were named, the VFs by their PFs. What is neither PF nor VF is an error.
func pfsAndVFs(t *iommu.Topology, keep map[string]bool) (of map[string][]string, err error) {
	of = map[string][]string{}
	t.All(func(d *iommu.Device) bool {
		switch {
		case !keep[d.Name] || d.SRIOV != nil:
		case d.PhysFn != nil:
			of[d.PhysFn.String()] = append(of[d.PhysFn.String()], d.Name)
		default:
			err = &sriov.NotPFError{Device: d.Address}
		}
		return err == nil
	})
	return of, err
}

// tableOfVFs is the list for people, the PFs as headings.
func tableOfVFs(view vfListView) *terminal.Table {
	table := &terminal.Table{
		Indent: 2, Wrap: true, Shrink: []terminal.Shrink{{Column: 4, Least: 16}, {Column: 5, Least: 12},
			{Column: 4, Least: 8}},
	}

	for _, p := range view.PFs {
		head := p.Address
		if len(p.Netdevs) > 0 {
			head = p.Netdevs[0] + " (" + p.Address + ")"
		}
		head += fmt.Sprintf(": %d of %d VFs", p.Enabled, p.Total)
		if p.Driver == nil {
			head += ", no driver"
		}
		if text := eswitchText(p); text != "" {
			head += ", " + text
		}
		table.Rows = append(table.Rows, terminal.Row{Line: head, Style: terminal.Bold, Hang: 2})
		for _, v := range p.VFs {
			use, style := heldText(v), terminal.Warn
			if v.Lease != nil {
				use, style = strings.TrimSuffix("guest "+*v.Lease+", "+use, ", "), terminal.Good
			}
			driver := ptr(v.Driver)
			if len(v.Netdevs) > 0 {
				driver += " " + strings.Join(v.Netdevs, ",")
			}
			r := terminal.Cells("vf"+strconv.Itoa(v.Index), v.Address, driver, ptr(v.MAC), unusual(v), use)
			r.Cells[5].Style = style
			table.Rows = append(table.Rows, r)
		}
	}

	return finish(table, hidden{}, "VF", "ADDRESS", "DRIVER", "MAC", "SETTINGS", "USED BY")
}

// wideVFs are the rows of -o wide.
func wideVFs(view vfListView) [][]string {
	rows := [][]string{{"PF", "VF", "ADDRESS", "GROUP", "DRIVER", "OVERRIDE", "MAC", "SETTINGS", "LEASE", "HELD"}}
	for _, p := range view.PFs {
		label := p.Address
		if len(p.Netdevs) > 0 {
			label = p.Netdevs[0]
		}
		rows = append(rows, []string{
			label, fmt.Sprintf("%d/%d", p.Enabled, p.Total), p.Address, "", ptr(p.Driver), "", "", eswitchText(p), "",
			"",
		})
		for _, v := range p.VFs {
			group := ""
			if v.Group != nil {
				group = strconv.Itoa(*v.Group)
			}
			rows = append(rows, []string{
				label, "vf" + strconv.Itoa(v.Index), v.Address, group, ptr(v.Driver), ptr(v.DriverOverride), ptr(v.MAC),
				unusual(v), ptr(v.Lease), heldText(v),
			})
		}
	}
	return rows
}

// unknownOf is what of the VFs a captured host does not tell.
func (v *vfListView) unknownOf(books *lease.Book) []string {
	settings, holders, leases := true, true, true
	for _, pf := range v.PFs {
		for _, vf := range pf.VFs {
			settings, holders, leases = settings && vf.Settings != nil, holders && vf.Holders != nil, books.Known()
		}
	}
	out := []string{}
	for _, part := range []struct {
		known bool
		what  string
	}{{settings, "settings"}, {holders, "holders"}, {leases, "leases"}} {
		if !part.known {
			out = append(out, part.what)
		}
	}
	return out
}

func viewPF(h *iommu.Host, t *iommu.Topology, names *iommu.Names, d *iommu.Device) (pfView, error) {
	v := pfView{
		Address: d.Name, Name: known(deviceName(names, d)), Driver: known(d.Driver),
		Netdevs: deviceOf(d, names).Netdevs, Total: d.SRIOV.Total, Enabled: len(d.SRIOV.VFs), VFs: []vfView{},
	}
	x, err := iommu.ReadDetails(h, d.Address)
	if err != nil {
		return v, err
	}
	if x.VFs != nil {
		v.Autoprobe = x.VFs.Autoprobe
	}
	if v.Eswitch, err = sriov.ReadEswitch(h, d.Address); err != nil &&
		!errors.Is(err, fs.ErrPermission) {
		// Root alone is told.
		return v, err
	}
	v.VFs, v.Uplinks, err = viewVFs(h, t, d)
	return v, err
}

// viewVFs is what is to be told of a PF's VFs, and what of its e-switch stands for the wires.
func viewVFs(h *iommu.Host, t *iommu.Topology, pf *iommu.Device) (out []vfView, uplinks []string, err error) {
	out = []vfView{}
	var port *sriov.Port
	vfs := t.VFs(pf)
	held := map[string][]string{}
	unseen := false
	if len(vfs) > 0 {
		if port, err = sriov.ReadPort(h, pf); err != nil {
			return out, nil, err
		}
		holders, err := holder.Processes(h, vfs)
		if err != nil && !errors.Is(err, holder.ErrBlind) {
			// An ordinary user is not told of others' processes.
			return out, nil, err
		}
		unseen = errors.Is(err, holder.ErrNotCaptured)
		for _, holder := range holders {
			held[holder.Device] = append(held[holder.Device], holder.What)
		}
	}

	leased, err := holder.Leases(h, vfs)
	if err != nil && !errors.Is(err, fs.ErrPermission) {
		// Nor of leases.
		return out, nil, err
	}
	guests := map[string]string{}
	for _, l := range leased {
		guests[l.Device] = l.Guest
	}
	ports, err := sriov.ReadPorts(h, port)
	if err != nil {
		return out, nil, err
	}

	for _, vf := range vfs {
		info, _ := port.Of(vf.VFIndex)
		row := vfView{
			Index: vf.VFIndex, Address: vf.Name, Group: vf.Group,
			Driver: known(vf.Driver), DriverOverride: known(vf.DriverOverride),
			Netdevs: append([]string{}, vf.Netdevs...), MAC: known(info.Settings[sriov.MAC]),
			Settings: info.Settings, Statistics: info.Stats, Representor: known(ports.VFs[vf.VFIndex]),
			Lease: known(guests[vf.Name]), Holders: append([]string{}, held[vf.Name]...),
		}
		if port != nil && !port.Known {
			row.Settings = nil
		}
		if unseen {
			row.Holders = nil
		}
		if with := t.KeptWith(vf); with != nil {
			row.KeptWith = &with.Name
		}
		out = append(out, row)
	}
	return out, append([]string{}, ports.Uplinks...), nil
}

// heldText is who has a VF, or what keeps it from everybody.
func heldText(v vfView) string {
	held := v.Holders
	if v.KeptWith != nil {
		held = append(held, "shares its group with "+*v.KeptWith)
	}
	return strings.Join(held, ", ")
}

// eswitchText is a PF's e-switch if it is not what every NIC begins with.
func eswitchText(p pfView) string {
	if p.Eswitch == nil || p.Eswitch.Mode == "legacy" {
		return ""
	}
	return strings.Join(append([]string{p.Eswitch.Mode}, p.Uplinks...), " ")
}

// unusual are the settings that are not what a VF begins with, its MAC address aside, and its representor.
func unusual(v vfView) string {
	show := sriov.Settings{}
	for k, value := range v.Settings {
		if usual, _ := k.Default(); k != sriov.MAC && usual != value {
			show[k] = value
		}
	}
	text := show.Text()
	if v.Representor != nil {
		text = strings.TrimSpace(text + " representor=" + *v.Representor)
	}
	return text
}
