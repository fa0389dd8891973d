//go:build lab

package labtest

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

// TestSnapshot takes a snapshot, and leaves beside it what the commands print here; `hack/test` runs them on the
// snapshot on the build machine and compares.
func TestSnapshot(t *testing.T) {
	do(t, "vf", "create", spare, "3")
	do(t, "bind", spare+"/vf1")
	defer do(t, "vf", "destroy", spare)
	do(t, "snapshot", "/out/host.tar.gz")
	lines := []string{
		"list",
		"list --json",
		"list --tree",
		"list class=0200",
		"iommu",
		"iommu --json",
		"show " + spare + "/vf1",
		"show group=0 --json",
		"vf create --dry-run --json " + uplink + " 7",
		"vf create --dry-run --json " + spare + " 2",
	}
	for _, n := range names(devicesDir) {
		lines = append(lines, "show "+n, "show --json "+n)
	}
	for i, line := range lines {
		base := fmt.Sprintf("/out/expect/%03d", i)
		if err := os.MkdirAll("/out/expect", 0o755); err != nil {
			t.Fatal(err)
		}
		for name, text := range map[string]string{base + ".args": line + "\n", base + ".out": do(t, strings.Fields(line)...)} {
			if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
}
