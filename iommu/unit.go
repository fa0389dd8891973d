package iommu

import (
	"path"
	"slices"
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
// "dmar%d", arm-smmu-v3.c "smmu3.%pa", arm-smmu.c "smmu.%pa". Device is the device that a unit is of: virtio-iommu.c
// gives its unit the name of the virtio device's parent, as 0000:00:05.0.
func kindOf(name, device string) UnitKind {
	for _, k := range [...]struct {
		prefix string
		kind   UnitKind
	}{{"ivhd", KindAMDVi}, {"dmar", KindVTd}, {"smmu", KindSMMU}, {"virtio", KindVirtio}} {
		if strings.HasPrefix(name, k.prefix) {
			return k.kind
		}
	}
	if strings.HasPrefix(device, "virtio") {
		return KindVirtio
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
		device, err := optional(h.LinkBase(path.Join(unitsDir, n, "device")))
		if err != nil {
			return nil, err
		}
		units[i] = Unit{n, kindOf(n, device)}
	}
	return units, nil
}

// LateGroups reports whether a device without a driver may be in no group and get one when a driver is bound to it: so
// it is before Linux 6.15 with all IOMMUs but AMD's and Intel's.
func (t *Topology) LateGroups() bool {
	return slices.ContainsFunc(t.Units, func(u Unit) bool { return u.Kind != KindAMDVi && u.Kind != KindVTd })
}

const irqDir = "sys/kernel/irq"

// readInterruptRemapping tells whether interrupts are remapped. Nil if no interrupt tells.
func readInterruptRemapping(h *Host) (*bool, error) {
	_, chip, err := InterruptController(h)
	if err != nil || chip == "" {
		return nil, err
	}
	on, _ := remaps(chip)
	return &on, nil
}

// InterruptController is the first interrupt controller, by the file that names it, that tells whether interrupts are
// remapped; "" if none does. Both x86 drivers put "IR-" before the names of the IO-APIC and of MSI when they remap
// interrupts (drivers/iommu/amd/iommu.c, intel/irq_remapping.c). On ARM an interrupt translation service tells devices
// apart, and GICv2m does not (drivers/irqchip/irq-gic-v3-its.c, irq-gic-v2m.c).
func InterruptController(h *Host) (file, chip string, err error) {
	names, err := h.Names(irqDir)
	if host.Absent(err) {
		return "", "", nil
	}
	if err != nil {
		return "", "", err
	}
	for _, n := range names {
		file := path.Join(irqDir, n, "chip_name")
		chip, err := h.String(file)
		if err != nil {
			continue
		}
		if _, known := remaps(chip); known {
			return file, chip, nil
		}
	}
	return "", "", nil
}

func remaps(chip string) (on, known bool) {
	switch {
	case strings.HasPrefix(chip, "ITS-"):
		return true, true
	case strings.HasPrefix(chip, "GICv2m-"):
		return false, true
	}
	name, remapped := strings.CutPrefix(chip, "IR-")
	return remapped, strings.HasPrefix(name, "IO-APIC") || (remapped && strings.HasPrefix(name, "PCI-MSI"))
}
