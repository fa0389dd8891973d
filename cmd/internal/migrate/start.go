package migrate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/cmd/internal/vmm"
	"viaduct/internal/journal"
	"viaduct/iommu"
	"viaduct/vfio/holder"
)

// This file is the one that starts programs: the destination's QEMU, for a guest or for a question.

// findProgram is the program that a command's first word names. What the other side names is a QEMU that is installed
// here, wherever it is there.
func findProgram(name string, own bool) (string, error) {
	if own {
		return exec.LookPath(name)
	}
	base := filepath.Base(name)
	if !strings.HasPrefix(base, "qemu-system-") && base != "kvm" && base != "qemu-kvm" {
		return "", fmt.Errorf("%q is no QEMU: viaduct starts nothing else for another host (viaduct migrate --peer "+
			"-- COMMAND says what it starts)", base)
	}
	found, err := exec.LookPath(base)
	if err != nil && base == "qemu-kvm" {
		return exec.LookPath("/usr/libexec/qemu-kvm")
	}
	return found, err
}

// systemdRun puts what it starts into a scope of its own, so that it does not end with the session of who came to start
// it (systemd-run(1)).
const systemdRun = "/usr/bin/systemd-run"

// startQEMU starts a program that outlives this one, and waits until it answers at the record's socket.
func startQEMU(ctx context.Context, s *Side, r *Record, program string, words []string) (pid int, err error) {
	file := s.Host.Path(path.Join(journal.Dir, "qemu-"+path.Base(r.Socket)+".log"))
	log, err := os.OpenFile(file, os.O_CREATE|os.O_WRONLY|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return 0, err
	}
	defer log.Close()

	args := append([]string{program}, words...)
	if s.Host.Exists("run/systemd/system") && s.Host.Exists(strings.TrimPrefix(systemdRun, "/")) {
		scope := []string{systemdRun, "--scope", "--quiet", "--collect", "--unit=viaduct-" + r.ID[:8] + ".scope", "--"}
		args = append(scope, args...)
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	// What viaduct ignores, what it starts would ignore, too.
	signal.Reset(unix.SIGPIPE, unix.SIGHUP)
	err = cmd.Start()
	signal.Ignore(unix.SIGPIPE)
	if err != nil {
		return 0, err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()

	const mostStart = 60 * time.Second
	for end := time.Now().Add(mostStart); ; {
		if m, err := dial(ctx, r.Socket); m != nil && err == nil {
			return m.PID, m.Close()
		}
		select {
		case err := <-ended:
			return 0, fmt.Errorf("QEMU has ended: %w: %s", err, lastLines(file))
		case <-ctx.Done():
			return 0, errors.Join(context.Cause(ctx), cmd.Process.Kill())
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(end) {
			return 0, errors.Join(fmt.Errorf("QEMU does not answer within %s: %s", mostStart, lastLines(file)),
				cmd.Process.Kill())
		}
	}
}

// lastLines are the last of what a program said.
func lastLines(file string) string {
	text, err := os.ReadFile(file)
	if err != nil {
		return err.Error()
	}
	const most = 2000
	text = bytes.TrimSpace(text)
	if len(text) > most {
		text = text[len(text)-most:]
	}
	return strings.ReplaceAll(strings.ToValidUTF8(string(text), "?"), "\n", "; ")
}

// endProcess ends a process, and waits until it has gone.
func endProcess(ctx context.Context, h *iommu.Host, p holder.Proc) error {
	for end := time.Now().Add(most); p.PID != 0 && p.Alive(h); {
		if err := unix.Kill(p.PID, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return err
		}
		if time.Now().After(end) || ctx.Err() != nil {
			return fmt.Errorf("process %d does not end", p.PID)
		}
		time.Sleep(10 * time.Millisecond)
	}
	return nil
}

// TryQEMU starts QEMU for a moment with a guest's CPU and machine, and asks what it has; nil if there is none.
func TryQEMU(ctx context.Context, h *iommu.Host, program string, vm *vmm.Machine) (*QEMU, error) {
	found, err := findProgram(program, false)
	if err != nil {
		return nil, nil
	}

	dir, err := os.MkdirTemp(h.Path(journal.Dir), "try-")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	socket := filepath.Join(dir, "qmp")
	said := filepath.Join(dir, "said")
	out, err := os.OpenFile(said, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	cmd := exec.Command(found, tryWords(vm, socket)...)
	cmd.Stderr, cmd.Stdout = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, err
	}

	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(ended)
	}()
	defer func() {
		_ = cmd.Process.Kill()
		<-ended
	}()

	for {
		m, err := dial(ctx, socket)
		if m != nil && err == nil {
			q, err := askQEMU(m)
			return q, errors.Join(err, m.Close())
		}
		select {
		case <-ended:
			return &QEMU{Refused: lastLines(said)}, nil
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// tryWords are the words with which QEMU is tried: a guest's machine and CPU, and nothing else of it.
func tryWords(vm *vmm.Machine, socket string) []string {
	args := []string{"-nodefaults", "-display", "none", "-S", "-qmp", "unix:" + socket + ",server=on,wait=off"}
	if kind := vm.Machine; kind != "" {
		args = append(args, "-machine", kind)
	}
	if vm.Accel != "" {
		for a := range strings.SplitSeq(vm.Accel, ":") {
			args = append(args, "-accel", a)
		}
	}
	if vm.CPU != "" {
		cpu := vm.CPU
		if strings.Contains(vm.Accel, "kvm") && !strings.Contains(cpu, "enforce") {
			cpu += ",enforce"
		}
		args = append(args, "-cpu", cpu)
	}
	return args
}
