package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"viaduct/internal/host/hosttest"
)

// task is what somebody comes to do, with the lines that they type. A line that begins with "file " writes host.yaml, and
// one that begins with "at boot " is what a boot types.
type task struct {
	name  string
	host  func(*testing.T) *hosttest.Kernel
	lines []string
}

func onDesktop(t *testing.T) *hosttest.Kernel { return hosttest.NewDesktop(t) }
func onServer(t *testing.T) *hosttest.Kernel  { return hosttest.NewServer(t) }

// captured is a host of a tree, which nobody changes.
func captured(tree func(*testing.T) hosttest.Tree) func(*testing.T) *hosttest.Kernel {
	return func(t *testing.T) *hosttest.Kernel { return hosttest.NewKernel(t, tree(t)) }
}

const (
	sixtyFour = "pfs:\n  - each: 8086:1572\n    count: 16\n    vfs:\n" +
		"      - {driver: vfio, mac: stable, vlan: 100+index, pool: net}\n"
	grown = "pfs:\n  - select: mac=52:54:00:00:41:00\n    count: 16\n    vfs:\n" +
		"      - {driver: vfio, mac: stable, vlan: 100+index, pool: net}\n" +
		"  - select: mac=52:54:00:00:41:01\n    count: %d\n    vfs:\n      - {driver: vfio, mac: stable, pool: back}\n"
)

// tasks are twelve of five users; the packager's is hack/package's own test.
var tasks = []task{
	{"1 give the graphics card with its audio to a guest at every boot", onDesktop, []string{
		"list gpu", "show 01:00.0", "bind nvidia --dry-run", "bind nvidia --save", "status", "list gpu",
	}},
	{"2 why a NIC is in a group of six, and what would split it", captured(func(t *testing.T) hosttest.Tree {
		return hosttest.Load(t, filepath.Join(machines, "why.txt"))
	}), []string{"list 0b:02.0", "why 0b:02.0", "bind 0b:02.0 --dry-run"}},
	{"3 the IOMMU is off: where to turn it on, on this machine", captured(func(t *testing.T) hosttest.Tree {
		return hosttest.Load(t, "testdata/faults/amd-off.txt")
	}), []string{"list", "doctor"}},
	{"4 64 VFs on two dual-port NICs from one file, the plan on one screen", onServer, []string{
		"file " + sixtyFour, "plan", "apply", "status", "pool", "assign web --from net --format qemu",
	}},
	{"5 the same file on another host", onDesktop, []string{"file " + sixtyFour, "plan"}},
	{"6 grow one PF while guests run on the other", onServer, []string{
		"file " + fmt.Sprintf(grown, 2), "apply", "assign web --from net --format json",
		"file " + fmt.Sprintf(grown, 4),
		"plan", "apply", "status", "assign db --from back --format qemu", "file " + fmt.Sprintf(grown, 8), "plan",
		"release db", "apply", "status",
	}},
	{"7 learn by JSON why an assign was refused, and retry the right way", onServer, []string{
		"vf create ens1f0 2", "assign web --from ens1f1 --json", "vf create ens1f1 2",
		"assign web --from ens1f1 --json",
	}},
	{"8 preview what libvirt will get", onServer, []string{
		"vf create ens1f0 2", "assign web --from ens1f0 --vlan 100 --mac stable --dry-run --format libvirt", "leases",
	}},
	{"10 why did guest web not start", onServer, []string{
		"vf create ens1f0 2 --driver vfio", "assign web --from ens1f0 --memory 8G", "unbind ens1f0/vf0 --force lease",
		"why guest=web --memory 8G",
	}},
	{"11 what changed on this host, by whom", onServer, []string{
		"vf create ens1f0 2", "vf set ens1f0/vf0 vlan=7", "bind eno1", "log", "log ens1f0/vf0", "show ens1f0/vf0",
	}},
	{"12 a customer's snapshot: is the host as declared, and if not, why", onServer, []string{
		"file " + sixtyFour, "apply", "vf set ens1f0/vf3 vlan=0", "snapshot SNAPSHOT", "--host SNAPSHOT status",
		"--host SNAPSHOT plan", "--host SNAPSHOT log", "--host SNAPSHOT doctor ens1f0",
	}},
}

// TestTasks compares what each line of the tasks answers: testdata/tasks/N.golden.
func TestTasks(t *testing.T) {
	here := time.Local
	t.Cleanup(func() { time.Local = here })
	time.Local = time.UTC
	for _, task := range tasks {
		k := task.host(t)
		snapshot := filepath.Join(t.TempDir(), "host.vsnap")
		var out strings.Builder
		fmt.Fprintf(&out, "%s\n\n", task.name)
		for _, line := range task.lines {
			if text, file := strings.CutPrefix(line, "file "); file {
				in(t, k, "etc/viaduct/host.yaml", text)
				fmt.Fprintf(&out, "# cat /etc/viaduct/host.yaml\n%s\n", text)
				continue
			}
			words := strings.Fields(strings.ReplaceAll(line, "SNAPSHOT", snapshot))
			var a answer
			if words[0] == "--host" {
				a = onCaptured(snapshot, words[2:]...)
			} else {
				a = onKernel(k, words...)
			}
			a.stdout, a.stderr = withoutTimes(a.stdout, k.Dir(), snapshot), withoutTimes(a.stderr, k.Dir(), snapshot)
			if words[0] == "apply" || words[len(words)-1] == "log" {
				// PFs are worked on side by side, and the first that is ready is told first.
				a.stdout, a.stderr = sorted(a.stdout), sorted(a.stderr)
			}
			fmt.Fprintf(&out, "# viaduct %s\n%s%s", line, a.stdout, a.stderr)
			if a.status != 0 {
				fmt.Fprintf(&out, "exit status %d\n", a.status)
			}
			out.WriteString("\n")
		}

		number, _, _ := strings.Cut(task.name, " ")
		compareGolden(t, filepath.Join("testdata", "tasks", number+".golden"), out.String())
	}
}

// sorted are lines in order, but for the header of a table, which stays the first.
func sorted(text string) string {
	lines := slices.Collect(strings.Lines(text))
	if len(lines) > 0 && strings.HasPrefix(lines[0], "TIME") {
		return lines[0] + sorted(strings.Join(lines[1:], ""))
	}
	slices.Sort(lines)
	return strings.Join(lines, "")
}

// numbers are those of IOMMU groups and nodes, which VFs get in the order in which they are made.
var numbers = regexp.MustCompile(`("group": |/dev/vfio/(devices/vfio)?)\d+`)

var times = regexp.MustCompile(`20\d\d-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)?`)

// withoutTimes is a text with neither times nor names of this run's folders.
func withoutTimes(text, dir, snapshot string) string {
	text = strings.NewReplacer(dir, "", snapshot, "SNAPSHOT", fmt.Sprint(os.Getpid()), "PID").Replace(text)
	text = numbers.ReplaceAllString(text, "${1}N")
	return times.ReplaceAllString(text, "2026-01-01 12:00:00")
}
