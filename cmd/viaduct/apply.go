package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"viaduct/cmd/internal/declared"
	"viaduct/cmd/internal/hostfile"
	"viaduct/iommu"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

func applyCommand(e *env) *cli.Command {
	var o declaredOptions
	return command(&cli.Command{
		Name:  "apply",
		Usage: "apply the declared configuration",
		Description: "viaduct does what `viaduct plan` prints: PFs side by side, then devices. It checks everything " +
			"before the first write; one refusal refuses the whole command (exit status 3), unless " +
			"`--keep-going` is given. An item that fails is put back as it was, and the others go on. What is " +
			"as declared is not written.\n\n" +
			"With `--confirm TIME`, viaduct undoes everything after that time unless `viaduct apply " +
			"--confirmed` is run first. This works without the login that started it. A boot uses what was " +
			"confirmed last.\n\n" +
			"Examples:\n  viaduct apply\n" +
			"  viaduct apply --dry-run\n" +
			"  viaduct apply --confirm 60s && viaduct apply --confirmed",
		Flags: append(append(o.flags(e), e.dryRunFlags()...),
			&cli.BoolFlag{
				Name:        "keep-going",
				Usage:       "apply the rest when some items are refused",
				Destination: &o.keepGoing,
			},
			&cli.DurationFlag{
				Name:        "confirm",
				Usage:       "undo everything after `TIME` (e.g. 60s) unless viaduct apply --confirmed is run first",
				Destination: &o.confirm,
			},
			&cli.BoolFlag{Name: "confirmed", Usage: "keep what was applied with --confirm"},
			&cli.BoolFlag{
				Name: "boot",
				Usage: "apply as the boot unit does: wait for devices, skip those that the host was using when it " +
					"last ran, and keep going",
				Destination: &o.boot,
			},
			&cli.DurationFlag{
				Name:        "wait",
				Usage:       "with --boot: wait for devices this long",
				Value:       30 * time.Second,
				Destination: &o.wait,
			},
			forceFlag("a device that changes"),
			&cli.DurationFlag{
				Name:        "timeout",
				Usage:       "wait this long for one write, and for another viaduct",
				DefaultText: "30s, and 1s for each VF",
				Destination: &o.timeout,
			},
		),
		Action: func(c *cli.Context) (err error) {
			if c.Args().Present() {
				return usagef("apply takes no arguments: it applies everything that is declared")
			}
			if o.force, err = parseKinds(c.StringSlice("force")); err != nil {
				return err
			}
			if c.IsSet("timeout") {
				if err := checkTimeout(o.timeout); err != nil {
					return err
				}
			}

			if c.Bool("confirmed") {
				if c.NumFlags() > 1 {
					return usagef("apply --confirmed takes no other option")
				}
				return runConfirmed(e)
			}

			if c.IsSet("confirm") && (o.confirm < time.Second || o.boot || e.dryRun) {
				return usagef("apply: --confirm needs a time of at least a second (e.g. 60s), and cannot be combined " +
					"with --boot or --dry-run")
			}
			if o.wait < 0 {
				return usagef("apply: invalid --wait %s: want zero or more", o.wait)
			}
			if e.dryRun {
				if err := e.mayChange(); err != nil {
					return err
				}
				return runPlan(e, &o, e.declaredByFile, e.printPlan)
			}

			err = runApply(c.Context, e, &o)
			if o.boot {
				err = errors.Join(err, restoreLeases(c.Context, e))
			}
			return err
		},
	})
}

