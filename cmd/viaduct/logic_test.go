package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/cmd/internal/declared"
	"viaduct/cmd/internal/hostfile"
	"viaduct/cmd/internal/lease"
	"viaduct/internal/host"
	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
	"viaduct/sriov"
)

// What cannot be meant is told before anything is looked at or touched, and is wrong usage.
func TestWrongUsage(t *testing.T) {
	k := hosttest.NewSmallLab(t, "0000:00:05.0", sweptPF)
	for line, says := range map[string]string{
		"bind": "", "bind --driver nonsense " + sweptPF: "a vfio driver", "bind --force=nonsense " + sweptPF: "--force",
		"bind --timeout 0s " + sweptPF: "--timeout", "bind --node-owner nobody@nowhere " + sweptPF: "--node-owner",
		"unbind": "", "unbind --timeout -1s " + sweptPF: "--timeout", "recover x": "no arguments",
		"vf create " + sweptPF: "", "vf create " + sweptPF + " many": "invalid number",
		"vf create " + sweptPF + " 65536":            "65535",
		"vf create --driver e1000 " + sweptPF + " 1": "--driver", "vf create " + sweptPF + " 0 vlan=5": "no VFs",
		"vf create --mtu 67 " + sweptPF + " 1": "--mtu", "vf create --mtu 65536 " + sweptPF + " 1": "--mtu",
		"vf set " + sweptPF + "/vf0": "", "vf set " + sweptPF + "/vf0 colour=red": "vf set",
		"vf set " + sweptPF + " vlan=7": "not a VF",
		"plan x":                        "no arguments", "status x": "no arguments", "apply x": "no arguments",
		"undo x":  "no arguments",
		"adopt x": "no arguments", "adopt --import nonsense": "--import", "schema x": "no arguments",
		"watch x":   "no arguments",
		"install x": "no arguments", "uninstall x": "no arguments", "leases x": "no arguments", "pool a b": "one name",
		"pool --format xml net": "--format", "pool --format libvirt-network": "--format",
		"apply --timeout 0s": "--timeout", "apply --confirm 999ms": "--confirm",
		"apply --confirm 60s --boot":    "--confirm",
		"apply --confirm 60s --dry-run": "--confirm", "apply --confirmed --keep-going": "no other option",
		"apply --wait -1s":       "--wait",
		"apply --force=nonsense": "--force", "undo --force=nonsense": "--force", "undo --timeout 0s": "--timeout",
		"assign": "name", "assign web": "--from", "assign we/b --from net": "invalid guest name",
		"assign web --from net --format x":   "unknown format",
		"assign web --from net --memory big": "--memory", "assign web --from net --ttl -1s": "--ttl",
		"assign web --from net,count=x": "invalid count",
		"assign web --from net,count=0": "one or more", "assign web --from net --count 0": "one or more",
		"assign web --from ,vlan=7":          "names nothing",
		"assign web --from net --set msix=4": "msix", "assign web --from net --json --format qemu": "which of the two",
		"assign web --from net,mac=52:54:00:00:00:09,count=2":                  "for 2 VFs",
		"assign web --from net --from " + sweptPF + " --mac 52:54:00:00:00:09": "for 2 VFs",
		"assign web --from net --persist --owner-pid 1":                        "--persist",
		"assign web --from net --failover br0":                                 "--mac",
		"assign web --from net --failover br0 --mac stable --format crosvm":    "--failover",
		"assign web --from net --owner-pid 99999":                              "no such process",
		"assign web --from net --owner-pid -5":                                 "no such process",
		"assign web --from net --unit none":                                    "does not run",
		"assign web --from net --node-owner a@b":                               "--node-owner",
		"release":                                                              "name",
		"release --dead web":                                                   "no arguments",
		"release --dead --wait 5s":                                             "--wait",
		"release web --wait -1s":                                               "--wait",
		"release web --force x":                                                "--force",
		"release web --force quarantine":                                       "--force", "release --quarantined": "",
		"release --dead --quarantined": "no arguments", "release web --timeout 0s": "--timeout",
		"libvirt-hook web prepare": "want a domain", "nonsense": "no command",
		"vf create --force=nonsense " + sweptPF + " 1": "--force", "vf destroy --force=nonsense " + sweptPF: "--force",
		"vf create no/such 1": "no/such", "vf destroy no/such": "no/such", "vf set no/such vlan=7": "no/such",
		"vf create " + sweptPF + " 2 vlan=4094+index": "vf1",
		"iommu x": "no argument", "vf nonsense": "no command", "list no/such": "no/such", "doctor no/such": "no/such",
		"vf sync no/such": "no/such", "vf get": "the VF", "snapshot": "the file", "completion": "the shell",
		"vf list -o x": "invalid output", "verify": "", "show no/such": "no/such",
		"why no/such --memory 1G": "--memory", "man no-such": "no page",
		"why group=x": "group", "help no such": "", "unbind no/such": "no/such", "log --since x": "",
		"bind --timeout soon " + sweptPF: "invalid value", "migrate web --cancel --check": "--check",
		"assign web --from net --timeout 0s": "--timeout", "migrate web --check": "--to",
		"migrate web --to host --timeout 0s":    "--timeout",
		"migrate web --to host --probe nowhere": "--probe", "migrate web --to host --probe ::1": "--probe",
	} {
		a := onKernel(k, strings.Fields(line)...)
		if a.status != exitUsage || !strings.Contains(a.stderr, says) || a.stdout != "" || len(k.Log) > 0 {
			t.Errorf("%s: %+v, written %q", line, a, k.Log)
		}
	}
}

