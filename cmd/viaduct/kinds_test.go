package main

import (
	"bytes"
	"encoding/json"
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
