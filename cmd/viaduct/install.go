package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"viaduct/cmd/internal/declared"
	"viaduct/cmd/internal/hostfile"
	"viaduct/cmd/internal/install"
	"viaduct/iommu"
	"viaduct/vfio/holder"
)

func installCommand(e *env) *cli.Command {
	var o install.Options
	var initramfs bool
	var pkg packageOptions
	return command(&cli.Command{
		Name:  "install",
		Usage: "apply the declared configuration at each boot",
		Description: "viaduct writes units for systemd: one runs `viaduct apply --boot` before the network comes up " +
			"and before guests start, one is started by a udev rule when a card appears later, and one waits for " +
			"bonds if the configuration has after_bond. viaduct also records which devices the host uses now, " +
			"and no boot takes those.\n\n" +
			"With `--root`, viaduct writes the files of a package into a folder instead: units that are not " +
			"enabled, the udev rule, manual pages and completion scripts.\n\n" +
			"Examples:\n  viaduct install\n" +
			"  viaduct install --watch\n" +
			"  viaduct install --initramfs --dry-run\n" +
			"  viaduct install --root debian/tmp --program /usr/sbin/viaduct",
		Flags: append([]cli.Flag{
			&cli.BoolFlag{
				Name:        "watch",
				Usage:       "add a service that applies the configuration after driver reloads, hotplug and resets",
				Destination: &o.Watch,
			},
			&cli.BoolFlag{
				Name:        "libvirt",
				Usage:       "add a hook: libvirt checks, takes and cleans what is assigned to its domains",
				Destination: &o.Libvirt,
			},
			&cli.BoolFlag{
				Name: "initramfs",
				Usage: "add a hook that keeps devices with `initramfs:` true from the host's drivers from the " +
					"start",
				Destination: &initramfs,
			},
			&cli.StringFlag{
				Name:        "root",
				Usage:       "write the files of a package below `DIR`, and change nothing of this host",
				Destination: &pkg.root,
				TakesFile:   true,
			},
			&cli.StringFlag{
				Name:        "unit-dir",
				Usage:       "with --root: put the units into `DIR`",
				Value:       install.DefaultUnits,
				Destination: &pkg.units,
			},
			&cli.StringFlag{
				Name:        "program",
				Usage:       "with --root: have the units run `FILE`",
				Value:       "/usr/sbin/viaduct",
				Destination: &pkg.program,
			},
		}, e.dryRunFlags()...),
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return usagef("install takes no arguments")
			}
			if c.IsSet("root") {
				return runPackage(e, c.App, &pkg)
			}
			if c.IsSet("unit-dir") || c.IsSet("program") {
				return usagef("install: --unit-dir and --program need --root")
			}
			return runInstall(c.Context, e, o, initramfs)
		},
	})
}