// boundTo is the driver of a device, "" if it has none.
func boundTo(k *hosttest.Kernel, address string) string {
	driver, _ := k.Host().LinkBase("sys/bus/pci/devices/" + address + "/driver")
	return driver
}

// Devices are taken with all that goes along and are given back, and each command says what became of each, as text and
// as JSON.
func TestBindAndBack(t *testing.T) {
	k := hosttest.NewSmallLab(t, "0000:00:05.0", sweptPF, "0000:00:08.0", sweptNIC, sweptEDU)
	var views []changeView
	read := func(a answer) []changeView {
		t.Helper()
		views = nil
		if err := json.Unmarshal([]byte(a.stdout), &views); err != nil {
			t.Fatalf("%v: %+v", err, a)
		}
		return views
	}
	if got := read(mustOnKernel(t, k, "bind", sweptNIC, "--json")); len(got) != 2 ||
		boundTo(k, sweptNIC) != "vfio-pci" ||
		boundTo(k, sweptEDU) != "vfio-pci" {
		t.Errorf("%+v", got)
	}
	k.Log = nil
	if a := mustOnKernel(t, k, "bind", sweptNIC); len(k.Log) > 0 || !strings.Contains(a.stdout, sweptNIC) {
		t.Errorf("again: %+v, written %q", a, k.Log)
	}
	mustOnKernel(t, k, "unbind", sweptNIC)
	if boundTo(k, sweptNIC) != "e1000" {
		t.Errorf("given back, it is on %s", boundTo(k, sweptNIC))
	}

	// One of several is refused: nothing is done; with --keep-going the others are.
	k.Net.Routes = []hosttest.Route{{To: "default", Over: []string{"enp1s0"}}}
	k.Log = nil
	if a := onKernel(k, "bind", sweptNIC, sweptPF); a.status != exitRefused || len(k.Log) > 0 {
		t.Errorf("%+v, written %q", a, k.Log)
	}
	if a := onKernel(k, "bind", "--keep-going", sweptNIC, sweptPF); a.status == exitDone ||
		boundTo(k, sweptNIC) != "vfio-pci" ||
		boundTo(k, sweptPF) != "igb" {
		t.Errorf("%+v, on %s and %s", a, boundTo(k, sweptNIC), boundTo(k, sweptPF))
	}
	if a := onKernel(k, "bind", "--force=route", sweptPF); a.status != exitDone || boundTo(k, sweptPF) != "vfio-pci" {
		t.Errorf("forced: %+v", a)
	}
	if a := onKernel(k, "unbind", "--all", "class=0200"); a.status != exitDone || boundTo(k, sweptPF) != "igb" ||
		boundTo(k, sweptNIC) != "e1000" {
		t.Errorf("all: %+v", a)
	}

	// A take that fails is told, put back, and a failure.
	k.Probe["vfio-pci"] = unix.EIO
	if a := onKernel(k, "bind", sweptNIC); a.status != exitFailed || a.stderr == "" || boundTo(k, sweptNIC) != "e1000" {
		t.Errorf("it fails: %+v, on %s", a, boundTo(k, sweptNIC))
	}
}

