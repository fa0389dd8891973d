// Package qmptest gives tests QEMUs of the lab's own, in software emulation.
package qmptest

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"viaduct/cmd/internal/qmp"
)

// Command is the beginning of a command line that runs the lab's QEMU out of the lab's tree, as hack/lab does. The test
// is skipped where that is not built.
func Command(tb testing.TB) []string {
	tb.Helper()
	usr := filepath.Join(Cache(tb), "root", "usr")
	program := filepath.Join(usr, "bin", "qemu-system-x86_64")
	if _, err := os.Stat(program); err != nil {
		tb.Skipf("the lab's QEMU is not built (hack/lab build): %v", err)
	}
	return []string{
		filepath.Join(usr, "lib64", "ld-linux-x86-64.so.2"), "--library-path", filepath.Join(usr, "lib",
			"x86_64-linux-gnu"),
		program, "-L", filepath.Join(usr, "share", "qemu"), "-L", filepath.Join(usr, "share", "seabios"),
	}
}

// Cache is where the lab keeps what it has built (hack/lab path).
func Cache(tb testing.TB) string {
	tb.Helper()
	if cache := os.Getenv("VIADUCT_LAB_CACHE"); cache != "" {
		return cache
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		tb.Skipf("no lab: %v", err)
	}
	return filepath.Join(dir, "viaduct")
}

// QEMU is one that runs.
type QEMU struct {
	Socket string // of its machine protocol
	Cmd    *exec.Cmd

	ended  chan struct{}
	stderr bytes.Buffer
}

// Start starts the lab's QEMU with these words beside those for a machine without devices or display. It ends with the
// test.
func Start(tb testing.TB, socket string, words ...string) *QEMU {
	tb.Helper()
	all := append(Command(tb), "-nodefaults", "-display", "none", "-qmp", "unix:"+socket+",server=on,wait=off")
	all = append(all, words...)
	q := &QEMU{Socket: socket, Cmd: exec.Command(all[0], all[1:]...), ended: make(chan struct{})}
	q.Cmd.Stderr = &q.stderr
	q.Cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := q.Cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	go func() {
		_ = q.Cmd.Wait()
		close(q.ended)
	}()
	tb.Cleanup(func() {
		q.Kill()
		if tb.Failed() && q.stderr.Len() > 0 {
			tb.Logf("QEMU said: %s", q.stderr.String())
		}
	})
	for end := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(socket); err == nil {
			return q
		}
		if q.Ended() || time.Now().After(end) {
			q.Kill()
			tb.Fatalf("QEMU did not start: %s", q.stderr.String())
		}
	}
}

// Dial connects to a QEMU for the length of a test.
func (q *QEMU) Dial(tb testing.TB) *qmp.Client {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), time.Minute)
	defer cancel()
	c, err := qmp.Dial(ctx, q.Socket)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = c.Close() })
	return c
}

// Kill ends a QEMU at once, and waits until it has ended.
func (q *QEMU) Kill() {
	_ = q.Cmd.Process.Kill()
	<-q.ended
}

// Ended reports whether a QEMU has ended.
func (q *QEMU) Ended() bool {
	select {
	case <-q.ended:
		return true
	default:
		return false
	}
}
