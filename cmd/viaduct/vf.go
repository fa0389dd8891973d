package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"viaduct/cmd/internal/declared"
	"viaduct/cmd/internal/hostfile"
	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/holder"
)

func vfCommand(e *env) *cli.Command {
	return command(&cli.Command{
		Name:  "vf",
		Usage: "virtual functions: list, create, destroy, set, get, sync",
		Subcommands: []*cli.Command{
			vfListCommand(e), vfCreateCommand(e), vfDestroyCommand(e), vfSetCommand(e), vfGetCommand(e),
			vfSyncCommand(e),
		},
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return unknownCommand(c.Command.Subcommands, c.Args().First(), "viaduct vf")
			}
			return cli.ShowSubcommandHelp(c)
		},
	})
}

func vfListCommand(e *env) *cli.Command {
	var output string
	return command(&cli.Command{
		Name: "list", Aliases: []string{"ls"},
		Usage:        "the PFs and their VFs",
		ArgsUsage:    "[PF...]",
		Description:  "Examples:\n  viaduct vf list\n  viaduct vf list enp1s0 --json",
		Flags:        []cli.Flag{e.outputFlag(&output), e.jsonFlag()},
		BashComplete: e.completePFs,
		Action: func(c *cli.Context) error {
			sel, err := parseSelectors(c.Args().Slice())
			if err != nil {
				return err
			}
			wide, err := e.parseOutput("vf list", output)
			if err != nil {
				return err
			}
			return runVFList(e, sel, wide)
		},
	})
}

type createOptions struct {
	pfs     []iommu.Selector
	count   int
	vf      sriov.VFWish // each
	wish    sriov.Wish
	force   []holder.Kind
	timeout time.Duration
}

// countFlags are what create and destroy have in common.
func (o *createOptions) countFlags(e *env) []cli.Flag {
	return append([]cli.Flag{
		forceFlag("a VF that goes"),
		&cli.DurationFlag{
			Name:        "timeout",
			Usage:       "wait this long for one write, and for another viaduct",
			DefaultText: "30s, and 1s for each VF",
			Destination: &o.timeout,
		},
		e.jsonFlag(),
	}, e.dryRunFlags()...)
}

func (o *createOptions) parse(c *cli.Context) (err error) {
	if o.force, err = parseKinds(c.StringSlice("force")); err != nil {
		return err
	}
	if c.IsSet("timeout") {
		if err := checkTimeout(o.timeout); err != nil {
			return err
		}
	}
	return nil
}

