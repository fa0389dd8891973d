package guest

import (
	"testing"

	"viaduct/internal/host"
	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

// Who a process runs as decides which nodes it may open: its user first, then its groups, then everybody.
func TestUserOpens(t *testing.T) {
	const qemu = "Name:\tqemu\nUid:\t107\t107\t107\t107\nGid:\t108\t108\t108\t108\nGroups:\t36 109 \nCapEff:\t0000000000000000\n"
	const root = "Name:\tqemu\nUid:\t0\t0\t0\t0\nGid:\t0\t0\t0\t0\nGroups:\t\nCapEff:\t000001ffffffffff\n"
	for name, c := range map[string]struct {
		status string
		owner  host.Owner
		known  bool
		opens  bool
	}{
		"root's, as root":         {root, host.Owner{Mode: 0o600}, true, true},
		"another's, as root":      {root, host.Owner{UID: 107, GID: 107, Mode: 0o600}, true, true},
		"root's":                  {qemu, host.Owner{Mode: 0o600}, true, false},
		"its own":                 {qemu, host.Owner{UID: 107, Mode: 0o600}, true, true},
		"its own, to be read":     {qemu, host.Owner{UID: 107, Mode: 0o466}, true, false},
		"its group's":             {qemu, host.Owner{GID: 108, Mode: 0o660}, true, true},
		"another of its groups'":  {qemu, host.Owner{GID: 36, Mode: 0o660}, true, true},
		"a group's, to be read":   {qemu, host.Owner{GID: 36, Mode: 0o646}, true, false},
		"another group's":         {qemu, host.Owner{GID: 37, Mode: 0o660}, true, false},
		"everybody's":             {qemu, host.Owner{Mode: 0o666}, true, true},
		"of whom nothing is told": {"Name:\tqemu\n", host.Owner{Mode: 0o666}, false, true},
		"with a short line":       {"Uid:\t0\n", host.Owner{Mode: 0o666}, false, true},
	} {
		u, known := UserOf(&iommu.Host{Host: hosttest.Tree{"proc/7/status": c.status}.Host(t)}, 7)
		if known != c.known || u.Opens(c.owner) != c.opens {
			t.Errorf("%s: %+v, known %v, opens %v", name, u, known, u.Opens(c.owner))
		}
	}

	if _, known := UserOf(&iommu.Host{Host: hosttest.Tree{"proc/7/": ""}.Host(t)}, 7); known {
		t.Error("who cannot be read is known")
	}
}
