package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"viaduct/cmd/internal/changelog"
	"viaduct/internal/host/hosttest"
)

// What a command changed is written down with who did it, and shown: by log, and by show for its device.
func TestLog(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	do := func(line string) (stdout, stderr string, status int) {
		a := onKernel(k, strings.Fields(line)...)
		return a.stdout, a.stderr, a.status
	}
	if out, said, status := do("log"); status != 0 || out != "" || !strings.Contains(said, "nothing is written down") {
		t.Errorf("before: %d, %s%s", status, out, said)
	}
	for _, c := range []struct {
		line   string
		status int
	}{
		{"bind 0000:05:00.0", 0}, {"vf create 0000:02:00.0 2 vlan=100+index", 0}, {"vf set 0000:02:00.0/vf1 vlan=7", 0},
		{"bind 0000:02:00.0", 3}, {"bind --dry-run 0000:06:00.0", 0}, {"list", 0},
	} {
		if out, said, status := do(c.line); status != c.status {
			t.Fatalf("%s: %d, %s%s", c.line, status, out, said)
		}
	}

	out, said, status := do("log --json")
	var all []changelog.Entry
	if err := json.Unmarshal([]byte(out), &all); err != nil || status != 0 {
		t.Fatalf("%d, %v: %s%s", status, err, out, said)
	}
	var got []string
	for _, e := range all {
		got = append(got, strings.TrimSpace(ptr(e.Device)+" "+e.Text()+" "+string(e.Result)))
		if e.User == "" || e.PID != os.Getpid() || e.Time.IsZero() {
			t.Errorf("%+v", e)
		}
	}
	want := []string{
		"0000:05:00.0 driver none -> vfio-pci done", "0000:02:00.0 3 -> 2 VFs done",
		"0000:02:10.2 vlan=7 (was vlan=101) done", "viaduct bind 0000:02:00.0 refused",
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("log:\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if out, _, _ := do("log 02:00.0"); strings.Count(out, "\n") != 3 || !strings.Contains(out, "3 -> 2 VFs") ||
		!strings.Contains(out, "refused: ") {
		t.Errorf("of one device:\n%s", out)
	}
	if out, _, _ := do("show 02:00.0"); !strings.Contains(out, "  changed     ") ||
		!strings.Contains(out, ": 3 -> 2 VFs") {
		t.Errorf("show:\n%s", out)
	}
}

// On a running host list says who uses what, and show all of it.
func TestUses(t *testing.T) {
	k := hosttest.NewLab(t, hosttest.Tree{
		"run/viaduct/lease-web.json": `{"guest":"web","devices":[{"address":"0000:06:00.0"}]}`,
	})

	k.Net.Routes = []hosttest.Route{{To: "default", Over: []string{"enp1s0"}}}
	k.Process(4711, "qemu-system-x86", "/dev/vfio/20")
	do := func(line string) (stdout, stderr string, status int) {
		a := onKernel(k, strings.Fields(line)...)
		return a.stdout, a.stderr, a.status
	}

	out, said, status := do("list")
	for _, want := range []string{"enp1s0: default route", "guest web"} {
		if !strings.Contains(out, want) || status != 0 {
			t.Errorf("list does not say %q: %d, %s%s", want, status, out, said)
		}
	}

	if out, _, _ := do("show enp1s0"); !strings.Contains(out, "used by     enp1s0 carries the default route") {
		t.Errorf("show:\n%s", out)
	}

	out, _, _ = do("show enp1s0 --json")
	var v struct {
		Holders []struct{ Kind, What string }
		Guest   *string
	}

	if err := json.Unmarshal([]byte(out), &v); err != nil || len(v.Holders) != 1 || v.Holders[0].Kind != "route" ||
		v.Guest != nil {
		t.Errorf("%v: %s", err, out)
	}
	if out, _, _ := do("show 06:00.0"); !strings.Contains(out, "guest       web") {
		t.Errorf("show:\n%s", out)
	}
}

// A snapshot goes to standard output too, and is a host there as it is in a file.
func TestSnapshotToPipe(t *testing.T) {
	dir := hosttest.Load(t, filepath.Join(machines, "amd-vi.txt")).Dir(t)
	for _, line := range []string{"snapshot -", "snapshot --redact -"} {
		out, said, status := typed(0, append([]string{"viaduct", "--host", dir}, strings.Fields(line)...)...)
		if status != 0 || (said == "") != strings.Contains(line, "redact") {
			t.Fatalf("%s: %d, %s", line, status, said)
		}
		file := filepath.Join(t.TempDir(), "host.vsnap")
		if err := os.WriteFile(file, []byte(out), 0o600); err != nil {
			t.Fatal(err)
		}
		was, _, _ := typed(0, "viaduct", "--host", dir, "list")
		if got, said, status := typed(0, "viaduct", "--host", file, "list"); got != was || status != 0 {
			t.Errorf("%s: %d, %s\n%s", line, status, said, got)
		}
	}
	if _, said, status := typed(80, "viaduct", "--host", dir, "snapshot", "-"); status != 2 ||
		!strings.Contains(said, "terminal") {
		t.Errorf("to a terminal: %d, %s", status, said)
	}
}

// A dry run of assign with a format prints what the VMM will get, and changes nothing.
func TestAssignPreview(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	k.Log = nil
	for format, want := range map[string]string{
		"proxmox": "hostpci0: 0000:05:00.0\n", "qemu": "-device vfio-pci,host=0000:05:00.0",
		"env": "VIADUCT_NODES='/dev/vfio/vfio /dev/vfio/14'",
	} {
		a := mustOnKernel(t, k, "assign", "web", "--from", "0000:05:00.0", "--dry-run", "--no-reset",
			"--format", format)
		if !strings.Contains(a.stdout, want) || len(k.Log) > 0 {
			t.Errorf("%s: %s%s, wrote %q", format, a.stdout, a.stderr, k.Log)
		}
	}
	if a := mustOnKernel(t, k, "assign", "web", "--from", "0000:05:00.0", "--steps",
		"--no-reset"); !strings.Contains(a.stdout, "driver_override") {
		t.Errorf("without a format: %s", a.stdout)
	}
	if a := mustOnKernel(t, k, "assign", "web", "--from", "0000:02:00.0", "--mac", "stable", "--dry-run", "--format",
		"libvirt"); !strings.Contains(a.stdout, "<mac address=") {
		t.Errorf("a VF: %s%s", a.stdout, a.stderr)
	}
}
