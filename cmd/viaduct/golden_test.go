package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"viaduct/internal/host/hosttest"
)

var update = flag.Bool("update", false, "rewrite the golden files")

const machines = "../../internal/host/hosttest/testdata"

// TestGolden runs commands on captured machines, as a folder and as a snapshot, and compares what they print, text and
// JSON alike: testdata/MACHINE/NAME.golden. go test ./cmd/viaduct -update rewrites them.
func TestGolden(t *testing.T) {
	for _, machine := range []string{"amd-vi", "bare"} {
		tree := hosttest.Load(t, filepath.Join(machines, machine+".txt"))
		for kind, dir := range map[string]string{"folder": tree.Dir(t), "snapshot": tree.Snapshot(t)} {
			for name, line := range map[string]string{
				"list":            "list",
				"list.json":       "list --json",
				"list-tree":       "list --tree",
				"list-class":      "list class=0200 group=7",
				"list-class.json": "list --json class=0200 group=7",
				"list-class-tree": "list --tree class=0200",
				"list-wide":       "list -o wide",
				"list-tree-wide":  "list --tree -o wide",
				"list-all":        "list --all",
				"list-word":       "list nic nvme",
				"vf-list-wide":    "vf list -o wide",
				"vf-list-vf":      "vf list enp2s0/vf1 enp1s0",
				"vf-list-none":    "vf list 07:01.0",
				"wrong-command":   "lsit",
				"wrong-option":    "list --jsn",
				"wrong-address":   "show 09:00.1",
				"show-pf":         "show 02:00.0",
				"show-pf.json":    "show 02:00.0 --json",
				"show-vf":         "show 02:00.0/vf1",
				"show-vf.json":    "show enp2s0/vf1 --json",
				"show-nvme":       "show 09:00.0",
				"show-path":       "show path=0000:00:0a.0/00.0",
				"show-mac":        "show mac=52:54:00:00:00:01",
				"show-group":      "show group=7",
				"show-group.json": "show group=7 --json",
				"iommu":           "iommu",
				"iommu.json":      "iommu --json",
				"doctor":          "doctor",
				"doctor.json":     "doctor --json",
				"doctor-pf":       "doctor 02:00.0",
				"vf-list":         "vf list",
				"vf-list.json":    "vf list --json",
				"bind-dry":        "bind --dry-run 07:02.0",
				"bind-dry-steps":  "bind --dry-run --steps 07:02.0",
				"bind-dry-slot":   "bind --dry-run 08:00",
				"bind-dry-vfs":    "bind --dry-run --all 8086:10ca",
				"bind-several":    "bind --dry-run 8086:10ca",
				"plan":            "plan -f testdata/host.yaml",
				"plan-steps":      "plan -f testdata/host.yaml --steps",
				"plan.json":       "plan -f testdata/host.yaml --json",
				"status":          "status -f testdata/host.yaml",
				"status-verbose":  "status -f testdata/host.yaml -v",
				"status-none":     "status",
				"bind-dry.json":   "bind --dry-run --json 07:02.0",
				"bind-pf":         "bind --dry-run 02:00.0",
				"bind-write":      "bind 01:00.0",
				"unbind-dry":      "unbind --dry-run enp2s0/vf1",
				"create-dry":      "vf create --dry-run enp1s0 2",
				"recreate-dry":    "vf create --dry-run enp2s0 2",
				"destroy-dry":     "vf destroy --dry-run enp2s0",
				"set-dry":         "vf set --dry-run enp2s0/vf1 mac=52:54:00:12:34:56",
				"completion":      "completion bash",
				"usage":           "bind",
			} {
				t.Run(machine+"/"+kind+"/"+name, func(t *testing.T) {
					var stdout, stderr bytes.Buffer
					args := append([]string{"viaduct", "--host", dir}, strings.Fields(line)...)
					status := run(args, &stdout, &stderr)
					if strings.HasSuffix(name, ".json") && stdout.Len() > 0 && !json.Valid(stdout.Bytes()) {
						t.Errorf("no valid JSON:\n%s", stdout.String())
					}
					got := fmt.Sprintf("%s== stderr\n%s== exit status %d\n", stdout.String(), stderr.String(), status)
					got = strings.ReplaceAll(got, dir, "HOST")
					compareGolden(t, filepath.Join("testdata", machine, name+".golden"), got)
				})
			}
		}
	}
}

