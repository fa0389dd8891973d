package iommu

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu/acpi"
)

// firmwareHost is a host with these tables: a USB controller, a display, a NIC with a VF below a port, and a disk below
// a bridge below a port.
func firmwareHost(t *testing.T, tables map[string][]byte, more hosttest.Tree) *Host {
	t.Helper()
	tree := hosttest.Made(
		hosttest.PCI{At: "0000:00:00.2", ID: "1022:1481", Class: "080600", Group: -1},
		hosttest.PCI{At: "0000:00:02.0", ID: "8086:4680", Class: "030000", Group: 1},
		hosttest.PCI{At: "0000:00:14.0", ID: "8086:7ae0", Class: "0c0330", Group: 2},
		hosttest.PCI{At: "0000:00:1c.4", ID: "8086:7abc", Class: "060400", Group: 3},
		hosttest.PCI{At: "0000:00:1c.4/0000:03:00.0", ID: "8086:1521", Class: "020000", Group: 4},
		hosttest.PCI{At: "0000:00:1c.4/0000:03:00.1", ID: "8086:1521", Class: "020000", Group: 5},
		hosttest.PCI{At: "0000:00:1d.0", ID: "8086:7ab0", Class: "060400", Group: 6},
		hosttest.PCI{At: "0000:00:1d.0/0000:04:00.0/0000:05:01.0", ID: "144d:a80a", Class: "010802", Group: 7},
	)
	for signature, b := range tables {
		tree["sys/firmware/acpi/tables/"+signature] = string(b)
	}
	return &Host{hosttest.NewKernel(t, tree.With(more)).Host()}
}

// units are the IOMMUs of a host by the place of their blocks, with what the tables have them cover.
func units(t *testing.T, h *Host) ([]UnitDetails, *Topology) {
	t.Helper()
	topology, err := Scan(h)
	if err != nil {
		t.Fatal(err)
	}
	tables := ReadFirmware(h)
	for _, f := range tables {
		if f.Err != nil {
			t.Fatal(f.Err)
		}
	}
	all, err := ReadUnits(h, topology, tables)
	if err != nil {
		t.Fatal(err)
	}
	return all, topology
}

func short(names []string) string { return strings.ReplaceAll(strings.Join(names, " "), "0000:", "") }

// What a table puts behind an IOMMU is found on the host by place: by scope and path, by range, or through mappings of
// ids. A unit that includes all has what no other names.
func TestCoverage(t *testing.T) {
	const ivhd = "0200 4000 0000f0fd00000000 0000 0000 00000000 fa4a25a2ef776524 0000000000000000"
	for name, c := range map[string]struct {
		tables map[string][]byte
		want   []string // by unit
		ranges []string
	}{
		"select and range": {
			map[string][]byte{"IVRS": hosttest.ACPITable("IVRS", 2, "43302000 0000000000000000",
				hosttest.IVRSBlock("11 00", ivhd+"02100000"+"03000300"+"04010300"),
				hosttest.IVRSBlock("21 08", "0003 0000 0000 000000000000 0000907d00000000 0000100000000000"))},
			[]string{"00:02.0 03:00.0 03:00.1"}, []string{"0x7d900000-0x7d9fffff direct IVMD 0000:03:00.0/false"},
		},
		"all of the newest type": {
			map[string][]byte{"IVRS": hosttest.ACPITable("IVRS", 2, "43302000 0000000000000000",
				hosttest.IVRSBlock("10 00", "0200 4000 0000f0fd00000000 0000 0000 00000000"+"02100000"),
				hosttest.IVRSBlock("40 00", ivhd+"01000000"))},
			[]string{"00:02.0 00:14.0 00:1c.4 00:1d.0 03:00.0 03:00.1 05:01.0"}, nil,
		},
		"scopes": {
			map[string][]byte{"DMAR": hosttest.ACPITable("DMAR", 1, "2605 00000000000000000000",
				hosttest.DMARBlock(0, "00 00 0000 0000d9fe00000000 0108000000000200"),
				hosttest.DMARBlock(0, "00 00 0000 0010d9fe00000000 0208000000001d00"),
				hosttest.DMARBlock(0, "01 00 0000 0020d9fe00000000"),
				hosttest.DMARBlock(1, "0000 0000 00706c6e00000000 ffef6d6e00000000 0108000000001400"),
				hosttest.DMARBlock(1, "0000 0000 00806c6e00000000 ffef6d6e00000000 010a00000000 1c04 0001"))},
			[]string{"00:02.0", "00:1d.0 05:01.0", "00:00.2 00:14.0 00:1c.4 03:00.0 03:00.1"},
			[]string{
				"0x6e6c7000-0x6e6defff direct-relaxable RMRR 0000:00:14.0/true",
				"0x6e6c8000-0x6e6defff direct RMRR 0000:03:00.1/false",
			},
		},
		"mappings": {
			map[string][]byte{"IORT": hosttest.ACPITable("IORT", 3, "03000000 30000000 00000000",
				hosttest.IORTNode(4, 4, 1,
					"0000050900000000 00000000 00000000 0000000000000000 00000000 00000000 00000000"+
						" 00000000 00000000 00000000 00000000", "", 0),
				hosttest.IORTNode(2, 3, 2, "01000000 00 0000 03 00000000 00000000 30 0000 00",
					"00030000 ff000000 00100000 30000000 00000000", 1),
				hosttest.IORTNode(6, 3, 3, "01000000 01000000 1c000000 0000008000000000 0000100000000000 00000000",
					"00000000 00000000 01100000 30000000 01000000", 1))},
			[]string{"03:00.0 03:00.1"}, []string{"0x80000000-0x800fffff direct-relaxable RMR 0000:03:00.1/true"},
		},
		"ranges of a virtio-iommu": {
			map[string][]byte{"VIOT": hosttest.ACPITable("VIOT", 0, "0200 3000 0000000000000000",
				hosttest.Bytes("03 00 1000 0000 0200 0000000000000000"),
				hosttest.Bytes("01 00 1800 00000000 0000 0000 0000 ff03 3000 000000000000"))},
			[]string{"00:02.0 00:14.0 00:1c.4 00:1d.0 03:00.0 03:00.1"}, nil,
		},
	} {
		all, _ := units(t, firmwareHost(t, c.tables, hosttest.Tree{"sys/class/iommu/ivhd0": hosttest.Gone}))
		var got, ranges []string
		for _, u := range all {
			got = append(got, short(u.Described))
			for _, r := range u.Ranges {
				text := fmt.Sprintf("%#x-%#x %s %s", r.Start, r.End, r.Type, r.Kind)
				for _, d := range r.Devices {
					text += fmt.Sprintf(" %s/%v", d.Name, d.Relaxable)
				}
				ranges = append(ranges, text)
			}
			if u.Active {
				t.Errorf("%s: %+v is active", name, u)
			}
		}

		if !slices.Equal(got, c.want) || !slices.Equal(ranges, c.ranges) {
			t.Errorf("%s:\n%q %q\nwant\n%q %q", name, got, ranges, c.want, c.ranges)
		}
	}
}

