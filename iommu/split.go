package iommu

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"viaduct/internal/bootloader"
)

// hint says what would have a port isolate, or what is below it be elsewhere.
func (g *Grouping) hint(n *node, v Isolation) string {
	switch v.cause {
	case causeACSOff:
		return g.acsHint(n, v.missing)
	case causeNoACS:
		if t, _, _ := g.express(n); t == RootPort {
			return "use a slot whose port has ACS, as those at the processor mostly have, or a firmware that shows " +
				"ACS (\"ACS\" or \"AER\" in its menu)"
		}
		return "use a slot that is not behind this switch"
	case causeConventional:
		return "use a slot that is not behind this bridge: nothing separates what is behind it"
	case causeVendor:
		return "use another slot, or a newer firmware"
	}
	return ""
}

// functionHint is for two functions that do not isolate. For ports that is what has them do so. Fixed says that
// nothing does.
func (g *Grouping) functionHint(a, b *node) (hint string, fixed bool) {
	for _, n := range []*node{a, b} {
		if v := g.isolation(n); v.cause == causeACSOff {
			return g.acsHint(n, v.missing), false
		}
	}
	if t, express, _ := g.express(a); express && t.above() {
		return g.hint(a, g.isolation(a)), false
	}
	return "nothing separates these functions: only a guest that gets them all can have one", true
}

// acsHint is for services that a function has and that are off. The kernel turns them on when it finds the function, if
// an IOMMU is to be used (drivers/pci/pci.c, pci_enable_acs).
func (g *Grouping) acsHint(n *node, missing ACSFlags) string {
	if word, rest := g.acsParameter(n, missing); word != "" {
		hint := bootloader.Find(g.host.Host).Remove(word)
		if rest != "" {
			hint += ", but keep " + rest
		}
		return hint
	}
	units, err := g.host.Names(unitsDir)
	if err == nil && len(units) > 0 || slices.ContainsFunc(g.order, g.linked) {
		return "boot again: the kernel turns ACS on when it finds a device, and something has turned it off since " +
			"(e.g. setpci)"
	}
	return "turn the IOMMU on (viaduct doctor): the kernel then turns ACS on, before it groups"
}

// acsParameter is the word of the kernel's command line that has such services of a function off, and what else is in
// it, as a word of its own; "" if there is none (Documentation/admin-guide/kernel-parameters.txt, pci=).
func (g *Grouping) acsParameter(n *node, missing ACSFlags) (word, rest string) {
	for _, word := range CommandLine(g.host) {
		options, ok := strings.CutPrefix(word, "pci=")
		if !ok {
			continue
		}
		all := strings.Split(strings.Trim(options, "\""), ",")
		i := slices.IndexFunc(all, func(option string) bool { return g.turnsOff(option, n, missing) })
		if i < 0 {
			continue
		}
		if all = slices.Delete(all, i, i+1); len(all) > 0 {
			rest = "pci=" + strings.Join(all, ",")
		}
		return word, rest
	}
	return "", ""
}

// turnsOff reports whether an option of pci= has services of a function off: disable_acs_redir= those that redirect,
// and config_acs= what has no 1 there, the lowest bit last.
func (g *Grouping) turnsOff(option string, n *node, missing ACSFlags) bool {
	if list, ok := strings.CutPrefix(option, "disable_acs_redir="); ok {
		return missing&(RequestRedirect|CompletionRedirect) != 0 &&
			slices.ContainsFunc(strings.Split(list, ";"), func(device string) bool { return g.named(n, device) })
	}
	list, ok := strings.CutPrefix(option, "config_acs=")
	if !ok {
		return false
	}
	for item := range strings.SplitSeq(list, ";") {
		flags, device, _ := strings.Cut(item, "@")
		if !g.named(n, device) {
			continue
		}
		var on ACSFlags
		for i := range min(len(flags), 16) {
			if flags[len(flags)-1-i] == '1' {
				on |= 1 << i
			}
		}
		// The first one that names it counts.
		return missing&^on != 0
	}
	return false
}

// named reports whether a parameter names a function: by pci:VENDOR:DEVICE[:SUBVENDOR:SUBDEVICE], where 0 is any, or by
// the place of the first bridge and the way from there (drivers/pci/pci.c, pci_dev_str_match).
func (g *Grouping) named(n *node, device string) bool {
	if ids, ok := strings.CutPrefix(device, "pci:"); ok {
		id := g.id(n)
		parts := strings.Split(ids, ":")
		is := []uint16{id.Vendor, id.Device, id.Subvendor, id.Subdevice}
		if len(parts) != 2 && len(parts) != len(is) {
			return false
		}
		for i, part := range parts {
			want, err := strconv.ParseUint(strings.TrimPrefix(part, "0x"), 16, 16)
			if err != nil || want != 0 && uint16(want) != is[i] {
				return false
			}
		}
		return true
	}

	parts := strings.Split(device, "/")
	for _, step := range slices.Backward(parts[1:]) {
		var slot, function uint8
		count, _ := fmt.Sscanf(step, "%x.%x", &slot, &function)
		if count != 2 || slot != n.at.Device || function != n.at.Function || n.up == nil {
			return false
		}
		n = n.up
	}
	first := parts[0]
	if strings.Count(first, ":") == 1 {
		first = "0:" + first
	}
	var a Address
	count, _ := fmt.Sscanf(first, "%x:%x:%x.%x", &a.Domain, &a.Bus, &a.Device, &a.Function)
	return count == 4 && a == n.at
}
