//go:build lab

package labtest

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"viaduct/vfio"
)

// verified is what verify --json says.
type verified struct {
	Usable  bool
	Reasons []string
	Ways    map[string]struct {
		OK         bool
		Error      *string
		Exists     bool
		IOVARanges []struct{ Start, End string } `json:"iova_ranges"`
		Mapping    []struct {
			PageSize uint64 `json:"page_size"`
			Size     uint64
			Map      int64 `json:"map_ns"`
		}
		Interrupt *bool
	}
	Regions []struct {
		Name string
		Size int64
	}
	Reset struct {
		Worked   *bool
		Together []string
	}
	Migration struct {
		OK     *bool
		Reason *string
	}
	Memory *struct{ OK *bool }
	Plan   []string
}

// verify runs `verify --json`, and wants an exit status.
func verify(t *testing.T, status int, args ...string) verified {
	t.Helper()
	r := run(t, viaduct, append([]string{"verify", "--json"}, args...)...)
	if r.status != status {
		t.Fatalf("verify %v: exit status %d, want %d\n%s%s", args, r.status, status, r.stdout, r.stderr)
	}
	var v verified
	if status != 3 {
		decode(t, r.stdout, &v)
		if v.Usable != (status == 0) || v.Usable != (len(v.Reasons) == 0) {
			t.Errorf("verify %v: exit status %d, usable %v, reasons %q", args, r.status, v.Usable, v.Reasons)
		}
	}
	return v
}

// TestVerify verifies VFs, a member of a group that is not viable, devices that somebody has, and one that is not taken.
func TestVerify(t *testing.T) {
	nic, nvme := of("8086", "10c9")[0], of("1b36", "0010")[0]
	for _, pf := range []string{nic, nvme} {
		withDriver(t, pf, map[string]string{nic: "igb", nvme: "nvme"}[pf])
		do(t, "vf", "create", pf, "1")
		t.Cleanup(func() { do(t, "vf", "destroy", pf, "--force", "process") })
		vf := link(devicesDir, pf, "virtfn0")
		driver, override := link(devicesDir, vf, "driver"), attr(devicesDir, vf, "driver_override")
		v := verify(t, 1, vf)
		if len(v.Plan) == 0 || len(v.Reasons) != 1 || link(devicesDir, vf, "driver") != driver ||
			attr(devicesDir, vf, "driver_override") != override {
			t.Errorf("%s, on its home driver: %+v", vf, v)
		}
		do(t, "bind", vf)
		t.Cleanup(func() { do(t, "unbind", vf) })
		verifyUsable(t, vf)
	}

	vf := link(devicesDir, nic, "virtfn0")
	if v := verify(t, 0, vf, "--memory", "16G"); v.Memory == nil || v.Memory.OK == nil || !*v.Memory.OK {
		t.Errorf("with 16 GiB: %+v", v.Memory)
	}
	if r := run(t, viaduct, "verify", vf, "--memory", "nonsense"); r.status != 2 {
		t.Errorf("--memory nonsense: exit status %d", r.status)
	}
	text := do(t, "verify", vf)
	if !strings.HasPrefix(text, vf+" can go to a guest.\n") {
		t.Errorf("verify says\n%s", text)
	}
	for line := range strings.Lines(text) {
		if len(line) > 80 {
			t.Errorf("a line of %d columns: %s", len(line), line)
		}
	}
	verifyHeld(t, vf)

	// A group with a member on its home driver.
	var pair []string
	for _, n := range of("8086", "100e") {
		if len(names(devicesDir, n, "iommu_group/devices")) > 1 {
			pair = append(pair, n)
		}
	}
	take(t, pair[0])
	if v := verify(t, 1, pair[0]); len(v.Reasons) == 0 || !strings.Contains(v.Reasons[0], pair[1]+" is on e1000") {
		t.Errorf("%s, whose group is not viable: %q", pair[0], v.Reasons)
	}
	take(t, pair[1])
	if v := verify(t, 0, pair[0]); !slices.Equal(slices.Sorted(slices.Values(v.Reset.Together)), pair) {
		t.Errorf("a hot reset resets %v, want %v", v.Reset.Together, pair)
	}
}

// withDriver has a function on its home driver, which not every host has loaded.
func withDriver(t *testing.T, function, driver string) {
	t.Helper()
	shell(t, "modprobe "+driver)
	await(t, driver, func() bool { return link(devicesDir, function, "driver") == driver })
}

