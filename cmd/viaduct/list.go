package main

import (
	"bufio"
	"errors"
	"runtime/debug"
	"slices"
	"strings"
	"sync"

	"github.com/urfave/cli/v2"

	"viaduct/iommu"
	"viaduct/vfio/holder"
)

type listOptions struct {
	tree, all, holders, wide bool
	selectors                []iommu.Selector
}

func listCommand(e *env) *cli.Command {
	var o listOptions
	var output string
	return command(&cli.Command{
		Name:      "list",
		Usage:     "list the IOMMU groups and their devices",
		Aliases:   []string{"ls"},
		ArgsUsage: "[SELECTOR...]",
		Description: "An IOMMU group is the smallest set of devices that a guest can be given. The heading of a " +
			"group says how many devices `bind` takes off the host's drivers with it, which is not an error. USED BY " +
			"shows what a quick look finds: guests, file systems, routes, addresses and the display.\n\n" +
			"Examples:\n  viaduct list\n" +
			"  viaduct list gpu\n" +
			"  viaduct list class=0200 -o wide\n" +
			"  viaduct list --tree\n" +
			"  viaduct list --json | jq '.groups[] | select(.viable)'",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "tree", Usage: "draw the PCI topology instead of groups", Destination: &o.tree},
			&cli.BoolFlag{
				Name: "all", Aliases: []string{"a"}, Destination: &o.all,
				Usage: "also bridges and the host's own devices, and each VF by itself",
			},
			&cli.BoolFlag{
				Name: "holders", Destination: &o.holders,
				Usage: "also the processes that have a device open, which takes a look at every process",
			},
			e.outputFlag(&output), e.jsonFlag(),
		},
		BashComplete: e.completeSelectors,
		Action: func(c *cli.Context) (err error) {
			if o.selectors, err = parseSelectors(c.Args().Slice()); err != nil {
				return err
			}
			if o.wide, err = e.parseOutput("list", output); err != nil {
				return err
			}
			if o.tree && e.json {
				return usagef("list: --tree and --json cannot be combined")
			}
			return runList(e, o)
		},
	})
}

// outputFlag is -o of a command that prints a list.
func (e *env) outputFlag(to *string) cli.Flag {
	return &cli.StringFlag{
		Name: "output", Aliases: []string{"o"}, Destination: to,
		Usage: "print `wide|json`: wide is one line for each device with its numbers, and marks the host's drivers " +
			"with *",
	}
}

// parseOutput reads the value of that flag.
func (e *env) parseOutput(command, output string) (wide bool, err error) {
	switch output {
	case "json":
		e.json = true
	case "", "wide":
	default:
		return false, usagef("%s: invalid output %q: want wide or json", command, output)
	}
	return output == "wide", nil
}

func runList(e *env, o listOptions) error {
	// The process ends with the list, and on a host of thousands of devices most of what it has read is still in use.
	debug.SetGCPercent(400)
	h, t, err := e.look()
	if err != nil {
		return err
	}
	defer h.Close()
	keep, err := selection(h, t, o.selectors)
	if err != nil {
		return err
	}
	names := iommu.OpenNames(h)
	defer names.Close()

	switch {
	case e.json || o.wide:
		e.printText(func(w *bufio.Writer) {
			switch {
			case e.json:
				writeList(w, t, names, keep)
			case o.tree:
				err = writeTree(w, h, t, names, keep)
			default:
				writeTable(w, listRows(t, names, keep))
			}
		})
	default:
		err = e.printList(h, t, names, keep, o)
	}
	if err != nil || e.json {
		return err
	}
	e.tellEmpty(h, t)
	return nil
}

// tellEmpty says why a list shows no groups, or nothing.
func (e *env) tellEmpty(h *iommu.Host, t *iommu.Topology) {
	switch {
	case len(t.Groups)+len(t.Ungrouped) == 0:
		e.note("this host has no PCI devices")
	case len(t.Groups) == 0 && t.LateGroups():
		e.note("no device is in a group yet: here one gets its group when a driver is first bound to it (viaduct bind)")
	case len(t.Groups) == 0:
		e.note("no IOMMU is active on this host, so no device is in a group: %s", iommu.WhyOff(h, t))
	}
}

// selection is the set of devices the selectors name; nil without selectors, which means all.
func selection(h *iommu.Host, t *iommu.Topology, sel []iommu.Selector) (map[string]bool, error) {
	if len(sel) == 0 {
		return nil, nil
	}
	keep := map[string]bool{}
	for _, s := range sel {
		devices, err := s.Resolve(h, t)
		if err != nil {
			return nil, err
		}
		for _, d := range devices {
			keep[d.Name] = true
		}
	}
	return keep, nil
}

// printList is the list for people.
func (e *env) printList(h *iommu.Host, t *iommu.Topology, names *iommu.Names, keep map[string]bool,
	o listOptions) error {
	s := &sight{t: t, names: names, keep: keep, all: o.all}
	var named sync.WaitGroup
	if len(t.Groups)+len(t.Ungrouped) > 16 {
		// Beside the look at uses, which waits for the kernel. For a few, a second thread costs more than it brings.
		named.Go(s.learnNames)
	}
	var open []holder.Holder
	var err error
	if o.holders {
		open, err = e.processesOf(h, t, keep)
	}
	s.uses = e.usesOf(h, t, open)
	named.Wait()
	if err != nil {
		return err
	}
	if !o.tree {
		e.print(s.groups())
		return nil
	}
	parents, err := iommu.Parents(h, t)
	if err != nil {
		return err
	}
	e.print(s.tree(parents))
	return nil
}

// usesOf are the uses of devices that a list shows, and more, by the devices' names. That some may not be seen is told.
func (e *env) usesOf(h *iommu.Host, t *iommu.Topology, more []holder.Holder) map[string][]holder.Holder {
	found, err := holder.Glance(h, t)
	if err != nil {
		// A broken file of another tool keeps nobody from seeing the devices.
		e.note("some uses are not shown: %s", strings.ReplaceAll(err.Error(), "\n", "; "))
	}

	uses := map[string][]holder.Holder{}
	for _, u := range append(found, more...) {
		same := func(other holder.Holder) bool { return other.Kind == u.Kind && other.Brief == u.Brief }
		if !slices.ContainsFunc(uses[u.Device], same) {
			uses[u.Device] = append(uses[u.Device], u)
		}
	}
	return uses
}

// processesOf are the processes that have devices of a list open. That some may not be seen is told.
func (e *env) processesOf(h *iommu.Host, t *iommu.Topology, keep map[string]bool) ([]holder.Holder, error) {
	var devices []*iommu.Device
	t.All(func(d *iommu.Device) bool {
		if keep == nil || keep[d.Name] {
			devices = append(devices, d)
		}
		return true
	})
	open, err := holder.Processes(h, devices)
	if errors.Is(err, holder.ErrBlind) {
		e.note("some processes are not shown: %v", err)
		return open, nil
	}
	return open, err
}
