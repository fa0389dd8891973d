package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

// After an apply that ended well nothing is left to do, on every host there is: a plan is empty, status ok, and neither
// a second apply nor the watch writes anything. One that cannot come to rest fails.
func TestAtRest(t *testing.T) {
	watches := 4
	for name, tree := range hosts(t) {
		t.Run(name, func(t *testing.T) {
			for what, declaration := range declarations(t, tree) {
				rests(t, tree, what, declaration, &watches)
			}
		})
	}
}

// declarations are what may be declared of a host, each for itself: its PFs, with VFs for guests and for the host, and
// its devices.
func declarations(t *testing.T, tree hosttest.Tree) map[string]string {
	t.Helper()
	h := iommu.Host{Host: hosttest.NewKernel(t, tree).Host()}
	topology, err := iommu.Scan(&h)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	topology.All(func(d *iommu.Device) bool {
		switch {
		case !d.PCI || d.PhysFn != nil:
		case d.SRIOV != nil && d.SRIOV.Total > 0:
			for _, driver := range []string{"vfio", "home", "none"} {
				out["VFs of "+d.Name+" for "+driver] = fmt.Sprintf(
					"pfs:\n  - {select: %q, count: %d, vfs: [{driver: %s}]}\n", d.Name, min(2, d.SRIOV.Total), driver)
			}
		case d.Role() == iommu.RoleGuest:
			out["device "+d.Name] = fmt.Sprintf("devices:\n  - {select: %q}\n", d.Name)
		}
		return true
	})
	return out
}

func rests(t *testing.T, tree hosttest.Tree, what, declaration string, watches *int) {
	t.Helper()
	k := hosttest.NewKernel(t, tree)
	file := filepath.Join(k.Dir(), "etc/viaduct/host.yaml")
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(declaration), 0o600); err != nil {
		t.Fatal(err)
	}

	if _, err := os.Stat(filepath.Join(k.Dir(), "sys/bus/pci/drivers/vfio-pci")); err != nil {
		k.Register("vfio-pci")
	}

	first := onKernel(k, "apply")
	if first.status != exitDone {
		// It was refused, or cannot come to rest, which is told each time.
		again := onKernel(k, "apply")
		if first.stderr == "" || again.stderr == "" || again.status == exitDone {
			t.Errorf("%s: exit status %d, then %d\n%s\n%s", what, first.status, again.status, first.stderr,
				again.stderr)
		}
		return
	}
	wrote := len(k.Log)
	lines := []string{"plan", "status", "apply", "plan"}
	if *watches--; *watches >= 0 {
		// It waits for devices that may come.
		lines = append(lines, "watch --once")
	}
	for _, line := range lines {
		a := onKernel(k, strings.Fields(line)...)
		if a.status != exitDone || len(k.Log) > wrote {
			t.Errorf("%s: %s after an apply that ended well: exit status %d, wrote %q\n%s%s\nthe apply said %s%s",
				what, line,
				a.status, k.Log[wrote:], a.stdout, a.stderr, first.stdout, first.stderr)
			return
		}
	}
}
