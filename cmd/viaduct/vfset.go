package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"viaduct/cmd/internal/declared"
	"viaduct/cmd/internal/hostfile"
	"viaduct/cmd/internal/terminal"
	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/bind"
)

type setOptions struct {
	vf      iommu.Selector
	want    hostfile.Values
	timeout time.Duration
}

func vfSetCommand(e *env) *cli.Command {
	var o setOptions
	return command(&cli.Command{
		Name:      "set",
		Usage:     "change the settings that a PF makes for a VF",
		ArgsUsage: "PF/vfN KEY=VALUE...",
		Description: "Several settings are one change: viaduct makes all of them or, if one fails, none. It does not " +
			"write a setting that is right already, and reads back what it wrote. A driver that has the VF may " +
			"notice a setting only when it binds again.\n\n" +
			settingsHelp() + "\n" +
			"A number or GUID may end in `+index`, which adds the VF's index: `vlan=100+index`.\n\n" +
			"Examples:\n  viaduct vf set enp1s0/vf0 mac=52:54:00:12:34:56\n" +
			"  viaduct vf set enp1s0/vf0 mac=stable vlan=100 trust=off spoofchk=on",
		Flags: append([]cli.Flag{
			&cli.DurationFlag{
				Name:        "timeout",
				Usage:       "wait this long for another viaduct",
				Value:       bind.DefaultTimeout,
				Destination: &o.timeout,
			},
			e.jsonFlag(),
		}, e.dryRunFlags()...),
		BashComplete: e.completeVFs,
		Action: func(c *cli.Context) (err error) {
			if c.NArg() < 2 {
				return usagef("vf set: want a VF and a setting, e.g. enp1s0/vf0 mac=52:54:00:12:34:56")
			}
			if err := checkTimeout(o.timeout); err != nil {
				return err
			}
			if o.vf, err = iommu.ParseArgument(c.Args().First()); err != nil {
				return err
			}
			if o.want, err = hostfile.ParseValues(c.Args().Tail()); err != nil {
				return usagef("vf set: %w", err)
			}
			return runVFSet(c.Context, e, o)
		},
	})
}

// settingsHelp is an item for each setting.
func settingsHelp() string {
	var out strings.Builder
	for _, line := range sriov.Help() {
		fmt.Fprintf(&out, "- `%s`: %s\n", line[0], line[1])
	}
	return out.String()
}

// setView is what `vf set --json` prints, and `vf sync --json` for each VF.
type setView struct {
	VF         string         `json:"vf"`
	PF         string         `json:"pf"`
	Index      int            `json:"index"`
	Changed    bool           `json:"changed"`
	Steps      []string       `json:"steps"`
	Writes     []writeView    `json:"writes"`
	Settings   sriov.Settings `json:"settings"`
	Unverified []sriov.Key    `json:"unverified"`
}

func runVFSet(ctx context.Context, e *env, o setOptions) error {
	ctx, stop, c, err := e.beginChange(ctx, o.timeout)
	if err != nil {
		return err
	}
	defer stop()
	pf, vf, err := c.lockVF(ctx, o.vf)
	if err != nil {
		return err
	}
	want, err := o.want.Of(vf.VFIndex)
	if err != nil {
		return usagef("vf set: %w", err)
	}
	view, plan, err := c.set(ctx, pf, vf, want)
	if err != nil {
		return err
	}
	if e.dryRun && !e.json {
		p := &preview{}
		p.sets(pf, []*sriov.SetPlan{plan}, nil)
		e.preview(p)
	} else {
		e.printSet([]setView{view}, view)
	}
	return nil
}

// sets adds what plans would set of a PF's VFs to a preview.
func (p *preview) sets(pf *iommu.Device, plans []*sriov.SetPlan, requested map[int]sriov.Settings) {
	var right []int
	var steps []string
	for _, plan := range plans {
		if len(plan.Settings) == 0 {
			right = append(right, plan.VF.VFIndex)
		}
		steps = append(steps, bind.Commands(plan.Steps())...)
	}
	p.of(pf.Name)
	p.comment(pf.Name)
	p.says(declared.SetWords(plans, func(vf int) sriov.Settings { return requested[vf] })...)
	if len(right) > 0 {
		p.says(terminal.Fold("vf", right) + ": set already")
	}
	p.does(steps...)
}

