package iommu

import (
	"path"
	"strings"

	"viaduct/internal/host"
)

// Unit is an IOMMU: one entry of /sys/class/iommu.
type Unit struct {
	Name string // the kernel's: ivhd0, dmar1, smmu3.0x0000000009050000
	Kind UnitKind
}

// UnitKind is the maker's architecture of an IOMMU.
type UnitKind string

// The kinds of IOMMU; every one that is not known is KindOther.
const (
	KindAMDVi  UnitKind = "amd-vi"
	KindVTd    UnitKind = "vt-d"
	KindSMMU   UnitKind = "smmu"
	KindVirtio UnitKind = "virtio-iommu"
	KindOther  UnitKind = "other"
)

// kindOf goes by the names that the kernel's drivers give their units: drivers/iommu/amd/init.c "ivhd%d", intel/dmar.c
// "dmar%d", arm-smmu-v3.c "smmu3.%pa", arm-smmu.c "smmu.%pa"; virtio-iommu.c uses the virtio device's own name.
func kindOf(name string) UnitKind {
	for _, k := range [...]struct {
		prefix string
		kind   UnitKind
	}{{"ivhd", KindAMDVi}, {"dmar", KindVTd}, {"smmu", KindSMMU}, {"virtio", KindVirtio}} {
		if strings.HasPrefix(name, k.prefix) {
			return k.kind
		}
	}
	return KindOther
}

func readUnits(h *Host) ([]Unit, error) {
	names, err := h.Names(unitsDir)
	if err != nil && !host.Absent(err) {
		return nil, err
	}
	units := make([]Unit, len(names))
	for i, n := range names {
		units[i] = Unit{n, kindOf(n)}
	}
	return units, nil
}

const irqDir = "sys/kernel/irq"

// readInterruptRemapping tells by the name of an interrupt's controller: both x86 drivers put "IR-" before the names of
// the IO-APIC and of MSI when they remap interrupts (drivers/iommu/amd/iommu.c, intel/irq_remapping.c). The first
// interrupt of one of the two decides, as remapping is on for all or for none. Other architectures have no such mark:
// nil.
func readInterruptRemapping(h *Host) (*bool, error) {
	names, err := h.Names(irqDir)
	if host.Absent(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for _, n := range names {
		chip, err := h.String(path.Join(irqDir, n, "chip_name"))
		if err != nil {
			continue
		}
		if on, known := remaps(chip); known {
			return &on, nil
		}
	}
	return nil, nil
}

func remaps(chip string) (on, known bool) {
	name, remapped := strings.CutPrefix(chip, "IR-")
	return remapped, strings.HasPrefix(name, "IO-APIC") || (remapped && strings.HasPrefix(name, "PCI-MSI"))
}