func vfCreateCommand(e *env) *cli.Command {
	var driver string
	var o createOptions
	return command(&cli.Command{
		Name:      "create",
		Usage:     "set the number of VFs of a PF to N",
		ArgsUsage: "PF... N [KEY=VALUE...]",
		Description: "N is the total afterwards: with 2 VFs there, `viaduct vf create enp1s0 4` ends with 4. The " +
			"kernel removes all VFs before it makes another number of them; viaduct refuses that (exit status 3) " +
			"while one is in use.\n\n" +
			"With `--driver none`, the default, the VFs have no driver until `bind`; the host's own driver " +
			"never gets them. With `vfio` they go to a vfio driver at once, with `home` to the host's driver, " +
			"and with the name of a vfio driver to that one. viaduct brings up a PF that is down, without an " +
			"address. VFs of an NVMe controller get equal shares of its queues and interrupts and are set " +
			"online. Settings, as `vf set` takes them, are made before a VF has a driver.\n\n" +
			"Examples:\n  viaduct vf create enp1s0 4\n" +
			"  viaduct vf create 0000:01:00.0 7 --driver vfio\n" +
			"  viaduct vf create enp1s0 4 --dry-run\n" +
			"  viaduct vf create enp1s0 enp2s0 7 mac=stable vlan=100+index --driver vfio\n" +
			"  viaduct vf create enp1s0np0 8 --eswitch switchdev --mtu 9000",
		Flags: append([]cli.Flag{
			&cli.StringFlag{
				Name:        "driver",
				Usage:       "bind the VFs to `none|vfio|home|NAME`",
				Value:       string(sriov.UseNone),
				Destination: &driver,
			},
			&cli.IntFlag{
				Name:        "mtu",
				Usage:       "raise the PF's MTU to `N` where it is lower, so that the VFs can have it",
				Destination: &o.wish.MTU,
			},
			&cli.StringFlag{
				Name: "eswitch",
				Usage: "the mode of the PF's e-switch: `legacy|switchdev`, set where the driver needs it: " +
					"before the VFs or after",
				Destination: &o.wish.Eswitch.Mode,
			},
			&cli.StringFlag{
				Name:        "inline-mode",
				Usage:       "of the e-switch: `none|link|network|transport`",
				Destination: &o.wish.Eswitch.Inline,
			},
			&cli.StringFlag{
				Name:        "hw-tc-offload",
				Usage:       "let the NIC carry out the rules of the e-switch: `on|off`",
				Destination: &o.wish.Offload,
			},
			&cli.StringFlag{Name: "encap", Usage: "of the e-switch: `none|basic`", Destination: &o.wish.Eswitch.Encap},
		}, o.countFlags(e)...),
		BashComplete: e.completePFs,
		Action: func(c *cli.Context) error {
			err := o.parse(c)
			if err != nil {
				return err
			}
			words := c.Args().Slice()
			at := slices.IndexFunc(words,
				func(w string) bool { n, err := strconv.Atoi(w); return err == nil && n >= 0 })
			switch {
			case at < 0 && len(words) == 2:
				return usagef("vf create: invalid number of VFs %q", words[1])
			case at < 1:
				return usagef("vf create: want a PF and a number of VFs, e.g. enp1s0 4")
			}

			if o.pfs, err = parseSelectors(words[:at]); err != nil {
				return err
			}
			if o.count, _ = strconv.Atoi(words[at]); o.count > 65535 {
				return usagef("vf create: %s VFs are more than any PF can have (65535)", words[at])
			}
			settings, err := hostfile.ParseValues(words[at+1:])
			if err != nil {
				return usagef("vf create: %w", err)
			}
			if o.count == 0 && len(settings) > 0 {
				return usagef("vf create: no VFs, and settings for them")
			}

			if o.vf.Use, err = sriov.ParseUse(driver); err != nil {
				return usagef("vf create: --driver %s: %w", driver, err)
			}
			for _, f := range []struct {
				flag, value string
				all         []string
			}{
				{"eswitch", o.wish.Eswitch.Mode, sriov.EswitchModes()},
				{"inline-mode", o.wish.Eswitch.Inline, sriov.InlineModes()},
				{"encap", o.wish.Eswitch.Encap, sriov.EncapModes()},
				{"hw-tc-offload", o.wish.Offload, []string{"on", "off"}},
			} {
				if c.IsSet(f.flag) && !slices.Contains(f.all, f.value) {
					return usagef("vf create: --%s is %s, not %q", f.flag, strings.Join(f.all, " or "), f.value)
				}
			}

			if c.IsSet("mtu") && (o.wish.MTU < 68 || o.wish.MTU > 65535) {
				return usagef("vf create: --mtu is a number from 68 to 65535, not %d", o.wish.MTU)
			}
			if o.wish.VFs, err = wishes(o.count, o.vf, settings); err != nil {
				return usagef("vf create: %w", err)
			}
			return runVFCount(c.Context, e, o)
		},
	})
}

