package iommu

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu/acpi"
)

// An exclusion range is told from one that is mapped one to one, and is of the type that the kernel has it.
func TestExclusion(t *testing.T) {
	const ivhd = "0200 4000 0000f0fd00000000 0000 0000 00000000 fa4a25a2ef776524 0000000000000000"
	const rest = "0003 0000 0000 000000000000 0000907d00000000 0000100000000000"
	for name, c := range map[string]struct {
		flags, regions string
		exclusion      bool
		kind           string
	}{
		"exclusion, reserved":         {"21 08", "0x000000007d900000 0x000000007d9fffff reserved\n", true, "reserved"},
		"exclusion, direct":           {"21 08", "0x000000007d900000 0x000000007d9fffff direct\n", true, "direct"},
		"exclusion, nothing is told":  {"21 08", "", true, "direct"},
		"exclusion, another reserved": {"21 08", "0x000000fd00000000 0x000000ffffffffff reserved\n", true, "direct"},
		"unity":                       {"21 07", "0x000000007d900000 0x000000007d9fffff direct\n", false, "direct"},
	} {
		tables := map[string][]byte{"IVRS": hosttest.ACPITable("IVRS", 2, "43302000 0000000000000000",
			hosttest.IVRSBlock("11 00", ivhd+"01000000"), hosttest.IVRSBlock(c.flags, rest))}
		h := firmwareHost(t, tables, hosttest.Tree{
			"sys/class/iommu/ivhd0": hosttest.Gone, "sys/kernel/iommu_groups/4/reserved_regions": c.regions,
		})

		all, _ := units(t, h)
		if len(all) != 1 || len(all[0].Ranges) != 1 {
			t.Fatalf("%s: %+v", name, all)
		}

		r := all[0].Ranges[0]
		if r.Exclusion != c.exclusion || r.Type != c.kind || r.Whose != "0000:03:00.0" {
			t.Errorf("%s: %+v", name, r)
		}
		if others := OtherRanges(ReadFirmware(h), all); len(others) > 0 {
			t.Errorf("%s: %+v belongs to no device", name, others)
		}
	}
}

// What the tables keep for devices that are not there is told all the same, with the devices as the table has them.
func TestOtherRanges(t *testing.T) {
	ivhd := hosttest.IVRSBlock("11 00",
		"0200 4000 0000f0fd00000000 0000 0000 00000000 fa4a25a2ef776524 0000000000000000 02100000")
	for name, c := range map[string]struct {
		table []byte
		want  string
	}{
		"IVMD of one": {hosttest.ACPITable("IVRS", 2, "43302000 0000000000000000", ivhd,
			hosttest.IVRSBlock("21 08", "07c4 0000 0000 000000000000 0000007600000000 0000020000000000")),
			"0000:c4:00.7"},
		"IVMD of several": {hosttest.ACPITable("IVRS", 2, "43302000 0000000000000000", ivhd,
			hosttest.IVRSBlock("22 07", "00c4 07c4 0100 000000000000 0000007600000000 0000020000000000")),
			"0001:c4:00.0 to 0001:c4:00.7"},
		"RMRR": {hosttest.ACPITable("DMAR", 1, "2605 00000000000000000000",
			hosttest.DMARBlock(0, "01 00 0000 0020d9fe00000000"),
			hosttest.DMARBlock(1, "0000 0000 00706c6e00000000 ffef6d6e00000000 0108000000001a00 020a00000000 1b00 0001")),
			"0000:00:1a.0, all below 0000:00:1b.0/00.1"},
	} {
		h := firmwareHost(t, map[string][]byte{string(c.table[:4]): c.table},
			hosttest.Tree{"sys/class/iommu/ivhd0": hosttest.Gone})
		all, _ := units(t, h)
		got := OtherRanges(ReadFirmware(h), all)
		if len(got) != 1 || got[0].Whose != c.want || len(got[0].Devices) > 0 {
			t.Errorf("%s: %+v, want %s", name, got, c.want)
		}
	}

	files, err := filepath.Glob("../../shared/acpi-tables/DMAR__Server_Dell_PowerEdge_PowerEdge_R820*")
	if err != nil || len(files) == 0 {
		t.Skip("the table of a real machine is not at hand (../../shared/acpi-tables)")
	}
	b, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	table, err := acpi.Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	got := OtherRanges([]Firmware{{Signature: "DMAR", Table: table}}, nil)
	if len(got) != 3 || !strings.HasPrefix(got[0].Whose, "0000:") {
		t.Errorf("%+v", got)
	}
}

// An AMD IOMMU without host page tables tracks nothing that a device writes, whatever its registers say, and one whose
// firmware asks for it has no x2APIC mode.
func TestFeaturesTheFirmwareTakesAway(t *testing.T) {
	for name, c := range map[string]struct {
		attributes string
		tracks     bool
		bits       int // 0: not known
	}{
		"host page tables":    {"00000000", true, 64},
		"no host page tables": {"01000000", false, 0},
	} {
		table := hosttest.ACPITable("IVRS", 2, "43302000 0000000000000000", hosttest.IVRSBlock("11 00",
			"0200 4000 0000f0fd00000000 0000 0000 "+c.attributes+" fa4a25a2ef777524 0000000000000000 01000000"))
		all, _ := units(t, firmwareHost(t, map[string][]byte{"IVRS": table},
			hosttest.Tree{"sys/class/iommu/ivhd0": hosttest.Gone}))
		f := all[0].Features
		if *f.HostTables != c.tracks || *f.DirtyTracking != c.tracks || *f.FiveLevels != c.tracks ||
			(f.InputBits == nil) != (c.bits == 0) || f.InputBits != nil && *f.InputBits != c.bits {
			t.Errorf("%s: %+v", name, f)
		}
	}

	for name, c := range map[string]struct {
		flags, line string
		x2apic      bool
	}{
		"asked for":     {"03", "root=/dev/sda", false},
		"overridden":    {"03", "root=/dev/sda intremap=no_x2apic_optout", true},
		"not asked for": {"01", "root=/dev/sda", true},
	} {
		table := hosttest.ACPITable("DMAR", 1, "26 "+c.flags+" 00000000000000000000",
			hosttest.DMARBlock(0, "01 00 0000 0010d9fe00000000"))
		all, _ := units(t, firmwareHost(t, map[string][]byte{"DMAR": table}, hosttest.Tree{
			"sys/class/iommu/ivhd0": hosttest.Gone, "proc/cmdline": c.line + "\n",
			"sys/class/iommu/dmar0":                               "-> ../../devices/virtual/iommu/dmar0",
			"sys/devices/virtual/iommu/dmar0/intel-iommu/address": "fed91000\n",
			"sys/devices/virtual/iommu/dmar0/intel-iommu/ecap":    "f050da\n",
		}))
		if *all[0].Features.X2APIC != c.x2apic {
			t.Errorf("%s: %+v", name, all[0].Features)
		}
	}
}
