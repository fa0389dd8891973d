package main

import (
	"errors"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"viaduct/cmd/internal/changelog"
	"viaduct/cmd/internal/hostfile"
	"viaduct/internal/host/hosttest"
)

// A command that cannot lock what it changes says so and changes nothing.
func TestLocksThatFail(t *testing.T) {
	confirming := func(t *testing.T) *hosttest.Kernel {
		k := strayed(t)
		put(t, k, hostfile.File, sweptFile+"protect: []\n")
		return k
	}
	returned := func(t *testing.T) *hosttest.Kernel {
		k := sweptHost(t)
		mustOnKernel(t, k, "unbind", sweptNIC)
		return k
	}
	applied := func(t *testing.T) *hosttest.Kernel {
		k := strayed(t)
		mustOnKernel(t, k, "apply")
		return k
	}
	for _, c := range []struct {
		lock string
		host func(*testing.T) *hosttest.Kernel
		line string
	}{
		{"lock", returned, "bind " + sweptNIC}, {"lock", sweptHost, "unbind " + sweptNIC},
		{"lock", returned, "bind --save " + sweptNIC}, {"lock", sweptHost, "verify " + sweptNIC},
		{"lock", sweptHost, "vf create " + sweptPF + " 3"}, {"lock", sweptHost, "vf destroy " + sweptPF},
		{"lock", sweptHost, "vf set " + sweptPF + "/vf1 vlan=5"}, {"lock", sweptHost, "vf sync"},
		{"lock", strayed, "apply"}, {"lock", strayed, "apply --boot --wait 0s"}, {"lock", applied, "undo"},
		{"lock", returned, "assign db --from " + sweptNIC}, {"lock", sweptHost, "release web"},
		{"lock", returned, "run db --from " + sweptNIC + " -- true"},
		{"lock-in-force", strayed, "apply"}, {"lock-in-force", applied, "undo"},
		{"lock-in-force", confirming, "apply --confirm 60s"}, {"lock-in-force", applied, "apply --confirmed"},
		{"lock-leases", returned, "assign db --from " + sweptNIC}, {"lock-leases", sweptHost, "release web"},
		{"lock-leases", returned, "run db --from " + sweptNIC + " -- true"},
		{"lock-leases", sweptHost, "migrate web --to exec:false"},
		{"lock-leases", sweptHost, "migrate web --cancel"}, {"lock-leases", sweptHost, "migrate web --resume"},
	} {
		k := c.host(t)
		file := filepath.Join(k.Dir(), "run/viaduct", c.lock)
		if err := errors.Join(os.RemoveAll(file), os.MkdirAll(file, 0o755)); err != nil {
			t.Fatal(err)
		}
		before := maps.Clone(allOf(t, k))
		k.Log = nil
		a := onKernel(k, strings.Fields(c.line)...)
		if a.status == exitDone || !strings.Contains(a.stdout+a.stderr, unix.EISDIR.Error()) {
			t.Errorf("%s without %s: %+v", c.line, c.lock, a)
		}
		after := allOf(t, k)
		for name := range after {
			// What is told is written down.
			if before[name] != after[name] && name != changelog.File {
				t.Errorf("%s without %s: /%s was %q, is %q", c.line, c.lock, name, before[name], after[name])
			}
		}
		if len(k.Log) > 0 {
			t.Errorf("%s without %s: written %q", c.line, c.lock, k.Log)
		}
	}
}