// bind --save declares a device for the next boot, and unbind --save ends that.
func TestSave(t *testing.T) {
	k := hosttest.NewSmallLab(t, "0000:00:05.0", sweptPF, "0000:00:08.0", sweptNIC, sweptEDU)
	dropIns := func() []string {
		files, err := filepath.Glob(filepath.Join(k.Dir(), hostfile.Dir, "*.yaml"))
		if err != nil {
			t.Fatal(err)
		}
		return files
	}
	mustOnKernel(t, k, "bind", "--save", sweptNIC)
	if got := dropIns(); len(got) != 1 {
		t.Errorf("saved as %q", got)
	}
	if a := onKernel(k, "plan"); a.status != exitDone {
		t.Errorf("a plan of what was saved: %+v", a)
	}
	mustOnKernel(t, k, "unbind", "--save", sweptNIC)
	if got := dropIns(); len(got) > 0 || boundTo(k, sweptNIC) != "e1000" {
		t.Errorf("left are %q, on %s", got, boundTo(k, sweptNIC))
	}
	if a := onKernel(k, "unbind", "--save", sweptNIC); a.status != exitDone {
		t.Errorf("again: %+v", a)
	}
}

// VFs are made, set, brought back to what was asked for, and removed; what was lost is what sync brings back.
func TestVFCommands(t *testing.T) {
	k := hosttest.NewSmallLab(t, "0000:00:05.0", sweptPF)
	get := func() sriov.Settings {
		t.Helper()
		var got struct{ Settings sriov.Settings }
		a := mustOnKernel(t, k, "vf", "get", sweptPF+"/vf0", "--json")
		if err := json.Unmarshal([]byte(a.stdout), &got); err != nil {
			t.Fatalf("%v: %s", err, a.stdout)
		}
		return got.Settings
	}

	mustOnKernel(t, k, "vf", "create", sweptPF, "2", "--driver", "vfio", "vlan=5")
	if boundTo(k, sweptVF) != "vfio-pci" || get()[sriov.VLAN] != "5" {
		t.Errorf("made: on %s, with %v", boundTo(k, sweptVF), get())
	}
	if a := onKernel(k, "vf", "set", sweptPF+"/vf0", "vlan=7", "trust=on", "--json"); a.status != exitDone ||
		get()[sriov.VLAN] != "7" || get()[sriov.Trust] != "on" {
		t.Errorf("set: %+v, %v", a, get())
	}

	k.Net.Refuse = map[int]unix.Errno{unix.IFLA_VF_VLAN: unix.EPERM}
	if a := onKernel(k, "vf", "set", sweptPF+"/vf0", "vlan=8"); a.status != exitFailed || get()[sriov.VLAN] != "7" {
		t.Errorf("refused: %+v, %v", a, get())
	}

	k.Net.Refuse = nil
	if a := onKernel(k, "vf", "sync", sweptPF); a.status != exitDone {
		t.Errorf("in sync: %+v", a)
	}
	if a := onKernel(k, "vf", "set", sweptPF+"/vf9", "vlan=8"); a.status == exitDone {
		t.Errorf("one that is not there: %+v", a)
	}
	if a := mustOnKernel(t, k, "vf", "create", sweptPF, "2"); !strings.Contains(a.stdout, "has 2 of 7 VFs already") {
		t.Errorf("again: %+v", a)
	}

	mustOnKernel(t, k, "vf", "destroy", sweptPF)
	k.Net.Routes = []hosttest.Route{{To: "default", Over: []string{"enp1s0"}}}
	a := mustOnKernel(t, k, "vf", "create", "--dry-run", sweptPF, "1")
	b := mustOnKernel(t, k, "vf", "create", "--dry-run", "--json", sweptPF, "1")
	if !strings.Contains(a.stdout, "note: the link of enp1s0 may flap") || b.stderr != "" ||
		!strings.Contains(b.stdout, "may flap") {
		t.Errorf("what may flap is told: %+v, %+v", a, b)
	}

	for line, says := range map[string]string{"vf create 0000:01:00.0 8": "7", "vf create 0000:00:05.0 1": "PF",
		"doctor 0000:77:00.0": "0000:77:00.0"} {
		if a := onKernel(k, strings.Fields(line)...); a.status == exitDone || a.stdout != "" ||
			!strings.Contains(a.stderr, says) {
			t.Errorf("%s: %+v", line, a)
		}
	}

	if n, _ := k.Host().Int("sys/bus/pci/devices/" + sweptPF + "/sriov_numvfs"); n != 0 {
		t.Errorf("%d VFs are left", n)
	}
}

