package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"viaduct/cmd/internal/lease"
	"viaduct/cmd/internal/migrate"
	"viaduct/cmd/internal/vmm"
	"viaduct/internal/shell"
)

// exitNotRun is what run ends with when viaduct itself failed before the VMM was started.
const exitNotRun = 125

// vmmEnded is how the VMM ended, which is how run ends.
type vmmEnded struct {
	status int
	error
}

func runCommand(e *env) *cli.Command {
	var o assignOptions
	var as string
	run := command(&cli.Command{
		Name:      "run",
		Usage:     "assign devices, run a VMM, and release the devices when it ends",
		ArgsUsage: "GUEST --from POOL|PF|SELECTOR -- COMMAND [ARGUMENT...]",
		Description: "viaduct replaces the word {devices} of the command with the arguments for the devices, in the " +
			"format that fits the command's name (or `--format`), or adds them at the end. It replaces " +
			"{address}, {group}, {mac} and {vlan} in any word with those of the first device. The command also " +
			"gets the variables of `viaduct assign --format env`, and has the signals and the terminal.\n\n" +
			"Exit status: that of the command; 128 and the number of the signal that ended it; 125 if viaduct " +
			"failed before it started the command.\n\n" +
			"Examples:\n  viaduct run web --from net --user qemu -- qemu-system-x86_64 -m 4G disk.img\n" +
			"  viaduct run web --from enp1s0 -- crosvm run {devices} vmlinux",
		Flags: append(
			o.flags(),
			&cli.StringFlag{
				Name:        "format",
				Usage:       "pass the devices in this format: `qemu|qemu-iommufd|cloud-hypervisor|crosvm|kata|env`",
				Destination: &o.format,
			},
			&cli.StringFlag{
				Name: "user",
				Usage: "start the command as `USER[:GROUP]`, who gets the devices' nodes and may lock memory " +
					"without limit",
				Destination: &as,
			},
			&cli.DurationFlag{
				Name:  "wait",
				Usage: "wait this long for the devices to be closed after the command ended",
				Value: 30 * time.Second,
			},
		),
		Action: func(c *cli.Context) error {
			err := runRun(c, e, &o, as)
			if _, ended := errors.AsType[*vmmEnded](err); err != nil && !ended {
				err = &vmmEnded{exitNotRun, err}
			}
			return err
		},
	})

	run.OnUsageError = func(_ *cli.Context, err error, _ bool) error { return &vmmEnded{exitNotRun, err} }
	return run
}