// AMD's two words of features are told apart whatever the kernel's order is.
func TestFeatureOrder(t *testing.T) {
	const efr, efr2 = acpi.EFR(0x246577efa2254afa), acpi.EFR2(0x10)
	one, two := fmt.Sprintf("%x:%x", uint64(efr), uint64(efr2)), fmt.Sprintf("%x:%x", uint64(efr2), uint64(efr))
	for name, c := range map[string]struct {
		text    string
		image   acpi.EFR
		release string
		second  bool
	}{
		"one word":          {"246577efa2254afa", 0, "5.15.0", false},
		"6.12":              {one, 0, "6.12.1", true},
		"6.1":               {two, 0, "6.1.0-30-amd64", true},
		"6.1, told wrongly": {two, 0, "6.12.0", true}, // a backport: only one can be an EFR
		"by the table":      {two, efr, "6.12.0", true},
		"no release":        {one, 0, "", true},
	} {
		got, second, ok := amdFeatures(c.text, c.image, c.release)
		if !ok || got != efr || (second != nil) != c.second || second != nil && *second != efr2 {
			t.Errorf("%s: %x, %v, %v", name, got, second, ok)
		}
	}

	// Both may be one: then the table, and without it the version, decides.
	both := "c0:40"
	if got, _, _ := amdFeatures(both, 0x40, "6.12.0"); got != 0x40 {
		t.Errorf("by the table: %x", got)
	}
	if got, _, _ := amdFeatures(both, 0, "6.1.0"); got != 0x40 {
		t.Errorf("by an old kernel: %x", got)
	}
	if got, _, _ := amdFeatures(both, 0, "6.12.0"); got != 0xc0 {
		t.Errorf("by a new kernel: %x", got)
	}
	if _, _, ok := amdFeatures("", 0, "6.12.0"); ok {
		t.Error("nothing is features")
	}
}

