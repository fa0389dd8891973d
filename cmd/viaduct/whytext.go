package main

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"viaduct/internal/host"
	"viaduct/iommu"
)

// writeWhy writes for people why a group is what it is.
func writeWhy(out io.Writer, h *iommu.Host, t *iommu.Topology, names *iommu.Names, w *why) {
	say := func(format string, a ...any) { fmt.Fprintln(out, wrapAt(fmt.Sprintf(format, a...), 0)) }
	say("%s %s", w.head(), w.verdict())
	for _, s := range w.differences(h) {
		say("%s", s)
	}
	if len(w.edges) > 0 {
		fmt.Fprintln(out)
		writeReasons(out, t, names, w)
	}
	section := func(head string, lines []string) {
		if len(lines) == 0 {
			return
		}
		fmt.Fprintln(out, "\n"+head)
		for _, l := range lines {
			fmt.Fprintln(out, "  - "+wrapAt(l, 4))
		}
	}
	if w.group == nil || w.group.NoIOMMU || len(w.group.Devices) < 2 {
		return
	}
	section("What would split it:", w.hints())
	section("What a guest that gets it takes along:", w.losses())
}

// head says what is asked for, and in which group it is.
func (w *why) head() string {
	switch {
	case w.group == nil:
		return w.device.Name + " is in no IOMMU group."
	case len(w.group.Devices) == 1:
		return fmt.Sprintf("%s is alone in IOMMU group %d.", w.group.Devices[0].Name, w.group.ID)
	case w.device == nil:
		return fmt.Sprintf("IOMMU group %d has %d devices.", w.group.ID, len(w.group.Devices))
	}
	return fmt.Sprintf("%s shares IOMMU group %d with %s.", w.device.Name, w.group.ID,
		count(len(w.group.Devices)-1, "other device"))
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// verdict compares the group with what config space says.
func (w *why) verdict() string {
	agrees := w.agrees()
	switch {
	case w.none != "":
		return w.none
	case w.device == nil:
		return "It is no PCI device, and has no config space to tell why."
	case w.group == nil && w.computed.Known && len(w.computed.Members) == 0:
		return "No IOMMU is in front of it."
	case agrees == nil && !w.computed.Known:
		return "Whether config space says the same is not known: " + strings.Join(w.computed.Missing, "; ") + "."
	case agrees == nil:
		return "By config space it would be in one with " + others(w.ours(), w.device.Name) + "."
	case *agrees:
		return "Config space says the same."
	}
	return "Config space says something else: " + strings.Join(w.ours(), ", ") + " would be one group."
}

func others(names []string, but string) string {
	names = slices.DeleteFunc(slices.Clone(names), func(n string) bool { return n == but })
	if len(names) == 0 {
		return "nothing else"
	}
	return strings.Join(names, ", ")
}

// differences says, where the kernel's group is another one, why that may be.
func (w *why) differences(h *iommu.Host) []string {
	agrees := w.agrees()
	if w.group == nil || agrees != nil && *agrees {
		return nil
	}

	line, err := h.String("proc/cmdline")
	if err != nil && !host.Absent(err) {
		return []string{"Whether the kernel was started with pcie_acs_override= is not known: " + err.Error() + "."}
	}

	if strings.Contains(line, "pcie_acs_override=") {
		return []string{"The kernel was started with pcie_acs_override=: its groups claim more isolation than the " +
			"hardware has, and devices of different groups may reach each other."}
	}

	if agrees == nil {
		return nil
	}

	var out []string
	// What the kernel has in this group, as config space has it.
	var apart []string
	for i := range w.group.Devices {
		d := &w.group.Devices[i]
		if d.PCI && !slices.Contains(w.ours(), d.Name) {
			apart = append(apart, d.Name)
		}
	}

	if len(apart) > 0 {
		out = append(out, "By config space these are not in one group with it: "+strings.Join(apart, ", ")+".")
	}

	return append(out, "The kernel's group is what counts. It may know something of this hardware that viaduct does "+
		"not (a quirk), have grouped these before one of them came or was set otherwise, or group by other rules: "+
		"some makers' kernels take a whole switch without ACS for one.")
}

func whyLine(t *iommu.Topology, names *iommu.Names, name string) string {
	a, err := iommu.ParseAddress(name)
	if err != nil {
		return name
	}
	d, err := t.Find(a)
	if err != nil {
		return name
	}
	return treeLine(d, names)
}

// cut shortens a line to the width that lines for people have.
func cut(line string) string {
	runes := []rune(line)
	if len(runes) <= columns {
		return line
	}
	return string(runes[:columns-3]) + "..."
}

// hints are what would split the group, each once.
func (w *why) hints() []string {
	var out []string
	taken := w.group.Endpoints()
	if len(taken) == 1 {
		children := w.group.Children()
		if len(children) == 0 {
			return []string{"nothing has to: the others are ports, which stay as they are, and only " + taken[0].Name +
				" is taken."}
		}
		var names []string
		for _, d := range children {
			names = append(names, d.Name)
		}
		out = append(out, fmt.Sprintf("nothing has to, where a guest gets all of %s: what its driver made (%s) goes "+
			"with it.",
			taken[0].Name, strings.Join(names, ", ")))
	}

	apart := w.separable(taken)
	var order []string
	of := map[string][]string{}
	for _, e := range w.edges {
		if e.Hint == "" || e.Kind == iommu.EdgePath && !apart || e.Kind != iommu.EdgePath && !w.within(e) {
			continue
		}
		at := []string{e.From.String()}
		switch e.Kind {
		case iommu.EdgePath:
			at[0] = e.To.String()
		case iommu.EdgeFunction:
			at = append(at, e.To.String())
		}
		if of[e.Hint] == nil {
			order = append(order, e.Hint)
		}
		for _, name := range at {
			if !slices.Contains(of[e.Hint], name) {
				of[e.Hint] = append(of[e.Hint], name)
			}
		}
	}
	for _, hint := range order {
		at := of[hint]
		slices.Sort(at)
		if len(at) > 3 {
			at = append(at[:3:3], fmt.Sprintf("%d others", len(at)-3))
		}
		out = append(out, strings.Join(at, ", ")+": "+hint+".")
	}
	return out
}

// within reports whether both ends of an edge are in the group.
func (w *why) within(e iommu.Edge) bool {
	member := func(a iommu.Address) bool {
		return slices.ContainsFunc(w.group.Devices, func(d iommu.Device) bool { return d.PCI && d.Address == a })
	}
	return e.To != nil && member(e.From) && member(*e.To)
}

// separable reports whether not all of these stay together wherever they are plugged, as functions of one device do.
func (w *why) separable(taken []*iommu.Device) bool {
	if len(taken) < 2 {
		return false
	}
	together := []iommu.Address{taken[0].Address}
	for i := 0; i < len(together); i++ {
		for _, e := range w.edges {
			if !e.Fixed || !w.within(e) {
				continue
			}
			for _, ends := range [][2]iommu.Address{{e.From, *e.To}, {*e.To, e.From}} {
				if ends[0] == together[i] && !slices.Contains(together, ends[1]) {
					together = append(together, ends[1])
				}
			}
		}
	}
	return slices.ContainsFunc(taken, func(d *iommu.Device) bool { return !slices.Contains(together, d.Address) })
}

// losses are what the host has no longer when a guest gets the group.
func (w *why) losses() []string {
	const most = 8
	var out []string
	for i := range w.group.Devices {
		d := &w.group.Devices[i]
		if len(out) == most && len(w.group.Devices)-i > 1 {
			return append(out, fmt.Sprintf("and %d more devices (viaduct show group=%d).", len(w.group.Devices)-i,
				w.group.ID))
		}
		if w.device != nil && d.Name == w.device.Name && d.Role() == iommu.RoleGuest {
			continue
		}
		what := d.Name
		if n := append(slices.Clone(d.Netdevs), d.Ports...); len(n) > 0 {
			what += " (" + strings.Join(n, ", ") + ")"
		}
		switch {
		case d.Role() == iommu.RolePort:
			continue
		case d.Role() == iommu.RoleCompanion && d.Blocks():
			out = append(out, fmt.Sprintf("%s: the host loses what %s does with it; the guest does not get it.", what,
				d.Driver))
		case d.Role() == iommu.RoleCompanion:
			out = append(out, what+": the host's drivers are kept off it; the guest does not get it.")
		case d.Blocks():
			out = append(out, fmt.Sprintf("%s: the host loses it (it is on %s).", what, d.Driver))
		default:
			out = append(out, what+": it goes to the same guest, or to none.")
		}
	}
	return out
}