func runRun(c *cli.Context, e *env, o *assignOptions, as string) error {
	args := c.Args().Slice()
	if len(args) < 2 {
		return usagef("run: want a guest's name, and after -- the command that starts it (viaduct run --help)")
	}
	o.Guest = args[0]
	command := args[1:]
	if o.format == "" {
		o.format = formatOf(command[0])
	}
	format, known := vmm.Find(o.format)
	if !known || format.Args == nil && o.format != "env" {
		return usagef("run: --format %q has no arguments for a command; want another format, or env", o.format)
	}

	if err := o.parse(c, format); err != nil {
		return err
	}
	switch placed := slices.Contains(command, "{devices}"); {
	case placed && format.Args == nil:
		return usagef("run: %q is not the name of a VMM, so viaduct does not know what {devices} is: "+
			"name the VMM, e.g. --format qemu", filepath.Base(command[0]))
	case !placed && format.Placed:
		return usagef("run: put {devices} into the command where the arguments belong, because %s takes "+
			"them only there", format.Name)
	}
	o.keepWords(command)
	// Before anything is touched.
	program, err := exec.LookPath(command[0])
	if err != nil {
		return err
	}
	var other *runAs
	if as != "" {
		if other, err = parseRunAs(as); err != nil {
			return usagef("run: --user: %w", err)
		}
		if err := mayRunAs(); err != nil {
			return err
		}
		if o.NodeOwner == "" {
			o.NodeOwner = other.name
		}
	}
	o.OwnerPID, o.Exclusive = os.Getpid(), true
	// From now on: none may end viaduct between the lease and its end.
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGHUP, unix.SIGUSR1, unix.SIGUSR2,
		unix.SIGWINCH)
	defer signal.Stop(signals)
	priority, err := unix.Getpriority(unix.PRIO_PROCESS, 0)
	if err != nil {
		return err
	}

	var l *lease.Lease
	var g *vmm.Guest
	err = e.assign(c.Context, o, func(m *lease.Manager, made *lease.Lease) (err error) {
		l = made
		// The command has the niceness that viaduct was started with; the system call tells 20 less it (getpriority(2)).
		setNice(m.Host(), 20-priority)
		// The command's, too.
		signal.Reset(unix.SIGPIPE)
		if more := needsMore(m.Host(), format, as); more != "" {
			e.note("%s", more)
		}
		g, err = guestOf(m, l, o)
		return err
	})
	release := func() error {
		if moved, err := e.moved(c.Context, o.Guest); moved || err != nil {
			return err
		}
		// Standard output is the command's.
		own := *e
		own.stdout = e.stderr
		return runRelease(
			context.WithoutCancel(c.Context),
			&own,
			o.timeout,
			func(ctx context.Context, m *lease.Manager) ([]lease.Certificate, error) {
				return m.Rest(ctx, o.Guest, c.Duration("wait"))
			},
		)
	}
	if err != nil {
		return err
	}

	if err := e.keepCommand(o.Guest, command, format); err != nil {
		return errors.Join(err, release())
	}
	cmd, gate, err := held(program, append(command[:1], format.Substitute(command[1:], g)...))
	if err != nil {
		return errors.Join(err, release())
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), vmm.Environment(g)...)
	if other != nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: other.credential()}
		cmd.Env = other.environment(cmd.Env)
	}
	ended, err := stay(cmd, signals, func(pid int) error {
		if other != nil {
			if err := letLock(pid); err != nil {
				return err
			}
		}
		if err := e.started(c.Context, l, pid, filepath.Base(program)); err != nil {
			return err
		}
		return gate()
	})
	if err != nil {
		return errors.Join(err, release())
	}

	if err := release(); err != nil {
		e.note("%v", err)
	}
	if ended == 0 {
		return nil
	}
	return &vmmEnded{status: ended}
}

// keepWords reads of the command what a move of the guest has to know.
func (o *assignOptions) keepWords(command []string) {
	if !strings.HasPrefix(o.VM.Format, "qemu") {
		return
	}
	vm := vmm.ReadMachine(command[1:])
	vm.Format, vm.Standby = o.VM.Format, o.VM.Standby
	vm.Memory = cmp.Or(o.Memory, vm.Memory)
	o.VM = &vm
}

// keepCommand writes down the command of a guest that can move, for the host that it moves to.
func (e *env) keepCommand(guest string, command []string, format *vmm.Format) error {
	if !format.Standby {
		return nil
	}
	h, err := e.open()
	if err != nil {
		return err
	}
	defer h.Close()
	words := slices.Clone(command)
	if !slices.ContainsFunc(words, func(w string) bool {
		return w == vmm.Devices || strings.Contains(w, "{address}") || strings.Contains(w, "{group}")
	}) {
		words = append(words, vmm.Devices)
	}
	return lease.BookOf(h).KeepWords(guest, words)
}

// moved waits, if a guest moves, until that is over, and reports whether it is on another host: its devices are
// released by who moves it.
func (e *env) moved(ctx context.Context, guest string) (bool, error) {
	h, err := e.open()
	if err != nil {
		return false, err
	}
	defer h.Close()
	side := &migrate.Side{Host: h}
	r, err := side.Record(guest)
	if r == nil || !r.Source || err != nil {
		return false, err
	}

	const mostEnd = 10 * time.Minute
	held, err := lease.BookOf(h).LockMove(context.WithoutCancel(ctx), guest, mostEnd)
	if err != nil {
		return false, err
	}
	defer held.Close()
	l, err1 := lease.BookOf(h).Get(guest)
	now, err2 := side.Record(guest)
	if err := errors.Join(err1, err2); err != nil {
		return false, err
	}

	switch {
	case l == nil && now == nil:
		e.note("%s is on %s now", guest, r.Peer)
		return true, nil
	case now != nil:
		e.note("%s has ended while it moved, and its devices are kept until that is over (viaduct migrate %s "+
			"--resume, or --cancel)", guest, shell.Quote(guest))
		return true, nil
	}

	return false, nil
}

