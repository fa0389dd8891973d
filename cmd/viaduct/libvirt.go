package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"viaduct/cmd/internal/lease"
	"viaduct/vfio/bind"
)

// libvirtHookCommand is what libvirt runs, by the file that install --libvirt writes.
func libvirtHookCommand(e *env) *cli.Command {
	return command(&cli.Command{
		Name:      "libvirt-hook",
		Usage:     "serve libvirt when a domain starts and stops (viaduct install --libvirt)",
		ArgsUsage: "DOMAIN OPERATION SUBOPERATION [EXTRA] < XML",
		Description: "prepare begin: fails the start of a domain that does not have exactly what is assigned to it, " +
			"or has what is another's; else\nconfigures and takes it. start begin: writes down what the domain drew " +
			"from a network made of a pool. release end: scrubs.\nmigrate begin: fails the coming of a domain that " +
			"has what is another's here. One that viaduct migrate brings starts without its device.\nIt never calls " +
			"libvirt, and always succeeds at reconnect. With --network, of a network: port-created gives a domain " +
			"the lease of\nwhat it drew, also while it runs, and port-deleted scrubs that.",
		Hidden: true,
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "network", Usage: "be the hook of a network, and not of a domain"},
		},
		Action: func(c *cli.Context) error {
			if c.NArg() < 3 {
				return usagef("libvirt-hook: want a domain, an operation and a suboperation, as libvirt passes them")
			}
			if c.Bool("network") {
				return runNetworkHook(c.Context, e, c.Args().Get(1))
			}
			err := runLibvirtHook(c.Context, e, c.Args().Slice())
			if op := c.Args().Get(1); err != nil && (op == "reconnect" || op == "started") {
				// The domain runs.
				e.note("%v", err)
				return nil
			}
			return err
		},
	})
}

// handedOver is what libvirt hands over to a hook.
func handedOver() ([]byte, error) {
	if err := notTyped("libvirt-hook"); err != nil {
		return nil, err
	}
	// More than any domain.
	const most = 16 << 20
	return io.ReadAll(io.LimitReader(os.Stdin, most))
}

// notTyped refuses to wait at a terminal for what another program writes.
func notTyped(command string) error {
	if _, err := unix.IoctlGetTermios(int(os.Stdin.Fd()), unix.TCGETS); err == nil {
		return usagef("%s reads what another program writes, and its standard input is a terminal", command)
	}
	return nil
}

// runNetworkHook is the hook of a network: of what it gives to domains, and gets back.
func runNetworkHook(ctx context.Context, e *env, op string) error {
	text, err := handedOver()
	if err != nil || op != "port-created" && op != "port-deleted" {
		return err
	}
	port, err := lease.ParsePort(text)
	if err != nil || port == nil {
		return err
	}
	does := lease.Ends
	if op == "port-created" {
		does = lease.Checks
	}
	ctx, stop, m, err := e.beginLeases(ctx, bind.DefaultTimeout, does)
	if err != nil {
		return err
	}
	defer stop()
	if op == "port-created" {
		return m.Plug(ctx, port)
	}
	certificates, err := m.Unplug(ctx, port, 20*time.Second)
	e.tellQuarantined(certificates)
	return err
}

// tellQuarantined tells libvirt's log what nobody gets any more.
func (e *env) tellQuarantined(certificates []lease.Certificate) {
	for _, c := range certificates {
		if c.Result == lease.InQuarantine {
			e.note("%s of %s is in quarantine: %s", c.Address, c.Guest, c.Why)
		}
	}
}

// runLibvirtHook is called with a domain's name, an operation and a part of it, and what libvirt tells beside that.
func runLibvirtHook(ctx context.Context, e *env, args []string) error {
	name, op, sub, extra := args[0], args[1], args[2], ""
	if len(args) > 3 {
		extra = args[3]
	}
	text, err := handedOver()
	if err != nil {
		return err
	}
	switch op + " " + sub {
	case "migrate begin", "prepare begin", "start begin", "started begin", "release end", "reconnect begin":
	default:
		// Nothing of ours is done then, whatever is wrong.
		return nil
	}
	d := &lease.Domain{}
	if len(text) > 0 {
		if d, err = lease.ParseDomain(text); err != nil {
			return err
		}
	}

	d.Name = name
	if op != "started" && op != "reconnect" {
		h, err := e.open()
		if err != nil {
			return err
		}
		l, err := lease.BookOf(h).Get(name)
		err = errors.Join(err, h.Close())
		if len(d.Devices) == 0 && (l == nil || err != nil) {
			// A domain that has nothing of ours, which no mistake of ours may stop.
			if err != nil {
				e.note("%v", err)
			}
			return nil
		}
		if err != nil {
			return err
		}
	}

	does := lease.Ends
	if op == "migrate" || op == "prepare" || op == "start" {
		does = lease.Checks
	}
	ctx, stop, m, err := e.beginLeases(ctx, bind.DefaultTimeout, does)
	if err != nil {
		return err
	}
	defer stop()
	certificates, err := m.Hook(ctx, d, op, sub, extra)
	e.tellQuarantined(certificates)
	return err
}

// restoreLeases makes the leases again that outlive a boot, when the VFs are there, and nothing else is locked, and
// resets what was gone when its lease ended and is back.
func restoreLeases(ctx context.Context, e *env) error {
	ctx, stop, m, err := e.beginLeases(ctx, bind.DefaultTimeout, lease.Ends)
	if err != nil {
		return err
	}
	defer stop()
	back, lifting := m.LiftReturned(ctx)
	for _, c := range back {
		e.note("%s, which was gone when its lease ended, is back: %s", c.Address, c.Result)
	}
	done, err := m.Restore(ctx)
	for _, guest := range done {
		e.note("%s has its devices again", guest)
	}
	if err != nil {
		err = fmt.Errorf("restore leases after the boot: %w", err)
	}
	return errors.Join(lifting, err)
}
