package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"viaduct/internal/host"
	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

// TestVerify: the exit status says whether a device can go to a guest, and one on its home driver, or in use, is let be.
func TestVerify(t *testing.T) {
	const nic = "0000:01:00.0"
	k := hosttest.NewSmallLab(t, "0000:00:05.0", nic)
	v := k.ServeVFIO()
	d := &hosttest.VFIODevice{Vectors: [5]uint32{1, 1, 4, 1, 1}, Together: []string{nic}}
	d.Regions = [9]uint64{0: 1 << 16, 7: 4096}
	v.Devices[nic] = d
	if err := os.WriteFile(filepath.Join(k.Dir(), "proc/meminfo"), []byte("MemAvailable: 16384 kB\n"),
		0o600); err != nil {
		t.Fatal(err)
	}
	do := func(status int, line ...string) (stdout, stderr string) {
		t.Helper()
		var out, errs bytes.Buffer
		open := func(string) (*iommu.Host, error) {
			h, err := host.Fake(k.Dir(), k)
			return &iommu.Host{Host: h}, err
		}
		if got := runOn(open, append([]string{"viaduct"}, line...), &out, &errs); got != status {
			t.Errorf("%q: exit status %d, want %d\n%s%s", line, got, status, out.String(), errs.String())
		}
		return out.String(), errs.String()
	}

	out, errs := do(1, "verify", nic)
	if !strings.Contains(out, "echo 0000:01:00.0 > /sys/bus/pci/drivers/igb/unbind\n") ||
		errs != "viaduct: verify 0000:01:00.0: it is on igb, which is not a vfio driver: viaduct bind 0000:01:00.0 takes it\n" {
		t.Errorf("on its home driver:\n%s%s", out, errs)
	}
	var got struct {
		Usable  *bool
		Reasons []string
		Ways    map[string]struct {
			OK    *bool
			Error *string
		}
		Regions []struct{}
		Plan    []string
	}
	asJSON := func(status int) {
		t.Helper()
		out, _ := do(status, "verify", nic, "--json")
		got.Plan = nil
		if err := json.Unmarshal([]byte(out), &got); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	if asJSON(1); *got.Usable || len(got.Reasons) != 1 || len(got.Plan) == 0 || got.Regions != nil ||
		*got.Ways["iommufd"].OK {
		t.Errorf("%+v", got)
	}
	if len(k.Log) > 0 || len(v.Requests) > 0 {
		t.Errorf("the host was touched: %q, %#x", k.Log, v.Requests)
	}

	do(0, "bind", nic)
	if asJSON(0); !*got.Usable || len(got.Reasons) != 0 || got.Plan != nil || !*got.Ways["container"].OK {
		t.Errorf("%+v", got)
	}
	out, _ = do(0, "verify", nic, "--memory", "16G")
	if !strings.HasPrefix(out, nic+" can go to a guest.\n") || !strings.Contains(out, "16 GiB can be mapped") {
		t.Errorf("%s", out)
	}
	for line := range strings.Lines(out) {
		if len(line) > 80 {
			t.Errorf("%d columns: %s", len(line), line)
		}
	}
	v.Isolated = false
	if out, errs := do(1, "verify", nic); !strings.HasPrefix(out, nic+" cannot go to a guest:\n- ") || errs != "" {
		t.Errorf("%s%s", out, errs)
	}
	v.Isolated = true

	groups, err := filepath.Glob(k.Dir() + "/dev/vfio/[0-9]*")
	if err != nil || len(groups) != 1 {
		t.Fatal(groups, err)
	}
	asked := len(v.Requests)
	k.Process(4711, "qemu", strings.TrimPrefix(groups[0], k.Dir()))
	if _, errs := do(3, "verify", nic); !strings.Contains(errs, "process 4711 (qemu)") ||
		strings.Count(errs, "\n") != 1 {
		t.Errorf("a device that is open: %s", errs)
	}
	if len(v.Requests) > asked {
		t.Error("it was opened")
	}
	k.End(4711)

	// A PF is not reset under a VF that somebody has.
	k.EnableSRIOV = true
	if err := k.Write("sys/bus/pci/devices/"+nic+"/sriov_numvfs", "1"); err != nil {
		t.Fatal(err)
	}
	vf, err := os.Readlink(filepath.Join(k.Dir(), "sys/bus/pci/devices", nic, "virtfn0"))
	if err != nil {
		t.Fatal(err)
	}
	vf = filepath.Base(vf)
	do(0, "bind", vf)
	group, err := os.Readlink(filepath.Join(k.Dir(), "sys/bus/pci/devices", vf, "iommu_group"))
	if err != nil {
		t.Fatal(err)
	}
	k.Process(4712, "qemu", "/dev/vfio/"+filepath.Base(group))
	resets := d.Resets
	if _, errs := do(3, "verify", nic); !strings.Contains(errs, vf+" is open in process 4712") || d.Resets != resets {
		t.Errorf("a PF whose VF is in use: %s, %d resets", errs, d.Resets-resets)
	}

	for _, wrong := range [][]string{
		{"verify"}, {"verify", nic, nic}, {"verify", nic, "--memory", "much"}, {"verify", nic, "--timeout", "0s"},
		{"--host", t.TempDir(), "verify", nic},
	} {
		do(2, wrong...)
	}
}

func TestWrap(t *testing.T) {
	text := strings.Repeat("0123456789 ", 20)
	for line := range strings.Lines(wrapAt(text, 14)) {
		if len(strings.TrimSuffix(line, "\n"))+14 > columns+14 {
			t.Errorf("%q", line)
		}
	}
	if got := wrapAt("one two", 4); got != "one two" {
		t.Errorf("%q", got)
	}
	if got := pageSizes([]uint64{4096, 8192, 16384, 1 << 20, 4 << 20,
		8 << 20}); got != "4 KiB to 16 KiB, 1 MiB, 4 MiB, 8 MiB" {
		t.Errorf("%q", got)
	}
	if !slices.Equal(strings.Fields(wrapAt(text, 2)), strings.Fields(text)) {
		t.Error("words were lost")
	}
}
