package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/urfave/cli/v2"

	"viaduct/cmd/internal/declared"
	"viaduct/cmd/internal/hostfile"
	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

type bindOptions struct {
	selectors []iommu.Selector
	driver    string
	owner     string
	changeOptions
}

// changeOptions are what bind and unbind have in common.
type changeOptions struct {
	force     []holder.Kind
	keepGoing bool
	save      bool
	all       bool // that a selector names
	timeout   time.Duration
}

func (o *changeOptions) flags(e *env) []cli.Flag {
	return append([]cli.Flag{
		forceFlag("the device"),
		&cli.BoolFlag{
			Name:        "keep-going",
			Usage:       "go on with the other devices when some are refused",
			Destination: &o.keepGoing,
		},
		&cli.BoolFlag{
			Name:        "all",
			Usage:       "all devices that a SELECTOR names, where it names several",
			Destination: &o.all,
		},
		&cli.DurationFlag{
			Name:        "timeout",
			Usage:       "wait this long for one write, and for another viaduct",
			Value:       bind.DefaultTimeout,
			Destination: &o.timeout,
		},
		e.jsonFlag(),
	}, e.dryRunFlags()...)
}

// forceFlag is --force of a command that somebody's use of something stops.
func forceFlag(what string) *cli.StringSliceFlag {
	usage := "override holders of this `KIND` that use " + what + ": " + holder.KindNames() + " (may be repeated)"
	return &cli.StringSliceFlag{Name: "force", Usage: usage}
}

func parseKinds(names []string) ([]holder.Kind, error) {
	var kinds []holder.Kind
	for _, n := range names {
		k, err := holder.ParseKind(n)
		if err != nil {
			return nil, usagef("--force %w", err)
		}
		kinds = append(kinds, k)
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
		return usagef("invalid --timeout %s: want more than zero, e.g. 10s", d)
	}
	return nil
}