// A unit of the kernel's is found in the table, and its registers are understood.
func TestUnits(t *testing.T) {
	dmar := map[string][]byte{"DMAR": hosttest.ACPITable("DMAR", 1, "2605 00000000000000000000",
		hosttest.DMARBlock(0, "00 00 0000 0000d9fe00000000 0108000000000200"),
		hosttest.DMARBlock(0, "01 00 0000 0010d9fe00000000"))}
	h := firmwareHost(t, dmar, hosttest.Tree{
		"sys/class/iommu/ivhd0":                                hosttest.Gone,
		"sys/class/iommu/dmar1":                                "-> ../../devices/virtual/iommu/dmar1",
		"sys/devices/virtual/iommu/dmar1/intel-iommu/address":  "fed91000\n",
		"sys/devices/virtual/iommu/dmar1/intel-iommu/cap":      "d2008c40660462\n",
		"sys/devices/virtual/iommu/dmar1/intel-iommu/ecap":     "f050da\n",
		"sys/devices/virtual/iommu/dmar1/devices/0000:03:00.0": "-> ../../../../pci0000:00/0000:00:1c.4/0000:03:00.0",
		"sys/kernel/iommu_groups/4/reserved_regions":           "0x00000000fee00000 0x00000000feefffff msi\n",
	})
	all, _ := units(t, h)
	if len(all) != 2 || all[0].Name != "dmar1" || all[0].Block != 72 || all[1].Active {
		t.Fatalf("units: %+v", all)
	}
	u := all[0]
	f := u.Features
	if u.Cap == nil || *f.InputBits != 39 || *f.PhysicalBits != 39 || !*f.InterruptRemapping || !*f.X2APIC ||
		*f.PostedInterrupts ||
		*f.DirtyTracking || *f.ATS || *f.Emulated || *f.FiveLevels || f.SNP != nil || !*f.SnoopControl ||
		*f.PASIDBits != 0 {
		t.Errorf("features: %+v %v %v", f, u.Cap.Names(), u.ECap.Names())
	}
	if len(u.Windows) != 1 || u.Windows[0].Type != "msi" || short(u.Devices) != "03:00.0" {
		t.Errorf("windows %v, devices %v", u.Windows, u.Devices)
	}
}

// What a table says that cannot be so on this host is told.
func TestCheckFirmware(t *testing.T) {
	const ivhd = "4000 0000f0fd00000000 0000 0000 00000000 fa4a25a2ef776524 0000000000000000"
	ivrs := func(id, entries string) map[string][]byte {
		return map[string][]byte{"IVRS": hosttest.ACPITable("IVRS", 2, "43302000 0000000000000000",
			hosttest.IVRSBlock("11 00", id+ivhd+entries))}
	}

	dmar := func(blocks ...[]byte) map[string][]byte {
		return map[string][]byte{"DMAR": hosttest.ACPITable("DMAR", 1, "2605 00000000000000000000", blocks...)}
	}

	all := hosttest.DMARBlock(0, "01 00 0000 0010d9fe00000000")
	for name, c := range map[string]struct {
		tables map[string][]byte
		want   string
	}{
		"sound":         {ivrs("0200", "01000000"), ""},
		"no function":   {ivrs("a100", "01000000"), "it has an IOMMU at 0000:00:14.1, where no"},
		"no IOMMU's":    {ivrs("a000", "01000000"), "it has an IOMMU at 0000:00:14.0, which has the class 0c0330"},
		"no entries":    {ivrs("0200", ""), "covers no device"},
		"other devices": {ivrs("0200", "02ff1f00"), "cover none of this host's devices"},
		"no IOMMU":      {dmar(hosttest.DMARBlock(2, "01 00 0000")), "it describes no IOMMU"},
		"no address":    {dmar(hosttest.DMARBlock(0, "01 00 0000 0000000000000000")), "are at 0x0"},
		"upside down": {dmar(all,
			hosttest.DMARBlock(1, "0000 0000 00706c6e00000000 ff0f6c6e00000000 0108000000001400")),
			"from 0x6e6c7000 to 0x6e6c0fff"},
	} {
		h := firmwareHost(t, c.tables, nil)
		topology, err := Scan(h)
		if err != nil {
			t.Fatal(err)
		}
		got := CheckFirmware(h, topology, ReadFirmware(h))
		if (len(got) == 0) != (c.want == "") || len(got) > 0 && !strings.Contains(got[0].String(), c.want) {
			t.Errorf("%s: %v, want %q", name, got, c.want)
		}
	}
}

// The tables of real machines have nothing that is taken for wrong.
func TestRealTablesAreRight(t *testing.T) {
	var files []string
	for _, folder := range append(filepath.SplitList(os.Getenv("VIADUCT_ACPI_TABLES")), "../../shared/acpi-tables") {
		found, err := filepath.Glob(filepath.Join(folder, "*.dat"))
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, found...)
	}
	if len(files) == 0 {
		t.Skip("the tables of real machines are not at hand (VIADUCT_ACPI_TABLES, ../../shared/acpi-tables)")
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		table, err := acpi.Parse(b)
		if err != nil {
			t.Fatal(err)
		}
		var c faults
		c.blocks(table)
		if len(c.out) > 0 {
			t.Errorf("%s: %v", file, c.out)
		}
	}
}
