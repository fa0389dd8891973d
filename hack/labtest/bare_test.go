//go:build lab

package labtest

import (
	"strings"
	"testing"
)

// TestNoIOMMU runs on a host without an IOMMU: everything is shown, ungrouped, with one line that says why; nothing is
// taken.
func TestNoIOMMU(t *testing.T) {
	if g := names(groupsDir); len(g) != 0 {
		t.Fatalf("this host has IOMMU groups: %v", g)
	}

	r := run(t, viaduct, "list")
	if r.status != 0 || strings.Count(r.stderr, "\n") != 1 || !strings.Contains(r.stderr, "no IOMMU is active") {
		t.Errorf("list: exit status %d, want one line about the IOMMU: %s", r.status, r.stderr)
	}

	all := do(t, "list", "--all")
	for _, n := range names(devicesDir) {
		if !strings.Contains(all, n) {
			t.Errorf("list --all does not show %s", n)
		}
	}

	var got struct {
		IOMMU struct {
			Present bool
			Units   []any
		}
		Groups    []any
		Ungrouped []map[string]any
	}

	decode(t, do(t, "list", "--json"), &got)
	if got.IOMMU.Present || len(got.IOMMU.Units) != 0 || len(got.Groups) != 0 ||
		len(got.Ungrouped) != len(names(devicesDir)) {
		t.Errorf("list --json: %+v", got)
	}

	do(t, "list", "--tree")
	for _, n := range names(devicesDir) {
		do(t, "show", n)
	}

	before := fingerprint()
	r = run(t, viaduct, "bind", spare)
	if r.status != 3 || !strings.Contains(r.stderr, "no IOMMU is active") || strings.Count(r.stderr, "\n") != 1 ||
		fingerprint() != before {
		t.Errorf("bind: exit status %d, %s", r.status, r.stderr)
	}

	if r := run(t, viaduct, "show", "group=0"); r.status != 1 || !strings.Contains(r.stderr, "no IOMMU groups") {
		t.Errorf("show group=0: exit status %d, %s", r.status, r.stderr)
	}

	do(t, "vf", "create", spare, "2") // VFs need no IOMMU, only their passthrough does
	if len(vfs(spare)) != 2 {
		t.Errorf("VFs: %v", vfs(spare))
	}

	do(t, "vf", "list")
	do(t, "vf", "destroy", spare)
}
