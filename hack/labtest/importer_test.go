//go:build lab

package labtest

import (
	"path/filepath"
	"strings"
	"testing"
)

// TestImporter runs the programs of hack/importer, a module of its own that uses viaduct's packages, on this host: they
// do what they are for; and when they are killed in the middle, viaduct recover finishes or undoes what they had begun.
func TestImporter(t *testing.T) {
	const e1000, edu = "0000:07:01.0", "0000:07:02.0" // one group
	r := run(t, "./groups")
	if r.status != 0 || strings.Count(r.stdout, "group ") != len(names(groupsDir)) ||
		!strings.Contains(r.stdout, e1000) {
		t.Errorf("groups: exit status %d\n%s%s", r.status, r.stdout, r.stderr)
	}
	unit := func() string { return deviceState(e1000) + ", " + deviceState(edu) }
	const taken, home = "vfio-pci vfio-pci, vfio-pci vfio-pci", "e1000 (null),  (null)"
	if r := run(t, "./take", e1000); r.status != 0 || unit() != home ||
		!strings.Contains(r.stdout, "drivers/e1000/unbind") {
		t.Errorf("take: exit status %d, left %q\n%s%s", r.status, unit(), r.stdout, r.stderr)
	}
	if r := run(t, "./vfs", spare); r.status != 0 || len(vfs(spare)) != 0 || !strings.Contains(r.stdout, "vlan 100") {
		t.Errorf("vfs: exit status %d, left %v\n%s%s", r.status, vfs(spare), r.stdout, r.stderr)
	}

	kills := 0
	killed := func(n int, program, device string, sound func() bool) {
		for _, whom := range []string{"parent", "child", "both"} {
			dead, rest := killProgram(t, n, whom, program, device)
			if !dead {
				t.Errorf("%s ended before write %d: %s", program, n, rest())
				continue
			}
			kills++
			r := run(t, viaduct, "recover")
			said := rest()
			left, _ := filepath.Glob("/run/viaduct/change-*")
			if r.status != 0 || len(left) > 0 || !sound() {
				t.Errorf("%s, %s killed at write %d: %q, VFs %v, records %v, exit status %d\n%s%s%s",
					program, whom, n, unit(), vfs(spare), left, r.status, r.stdout, r.stderr, said)
			}
			do(t, "unbind", e1000)
			do(t, "vf", "destroy", spare)
		}
	}
	for _, n := range []int{2, 4} {
		killed(n, "./take", e1000, func() bool { return unit() == taken || unit() == home })
	}
	// The first five writes take the unit. What is given back is so device by device.
	killed(7, "./take", e1000, func() bool {
		one, other := deviceState(e1000), deviceState(edu)
		return (one == "vfio-pci vfio-pci" || one == "e1000 (null)") &&
			(other == "vfio-pci vfio-pci" || other == " (null)")
	})
	for _, n := range []int{2, 4, 6} {
		killed(n, "./vfs", spare, func() bool {
			for i, vf := range vfs(spare) {
				if bound(vf) != "vfio-pci" || !strings.Contains(vfLine(t, netdev(t, spare), i), "vlan 100") {
					return false
				}
			}
			return len(vfs(spare)) == 0 || len(vfs(spare)) == 2
		})
	}
	t.Logf("%d kills", kills)
}
