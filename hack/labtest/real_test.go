//go:build lab

package labtest

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestPorts: of two ports of a bond, which show one address, each is found by the address that it was made with: by
// show, bind, plan and apply, and in a snapshot.
func TestPorts(t *testing.T) {
	one, two := ports()[2], ports()[3]
	macs := map[string]string{}
	shell(t, "modprobe bonding max_bonds=0; ip link add ports type bond")
	for _, pf := range []string{one, two} {
		macs[pf] = attr(devicesDir, pf, "net", netdev(t, pf), "address")
		shell(t, fmt.Sprintf("ip link set %s down; ip link set %[1]s master ports", netdev(t, pf)))
	}
	t.Cleanup(func() {
		shell(t, "ip link del ports")
		forget()
	})
	shell(t, "ip link set ports up")
	if a, b := attr(devicesDir, one, "net", netdev(t, one), "address"),
		attr(devicesDir, two, "net", netdev(t, two), "address"); a != b {
		t.Fatalf("the ports show %s and %s, want one address", a, b)
	}

	snapshot := filepath.Join(t.TempDir(), "host.snapshot")
	do(t, "snapshot", snapshot)
	for pf, mac := range macs {
		for _, host := range [][]string{nil, {"--host", snapshot}} {
			var v struct{ Address string }
			decode(t, do(t, append(host, "show", "--json", "mac="+mac)...), &v)
			if v.Address != pf {
				t.Errorf("%v: mac=%s is %s, want %s", host, mac, v.Address, pf)
			}
		}
		if r := status(t, 3, "bind", "--dry-run", "mac="+mac); !strings.Contains(r.stderr, pf) ||
			!strings.Contains(r.stderr, "bond") {
			t.Errorf("bind: %s", r.stderr)
		}
	}

	file := declare(t, "pfs:\n  - select: mac="+macs[two]+"\n    count: 2\n")
	if r := status(t, 4, "plan", "-f", file); !strings.Contains(r.stdout, two) || strings.Contains(r.stdout, one) {
		t.Errorf("plan: %s", r.stdout)
	}
	do(t, "apply", "-f", file)
	if len(vfs(one)) != 0 || len(vfs(two)) != 2 {
		t.Errorf("apply made %d and %d VFs, want 0 and 2", len(vfs(one)), len(vfs(two)))
	}
	do(t, "vf", "destroy", two)
}

// TestGroupNode: who has only the node of a group open, and no device of it yet, has the group.
func TestGroupNode(t *testing.T) {
	pf := ports()[0]
	do(t, "vf", "create", pf, "2", "--driver", "vfio")
	vf := vfs(pf)[1]
	free := held(t, vf)
	for _, args := range [][]string{{"unbind", vf}, {"vf", "destroy", pf}, {"bind", pf},
		{"assign", "web", "--from", vf}} {
		r := status(t, 3, args...)
		if !strings.Contains(r.stderr, "holder") && args[0] != "bind" {
			t.Errorf("viaduct %s: %s", args, r.stderr)
		}
	}
	if len(vfs(pf)) != 2 || bound(vf) != "vfio-pci" || bound(pf) != "igb" {
		t.Errorf("refused, %s has %d VFs, and they are on %q and %q", pf, len(vfs(pf)), bound(pf), bound(vf))
	}
	free()
	do(t, "vf", "destroy", pf)
}

// TestPlainUser: a user who may change nothing can ask what a change would do, whatever leases there are.
func TestPlainUser(t *testing.T) {
	pf := ports()[0]
	pool(t, pf)
	do(t, "assign", "web", "--from", "net")
	free := vfs(pf)[4]
	before := fingerprint()
	for _, args := range [][]string{
		{"assign", "db", "--from", "net", "--dry-run"}, {"bind", free, "--dry-run"}, {"unbind", free, "--dry-run"},
		{"vf", "set", pf + "/vf4", "vlan=7", "--dry-run"}, {"list"}, {"show", free}, {"plan"},
	} {
		if r := run(t, "runuser", append([]string{"-u", "nobody", "--", viaduct}, args...)...); r.status != 0 {
			t.Errorf("as a plain user: viaduct %s: exit status %d\n%s%s", args, r.status, r.stdout, r.stderr)
		}
	}
	if r := run(t, "runuser", "-u", "nobody", "--", viaduct, "unbind", free); r.status == 0 || r.status == 3 {
		t.Errorf("as a plain user: unbind: exit status %d, %s", r.status, r.stderr)
	}
	if fingerprint() != before {
		t.Error("a plain user changed something")
	}
	do(t, "release", "web")
	_ = os.Remove("/etc/viaduct/host.yaml")
}
