//go:build lab

package labtest

import (
	"encoding/json"
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
		"list -o wide",
		"list --json",
		"list --tree -o wide",
		"list class=0200 -o wide",
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
		said := do(t, strings.Fields(line)...)
		if strings.HasPrefix(line, "show ") {
			// Which tells of users, whom a snapshot does not have.
			captured := do(t, append([]string{"--host", "/out/host.tar.gz"}, strings.Fields(line)...)...)
			if withoutUsers(said) != withoutUsers(captured) {
				t.Errorf("%s:\n%s\nfrom the snapshot\n%s", line, said, captured)
			}
			said = captured
		}
		for name, text := range map[string]string{base + ".args": line + "\n", base + ".out": said} {
			if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// withoutUsers is what show prints but for who uses the device.
func withoutUsers(text string) string {
	if strings.HasPrefix(text, "{") {
		var v map[string]any
		if err := json.Unmarshal([]byte(text), &v); err != nil {
			return text
		}
		delete(v, "holders")
		b, _ := json.Marshal(v)
		return string(b)
	}
	var out strings.Builder
	using := false
	for line := range strings.Lines(text) {
		continues := strings.HasPrefix(line, "              ")
		if using = strings.HasPrefix(line, "  used by") || using && continues; !using {
			out.WriteString(line)
		}
	}
	return out.String()
}
