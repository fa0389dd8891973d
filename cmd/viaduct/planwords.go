package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"viaduct/cmd/internal/declared"
	"viaduct/cmd/internal/hostfile"
	"viaduct/cmd/internal/terminal"
	"viaduct/iommu"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// This file is what plans say in words; with --steps they print the writes instead.

func (e *env) stepsFlag(of string) cli.Flag {
	return &cli.BoolFlag{
		Name: "steps", Usage: "print the writes " + of + " as shell commands, in their order", Destination: &e.steps,
	}
}

// stateOrder is the order in which a plan counts the states of its items, and their styles.
var stateOrder = []struct {
	state declared.State
	words string
	style terminal.Style
}{
	{declared.Refused, "refused", terminal.Bad}, {declared.Changed, "changed since", terminal.Bad},
	{
		declared.Missing,
		"missing",
		terminal.Bad,
	}, {declared.Unknown, "unknown", terminal.Warn}, {declared.Differs, "to change", terminal.Warn},
	{declared.OK, "as declared", terminal.Good}, {declared.Unmanaged, "unmanaged", terminal.Plain},
}

func styleOf(i *declared.Item) terminal.Style {
	for _, s := range stateOrder {
		if s.state == i.State && i.Wrong() == (s.style != terminal.Good && s.style != terminal.Plain) {
			return s.style
		}
	}
	return terminal.Plain
}

// planWords prints a plan in words: how many of each, what is refused and why, and what changes.
func (e *env) planWords(items []*declared.Item) error {
	t := &terminal.Table{}
	line := func(hang int, style terminal.Style, format string, a ...any) {
		t.Rows = append(t.Rows, terminal.Row{Line: fmt.Sprintf(format, a...), Style: style, Hang: hang})
	}
	count, writes := map[declared.State]int{}, 0
	for _, i := range items {
		count[i.State]++
		writes += len(i.Steps)
	}
	var counts []string
	for _, s := range stateOrder {
		if n := count[s.state]; n > 0 {
			counts = append(counts, fmt.Sprintf("%d %s", n, s.words))
		}
	}
	if len(items) > 0 {
		of := strings.Join(filesOf(items), ", ")
		line(2, terminal.Bold, "%s", strings.TrimPrefix(of+": "+strings.Join(counts, ", "), ": "))
	}

	said := map[string]bool{}
	for _, i := range items {
		if i.Err == nil || i.State == declared.OK {
			continue
		}
		for _, why := range reasonsOf(i.Err) {
			why = strings.TrimPrefix(why, i.Name+": ")
			if !said[why] {
				line(4, styleOf(i), "%s %s: %s", i.State, itemName(i), why)
			}
			said[why] = true
		}
	}
	for _, i := range items {
		if i.State != declared.Differs {
			continue
		}
		line(2, terminal.Bold, "%s", itemName(i))
		for _, words := range i.Words() {
			line(4, terminal.Plain, "  %s", words)
		}
		for _, n := range i.Notes {
			if !followsSteps(n) {
				line(4, terminal.Dim, "  note: %s", n)
			}
		}
	}
	if writes > 0 {
		line(0, terminal.Dim, "--steps prints the %s", count1(writes, "write"))
	}
	return e.screen.Print(t)
}

// count1 is a number of things behind an article: write, 2 writes.
func count1(n int, what string) string {
	if n == 1 {
		return what
	}
	return count(n, what)
}

// reasonsOf are the reasons of an error, each by itself with what can be done about it.
func reasonsOf(err error) []string {
	var out []string
	for _, r := range holder.Reasons(err) {
		text := r.Text
		if r.Cure != "" {
			text += " (" + r.Cure + ")"
		}
		if !slices.Contains(out, text) {
			out = append(out, text)
		}
	}
	if len(out) == 0 {
		out = strings.Split(err.Error(), "\n")
	}
	return out
}

