package main

import (
	"bytes"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"viaduct/cmd/internal/terminal"
	"viaduct/internal/host/hosttest"
)

// screenOf is a terminal of so many columns.
type screenOf struct {
	bytes.Buffer
	columns int
}

func (s *screenOf) Columns() int { return s.columns }

// typed is what somebody sees who types a line at a terminal of that width; 0 is a pipe.
func typed(columns int, args ...string) (stdout, stderr string, status int) {
	var said bytes.Buffer
	if columns == 0 {
		var out bytes.Buffer
		status = run(args, &out, &said)
		return out.String(), said.String(), status
	}
	out := &screenOf{columns: columns}
	status = run(args, out, &said)
	return out.String(), said.String(), status
}

// sights are the lines that are looked at on every kind of host.
var sights = []string{"list", "list --tree", "list --all", "vf list", "plan -f testdata/host.yaml",
	"status -f testdata/host.yaml",
	"show LAST", "bind --dry-run LAST"}

// hostsOfKinds are the captured hosts and those of each kind that is known, unpacked, by name.
func hostsOfKinds(t *testing.T) map[string]string {
	t.Helper()
	hosts := map[string]string{}
	for name, tree := range hosttest.Kinds() {
		hosts[strings.ReplaceAll(name, " ", "-")] = tree.Dir(t)
	}
	for _, machine := range []string{"amd-vi", "bare"} {
		hosts[machine] = hosttest.Load(t, filepath.Join(machines, machine+".txt")).Dir(t)
	}
	return hosts
}

// TestSights compares what people see on each kind of host, in a pipe and on terminals of 80 and 120 columns, and in
// colour: testdata/sight/KIND.golden.
func TestSights(t *testing.T) {
	for name, dir := range hostsOfKinds(t) {
		var all strings.Builder
		addresses := addressesOf(t, dir)
		last := strings.NewReplacer("LAST", addresses[len(addresses)-1])
		for _, line := range sights {
			line = last.Replace(line)
			for _, columns := range []int{0, 80, 120} {
				args := append([]string{"viaduct", "--host", dir, "--color", "never"}, strings.Fields(line)...)
				stdout, stderr, status := typed(columns, args...)
				fmt.Fprintf(&all, "$ viaduct %s    # %d columns\n%s%s", line, columns, stdout, stderr)
				if status != 0 {
					fmt.Fprintf(&all, "exit status %d\n", status)
				}
			}
		}
		for _, line := range []string{"list", "plan -f testdata/host.yaml", "show LAST"} {
			line = last.Replace(line)
			args := append([]string{"viaduct", "--host", dir, "--color", "always"}, strings.Fields(line)...)
			stdout, _, _ := typed(80, args...)
			fmt.Fprintf(&all, "$ viaduct %s    # in colour\n%s", line, strings.ReplaceAll(stdout, "\x1b", "ESC"))
		}
		got := strings.ReplaceAll(all.String(), dir, "HOST")
		compareGolden(t, filepath.Join("testdata", "sight", name+".golden"), got)
	}
}

// plain is a text without colours.
func plain(s string) string {
	for {
		before, rest, ok := strings.Cut(s, "\x1b[")
		if !ok {
			return s
		}
		_, after, _ := strings.Cut(rest, "m")
		s = before + after
	}
}

// No line is wider than its terminal, unless one word is, and colours change nothing but the colour: on every kind of
// host, and on those that people reported.
func TestWidths(t *testing.T) {
	for name, tree := range hosts(t) {
		dir := tree.Dir(t)
		lines := append([]string{"list --holders", "status -v -f testdata/host.yaml", "bind --dry-run --all nic",
			"leases", "pool", "log", "assign --formats", "doctor", "iommu"}, sights[:6]...)
		for _, address := range addressesOf(t, dir) {
			lines = append(lines, "show "+address, "bind --dry-run "+address, "why "+address, "doctor "+address)
		}
		for _, line := range lines {
			widths := []int{80}
			if line == "list" || line == "list --tree" {
				widths = []int{60, 80, 120}
			}
			for _, columns := range widths {
				args := append([]string{"viaduct", "--host", dir, "--color", "always"}, strings.Fields(line)...)
				colour, _, _ := typed(columns, args...)
				args[4] = "never"
				stdout, _, _ := typed(columns, args...)
				if plain(colour) != stdout {
					t.Errorf("%s: %s: in colour it says\n%s\nand without\n%s", name, line, colour, stdout)
				}
				fits(t, name+": "+line, stdout, columns)
			}
		}
	}
}

// oneWord reports whether a line is too wide for one word that is.
func oneWord(line string, columns int) bool {
	words := strings.Fields(line)
	last := words[len(words)-1]
	return terminal.Width(strings.TrimSuffix(line, last)) <= 16 && terminal.Width(last) > columns-16
}

// addressesOf are some devices of a host.
func addressesOf(t *testing.T, dir string) []string {
	t.Helper()
	var out []string
	all, err := filepath.Glob(filepath.Join(dir, "sys/bus/pci/devices/*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range all {
		out = append(out, filepath.Base(file))
	}
	return out[:min(len(out), 12)]
}

// A word names devices wherever a command line names one; those of one group are one for what is about groups.
func TestWordsNameDevices(t *testing.T) {
	k := hosttest.NewDesktop(t)
	for line, says := range map[string]string{
		"list nvidia": "RTX 4090", "why nvidia": "shares IOMMU group 14",
		"doctor nvidia":         "0000:01:00.0, 0000:01:00.1 can be reset",
		"bind nvidia --dry-run": "0000:01:00.1: snd_hda_intel -> vfio-pci", "why gpu": "gpu matches 2 devices",
		"show samsung": "mounted on /", "verify samsung": "mounted on /",
		"assign web --from samsung --dry-run": "mounted on /",
		"assign web --from nvidia --dry-run":  "must be named alone",
	} {
		a := onKernel(k, strings.Fields(line)...)
		if all := a.stdout + a.stderr; !strings.Contains(all, says) {
			t.Errorf("%s: %q is missing of\n%s", line, says, all)
		}
	}
}

// What a snapshot holds of leases, quarantine and users is in why, too, and what it lacks is unknown.
func TestWhyGuestOfSnapshot(t *testing.T) {
	k := busy(t)
	onKernel(k, "leases")
	file := filepath.Join(t.TempDir(), "host.vsnap")
	mustOnKernel(t, k, "snapshot", file)
	bare := filepath.Join(t.TempDir(), "redacted.vsnap")
	mustOnKernel(t, k, "snapshot", "--redact", bare)
	for host, want := range map[string][]string{
		file: {"ok lease:", "ok quarantine: none of its devices", "unknown holders: a process has its devices open"},
		bare: {"unknown holders: who has its devices open is not captured"},
	} {
		a, _, _ := typed(0, "viaduct", "--host", host, "why", "guest=web")
		text := strings.Join(strings.Fields(a), " ")
		for _, says := range want {
			if !strings.Contains(text, says) {
				t.Errorf("%s: %q is missing of\n%s", filepath.Base(host), says, a)
			}
		}
	}
}