// planLocked plans what is declared, and locks all that it changes before that is looked at for the last time: another
// viaduct may be in the middle of it, which looks like a difference, or like something that cannot be. What is wanted
// is asked each time.
func (c *changing) planLocked(ctx context.Context, o *declaredOptions,
	wanted func() (*hostfile.Host, error)) (*declared.Manager, []*declared.Item, error) {
	locked := map[string]bool{}
	for {
		s, err := wanted()
		if err != nil {
			return nil, nil, err
		}
		m, err := o.manager(c.env, c.handle)
		if err != nil {
			return nil, nil, err
		}
		items, err := m.Plan(s)
		if err != nil {
			return nil, nil, err
		}

		var devices []*iommu.Device
		for _, i := range items {
			if i.State != declared.Differs && i.State != declared.Refused {
				continue
			}
			for _, d := range i.Devices() {
				if !locked[d.Name] {
					devices, locked[d.Name] = append(devices, d), true
				}
			}
		}

		if len(devices) > 0 {
			if err := c.handle.Lock(ctx, devices); err != nil {
				return nil, nil, err
			}
			if err := c.recover(ctx); err != nil {
				return nil, nil, err
			}
		}

		if len(devices) == 0 || c.handle.Undisturbed() {
			for _, i := range items {
				if err := c.handle.StuckIn(bind.AddressesOf(i.Devices())...); err != nil &&
					i.State == declared.Differs {
					i.Refuse(err)
				}
			}
			return m, items, nil
		}

		if c.topology, err = c.handle.Scan(); err != nil {
			return nil, nil, err
		}
	}
}

// runApply makes the host what is declared of it: what that is, the plan, who is against it, the changes, and what is
// to be known of them afterwards.
func runApply(ctx context.Context, e *env, o *declaredOptions) error {
	ctx, stop, c, err := e.beginChange(ctx, o.timeout)
	if err != nil {
		return err
	}
	defer stop()
	wanted, wrong, err := c.wanted(o)
	if err != nil {
		return err
	}
	if o.boot {
		o.keepGoing = true
		if err := c.awaitDeclared(ctx, o, wanted); err != nil {
			return err
		}
	}
	if err := c.recover(ctx); err != nil {
		return err
	}

	m, items, err := c.planLocked(ctx, o, wanted)
	if err != nil {
		return err
	}
	if o.watching {
		// An apply that was waited for may have left the host so.
		if held, err := m.Held(); held || err != nil {
			return err
		}
	}
	s, err := wanted()
	if err != nil {
		return err
	}
	m.Check(items)
	errs, refusal := e.judge(items)
	if refusal != nil && !o.keepGoing {
		e.printApplied(items, 0, refusal)
		return refusal
	}

	if !o.boot {
		// To declare nothing takes no right to look at everybody.
		if err := m.Protect(); err != nil && (len(items) > 0 || !errors.Is(err, holder.ErrBlind)) {
			return err
		}
	}
	trial, err := o.begin(m, s)
	if err != nil {
		return err
	}
	changed, touched := 0, false
	errs = append(errs, m.Apply(ctx, items, func(i *declared.Item, err error) {
		touched = true
		for _, n := range i.Notes {
			if !followsSteps(n) {
				e.note("%s", n)
			}
		}
		if err == nil {
			changed++
			if !e.json {
				fmt.Fprintf(e.stdout, "%s: as declared (%d steps)\n", itemName(i), len(i.Steps))
			}
		} else {
			i.Err = err
		}
	}))

	errs = append(errs, m.Remember(items))
	switch {
	case o.confirm > 0:
		waits, err := m.Extend(trial, o.confirm) // the time is counted from now
		if errs = append(errs, err); waits {
			e.note("viaduct undoes this in %s unless viaduct apply --confirmed is run first", o.confirm)
		}
	case !o.boot && o.file == "" && errors.Join(errs...) == nil:
		errs = append(errs, m.Ended(s))
	}
	errs = append(errs, wrong)
	e.printApplied(items, changed, errors.Join(errs...))
	return mixed(errors.Join(errs...), touched)
}

// wanted says what is to be applied, each time it is asked: what is declared, and at a boot what is in force instead of
// that. A boot does without files that cannot be read, if something else was in force, and fails in the end: wrong.
func (c *changing) wanted(o *declaredOptions) (wanted func() (*hostfile.Host, error), wrong, err error) {
	s, wrong := o.load(c.handle.Host())
	if wrong != nil {
		wrong = usageError{wrong}
	}
	if !o.boot {
		return func() (*hostfile.Host, error) { return s, nil }, nil, wrong
	}

	ask := func() (*declared.Use, error) { return declared.Of(c.handle.Host()).InForce(s, wrong) }
	use, err := ask()
	if err != nil {
		return nil, nil, err
	}
	if use.Why != "" {
		c.env.note("%s", use.Why)
	}
	wanted = func() (*hostfile.Host, error) {
		use, err := ask()
		if err != nil {
			return nil, err
		}
		return use.Host, nil
	}
	return wanted, wrong, nil
}

