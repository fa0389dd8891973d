//go:build lab

package labtest

import (
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// TestList compares `list --json` with the kernel's files, device by device and group by group.
func TestList(t *testing.T) {
	var got struct {
		IOMMU struct {
			Present            bool
			Units              []map[string]string
			InterruptRemapping *bool `json:"interrupt_remapping"`
		}
		Groups []struct {
			ID       int
			Type     string
			Viable   bool
			Blockers []string
			Devices  []map[string]any
		}
		Ungrouped []map[string]any
	}
	decode(t, do(t, "list", "--json"), &got)

	seen := map[string]bool{}
	compare := func(d map[string]any, group string) {
		name := d["address"].(string)
		seen[name] = true
		delete(d, "name")
		if want := device(name); !reflect.DeepEqual(d, want) {
			t.Errorf("%s:\n got %v\nwant %v", name, d, want)
		}
		if g := link(devicesDir, name, "iommu_group"); g != group {
			t.Errorf("%s is shown in group %q, the kernel has it in %q", name, group, g)
		}
	}
	var groups []string
	for _, g := range got.Groups {
		id := strconv.Itoa(g.ID)
		groups = append(groups, id)
		if want := attr(groupsDir, id, "type"); g.Type != want {
			t.Errorf("group %s: type %q, the kernel says %q", id, g.Type, want)
		}
		var members, blockers []string
		for _, d := range g.Devices {
			members = append(members, d["address"].(string))
			compare(d, id)
		}
		if want := names(groupsDir, id, "devices"); !slices.Equal(members, want) {
			t.Errorf("group %s: devices %v, the kernel has %v", id, members, want)
		}
		for _, m := range members {
			switch driver := bound(m); driver {
			case "", "vfio-pci", "pci-stub", "pcieport":
			default:
				blockers = append(blockers, m)
			}
		}
		if !slices.Equal(g.Blockers, blockers) && len(g.Blockers)+len(blockers) > 0 ||
			g.Viable != (len(blockers) == 0) {
			t.Errorf("group %s: viable %v, blockers %v; by the drivers they are %v", id, g.Viable, g.Blockers, blockers)
		}
	}
	for _, d := range got.Ungrouped {
		compare(d, "")
	}
	want := names(groupsDir)
	slices.SortFunc(want, func(a, b string) int { x, _ := strconv.Atoi(a); y, _ := strconv.Atoi(b); return x - y })
	if !slices.Equal(groups, want) {
		t.Errorf("groups %v, the kernel has %v", groups, want)
	}
	for _, n := range names(devicesDir) {
		if !seen[n] {
			t.Errorf("%s is missing", n)
		}
	}

	kind := os.Getenv("LAB_IOMMU")
	var units []map[string]string
	for _, n := range names("/sys/class/iommu") {
		units = append(units, map[string]string{"name": n, "kind": kind})
	}
	if !reflect.DeepEqual(got.IOMMU.Units, units) || !got.IOMMU.Present {
		t.Errorf("units %v, want %v", got.IOMMU.Units, units)
	}
	remapping := strings.Contains(
		shell(t, "dmesg | grep -E 'AMD-Vi: Interrupt remapping enabled|DMAR-IR: Enabled IRQ remapping' || true"),
		"nabled",
	)
	if got.IOMMU.InterruptRemapping == nil || *got.IOMMU.InterruptRemapping != remapping {
		t.Errorf("interrupt remapping %v, by the kernel's log it is %v", got.IOMMU.InterruptRemapping, remapping)
	}
}

// TestListLikeLspci compares with another program.
func TestListLikeLspci(t *testing.T) {
	type device struct{ Address, Vendor, Device, Driver, Group string }
	var want []device
	for record := range strings.SplitSeq(shell(t, "lspci -Dvmmnk"), "\n\n") {
		var d device
		for line := range strings.Lines(record) {
			key, value, _ := strings.Cut(strings.TrimSpace(line), ":\t")
			switch key {
			case "Slot":
				d.Address = value
			case "Vendor":
				d.Vendor = value
			case "Device":
				d.Device = value
			case "Driver":
				d.Driver = value
			case "IOMMUGroup":
				d.Group = value
			}
		}
		want = append(want, d)
	}

	var got []device
	text := do(t, "list", "-o", "wide")
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if f[0] == "GROUP" {
			continue
		}
		vendor, id, _ := strings.Cut(f[3], ":")
		d := device{f[2], vendor, id, strings.Trim(f[5], "-"), strings.Trim(f[0], "-")}
		if f[5] != "-" {
			d.Driver = f[5]
		}
		got = append(got, d)
	}

	slices.SortFunc(got, func(a, b device) int { return strings.Compare(a.Address, b.Address) })
	if !slices.Equal(got, want) {
		t.Errorf("list:\n%s\nlspci:\n%v\n got %v", text, want, got)
	}
}

