//go:build lab

package labtest

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestSnapshot takes a snapshot, and leaves beside it what the commands print here; `hack/test` runs them on the
// snapshot on the build machine and compares.
func TestSnapshot(t *testing.T) {
	do(t, "vf", "create", spare, "4")
	do(t, "bind", spare+"/vf1")
	defer do(t, "vf", "destroy", spare)
	defer inUse(t)()
	do(t, "snapshot", "/out/host.tar.gz")
	for _, line := range []string{
		"bind --dry-run " + uplink, "vf destroy --dry-run " + spare, "unbind --dry-run " + spare + "/vf0",
		"assign --dry-run new --from " + spare + "/vf3", "status", "plan --json",
		"vf create --dry-run --json " + spare + " 2",
	} {
		here := run(t, viaduct, strings.Fields(line)...)
		there := run(t, viaduct, append([]string{"--host", "/out/host.tar.gz"}, strings.Fields(line)...)...)
		if here != there {
			t.Errorf("%s: %+v\nfrom the snapshot\n%+v", line, here, there)
		}
	}

	lines := []string{
		"vf list --json",
		"vf get " + spare + "/vf2",
		"leases --json",
		"list",
		"list --holders",
		"list -o wide",
		"list --json",
		"list --tree -o wide",
		"list class=0200 -o wide",
		"iommu",
		"iommu --json",
		"show " + spare + "/vf1",
		"show group=0 --json",
		"vf create --dry-run --json " + uplink + " 7",
	}

	for _, n := range names(devicesDir) {
		lines = append(lines, "show "+n, "show --json "+n)
	}

	for i, line := range lines {
		base := fmt.Sprintf("/out/expect/%03d", i)
		if err := os.MkdirAll("/out/expect", 0o755); err != nil {
			t.Fatal(err)
		}
		for name, text := range map[string]string{base + ".args": line + "\n",
			base + ".out": do(t, strings.Fields(line)...)} {
			if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// inUse gives the spare NIC's VFs settings, one to a guest that has it open and one into quarantine, and declares them
// otherwise.
func inUse(t *testing.T) (undo func()) {
	t.Helper()
	do(t, "vf", "set", spare+"/vf2", "vlan=7", "mac=52:54:00:aa:00:02")
	do(t, "assign", "web", "--from", spare+"/vf0", "--vlan", "5")
	guest := must(os.OpenFile(groupNode(vfs(spare)[0]), os.O_RDWR, 0))

	fouled := vfs(spare)[3]
	reset := filepath.Join(devicesDir, fouled, "reset_method")
	do(t, "assign", "foul", "--from", fouled)
	shell(t, "echo > "+reset)
	status(t, 1, "release", "foul")

	const file = "/etc/viaduct/host.yaml"
	check(t, os.MkdirAll(filepath.Dir(file), 0o755))
	check(t, os.WriteFile(file, []byte("pfs:\n  - select: "+spare+"\n    count: 4\n    vfs:\n"+
		"      - {range: 2, vlan: 8}\n"), 0o644))
	// A look writes down whom it saw.
	do(t, "leases")
	return func() {
		guest.Close()
		check(t, os.Remove(file))
		shell(t, "echo default > "+reset)
		do(t, "release", "--quarantined", fouled)
		do(t, "release", "web")
		forget()
	}
}
