//go:build lab

package labtest

import (
	"os"
	"strings"
	"testing"
)

// TestBadInput: each mistake gives one clear line on stderr, nothing on stdout, the right exit status, and an unchanged
// host.
func TestBadInput(t *testing.T) {
	existing := t.TempDir() + "/precious"
	if err := os.WriteFile(existing, []byte("precious\n"), 0o644); err != nil {
		t.Fatal(err)
	}

	garbage := t.TempDir() + "/garbage.tar.gz"
	if err := os.WriteFile(garbage, []byte("this is no archive"), 0o644); err != nil {
		t.Fatal(err)
	}

	pf := netdev(t, spare)
	for _, c := range []struct {
		line   string
		status int
		says   string
	}{
		{"bind 0000:77:00.0", 1, "no such device"},
		{"bind nosuchnic", 1, "no network interface of a PCI device has this name"},
		{"bind group=9999", 1, "no such IOMMU group"},
		{"bind " + pf + "/vf0", 1, "no such VF"},
		{"bind mac=00:11:22:33:44:55", 1, "no device has this permanent MAC"},
		{"bind 0000:01:0", 2, "PCI address"},
		{"bind 0000:01:00.8", 2, "PCI address"},
		{"bind colour=red", 2, "mac, path, serial, guid, group, class"},
		{"bind mac=12", 2, "six pairs"},
		{"bind", 2, "name a device"},
		{"bind 8086:10c9", 2, "0000:01:00.0, 0000:02:00.0"},
		{"bind class=0200", 2, "name one of them"},
		{"bind " + spare + " --driver e1000", 2, "a vfio driver"},
		{"bind " + spare + " --dryrun", 2, "dryrun"},
		{"show", 2, "one argument"},
		{"show class=0200", 2, "name one of them"},
		{"show group=9999", 1, "no such IOMMU group"},
		{"vf create " + pf + " 8", 2, "0 to 7"},
		{"vf create " + pf + " -- -1", 2, "invalid number of VFs"},
		{"vf create " + pf + " -1", 2, "invalid number of VFs"},
		{"vf create " + pf + " many", 2, "invalid number of VFs"},
		{"vf create " + pf, 2, "number of VFs"},
		{"vf create 0000:00:00.0 1", 2, "not a PF"},
		{"vf create " + pf + " 2 --driver igbvf", 2, "want vfio, none"},
		{"vf destroy 0000:00:00.0", 2, "not a PF"},
		{"vf set " + pf + " mac=52:54:00:00:00:01", 2, "not a VF"},
		{"vf set " + pf + "/vf0 mac=52:54:00:00:00:01", 1, "no such VF"},
		{"vf set " + pf + "/vf0 mac=hello", 2, "want a MAC address"},
		{"vf set " + pf + "/vf0 mac=01:00:5e:00:00:01", 2, "multicast"},
		{"vf set " + pf + "/vf0 colour=red", 2, "invalid setting"},
		{"frobnicate", 2, "there is no command"},
		{"vf frobnicate", 2, "there is no command"},
		{"list --frobnicate", 2, "frobnicate"},
		{"completion tcsh", 2, "tcsh"},
		{"snapshot " + existing, 1, "exists"},
		{"snapshot /nonexistent/dir/file", 1, "no such file"},
		{"--host " + garbage + " list", 1, "not a usable snapshot"},
		{"--host /nonexistent list", 1, "no such file"},
		{"--host /dev/zero list", 1, "not a usable snapshot"},
	} {
		before := fingerprint()
		r := run(t, viaduct, strings.Fields(c.line)...)
		if r.status != c.status || strings.Count(r.stderr, "\n") != 1 || !strings.Contains(r.stderr, c.says) ||
			r.stdout != "" {
			t.Errorf("viaduct %s: exit status %d, want %d and one line that says %q:\n%s%s", c.line, r.status, c.status,
				c.says, r.stdout, r.stderr)
		}
		if fingerprint() != before {
			t.Errorf("viaduct %s changed the host", c.line)
		}
	}

	if b, err := os.ReadFile(existing); err != nil || string(b) != "precious\n" {
		t.Errorf("the file that was there: %q, %v", b, err)
	}
}

// TestFlagAfterArgument: the flag counts wherever it stands.
func TestFlagAfterArgument(t *testing.T) {
	for _, line := range []string{"bind " + spare + " --dry-run", "bind --dry-run " + spare, "bind " + spare + " -n"} {
		before := fingerprint()
		out := do(t, strings.Fields(line)...)
		if fingerprint() != before || !strings.Contains(out, "-> vfio-pci") {
			t.Errorf("viaduct %s: the host changed, or nothing was shown:\n%s", line, out)
		}
	}
}

// TestSurroundings: without root, with sysfs read-only, without sysfs.
func TestSurroundings(t *testing.T) {
	for _, c := range []struct{ name, line, says string }{
		{"not root", "runuser -u nobody -- " + viaduct + " bind " + spare, "root"},
		{"read-only sysfs", "unshare -m sh -c 'mount -o remount,ro,bind /sys && exec " + viaduct + " bind " + spare +
			"'", "is mounted read-only"},
		{"no sysfs", "unshare -m sh -c 'umount -l /sys && exec " + viaduct + " list'", "is sysfs mounted?"},
		{"no sysfs, bind", "unshare -m sh -c 'umount -l /sys && exec " + viaduct + " bind " + spare + "'",
			"is sysfs mounted?"},
	} {
		before := fingerprint()
		r := run(t, "bash", "-c", c.line)
		if r.status != 1 || !strings.Contains(r.stderr, c.says) || strings.Count(r.stderr, "\n") != 1 ||
			fingerprint() != before {
			t.Errorf("%s: exit status %d, want 1, an unchanged host, and one line that says %q:\n%s", c.name, r.status,
				c.says, r.stderr)
		}
	}
	if r := run(t, "runuser", "-u", "nobody", "--", viaduct, "list"); r.status != 0 ||
		strings.Count(r.stdout, "\n") < 10 {
		t.Errorf("list without root: exit status %d\n%s%s", r.status, r.stdout, r.stderr)
	}
}