// TestTree finds every device in the tree, each below the bridge that the kernel has it below.
func TestTree(t *testing.T) {
	var path []string // the device at each depth
	seen := 0
	for line := range strings.Lines(do(t, "list", "--tree", "-o", "wide")) {
		indent := strings.IndexFunc(line, func(r rune) bool { return strings.ContainsRune("0123456789abcdef", r) })
		depth := len([]rune(line[:indent])) / 3
		name := strings.Fields(line[indent:])[0]
		seen++
		parent := ""
		if depth > 0 {
			parent = path[depth-1]
		}
		path = append(path[:depth], name)
		real, err := filepath.EvalSymlinks(filepath.Join(devicesDir, name))
		if err != nil {
			t.Fatal(err)
		}
		want := filepath.Base(filepath.Dir(real))
		if pf := link(real, "physfn"); pf != "" {
			want = pf
		}
		if strings.HasPrefix(want, "pci") {
			want = ""
		}
		if parent != want {
			t.Errorf("%s is drawn below %q, the kernel has it below %q", name, parent, want)
		}
	}

	if want := len(names(devicesDir)); seen != want {
		t.Errorf("%d devices in the tree, the kernel has %d", seen, want)
	}
}

// TestReservedRegions compares `show group=N --json` with the kernel's reserved_regions.
func TestReservedRegions(t *testing.T) {
	total := 0
	for _, id := range names(groupsDir) {
		var got struct {
			ReservedRegions []struct{ Start, End, Type string } `json:"reserved_regions"`
		}
		decode(t, do(t, "show", "group="+id, "--json"), &got)
		var lines []string
		for _, r := range got.ReservedRegions {
			start, err1 := strconv.ParseUint(r.Start, 0, 64)
			end, err2 := strconv.ParseUint(r.End, 0, 64)
			if err1 != nil || err2 != nil {
				t.Fatalf("group %s: %v", id, r)
			}
			lines = append(lines, shellFormat(start)+" "+shellFormat(end)+" "+r.Type)
		}
		if want := attr(groupsDir, id, "reserved_regions"); strings.Join(lines, "\n") != want {
			t.Errorf("group %s: reserved regions\n%s\nthe kernel has\n%s", id, strings.Join(lines, "\n"), want)
		}
		total += len(lines)
	}
	if total == 0 {
		t.Error("no reserved region anywhere, not even the MSI window")
	}
}

func shellFormat(n uint64) string {
	s := strconv.FormatUint(n, 16)
	return "0x" + strings.Repeat("0", 16-len(s)) + s
}

// TestShow compares what `show` says of each device with the kernel's files.
func TestShow(t *testing.T) {
	for _, name := range names(devicesDir) {
		var got struct {
			Revision        string
			SubsystemVendor string `json:"subsystem_vendor"`
			SubsystemDevice string `json:"subsystem_device"`
			Modalias        string
			Unit            *string             `json:"iommu_unit"`
			PowerState      *string             `json:"power_state"`
			ResetMethods    []string            `json:"reset_methods"`
			ClassDevices    map[string][]string `json:"class_devices"`
			MACs            map[string]string   `json:"mac_addresses"`
			Parents         []string
			BARs            []struct{ Size uint64 }
		}

		decode(t, do(t, "show", name, "--json"), &got)
		dir := filepath.Join(devicesDir, name)
		is := func(what, got, want string) {
			if got != want {
				t.Errorf("%s: %s is %q, the kernel says %q", name, what, got, want)
			}
		}

		text := func(s *string) string {
			if s == nil {
				return ""
			}
			return *s
		}

		is("revision", "0x"+got.Revision, attr(dir, "revision"))
		is("subsystem vendor", "0x"+got.SubsystemVendor, attr(dir, "subsystem_vendor"))
		is("subsystem device", "0x"+got.SubsystemDevice, attr(dir, "subsystem_device"))
		is("modalias", got.Modalias, attr(dir, "modalias"))
		is("unit", text(got.Unit), link(dir, "iommu"))
		is("power state", text(got.PowerState), attr(dir, "power_state"))
		is("reset methods", strings.Join(got.ResetMethods, " "), attr(dir, "reset_method"))
		for _, n := range names(dir, "net") {
			is("MAC of "+n, got.MACs[n], attr(dir, "net", n, "address"))
		}

		for _, n := range names(dir, "nvme") {
			if !slices.Contains(got.ClassDevices["nvme"], n) {
				t.Errorf("%s: nvme device %s is missing in %v", name, n, got.ClassDevices)
			}
		}

		real, _ := filepath.EvalSymlinks(dir)
		var parents []string
		for up := filepath.Dir(real); strings.Count(filepath.Base(up), ":") == 2; up = filepath.Dir(up) {
			parents = append([]string{filepath.Base(up)}, parents...)
		}

		is("parents", strings.Join(got.Parents, " "), strings.Join(parents, " "))
		for i, b := range got.BARs {
			if b.Size == 0 || b.Size&(b.Size-1) != 0 {
				t.Errorf("%s: BAR %d has %d bytes, which is no power of two", name, i, b.Size)
			}
		}
	}
}
