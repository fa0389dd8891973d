package main

import (
	"bufio"
	"fmt"
	"io"
	"strings"

	"github.com/urfave/cli/v2"

	"viaduct/cmd/internal/doctor"
	"viaduct/cmd/internal/doctor/gather"
	"viaduct/iommu"
)

func doctorCommand(e *env) *cli.Command {
	return command(&cli.Command{
		Name:      "doctor",
		Usage:     "check whether this host is ready for passthrough",
		ArgsUsage: "[SELECTOR...]",
		Description: "Each check is passed, warned, failed or unknown, with the file that shows it\n" +
			"and what to do on this very host. With a SELECTOR the checks are about that\n" +
			"device too. The exit status is 1 only if a check failed. Run it as root: a\n" +
			"plain user may read neither the firmware's tables nor the kernel's log.\n\n" +
			"Examples:\n  viaduct doctor\n  viaduct doctor enp1s0\n  viaduct --host customer.tar.gz doctor --json",
		Flags:        []cli.Flag{e.jsonFlag()},
		BashComplete: e.completeSelectors,
		Action: func(c *cli.Context) error {
			selected, err := parseSelectors(c.Args().Slice())
			if err != nil {
				return err
			}
			return runDoctor(e, selected)
		},
	})
}

// doctorView is `doctor --json`.
type doctorView struct {
	Healthy bool        `json:"healthy"` // no check failed
	Checks  []checkView `json:"checks"`
}

type checkView struct {
	Name     string         `json:"name"`
	Title    string         `json:"title"`
	Status   doctor.Status  `json:"status"`
	Text     string         `json:"text"`
	Devices  []string       `json:"devices"`
	Evidence []evidenceView `json:"evidence"`
	Hint     *string        `json:"cure"`
}

type evidenceView struct {
	File  string  `json:"file"`
	Value *string `json:"value"` // null: the file is not there
}

func runDoctor(e *env, selectors []iommu.Selector) error {
	h, t, err := e.look()
	if err != nil {
		return err
	}
	defer h.Close()
	var selected []*iommu.Device
	for _, s := range selectors {
		devices, err := s.Resolve(h, t)
		if err != nil {
			return err
		}
		selected = append(selected, devices...)
	}
	facts, err := gather.Facts(h, t, selected)
	if err != nil {
		return err
	}

	checks := doctor.Examine(facts)
	if e.json {
		e.printJSON(doctorViewOf(checks))
	} else {
		e.printText(func(w *bufio.Writer) { printDoctor(w, checks) })
	}
	if !doctor.Healthy(checks) {
		return errUnusable
	}
	return nil
}

func doctorViewOf(checks []doctor.Check) doctorView {
	v := doctorView{Healthy: doctor.Healthy(checks), Checks: []checkView{}}
	for _, c := range checks {
		one := checkView{
			Name: c.Name, Title: c.Title, Status: c.Status, Text: c.Text, Devices: c.Devices, Hint: known(c.Hint),
			Evidence: []evidenceView{},
		}
		if one.Devices == nil {
			one.Devices = []string{}
		}
		for _, s := range c.Evidence {
			one.Evidence = append(one.Evidence, evidenceView{"/" + s.File, known(s.Value)})
		}
		v.Checks = append(v.Checks, one)
	}
	return v
}

// printDoctor begins with what is wrong.
func printDoctor(w io.Writer, checks []doctor.Check) {
	count := map[doctor.Status]int{}
	for _, status := range []doctor.Status{doctor.Failed, doctor.Warned, doctor.Unknown} {
		for i := range checks {
			if checks[i].Status == status {
				printCheck(w, &checks[i])
			}
		}
	}
	for i := range checks {
		count[checks[i].Status]++
		if c := &checks[i]; c.Status == doctor.Passed {
			fmt.Fprintln(w, hang(fmt.Sprintf("%-*s%s: %s", checkIndent, c.Status, c.Title, c.Text)))
		}
	}
	fmt.Fprintf(w, "\n%d failed, %d warned, %d unknown, %d passed\n", count[doctor.Failed], count[doctor.Warned],
		count[doctor.Unknown], count[doctor.Passed])
}

// checkIndent is where what belongs to a check is, below its status.
const checkIndent = 9

func printCheck(w io.Writer, c *doctor.Check) {
	fmt.Fprintln(w, hang(fmt.Sprintf("%-*s%s: %s", checkIndent, c.Status, c.Title, c.Text)))
	for i, s := range c.Evidence {
		if i == 3 {
			fmt.Fprintf(w, "%*ssee: and %d more (--json)\n", checkIndent, "", len(c.Evidence)-i)
			break
		}
		value := s.Value
		if value == "" {
			value = "not there"
		}
		fmt.Fprintln(w, hang(fmt.Sprintf("%*ssee: /%s: %s", checkIndent, "", s.File, value)))
	}
	if c.Hint != "" {
		fmt.Fprintln(w, hang(fmt.Sprintf("%*scure: %s", checkIndent, "", c.Hint)))
	}
}

// hang wraps a line, whose first word stands where it is, and the lines after it below its text.
func hang(line string) string {
	head := line[:checkIndent]
	return head + strings.TrimPrefix(wrapAt(line[checkIndent:], checkIndent), " ")
}
