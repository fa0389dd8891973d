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

// Every command ends by itself at a terminal that nobody types into, with and without arguments, also those that read a
// file, and leaves the terminal as it was.
func TestEndsAtTerminal(t *testing.T) {
	dir := hosttest.Load(t, filepath.Join(machines, "amd-vi.txt")).Dir(t)
	statuses := []int{exitDone, exitFailed, exitUsage, exitRefused, exitDiffers, exitNotRun}
	file, err := filepath.Abs("testdata/host.yaml")
	if err != nil {
		t.Fatal(err)
	}
	forever := []string{"watch"} // until it is ended: see TestInterruptAtTerminal
	for _, words := range commandLines(newApp(&env{}).Commands) {
		if slices.Contains(forever, words[0]) {
			continue
		}
		for _, more := range [][]string{nil, {"0000:01:00.0"}, {"-f", file}, {"--help"}, {"no-such-thing", "x=y"}} {
			args := slices.Concat([]string{"--host", dir}, words, more)
			cmd := program(args...)
			// Where a snapshot may write a file of whatever name.
			cmd.Dir = t.TempDir()
			p := onTerminal(t, 80, cmd)
			before := modes(t, p)
			said, status := p.end()
			if !slices.Contains(statuses, status) || said == "" && status != exitDone {
				t.Errorf("%q: exit status %d: %q", args[2:], status, said)
			}
			if after := modes(t, p); after != before {
				t.Errorf("%q leaves the terminal otherwise: %+v, was %+v", args[2:], after, before)
			}
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
	k := hosttest.NewLab(t, nil)
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
	os.Exit(runOn(open, append([]string{"viaduct"}, strings.Fields(line)...), os.Stdout, os.Stderr))
}

// ^C ends what else does not end, with the status that shells know, or the command's own, and leaves the terminal as it
// was.
func TestInterruptAtTerminal(t *testing.T) {
	for line, want := range map[string]struct {
		shows  string
		status []int
	}{
		// It may not have begun: -1 is the signal itself.
		"watch": {"", []int{exitDone, exitFailed, -1}},
		"run web --from 0000:01:00.0 --vlan 7 -- sh -c echo${IFS}begun;exec${IFS}sleep${IFS}1000": {
			"begun", []int{128 + int(unix.SIGINT)},
		},
	} {
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestLive$")
		cmd.Env = append(os.Environ(), live+"="+line, "TERM=xterm", "NO_COLOR=1", "COLUMNS=")
		p := onTerminal(t, 80, cmd)
		before := modes(t, p)
		if want.shows != "" {
			p.await(want.shows)
		}
		p.typing("\x03")
		said, status := p.end()
		if !slices.Contains(want.status, status) {
			t.Errorf("%s: ^C: exit status %d: %q", line, status, said)
		}
		if after := modes(t, p); after != before {
			t.Errorf("%s leaves the terminal otherwise: %+v, was %+v", line, after, before)
		}
	}
}
