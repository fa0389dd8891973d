package main

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"viaduct/internal/host/hosttest"
)

// onCaptured runs a command line on a captured host.
func onCaptured(host string, line ...string) answer {
	var stdout, stderr bytes.Buffer
	status := run(append([]string{"viaduct", "--host", host}, line...), &stdout, &stderr)
	return answer{status, stdout.String(), strings.ReplaceAll(stderr.String(), host, "/")}
}

// in writes a file of a kernel's host.
func in(t *testing.T, k *hosttest.Kernel, name, text string) {
	t.Helper()
	file := filepath.Join(k.Dir(), name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(text), 0o600)); err != nil {
		t.Fatal(err)
	}
}

// capturedPF has three VFs in these tests.
const capturedPF = "0000:01:00.0"

// busy is a host with VFs that have settings, a guest that runs, a VF in quarantine, and a route.
func busy(t *testing.T) *hosttest.Kernel {
	t.Helper()
	k := hosttest.NewLab(t, nil)
	k.Net.Eswitch = map[string][3]int{capturedPF: {0, 0, 0}}
	k.Net.Routes = []hosttest.Route{{To: "default", Over: []string{"ens1"}}}
	k.Net.Addresses = []hosttest.Address{{Interface: "ens1", CIDR: "192.0.2.1/24"}}
	in(t, k, "proc/sys/kernel/random/boot_id", "boot\n")
	for _, d := range []string{capturedPF, "0000:07:01.0"} {
		in(t, k, "sys/bus/pci/devices/"+d+"/reset", "")
	}
	mustOnKernel(t, k, "vf", "create", capturedPF, "3")
	mustOnKernel(t, k, "assign", "old", "--from", capturedPF+"/vf1")
	if a := onKernel(k, "release", "old"); a.status != exitFailed || !strings.Contains(a.stderr, "quarantine") {
		t.Fatalf("what nothing resets is given back: %+v", a)
	}
	mustOnKernel(t, k, "assign", "web", "--from", capturedPF+"/vf0", "--vlan", "7", "--persist")
	mustOnKernel(t, k, "assign", "idle", "--from", capturedPF+"/vf2", "--mac", "52:54:00:00:00:0a", "--ttl", "1h")
	k.Process(4711, "qemu-system-x86_64", "/dev/vfio/devices/vfio2")
	in(t, k, "etc/viaduct/host.yaml", "pfs:\n  - select: "+capturedPF+
		"\n    count: 3\n    eswitch: legacy\n    vfs:\n      - {range: 0-2, driver: vfio, pool: net, vlan: 9}\n")
	return k
}

// What a running host says, its snapshot says on any machine, and a snapshot of that snapshot.
func TestSnapshotSays(t *testing.T) {
	k := busy(t)
	lines := []string{
		"list", "list --json", "list --holders", "list --tree", "show --json " + capturedPF + "/vf0", "plan --steps",
		"status -v", "vf list --json", "vf list", "leases --json", "pool", "pool --json", "show " + capturedPF,
		"show --json ens1", "status", "status --json", "plan", "plan --json", "vf get " + capturedPF + "/vf0",
		"bind --dry-run ens1", "bind --dry-run --json " + capturedPF, "unbind --dry-run " + capturedPF + "/vf0",
		"vf destroy --dry-run " + capturedPF, "vf set --dry-run " + capturedPF + "/vf1 vlan=0 mac=52:54:00:00:00:0b",
		"vf create --dry-run --json " + capturedPF + " 2", "adopt", "pool net --format libvirt-network",
		"assign --dry-run new --from " + capturedPF, "assign --dry-run new --from net",
	}
	says := map[string]answer{}
	// A look writes down whom it saw.
	onKernel(k, "leases")
	for _, line := range lines {
		says[line] = onKernel(k, strings.Fields(line)...)
	}
	for line, want := range map[string]string{
		"leases --json": `"state": "active"`, "vf list": "vlan=7", "status": "differs",
		"bind --dry-run ens1": "default route",
		"pool":                "net   3    0     2       1", "vf destroy --dry-run " + capturedPF: `guest "web"`,
		"vf get " + capturedPF + "/vf0": "vlan=7", "vf list --json": "4711", "adopt": "vlan: 7",
	} {
		if a := says[line]; !strings.Contains(a.stdout+a.stderr, want) {
			t.Errorf("%s: without %q: %+v", line, want, a)
		}
	}

	before := files(t, k.Dir())
	file := filepath.Join(t.TempDir(), "host.vsnap")
	if a := mustOnKernel(t, k, "snapshot", file); strings.Contains(a.stderr, "does not have") {
		t.Errorf("%+v", a)
	}
	if now := files(t, k.Dir()); !maps.Equal(now, before) {
		t.Errorf("a snapshot has changed the host: %v, was %v", now, before)
	}
	again := filepath.Join(t.TempDir(), "again.vsnap")
	if a := onCaptured(file, "snapshot", again); a.status != exitDone {
		t.Fatalf("%+v", a)
	}
	for _, snapshot := range []string{file, again} {
		for _, line := range lines {
			if got, want := onCaptured(snapshot, strings.Fields(line)...), says[line]; got != want {
				t.Errorf("%s: %+v\nand the host itself\n%+v", line, got, want)
			}
		}
	}
}