// set sets a VF of a PF that is locked.
func (c *changing) set(ctx context.Context, pf, vf *iommu.Device,
	want sriov.Settings) (setView, *sriov.SetPlan, error) {
	view := setView{VF: vf.Name, PF: pf.Name, Index: vf.VFIndex, Unverified: []sriov.Key{}}
	view.Steps, view.Writes = viewSteps(nil)
	if err := c.lock(ctx, []*iommu.Device{vf}); err != nil {
		return view, nil, err
	}
	plan, err := c.handle.PlanSet(pf, vf, want)
	if err != nil {
		return view, nil, err
	}
	view.Changed, view.Settings = len(plan.Settings) > 0, plan.Want
	view.Steps, view.Writes = viewSteps(plan.Steps())
	if c.env.dryRun {
		return view, plan, nil
	}
	unverified, err := c.handle.Set(ctx, plan)
	view.Unverified = append(view.Unverified, unverified...)
	return view, plan, err
}

func (e *env) printSet(views []setView, data any) {
	if e.json {
		e.printJSON(data)
		return
	}
	for _, v := range views {
		line := fmt.Sprintf("%s (vf%d of %s): %s", v.VF, v.Index, v.PF, v.Settings.Text())
		if !v.Changed {
			line += " (as it was)"
		}
		if len(v.Unverified) > 0 {
			line += " (set, and not verifiable: " + joinKeys(v.Unverified) + ")"
		}
		fmt.Fprintln(e.stdout, line)
	}
}

func joinKeys(keys []sriov.Key) string {
	var out []string
	for _, k := range keys {
		out = append(out, string(k))
	}
	return strings.Join(out, ", ")
}

func vfGetCommand(e *env) *cli.Command {
	return command(&cli.Command{
		Name:      "get",
		Usage:     "print the settings of a VF that its PF reports",
		ArgsUsage: "PF/vfN",
		Description: "`vf set` takes the line as it is printed. A setting that is missing is not reported by the " +
			"PF's driver.\n\n" +
			"Examples:\n  viaduct vf get enp1s0/vf0",
		Flags:        []cli.Flag{e.jsonFlag()},
		BashComplete: e.completeVFs,
		Action: func(c *cli.Context) error {
			arg, err := oneArgument(c, "the VF")
			if err != nil {
				return err
			}
			sel, err := iommu.ParseArgument(arg)
			if err != nil {
				return err
			}
			return runVFGet(e, sel)
		},
	})
}

func runVFGet(e *env, sel iommu.Selector) error {
	h, t, err := e.look()
	if err != nil {
		return err
	}
	defer h.Close()
	vf, err := sel.One(h, t)
	if err != nil {
		return err
	}
	pf, err := pfOf(t, vf)
	if err != nil {
		return err
	}

	view, _, err := viewVFs(h, t, pf)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(view, func(v vfView) bool { return v.Index == vf.VFIndex })
	if i < 0 {
		return fmt.Errorf("%s went away just now", vf.Name)
	}
	if view[i].Settings == nil {
		return fmt.Errorf("%s: %w", pf.Name, errNoSettings)
	}

	if e.json {
		e.printJSON(view[i])
	} else {
		e.print(&terminal.Table{Rows: []terminal.Row{{Line: view[i].Settings.Text()}}})
	}
	return nil
}

