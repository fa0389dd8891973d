package main

import (
	"bytes"
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"

	"viaduct/internal/host/hosttest"
)

// A device that is no PCI device is told by its own name, and no step and no answer names an address that is none.
func TestOwnName(t *testing.T) {
	dir := hosttest.Platform().Dir(t)
	for _, line := range []string{
		"bind --dry-run --json group=5", "bind --dry-run --json group=9", "bind --dry-run 00:01.0", "show group=9",
		"assign a --from group=9 --dry-run", "assign a --from 00:01.0 --dry-run", "list --json", "list --tree",
	} {
		var stdout, stderr bytes.Buffer
		run(append([]string{"viaduct", "--host", dir}, strings.Fields(line)...), &stdout, &stderr)
		said := stdout.String() + stderr.String()
		if !strings.Contains(said, "fe") || strings.Contains(said, "0000:00:00.0") {
			t.Errorf("%s: %s", line, said)
		}
	}
}

// Where VFIO made the only groups, no IOMMU is there.
func TestPresent(t *testing.T) {
	for name, c := range map[string]struct {
		tree hosttest.Tree
		want bool
	}{"noiommu": {hosttest.NoIOMMU(), false}, "groups": {hosttest.Platform(), true}} {
		var stdout, stderr bytes.Buffer
		status := run([]string{"viaduct", "--host", c.tree.Dir(t), "list", "--json"}, &stdout, &stderr)
		var got struct{ IOMMU struct{ Present bool } }
		if err := json.Unmarshal(stdout.Bytes(), &got); err != nil || status != 0 || got.IOMMU.Present != c.want {
			t.Errorf("%s: %+v, %v: %s", name, got, err, stderr.String())
		}
	}
}

// A snapshot has what the running host was told by: which groups VFIO made, and what was recorded of declared devices.
func TestKindsInSnapshots(t *testing.T) {
	for name, c := range map[string]struct {
		tree       hosttest.Tree
		line, says string
	}{
		"noiommu": {hosttest.NoIOMMU(), "show group=0", "noiommu mode"},
		"records": {hosttest.TakenDisks().With(hosttest.Tree{
			"var/lib/viaduct/known-serial=S1.json": `{"selector":"serial=S1","address":"0000:02:00.0","identity":{` +
				`"path":"0000:00:02.0/00.0","serial":"S1","id":{"vendor":9798,"device":20516,"subvendor":6900,` +
				`"subdevice":4352,"class":67586}},"group":["0000:00:02.0/00.0"]}`,
			"etc/viaduct/host.yaml": "devices:\n  - select: serial=S1\n",
		}), "status", "it is 0000:02:00.0 by the record of the last apply"},
		"ports": {hosttest.TwoPorts(), "vf create --dry-run ens1 2", "is another port of 0000:01:00.0 than ens2"},
		"roce":  {hosttest.RoCE(), "vf list", "has no network interface here: its driver mlx5_core has not made one"},
	} {
		file := filepath.Join(t.TempDir(), "host.vsnap")
		var stdout, stderr bytes.Buffer
		status := run([]string{"viaduct", "--host", c.tree.Dir(t), "snapshot", file}, &stdout, &stderr)
		if status != 0 {
			t.Fatalf("%s: %s", name, stderr.String())
		}
		run(append([]string{"viaduct", "--host", file}, strings.Fields(c.line)...), &stdout, &stderr)
		if !strings.Contains(stdout.String()+stderr.String(), c.says) {
			t.Errorf("%s: %s%s", name, stdout.String(), stderr.String())
		}
	}
}
