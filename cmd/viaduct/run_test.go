package main

import (
	"bytes"
	"context"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"viaduct/cmd/internal/lease"
	"viaduct/cmd/internal/migrate"
	"viaduct/cmd/internal/vmm"
	"viaduct/internal/host"
	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
	"viaduct/vfio/holder"
)

// Where the devices' arguments go is known before anything is touched.
func TestRunPlaceholder(t *testing.T) {
	k := hosttest.NewSmallLab(t, "0000:00:05.0", "0000:01:00.0")
	open := func(string) (*iommu.Host, error) {
		h, err := host.Fake(k.Dir(), k)
		return &iommu.Host{Host: h}, err
	}
	for line, says := range map[string]string{
		"sh wrapper {devices}":                   `"sh" is not the name of a VMM`,
		"--format env sh {devices}":              "--format qemu",
		"--format kata ctr run image name":       "put {devices} into the command",
		"--format nonsense qemu-system-x86_64 a": "--format",
	} {
		args := []string{"viaduct", "run", "web", "--from", "0000:01:00.0"}
		words := strings.Fields(line)
		if words[0] == "--format" {
			args, words = append(args, words[:2]...), words[2:]
		}
		var stdout, stderr bytes.Buffer
		status := runOn(open, append(append(args, "--"), words...), &stdout, &stderr)
		if status != exitNotRun || !strings.Contains(stderr.String(), says) || len(k.Log) > 0 {
			t.Errorf("%s: status %d, %s, wrote %q", line, status, stderr.String(), k.Log)
		}
	}
}

// A command that has ended leaves no signal ignored, which what is started then would inherit.
func TestUntilSignal(t *testing.T) {
	_, stop := untilSignal(context.Background())
	stop()
	signal.Reset(unix.SIGPIPE)
	if signal.Ignored(unix.SIGHUP) {
		t.Error("hangups are ignored")
	}
}

// What viaduct run starts its command with becomes that when it is told to, and fails when nobody tells it any more.
func TestHeld(t *testing.T) {
	k := hosttest.NewSmallLab(t, "0000:00:05.0", "0000:01:00.0")
	for line, status := range map[string]int{"run-held": exitUsage, "run-held -- 3 /bin/true": exitUsage,
		"run-held -- x /bin/true true": exitUsage} {
		if a := onKernel(k, strings.Fields(line)...); a.status != status || a.stdout != "" {
			t.Errorf("%s: %+v", line, a)
		}
	}
	said, says, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer said.Close()
	says.Close()
	a := onKernel(k, "run-held", "--", strconv.Itoa(int(said.Fd())), "/bin/true", "true")
	if a.status != exitNotRun || !strings.Contains(a.stderr,
		"/bin/true: viaduct run ended before it started its command") {
		t.Errorf("%+v", a)
	}
}

// The command of a guest that can move is written down, with a place for its devices; no other is.
func TestKeptCommand(t *testing.T) {
	_, e := movableHost(t)
	h, err := e.open()
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	book := lease.BookOf(h)
	for _, c := range []struct{ format, line, want string }{
		{"cloud-hypervisor", "ch a", ""},
		{"qemu", "qemu a", "qemu a {devices}"},
		{"qemu", "qemu {devices} a", "qemu {devices} a"},
		{"qemu", "qemu -device x={address}", "qemu -device x={address}"},
		{"qemu", "qemu -device x={group}", "qemu -device x={group}"},
	} {
		format, known := vmm.Find(c.format)
		if !known {
			t.Fatal(c.format)
		}
		if err := e.keepCommand("web", strings.Fields(c.line), format); err != nil {
			t.Error(err)
		}
		if words, err := book.Words("web"); err != nil || strings.Join(words, " ") != c.want {
			t.Errorf("%s %s: kept %q, %v", c.format, c.line, words, err)
		}
	}
}

// When its command has ended, a guest that moves keeps its devices, and another does not.
func TestMoved(t *testing.T) {
	k, e := movableHost(t)
	h, err := e.open()
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	var said bytes.Buffer
	e.stderr = &said
	if moved, err := e.moved(t.Context(), "web"); moved || err != nil {
		t.Errorf("where nothing is known of a move: %v, %v", moved, err)
	}
	side := e.side(h, 0)
	if err := side.Home().Save(t.Context(), &migrate.Record{ID: migrate.NewID(), Guest: "web", Phase: migrate.Checked,
		Source: true}); err != nil {
		t.Fatal(err)
	}
	if moved, err := e.moved(t.Context(), "web"); !moved || err != nil ||
		!strings.Contains(said.String(), "has ended while it moved") {
		t.Errorf("while it moves: %v, %v, %s", moved, err, said.String())
	}
	for _, name := range []string{"run/viaduct/lease-web.json", "var/lib/viaduct/move-web.json"} {
		put(t, k, name, "{")
		if moved, err := e.moved(t.Context(), "web"); moved || err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s cannot be read: %v, %v", name, moved, err)
		}
	}
}

// What viaduct run cannot write down of its guest, or read of the guest's move, it tells: the command that it did not
// start yet is not started.
func TestRunCannotKeep(t *testing.T) {
	t.Setenv(asProgram, "1") // which starts the command
	for _, c := range []struct {
		name, text, command string
		status              int
	}{
		{"run/viaduct/command-db.json/in/the/way", "", "true", exitNotRun},
		{"var/lib/viaduct/move-db.json", "{", "true", exitDone},
	} {
		k := hosttest.NewSmallLab(t, "0000:00:05.0", sweptPF)
		mustOnKernel(t, k, "vf", "create", sweptPF, "2")
		put(t, k, "sys/bus/pci/devices/"+sweptVF+"/reset", "")
		put(t, k, c.name, c.text)
		k.Process(os.Getpid(), "viaduct")
		a := onKernel(k, "run", "db", "--movable", "--format", "qemu", "--from", sweptVF, "--", c.command)
		name, _, _ := strings.Cut(strings.TrimPrefix(strings.TrimPrefix(c.name, "run/viaduct/"), "var/lib/viaduct/"), "/")
		if a.status != c.status || !strings.Contains(a.stderr, name) {
			t.Errorf("%s: %+v", c.name, a)
		}
	}
}

// A command that is run for a lease that has ended meanwhile is not started.
func TestStartedWithoutLease(t *testing.T) {
	_, e := movableHost(t)
	for _, guest := range []string{"web", "none"} {
		err := e.started(t.Context(), &lease.Lease{LeaseHead: holder.LeaseHead{Guest: guest}}, os.Getpid(), "qemu")
		if err == nil || !strings.Contains(err.Error(), "was ended meanwhile") {
			t.Errorf("%s: %v", guest, err)
		}
	}
}
