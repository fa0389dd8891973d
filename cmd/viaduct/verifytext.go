package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"viaduct/cmd/internal/verify"
	"viaduct/vfio"
)

func printVerified(w io.Writer, r *verify.Report) {
	if r.Usable {
		fmt.Fprintf(w, "%s can go to a guest.\n", r.Address)
	} else {
		fmt.Fprintf(w, "%s cannot go to a guest:\n", r.Address)
	}
	for _, reason := range r.Reasons {
		fmt.Fprintln(w, wrapAt("- "+reason, 2))
	}
	for _, n := range r.Notes {
		fmt.Fprintln(w, wrapAt("Note: "+n, 2))
	}

	for _, way := range []vfio.Way{vfio.IOMMUFD, vfio.Container} {
		printWay(w, way, r.Ways[way], r.Usable)
	}
	if len(r.Regions) > 0 {
		fmt.Fprintln(w)
		printTables(w, r)
	}
	if r.Reset.ByItself != nil {
		fmt.Fprintln(w)
		printAbilities(w, r)
	}
	if r.Memory != nil {
		printMemory(w, r.Memory)
	}
}

// fields writes "name   value" lines.
type fields struct{ w io.Writer }

// fieldWidth is where the values begin.
const fieldWidth = 14

func (f fields) add(name, format string, a ...any) {
	fmt.Fprintf(f.w, "%-*s%s\n", fieldWidth, name, fmt.Sprintf(format, a...))
}

func printWay(w io.Writer, way vfio.Way, r *verify.Way, usable bool) {
	switch {
	case r.OK:
	case r.Exists:
		return // the reasons or the notes say why
	case usable:
		fmt.Fprintln(w, "\n"+wrapAt(fmt.Sprintf("By %s: not here: %s", way, *r.Error), 2))
		return
	default:
		return
	}

	fmt.Fprintln(w)
	fmt.Fprintf(w, "By %s: it works\n", way)
	f := fields{w}
	if r.AddressWidth != nil {
		f.add("  addresses", "%s (%d bits)", spanText(r.IOVARanges), *r.AddressWidth)
		f.add("  reserved", "%s", spanText(r.Reserved))
	}

	if r.PageSizes != nil {
		f.add("  page sizes", "%s", pageSizes(r.PageSizes))
	}
	if r.MappingsLeft != nil {
		f.add("  mappings", "%d more can be made", *r.MappingsLeft)
	}

	for _, t := range r.Mapping {
		f.add("  map", "%s in pages of %s: %s, unmap: %s", size(t.Size), size(t.PageSize),
			time.Duration(t.Map).Round(10*time.Microsecond), time.Duration(t.Unmap).Round(10*time.Microsecond))
	}

	if r.Interrupt != nil {
		f.add("  interrupt", "arrives")
	}
}

// pageSizes names sizes, and of powers of two that follow on each other the first and the last.
func pageSizes(sizes []uint64) string {
	var text []string
	for i := 0; i < len(sizes); i++ {
		first := i
		for i+1 < len(sizes) && sizes[i+1] == 2*sizes[i] {
			i++
		}
		switch i - first {
		case 0:
			text = append(text, size(sizes[i]))
		case 1:
			text = append(text, size(sizes[first]), size(sizes[i]))
		default:
			text = append(text, size(sizes[first])+" to "+size(sizes[i]))
		}
	}
	return strings.Join(text, ", ")
}

func spanText(spans []verify.Span) string {
	if len(spans) == 0 {
		return "none"
	}
	text := make([]string, len(spans))
	for i, s := range spans {
		text[i] = s.Start + "-" + s.End
	}
	return strings.Join(text, "\n"+strings.Repeat(" ", fieldWidth))
}

func printTables(w io.Writer, r *verify.Report) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "REGION\tSIZE\tACCESS\tMAPPABLE")
	for _, g := range r.Regions {
		access := ""
		for _, a := range []struct {
			has  bool
			name string
		}{{g.Read, "read"}, {g.Write, "write"}} {
			if a.has {
				access = strings.TrimPrefix(access+", "+a.name, ", ")
			}
		}
		mappable := "no"
		switch g.Mappable {
		case 0:
		case g.Size:
			mappable = "all"
		default:
			mappable = size(uint64(g.Mappable))
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", g.Name, size(uint64(g.Size)), access, mappable)
	}
	fmt.Fprintln(t, "\nINTERRUPT\tVECTORS\tMASKABLE\tENABLED")
	for _, i := range r.Interrupts {
		fmt.Fprintf(t, "%s\t%d\t%s\t%s\n", i.Name, i.Vectors, yesNo(i.Maskable),
			map[bool]string{false: "one by one", true: "all at once"}[i.Fixed])
	}
	_ = t.Flush() // w remembers
}

func yesNo(b bool) string { return map[bool]string{false: "no", true: "yes"}[b] }

func printAbilities(w io.Writer, r *verify.Report) {
	f := fields{w}
	reset := "not by itself"
	switch {
	case r.Reset.Worked != nil && *r.Reset.Worked:
		reset = "worked"
	case r.Reset.Error != nil:
		reset = "failed"
	}
	if len(r.Reset.Methods) > 0 {
		reset += " (" + strings.Join(r.Reset.Methods, ", ") + ")"
	}
	f.add("reset", "%s", reset)
	if len(r.Reset.Together) > 1 {
		f.add("hot reset", "resets %s", strings.Join(r.Reset.Together, ", "))
	}
	migration := ability(r.Migration.OK, r.Migration.Reason)
	if m := r.Migration; m.OK != nil && *m.OK && m.PreCopy != nil && *m.PreCopy {
		migration += ", also while it runs"
	}
	add := func(name, text string) { f.add(name, "%s", wrapAt(text, fieldWidth)) }
	add("migration", migration)
	add("dirty pages", "by the device: "+ability(r.DirtyTracking.Device.OK, r.DirtyTracking.Device.Reason))
	add("", "by the IOMMU: "+ability(r.DirtyTracking.IOMMU.OK, r.DirtyTracking.IOMMU.Reason))
}

// ability is yes, or no with the reason.
func ability(ok *bool, reason *string) string {
	word := "not known"
	if ok != nil {
		word = yesNo(*ok)
	}
	if reason != nil {
		return word + ": " + *reason
	}
	return word
}

func printMemory(w io.Writer, m *verify.Memory) {
	f := fields{w}
	if m.OK != nil {
		fits := map[bool]string{false: "cannot be mapped", true: "can be mapped"}[*m.OK]
		f.add("memory", "%s %s, at %s", size(m.Size), fits, spanText(m.Ranges))
	}
	if m.LockLimit != nil {
		f.add("lock limit", "%s", size(*m.LockLimit))
	}
	free := "none are free"
	for _, h := range m.HugePages {
		if h.Free > 0 {
			enough := map[bool]string{false: "not enough for it", true: "enough for it"}[h.Enough]
			f.add("huge pages", "%d of %s are free, which is %s", h.Free, size(h.Size), enough)
			free = ""
		}
	}
	if free != "" {
		f.add("huge pages", "%s", free)
	}
}

// columns is how wide lines for people are.
const columns = 79

// wrapAt breaks a text into lines, of which those after the first are indented, and the first one as if it was too.
func wrapAt(text string, indent int) string {
	var b strings.Builder
	at := indent
	for i, word := range strings.Fields(text) {
		switch {
		case i == 0:
		case at+1+len(word) > columns:
			b.WriteString("\n" + strings.Repeat(" ", indent))
			at = indent
		default:
			b.WriteByte(' ')
			at++
		}
		b.WriteString(word)
		at += len(word)
	}
	return b.String()
}
