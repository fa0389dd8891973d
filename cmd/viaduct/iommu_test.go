package main

import (
	"strings"
	"testing"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

// What the firmware reserves is told by its kind, also of devices that are not there, and what it takes away is.
func TestIOMMUOfTables(t *testing.T) {
	const ivhd = "0200 4000 0000f0fd00000000 0000 0000 01000000 fa4a25a2ef777524 0000000000000000 01000000"
	const at = " 000000000000 0000007600000000 0000020000000000"
	ivrs := hosttest.ACPITable("IVRS", 2, "43302000 0000000000000000", hosttest.IVRSBlock("11 00", ivhd),
		hosttest.IVRSBlock("21 07", "0001 0000 0000"+at), hosttest.IVRSBlock("21 08", "07c4 0000 0000"+at))
	tree := hosttest.Made(
		hosttest.PCI{At: "0000:00:00.2", ID: "1022:1481", Class: "080600", Group: -1},
		hosttest.PCI{At: "0000:00:01.0/0000:01:00.0", ID: "8086:1521", Class: "020000", Group: 1},
	).With(hosttest.Tree{"sys/firmware/acpi/tables/IVRS": string(ivrs), "sys/class/iommu/ivhd0": hosttest.Gone})
	stdout, all := on(t, tree.Dir(t), "iommu")
	for _, want := range []string{
		"for 0000:01:00.0: IVMD, so no guest can have them",
		"for 0000:c4:00.7, behind no IOMMU here: IVMD that is left out of translation, so no guest",
		"dirty pages no:", "v1 tables no:",
	} {
		if !strings.Contains(strings.Join(strings.Fields(stdout), " "), want) {
			t.Errorf("it lacks %q:\n%s", want, all)
		}
	}
	for bits, want := range map[int]string{1: "yes: 1 bit: ", 20: "yes: 20 bits: ", 0: "no: "} {
		u := &iommu.UnitDetails{Features: iommu.Features{PASIDBits: &bits}}
		if lines := featureLines(u); len(lines) != 1 || !strings.HasPrefix(lines[0].text, want) {
			t.Errorf("%d bits: %+v", bits, lines)
		}
	}
}