// awaitDeclared waits for the devices that are declared, which a boot finds one after the other.
func (c *changing) awaitDeclared(ctx context.Context, o *declaredOptions, wanted func() (*hostfile.Host, error)) error {
	s, err := wanted()
	if err != nil {
		return err
	}
	m, err := o.manager(c.env, c.handle)
	if err != nil {
		return err
	}
	waiting, done := context.WithTimeout(ctx, o.wait)
	defer done()
	if err := m.Wait(waiting, s); err != nil {
		return err
	}
	c.topology, err = c.handle.Topology()
	return err
}

// judge are the items that cannot be brought where they are to be, and the refusal that these come to unless one goes
// on without them; what is only missing is none.
func (e *env) judge(items []*declared.Item) (errs []error, refusal error) {
	refused := false
	for _, i := range items {
		switch {
		case i.Err == nil:
		case !i.Wrong():
			e.note("%s is missing and optional", i.Name)
		default:
			errs = append(errs, i.Err)
			refused = refused || i.State != declared.Missing
		}
	}
	switch err := errors.Join(errs...); {
	case !refused:
		return errs, nil
	case errors.Is(err, holder.ErrRefused):
		return errs, err
	}
	all := &holder.RefusedError{What: "apply"}
	for _, err := range errs {
		all.Reasons = append(all.Reasons, holder.Reason{Kind: holder.Declaration, Text: err.Error(), Err: err})
	}
	return errs, all
}

// printApplied tells what became of the items, beside what was told of each that was changed.
func (e *env) printApplied(items []*declared.Item, changed int, err error) {
	switch {
	case e.json:
		views := []itemView{}
		for _, i := range items {
			views = append(views, viewItem(i))
		}
		e.printJSON(views)
	case err != nil || changed > 0:
	case len(items) == 0:
		e.note("nothing is declared in /%s or /%s: viaduct adopt writes a file that describes this host",
			hostfile.File, hostfile.Dir)
	default:
		fmt.Fprintln(e.stdout, "the host is already as declared")
	}
}

// begin says that what is declared is in force from now on, or is tried; the guard stands, then.
func (o *declaredOptions) begin(m *declared.Manager, s *hostfile.Host) (trial string, err error) {
	switch {
	case o.boot:
		return "", nil
	case o.confirm == 0:
		return "", m.Starts(o.file != "")
	}
	if err := m.Clean(); err != nil {
		return "", err
	}
	trial, withdraw, err := m.Tries(s, o.confirm, o.file != "")
	if err != nil {
		return "", err
	}
	if err := guard(m.Host()); err != nil {
		return "", errors.Join(err, withdraw())
	}
	return trial, nil
}

func undoCommand(e *env) *cli.Command {
	var timeout time.Duration
	return command(&cli.Command{
		Name:  "undo",
		Usage: "undo the last apply",
		Description: "PFs get back the VFs, settings and drivers that they had before, and the host gets back the " +
			"devices that were taken. A raised MTU and hw-tc-offload stay. The record of an apply is lost with " +
			"the next boot. The watch service leaves the result alone until the next apply.\n\n" +
			"Examples:\n  viaduct undo",
		Flags: []cli.Flag{
			&cli.BoolFlag{
				Name: "unless-confirmed",
				Usage: "wait for viaduct apply --confirmed, and undo the apply when its time is over (apply " +
					"--confirm starts this)",
			},
			forceFlag("a device that changes"),
			&cli.DurationFlag{
				Name:        "timeout",
				Usage:       "wait this long for one write, and for another viaduct",
				Value:       bind.DefaultTimeout,
				Destination: &timeout,
			},
		},
		Action: func(c *cli.Context) error {
			if c.Bool("unless-confirmed") {
				return runGuard(c.Context, e, timeout)
			}
			if c.Args().Present() {
				return usagef("undo takes no arguments: it undoes the whole last apply")
			}
			if err := checkTimeout(timeout); err != nil {
				return err
			}
			force, err := parseKinds(c.StringSlice("force"))
			if err != nil {
				return err
			}
			return runUndo(c.Context, e, force, timeout, nil)
		},
	})
}