// A line that cannot be done says why, with its status, and changes nothing.
func TestLinesThatCannotBeDone(t *testing.T) {
	dir := t.TempDir()
	there, broken := filepath.Join(dir, "there"), filepath.Join(dir, "broken.yaml")
	for file, text := range map[string]string{there: "here\n", broken: "pfs: [ {"} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	with := func(name, text string) func(*testing.T) *hosttest.Kernel {
		return func(t *testing.T) *hosttest.Kernel {
			k := sweptHost(t)
			put(t, k, name, text)
			return k
		}
	}
	badDeclaration := with(hostfile.File, "pfs: [ {")
	badMove := with("var/lib/viaduct/move-web.json", "{")
	badUnit := with("sys/fs/cgroup/system.slice/x.service/cgroup.events/in/the/way", "")
	badLease := with("run/viaduct/lease-db.json", "{")
	returned := func(text string) func(*testing.T) *hosttest.Kernel {
		return func(t *testing.T) *hosttest.Kernel {
			k := with(hostfile.File, text)(t)
			mustOnKernel(t, k, "unbind", sweptNIC)
			return k
		}
	}
	const alsoNIC = "\ndevices: [{select: " + sweptNIC + "}]\nprotect: []\n"
	inUse := returned("pfs: [{select: " + sweptPF + ", count: 1}]" + alsoNIC)
	tooMany := returned("pfs: [{select: " + sweptPF + ", count: 99}]" + alsoNIC)
	empty := func(t *testing.T) *hosttest.Kernel { return hosttest.NewSmallLab(t, "0000:00:05.0", sweptPF) }
	unprotected := func(t *testing.T) *hosttest.Kernel {
		k := hosttest.NewSmallLab(t, "0000:00:05.0", "0000:00:08.0", sweptNIC, sweptEDU)
		put(t, k, hostfile.File, "devices: [{select: "+sweptNIC+"}]\n")
		return k
	}
	inTheWay := with("etc/systemd/system/viaduct.service/in/the/way", "")
	for _, c := range []struct {
		host   func(*testing.T) *hosttest.Kernel
		line   string
		status int
		says   string
	}{
		{sweptHost, "plan -f " + dir + "/none", exitUsage, "no such file"},
		{sweptHost, "plan -f " + broken, exitUsage, broken},
		{sweptHost, "apply -f " + broken, exitUsage, broken},
		{sweptHost, "apply --boot --wait 0s -f " + broken, exitUsage, broken},
		{badDeclaration, "assign db --from " + sweptNIC, exitUsage, "host.yaml"},
		{badDeclaration, "assign db --dry-run --from " + sweptNIC, exitUsage, "host.yaml"},
		{badDeclaration, "vf sync " + sweptPF, exitUsage, "host.yaml"},
		{badDeclaration, "install", exitUsage, "host.yaml"},
		{badDeclaration, "migrate web --check --to " + dir + "/", exitUsage, ""},
		{inUse, "apply", exitRefused, "web"},
		{tooMany, "apply", exitRefused, "99"},
		{unprotected, "watch --once", exitRefused, "run viaduct apply once"},
		{empty, "why guest=db", exitFailed, "none other has"},
		{sweptHost, "why guest=db", exitFailed, "these have: web"},
		{badLease, "why guest=nobody", exitFailed, "lease-db.json"},
		{badLease, "why guest=db", exitFailed, "lease-db.json"},
		{badLease, "why db", exitFailed, "lease-db.json"},
		{badLease, "leases", exitFailed, "lease-db.json"},
		{badLease, "apply", exitFailed, "lease-db.json"},
		{badLease, "vf sync " + sweptPF, exitFailed, "lease-db.json"},
		{badLease, "release web", exitFailed, "lease-db.json"},
		{inTheWay, "install", exitFailed, "viaduct.service"},
		{sweptHost, "adopt -o " + there, exitFailed, "file exists"},
		{sweptHost, "adopt -o " + dir + "/none/x", exitFailed, "no such file"},
		{sweptHost, "snapshot " + there, exitFailed, "already exists"},
		{sweptHost, "snapshot " + dir + "/none/x", exitFailed, "no such file"},
		{sweptHost, "run db --from " + sweptNIC + " -- " + dir + "/none", exitNotRun, "no such file"},
		{sweptHost, "verify 0000:99:00.0", exitFailed, "0000:99:00.0"},
		{sweptHost, "show 0000:99:00.0", exitFailed, "0000:99:00.0"},
		{sweptHost, "show group=99", exitFailed, "99"},
		{sweptHost, "bind group=99", exitFailed, "99"},
		{sweptHost, "why 0000:99:00.0", exitFailed, "0000:99:00.0"},
		{sweptHost, "verify " + sweptPF, exitFailed, "it is on igb, which is not a vfio driver"},
		{sweptHost, "verify --json " + sweptPF, exitFailed, "it is on igb, which is not a vfio driver"},
		{sweptHost, "pool none", exitFailed, "unknown pool"},
		{sweptHost, "migrate web --check --to " + dir + "/none", exitUsage, "there is no such snapshot"},
		{sweptHost, "migrate web --check --to " + there, exitFailed, "there"},
		{badMove, "migrate web --cancel", exitFailed, "move-web.json"},
		{badMove, "migrate web --resume", exitFailed, "move-web.json"},
		{badUnit, "assign db --from " + sweptNIC + " --unit x", exitFailed, "is a directory"},
		{sweptHost, "vf get 0000:99:00.0", exitFailed, "0000:99:00.0"},
		{sweptHost, "vf get " + sweptPF, exitUsage, "not a VF"},
		{sweptHost, "vf set " + sweptPF + "/vf1 vlan=4094+index", exitUsage, "vf1"},
		{sweptHost, "assign db --from " + sweptNIC + " --unit no/such", exitUsage, "does not run"},
	} {
		k := c.host(t)
		k.Log = nil
		a := onKernel(k, strings.Fields(c.line)...)
		if a.status != c.status || !strings.Contains(a.text(), c.says) {
			t.Errorf("%s: want %d, %q: %+v", c.line, c.status, c.says, a)
		}
		if len(k.Log) > 0 {
			t.Errorf("%s: written %q", c.line, k.Log)
		}
	}
}

