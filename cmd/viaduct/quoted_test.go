package main

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"viaduct/internal/host/hosttest"
)

// What is printed to be pasted into a shell runs nothing that a stranger's snapshot names.
func TestStepsAreQuoted(t *testing.T) {
	const driver = "$(touch ran);`touch ran`;x y"
	tree := hosttest.Made(
		hosttest.PCI{At: "0000:00:01.0", ID: "8086:3420", Class: "060400", Driver: "pcieport", Group: 1},
		hosttest.PCI{At: "0000:00:01.0/0000:01:00.0", ID: "8086:1572", Class: "020000", Driver: driver, Group: 2},
	)
	for kind, host := range map[string]string{"folder": tree.Dir(t), "snapshot": tree.Snapshot(t)} {
		for _, line := range []string{"bind --dry-run --steps 0000:01:00.0",
			"plan --steps -f " + declare(t, "0000:01:00.0")} {
			stdout, stderr, status := typed(0, append([]string{"viaduct", "--host", host}, strings.Fields(line)...)...)
			if !strings.Contains(stdout, "touch ran") {
				t.Errorf("%s: %s: status %d, %s%s", kind, line, status, stdout, stderr)
				continue
			}
			var steps []string
			for l := range strings.Lines(stdout) {
				if l = strings.TrimSpace(l); strings.HasPrefix(l, "echo ") {
					steps = append(steps, strings.ReplaceAll(l, " > ", " >> /dev/null -- "))
				}
			}
			dir := t.TempDir()
			cmd := exec.Command("sh", "-c", strings.Join(steps, "\n"))
			cmd.Dir = dir
			said, err := cmd.CombinedOutput()
			if ran, _ := filepath.Glob(filepath.Join(dir, "*")); len(ran) > 0 || err != nil || len(steps) == 0 {
				t.Errorf("%s: %s: %d steps leave %q: %v, %s\n%s", kind, line, len(steps), ran, err, said, stdout)
			}
		}
	}
}

// declare is a file that declares a device.
func declare(t *testing.T, selector string) string {
	t.Helper()
	k := hosttest.NewKernel(t, hosttest.Tree{"etc/x": ""})
	put(t, k, "host.yaml", "devices: [{select: \""+selector+"\"}]\n")
	return filepath.Join(k.Dir(), "host.yaml")
}