// From its lease to its end a guest is told of as it is: reserved, active, dead, and gone; what cannot be scrubbed is in
// quarantine until it can.
func TestLeaseCommands(t *testing.T) {
	k := hosttest.NewSmallLab(t, "0000:00:05.0", sweptPF)
	put(t, k, hostfile.File,
		"pfs:\n  - select: "+sweptPF+"\n    count: 2\n    vfs: [{range: 0-1, driver: none, pool: net}]\n")
	mustOnKernel(t, k, "apply")
	for _, vf := range []string{sweptVF, "0000:01:10.2"} {
		put(t, k, "sys/bus/pci/devices/"+vf+"/reset", "")
	}
	k.Process(4711, "keeper")
	state := func() (state lease.State, quarantined int) {
		t.Helper()
		var view struct {
			Leases     []struct{ State lease.State }
			Quarantine []any
		}
		a := mustOnKernel(t, k, "leases", "--json")
		if err := json.Unmarshal([]byte(a.stdout), &view); err != nil {
			t.Fatalf("%v: %s", err, a.stdout)
		}
		if len(view.Leases) > 0 {
			state = view.Leases[0].State
		}
		return state, len(view.Quarantine)
	}

	a := mustOnKernel(t, k, "assign", "web", "--from", "net", "--owner-pid", "4711", "--mac", "stable", "--vlan", "9")
	if !strings.Contains(a.stdout, "vfio-pci,host=") {
		t.Errorf("%+v", a)
	}
	if again := mustOnKernel(t, k, "assign", "web", "--from", "net", "--owner-pid", "4711", "--mac", "stable", "--vlan",
		"9"); again.stdout != a.stdout {
		t.Errorf("again: %s, not %s", again.stdout, a.stdout)
	}
	if now, _ := state(); now != lease.Reserved {
		t.Errorf("assigned, it is %s", now)
	}
	for _, format := range []string{"json", "env", "libvirt", "cloud-hypervisor", "crosvm"} {
		if a := onKernel(k, "assign", "web", "--from", "net", "--owner-pid", "4711", "--mac", "stable", "--vlan", "9",
			"--format", format); a.status != exitDone || a.stdout == "" {
			t.Errorf("as %s: %+v", format, a)
		}
	}
	if a := mustOnKernel(t, k, "pool", "--json"); !strings.Contains(strings.Join(strings.Fields(a.stdout), ""),
		`"free":1,"leased":1`) {
		t.Errorf("%+v", a)
	}
	if a := onKernel(k, "release", "--dead"); a.status != exitDone || a.stdout != "" {
		t.Errorf("nothing is dead: %+v", a)
	}
	k.End(4711)
	if now, _ := state(); now != lease.Dead {
		t.Errorf("its owner is gone, it is %s", now)
	}
	k.Fail["sys/bus/pci/devices/0000:01:10.2/reset"] = unix.EIO
	if a := onKernel(k, "release", "--dead"); a.status != exitFailed ||
		!strings.Contains(a.stderr, "is in quarantine") {
		t.Errorf("not reset: %+v", a)
	}
	if now, quarantined := state(); now != "" || quarantined != 1 {
		t.Errorf("it is %s, %d in quarantine", now, quarantined)
	}
	if a := onKernel(k, "release", "--quarantined", "0000:01:10.2"); a.status != exitFailed {
		t.Errorf("still not: %+v", a)
	}
	if a := onKernel(k, "release", "--quarantined", "0000:01:10.0"); a.status != exitFailed ||
		!strings.Contains(a.stderr, "is not in quarantine") {
		t.Errorf("another: %+v", a)
	}
	delete(k.Fail, "sys/bus/pci/devices/0000:01:10.2/reset")
	if a := onKernel(k, "release", "--quarantined", "0000:01:10.2"); a.status != exitDone ||
		!strings.Contains(a.stdout, "clean") {
		t.Errorf("reset: %+v", a)
	}
	if _, quarantined := state(); quarantined != 0 {
		t.Error("it is in quarantine")
	}
	if a := onKernel(k, "release", "web"); a.status != exitFailed || !strings.Contains(a.stderr, "web has no lease") {
		t.Errorf("again: %+v", a)
	}
	if a := onKernel(k, "assign", "big", "--from", "net", "--count", "3"); a.status != exitFailed ||
		!strings.Contains(a.stderr, "exhausted") {
		t.Errorf("more than there are: %+v", a)
	}
	if a := onKernel(k, "libvirt-hook", "--network", "--", "net", "started", "begin", "-"); a.status != exitDone {
		t.Errorf("of a network that starts: %+v", a)
	}
}