// formatOf is the format of a VMM by its program's name.
func formatOf(program string) string {
	name := filepath.Base(program)
	for _, known := range []string{"qemu", "cloud-hypervisor", "crosvm"} {
		if strings.HasPrefix(name, known) {
			return known
		}
	}
	if name == "kvm" {
		return "qemu"
	}
	return "env"
}

// held is a command that runs this program, which becomes the other one once gate is called, and ends if this process
// does before that: no VMM runs of which its lease does not know. The pipe for that keeps the number it has, as the
// command may have been given others.
func held(program string, words []string) (cmd *exec.Cmd, gate func() error, err error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, err
	}
	if _, err := unix.FcntlInt(uintptr(p[0]), unix.F_SETFD, 0); err != nil {
		return nil, nil, err
	}
	gate = func() error {
		_, err := unix.Write(p[1], []byte{0})
		return errors.Join(err, unix.Close(p[0]), unix.Close(p[1]))
	}
	return exec.Command(
		"/proc/self/exe",
		append([]string{heldCommandName, "--", strconv.Itoa(p[0]), program}, words...)...), gate, nil
}

const heldCommandName = "run-held"

// heldCommand is what such a command does.
func heldCommand() *cli.Command {
	return command(&cli.Command{
		Name: heldCommandName, Hidden: true,
		Usage:     "wait for a byte, then become another program (viaduct run starts this)",
		ArgsUsage: "-- FD PROGRAM NAME [ARGUMENT...]",
		Action: func(c *cli.Context) error {
			words := c.Args().Slice()
			if len(words) < 3 {
				return usagef("only viaduct run uses %s", heldCommandName)
			}
			fd, err := strconv.Atoi(words[0])
			if err != nil {
				return usagef("%s: invalid number %q", heldCommandName, words[0])
			}
			var begin [1]byte
			n, err := unix.Read(fd, begin[:])
			if n == 1 {
				unix.CloseOnExec(fd)
				err = unix.Exec(words[1], words[2:], os.Environ())
			} else if err == nil {
				err = errors.New("viaduct run ended before it started its command")
			}
			return &vmmEnded{exitNotRun, fmt.Errorf("%s: %w", words[1], err)}
		},
	})
}

// stay runs a command as its parent, hands signals on to it, and returns its status. Those of a terminal it gets
// itself, being in the same group of processes; stopped and continued it is with us.
func stay(cmd *exec.Cmd, signals <-chan os.Signal, started func(pid int) error) (status int, err error) {
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	if err := started(cmd.Process.Pid); err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return 0, err
	}

	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for {
		select {
		case s := <-signals:
			if !fromTerminal(s) {
				_ = cmd.Process.Signal(s)
			}
		case err := <-ended:
			var exit *exec.ExitError
			if err != nil && !errors.As(err, &exit) {
				return 0, err
			}
			if ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
				return 128 + int(ws.Signal()), nil
			}
			return cmd.ProcessState.ExitCode(), nil
		}
	}
}

// fromTerminal reports whether a signal is one that the terminal sends to all of its foreground group, which is ours.
func fromTerminal(s os.Signal) bool {
	if !slices.Contains([]os.Signal{unix.SIGINT, unix.SIGQUIT, unix.SIGWINCH}, s) {
		return false
	}
	foreground, err := unix.IoctlGetInt(0, unix.TIOCGPGRP)
	return err == nil && foreground == unix.Getpgrp()
}

// started writes down which process is going to hold the devices.
func (e *env) started(ctx context.Context, l *lease.Lease, pid int, name string) error {
	h, err := e.open()
	if err != nil {
		return err
	}
	defer h.Close()
	return lease.BookOf(h).Started(ctx, l, pid, name)
}