// A recovery that fails is told, and is done when it can be.
func TestRecoveryThatFails(t *testing.T) {
	k := hosttest.NewSmallLab(t, "0000:00:05.0", sweptPF, "0000:00:08.0", sweptNIC, sweptEDU)
	k.KillAt(2, func(op, _ string) bool { return op == "write" })
	onKernel(k, "bind", sweptNIC)
	if !k.Revive() {
		t.Fatal("it was not killed")
	}
	override := "sys/bus/pci/devices/" + sweptNIC + "/driver_override"
	k.Fail[override] = unix.EIO
	if a := onKernel(k, "recover"); a.status != exitFailed || !strings.Contains(a.stderr, unix.EIO.Error()) {
		t.Errorf("it cannot: %+v", a)
	}
	delete(k.Fail, override)
	if a := onKernel(k, "recover"); a.status != exitDone || boundTo(k, sweptNIC) != "e1000" {
		t.Errorf("it can: %+v, on %s", a, boundTo(k, sweptNIC))
	}
}

// What comes on standard input is refused, and told, where it is nothing that can be used.
func TestInputThatCannotBeUsed(t *testing.T) {
	const (
		port = "<hookData><networkport><owner><name>db</name></owner><plug type='hostdev-pci' managed='yes'>" +
			"<address domain='0x0000' bus='0x01' slot='0x10' function='0x2'/></plug></networkport></hookData>"
		pool = "pfs:\n  - select: " + sweptPF + "\n    count: 2\n    vfs: [{range: 1, driver: vfio, pool: net}]\n"
	)
	with := func(text string) *hosttest.Kernel {
		k := hosttest.NewSmallLab(t, "0000:00:05.0", sweptPF)
		mustOnKernel(t, k, "vf", "create", sweptPF, "2", "--driver", "vfio")
		put(t, k, hostfile.File, text)
		return k
	}
	badLease := sweptHost(t)
	put(t, badLease, "run/viaduct/lease-web.json", "{")
	created := []string{"libvirt-hook", "--network", "--", "net", "port-created", "begin", "-"}
	for _, c := range []struct {
		k    *hosttest.Kernel
		in   string
		line []string
		says string
	}{
		{sweptHost(t), "<domain", []string{"libvirt-hook", "--", "db", "prepare", "begin", "-"}, "domain"},
		{sweptHost(t), "<hookData", created, "port"},
		{sweptHost(t), "<domain/>", []string{"libvirt-hook", "--", "web", "prepare", "begin", "-"}, "web"},
		{with("pfs: [ {"), port, created, "host.yaml"},
		{with(pool), port, created, "net"},
		{badLease, strings.Replace(port, ">db<", ">web<", 1),
			[]string{"libvirt-hook", "--network", "--", "net", "port-deleted", "begin", "-"}, "lease-web.json"},
		{sweptHost(t), "", []string{"migrate", "--peer", "--data", "none"}, "nothing is waited for"},
		{sweptHost(t), "nonsense\n", []string{"migrate", "--peer"}, ""},
		{sweptHost(t), "", []string{"--host", "there", "migrate", "--peer"}, "there is a captured host"},
	} {
		c.k.Log = nil
		if status, said := typedIn(t, c.k, c.in, c.line...); status == exitDone || !strings.Contains(said, c.says) {
			t.Errorf("%q of %q: exit status %d: %s", c.line, c.in, status, said)
		}
		if len(c.k.Log) > 0 {
			t.Errorf("%q of %q: written %q", c.line, c.in, c.k.Log)
		}
	}
}