// The guard stands where it says so, and ends once what it guards is confirmed.
func TestGuard(t *testing.T) {
	k := hosttest.NewSmallLab(t, "0000:00:05.0", sweptPF)
	put(t, k, "proc/sys/kernel/random/boot_id", "this\n")
	open := func(string) (*iommu.Host, error) {
		h, err := host.Fake(k.Dir(), k)
		return &iommu.Host{Host: h}, err
	}
	m := declared.Of(&iommu.Host{Host: k.Host()})
	if _, _, err := m.Tries(&hostfile.Host{}, time.Hour, false); err != nil {
		t.Fatal(err)
	}
	said, says := io.Pipe()
	ended := make(chan int, 1)
	go func() {
		ended <- runOn(open, []string{"viaduct", "undo", "--unless-confirmed"}, says, io.Discard)
		says.Close()
	}()
	lines := bufio.NewReader(said)
	if line, err := lines.ReadString('\n'); err != nil || strings.TrimSpace(line) != guardReady {
		t.Errorf("it said %q, %v", line, err)
	}
	a := onKernel(k, "apply", "--confirmed")
	if a.status != exitDone || !strings.Contains(a.stdout, "boots use it from now on") {
		t.Errorf("confirmed: %+v", a)
	}
	if rest, err := io.ReadAll(lines); err != nil || len(rest) > 0 {
		t.Errorf("it said %q too, %v", rest, err)
	}
	if status := <-ended; status != exitDone {
		t.Errorf("it ended with %d", status)
	}
	if a := onKernel(k, "apply", "--confirmed"); a.status != exitFailed ||
		!strings.Contains(a.stderr, "there is no apply to confirm") {
		t.Errorf("again: %+v", a)
	}

	// What it cannot look at, it does not guard.
	put(t, k, "var/lib/viaduct/in-force.json", "{")
	if a := onKernel(k, "undo", "--unless-confirmed"); a.status != exitFailed ||
		strings.Contains(a.stdout, guardReady) || a.stdout == "" {
		t.Errorf("with a broken record: %+v", a)
	}
	if a := onKernel(k, "apply", "--confirmed"); a.status != exitFailed {
		t.Errorf("with a broken record: %+v", a)
	}
}