// runUndo undoes the last apply; due, if there is one, says whether that still is to be done when no other apply is at
// it any more.
func runUndo(ctx context.Context, e *env, force []holder.Kind, timeout time.Duration, due func() (bool, error)) error {
	ctx, stop, c, err := e.beginChange(ctx, timeout)
	if err != nil {
		return err
	}
	defer stop()
	m, err := e.declared(c.handle, declared.Options{Force: force})
	if err != nil {
		return err
	}
	addresses, known, err := m.Last()
	if err != nil {
		return err
	}

	if !known {
		fmt.Fprintln(e.stdout,
			"there is nothing to undo: since the boot no apply changed anything, or it was undone already")
		return nil
	}

	var devices []*iommu.Device
	for _, a := range addresses {
		if d, err := c.topology.Find(a); err == nil {
			devices = append(append(devices, d), c.topology.VFs(d)...)
		}
	}

	if err := c.lock(ctx, devices); err != nil {
		return err
	}
	if due != nil {
		if still, err := due(); err != nil || !still {
			return errors.Join(err, errNotDue)
		}
	}

	if due == nil {
		// Before the host changes: what looks after the declaration must not apply it again meanwhile.
		if err := m.Undone(); err != nil {
			return err
		}
	}
	done := 0
	err = m.Undo(func(a iommu.Address, err error) {
		if err == nil {
			done++
			fmt.Fprintf(e.stdout, "%s: as before\n", a)
		}
	})
	return mixed(err, done > 0)
}

func adoptCommand(e *env) *cli.Command {
	var file, source string
	return command(&cli.Command{
		Name:  "adopt",
		Usage: "write a host.yaml that describes the host as it is",
		Description: "The file has the PFs with their VFs and settings, and the devices on a vfio driver. It names " +
			"devices by what stays with the card, so that a plan of it is empty. With `--import`, it has what " +
			"the files of another tool declare instead.\n\n" +
			"Examples:\n  viaduct adopt\n" +
			"  viaduct adopt -o /etc/viaduct/host.yaml\n" +
			"  viaduct adopt --import driverctl",
		Flags: []cli.Flag{
			&cli.StringFlag{
				Name:        "output",
				Aliases:     []string{"o"},
				Usage:       "write to `FILE`, which must not exist, instead of standard output",
				Destination: &file,
				TakesFile:   true,
			},
			&cli.StringFlag{
				Name: "import",
				Usage: "write what the files of this tool declare: " +
					"`" + strings.Join(declared.Sources(), "|") + "`",
				Destination: &source,
			},
		},
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return usagef("adopt takes no arguments: it describes the whole host")
			}
			if c.IsSet("import") && !slices.Contains(declared.Sources(), source) {
				return usagef("adopt: --import needs %s, not %q", strings.Join(declared.Sources(), " or "), source)
			}
			return runAdopt(e, file, source)
		},
	})
}

func runAdopt(e *env, file, source string) error {
	stop, m, err := e.openDeclared(declared.Options{})
	if err != nil {
		return err
	}
	defer stop()
	var s *hostfile.Host
	var comments map[string]string
	var notes []string
	if source == "" {
		s, comments, err = m.Adopt()
	} else {
		s, notes, err = m.Import(source)
	}

	if err != nil {
		return err
	}
	for _, n := range notes {
		e.note("%s", n)
	}
	text, err := s.YAML(comments)
	if err != nil {
		return err
	}

	if file == "" {
		_, _ = e.stdout.Write(text)
		return nil
	}

	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	return errors.Join(err, f.Sync(), f.Close())
}

func schemaCommand(e *env) *cli.Command {
	return command(&cli.Command{
		Name:        "schema",
		Usage:       "print the JSON Schema of host.yaml, for editors",
		Description: "Examples:\n  viaduct schema > host.schema.json",
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return usagef("schema takes no arguments")
			}
			e.printJSON(hostfile.Schema())
			return nil
		},
	})
}
