package main

import (
	"bytes"
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"

	"viaduct/internal/host/hosttest"
)

// Hosts of the lab with one fault each, captured there: the fault is what doctor names first, and the exit status is 1.
func TestDoctorFaults(t *testing.T) {
	for name, want := range map[string]struct{ check, hint string }{
		"amd-off":     {"iommu", "remove amd_iommu=off"},
		"intel-off":   {"iommu", "remove intel_iommu=off"},
		"table":       {"table", "update the firmware"},
		"dmar":        {"table", "update the firmware"},
		"modules":     {"vfio_modules", "install the package"},
		"blacklist":   {"blacklist", "/etc/modprobe.d/keep.conf"},
		"no-intremap": {"interrupt_remapping", "remove intremap=off"},
		"gic2":        {"interrupt_remapping", "gic-version=3"},
	} {
		file := hosttest.Load(t, filepath.Join("testdata/faults", name+".txt")).Snapshot(t)
		doctor := func(args ...string) (string, int) {
			var stdout, stderr bytes.Buffer
			status := run(append([]string{"viaduct", "--host", file, "doctor"}, args...), &stdout, &stderr)
			if stderr.Len() > 0 {
				t.Errorf("%s: %s", name, stderr.String())
			}
			return stdout.String(), status
		}
		text, status := doctor()
		if status != exitFailed || !strings.HasPrefix(text, "failed ") {
			t.Errorf("%s: exit status %d: %s", name, status, text)
		}
		for line := range strings.Lines(text) {
			if len([]rune(line)) > 81 {
				t.Errorf("%s: longer than 80 columns: %s", name, line)
			}
		}
		compareGolden(t, filepath.Join("testdata/faults", name+".golden"), text)

		text, status = doctor("--json")
		var got doctorView
		if err := json.Unmarshal([]byte(text), &got); err != nil || status != exitFailed || got.Healthy {
			t.Fatalf("%s: exit status %d, %v: %s", name, status, err, text)
		}
		for _, c := range got.Checks {
			if c.Status != "failed" {
				continue
			}
			if c.Name != want.check || c.Hint == nil || !strings.Contains(*c.Hint, want.hint) || len(c.Evidence) == 0 {
				t.Errorf("%s: %+v, want %+v first", name, c, want)
			}
			break
		}
	}
}

// What list says of a host without an IOMMU is what bind and doctor say.
func TestOneHint(t *testing.T) {
	for _, name := range []string{"amd-off", "intel-off", "table"} {
		file := hosttest.Load(t, filepath.Join("testdata/faults", name+".txt")).Snapshot(t)
		said := func(args ...string) string {
			var stdout, stderr bytes.Buffer
			run(append([]string{"viaduct", "--host", file}, args...), &stdout, &stderr)
			return strings.Join(strings.Fields(stdout.String()+stderr.String()), " ")
		}
		list := said("list")
		_, why, _ := strings.Cut(list, "so no device is in a group: ")
		_, hint, found := strings.Cut(why, "; ")
		if !found {
			t.Fatalf("%s: %s", name, list)
		}
		for _, line := range []string{"bind --dry-run 01:00.0", "doctor", "iommu"} {
			if got := said(strings.Fields(line)...); !strings.Contains(got, hint) {
				t.Errorf("%s: %s: %q does not have %q", name, line, got, hint)
			}
		}
	}
}
