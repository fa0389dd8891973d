package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"viaduct/internal/host"
	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

// lines are every command's name, the words of one that is in another among them.
func commandLines(commands []*cli.Command, above ...string) [][]string {
	var out [][]string
	for _, c := range commands {
		words := append(slices.Clone(above), c.Name)
		out = append(out, words)
		out = append(out, commandLines(c.Subcommands, words...)...)
	}
	return out
}

// typedLines are lines that somebody may type, of two kinds. Those of the first are also for a host that runs: each
// command without arguments, with one, and with a file to read, and what is handed over by another program. Those of
// the second are not understood, or ask for help.
func typedLines(t *testing.T) (meant, other [][]string) {
	t.Helper()
	file, err := filepath.Abs("testdata/host.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, words := range commandLines(newApp(&env{}).Commands) {
		for _, more := range [][]string{nil, {"0000:01:00.0"}, {"-f", file}} {
			meant = append(meant, slices.Concat(words, more))
		}
		other = append(other, slices.Concat(words, []string{"--help"}),
			slices.Concat(words, []string{"no-such-thing", "x=y"}))
	}
	return append(meant,
		[]string{"libvirt-hook", "--", "web", "prepare", "begin", "-"},
		[]string{"libvirt-hook", "--network", "--", "net", "port-created", "begin", "-"},
		[]string{"migrate", "--peer"}, []string{"migrate", "--peer", "--data", "x"},
		[]string{"adopt", "--import", "netplan"},
		[]string{"apply", "--boot", "--wait", "0s"}), other
}

// goesOn reports whether a line that is meant goes on until it is ended.
func goesOn(line []string) bool {
	return slices.Equal(line, []string{"watch"}) || len(line) == 3 && line[0] == "watch" && line[1] == "-f"
}

// atTerminal begins a line at a terminal, on a captured host, or on one of its own that runs; check ends it, and looks
// at what it left.
func atTerminal(t *testing.T, host string, line []string) (p *pty, check func(statuses ...int)) {
	t.Helper()
	cmd := program(slices.Concat([]string{"--host", host}, line)...)
	if host == "" {
		cmd = exec.Command("/proc/self/exe", "-test.run=^TestLive$")
		cmd.Env = append(os.Environ(), live+"="+strings.Join(line, "\n"), "TERM=xterm", "NO_COLOR=1", "COLUMNS=")
	}
	// Where a snapshot may write a file of whatever name.
	cmd.Dir = t.TempDir()
	p = onTerminal(t, 80, cmd)
	before := modes(t, p)
	return p, func(statuses ...int) {
		t.Helper()
		said, status := p.end()
		if !slices.Contains(statuses, status) || said == "" && status != exitDone && status != -1 {
			t.Errorf("%q: exit status %d: %q", line, status, said)
		}
		if after := modes(t, p); after != before {
			t.Errorf("%q leaves the terminal otherwise: %+v, was %+v", line, after, before)
		}
	}
}

var anyStatus = []int{exitDone, exitFailed, exitUsage, exitRefused, exitDiffers, exitNotRun}

// Every command ends by itself at a terminal that nobody types into, with and without arguments, also those that read a
// file, on a captured host and on one that runs, and leaves the terminal as it was.
func TestEndsAtTerminal(t *testing.T) {
	dir := hosttest.Load(t, filepath.Join(machines, "amd-vi.txt")).Dir(t)
	meant, other := typedLines(t)
	for _, line := range append(meant, other...) {
		_, check := atTerminal(t, dir, line)
		check(anyStatus...)
	}
	for _, line := range meant {
		if !goesOn(line) {
			_, check := atTerminal(t, "", line)
			check(anyStatus...)
		}
	}
}

// modes are how a terminal is set.
func modes(t *testing.T, p *pty) unix.Termios {
	t.Helper()
	m, err := unix.IoctlGetTermios(int(p.ours.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	return *m
}

// live makes this test a program on a host of its own that runs.
const live = "VIADUCT_TEST_LIVE"

func TestLive(t *testing.T) {
	line := os.Getenv(live)
	if line == "" {
		t.Skip("TestInterruptAtTerminal runs it, as a process of its own")
	}
	k := hosttest.NewSmallLab(t, "0000:00:05.0", "0000:01:00.0")
	mustOnKernel(t, k, "vf", "create", "0000:01:00.0", "2")
	for _, vf := range []string{"0000:01:10.0", "0000:01:10.2"} {
		if err := os.WriteFile(filepath.Join(k.Dir(), "sys/bus/pci/devices", vf, "reset"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	open := func(string) (*iommu.Host, error) {
		h, err := host.Fake(k.Dir(), k)
		return &iommu.Host{Host: h}, err
	}
	if err := os.Setenv(asProgram, "1"); err != nil {
		t.Fatal(err)
	}
	os.Exit(runOn(open, append([]string{"viaduct"}, strings.Split(line, "\n")...), os.Stdout, os.Stderr))
}

// ^C ends every command, whenever it is typed, with its own status, or that which shells know, and leaves the terminal
// as it was.
func TestInterruptAtTerminal(t *testing.T) {
	// It may not have begun: -1 is the signal itself.
	ended := append(slices.Clone(anyStatus), -1)
	dir := hosttest.Load(t, filepath.Join(machines, "amd-vi.txt")).Dir(t)
	meant, _ := typedLines(t)
	for n, line := range meant {
		for _, host := range []string{dir, ""} {
			if host == "" && n%3 != 0 && !goesOn(line) {
				// It takes its time to make one.
				continue
			}
			p, check := atTerminal(t, host, line)
			if n%2 == 1 && (host != "" || !goesOn(line)) {
				p.begun()
			}
			p.typing("\x03")
			check(ended...)
		}
	}

	// What nobody types is waited for where that is asked for.
	p, check := atTerminal(t, "", []string{"plan", "-f", "-"})
	p.typing("pfs: []\n")
	p.typing("\x03")
	check(ended...)

	run := strings.Fields("run web --from 0000:01:00.0 --vlan 7 -- sh -c")
	p, check = atTerminal(t, "", append(run, "echo begun; exec sleep 1000"))
	p.await("begun")
	p.typing("\x03")
	check(128 + int(unix.SIGINT))
}
