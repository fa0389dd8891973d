package main

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"viaduct/iommu"
)

// writeReasons draws the tree from the root to the group, with a reason at each bridge, and then those between devices
// beside each other.
func writeReasons(out io.Writer, t *iommu.Topology, names *iommu.Names, w *why) {
	children, reasons := map[string][]string{}, map[string]string{}
	var beside []iommu.Edge
	for _, e := range w.edges {
		switch {
		case e.Kind != iommu.EdgePath:
			beside = append(beside, e)
		case e.To == nil:
			children[""] = append(children[""], e.From.String())
		default:
			up := e.To.String()
			children[up] = append(children[up], e.From.String())
			reasons[up] = "It " + e.Because + "."
		}
	}

	var draw func(name, first, rest string)
	draw = func(name, first, rest string) {
		fmt.Fprintln(out, cut(first+whyLine(t, names, name)))
		below := children[name]
		slices.Sort(below)
		if reason := reasons[name]; reason != "" {
			bar := rest + "│  "
			text := wrapAt(reason, len([]rune(bar)))
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

	sentences := besideEachOther(beside)
	const most = 6
	for i, s := range sentences {
		if i == most && len(sentences) > most+1 {
			fmt.Fprintf(out, "... and %d more reasons of this kind (--json has them all)\n", len(sentences)-most)
			break
		}
		fmt.Fprintln(out, wrapAt(s, 0))
	}
}

// besideEachOther are the reasons between devices, those between functions of one device that are the same as one.
func besideEachOther(edges []iommu.Edge) []string {
	type key struct {
		slot     iommu.Address
		of       iommu.Address // which isolates, or of which that is not known
		isolated string
		because  string
	}
	var order []key
	all := map[key][]iommu.Edge{}
	for _, e := range edges {
		k := key{slot: e.From, of: e.Of, because: e.Because, isolated: "unknown"}
		switch {
		case e.Kind != iommu.EdgeFunction:
			k.isolated = string(e.Kind) + e.Reason
		case e.Isolated != nil && *e.Isolated:
			k.slot.Function, k.isolated = 0, "yes"
		case e.Isolated != nil:
			k.slot.Function, k.of, k.isolated = 0, iommu.Address{}, "no"
		}
		if all[k] == nil {
			order = append(order, k)
		}
		all[k] = append(all[k], e)
	}

	var out []string
	for _, k := range order {
		of := all[k]
		if len(of) == 1 || k.isolated == "unknown" || of[0].Kind != iommu.EdgeFunction {
			// It names one device, is of two, or was said twice.
			out = append(out, of[0].Reason)
			continue
		}
		functions := functionsOf(of)
		text := functions + " are functions of one device"
		if k.isolated == "yes" {
			text += fmt.Sprintf(", but %s %s.", k.of, k.because)
		} else {
			text += fmt.Sprintf(", and none of them isolates: %s %s.", of[0].Of,
				strings.TrimPrefix(k.because, "does not isolate: it "))
		}
		out = append(out, text)
	}
	return out
}

// functionsOf names the functions that edges of one device are between, after the first by their numbers alone.
func functionsOf(edges []iommu.Edge) string {
	var all []iommu.Address
	for _, e := range edges {
		all = append(all, e.From, *e.To)
	}
	slices.SortFunc(all, iommu.Address.Compare)
	all = slices.Compact(all)
	names := []string{all[0].String()}
	for _, a := range all[1:] {
		names = append(names, fmt.Sprintf(".%d", a.Function))
	}
	last := len(names) - 1
	return strings.Join(names[:last], ", ") + " and " + names[last]
}
