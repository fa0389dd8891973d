package main

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/cmd/internal/declared"
	"viaduct/cmd/internal/hostfile"
	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

// What cannot be meant of commands that look is told too.
func TestWrongLooks(t *testing.T) {
	k := hosttest.NewSmallLab(t, "0000:00:05.0", sweptPF)
	for line, says := range map[string]string{
		"list --tree --json": "cannot be combined", "list -o xml": "invalid output", "log --lines -1": "0 or more",
		"--host= list":      "--host",
		"list --color pink": "--color", "help nothing here": "no topic", "man a b": "one page",
		"man nothing": "nothing", "completion tcsh": "tcsh",
		"why": "", "why --memory big guest=web": "--memory", "why --all 0000:01:00.0": "takes no",
		"why --memory 1G 0000:01:00.0":                 "needs a guest",
		"why guest=-x":                                 "invalid guest name",
		"vf set --timeout 0s 0000:01:00.0/vf0 vlan=7":  "--timeout",
		"vf sync --timeout 0s":                         "--timeout",
		"vf create --eswitch sometimes 0000:01:00.0 1": "--eswitch", "vf create 0000:01:00.0 1 colour=red": "vf create",
		"vf create --timeout 0s 0000:01:00.0 1": "--timeout",
		"verify":                                "", "verify no/such": "", "release --quarantined no/such": "",
		"migrate -x":              "",
		"migrate we/b --to there": "invalid guest name",
		"run --user nobody-at-all web --from net -- true": "--user", "recover x y": "no arguments",
		"unbind --force=nonsense 0000:01:00.0": "--force",
		"vf list no/such":                      "no/such", "vf get no/such": "no/such", "show no/such": "no/such",
		"log no/such":                       "no/such",
		"vf sync 0000:01:00.0 0000:01:00.0": "named twice",
		"show":                              "", "schema x": "no arguments",
		"bind --driver home 0000:01:00.0": "viaduct unbind gives devices back",
	} {
		a := onKernel(k, strings.Fields(line)...)
		if a.status != exitUsage && !strings.HasPrefix(line, "run") || a.status == exitDone ||
			!strings.Contains(a.stderr, says) || a.stdout != "" || len(k.Log) > 0 {
			t.Errorf("%s: %+v, written %q", line, a, k.Log)
		}
	}
	for line, says := range map[string]string{
		"help": "See the host", "help topics": "gpu", "help vf set": "viaduct vf set", "help gpu": "graphics",
		"log --lines 1": "", "man host.yaml": ".TH",
	} {
		if a := onKernel(k, strings.Fields(line)...); a.status != exitDone || !strings.Contains(a.stdout, says) {
			t.Errorf("%s: %+v", line, a)
		}
	}
}

// An apply says what became of each item, for people and in JSON, and when nothing was to be done or is declared.
func TestApplySays(t *testing.T) {
	k := hosttest.NewSmallLab(t, "0000:00:05.0", sweptPF, "0000:00:08.0", sweptNIC, sweptEDU)
	put(t, k, "proc/sys/kernel/random/boot_id", "this\n")
	step := func(status int, says string, line ...string) {
		t.Helper()
		a := onKernel(k, line...)
		if text := strings.Join(strings.Fields(a.stdout+a.stderr), " "); a.status != status ||
			!strings.Contains(text, says) {
			t.Errorf("%q: want %d, %q: %+v", line, status, says, a)
		}
	}
	step(exitDone, "there is nothing to undo", "undo")
	// Also for who may not look at processes.
	k.Process(4711, "hidden")
	k.SetFault(func(_, name string) error {
		if strings.HasPrefix(name, "proc/4711/") {
			return unix.EACCES
		}
		return nil
	})
	step(exitDone, "nothing is declared", "apply")
	k.Revive()
	k.End(4711)
	put(t, k, hostfile.File, sweptFile)
	step(exitDiffers, `"state": "differs"`, "plan", "--json")
	step(exitDiffers, "/etc/viaduct/host.yaml", "plan")
	step(exitDiffers, "makes 2 VFs", "apply", "--dry-run")
	step(exitDone, `"state": "ok"`, "apply", "--json")
	step(exitDone, "", "apply", "--dry-run")
	step(exitDone, "already as declared", "apply")
	step(exitDone, `"state": "ok"`, "apply", "--json")
	mustOnKernel(t, k, "unbind", sweptNIC)
	step(exitDone, sweptNIC, "apply")
	step(exitDone, sweptNIC+": as before", "undo")
	step(exitDone, "there is nothing to undo", "undo")

	// One that is missing may be, where that is said.
	put(t, k, hostfile.File, sweptFile+"  - {select: \"0000:77:00.0\", optional: true}\n")
	step(exitDone, "0000:77:00.0 is missing and optional", "apply")
	put(t, k, hostfile.File, sweptFile+"  - {select: \"0000:77:00.0\"}\n")
	step(exitFailed, "0000:77:00.0", "apply")
	mustOnKernel(t, k, "unbind", sweptNIC)
	k.Net.Routes = []hosttest.Route{{To: "default", Over: []string{"ens1"}}}
	put(t, k, hostfile.File, sweptFile)
	step(exitRefused, `"state": "refused"`, "apply", "--json")
	step(exitDiffers, `"state": "refused"`, "apply", "--dry-run", "--json")
	put(t, k, hostfile.File, "pfs: [")
	step(exitUsage, "host.yaml", "apply")
	step(exitUsage, "host.yaml", "plan")
	step(exitUsage, "host.yaml", "pool")
}

