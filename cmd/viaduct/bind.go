package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"viaduct/cmd/internal/declared"
	"viaduct/iommu"
	"viaduct/vfio"
)

type bindOptions struct {
	selectors []iommu.Selector
	driver    string
	owner     string
	changeOptions
}

// changeOptions are what bind and unbind have in common.
type changeOptions struct {
	force     []vfio.Kind
	keepGoing bool
	save      bool
	timeout   time.Duration
}

func (o *changeOptions) flags(e *env) []cli.Flag {
	return []cli.Flag{
		&cli.StringSliceFlag{Name: "force", Usage: "go on although a holder of this `KIND` uses the device: " + kindNames() + " (may be repeated)"},
		&cli.BoolFlag{Name: "keep-going", Usage: "of several devices, leave out those that are refused", Destination: &o.keepGoing},
		&cli.DurationFlag{Name: "timeout", Usage: "how long one write, or another viaduct, is waited for", Value: vfio.DefaultTimeout, Destination: &o.timeout},
		e.dryRunFlag(), e.jsonFlag(),
	}
}

func kindNames() string {
	var names []string
	for _, k := range vfio.Kinds {
		names = append(names, string(k))
	}
	return strings.Join(names, ", ")
}

func parseKinds(names []string) ([]vfio.Kind, error) {
	var kinds []vfio.Kind
	for _, n := range names {
		if !slices.Contains(vfio.Kinds, vfio.Kind(n)) {
			return nil, usagef("--force %q: the kinds of holders are %s", n, kindNames())
		}
		kinds = append(kinds, vfio.Kind(n))
	}
	return kinds, nil
}

func (o *changeOptions) parse(c *cli.Context) error {
	var err error
	if o.force, err = parseKinds(c.StringSlice("force")); err != nil {
		return err
	}
	return checkTimeout(o.timeout)
}

func checkTimeout(d time.Duration) error {
	if d <= 0 {
		return usagef("--timeout %s: want a time above zero, as 10s", d)
	}
	return nil
}

func bindCommand(e *env) *cli.Command {
	var o bindOptions
	return command(&cli.Command{
		Name:      "bind",
		Usage:     "take devices from the host: bind them, and all of their groups, to a vfio driver",
		ArgsUsage: "SELECTOR...",
		Description: "What is taken is the whole IOMMU group, but for its bridges. Refused, with exit status 3 and nothing touched: a device\n" +
			"that the host uses (a mounted disk, an interface with an address or a route, the display), a PF with VFs, a device\n" +
			"without an IOMMU. The binding holds until the next boot. With --save the device is also declared, in a file of\n" +
			"/etc/viaduct/host.d, and viaduct apply, which viaduct install has each boot run, takes it again.\n\n" +
			"Examples:\n  viaduct bind enp1s0/vf0\n  viaduct bind 0000:03:00.0 --dry-run\n  viaduct bind enp1s0/vf0 enp1s0/vf1 --node-owner qemu:kvm\n" +
			"  viaduct bind 0000:03:00.0 --save",
		Flags: append([]cli.Flag{
			&cli.BoolFlag{Name: "save", Usage: "declare the device as well, for each boot", Destination: &o.save},
			&cli.StringFlag{Name: "driver", Usage: "the vfio driver `auto|NAME`; auto is the device's own variant driver, else vfio-pci", Value: vfio.Auto, Destination: &o.driver},
			&cli.StringFlag{Name: "node-owner", Usage: "who is to own the device's nodes: `USER[:GROUP]`"},
		}, o.flags(e)...),
		BashComplete: e.completeSelectors,
		Action: func(c *cli.Context) (err error) {
			if err := o.parse(c); err != nil {
				return err
			}
			if o.selectors, err = selectors(c); err != nil {
				return err
			}
			if o.driver != vfio.Auto && !iommu.IsVFIODriver(o.driver) && o.driver != "pci-stub" {
				return usagef("bind: %q is no vfio driver; want auto, vfio-pci or the name of a variant driver", o.driver)
			}
			o.owner = c.String("node-owner")
			return runBind(c.Context, e, o)
		},
	})
}

