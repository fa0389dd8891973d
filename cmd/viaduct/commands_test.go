package main

import (
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"viaduct/cmd/internal/terminal"
	"viaduct/internal/host/hosttest"
)

// sightOf are lines of each command, as they are typed on the captured host that busyCaptured is.
var sightOf = map[string][]string{
	"list":     {"list", "list --tree", "list --all", "list -o wide", "list nic", "list gpu"},
	"show":     {"show ens1", "show 0000:01:00.0/vf0", "show group=12"},
	"log":      {"log", "log 0000:01:00.0/vf0"},
	"why":      {"why ens1", "why guest=web --memory 8G"},
	"iommu":    {"iommu"},
	"doctor":   {"doctor", "doctor 0000:01:00.0"},
	"verify":   {"verify ens1"},
	"snapshot": {"snapshot HOST"},
	"bind": {
		"bind --dry-run ens1",
		"bind --dry-run 0000:07:01.0",
		"bind --dry-run --steps 0000:07:01.0",
		"bind 07:01.0",
	},
	"unbind":  {"unbind --dry-run 0000:01:00.0/vf1", "unbind --dry-run 0000:07:01.0"},
	"recover": {"recover"},
	"vf list": {"vf list", "vf list -o wide"},
	"vf create": {"vf create --dry-run 0000:01:00.0 7", "vf create --dry-run 0000:02:00.0 4 vlan=100+index",
		"vf create --steps 0000:02:00.0 1"},
	"vf destroy": {"vf destroy --dry-run 0000:01:00.0"},
	"vf set": {"vf set --dry-run 0000:01:00.0/vf1 vlan=7 trust=on", "vf set --steps 0000:01:00.0/vf1 vlan=7",
		"vf set 0000:01:00.0/vf1 spoof=on"},
	"vf get":    {"vf get 0000:01:00.0/vf0"},
	"vf sync":   {"vf sync --dry-run"},
	"plan":      {"plan", "plan --steps", "plan -f testdata/host.yaml"},
	"apply":     {"apply --dry-run", "apply --dry-run -f testdata/host.yaml"},
	"status":    {"status", "status -v"},
	"undo":      {"undo"},
	"adopt":     {"adopt"},
	"install":   {"install", "install --dry-run --libvirt"},
	"uninstall": {"uninstall"},
	"watch":     {"watch --once"},
	"schema":    {"schema"},
	"assign": {"assign --dry-run new --from net", "assign --dry-run new --from net --format qemu",
		"assign --dry-run new --from 0000:02:00.0,count=2,vlan=100+index",
		"assign --steps new --from 0000:02:00.0", "assign --formats",
		"assign web --from net"},
	"release":    {"release web", "release nobody"},
	"leases":     {"leases"},
	"run":        {"run web --from net -- true"},
	"migrate":    {"migrate web --to other --check"},
	"pool":       {"pool", "pool net"},
	"help":       {"help", "help bind", "help topics"},
	"man":        {"man nothing"},
	"completion": {"completion tcsh"},
	"version":    {"version extra"},
}

// busyCaptured is the host that busy is, captured at a known time.
func busyCaptured(t *testing.T) string {
	t.Helper()
	k := busy(t)
	onKernel(k, "leases")
	file := filepath.Join(t.TempDir(), "host.vsnap")
	mustOnKernel(t, k, "snapshot", file)
	tree := hosttest.FromSnapshot(t, file)
	times := regexp.MustCompile(`20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d[^"]*`)
	since := regexp.MustCompile(`"(since|since_boot)":\d+`)
	for name, text := range tree {
		tree[name] = since.ReplaceAllString(times.ReplaceAllString(text, "2026-01-01T12:00:00Z"), `"$1":60000000000`)
	}
	return tree.Snapshot(t)
}

// forPrograms reports whether what a line prints is typed or read by programs, and is as wide as it must be.
func forPrograms(line string) bool {
	return strings.Contains(line, "--steps") || strings.Contains(line, "-o wide") || line == "schema" || line == "adopt"
}

// fits tells of lines that are wider than their terminal, unless one word is.
func fits(t *testing.T, what, text string, columns int) {
	t.Helper()
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		if columns > 0 && terminal.Width(line) > columns && !oneWord(line, columns) {
			t.Errorf("%s: %d columns of %d: %s", what, terminal.Width(line), columns, line)
		}
	}
}

// visible are the names of all commands that are not hidden.
func visible(t *testing.T) []string {
	t.Helper()
	var out []string
	for _, c := range newApp(&env{}).Commands {
		if len(c.Subcommands) == 0 && !c.Hidden {
			out = append(out, c.Name)
		}
		for _, sub := range c.Subcommands {
			out = append(out, c.Name+" "+sub.Name)
		}
	}
	return out
}

// TestCommandSights compares what each command says of one captured host in a pipe, on terminals of 80 and 120 columns,
// and in colour: testdata/commands/COMMAND.golden.
func TestCommandSights(t *testing.T) {
	// The log's times are those of the place.
	here := time.Local
	t.Cleanup(func() { time.Local = here })
	time.Local = time.UTC
	host := busyCaptured(t)
	for _, name := range visible(t) {
		lines := sightOf[name]
		if len(lines) == 0 {
			t.Errorf("%s has no line here", name)
		}
		var all strings.Builder
		for _, line := range lines {
			words := strings.Fields(strings.ReplaceAll(line, "HOST", host))
			for _, columns := range []int{0, 80, 120} {
				stdout, stderr, status := typed(
					columns,
					append([]string{"viaduct", "--host", host, "--color", "never"}, words...)...)
				fmt.Fprintf(
					&all,
					"$ viaduct %s    # %d columns, exit status %d\n%s%s",
					line,
					columns,
					status,
					stdout,
					stderr,
				)
				if !forPrograms(line) {
					fits(t, line, stdout, columns)
				}
			}
			stdout, _, _ := typed(80, append([]string{"viaduct", "--host", host, "--color", "always"}, words...)...)
			fmt.Fprintf(&all, "$ viaduct %s    # in colour\n%s", line, strings.ReplaceAll(stdout, "\x1b", "ESC"))
		}
		text := strings.ReplaceAll(all.String(), host, "HOST")
		compareGolden(t, filepath.Join("testdata", "commands", strings.ReplaceAll(name, " ", "-")+".golden"), text)
	}

	for name := range sightOf {
		if !slices.Contains(visible(t), name) {
			t.Errorf("there is no command %s", name)
		}
	}
}
