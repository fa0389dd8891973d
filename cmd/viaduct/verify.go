package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"viaduct/cmd/internal/verify"
	"viaduct/iommu"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

type verifyOptions struct {
	selector iommu.Selector
	memory   string
	timeout  time.Duration
}

func verifyCommand(e *env) *cli.Command {
	var o verifyOptions
	return command(&cli.Command{
		Name:      "verify",
		Usage:     "open a device through VFIO to prove that a guest can use it",
		ArgsUsage: "SELECTOR",
		Description: "The device must be on a vfio driver (see `bind`) and nobody may have it open. viaduct opens it " +
			"through iommufd and through a container, as far as the kernel has them, which resets the device. " +
			"It maps and unmaps memory (at most 1 GiB, and a quarter of what is free), has the kernel signal an " +
			"interrupt, and tries a reset. With `--memory` it also checks whether the IOMMU can map the memory " +
			"of a guest of that size, whether this process may lock it, and whether there are huge pages for " +
			"it.\n\n" +
			"Exit status: 0 a guest can use the device; 1 it cannot, and the reasons are printed; 3 somebody " +
			"has it open.\n\n" +
			"Examples:\n  viaduct verify 0000:01:00.0\n" +
			"  viaduct verify enp1s0/vf0 --memory 16G\n" +
			"  viaduct verify 0000:01:00.0 --json | jq .usable",
		Flags: []cli.Flag{
			&cli.StringFlag{
				Name: "memory", Usage: "also check a guest with memory `SIZE` (e.g. 16G)",
				Destination: &o.memory,
			},
			&cli.DurationFlag{
				Name: "timeout", Usage: "wait this long for another viaduct", Value: bind.DefaultTimeout,
				Destination: &o.timeout,
			},
			e.jsonFlag(),
		},
		BashComplete: e.completeSelectors,
		Action: func(c *cli.Context) error {
			arg, err := oneArgument(c, "the device")
			if err != nil {
				return err
			}
			if o.selector, err = iommu.ParseArgument(arg); err != nil {
				return err
			}
			memory, err := parseSize(o.memory)
			if err != nil {
				return usagef("invalid --memory %s: want a size, e.g. 16G", o.memory)
			}
			if err := checkTimeout(o.timeout); err != nil {
				return err
			}
			return runVerify(c.Context, e, o, verify.Options{Memory: memory})
		},
	})
}

// verifyView is `verify --json`.
type verifyView struct {
	*verify.Report
	Plan []string `json:"plan"` // what would take the device from its home driver; null if it need not be taken
}

func runVerify(ctx context.Context, e *env, o verifyOptions, vo verify.Options) error {
	if e.hostName != "" && e.hostName != "/" {
		return usagef("%s is a captured host: viaduct cannot open its devices", e.hostName)
	}
	ctx, stop, on, err := e.beginLook(ctx, o.timeout)
	if err != nil {
		return err
	}
	defer stop()
	find := func() ([]*iommu.Device, error) {
		d, err := o.selector.One(on.handle.Host(), on.topology)
		if err != nil {
			return nil, err
		}
		if !d.PCI {
			return nil, usagef("%s is not a PCI device", d.Name)
		}
		return resetWith(on.topology, d), nil
	}
	found, err := find()
	if err != nil {
		return err
	}
	if !found[0].VFIO {
		return e.offer(ctx, found[0], o)
	}

	if found, err = on.lockFound(ctx, find); err != nil {
		return err
	}
	d := found[0]
	if !d.VFIO {
		return e.offer(ctx, d, o)
	}
	if err := refuseHeld(on.handle.Host(), found); err != nil {
		return err
	}
	report, err := verify.Run(ctx, on.handle.Host(), on.topology, d, vo)
	if err != nil {
		return err
	}
	return e.tellVerified(report)
}

// offer says that a device is not a guest's yet, and what would take it.
func (e *env) offer(ctx context.Context, d *iommu.Device, o verifyOptions) error {
	reason := "it has no driver"
	if d.Driver != "" {
		reason = "it is on " + d.Driver + ", which is not a vfio driver"
	}
	asJSON := e.json
	e.dryRun, e.json = true, true // nothing is printed
	views, err := e.bind(ctx, bindOptions{
		selectors: []iommu.Selector{o.selector}, driver: bind.Auto, changeOptions: changeOptions{timeout: o.timeout},
	})
	e.json = asJSON
	if err == nil {
		reason += ": viaduct bind " + d.Name + " takes it"
	} else {
		reason += ", and cannot be taken now: " + strings.ReplaceAll(err.Error(), "\n", "; ")
	}

	steps := []string{}
	for _, v := range views {
		steps = append(steps, v.Steps...)
	}
	if e.json {
		report := verify.NotTaken(d, reason)
		e.printJSON(verifyView{report, steps})
		return errUnusable
	}
	if err == nil {
		fmt.Fprintf(e.stdout, "# what viaduct bind %s would do:\n", d.Name)
		for _, s := range steps {
			fmt.Fprintln(e.stdout, s)
		}
	}
	return fmt.Errorf("verify %s: %s", d.Name, reason)
}

// resetWith are a device, which is the first, and those that feel it when it is opened: the rest of its group, and the
// VFs of a PF, which a reset makes anew.
func resetWith(t *iommu.Topology, d *iommu.Device) []*iommu.Device {
	out := []*iommu.Device{d}
	for _, one := range append(out, t.VFs(d)...) {
		all := []*iommu.Device{one}
		if g := t.GroupOf(one); g != nil {
			all = append(all, g.Endpoints()...)
		}
		for _, o := range all {
			if !slices.ContainsFunc(out, func(x *iommu.Device) bool { return x.Name == o.Name }) {
				out = append(out, o)
			}
		}
	}
	return out
}

// refuseHeld refuses to open a device, which is the first, as long as somebody has one of them, or has been given it.
func refuseHeld(h *iommu.Host, devices []*iommu.Device) error {
	holders, err := holder.Find(h, devices)
	refused := &holder.RefusedError{What: "open " + devices[0].Name, Hint: "verify it when nobody has it"}
	for _, h := range holders {
		if h.Kind.InUse() || h.Kind == holder.Lease {
			refused.Reasons = append(refused.Reasons, *h.Reason())
		}
	}
	if len(refused.Reasons) > 0 {
		return refused
	}
	return err
}

// errUnusable is the end of a command that has said why a device cannot go to a guest.
var errUnusable = errors.New("")

func (e *env) tellVerified(r *verify.Report) error {
	if e.json {
		e.printJSON(verifyView{r, nil})
	} else {
		e.printText(func(w *bufio.Writer) { printVerified(w, r) })
	}
	if !r.Usable {
		return errUnusable
	}
	return nil
}
