package main

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"viaduct/cmd/internal/declared"
	"viaduct/cmd/internal/hostfile"
	"viaduct/cmd/internal/terminal"
	"viaduct/iommu"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// preview is what would be done: in words, and as the writes that --steps prints instead.
type preview struct {
	words  terminal.Table
	script []string // a shell's; what is said of the commands is in comments
	writes int      // or whatever what says
	what   string
}

// line is one of the words: what it is of is in bold, above what is said of it.
func (p *preview) line(hang int, style terminal.Style, text string) {
	p.words.Rows = append(p.words.Rows, terminal.Row{Line: text, Style: style, Hang: hang})
}

// of begins what is said of something.
func (p *preview) of(text string) { p.line(2, terminal.Bold, text) }

// says is what is said of it.
func (p *preview) says(texts ...string) {
	for _, text := range texts {
		p.line(4, terminal.Plain, "  "+text)
	}
}

// note is what one should know of it. What follows the steps is of interest only below them.
func (p *preview) note(notes ...string) {
	for _, n := range notes {
		if !followsSteps(n) {
			p.line(4, terminal.Dim, "  note: "+n)
		}
	}
	p.comment(notes...)
}

// comment is said among the writes only.
func (p *preview) comment(texts ...string) {
	for _, text := range texts {
		p.script = append(p.script, "# "+text)
	}
}

// does are the next writes.
func (p *preview) does(commands ...string) {
	p.script, p.writes = append(p.script, commands...), p.writes+len(commands)
}

// preview prints one, in words unless the writes are asked for.
func (e *env) preview(p *preview) {
	if e.steps {
		for _, line := range p.script {
			fmt.Fprintln(e.stdout, line)
		}
		return
	}
	if p.writes > 0 {
		p.line(0, terminal.Dim, "--steps prints the "+count1(p.writes, cmp.Or(p.what, "write")))
	}
	e.print(&p.words)
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

// previewItems is what a plan of declared items says: how many of each, what is refused and why, and what changes.
func previewItems(items []*declared.Item) *preview {
	p := &preview{}
	count := map[declared.State]int{}
	for _, i := range items {
		count[i.State]++
	}
	var counts []string
	for _, s := range stateOrder {
		if n := count[s.state]; n > 0 {
			counts = append(counts, fmt.Sprintf("%d %s", n, s.words))
		}
	}
	if files := strings.Join(filesOf(items), ", "); files != "" {
		p.comment("declared in " + files)
		p.of(files + ": " + strings.Join(counts, ", "))
	} else if len(items) > 0 {
		p.of(strings.Join(counts, ", "))
	}

	said := map[string]bool{}
	for _, i := range items {
		if i.Err == nil || i.State == declared.OK {
			continue
		}
		for _, why := range reasonsOf(i.Err) {
			why = strings.TrimPrefix(why, i.Name+": ")
			if !said[why] {
				text := fmt.Sprintf("%s %s: %s", i.State, itemName(i), why)
				p.line(4, styleOf(i), text)
				p.comment(text)
			}
			said[why] = true
		}
	}
	for _, i := range items {
		if i.State != declared.Differs {
			continue
		}
		p.of(itemName(i))
		p.comment(itemName(i))
		p.says(i.Words()...)
		p.does(bind.Commands(i.Steps)...)
		p.note(i.Notes...)
	}
	return p
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
		if r.Hint != "" {
			text += " (" + r.Hint + ")"
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
func (e *env) statusWords(items []*declared.Item, verbose bool) {
	if len(items) == 0 {
		e.note(
			"nothing is declared in /%s or /%s: viaduct adopt writes a file that describes this host",
			hostfile.File,
			hostfile.Dir,
		)
		return
	}

	t := &terminal.Table{
		Shrink: []terminal.Shrink{{Column: 3, Least: 20}, {Column: 2, Least: 14}, {Column: 3, Least: 8}},
	}

	head := terminal.Cells("STATE", "DEVICE", "DECLARED AS", "WHAT")
	if verbose {
		// Which stands below each.
		head.Cells = head.Cells[:3]
	}
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
			row.Cells = row.Cells[:3]
		}
		t.Rows = append(t.Rows, row)
		for _, w := range words {
			if verbose {
				t.Rows = append(t.Rows, terminal.Row{Line: "    " + w, Hang: 6})
			}
		}
	}

	e.print(t)
}

// unmanagedText is why a device that is not declared is named.
func unmanagedText(d *iommu.Device) string {
	if d.SRIOV != nil && len(d.SRIOV.VFs) > 0 {
		return "has " + count(len(d.SRIOV.VFs), "VF") + " and is not declared"
	}
	return "is on " + d.Driver + " and is not declared"
}

// followsSteps reports whether a note says what is done behind the last of the steps, which is of interest only below
// them.
func followsSteps(note string) bool { return strings.HasPrefix(note, "then ") }

// previewMove is where devices would go: those of the units of a job that are not refused.
func previewMove(goal bind.Goal, job *bind.Job, results []bind.Result, asked []*iommu.Device) *preview {
	verb := "takes"
	if goal == bind.GiveBack() {
		verb = "gives back"
	}
	p := &preview{}
	by := map[string]bind.Result{}
	for _, r := range results {
		by[r.Name] = r
		text := r.Name + ": " + moveText(&r.Change)
		if r.Role == iommu.RoleCompanion {
			text += ", as a companion: viaduct only keeps it off the host's drivers"
		}
		p.comment(text)
		p.does(bind.Commands(bind.Actions(r.Steps))...)
	}

	vfs := map[string][]int{}
	for _, v := range job.Units {
		if v.Refused != nil {
			continue
		}
		if d := v.Unit[0]; len(v.Unit) == 1 && d.PhysFn != nil {
			r := by[d.Name]
			what := " of " + d.PhysFn.String() + ": " + moveText(&r.Change)
			vfs[what] = append(vfs[what], d.VFIndex)
			continue
		}
		var named []*iommu.Device
		for _, d := range v.Unit {
			if slices.Contains(asked, d) {
				r := by[d.Name]
				named = append(named, d)
				p.of(d.Name + ": " + moveText(&r.Change))
			}
		}
		p.says(declared.Along(verb, v.Unit, named...)...)
	}
	for _, what := range slices.Sorted(maps.Keys(vfs)) {
		p.of(terminal.Fold("vf", vfs[what]) + what)
	}
	return p
}

// moveText is where a device goes.
func moveText(c *bind.Change) string {
	from, to := driverText(known(c.From)), driverText(known(c.To))
	if c.To == bind.None {
		to = driverText(nil)
	}
	if len(c.Steps) == 0 {
		return "on " + to + " already"
	}
	if from == to {
		return "stays on " + to
	}
	return from + " -> " + to
}