// wishes are what each of so many VFs is to be.
func wishes(count int, vf sriov.VFWish, settings hostfile.Values) ([]sriov.VFWish, error) {
	out := sriov.Repeat(count, vf)
	for i := range out {
		var err error
		if out[i].Settings, err = settings.Of(i); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func vfDestroyCommand(e *env) *cli.Command {
	var o createOptions
	return command(&cli.Command{
		Name:      "destroy",
		Usage:     "remove all VFs of a PF",
		ArgsUsage: "PF...",
		Description: "viaduct refuses this, with exit status 3, while a VF is in use.\n\n" +
			"Examples:\n  viaduct vf destroy enp1s0",
		Flags:        o.countFlags(e),
		BashComplete: e.completePFs,
		Action: func(c *cli.Context) error {
			var err error
			if o.pfs, err = selectors(c); err != nil {
				return err
			}
			if err := o.parse(c); err != nil {
				return err
			}
			return runVFCount(c.Context, e, o)
		},
	})
}

// countView is what `vf create --json` and `vf destroy --json` print.
type countView struct {
	PF      string      `json:"pf"`
	From    int         `json:"from"`
	To      int         `json:"to"`
	Total   int         `json:"total"`
	Changed bool        `json:"changed"`
	Steps   []string    `json:"steps"`
	Writes  []writeView `json:"writes"`
	Notes   []string    `json:"notes"`
}

// runVFCount is create and destroy: both set the number of VFs. All PFs are planned and asked for before the first is
// changed.
func runVFCount(ctx context.Context, e *env, o createOptions) error {
	ctx, stop, c, err := e.beginChange(ctx, o.timeout)
	if err != nil {
		return err
	}
	defer stop()
	pfs, err := c.lockPFs(ctx, o.pfs)
	if err != nil {
		return err
	}

	plans, victims, err := c.planCounts(pfs, o.wish)
	if err != nil {
		return err
	}
	if len(victims) > 0 {
		if err := c.lock(ctx, victims); err != nil {
			return err
		}
		if c.live() && !c.handle.Undisturbed() {
			// They may be another's by now.
			if pfs, err = c.lockPFs(ctx, o.pfs); err != nil {
				return err
			}
			if plans, _, err = c.planCounts(pfs, o.wish); err != nil {
				return err
			}
		}
	}

	var errs []error
	for _, plan := range plans {
		errs = append(errs, c.handle.CheckCount(plan, o.force))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	views, p := []countView{}, &preview{}
	for _, plan := range plans {
		view, err := c.count(ctx, plan, p)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		views = append(views, view)
	}

	if e.json && len(plans) > 1 {
		e.printJSON(views)
	} else if e.json && len(views) > 0 {
		e.printJSON(views[0])
	} else if e.dryRun && !e.json {
		e.preview(p)
	}
	return mixed(errors.Join(errs...), len(views) > 0 && !e.dryRun)
}

// planCounts plans for each PF, and says which VFs go.
func (c *changing) planCounts(pfs []*iommu.Device,
	wish sriov.Wish) (plans []*sriov.Plan, victims []*iommu.Device, err error) {
	for _, pf := range pfs {
		plan, err := c.handle.PlanCount(pf, wish)
		if err != nil {
			return nil, nil, usageIfMeant(err)
		}
		plans, victims = append(plans, plan), append(victims, plan.Victims...)
	}
	return plans, victims, nil
}

// count carries out one PF's plan, and tells people; a dry run only adds it to a preview.
func (c *changing) count(ctx context.Context, plan *sriov.Plan, p *preview) (countView, error) {
	e := c.env
	steps, writes := viewSteps(plan.Steps())
	view := countView{
		PF: plan.PF.Name, From: plan.Have, To: plan.Want, Total: plan.PF.SRIOV.Total, Changed: plan.Changes(),
		Steps: steps, Writes: writes, Notes: append([]string{}, plan.Notes...),
	}
	done := fmt.Sprintf("%s: %d -> %d of %d VFs", view.PF, view.From, view.To, view.Total)
	if !view.Changed {
		done = fmt.Sprintf("%s has %d of %d VFs already", view.PF, view.To, view.Total)
	}
	if e.dryRun {
		p.of(done)
		p.comment(done)
		p.says(declared.CountWords(plan)...)
		p.does(view.Steps...)
		p.note(plan.Notes...)
		return view, nil
	}

	for _, n := range plan.Notes {
		if !e.json && !followsSteps(n) {
			e.note("%s", n)
		}
	}
	notes, err := c.handle.Apply(ctx, plan)
	for _, n := range notes {
		e.note("%s", n)
	}
	if err != nil {
		return view, err
	}
	view.Notes = append(view.Notes, notes...)
	if !e.json {
		fmt.Fprintln(e.stdout, done)
	}
	return view, nil
}

// usageIfMeant makes errors of the request itself (no PF, too many) usage errors.
func usageIfMeant(err error) error {
	var outOfRange *sriov.RangeError
	var notPF *sriov.NotPFError
	if errors.As(err, &outOfRange) || errors.As(err, &notPF) {
		return usageError{err}
	}
	return err
}