// verifyUsable wants all of a VF to work, as sysfs and the kernel's huge pages say.
func verifyUsable(t *testing.T, vf string) {
	t.Helper()
	const pages = "/proc/sys/vm/nr_hugepages"
	shell(t, "echo 32 >"+pages)
	v := verify(t, 0, vf)
	if got := attr(pages); got != "32" {
		t.Errorf("there are %s huge pages, and were 32", got)
	}

	shell(t, "echo 0 >"+pages)
	for name, node := range map[string]string{"iommufd": "/dev/iommu", "container": "/dev/vfio/vfio"} {
		_, err := os.Stat(node)
		way := v.Ways[name]
		if way.OK != (err == nil) || way.Exists != way.OK {
			t.Errorf("%s by %s: %+v", vf, name, way)
		}
		if !way.OK {
			continue
		}
		var sizes []uint64
		for _, m := range way.Mapping {
			if sizes = append(sizes, m.PageSize); m.Size > 1<<30 || m.Map <= 0 {
				t.Errorf("mapped %+v", m)
			}
		}
		if !slices.Equal(sizes, []uint64{4 << 10, 2 << 20}) || way.Interrupt == nil || !*way.Interrupt {
			t.Errorf("%s by %s: %+v", vf, name, way)
		}
		sameRanges(t, vf, way.IOVARanges)
	}

	if v.Reset.Worked == nil || !*v.Reset.Worked {
		t.Errorf("%s: reset %+v", vf, v.Reset)
	}
	if v.Migration.OK == nil || *v.Migration.OK || v.Migration.Reason == nil {
		t.Errorf("%s: migration %+v", vf, v.Migration)
	}
}

// sameRanges compares what lies between the ranges that can be mapped with sysfs' reserved_regions.
func sameRanges(t *testing.T, vf string, ranges []struct{ Start, End string }) {
	t.Helper()
	hex := regexp.MustCompile(`0x0*([0-9a-f]+) 0x0*([0-9a-f]+) (\S+)`)
	for _, m := range hex.FindAllStringSubmatch(attr(devicesDir, vf, "iommu_group/reserved_regions"), -1) {
		for _, r := range ranges {
			if r.Start == "0x"+m[1] || r.End == "0x"+m[2] {
				t.Errorf("%s: %s can be mapped, and is reserved (%s)", vf, r, m[0])
			}
		}
	}
}

// verifyHeld: who has a device, or is given it, keeps it from being opened.
func verifyHeld(t *testing.T, vf string) {
	t.Helper()
	group := filepath.Join("/dev/vfio", link(devicesDir, vf, "iommu_group"))
	f, err := os.OpenFile(group, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	r := run(t, viaduct, "verify", vf)
	if r.status != 3 || !strings.Contains(r.stderr, "is open in process") || strings.Count(r.stderr, "\n") != 1 {
		t.Errorf("a device that is open: exit status %d, %s", r.status, r.stderr)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	do(t, "assign", "guest1", "--from", vf)
	if r := run(t, viaduct, "verify", vf); r.status != 3 || !strings.Contains(r.stderr, "guest1") {
		t.Errorf("a device that is leased: exit status %d, %s", r.status, r.stderr)
	}
	do(t, "release", "guest1")
}

// TestVerifyRemapping: on a host that does not remap interrupts verify tells so, before QEMU would.
func TestVerifyRemapping(t *testing.T) {
	h := openHost(t)
	function := of("1234", "11e8")[0]
	take(t, function)
	eachWay(t, func(t *testing.T, way vfio.Way) {
		c := must(vfio.NewContext(h, vfio.Options{Way: way}))
		defer func() { check(t, c.Close()) }()
		if _, err := c.Open(function); err == nil || !strings.Contains(err.Error(), vfio.ErrNotIsolated.Error()) {
			t.Errorf("%v", err)
		}
	})
	v := verify(t, 1, function)
	if !strings.Contains(v.Reasons[0], "interrupt remapping is off") {
		t.Errorf("%q", v.Reasons)
	}
}

// TestVFIONVMe runs the package's example, which reads the identity of a controller by DMA.
func TestVFIONVMe(t *testing.T) {
	pf := of("1b36", "0010")[0]
	withDriver(t, pf, "nvme")
	await(t, "the controller", func() bool { return len(names(devicesDir, pf, "nvme")) > 0 })
	want := attr(devicesDir, pf, "nvme", names(devicesDir, pf, "nvme")[0], "serial")
	do(t, "vf", "create", pf, "1")
	defer do(t, "vf", "destroy", pf)
	vf := link(devicesDir, pf, "virtfn0")
	do(t, "bind", vf)
	defer do(t, "unbind", vf)
	if got := shell(t, "/job/nvmeid "+vf); !strings.Contains(got, "serial "+want+",") {
		t.Errorf("%q, and the PF's serial number is %q", got, want)
	}
}
