package iommu

import (
	"path"
	"slices"
	"strings"

	"viaduct/iommu/acpi"
)

// WhyNotRemapped says why the interrupts of devices are not kept apart on a host that has an IOMMU, and what to do. It
// is only for a host on which they are not: see Topology.
func WhyNotRemapped(h *Host, t *Topology) Off { return readSetting(h).whyNotRemapped(t) }

// remapLines are words of the kernel's that say why it does not remap interrupts (drivers/iommu/amd/init.c,
// check_ioapic_information; drivers/iommu/intel/irq_remapping.c), with what then helps.
var remapLines = []struct{ words, hint string }{
	{"No southbridge IOAPIC", "update the firmware, whose IVRS table leaves out an IO-APIC"},
	{"not in IVRS table", "update the firmware, whose IVRS table leaves out an IO-APIC"},
	{"ioapic", "update the firmware, whose DMAR table leaves out an IO-APIC"}, // has no mapping iommu
	{"chipset that contains an erratum", "there is no cure: this chipset cannot do it; use another machine"},
	{"Failed to enable irq remapping", "update the firmware"},
	{"Failed to setup irq remapping", "update the firmware"},
}

func (s *setting) whyNotRemapped(t *Topology) Off {
	if s.last("intremap", "on", "off") == "off" {
		return s.turnedOff("intremap", "off")
	}
	if slices.Contains(s.words, "nointremap") {
		return s.turnedOff("nointremap", "")
	}
	has := func(kind UnitKind) bool {
		return slices.ContainsFunc(t.Units, func(u Unit) bool { return u.Kind == kind })
	}
	switch {
	case s.isArm() || has(KindSMMU):
		return Off{
			Why:  "this machine's interrupt controller has no ITS, which tells devices apart (it is a GICv2m)",
			Hint: "there is no cure on such a machine; a QEMU guest gets one by -machine virt,gic-version=3",
		}
	case has(KindVirtio):
		return Off{
			Why:  "a virtio-iommu does not remap interrupts",
			Hint: "give this guest another IOMMU where it is defined (QEMU: -device intel-iommu,intremap=on)",
		}
	case s.lacks("CONFIG_IRQ_REMAP"):
		return Off{
			Why: "this kernel was built without CONFIG_IRQ_REMAP", File: "boot/config-" + s.release,
			Value: "# CONFIG_IRQ_REMAP is not set", Hint: "boot a kernel that has it",
		}
	}
	for _, l := range remapLines {
		line := s.said(l.words)
		if line != "" && (l.words != "ioapic" || strings.Contains(line, "no mapping iommu")) {
			return Off{Why: "the kernel says: " + line, File: "dev/kmsg", Value: line, Hint: l.hint}
		}
	}

	o := Off{
		Why: "the kernel does not say why",
		Hint: "turn on interrupt remapping, or x2APIC, in the firmware's menu, and update the firmware (`dmesg | " +
			"grep -i -e remapping -e AMD-Vi -e DMAR`)",
	}
	if f := s.tables["DMAR"]; f.Table != nil {
		if d, ok := f.Table.Fields.(*acpi.DMAR); ok && !d.Flags.InterruptRemapping() {
			o.Why = "the firmware's DMAR table says that the machine has none"
			o.File, o.Value = path.Join(tablesDir, "DMAR"), "flags without INTR_REMAP"
		}
	}
	if s.hypervisor {
		o.Hint = "turn it on where this guest is defined (QEMU: -machine q35,kernel-irqchip=split, and intremap=on " +
			"of its IOMMU)"
	}
	return o
}