// files are the contents of viaduct's own files of a host.
func files(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, below := range []string{"run/viaduct", "var/lib/viaduct"} {
		names, err := os.ReadDir(filepath.Join(dir, below))
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range names {
			text, err := os.ReadFile(filepath.Join(dir, below, n.Name()))
			if err != nil {
				t.Fatal(err)
			}
			out[below+"/"+n.Name()] = string(text)
		}
	}
	return out
}

// without is a snapshot's tree without what these begin.
func without(tree hosttest.Tree, prefixes ...string) hosttest.Tree {
	out := maps.Clone(tree)
	maps.DeleteFunc(out, func(name, _ string) bool {
		return slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(name, p) })
	})
	return out
}

// What a captured host does not tell is unknown: neither as declared, nor free, nor unused.
func TestNotCaptured(t *testing.T) {
	k := busy(t)
	file := filepath.Join(t.TempDir(), "host.vsnap")
	mustOnKernel(t, k, "snapshot", file)
	whole := hosttest.FromSnapshot(t, file)
	in := func(tree hosttest.Tree, yaml string) string {
		return tree.With(hosttest.Tree{"etc/viaduct/host.yaml": yaml}).Snapshot(t)
	}
	const head = "pfs:\n  - select: " + capturedPF + "\n    count: 3\n"
	settings := head + "    vfs: [{driver: vfio, vlan: 7, pool: net}]\n"
	// As an older viaduct made it.
	old := without(whole, "viaduct/sriov", "viaduct/holders", "viaduct/leases.json", "viaduct/moment.json",
		"run/viaduct/lease-",
		"run/viaduct/asked-", "var/lib/viaduct/")

	for name, c := range map[string]struct {
		host, line string
		status     int
		says       []string
	}{
		"settings": {in(old, settings), "status", exitDiffers,
			[]string{"unknown", "what its VFs are set to was not captured"}},
		"settings, in JSON": {in(old, settings), "status --json", exitDiffers,
			[]string{`"state": "unknown"`, `"steps": []`}},
		"settings, planned": {in(old, settings), "plan", exitDiffers,
			[]string{"1 unknown", "unknown " + capturedPF + ": what its VFs are set to"}},
		"nothing to compare": {in(old, head+"    vfs: [{driver: vfio}]\n"), "status", 0, []string{"ok "}},
		"an e-switch": {in(old, head+"    eswitch: switchdev\n    vfs: [{driver: vfio}]\n"), "status",
			exitDiffers, []string{"unknown", "its e-switch was not captured"}},
		"offload": {in(old, head+"    hw_tc_offload: on\n    vfs: [{driver: vfio}]\n"), "status",
			exitDiffers, []string{"unknown", "hw-tc-offload was not captured"}},
		"more than unknown": {in(old, settings+"devices:\n  - select: 0000:07:01.0\n"), "status", exitDiffers,
			[]string{"unknown", "differs"}},
		"in force": {in(old, head), "status", 0, []string{"which declaration is in force was not captured"}},
		"a VF": {in(old, head), "vf get " + capturedPF + "/vf0", exitFailed,
			[]string{"what its VFs are set to was not captured"}},
		"VFs": {in(old, head), "vf list --json", 0,
			[]string{`"settings": null`, `"holders": null`, `"unknown": [`}},
		"leases": {in(old, head), "leases --json", 0,
			[]string{`"leases": null`, `"quarantine": null`, "are not known"}},
		"pools": {in(old, settings), "pool --json", 0,
			[]string{`"free": null`, `"leased": null`, `"quarantine": null`}},
		"a network of a pool": {in(old, settings), "pool net --format libvirt-network", exitFailed,
			[]string{"in quarantine"}},
		"users": {in(old, head), "bind --dry-run ens1", 0,
			[]string{"e1000 -> vfio-pci", "does not show who uses the devices"}},
		"states of leases": {
			in(without(whole, "viaduct/"), head), "leases --json", 0,
			[]string{`"state": "unknown"`, `"guest": "web"`, `"guest": "old"`},
		},
		"ages of leases": {in(without(whole, "viaduct/"), head), "leases", 0, []string{"0000:01:00.0/vf0  -  "}},
		"whose port": {in(whole.With(hosttest.Tree{"viaduct/sriov/" + capturedPF +
			".json": `{"port":{"name":"ens1"}}`}), head), "vf list", exitFailed, []string{"not its own"}},
		"no JSON": {in(whole.With(hosttest.Tree{"viaduct/holders.json": "{"}), head), "vf list", exitFailed,
			[]string{"holders.json"}},
	} {
		a := onCaptured(c.host, strings.Fields(c.line)...)
		if a.status != c.status {
			t.Errorf("%s: exit status %d: %+v", name, a.status, a)
		}
		for _, want := range c.says {
			if !strings.Contains(a.stdout+a.stderr, want) {
				t.Errorf("%s: without %q: %+v", name, want, a)
			}
		}
	}
}