func bindCommand(e *env) *cli.Command {
	var o bindOptions
	return command(&cli.Command{
		Name:      "bind",
		Usage:     "take devices, with their groups, from the host",
		ArgsUsage: "SELECTOR...",
		Description: "viaduct binds every device of the IOMMU group to a vfio driver, except for bridges. It " +
			"refuses, with exit status 3 and before it changes anything, to take a device that the host uses (e.g. a " +
			"mounted disk, an interface with an address or a route, the boot display), a PF that has VFs, and a " +
			"device without an IOMMU.\n\n" +
			"The binding lasts until the next boot. With `--save`, viaduct also declares the device in a file " +
			"of /etc/viaduct/host.d, and `viaduct apply`, which each boot runs after `viaduct install`, takes " +
			"it again.\n\n" +
			"Examples:\n  viaduct bind enp1s0/vf0\n" +
			"  viaduct bind 0000:03:00.0 --dry-run\n" +
			"  viaduct bind enp1s0/vf0 enp1s0/vf1 --node-owner qemu:kvm\n" +
			"  viaduct bind 0000:03:00.0 --save",
		Flags: append([]cli.Flag{
			&cli.BoolFlag{Name: "save", Usage: "also declare the device, for each boot", Destination: &o.save},
			&cli.StringFlag{
				Name:        "driver",
				Usage:       "bind to `vfio|none|NAME`; vfio chooses the device's variant driver, else vfio-pci",
				Value:       bind.Auto,
				Destination: &o.driver,
			},
			&cli.StringFlag{Name: "node-owner", Usage: "let `USER[:GROUP]` own the device's nodes"},
		}, o.flags(e)...),
		BashComplete: e.completeSelectors,
		Action: func(c *cli.Context) (err error) {
			if err := o.parse(c); err != nil {
				return err
			}
			if o.selectors, err = selectors(c); err != nil {
				return err
			}
			if o.driver == string(sriov.UseHome) {
				return usagef("bind: --driver home: viaduct unbind gives devices back")
			}
			word := o.driver
			if o.driver, err = bind.ParseDriver(word); err != nil {
				return usagef("bind: --driver %s: %w", word, err)
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
		Usage:     "give devices, with their groups, back to the host's drivers",
		ArgsUsage: "SELECTOR...",
		Description: "A device gets back the driver that it had when viaduct took it. A device that viaduct did not " +
			"take gets the driver that the host would choose. viaduct refuses, with exit status 3, while a process " +
			"has the device open.\n\n" +
			"Examples:\n  viaduct unbind enp1s0/vf0\n" +
			"  viaduct unbind group=8\n" +
			"  viaduct unbind 0000:03:00.0 --save",
		Flags: append([]cli.Flag{
			&cli.BoolFlag{Name: "save", Usage: "also remove what bind --save declared", Destination: &o.save},
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
		e.printJSON(views)
	}
	return err
}

func (e *env) bind(ctx context.Context, o bindOptions) ([]changeView, error) {
	goal := bind.Take(o.driver)
	if o.owner != "" {
		owner, err := bind.ParseNodeOwner(o.owner)
		if err != nil {
			return nil, usagef("--node-owner: %w", err)
		}
		goal = goal.OwnedBy(owner)
	}
	lasts := " (until the next boot)"
	if o.save {
		lasts = " (and declared for each boot)"
	}

	return e.change(
		ctx,
		o.selectors,
		goal,
		o.changeOptions,
		lasts,
		func(m *declared.Manager, devices []*iommu.Device) error {
			var errs []error
			for _, d := range devices {
				if !o.save {
					continue
				}
				file, err := m.Save(d, o.driver, o.owner)
				if errs = append(errs, err); err == nil {
					e.note("%s is declared in %s", d.Name, file)
				}
			}
			return errors.Join(errs...)
		},
	)
}

func runUnbind(ctx context.Context, e *env, sel []iommu.Selector, o changeOptions) error {
	views, err := e.change(ctx, sel, bind.GiveBack(), o, "", func(m *declared.Manager, devices []*iommu.Device) error {
		owners, err := holder.Owners(m.Host(), devices)
		for _, owner := range owners {
			e.note("%s, and may take it again", owner)
		}
		errs := []error{err}
		for _, d := range devices {
			errs = append(errs, e.tellSaved(m, d, o.save))
		}
		return errors.Join(errs...)
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
		e.note("bind --save did not declare %s", d.Name)
	case forget:
		return m.Forget(d)
	case file != "":
		e.note("%s is still declared in %s, so viaduct apply takes it again: viaduct unbind %s --save removes that",
			d.Name, file, d.Name)
	}
	return nil
}

// changeView is one device's line of `bind --json` and `unbind --json`.
type changeView struct {
	Address  string        `json:"address"` // or the name of what is no PCI device
	From     *string       `json:"from"`
	To       *string       `json:"to"`
	Role     iommu.Role    `json:"role"`
	Changed  bool          `json:"changed"`
	Steps    []string      `json:"steps"`
	Writes   []writeView   `json:"writes"`
	Error    *string       `json:"error"`
	Refusals []refusalView `json:"refusals"`
}

// change brings devices to a goal: it resolves them, lets every gate speak before the first write, and then carries out
// all units. Afterwards is done for the devices that were asked for and are where they are to be; lasts says how long
// that lasts.
func (e *env) change(ctx context.Context, sel []iommu.Selector, goal bind.Goal, o changeOptions, lasts string,
	afterwards func(*declared.Manager, []*iommu.Device) error,
) ([]changeView, error) {
	if o.save {
		if err := e.mayChange("etc"); err != nil {
			return nil, err
		}
	}
	ctx, stop, on, err := e.beginChange(ctx, o.timeout)
	if err != nil {
		return nil, err
	}
	defer stop()
	if _, err := hostfile.Load(on.handle.Host()); err != nil && goal != bind.GiveBack() {
		// Which may say what is no guest's.
		return nil, usageError{err}
	}
	job, asked, err := on.prepare(ctx, sel, goal, o)
	if err != nil {
		return nil, err
	}

	for _, v := range job.Units {
		for _, h := range v.Overridden {
			e.note("forced, although %s", h)
		}
		for _, n := range v.Notes {
			e.note("%s", n)
		}
	}
	refused := job.Refused()
	if refused != nil && !o.keepGoing {
		return nil, refused
	}
	if h := on.handle.Host(); !h.Live() && !holder.Known(h) {
		e.note("%s is a captured host: it does not show who uses the devices", e.hostName)
	}

	var results []bind.Result
	if e.dryRun {
		results = job.Plan()
	} else {
		results = job.Run(ctx)
	}
	views, arrived, errs := viewResults(results, asked)
	views = append(views, viewRefused(job)...)
	errs = append([]error{refused}, errs...)
	if !e.dryRun && len(arrived) > 0 {
		m, err := on.declared()
		if err == nil {
			err = afterwards(m, arrived)
		}
		if errs = append(errs, err); err != nil {
			// It cannot be said.
			lasts = ""
		}
	}

	on.tellClaimed(results)
	switch {
	case e.json:
	case e.dryRun:
		e.preview(previewMove(goal, job, results, asked))
	default:
		e.printChanges(views, lasts)
	}
	return views, mixed(errors.Join(errs...), len(results) > 0 && !e.dryRun)
}

// prepare finds what the selectors name, finishes what interrupted runs left, and asks whether it may go to its goal.
func (c *changing) prepare(ctx context.Context, sel []iommu.Selector, goal bind.Goal, o changeOptions,
) (*bind.Job, []*iommu.Device, error) {
	if c.live() {
		if err := c.recover(ctx); err != nil {
			return nil, nil, err
		}
	}
	asked, err := resolveAsked(c.handle.Host(), c.topology, sel, goal, o.all)
	if err != nil {
		return nil, nil, err
	}
	job, err := c.handle.Prepare(ctx, bind.Request{Devices: asked, Goal: goal, Force: o.force})
	if job != nil {
		c.env.tellRecovered(job.Recovered)
	}
	return job, asked, err
}

// viewResults is what came of each device, and those of the devices asked for that are where they are to be.
func viewResults(results []bind.Result,
	asked []*iommu.Device) (views []changeView, arrived []*iommu.Device, errs []error) {
	views = []changeView{}
	byAddress := map[iommu.Address]*iommu.Device{}
	for _, d := range asked {
		if d.PCI {
			// Others have no address.
			byAddress[d.Address] = d
		}
	}
	for _, r := range results {
		views = append(views, viewChange(r))
		errs = append(errs, r.Err)
		if d := byAddress[r.Device]; r.Err == nil && d != nil {
			arrived = append(arrived, d)
		}
	}
	return views, arrived, errs
}

// viewRefused are the devices of units that are refused, which are left as they are.
func viewRefused(job *bind.Job) []changeView {
	var out []changeView
	for _, v := range job.Units {
		if v.Refused == nil {
			continue
		}
		for _, d := range v.Unit {
			left := bind.Change{Name: d.Name, From: d.Driver, To: d.Driver, Role: d.Role()}
			out = append(out, viewChange(bind.Result{Change: left, Err: v.Refused}))
		}
	}
	return out
}

// tellClaimed says which devices that go to the host vfio-pci.ids= will take from it again.
func (c *changing) tellClaimed(results []bind.Result) {
	var home []iommu.ID
	for _, r := range results {
		if !iommu.IsVFIODriver(r.To) && !slices.Contains(home, r.ID) {
			home = append(home, r.ID)
		}
	}
	if len(home) == 0 {
		return
	}
	for id, where := range holder.ClaimedByID(c.handle.Host(), home...) {
		c.env.note("vfio-pci.ids= in %s claims all %04x:%04x: vfio-pci takes them again at the next boot", where,
			id.Vendor, id.Device)
	}
}

// mixed makes refusals that were passed over a plain failure: something was touched.
func mixed(err error, touched bool) error {
	if touched && isRefused(err) {
		// No longer one of those.
		return errors.New(err.Error())
	}
	return err
}

// resolveAsked finds the devices that selectors name: one each, or all of a group, of a slot or, with many, of any.
func resolveAsked(h *iommu.Host, t *iommu.Topology, sel []iommu.Selector, goal bind.Goal,
	many bool) ([]*iommu.Device, error) {
	var asked []*iommu.Device
	for _, s := range sel {
		devices, err := s.Resolve(h, t)
		if err != nil {
			return nil, err
		}
		switch {
		case s.Form() == iommu.ByGroup:
			g := t.GroupOf(devices[0])
			if devices = g.Handed(); goal == bind.GiveBack() {
				devices = g.Endpoints()
			} else if len(devices) == 0 {
				why := holder.Reason{
					Kind: holder.Unsuitable,
					Text: "nothing in the group is for a guest (viaduct show " + s.String() + ")",
				}
				return nil, holder.Because("take "+s.String(), why, "name the device itself")
			}
		case len(devices) > 1 && !many && s.Form() != iommu.BySlot && !oneGroup(devices):
			_, err := s.One(h, t)
			// Several where one was meant: too easily too many.
			return nil, fmt.Errorf("%w (--all takes all of them)", err)
		}
		for _, d := range devices {
			if !slices.Contains(asked, d) {
				asked = append(asked, d)
			}
		}
	}

	return asked, nil
}

// oneGroup reports whether devices are of one IOMMU group, all of which goes along with whichever of them is named.
func oneGroup(devices []*iommu.Device) bool {
	return !slices.ContainsFunc(devices, func(d *iommu.Device) bool {
		return d.Group == nil || devices[0].Group == nil || *d.Group != *devices[0].Group
	})
}

// tellRecovered tells what became of interrupted changes.
func (e *env) tellRecovered(all []bind.Recovered) {
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
		Usage: "finish or undo what an interrupted run left behind",
		Description: "viaduct puts back a device that was being taken, and gives back one that was being given back. " +
			"Every command that changes something does this first. A write that still blocks is named, with " +
			"what it waits for.\n\n" +
			"Examples:\n  viaduct recover",
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return usagef("recover takes no arguments: it recovers all devices")
			}
			if err := e.mayChange(); err != nil {
				return err
			}
			h, err := e.open()
			if err != nil {
				return err
			}
			defer h.Close()
			b, err := e.openHandle(h, 0)
			if err != nil {
				return err
			}
			defer b.Close()
			ctx, stop := untilSignal(c.Context)
			defer stop()

			all, err := b.RecoverPatiently(ctx)
			errs := []error{err}
			m, err := declared.New(b, declared.Options{})
			if err == nil {
				var undone []bind.Recovered
				undone, err = m.Recover()
				all = append(all, undone...)
			}
			errs = append(errs, err)
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

func viewChange(r bind.Result) changeView {
	v := changeView{
		Address:  r.Name,
		From:     known(r.From),
		To:       known(r.To),
		Role:     r.Role,
		Changed:  len(r.Steps) > 0 && r.Err == nil,
		Refusals: viewRefusals(r.Err),
	}
	v.Steps, v.Writes = viewSteps(bind.Actions(r.Steps))

	if r.To == bind.None {
		v.To = nil
	}
	if r.Err != nil {
		text := r.Err.Error()
		v.Error = &text
	}
	return v
}

func (e *env) printChanges(views []changeView, lasts string) {
	for _, v := range views {
		switch {
		case v.Error != nil:
			// Said by the error itself.
		case !v.Changed:
			fmt.Fprintf(e.stdout, "%s is already on %s%s\n", v.Address, driverText(v.To), companionText(v.Role))
		default:
			fmt.Fprintf(e.stdout, "%s: %s -> %s%s%s\n", v.Address, driverText(v.From), driverText(v.To),
				companionText(v.Role), lasts)
		}
	}
}

// companionText says of a companion that it is one.
func companionText(r iommu.Role) string {
	if r == iommu.RoleCompanion {
		return ", as a companion"
	}
	return ""
}

func driverText(driver *string) string {
	if driver == nil {
		return "no driver"
	}
	return *driver
}