func unbindCommand(e *env) *cli.Command {
	var o changeOptions
	return command(&cli.Command{
		Name:      "unbind",
		Usage:     "give devices, and all of their groups, back to the host's drivers",
		ArgsUsage: "SELECTOR...",
		Description: "A device goes back to what it had when it was taken; one that viaduct did not take goes to the driver the host would\n" +
			"use. Refused, with exit status 3, while a process has it open.\n\n" +
			"Examples:\n  viaduct unbind enp1s0/vf0\n  viaduct unbind group=8\n  viaduct unbind 0000:03:00.0 --save",
		Flags: append([]cli.Flag{
			&cli.BoolFlag{Name: "save", Usage: "no longer declare the device either", Destination: &o.save},
		}, o.flags(e)...),
		BashComplete: e.completeSelectors,
		Action: func(c *cli.Context) error {
			sel, err := selectors(c)
			if err != nil {
				return err
			}
			if err := o.parse(c); err != nil {
				return err
			}
			return runUnbind(c.Context, e, sel, o)
		},
	})
}

func runBind(ctx context.Context, e *env, o bindOptions) error {
	return e.tellChanges(e.bind(ctx, o))
}

// tellChanges prints what --json prints of a change, whatever came of it.
func (e *env) tellChanges(views []changeView, err error) error {
	if e.json && views != nil {
		err = errors.Join(err, writeJSON(e.stdout, views))
	}
	return err
}

func (e *env) bind(ctx context.Context, o bindOptions) ([]changeView, error) {
	var owner *vfio.NodeOwner
	if o.owner != "" {
		var err error
		if owner, err = vfio.ParseNodeOwner(o.owner); err != nil {
			return nil, usagef("--node-owner: %w", err)
		}
	}
	lasts := " (until the next boot)"
	if o.save {
		lasts = " (and declared for each boot)"
	}
	return e.change(ctx, o.selectors, changer{
		options: o.changeOptions, owner: owner, driver: o.driver, lasts: lasts,
		check: (*vfio.Gate).Take,
		plan:  func(b *vfio.Binder, d *iommu.Device) (vfio.Change, error) { return b.PlanTake(d, o.driver) },
		apply: func(b *vfio.Binder, ctx context.Context, units [][]*iommu.Device) []vfio.Result {
			return b.Take(ctx, units, o.driver)
		},
		after: func(on *changing, devices []*iommu.Device) error {
			var errs []error
			for _, d := range devices {
				if o.save {
					file, err := on.declared().Save(d, o.driver, o.owner)
					if errs = append(errs, err); err == nil {
						e.note("%s is declared in %s", d.Name, file)
					}
				}
			}
			return errors.Join(errs...)
		},
	})
}

func runUnbind(ctx context.Context, e *env, sel []iommu.Selector, o changeOptions) error {
	views, err := e.change(ctx, sel, changer{
		options: o,
		check:   (*vfio.Gate).GiveBack,
		plan:    (*vfio.Binder).PlanGiveBack,
		apply:   (*vfio.Binder).GiveBack,
		after: func(on *changing, devices []*iommu.Device) error {
			owners, err := vfio.Owners(on.host, devices)
			for _, owner := range owners {
				e.note("%s, which may take it again", owner)
			}
			errs := []error{err}
			for _, d := range devices {
				errs = append(errs, e.tellSaved(on.declared(), d, o.save))
			}
			return errors.Join(errs...)
		},
	})
	return e.tellChanges(views, err)
}

// tellSaved says that a device that was given back is still declared by bind --save, or, with forget, ends that.
func (e *env) tellSaved(m *declared.Manager, d *iommu.Device, forget bool) error {
	file, err := m.Saved(d)
	switch {
	case err != nil:
		return err
	case forget && file == "":
		e.note("%s was not declared by bind --save", d.Name)
	case forget:
		return m.Forget(d)
	case file != "":
		e.note("%s is still declared in %s: viaduct apply takes it again (viaduct unbind %s --save ends that)", d.Name, file, d.Name)
	}
	return nil
}

