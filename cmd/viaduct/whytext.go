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
	section("What would split it:", w.cures())
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
		return "Whether config space says the same is not known: " + w.unknown()
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

// unknown says what could not be read.
func (w *why) unknown() string {
	var of []string
	for _, a := range w.computed.Unread {
		of = append(of, a.String())
	}
	if len(of) > 4 {
		of = append(of[:4], fmt.Sprintf("%d others", len(of)-4))
	}
	return "not all of it could be read (of " + strings.Join(of, ", ") + "). That takes root (CAP_SYS_ADMIN), of a captured " +
		"host when it is captured."
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
		return []string{"The kernel was started with pcie_acs_override=: its groups claim more isolation than the hardware has, " +
			"and devices of different groups may reach each other."}
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
	return append(out, "The kernel's group is what counts. It may know something of this hardware that viaduct does not (a "+
		"quirk), have grouped these before one of them came or was set otherwise, or group by other rules: some makers' "+
		"kernels take a whole switch without ACS for one.")
}

// writeReasons draws the tree from the root to the group, with a reason at each bridge, and then those between devices
// beside each other.
func writeReasons(out io.Writer, t *iommu.Topology, names *iommu.Names, w *why) {
	children, reasons := map[string][]string{}, map[string]string{}
	var between []string
	for _, e := range w.edges {
		switch {
		case e.Kind != iommu.EdgePath:
			between = append(between, e.Reason)
		case e.To == nil:
			children[""] = append(children[""], e.From.String())
		default:
			up := e.To.String()
			children[up] = append(children[up], e.From.String())
			_, reasons[up], _ = strings.Cut(e.Reason, " ")
		}
	}

	var draw func(name, first, rest string)
	draw = func(name, first, rest string) {
		fmt.Fprintln(out, cut(first+whyLine(t, names, name)))
		below := children[name]
		slices.Sort(below)
		if reason := reasons[name]; reason != "" {
			bar := rest + "│  "
			text := wrapAt("It "+reason, len([]rune(bar)))
			fmt.Fprintln(out, bar+strings.ReplaceAll(text, "\n"+strings.Repeat(" ", len([]rune(bar))), "\n"+bar))
		}
		for i, b := range below {
			if i < len(below)-1 {
				draw(b, rest+"├─ ", rest+"│  ")
			} else {
				draw(b, rest+"└─ ", rest+"   ")
			}
		}
	}
	slices.Sort(children[""])
	for _, name := range children[""] {
		draw(name, "", "")
	}
	const most = 6
	for i, s := range between {
		if i == most && len(between) > most+1 {
			fmt.Fprintf(out, "... and so are %d other pairs (--json has them all)\n", len(between)-most)
			break
		}
		fmt.Fprintln(out, wrapAt(s, 0))
	}
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

// cures are what would split the group, each once.
func (w *why) cures() []string {
	if taken := w.group.Endpoints(); len(taken) == 1 {
		return []string{"nothing has to: the others are ports, which stay as they are, and only " + taken[0].Name + " is taken."}
	}
	member := func(a iommu.Address) bool {
		return slices.ContainsFunc(w.group.Devices, func(d iommu.Device) bool { return d.PCI && d.Address == a })
	}
	var order []string
	of := map[string][]string{}
	for _, e := range w.edges {
		if e.Cure == "" || e.Kind != iommu.EdgePath && (!member(e.From) || e.To == nil || !member(*e.To)) {
			continue
		}
		at := e.From.String()
		if e.Kind == iommu.EdgePath {
			at = e.To.String()
		}
		if of[e.Cure] == nil {
			order = append(order, e.Cure)
		}
		if !slices.Contains(of[e.Cure], at) {
			of[e.Cure] = append(of[e.Cure], at)
		}
	}
	var out []string
	for _, cure := range order {
		at := of[cure]
		if len(at) > 3 {
			at = append(at[:3:3], fmt.Sprintf("%d others", len(at)-3))
		}
		out = append(out, strings.Join(at, ", ")+": "+cure+".")
	}
	return out
}

// losses are what the host has no longer when a guest gets the group.
func (w *why) losses() []string {
	const most = 8
	var out []string
	for i := range w.group.Devices {
		d := &w.group.Devices[i]
		if len(out) == most && len(w.group.Devices)-i > 1 {
			return append(out, fmt.Sprintf("and %d more devices (viaduct show group=%d).", len(w.group.Devices)-i, w.group.ID))
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
			out = append(out, fmt.Sprintf("%s: the host loses what %s does with it; the guest does not get it.", what, d.Driver))
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
