package main

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/urfave/cli/v2"

	"viaduct/internal/journal"
	"viaduct/iommu"
	"viaduct/vfio"
)

type bindOptions struct {
	selectors []iommu.Selector
	driver    string
}

func bindCommand(e *env) *cli.Command {
	var o bindOptions
	return command(&cli.Command{
		Name:      "bind",
		Usage:     "take devices from the host: bind them, and all of their groups, to a vfio driver",
		ArgsUsage: "SELECTOR...",
		Description: "What is taken is the whole IOMMU group, but for its bridges. Refused, with exit status 3 and nothing touched: a device\n" +
			"that carries the default route or a mounted file system, a PF with VFs, a device without an IOMMU. The binding holds\n" +
			"until the next boot.\n\n" +
			"Examples:\n  viaduct bind enp1s0/vf0\n  viaduct bind 0000:03:00.0 --dry-run",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "driver", Usage: "the vfio driver `auto|NAME`; auto is the device's own variant driver, else vfio-pci", Value: vfio.Auto, Destination: &o.driver},
			e.dryRunFlag(), e.jsonFlag(),
		},
		BashComplete: e.completeSelectors,
		Action: func(c *cli.Context) (err error) {
			if o.selectors, err = selectors(c); err != nil {
				return err
			}
			if o.driver != vfio.Auto && !iommu.IsVFIODriver(o.driver) && o.driver != "pci-stub" {
				return usagef("bind: %q is no vfio driver; want auto, vfio-pci or the name of a variant driver", o.driver)
			}
			return runBind(c.Context, e, o)
		},
	})
}

func unbindCommand(e *env) *cli.Command {
	return command(&cli.Command{
		Name:      "unbind",
		Usage:     "give devices, and all of their groups, back to the host's drivers",
		ArgsUsage: "SELECTOR...",
		Description: "A device goes back to what it had when it was taken; one that viaduct did not take goes to the driver the host would\n" +
			"use. Refused, with exit status 3, while a process has it open.\n\n" +
			"Examples:\n  viaduct unbind enp1s0/vf0\n  viaduct unbind group=8",
		Flags:        []cli.Flag{e.dryRunFlag(), e.jsonFlag()},
		BashComplete: e.completeSelectors,
		Action: func(c *cli.Context) error {
			sel, err := selectors(c)
			if err != nil {
				return err
			}
			return runUnbind(c.Context, e, sel)
		},
	})
}

func runBind(ctx context.Context, e *env, o bindOptions) error {
	return e.change(ctx, o.selectors, changer{
		check: vfio.CheckTake,
		plan:  func(b *vfio.Binder, d *iommu.Device) (vfio.Change, error) { return b.PlanTake(d, o.driver) },
		apply: func(ctx context.Context, b *vfio.Binder, d *iommu.Device) (vfio.Change, error) {
			return b.Take(ctx, d, o.driver)
		},
		undo: func(b *vfio.Binder, d *iommu.Device) error {
			now, err := iommu.ReadDevice(b.Host, d.Address)
			if err == nil {
				_, err = b.GiveBack(context.Background(), &now)
			}
			return err
		},
	})
}

func runUnbind(ctx context.Context, e *env, sel []iommu.Selector) error {
	return e.change(ctx, sel, changer{
		check: func(h *iommu.Host, _ *iommu.Topology, asked, unit []*iommu.Device) error {
			return vfio.CheckGiveBack(h, asked, unit)
		},
		plan: (*vfio.Binder).PlanGiveBack,
		apply: func(ctx context.Context, b *vfio.Binder, d *iommu.Device) (vfio.Change, error) {
			return b.GiveBack(ctx, d)
		},
	})
}

// changer is what bind and unbind differ in.
type changer struct {
	check func(*iommu.Host, *iommu.Topology, []*iommu.Device, []*iommu.Device) error
	plan  func(*vfio.Binder, *iommu.Device) (vfio.Change, error)
	apply func(context.Context, *vfio.Binder, *iommu.Device) (vfio.Change, error)
	undo  func(*vfio.Binder, *iommu.Device) error // of what was applied before another device failed; nil: that stays
}

// changeView is one device's line of `bind --json` and `unbind --json`.
type changeView struct {
	Address iommu.Address `json:"address"`
	From    *string       `json:"from"`
	To      *string       `json:"to"`
	Changed bool          `json:"changed"`
	Steps   []string      `json:"steps"`
	Error   *string       `json:"error"`
}

// change resolves the devices, lets every gate speak before the first write, and then does one device after the other.
func (e *env) change(ctx context.Context, sel []iommu.Selector, c changer) error {
	h, t, err := e.lookToChange()
	if err != nil {
		return err
	}
	defer h.Close()
	var asked []*iommu.Device
	for _, s := range sel {
		devices, err := s.Resolve(h, t)
		if err != nil {
			return err
		}
		switch id, group := s.Group(); {
		case group:
			g, err := t.Group(id)
			if err != nil {
				return err
			}
			devices = g.Endpoints()
		case len(devices) > 1:
			_, err := s.One(h, t)
			return err // several where one was meant: too easily too many
		}
		asked = append(asked, devices...)
	}
	unit, err := vfio.Unit(t, asked)
	if err != nil {
		return err
	}
	if err := c.check(h, t, asked, unit); err != nil {
		return err
	}
	if !h.Live() {
		e.note("%s is a captured host: nobody could be asked who uses the devices", e.hostName)
	}
	ctx, stop := untilSignal(ctx)
	defer stop()
	b := &vfio.Binder{Host: h}
	if h.Live() {
		b.Journal = journal.In(journal.Dir)
	}
	views, errs := []changeView{}, []error(nil)
	var done []*iommu.Device
	for _, d := range unit {
		var change vfio.Change
		if e.dryRun {
			change, err = c.plan(b, d)
		} else {
			change, err = c.apply(ctx, b, d)
		}
		errs = append(errs, err)
		views = append(views, viewChange(change, err))
		if err != nil && c.undo != nil && !e.dryRun { // a group that is not whole is of no use to a guest
			for _, d := range slices.Backward(done) {
				errs = append(errs, c.undo(b, d))
			}
			break
		}
		if len(change.Steps) > 0 {
			done = append(done, d)
		}
	}
	if e.json {
		if err := writeJSON(e.stdout, views); err != nil {
			return err
		}
	} else {
		e.printChanges(views)
	}
	if t.InterruptRemapping != nil && !*t.InterruptRemapping {
		e.note("interrupt remapping is off on this host, so VFIO will refuse to open the device")
	}
	return errors.Join(errs...)
}

func viewChange(c vfio.Change, err error) changeView {
	v := changeView{Address: c.Device, From: known(c.From), To: known(c.To), Changed: len(c.Steps) > 0 && err == nil, Steps: []string{}}
	if c.To == vfio.None {
		v.To = nil
	}
	for _, s := range c.Steps {
		v.Steps = append(v.Steps, s.String())
	}
	if err != nil {
		text := err.Error()
		v.Error = &text
	}
	return v
}

func (e *env) printChanges(views []changeView) {
	for _, v := range views {
		switch {
		case v.Error != nil: // said by the error itself
		case e.dryRun:
			for _, s := range v.Steps {
				fmt.Fprintln(e.stdout, s)
			}
		case !v.Changed:
			fmt.Fprintf(e.stdout, "%s is on %s already\n", v.Address, driverText(v.To))
		default:
			fmt.Fprintf(e.stdout, "%s: %s -> %s\n", v.Address, driverText(v.From), driverText(v.To))
		}
	}
}

func driverText(driver *string) string {
	if driver == nil {
		return "no driver"
	}
	return *driver
}