// statusWords prints one line for each item, and with verbose what is different.
func (e *env) statusWords(items []*declared.Item, verbose bool) error {
	if len(items) == 0 {
		e.note(
			"nothing is declared in /%s or /%s: viaduct adopt writes a file that describes this host",
			hostfile.File,
			hostfile.Dir,
		)
		return nil
	}

	t := &terminal.Table{
		Shrink: []terminal.Shrink{{Column: 3, Least: 20}, {Column: 2, Least: 14}, {Column: 3, Least: 8}},
	}

	head := terminal.Cells("STATE", "DEVICE", "DECLARED AS", "WHAT")
	for n := range head.Cells {
		head.Cells[n].Style = terminal.Bold
	}

	t.Rows = append(t.Rows, head)
	for _, i := range items {
		words := i.Words()
		if i.Err != nil {
			words = reasonsOf(i.Err)
		} else if i.State == declared.OK {
			// A plan says nothing of these.
			words = i.Notes
		} else if i.State == declared.Unmanaged {
			words = []string{unmanagedText(i.Device)}
		}
		row := terminal.Cells(string(i.State), "", i.Name, strings.Join(words, "; "))
		row.Cells[0].Style = styleOf(i)
		if i.Device != nil {
			row.Cells[1].Text = i.Device.Name
		}
		if i.State == declared.Unmanaged {
			row.Cells[2].Text = ""
		}
		if verbose {
			row.Cells[3].Text = ""
		}
		t.Rows = append(t.Rows, row)
		for _, w := range words {
			if verbose {
				t.Rows = append(t.Rows, terminal.Row{Line: "    " + w, Hang: 6})
			}
		}
	}

	return e.screen.Print(t)
}

// unmanagedText is why a device that is not declared is named.
func unmanagedText(d *iommu.Device) string {
	if d.SRIOV != nil && len(d.SRIOV.VFs) > 0 {
		return "has " + count(len(d.SRIOV.VFs), "VF") + " and is not declared"
	}
	return "is on " + d.Driver + " and is not declared"
}

// followsSteps reports whether a note says what is done behind the last of the steps, which is of interest only below them.
func followsSteps(note string) bool { return strings.HasPrefix(note, "then ") }

// moveWords prints where devices would go, in words: the units of a job that are not refused.
func (e *env) moveWords(goal bind.Goal, job *bind.Job, results []bind.Result, asked []*iommu.Device) error {
	verb := "takes"
	if goal == bind.GiveBack() {
		verb = "gives back"
	}
	t := &terminal.Table{}
	line := func(hang int, style terminal.Style, text string) {
		t.Rows = append(t.Rows, terminal.Row{Line: text, Style: style, Hang: hang})
	}
	by := map[string]bind.Result{}
	writes := 0
	for _, r := range results {
		by[r.Name] = r
		writes += len(r.Steps)
	}

	vfs := map[string][]int{}
	for _, v := range job.Units {
		if v.Refused != nil {
			continue
		}
		if d := v.Unit[0]; len(v.Unit) == 1 && d.PhysFn != nil {
			what := " of " + d.PhysFn.String() + ": " + moveText(by[d.Name])
			vfs[what] = append(vfs[what], d.VFIndex)
			continue
		}
		var named []*iommu.Device
		for _, d := range v.Unit {
			if slices.Contains(asked, d) {
				named = append(named, d)
				line(2, terminal.Bold, d.Name+": "+moveText(by[d.Name]))
			}
		}
		for _, words := range declared.Along(verb, v.Unit, named...) {
			line(4, terminal.Plain, "  "+words)
		}
	}
	for _, what := range slices.Sorted(maps.Keys(vfs)) {
		line(2, terminal.Bold, terminal.Fold("vf", vfs[what])+what)
	}
	if writes > 0 {
		line(0, terminal.Dim, "--steps prints the "+count1(writes, "write"))
	}
	return e.screen.Print(t)
}

// moveText is where a device goes.
func moveText(r bind.Result) string {
	v := viewChange(r)
	if len(r.Steps) == 0 {
		return "on " + driverText(v.To) + " already"
	}
	if driverText(v.From) == driverText(v.To) {
		return "stays on " + driverText(v.To)
	}
	return driverText(v.From) + " -> " + driverText(v.To)
}