// How old something is counts, on a captured host, to when that was captured.
func TestCapturedAges(t *testing.T) {
	k := busy(t)
	file := filepath.Join(t.TempDir(), "host.vsnap")
	mustOnKernel(t, k, "snapshot", file)
	tree := hosttest.FromSnapshot(t, file)
	for name := range tree {
		if strings.HasPrefix(name, "run/viaduct/lease-") {
			before, after, _ := strings.Cut(tree[name], `"made":"`)
			_, after, _ = strings.Cut(after, `"`)
			tree[name] = before + `"made":"2020-01-01T00:00:00Z"` + after
		}
	}
	tree["viaduct/moment.json"] = `{"time":"2020-01-01T02:30:00Z","boot":"boot","since_boot":1}`
	if a := onCaptured(tree.Snapshot(t), "leases"); strings.Count(a.stdout, "2h30m0s") != 2 {
		t.Errorf("%+v", a)
	}
}

// A snapshot that fails leaves nothing behind; one that lacks what drivers, users or leases tell says so.
func TestSnapshotThatFails(t *testing.T) {
	k := busy(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "host.vsnap")
	facts := func() (names []string) {
		for name := range hosttest.FromSnapshot(t, file) {
			for _, of := range []string{"viaduct/sriov/", "viaduct/holders", "viaduct/leases"} {
				if strings.HasPrefix(name, of) {
					names = append(names, name)
				}
			}
		}
		slices.Sort(names)
		return names
	}
	var usual answer
	all := k.Operations(func() { usual = onKernel(k, "snapshot", file) })
	if usual.status != exitDone {
		t.Fatalf("%+v", usual)
	}
	want := facts()
	for _, n := range hosttest.SampleOf("viaduct/cmd/viaduct", all) {
		if err := os.RemoveAll(file); err != nil {
			t.Fatal(err)
		}
		failed := k.FailNth(n, unix.EIO)
		a := onKernel(k, "snapshot", file)
		k.Revive()
		left, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		if a.status != exitDone && (len(left) > 0 || a.stderr == "") ||
			a.status == exitDone && (len(left) != 1 || a.stderr == usual.stderr && !slices.Equal(facts(), want)) {
			t.Errorf("%s fails: %+v, and there is %v, not with %q", failed(), a, left, want)
		}
	}
}

// What is written to once it is over is not written to.
func TestUntilDone(t *testing.T) {
	ctx, end := context.WithCancelCause(context.Background())
	var out bytes.Buffer
	u := untilDone{ctx, &out}
	if n, err := u.Write([]byte("before")); n != 6 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	over := errors.New("it is over")
	end(over)
	if n, err := u.Write([]byte("after")); n != 0 || !errors.Is(err, over) || out.String() != "before" {
		t.Errorf("%d, %v, %q", n, err, out.String())
	}
}

// A snapshot whose leases cannot be read is told by each command that goes by them, and not taken for one without any.
func TestSnapshotOfBrokenLeases(t *testing.T) {
	other := pairHost().Dir(t)
	for _, broken := range []string{"{", `{"leases":{"web":{"state":""}}}`} {
		dir := pairHost().With(web("Nehalem", mac, vm)).With(hosttest.Tree{"viaduct/leases.json": broken}).Dir(t)
		for _, line := range []string{
			"leases", "leases --json", "why guest=web", "pool", "assign --dry-run db --from net",
			"migrate web --check --to " + other,
		} {
			if a := onCaptured(dir, strings.Fields(line)...); a.status != exitFailed ||
				!strings.Contains(a.text(), "leases of a snapshot") {
				t.Errorf("%s: %+v", line, a)
			}
		}
		if a := onCaptured(other, "migrate", "web", "--check", "--to", dir); a.status != exitFailed {
			t.Errorf("a move to it: %+v", a)
		}
	}
}