// A boot with a file that cannot be read fails after it has used what was in force, and takes nothing where nothing ever
// was.
func TestBootWithBrokenFile(t *testing.T) {
	k := hosttest.NewSmallLab(t, "0000:00:05.0", sweptPF, "0000:00:08.0", sweptNIC, sweptEDU)
	put(t, k, "proc/sys/kernel/random/boot_id", "this\n")
	put(t, k, hostfile.File, "pfs: [")
	k.Log = nil
	if a := onKernel(k, "apply", "--boot", "--wait", "0s"); a.status == exitDone ||
		!strings.Contains(a.stderr, "host.yaml") || len(k.Log) > 0 {
		t.Errorf("where nothing was: %+v, written %q", a, k.Log)
	}

	k = booted(t)
	want := sweptState(t, sweptHost(t))
	put(t, k, hostfile.File, "pfs: [")
	if a := onKernel(k, "apply", "--boot", "--wait", "0s"); a.status == exitDone ||
		!strings.Contains(a.stderr, "host.yaml") || sweptState(t, k) != want {
		t.Errorf("%+v\nis %s\nto be %s", a, sweptState(t, k), want)
	}
}

// An apply that nobody confirms is undone by the guard, and what was in force before is in force again.
func TestGuardUndoes(t *testing.T) {
	k := hosttest.NewSmallLab(t, "0000:00:05.0", sweptPF, "0000:00:08.0", sweptNIC, sweptEDU)
	put(t, k, "proc/sys/kernel/random/boot_id", "this\n")
	m := declared.Of(&iommu.Host{Host: k.Host()})
	put(t, k, hostfile.File, "pfs: []\n")
	mustOnKernel(t, k, "apply")
	before := sweptState(t, k)
	put(t, k, hostfile.File, sweptFile)
	mustOnKernel(t, k, "apply")
	after := sweptState(t, k)
	s, err := hostfile.Load(m.Host())
	if err != nil {
		t.Fatal(err)
	}

	if _, _, err := m.Tries(s, time.Hour, false); err != nil {
		t.Fatal(err)
	}
	mustOnKernel(t, k, "apply", "--confirmed")
	if a := onKernel(k, "undo", "--unless-confirmed"); a.status != exitDone || sweptState(t, k) != after {
		t.Errorf("confirmed: %+v", a)
	}
	_, _, err = m.Tries(s, time.Nanosecond, false)
	if err != nil {
		t.Fatal(err)
	}
	if a := onKernel(k, "undo", "--unless-confirmed"); a.status != exitDone ||
		!strings.HasPrefix(a.stdout, guardReady) || sweptState(t, k) != before {
		t.Errorf("it is undone: %+v, %s", a, sweptState(t, k))
	}
	if due, err := m.Due(""); due || err != nil {
		t.Errorf("it waits still: %v, %v", due, err)
	}
}