func vfSyncCommand(e *env) *cli.Command {
	var timeout time.Duration
	return command(&cli.Command{
		Name:      "sync",
		Usage:     "make the settings of VFs again after a reset of their PF",
		ArgsUsage: "[PF...]",
		Description: "Without a PF, viaduct does this for all PFs. VFs of a declared PF get the settings of " +
			"/etc/viaduct/host.yaml, the others those that `vf set` made. The latter are forgotten when the VFs " +
			"are removed and when the host boots.\n\n" +
			"Examples:\n  viaduct vf sync\n" +
			"  viaduct vf sync enp1s0 --dry-run",
		Flags: append([]cli.Flag{
			&cli.DurationFlag{
				Name:        "timeout",
				Usage:       "wait this long for another viaduct",
				Value:       bind.DefaultTimeout,
				Destination: &timeout,
			},
			e.jsonFlag(),
		}, e.dryRunFlags()...),
		BashComplete: e.completePFs,
		Action: func(c *cli.Context) error {
			sel, err := parseSelectors(c.Args().Slice())
			if err != nil {
				return err
			}
			if err := checkTimeout(timeout); err != nil {
				return err
			}
			return runVFSync(c.Context, e, sel, timeout)
		},
	})
}

func runVFSync(ctx context.Context, e *env, sel []iommu.Selector, timeout time.Duration) error {
	ctx, stop, c, err := e.beginChange(ctx, timeout)
	if err != nil {
		return err
	}
	defer stop()

	views, p := []setView{}, &preview{}
	var all []*iommu.Device
	if len(sel) == 0 {
		all, err = c.lockFound(ctx, func() ([]*iommu.Device, error) { return pfs(c.topology), nil })
	} else {
		all, err = c.lockPFs(ctx, sel)
	}
	if err != nil {
		return err
	}
	host, err := hostfile.Load(c.handle.Host())
	if err != nil {
		return usageError{err}
	}
	m, err := c.declared()
	if err != nil {
		return err
	}

	var errs []error
	leased, err := m.Guests()
	if err != nil {
		return err
	}
	for _, pf := range all {
		if pf.SRIOV == nil {
			return usageError{&sriov.NotPFError{Device: pf.Address, VFOf: pf.PhysFn}}
		}
		asked, known := m.Settings(host, pf)
		if !known {
			if asked, err = c.handle.LastRequested(pf); err != nil {
				return err
			}
		}

		places, err := iommu.VFAddresses(c.handle.Host(), pf.Address)
		if err != nil {
			return err
		}
		for i, a := range places {
			// What a guest has goes before.
			if own := leased[a].Settings; len(own) > 0 {
				if asked[i] == nil {
					asked[i] = sriov.Settings{}
				}
				maps.Copy(asked[i], own)
			}
		}

		var plans []*sriov.SetPlan
		for _, index := range slices.Sorted(maps.Keys(asked)) {
			vf, err := c.vfOf(pf, index)
			if err != nil {
				errs = append(errs, err)
				continue
			}
			want := asked[index]
			if _, vectors := want[sriov.MSIX]; vectors && vf.Driver != "" {
				e.note("%s: msix is left as it is, as it is on driver %s", vf.Name, vf.Driver)
				delete(want, sriov.MSIX)
			}
			view, plan, err := c.set(ctx, pf, vf, want)
			if errs = append(errs, err); err == nil {
				views, plans = append(views, view), append(plans, plan)
			}
		}
		if len(plans) > 0 {
			p.sets(pf, plans, asked)
		}
	}

	if e.dryRun && !e.json {
		e.preview(p)
	} else {
		e.printSet(views, views)
	}
	if len(views) == 0 && errors.Join(errs...) == nil {
		e.note("nothing is requested of any VF here: viaduct vf set and host.yaml request settings")
	}
	return errors.Join(errs...)
}

func (c *changing) vfOf(pf *iommu.Device, index int) (*iommu.Device, error) {
	for _, v := range pf.SRIOV.VFs {
		if v.Index == index {
			return c.topology.Find(v.Address)
		}
	}
	return nil, fmt.Errorf("%s has no vf%d any more", pf.Name, index)
}

func pfs(t *iommu.Topology) []*iommu.Device {
	var out []*iommu.Device
	t.All(func(d *iommu.Device) bool {
		if d.SRIOV != nil {
			out = append(out, d)
		}
		return true
	})
	return out
}