// One who waits for the guard is told that it stands, or why not.
func TestAwaitGuard(t *testing.T) {
	for text, says := range map[string]string{guardReady + "\n": "", "no room\n": "no room", "": "EOF"} {
		said, says2, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := says2.WriteString(text); err != nil {
			t.Fatal(err)
		}
		says2.Close()
		if err := awaitGuard(said); (err == nil) != (says == "") || err != nil && !strings.Contains(err.Error(), says) {
			t.Errorf("%q: %v", text, err)
		}
		said.Close()
		if awaitGuard(said) == nil {
			t.Errorf("%q, and what it says cannot be read", text)
		}
	}
}

// The command that run starts is told of its devices, ends as it ends, and is killed where it cannot be written down.
func TestStay(t *testing.T) {
	signals := make(chan os.Signal)
	begun := func(pid int) error { return nil }
	for script, want := range map[string]int{"exit 0": 0, "exit 7": 7, "kill -9 $$": 128 + 9} {
		if status, err := stay(exec.Command("/bin/sh", "-c", script), signals, begun); status != want || err != nil {
			t.Errorf("%s: %d, %v", script, status, err)
		}
	}
	if _, err := stay(exec.Command("/no/such/program"), signals, begun); err == nil {
		t.Error("a program that is not there was started")
	}
	unread := exec.Command("/bin/cat")
	unread.Stdin = iotest.ErrReader(unix.EIO)
	if _, err := stay(unread, signals, begun); !errors.Is(err, unix.EIO) {
		t.Errorf("one whose input cannot be read: %v", err)
	}
	var pid int
	failed := errors.New("no room")
	_, err := stay(exec.Command("/bin/sleep", "1000"), signals, func(p int) error {
		pid = p
		return failed
	})
	if !errors.Is(err, failed) || !errors.Is(unix.Kill(pid, 0), unix.ESRCH) {
		t.Errorf("%v, and process %d is there", err, pid)
	}
	go func() { signals <- unix.SIGTERM }()
	if status, err := stay(exec.Command("/bin/sleep", "1000"), signals, begun); status != 128+15 || err != nil {
		t.Errorf("ended by a signal: %d, %v", status, err)
	}
}

// A command's name says which VMM it is, and where its devices' arguments go.
func TestFormatOf(t *testing.T) {
	for program, want := range map[string]string{
		"/usr/bin/qemu-system-x86_64": "qemu", "kvm": "qemu", "cloud-hypervisor": "cloud-hypervisor",
		"crosvm": "crosvm", "sh": "env",
	} {
		if got := formatOf(program); got != want {
			t.Errorf("%s is %s", program, got)
		}
	}
	for text, want := range map[string]uint64{"": 0, "512": 512 << 20, "512M": 512 << 20, "8G": 8 << 30,
		"8GiB": 8 << 30, "1T": 1 << 40, "100B": 100} {
		if got, err := parseSize(text); got != want || err != nil {
			t.Errorf("%q: %d, %v", text, got, err)
		}
	}
	for _, text := range []string{"0", "G", "8X", "-1", "1.5G", "2000000T"} {
		if got, err := parseSize(text); err == nil {
			t.Errorf("%q: %d", text, got)
		}
	}
}

// Each error has the exit status that scripts go by.
func TestStatusOfErrors(t *testing.T) {
	if got := exitStatus(usagef("x")); got != exitUsage {
		t.Error(got)
	}
	h, err := iommu.Open("")
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	if err := tool(t.Context(), h, "no-such-tool-at-all"); err == nil || exitStatus(err) != exitFailed {
		t.Error(err)
	}
	if err := tool(t.Context(), h, "false"); err == nil {
		t.Error("a tool that fails did not")
	}
	if err := tool(t.Context(), h, "true"); err != nil {
		t.Error(err)
	}
}
