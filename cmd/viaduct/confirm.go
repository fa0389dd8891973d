package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"viaduct/cmd/internal/declared"
	"viaduct/iommu"
	"viaduct/vfio/holder"
)

func runConfirmed(e *env) error {
	if err := e.mayChange(); err != nil {
		return err
	}
	h, err := e.open()
	if err != nil {
		return err
	}
	defer h.Close()
	booted, err := declared.Of(h).Confirm()
	if err != nil {
		return err
	}
	if booted {
		fmt.Fprintln(e.stdout, "confirmed: a boot uses it too")
	} else {
		fmt.Fprintln(e.stdout, "confirmed: it stays until the next boot, which uses host.yaml")
	}
	return nil
}

// guard starts the process that undoes what is not confirmed. It has a session of its own, so that no hangup reaches
// it, and is put into the root of the control groups, as a session's are killed with it (KillUserProcesses of
// logind.conf).
func guard() error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	p, err := os.StartProcess("/proc/self/exe", []string{"viaduct", "undo", "--unless-confirmed"}, &os.ProcAttr{
		Dir: "/", Env: []string{}, Files: []*os.File{null, null, null}, Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return fmt.Errorf("start what undoes it unless it is confirmed: %w", err)
	}

	h, err := iommu.Open("")
	if err != nil {
		return errors.Join(err, p.Kill())
	}
	defer h.Close()
	for _, root := range []string{"sys/fs/cgroup/cgroup.procs", "sys/fs/cgroup/systemd/cgroup.procs"} {
		if h.Exists(root) {
			if err := h.Write(root, strconv.Itoa(p.Pid)); err != nil {
				return errors.Join(fmt.Errorf("what undoes it would end with this login: %w", err), p.Kill())
			}
			break
		}
	}
	return p.Release()
}

// errNotDue is what an undo ends with that is not to be any more.
var errNotDue = errors.New("it was confirmed, or applied again")

// runGuard is that process. What it has to say goes to the kernel's log, as nobody else may be there.
func runGuard(ctx context.Context, e *env, timeout time.Duration) error {
	if err := e.mayChange(); err != nil {
		return err
	}
	log, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer log.Close()
	h, err := e.open()
	if err != nil {
		return err
	}

	defer h.Close()
	m := declared.Of(h)
	e.stdout, e.stderr = log, log
	for {
		late, force, err := m.AwaitConfirmed()
		if err == nil && !late {
			return nil
		}
		if err == nil {
			fmt.Fprintf(log, "<4>viaduct: what was applied was not confirmed in time, and is undone")
			err = runUndo(ctx, e, append(force, holder.YieldToRollback()...), timeout, m.Due)
		}

		if errors.Is(err, errNotDue) {
			// Confirmed after all, or applied anew.
			continue
		}
		if err == nil || ctx.Err() != nil || errors.Is(err, holder.ErrRefused) {
			// The watch service has what was confirmed.
			err = errors.Join(err, m.RolledBack(), m.Hold(false))
		}
		if err == nil {
			return nil
		}
		fmt.Fprintf(log, "<3>viaduct: %s", strings.ReplaceAll(err.Error(), "\n", "; "))
		if late, _, again := m.AwaitConfirmed(); again == nil && !late {
			return err
		}

		select {
		// An apply may still be at it.
		case <-time.After(10 * time.Second):
		case <-ctx.Done():
			return err
		}
	}
}
