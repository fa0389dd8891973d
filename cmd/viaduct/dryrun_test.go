package main

import (
	"cmp"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"viaduct/cmd/internal/hostfile"
	"viaduct/internal/host/hosttest"
)

// allOf are all files and links of a host but its processes', with what is in them.
func allOf(t *testing.T, k *hosttest.Kernel) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(k.Dir(), func(file string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(file, k.Dir()+"/")
		switch {
		case name == "proc":
			return filepath.SkipDir
		case e.IsDir():
			out[name] = "folder"
		case e.Type() == fs.ModeSymlink:
			out[name], err = os.Readlink(file)
		default:
			var text []byte
			text, err = os.ReadFile(file)
			out[name] = string(text)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// littered is a host on which all lies that commands leave for later ones: leases, one of which is dead and one of the
// boot before, quarantines that a boot has ended and of what is back, a change and an apply that were interrupted, a trial
// whose time is over, and the records of viaduct before this one.
func littered(t *testing.T) *hosttest.Kernel {
	t.Helper()
	const place = "0000:00:0a.0/00.0"
	k := hosttest.NewLab(t, hosttest.Tree{
		"proc/sys/kernel/random/boot_id": "this\n", "proc/sys/kernel/bootloader_type": "114\n",
	})
	put(t, k, hostfile.File,
		"pfs:\n  - select: 0000:01:00.0\n    count: 3\n    vfs:\n      - {range: 0-2, driver: vfio, pool: net}\n")
	k.Process(4711, "keeper")
	mustOnKernel(t, k, "apply")
	mustOnKernel(t, k, "assign", "dead", "--from", "net", "--owner-pid", "4711")
	k.End(4711)
	mustOnKernel(t, k, "assign", "web", "--from", "net", "--persist", "--vlan", "7")
	mustOnKernel(t, k, "apply")

	web, err := os.ReadFile(filepath.Join(k.Dir(), "var/lib/viaduct/lease-web.json"))
	if err != nil {
		t.Fatal(err)
	}
	put(t, k, "var/lib/viaduct/lease-db.json", strings.ReplaceAll(string(web), `"web"`, `"db"`))
	quarantine := func(name, more string) {
		put(t, k, "var/lib/viaduct/quarantine-"+name+".json", fmt.Sprintf(
			`{"address":"0000:09:00.0","place":%q,"guest":"old","why":"x","device":{"address":"0000:09:00.0"}%s}`,
			place, more))
	}
	quarantine("boot", `,"boot":"that"`)
	quarantine("back", `,"boot":"this","lost":true`)

	k.KillAt(2, func(op, _ string) bool { return op == "write" })
	onKernel(k, "bind", "0000:07:01.0")
	if !k.Revive() {
		t.Fatal("it was not killed")
	}
	put(t, k, "run/viaduct/apply-0000:07:02.0.json", `{"device":"0000:07:02.0","release":["0000:07:02.0"]}`)
	put(t, k, "var/lib/viaduct/confirmed.yaml", "pfs: []\n")
	put(t, k, "var/lib/viaduct/unconfirmed.json", `{"spec":"pfs: []","until":1,"boot":"this"}`)
	put(t, k, "run/viaduct/hold.json", "true")
	if err := os.Remove(filepath.Join(k.Dir(), "var/lib/viaduct/in-force.json")); err != nil {
		t.Fatal(err)
	}
	return k
}

// A dry run writes nothing, whatever lies there; nor does what only looks, but who has a guest's devices open.
func TestDryRunWritesNothing(t *testing.T) {
	k := littered(t)
	before, owners := allOf(t, k), maps.Clone(k.Owners)
	k.Log = nil
	for _, line := range []string{
		"bind --dry-run 0000:07:01.0", "bind --dry-run 0000:07:02.0 --json", "bind --dry-run --save 0000:00:1f.2",
		"bind --dry-run --keep-going 0000:07:01.0 0000:01:00.0", "unbind --dry-run 0000:01:10.4",
		"unbind --dry-run --save 0000:01:10.4",
		"unbind --dry-run --force=lease 0000:01:10.0", "vf create --dry-run 0000:01:00.0 5",
		"vf create --dry-run 0000:02:00.0 2",
		"vf destroy --dry-run 0000:01:00.0", "vf set --dry-run 0000:01:00.0/vf0 vlan=9",
		"vf sync --dry-run 0000:01:00.0",
		"apply --dry-run", "apply --dry-run --json", "plan", "status", "assign --dry-run new --from 0000:01:00.0",
		"assign --dry-run web --from net --vlan 7", "assign --dry-run new --from 0000:02:00.0 --json",
		"install --dry-run",
		"list", "show 0000:01:10.0", "leases", "pool", "vf list", "vf get 0000:01:00.0/vf0", "why 0000:01:10.0",
		"doctor",
	} {
		a := onKernel(k, strings.Fields(line)...)
		if a.status == exitUsage {
			t.Errorf("%s: exit status %d: %s", line, a.status, a.stderr)
		}

		after := allOf(t, k)
		for name := range before {
			if after[name] != before[name] {
				t.Errorf("%s: /%s was %q, is %q", line, name, before[name], after[name])
			}
		}

		for name := range after {
			if _, was := before[name]; !was {
				t.Errorf("%s: /%s was made", line, name)
			}
		}

		if len(k.Log) > 0 || !maps.Equal(k.Owners, owners) {
			t.Errorf("%s: written %q, owners %v", line, k.Log, k.Owners)
		}

		before, k.Log = after, nil
	}
}

// dryRuns are lines of each command that has a dry run, on the host that busy is, with the first line of what they say.
var dryRuns = map[string]struct{ line, says string }{
	"bind":       {"bind 0000:07:02.0 --force=address --force=route", "0000:07:02.0: no driver -> vfio-pci"},
	"unbind":     {"unbind 0000:02:00.0/vf1", "vf1 of 0000:02:00.0: vfio-pci -> no driver"},
	"vf create":  {"vf create 0000:02:00.0 7 mac=stable vlan=100+index", "0000:02:00.0: 3 -> 7 of 7 VFs"},
	"vf destroy": {"vf destroy 0000:02:00.0", "0000:02:00.0: 3 -> 0 of 7 VFs"},
	"vf set":     {"vf set 0000:01:00.0/vf1 vlan=7 trust=on", "0000:01:00.0"},
	"vf sync":    {"vf sync", "0000:01:00.0"},
	"apply":      {"apply", "/etc/viaduct/host.yaml: 1 to change"},
	"assign":     {"assign new --from 0000:02:00.0,count=2,vlan=7", "new gets vf0-1 of 0000:02:00.0"},
	"install":    {"install --watch", "writes 9 files"},
}

// A dry run begins in words, and says how many writes --steps prints. These are a shell's, and none of them is made.
func TestDryRunsAreInWords(t *testing.T) {
	k := busy(t)
	app := newApp(&env{})
	for _, c := range append(app.Commands, app.Command("vf").Subcommands...) {
		name := strings.TrimPrefix(c.HelpName, "viaduct ")
		if slices.Contains(app.Command("vf").Subcommands, c) {
			name = "vf " + c.Name
		}
		dry, ofSteps := flagNamed(c.Flags, "--dry-run") != nil, flagNamed(c.Flags, "--steps") != nil
		of, known := dryRuns[cmp.Or(name, c.Name)]
		switch {
		case c.Name == "migrate":
			// It needs a QEMU that runs: migrate.Words has a test of its own.
			continue
		case dry != known || dry && !ofSteps:
			t.Errorf("%s: --dry-run %v, --steps %v, and a line here %v", c.Name, dry, ofSteps, known)
		case !dry:
			continue
		}

		k.Log = nil
		words := onKernel(k, append(strings.Fields(of.line), "--dry-run")...)
		steps := onKernel(k, append(strings.Fields(of.line), "--steps")...)
		if len(k.Log) > 0 || words.status != steps.status {
			t.Errorf("%s: %q written; status %d, and %d with --steps: %s", of.line, k.Log, words.status, steps.status,
				words.stderr)
		}
		first, _, _ := strings.Cut(words.stdout, "\n")
		if first != of.says || strings.Contains(words.stdout, "echo ") || strings.Contains(words.stdout, "ip link") {
			t.Errorf("%s: says\n%s", of.line, words.stdout)
		}
		writes := 0
		for line := range strings.Lines(steps.stdout) {
			if strings.HasPrefix(line, "echo ") || strings.HasPrefix(line, "ip link ") ||
				strings.HasPrefix(line, "cat > ") || strings.HasPrefix(line, "ln -s ") {
				writes++
			} else if c.Name != "install" && !strings.HasPrefix(line, "# ") {
				t.Errorf("%s: --steps prints %q", of.line, line)
			}
		}
		if want := fmt.Sprintf("--steps prints the %s", count1(writes,
			map[bool]string{true: "file", false: "write"}[c.Name == "install"])); !strings.Contains(words.stdout,
			want) {
			t.Errorf("%s: %d writes, and it says\n%s", of.line, writes, words.stdout)
		}
	}
}

// What the command refuses, or cannot do, its dry run says in the same words and with the same status, and writes nothing.
func TestDryRunRefuses(t *testing.T) {
	with := func(name, text string) func(*testing.T) *hosttest.Kernel {
		return func(t *testing.T) *hosttest.Kernel {
			k := sweptHost(t)
			put(t, k, name, text)
			return k
		}
	}
	returned := func(more string) func(*testing.T) *hosttest.Kernel {
		return func(t *testing.T) *hosttest.Kernel {
			k := sweptHost(t)
			mustOnKernel(t, k, "unbind", sweptNIC)
			put(t, k, hostfile.File, sweptFile+more)
			return k
		}
	}
	routed := func(t *testing.T) *hosttest.Kernel {
		k := sweptHost(t)
		k.Net.Routes = []hosttest.Route{{To: "default", Over: []string{"enp1s0"}}}
		return k
	}
	quarantined := func(t *testing.T) *hosttest.Kernel {
		k := sweptHost(t)
		k.Fail["sys/bus/pci/devices/"+sweptVF+"/reset"] = unix.EIO
		onKernel(k, "release", "web")
		return k
	}
	moving := func(t *testing.T) *hosttest.Kernel {
		k := sweptHost(t)
		file := "run/viaduct/lease-web.json"
		put(t, k, file, strings.Replace(allOf(t, k)[file], "{", `{"moving":"leaving",`, 1))
		return k
	}
	root := t.TempDir()
	inTheWay := filepath.Join(root, "usr/lib/udev/rules.d/72-viaduct.rules")
	if err := os.MkdirAll(inTheWay, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		host func(*testing.T) *hosttest.Kernel
		line string
		says string
	}{
		{with("etc/systemd/system/viaduct.service/x", ""), "install", "viaduct install did not write it"},
		{with("etc/systemd/system/viaduct.service", "[Service]\n"), "install", "viaduct install did not write it"},
		{with(installedWatch, "[Service]\n"), "install --watch", "viaduct install did not write it"},
		{with("etc/udev/rules.d", ""), "install", "not a directory"},
		{with("var/lib/viaduct/protected.json", "{"), "install", "protected.json"},
		{with(hostfile.File, "pfs: [ {"), "install", "host.yaml"},
		{sweptHost, "install --initramfs", "initramfs"},
		{
			with(hostfile.File, "devices: [{select: "+sweptEDU+", initramfs: true}]\nprotect: [\""+sweptEDU+"\"]\n"),
			"install --initramfs", "in protect",
		},
		{sweptHost, "install --root " + root, inTheWay},
		{sweptHost, "install --root " + root + " --unit-dir x", "absolute path"},
		{returned("protect: [\"" + sweptNIC + "\"]\n"), "assign db --from " + sweptNIC, "in protect"},
		{quarantined, "assign db --from " + sweptVF, "in quarantine"},
		{moving, "assign web --from " + sweptVF + " --vlan 7", "on its way to another host"},
		{sweptHost, "assign web --from " + sweptVF + " --vlan 8", "web"},
		{sweptHost, "assign db --from " + sweptVF, "exhausted"},
		{sweptHost, "assign db --from " + sweptNIC + " --vlan 7", "not a VF"},
		{sweptHost, "assign db --from " + sweptNIC + " --owner-pid 99999", "no such process"},
		{routed, "bind " + sweptPF, "route"},
		{routed, "bind --save " + sweptPF, "route"},
		{sweptHost, "unbind " + sweptVF, "web"},
		{sweptHost, "vf create " + sweptPF + " 9", "7"},
		{sweptHost, "vf create " + sweptPF + " 0", "web"},
		{sweptHost, "vf destroy " + sweptPF, "web"},
		{sweptHost, "vf set " + sweptPF + "/vf9 vlan=5", "vf9"},
		{sweptHost, "vf sync " + sweptVF, sweptVF},
	} {
		k := c.host(t)
		before := allOf(t, k)
		k.Log = nil
		dry := onKernel(k, append(strings.Fields(c.line), "--dry-run")...)
		after := allOf(t, k)
		for name := range after {
			if after[name] != before[name] {
				t.Errorf("%s --dry-run: /%s was %q, is %q", c.line, name, before[name], after[name])
			}
		}
		a := onKernel(k, strings.Fields(c.line)...)
		if a.status == exitDone || a.status != dry.status || !strings.Contains(a.text(), c.says) ||
			a.stderr != dry.stderr {
			t.Errorf("%s: exit status %d: %s\nand its dry run %d: %s", c.line, a.status, a.text(), dry.status,
				dry.text())
		}
	}
}