func runInstall(ctx context.Context, e *env, o install.Options, initramfs bool) error {
	if err := e.mayChange("etc"); err != nil {
		return err
	}
	stop, m, err := e.openDeclared(declared.Options{})
	if err != nil {
		return err
	}
	defer stop()
	h := m.Host()
	s, err := hostfile.Load(h)
	if err != nil {
		return usageError{err}
	}

	if o.Program, err = os.Executable(); err != nil {
		return err
	}
	root := h.Path("")
	if h.Real() {
		if err := install.Trusted(o.Program); err != nil {
			return err
		}
	}
	o.Units = install.PackageUnits(root, o.Program)
	o.Late = slices.ContainsFunc(s.PFs, func(pf hostfile.PF) bool { return pf.AfterBond })
	generator := install.Found(root)
	if h.Live() {
		switch err := m.Protect(); {
		case errors.Is(err, holder.ErrBlind) && (e.dryRun || !systemd(h)):
			// An image is made, which carries nothing yet; and who may only look sees less.
			e.note("viaduct cannot see which devices this host uses, and did not record them: run viaduct install " +
				"again on the host itself, as root")
		case err != nil:
			return err
		}
	}

	if initramfs {
		if o.Initramfs, err = m.Initramfs(s); err != nil {
			return err
		}
	}

	files, err := o.Files(generator)
	if err != nil {
		return err
	}

	for _, volatile := range []string{"/tmp/", "/run/", "/dev/", "/home/", "/root/"} {
		if h.Live() && strings.HasPrefix(o.Program, volatile) {
			e.note("the units run %s, which may be missing at boot: put it into /usr/local/sbin", o.Program)
		}
	}
	if e.dryRun {
		return e.previewInstall(h, files)
	}

	watched := install.Watches(root)
	changed, err := install.Write(root, files)
	for _, f := range changed {
		fmt.Fprintln(e.stdout, f)
	}
	if err != nil {
		return err
	}
	if initramfs || slices.ContainsFunc(changed, install.InInitramfs) {
		e.note("now rebuild the initramfs: %s", generator.Rebuild())
	}

	if why := install.Confined(root, o.Program); o.Libvirt && why != "" {
		e.note("%s", why)
	}
	if o.Libvirt && slices.Contains(changed, install.LibvirtHook) {
		e.note("now restart libvirt, which looks for hooks when it starts: systemctl restart libvirtd (or virtqemud); " +
			"running domains go on")
	}
	if len(changed) == 0 {
		fmt.Fprintln(e.stdout, "everything is installed already")
		return nil
	}

	if !systemd(h) {
		e.note("systemd does not run here and finds the units enabled when it starts; another init system must run "+
			"%s apply --boot",
			o.Program)
		return nil
	}
	start := []string{install.HotplugPath}
	if o.Watch {
		start = append(start, "viaduct-watch.service")
	} else if watched {
		if err := systemctl(ctx, h, "stop", "viaduct-watch.service"); err != nil {
			return err
		}
	}
	return reload(ctx, h, start)
}

// previewInstall prints which files an install would write and remove. A captured host has none of it.
func (e *env) previewInstall(h *iommu.Host, files []install.File) error {
	p := previewFiles(files)
	var written, removed []string
	for _, f := range files {
		written = append(written, f.Path)
	}
	if h.Live() {
		var err error
		if written, removed, err = install.Changes(h.Path(""), files); err != nil {
			return err
		}
	}

	for _, part := range []struct {
		verb  string
		names []string
	}{{"writes ", written}, {"removes ", removed}} {
		if len(part.names) > 0 {
			p.of(part.verb + count(len(part.names), "file"))
			p.says(part.names...)
		}
	}
	if len(written)+len(removed) == 0 {
		p.of("everything is installed already")
	}
	p.note("records which devices the host uses now: no boot takes those")
	e.preview(p)
	return nil
}

func uninstallCommand(e *env) *cli.Command {
	return command(&cli.Command{
		Name:  "uninstall",
		Usage: "remove what install wrote",
		Description: "The declared configuration and the records of devices (/var/lib/viaduct) stay.\n\n" +
			"Examples:\n  viaduct uninstall",
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return usagef("uninstall takes no arguments")
			}
			if err := e.mayChange("etc"); err != nil {
				return err
			}
			h, err := e.open()
			if err != nil {
				return err
			}

			defer h.Close()
			root := h.Path("")
			if systemd(h) {
				if err := systemctl(c.Context, h, "stop", "viaduct-watch.service"); err != nil && install.Watches(root) {
					return err
				}
				// What was never installed cannot be stopped, and what is left of it looks for a mark that nobody
				// makes.
				_ = systemctl(c.Context, h, "stop", install.HotplugPath)
			}

			changed, err := install.Remove(root)
			for _, f := range changed {
				fmt.Fprintln(e.stdout, f)
			}
			if err == nil && len(changed) > 0 {
				err = reload(c.Context, h, nil)
			}
			if slices.ContainsFunc(changed, install.InInitramfs) {
				e.note("now rebuild the initramfs: %s", install.Found(root).Rebuild())
			}
			return err
		},
	})
}

// systemd reports whether it runs this host (sd_booted(3)).
func systemd(h *iommu.Host) bool { return h.Exists("run/systemd/system") }

// reload tells systemd and udev of files that changed, where they run.
func reload(ctx context.Context, h *iommu.Host, start []string) error {
	if !systemd(h) {
		return nil
	}
	errs := []error{systemctl(ctx, h, "daemon-reload"), tool(ctx, h, "udevadm", "control", "--reload")}
	for _, unit := range start {
		errs = append(errs, systemctl(ctx, h, "restart", unit))
	}
	return errors.Join(errs...)
}