func compareGolden(t *testing.T, file, got string) {
	t.Helper()
	if *update {
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s:\n%s\nwant\n%s", file, got, want)
	}
}

// A flag counts wherever it stands; what follows "--" is no flag; a flag's value is not taken for an argument.
func TestFlagsFirst(t *testing.T) {
	e := &env{}
	for line, want := range map[string]string{
		"v bind 01:00.0 --dry-run":                   "v bind --dry-run 01:00.0",
		"v bind 01:00.0 -n 02:00.0":                  "v bind -n 01:00.0 02:00.0",
		"v bind 01:00.0 --driver vfio-pci":           "v bind --driver vfio-pci 01:00.0",
		"v bind 01:00.0 --driver=vfio-pci":           "v bind --driver=vfio-pci 01:00.0",
		"v --host x list list --json":                "v --host x list --json list",
		"v list --json --host x nic":                 "v --host x list --json nic",
		"v vf list enp1s0 --host=x --color never":    "v --host=x --color never vf list enp1s0",
		"v run web -- qemu --host x":                 "v run -- web qemu --host x",
		"v vf create eth0 2 --driver none --dry-run": "v vf create --driver none --dry-run eth0 2",
		"v bind 01:00.0 -- --dry-run":                "v bind -- 01:00.0 --dry-run",
		"v bind 01:00.0 --bogus":                     "v bind --bogus 01:00.0",
		"v bind --driver":                            "v bind --driver",
		"v":                                          "v",
	} {
		if got := strings.Join(flagsFirst(newApp(e), strings.Fields(line)), " "); got != want {
			t.Errorf("%s:\n got %s\nwant %s", line, got, want)
		}
	}
}

type full struct{}

func (full) Write([]byte) (int, error) { return 0, io.ErrShortWrite }

// Output that could not be written is a failure.
func TestFullDisk(t *testing.T) {
	dir := hosttest.Load(t, filepath.Join(machines, "bare.txt")).Dir(t)
	for _, line := range []string{"list", "list --json", "list --tree", "show 00:01.0", "vf list", "version",
		"completion zsh", "man"} {
		var stderr bytes.Buffer
		args := append([]string{"viaduct", "--host", dir}, strings.Fields(line)...)
		if status := run(args, full{}, &stderr); status != 1 {
			t.Errorf("%s: exit status %d: %s", line, status, stderr.String())
		}
	}
}

// So is a value that has no JSON.
func TestUnprintable(t *testing.T) {
	var out bytes.Buffer
	e := &env{stdout: &out}
	if e.printJSON(func() {}); e.unprinted == nil {
		t.Errorf("nothing is known of it: %q", out.String())
	}
	e.printJSON(1)
	if e.unprinted == nil {
		t.Error("it is forgotten with the next")
	}
}

// A snapshot never takes the place of a file, and leaves nothing behind when it fails.
func TestSnapshotTarget(t *testing.T) {
	machine := hosttest.Load(t, filepath.Join(machines, "bare.txt")).Dir(t)
	dir := t.TempDir()
	precious := filepath.Join(dir, "precious")
	if err := os.WriteFile(precious, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	snapshot := func(file string) int {
		return run([]string{"viaduct", "--host", machine, "snapshot", file}, io.Discard, io.Discard)
	}
	if status := snapshot(precious); status != 1 {
		t.Errorf("onto a file that is there: exit status %d", status)
	}
	if b, _ := os.ReadFile(precious); string(b) != "precious" {
		t.Errorf("the file has %q now", b)
	}
	if status := snapshot(filepath.Join(dir, "new")); status != 0 {
		t.Errorf("a new file: exit status %d", status)
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 2 {
		t.Errorf("the folder has %v", left)
	}
}
