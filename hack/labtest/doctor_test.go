//go:build lab

package labtest

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const acpiDir = "/sys/firmware/acpi/tables"

// TestIOMMU compares what viaduct says of the IOMMUs with the kernel's files, and of the tables with their bytes. The
// tables go to /out, where `hack/test` has iasl decode them.
func TestIOMMU(t *testing.T) {
	var got struct {
		Present bool
		Tables  []struct {
			Signature string
			Length    int
			Error     *string
			Blocks    []struct{ Offset, Length int }
		}
		Units []struct {
			Name    *string
			Active  bool
			Devices []string
			Table   *string
			Windows []struct{ Start, End, Type string } `json:"reserved_windows"`
		}
	}
	decode(t, do(t, "iommu", "--json"), &got)
	units := names("/sys/class/iommu")
	var active []string
	for _, u := range got.Units {
		if !u.Active {
			continue
		}
		active = append(active, *u.Name)
		devices := names("/sys/class/iommu/" + *u.Name + "/devices")
		slices.Sort(devices)
		slices.Sort(u.Devices)
		if !slices.Equal(devices, u.Devices) || u.Table == nil || len(u.Windows) == 0 {
			t.Errorf("unit %+v; the kernel has it translate %v", u, devices)
		}
	}
	if !got.Present || !slices.Equal(units, active) {
		t.Errorf("units %v, want %v", active, units)
	}

	if err := os.MkdirAll("/out/tables", 0o755); err != nil {
		t.Fatal(err)
	}
	for _, table := range got.Tables {
		b, err := os.ReadFile(filepath.Join(acpiDir, table.Signature))
		if err != nil || table.Error != nil || table.Length != len(b) || len(table.Blocks) == 0 {
			t.Errorf("%+v, of %d bytes: %v", table, len(b), err)
		}
		if err := os.WriteFile("/out/tables/"+table.Signature, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, signature := range []string{"IVRS", "DMAR", "IORT", "VIOT"} {
		_, err := os.Stat(filepath.Join(acpiDir, signature))
		found := false
		for _, table := range got.Tables {
			found = found || table.Signature == signature
		}
		if found != (err == nil) {
			t.Errorf("%s: shown %v, %v", signature, found, err)
		}
	}
	if text := do(t, "iommu"); !strings.Contains(text, units[0]) {
		t.Errorf("iommu: %s", text)
	}
}

type checks struct {
	Healthy bool
	Checks  []struct {
		Name, Status, Text string
		Hint               *string `json:"cure"`
		Evidence           []struct {
			File  string
			Value *string
		}
	}
}

// failed are the names of the checks that failed, the cures of all, and all that was said.
func (c *checks) failed() (names []string, hints, all string) {
	for _, check := range c.Checks {
		if check.Hint != nil && check.Status == "failed" {
			hints += *check.Hint + "\n"
		}
		if check.Status == "failed" {
			names = append(names, check.Name)
		}
	}
	b, _ := json.MarshalIndent(c, "", " ")
	return names, hints, string(b)
}

// TestHealthy runs on a host on which nothing is wrong.
func TestHealthy(t *testing.T) {
	var got checks
	decode(t, do(t, "doctor", "--json"), &got)
	if names, _, all := got.failed(); len(names) > 0 || !got.Healthy || len(got.Checks) < 20 {
		t.Errorf("failed %v: %s", names, all)
	}
	text := do(t, "doctor")
	if !strings.Contains(text, "\n0 failed") {
		t.Errorf("doctor: %s", text)
	}
	for line := range strings.Lines(text) {
		if len([]rune(line)) > 81 {
			t.Errorf("longer than 80 columns: %s", line)
		}
	}
}

// TestFault runs on a host with one fault, which the host's file tells by lab.fault= on the kernel's command line, or
// which is the host's nature. It is what doctor names first, with what mends it; and so it is from a snapshot.
func TestFault(t *testing.T) {
	fault := "no-intremap"
	line := attr("/proc/cmdline")
	switch _, named, ok := strings.Cut(line, "lab.fault="); {
	case ok:
		fault, _, _ = strings.Cut(named, " ")
	case os.Getenv("LAB_IOMMU") == "none":
		fault = "no-iommu"
	case os.Getenv("LAB_IOMMU") == "smmu":
		fault = "gic2"
	}
	release := attr("/proc/sys/kernel/osrelease")
	want := map[string]struct {
		prepare     string
		name, hints string
		among       []string // others that fail for the same reason
	}{
		"no-iommu":    {"", "table", "turn on a virtual IOMMU", []string{"iommu"}},
		"no-intremap": {"", "interrupt_remapping", "remove intremap=off", nil},
		"gic2":        {"", "interrupt_remapping", "gic-version=3", nil},
		"amd-off":     {"", "iommu", "remove amd_iommu=off", nil},
		"intel-off":   {"", "iommu", "remove intel_iommu=off", nil},
		"table":       {"", "table", "update the firmware", []string{"iommu"}},
		"dmar":        {"", "table", "update the firmware", []string{"iommu"}},
		"modules": {"rm -rf /lib/modules/" + release + "/kernel/drivers/vfio; depmod", "vfio_modules",
			"install the package", nil},
		"blacklist": {"echo 'blacklist vfio-pci' > /etc/modprobe.d/keep.conf", "blacklist",
			"/etc/modprobe.d/keep.conf", nil},
	}[fault]
	if want.prepare != "" {
		shell(t, want.prepare)
	}

	r := run(t, viaduct, "doctor")
	t.Logf("%s", r.stdout)
	if r.status != 1 || !strings.HasPrefix(r.stdout, "failed ") {
		t.Errorf("exit status %d, want 1 and the fault first: %s", r.status, r.stderr)
	}
	judge := func(args ...string) {
		t.Helper()
		r := run(t, viaduct, args...)
		var got checks
		decode(t, r.stdout, &got)
		failed, hints, all := got.failed()
		others := slices.DeleteFunc(slices.Clone(failed), func(n string) bool { return slices.Contains(want.among, n) })
		if r.status != 1 || len(failed) == 0 || failed[0] != want.name || len(others) != 1 ||
			!strings.Contains(hints, want.hints) {
			t.Errorf("%v: exit status %d, failed %v, want %s with %q: %s", args, r.status, failed, want.name,
				want.hints, all)
		}
	}
	judge("doctor", "--json")
	do(t, "snapshot", "/out/host.tar.gz")
	judge("--host", "/out/host.tar.gz", "doctor", "--json")
}