func systemctl(ctx context.Context, h *iommu.Host, args ...string) error {
	return tool(ctx, h, "systemctl", args...)
}

// tool runs one of the system's own tools.
func tool(ctx context.Context, h *iommu.Host, name string, args ...string) error {
	for _, dir := range []string{"usr/bin", "bin", "usr/sbin", "sbin"} {
		if !h.Exists(dir + "/" + name) {
			continue
		}
		file := h.Path(dir + "/" + name)
		if out, err := exec.CommandContext(ctx, file, args...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s %s: %w: %s", file, strings.Join(args, " "), err, strings.TrimSpace(string(out)))
		}
		return nil
	}
	return fmt.Errorf("%s is not on this host", name)
}

func watchCommand(e *env) *cli.Command {
	o := declaredOptions{boot: true, watching: true}
	var once bool
	return command(&cli.Command{
		Name:  "watch",
		Usage: "apply the declared configuration whenever the host differs",
		Description: "viaduct checks the host when the kernel reports a change of a device or a link, and every " +
			"minute. What `viaduct undo` or `viaduct apply -f` left different stays so until the next apply. The " +
			"service of `install --watch` runs this command, and so does, with `--once`, the udev rule of " +
			"`install`.\n\n" +
			"Examples:\n  viaduct watch\n" +
			"  viaduct watch --once",
		Flags: []cli.Flag{
			&cli.StringFlag{
				Name:        "file",
				Aliases:     []string{"f"},
				Usage:       "read `FILE` instead of /etc/viaduct/host.yaml and host.d",
				Destination: &o.file,
				TakesFile:   true,
			},
			&cli.BoolFlag{Name: "once", Usage: "check once, and end", Destination: &once},
		},
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return usagef("watch takes no arguments")
			}
			if once {
				return e.keepOnce(c.Context, &o)
			}
			return runWatch(c.Context, e, &o)
		},
	})
}

func runWatch(ctx context.Context, e *env, o *declaredOptions) error {
	if err := e.mayChange(); err != nil {
		return err
	}
	ctx, stop := untilSignal(ctx)
	defer stop()
	said := ""
	h, err := e.open()
	if err != nil {
		return err
	}

	defer h.Close()
	return declared.Watch(ctx, h, func() bool {
		tried, err := e.keep(ctx, o)
		now := ""
		if err != nil {
			now = err.Error()
		}
		if now != said && ctx.Err() == nil {
			// Each once, not each minute.
			for line := range strings.Lines(now) {
				e.note("%s", strings.TrimSpace(line))
			}
		}
		said = now
		return tried && err != nil
	})
}

// keepOnce looks, and does what it takes, until no more devices come.
func (e *env) keepOnce(ctx context.Context, o *declaredOptions) error {
	if err := e.mayChange(); err != nil {
		return err
	}
	var last error
	h, err := e.open()
	if err != nil {
		return err
	}
	defer h.Close()
	err = declared.Settle(ctx, h, func() { _, last = e.keep(ctx, o) })
	return errors.Join(err, last, restoreLeases(ctx, e))
}

// keep is one look, and what it takes; it says whether it tried to change something.
func (e *env) keep(ctx context.Context, o *declaredOptions) (tried bool, err error) {
	items, err := e.lookAtDeclared(o)
	errs := []error{err}
	for _, i := range items {
		if i.State == declared.Differs {
			return true, runApply(ctx, e, o)
		}
		if i.Wrong() {
			errs = append(errs, i.Err)
		}
	}
	return false, errors.Join(errs...)
}

// lookAtDeclared is how the host differs from what is declared; nothing if it is left alone on purpose.
func (e *env) lookAtDeclared(o *declaredOptions) ([]*declared.Item, error) {
	stop, m, err := e.openDeclared(o.options())
	if err != nil {
		return nil, err
	}
	defer stop()
	s, wrong := o.load(m.Host())
	use, err := m.InForce(s, wrong)
	if err != nil || use.Held {
		return nil, errors.Join(err, wrong)
	}
	items, err := m.Plan(use.Host)
	return items, errors.Join(err, wrong)
}
