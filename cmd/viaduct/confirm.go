package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"viaduct/cmd/internal/declared"
	"viaduct/iommu"
	"viaduct/vfio/bind"
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
		fmt.Fprintln(e.stdout, "confirmed: boots use it from now on")
	} else {
		fmt.Fprintln(e.stdout, "confirmed until the next boot, which uses host.yaml")
	}
	return nil
}

// guardReady is what the guard says once it stands.
const guardReady = "ready"

// guard starts the process that undoes what is not confirmed, and returns once it says that it stands. It has a session
// of its own, so that no hangup reaches it, and is put into the root of the control groups, as a session's are killed
// with it (KillUserProcesses of logind.conf).
func guard(h *iommu.Host) error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	said, says, err := os.Pipe()
	if err != nil {
		return err
	}
	defer said.Close()
	p, err := os.StartProcess("/proc/self/exe", []string{"viaduct", "undo", "--unless-confirmed"}, &os.ProcAttr{
		Dir: "/", Env: []string{}, Files: []*os.File{null, says, null}, Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err = errors.Join(err, says.Close()); err != nil {
		return fmt.Errorf("start the process that undoes an apply without confirmation: %w", err)
	}

	err = leaveLogin(h, p.Pid)
	if err == nil {
		err = awaitGuard(said)
	}
	if err != nil {
		err = errors.Join(err, p.Kill())
		_, _ = p.Wait()
		return err
	}
	return p.Release()
}

// awaitGuard waits until the guard says that it stands. One that has ended says why.
func awaitGuard(said *os.File) error {
	if err := said.SetReadDeadline(time.Now().Add(bind.DefaultTimeout)); err != nil {
		return err
	}
	text, err := bufio.NewReader(said).ReadString('\n')
	if text = strings.TrimSpace(text); text == guardReady {
		return nil
	}
	if text == "" && err != nil {
		text = err.Error()
	}
	return fmt.Errorf("the process that undoes an apply without confirmation does not run: %s", text)
}

// leaveLogin puts a process where no login takes it along.
func leaveLogin(h *iommu.Host, pid int) error {
	for _, root := range []string{"sys/fs/cgroup/cgroup.procs", "sys/fs/cgroup/systemd/cgroup.procs"} {
		if h.Exists(root) {
			if err := h.Write(root, strconv.Itoa(pid)); err != nil {
				return fmt.Errorf("the process that undoes an apply without confirmation would end with this login: "+
					"%w", err)
			}
			break
		}
	}
	return nil
}

// errNotDue is what an undo ends with that is not to be any more.
var errNotDue = errors.New("the apply was confirmed, or another one was made")

// runGuard is that process. What it has to say after it stands goes to the kernel's log, where that can be written to,
// as nobody else may be there.
func runGuard(ctx context.Context, e *env, timeout time.Duration) error {
	m, end, err := standGuard(e)
	if err != nil {
		fmt.Fprintln(e.stdout, strings.ReplaceAll(err.Error(), "\n", "; "))
		return err
	}
	defer func() { _ = end() }()

	fmt.Fprintln(e.stdout, guardReady)
	log := io.Discard
	if fd, err := m.Host().OpenNode("dev/kmsg", os.O_WRONLY); err == nil {
		kmsg := os.NewFile(uintptr(fd), "/dev/kmsg")
		defer kmsg.Close()
		log = kmsg
	}
	e.stdout, e.stderr = log, log
	for {
		late, token, force, err := m.AwaitConfirmed()
		if err == nil && !late {
			return nil
		}
		if err == nil {
			fmt.Fprintf(log, "<4>viaduct: the apply was not confirmed in time, and viaduct undoes it")
			due := func() (bool, error) { return m.Due(token) }
			err = runUndo(ctx, e, append(force, holder.YieldToRollback()...), timeout, due)
		}

		if errors.Is(err, errNotDue) {
			// Confirmed after all, or applied anew.
			continue
		}
		if err == nil || ctx.Err() != nil || errors.Is(err, holder.ErrRefused) {
			// The watch service has what was confirmed.
			err = errors.Join(err, m.RolledBack(token))
		}
		if err == nil {
			return nil
		}
		fmt.Fprintf(log, "<3>viaduct: %s", strings.ReplaceAll(err.Error(), "\n", "; "))
		if late, _, _, again := m.AwaitConfirmed(); again == nil && !late {
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

// standGuard opens what the guard needs, and looks for what it guards.
func standGuard(e *env) (m *declared.Manager, end func() error, err error) {
	if err := e.mayChange(); err != nil {
		return nil, nil, err
	}
	h, err := e.open()
	if err != nil {
		return nil, nil, err
	}
	m = declared.Of(h)
	if _, err := m.Held(); err != nil {
		return nil, nil, errors.Join(err, h.Close())
	}
	return m, h.Close, nil
}