// changer is what bind and unbind differ in.
type changer struct {
	options changeOptions
	owner   *vfio.NodeOwner
	driver  string // to be taken with
	lasts   string // how long the change does, to be told
	check   func(*vfio.Gate, [][]*iommu.Device) ([]error, error)
	plan    func(*vfio.Binder, *iommu.Device) (vfio.Change, error)
	apply   func(*vfio.Binder, context.Context, [][]*iommu.Device) []vfio.Result
	after   func(*changing, []*iommu.Device) error // for the devices that were asked for and are where they are to be
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

// change resolves the devices, locks them, finishes what an interrupted run left, lets every gate speak before the first
// write, and then carries out all units.
func (e *env) change(ctx context.Context, sel []iommu.Selector, c changer) ([]changeView, error) {
	ctx, stop, on, err := e.beginChange(ctx, c.options.timeout)
	if err != nil {
		return nil, err
	}
	defer stop()
	h, t, b := on.host, on.topology, on.binder
	b.Owner = c.owner
	asked, units, err := resolveUnits(h, t, sel)
	if err != nil {
		return nil, err
	}
	gate := &vfio.Gate{Host: h, Force: c.options.force, Driver: c.driver, DryRun: e.dryRun}
	if on.live() {
		if err := b.Lock(ctx, slices.Concat(units...)); err != nil {
			return nil, err
		}
		if err := on.recover(ctx); err != nil {
			return nil, err
		}
		gate.Stuck = on.stuck
		if !on.undisturbed() {
			if err := refresh(h, units, gate.Stuck); err != nil {
				return nil, err
			}
		}
	}
	gate.Topology, gate.Asked, b.Gate = t, asked, gate
	refusals, err := c.check(gate, units)
	if err != nil {
		return nil, err
	}
	for _, holder := range gate.Passed {
		e.note("by force, although %s", holder)
	}
	if err := errors.Join(refusals...); err != nil && !c.options.keepGoing && !e.dryRun {
		return nil, err
	}
	var errs []error
	pass := units[:0:0]
	for i, err := range refusals {
		if err == nil || e.dryRun { // which also shows what is refused
			pass = append(pass, units[i])
		}
		errs = append(errs, err)
	}
	if !h.Live() {
		e.note("%s is a captured host: nobody could be asked who uses the devices", e.hostName)
	}
	var results []vfio.Result
	if e.dryRun {
		for _, d := range slices.Concat(pass...) {
			change, err := c.plan(b, d)
			results = append(results, vfio.Result{Change: change, Err: err})
		}
	} else {
		results = c.apply(b, ctx, pass)
	}
	views := []changeView{}
	byAddress := map[iommu.Address]*iommu.Device{}
	for _, d := range asked {
		if d.PCI { // others have no address
			byAddress[d.Address] = d
		}
	}
	var arrived []*iommu.Device
	var home []iommu.ID
	for _, r := range results {
		if !iommu.IsVFIODriver(r.To) && !slices.Contains(home, r.ID) {
			home = append(home, r.ID)
		}
		views = append(views, viewChange(r.Change, r.Err))
		errs = append(errs, r.Err)
		if d := byAddress[r.Device]; r.Err == nil && d != nil {
			arrived = append(arrived, d)
		}
	}
	if !e.dryRun && len(arrived) > 0 {
		errs = append(errs, c.after(on, arrived))
	}
	if len(home) > 0 {
		for id, where := range vfio.ClaimedByID(h, home...) {
			e.note("vfio-pci.ids= in %s claims all %04x:%04x: at the next boot vfio-pci has them again", where, id.Vendor, id.Device)
		}
	}
	if !e.json {
		e.printChanges(views, c.lasts)
	}
	if t.InterruptRemapping != nil && !*t.InterruptRemapping {
		e.note("interrupt remapping is off on this host, so VFIO will refuse to open the device")
	}
	return views, mixed(errors.Join(errs...), len(results) > 0 && !e.dryRun)
}

// mixed makes refusals that were passed over a plain failure: something was touched.
func mixed(err error, touched bool) error {
	if err != nil && touched && errors.Is(err, vfio.ErrRefused) {
		return errors.New(err.Error()) // no longer an ErrRefused
	}
	return err
}

// resolveUnits finds what the selectors name, and all that has to go along.
func resolveUnits(h *iommu.Host, t *iommu.Topology, sel []iommu.Selector) (asked []*iommu.Device, units [][]*iommu.Device, err error) {
	for _, s := range sel {
		devices, err := s.Resolve(h, t)
		if err != nil {
			return nil, nil, err
		}
		switch id, group := s.Group(); {
		case group:
			g, err := t.Group(id)
			if err != nil {
				return nil, nil, err
			}
			devices = g.Endpoints()
		case len(devices) > 1:
			_, err := s.One(h, t)
			return nil, nil, err // several where one was meant: too easily too many
		}
		asked = append(asked, devices...)
	}
	units, err = vfio.Units(t, asked)
	return asked, units, err
}

// refresh reads the devices again, as they are now that nobody else changes them. Those that are stuck stay as they were: to
// read them would be to wait with them.
func refresh(h *iommu.Host, units [][]*iommu.Device, stuck []vfio.Recovered) error {
	for _, d := range slices.Concat(units...) {
		if !d.PCI || slices.ContainsFunc(stuck, func(r vfio.Recovered) bool { return r.Device == d.Address && r.Err != nil }) {
			continue
		}
		driver, err1 := iommu.ReadDriver(h, d.Address)
		override, err2 := iommu.ReadDriverOverride(h, d.Address)
		before := d.Driver
		if d.SRIOV != nil || err1 != nil || err2 != nil || driver != d.Driver || override != d.DriverOverride { // not as a moment ago
			now, err := iommu.ReadDevice(h, d.Address)
			if err != nil {
				return err
			}
			d.Driver, d.DriverOverride, d.SRIOV = now.Driver, now.DriverOverride, now.SRIOV
		}
		if d.Driver != before || d.Blocks() { // its driver makes interfaces, and udev may just have named them
			netdevs, err := iommu.Netdevs(h, d.Address)
			if err != nil {
				return err
			}
			d.Netdevs = netdevs
		}
	}
	return nil
}

// tellRecovered tells what became of interrupted changes.
func (e *env) tellRecovered(all []vfio.Recovered) {
	for _, r := range all {
		if r.Err != nil {
			e.note("%v", r.Err)
		} else {
			e.note("%s %s", r.Device, r.What)
		}
	}
}

func recoverCommand(e *env) *cli.Command {
	return command(&cli.Command{
		Name:  "recover",
		Usage: "finish or undo what an interrupted run left",
		Description: "A device that was being taken is put back, one that was on its way home goes there. Commands that change something do this\n" +
			"by themselves before they begin. What still waits in a write is named, with what it waits for.",
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return usagef("recover takes no arguments: it looks after all devices")
			}
			if err := e.mayChange(); err != nil {
				return err
			}
			h, err := e.open()
			if err != nil {
				return err
			}
			defer h.Close()
			b := newBinder(h, 0)
			defer b.Close()
			ctx, stop := untilSignal(c.Context)
			defer stop()
			all, err := b.Recover(ctx, true)
			errs := []error{err}
			undone, err := (&declared.Manager{Host: h, Binder: b}).Recover()
			all, errs = append(all, undone...), append(errs, err)
			for _, r := range all {
				if r.Err == nil {
					fmt.Fprintf(e.stdout, "%s %s\n", r.Device, r.What)
				}
				errs = append(errs, r.Err)
			}
			return errors.Join(errs...)
		},
	})
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

func (e *env) printChanges(views []changeView, lasts string) {
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
			fmt.Fprintf(e.stdout, "%s: %s -> %s%s\n", v.Address, driverText(v.From), driverText(v.To), lasts)
		}
	}
}

func driverText(driver *string) string {
	if driver == nil {
		return "no driver"
	}
	return *driver
}
