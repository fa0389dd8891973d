package main

import (
	"context"
	"fmt"
	"time"

	"github.com/urfave/cli/v2"

	"viaduct/cmd/internal/lease"
	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/bind"
)

func releaseCommand(e *env) *cli.Command {
	var wait, timeout time.Duration
	var dead, quarantined bool
	var force string
	return command(&cli.Command{
		Name:      "release",
		Usage:     "take a guest's devices back, and clean them",
		ArgsUsage: "GUEST",
		Description: "viaduct resets each device, gives a VF the settings that it had before it was assigned, reads " +
			"everything back and frees the device. The device stays on its vfio driver if it was on it before, " +
			"and otherwise gets the driver that it had. A device that cannot be cleaned goes into quarantine, " +
			"until `--quarantined` succeeds or the machine is restarted (kexec does not reset devices).\n\n" +
			"viaduct refuses, with exit status 3, while a process has a device open; `--wait` gives it time to " +
			"end. `--json` prints what was done to each device, its certificate.\n\n" +
			"Examples:\n  viaduct release web\n" +
			"  viaduct release web --wait 60s --json\n" +
			"  viaduct release --dead\n" +
			"  viaduct release --quarantined 0000:01:10.0\n" +
			"  viaduct release --quarantined 0000:01:10.0 --force=quarantine",
		Flags: []cli.Flag{
			&cli.DurationFlag{Name: "wait", Usage: "wait this long for the guest to end", Destination: &wait},
			&cli.BoolFlag{Name: "dead", Usage: "release all dead leases", Destination: &dead},
			&cli.BoolFlag{
				Name:        "quarantined",
				Usage:       "clean SELECTOR... in quarantine again, and free what is clean then",
				Destination: &quarantined,
			},
			&cli.StringFlag{
				Name:        "force",
				Usage:       "with --quarantined: `quarantine` frees a device that still cannot be reset, or is gone",
				Destination: &force,
			},
			&cli.DurationFlag{
				Name:        "timeout",
				Usage:       "wait this long for one write, and for another viaduct",
				Value:       bind.DefaultTimeout,
				Destination: &timeout,
			},
			e.jsonFlag(),
		},
		BashComplete: e.completeGuests,
		Action: func(c *cli.Context) error {
			if err := checkTimeout(timeout); err != nil {
				return err
			}
			switch {
			case force != "" && (force != "quarantine" || !quarantined):
				return usagef("release: --force needs --quarantined, and the value quarantine: nothing else of a " +
					"release can be forced")
			case wait < 0 || dead && wait > 0:
				return usagef("release: --wait %s needs the name of one guest and a time of zero or more", wait)
			case dead && (quarantined || c.Args().Present()):
				return usagef("release: --dead takes no arguments: it releases all dead leases")
			case dead:
				return runRelease(c.Context, e, timeout,
					func(ctx context.Context, m *lease.Manager) ([]lease.Certificate, error) { return m.Reclaim(ctx) })
			case quarantined:
				sel, err := selectors(c)
				if err != nil {
					return err
				}
				return runRelease(c.Context, e, timeout,
					func(ctx context.Context, m *lease.Manager) ([]lease.Certificate, error) {
						var all []lease.Quarantine
						for _, s := range sel {
							q, err := m.InQuarantine(s)
							if err != nil {
								return nil, err
							}
							all = append(all, q)
						}
						return m.Lift(ctx, all, force == "quarantine")
					})
			}
			guest, err := oneArgument(c, "the guest's name")
			if err != nil {
				return err
			}
			return runRelease(c.Context, e, timeout,
				func(ctx context.Context, m *lease.Manager) ([]lease.Certificate, error) {
					return m.Release(ctx, guest, wait)
				})
		},
	})
}

func runRelease(ctx context.Context, e *env, timeout time.Duration,
	do func(context.Context, *lease.Manager) ([]lease.Certificate, error)) error {
	ctx, stop, m, err := e.beginLeases(ctx, timeout, lease.Ends)
	if err != nil {
		return err
	}
	defer stop()
	certificates, err := do(ctx, m)
	if e.json {
		if len(certificates) == 0 && isRefused(err) {
			return err
		}
		views := []certificateView{}
		for i := range certificates {
			views = append(views, viewCertificate(&certificates[i]))
		}
		e.printJSON(views)
		return mixed(err, len(views) > 0)
	}

	for _, c := range certificates {
		switch c.Result {
		case lease.Clean:
			fmt.Fprintf(e.stdout, "%s of %s: clean, on %s\n", c.Address, c.Guest, driverText(known(c.Driver)))
			if c.Note != "" {
				e.note("%s: %s", c.Address, c.Note)
			}
		case lease.Unreset:
			fmt.Fprintf(e.stdout, "%s of %s: free, and not reset: %s\n", c.Address, c.Guest, c.Why)
		case lease.Missing:
			fmt.Fprintf(e.stdout, "%s of %s: lost: %s\n", c.Address, c.Guest, c.Why)
		}
	}

	return mixed(err, len(certificates) > 0)
}

// certificateView is what release --json prints of each device.
type certificateView struct {
	Guest    string         `json:"guest"`
	Address  iommu.Address  `json:"address"`
	ID       idView         `json:"id"`
	Place    *string        `json:"place"`
	Time     time.Time      `json:"time"`
	Result   lease.Result   `json:"result"`
	Why      *string        `json:"why"`
	Reset    *string        `json:"reset"`
	Found    sriov.Settings `json:"found"`
	Settings sriov.Settings `json:"settings"`
	Driver   *string        `json:"driver"`
	Note     *string        `json:"note"`
}

// idView is what a device says it is, in hexadecimal digits.
type idView struct {
	Vendor    *string `json:"vendor"`
	Device    *string `json:"device"`
	Subvendor *string `json:"subvendor"`
	Subdevice *string `json:"subdevice"`
	Class     *string `json:"class"`
}

func viewCertificate(c *lease.Certificate) certificateView {
	id := idView{
		hex(4, uint32(c.ID.Vendor)), hex(4, uint32(c.ID.Device)),
		hex(4, uint32(c.ID.Subvendor)), hex(4, uint32(c.ID.Subdevice)), hex(6, c.ID.Class),
	}
	return certificateView{
		Guest: c.Guest, Address: c.Address, ID: id, Place: known(c.Place), Time: c.Time, Result: c.Result,
		Why: known(c.Why), Reset: known(c.Reset), Found: c.Found, Settings: c.Settings, Driver: known(c.Driver),
		Note: known(c.Note),
	}
}
