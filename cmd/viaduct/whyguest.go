package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"

	"viaduct/cmd/internal/checklist"
	"viaduct/cmd/internal/lease"
	"viaduct/iommu"
)

// isGuest reports whether a guest of that name has a lease, as far as that may be known.
func isGuest(e *env, name string) (bool, error) {
	if lease.CheckGuest(name) != nil {
		return false, nil
	}
	h, err := e.open()
	if err != nil {
		return false, err
	}
	defer h.Close()
	l, err := lease.BookOf(h).Get(name)
	if errors.Is(err, fs.ErrPermission) {
		return false, nil
	}
	return l != nil, err
}

// deviceNamed is the first device that a selector names; nil if it is no selector, or names none.
func deviceNamed(e *env, sel iommu.Selector, wrong error) (*iommu.Device, error) {
	if wrong != nil {
		return nil, nil
	}
	h, t, err := e.look()
	if err != nil {
		return nil, err
	}
	defer h.Close()
	all, err := sel.Resolve(h, t)
	if errors.Is(err, iommu.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return all[0], nil
}

// guestView is `why guest=NAME --json`.
type guestView struct {
	Guest   string     `json:"guest"`
	Devices []string   `json:"devices"`
	Lines   []lineView `json:"lines"`
}

type lineView struct {
	Name     string           `json:"name"`
	Device   *string          `json:"device"`
	Answer   checklist.Answer `json:"answer"`
	Text     string           `json:"text"`
	Evidence []evidenceView   `json:"evidence"`
	Hint     *string          `json:"cure"`
}

func runWhyGuest(e *env, name string, memory uint64) error {
	if err := lease.CheckGuest(name); err != nil {
		return usageError{err}
	}

	stop, s, err := e.openLook()
	if err != nil {
		return err
	}
	defer stop()
	m, err := lease.New(s, lease.Options{})
	if err != nil {
		return err
	}

	l, err := m.Book.Get(name)
	if err != nil {
		return err
	}
	if l == nil {
		return noGuest(m.Book, name)
	}

	lines, err := checklist.Guest(m, l, checklist.Options{Memory: memory})
	if err != nil {
		return err
	}
	if e.json {
		e.printJSON(viewGuest(l, lines))
	} else {
		e.printText(func(w *bufio.Writer) { printGuest(w, l, lines) })
	}
	return nil
}

// noGuest says which guests there are instead.
func noGuest(b *lease.Book, name string) error {
	all, err := b.All()
	if err != nil {
		return err
	}
	var names []string
	for _, l := range all {
		names = append(names, l.Guest)
	}
	slices.Sort(names)
	if len(names) == 0 {
		return fmt.Errorf("no guest %q has devices assigned, and none other has (viaduct assign)", name)
	}
	return fmt.Errorf("no guest %q has devices assigned; these have: %s", name, strings.Join(names, ", "))
}

func viewGuest(l *lease.Lease, lines []checklist.Line) guestView {
	v := guestView{Guest: l.Guest, Devices: []string{}, Lines: []lineView{}}
	for _, d := range l.Devices {
		v.Devices = append(v.Devices, d.Address.String())
	}
	for _, line := range lines {
		one := lineView{
			Name: line.Name, Device: known(line.Device), Answer: line.Answer, Text: line.Text, Hint: known(line.Hint),
			Evidence: []evidenceView{},
		}
		for _, s := range line.Evidence {
			one.Evidence = append(one.Evidence, evidenceView{"/" + s.File, known(s.Value)})
		}
		v.Lines = append(v.Lines, one)
	}
	return v
}

// printGuest tells first how the list ends, then what is missing, and then the rest, from the firmware to the VMM.
func printGuest(w io.Writer, l *lease.Lease, lines []checklist.Line) {
	count := map[checklist.Answer]int{}
	for i := range lines {
		count[lines[i].Answer]++
	}
	fmt.Fprintf(w, "guest %s: %d no, %d unknown, %d ok\n\n", l.Guest, count[checklist.No], count[checklist.Unknown],
		count[checklist.OK])
	sorted := slices.Clone(lines)
	slices.SortStableFunc(sorted, func(a, b checklist.Line) int {
		missing := map[bool]int{true: -1}
		return missing[a.Answer == checklist.No] - missing[b.Answer == checklist.No]
	})
	for i := range sorted {
		line := &sorted[i]
		what := line.Name
		if line.Device != "" {
			what = line.Device + " " + what
		}
		fmt.Fprintln(w, hang(fmt.Sprintf("%-*s%s: %s", checkIndent, line.Answer, what, line.Text)))
		for _, s := range line.Evidence {
			value := s.Value
			if value == "" {
				value = "not there"
			}
			fmt.Fprintln(w, hang(fmt.Sprintf("%*ssee: /%s: %s", checkIndent, "", s.File, value)))
		}
		if line.Hint != "" {
			fmt.Fprintln(w, hang(fmt.Sprintf("%*scure: %s", checkIndent, "", line.Hint)))
		}
	}
}