// What a release comes to is told of each device, also in JSON, and the hooks of libvirt give, take and scrub.
func TestReleaseSays(t *testing.T) {
	k := hosttest.NewSmallLab(t, "0000:00:05.0", sweptPF)
	put(t, k, hostfile.File,
		"pfs:\n  - select: "+sweptPF+"\n    count: 2\n    vfs: [{range: 0-1, driver: vfio, pool: net}]\n")
	mustOnKernel(t, k, "apply")
	for _, vf := range []string{sweptVF, "0000:01:10.2"} {
		put(t, k, "sys/bus/pci/devices/"+vf+"/reset", "")
	}
	mustOnKernel(t, k, "assign", "web", "--from", sweptVF, "--vlan", "7", "--persist")
	if a := onKernel(k, "leases"); !strings.Contains(a.stdout, "reserved") || !strings.Contains(a.stdout, sweptVF) {
		t.Errorf("%+v", a)
	}
	nodes, err := k.Host().Names("sys/bus/pci/devices/" + sweptVF + "/vfio-dev")
	if err != nil || len(nodes) != 1 {
		t.Fatal(nodes, err)
	}
	k.Process(4711, "qemu", "/dev/vfio/devices/"+nodes[0])
	if a := onKernel(k, "release", "web"); a.status != exitRefused || a.stdout != "" ||
		!strings.Contains(a.stderr, "process 4711") {
		t.Errorf("while it runs: %+v", a)
	}
	if a := onKernel(k, "release", "web", "--json"); a.status != exitRefused ||
		!strings.Contains(a.stdout, `"pid": 4711`) {
		t.Errorf("while it runs: %+v", a)
	}
	k.End(4711)
	a := mustOnKernel(t, k, "release", "web", "--json")
	for _, part := range []string{`"guest": "web"`, `"result": "clean"`, `"vendor": "8086"`, `"device": "10ca"`,
		`"class": "020000"`, `"vlan": "7"`, `"why": null`} {
		if !strings.Contains(a.stdout, part) {
			t.Errorf("%s is missing: %s", part, a.stdout)
		}
	}
	if a := onKernel(k, "release", "web", "--json"); a.status != exitFailed {
		t.Errorf("again: %+v", a)
	}

	// What is in quarantine is in no network that is printed, and that says so.
	mustOnKernel(t, k, "assign", "web", "--from", sweptVF, "--persist")
	network := func() string {
		return mustOnKernel(t, k, "pool", "net", "--format", "libvirt-network").stdout
	}
	if text := network(); strings.Count(text, "<address ") != 2 || !strings.Contains(text, "function='0x0'") {
		t.Errorf("the network is %s", text)
	}
	k.Fail["sys/bus/pci/devices/"+sweptVF+"/reset"] = unix.EIO
	if a := onKernel(k, "release", "web", "--json"); a.status != exitFailed ||
		!strings.Contains(a.stdout, "must be made again without it") {
		t.Errorf("into quarantine: %+v", a)
	}
	if text := network(); strings.Count(text, "<address ") != 1 || strings.Contains(text, "function='0x0'") {
		t.Errorf("the network is %s", text)
	}
	delete(k.Fail, "sys/bus/pci/devices/"+sweptVF+"/reset")
	mustOnKernel(t, k, "release", "--quarantined", sweptVF)

	port := func(slot string) string {
		return fmt.Sprintf("<hookData><network><name>net</name></network><networkport><owner><name>db</name></owner>"+
			"<plug type='hostdev-pci' managed='no'><driver name='vfio'/><address domain='0x0000' bus='0x01' slot='0x%s' function='0x2'/></plug>"+
			"</networkport></hookData>", slot)
	}
	domain := "<domain type='kvm'><name>db</name><devices><interface type='hostdev'><source>" +
		"<address type='pci' domain='0x0000' bus='0x01' slot='0x10' function='0x2'/></source></interface></devices></domain>"
	for _, c := range []struct {
		text   string
		args   []string
		status int
		lease  bool
	}{
		{port("zz"), []string{"--network", "--", "net", "port-created", "begin", "-"}, exitFailed, false},
		{port("10"), []string{"--network", "--", "net", "updated", "begin", "-"}, exitDone, false},
		{domain, []string{"--", "db", "start", "begin", "-"}, exitDone, true},
		{port("10"), []string{"--network", "--", "net", "port-deleted", "begin", "-"}, exitDone, false},
		{domain, []string{"--", "db", "release", "end", "-"}, exitDone, false},
	} {
		status, said := hookWith(t, k, c.text, c.args...)
		has := strings.Contains(onKernel(k, "leases", "--json").stdout, `"guest": "db"`)
		if status != c.status || has != c.lease {
			t.Errorf("%q: status %d, %s; it has a lease: %v", c.args, status, said, has)
		}
	}
}
