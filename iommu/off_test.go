package iommu

import (
	"slices"
	"strings"
	"testing"

	"viaduct/internal/host/hosttest"
)

// What turns an IOMMU on depends on the machine, on what its firmware and its kernel's command line say, and on where it
// runs; it is said with the words of that place.
func TestWhyOff(t *testing.T) {
	const (
		amd   = "vendor_id\t: AuthenticAMD\nflags\t\t: fpu svm\n\n"
		intel = "vendor_id\t: GenuineIntel\nflags\t\t: fpu vmx\n\n"
		guest = "vendor_id\t: GenuineIntel\nflags\t\t: fpu hypervisor\n\n"
		arm   = "aarch64\n"
	)
	ivrs := string(hosttest.ACPITable("IVRS", 2, "43302000 0000000000000000", hosttest.IVRSBlock("11 00",
		"0200 4000 0000f0fd00000000 0000 0000 00000000 fa4a25a2ef776524 0000000000000000 01000000")))
	dmar := string(hosttest.ACPITable("DMAR", 1, "2605 00000000000000000000",
		hosttest.DMARBlock(0, "01 00 0000 0010d9fe00000000")))
	broken := slices.Clone([]byte(ivrs))
	broken[0x32] = 0xff
	noSMMU := string(hosttest.ACPITable("IORT", 3, "01000000 30000000 00000000",
		hosttest.IORTNode(0, 1, 0, "00000000", "", 0)))
	smmu := string(hosttest.ACPITable("IORT", 3, "02000000 30000000 00000000",
		hosttest.IORTNode(4, 4, 1,
			"0000050900000000 00000000 00000000 0000000000000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000", "", 0),
		hosttest.IORTNode(2, 3, 2, "01000000 00 0000 03 00000000 00000000 30 0000 00",
			"00000000 ffff0000 00000000 30000000 00000000", 1)))
	viot := string(hosttest.ACPITable("VIOT", 0, "0200 3000 0000000000000000",
		hosttest.Bytes("03 00 1000 0000 0200 0000000000000000"),
		hosttest.Bytes("01 00 1800 00000000 0000 0000 0000 ffff 3000 000000000000")))
	const tables = "sys/firmware/acpi/tables/"
	debian := hosttest.Tree{"etc/default/grub": "GRUB_CMDLINE_LINUX=\"amd_iommu=off intel_iommu=off\"\n",
		"usr/sbin/update-grub": ""}
	const onGRUB = "from GRUB_CMDLINE_LINUX in /etc/default/grub, run `update-grub` and reboot"

	for name, c := range map[string]struct {
		tree hosttest.Tree
		want []string // parts of what is said
		not  []string
	}{
		"amd_iommu=off": {hosttest.Tree{tables + "IVRS": ivrs, "proc/cmdline": "quiet amd_iommu=off\n",
			"proc/cpuinfo": amd}.With(debian),
			[]string{"amd_iommu=off on the kernel's command line", "remove amd_iommu=off " + onGRUB}, []string{"menu"}},
		// AMD's parser keeps "off", whatever follows; of Intel's on and off the last one counts.
		"amd_iommu=off amd_iommu=on": {hosttest.Tree{tables + "IVRS": ivrs,
			"proc/cmdline": "amd_iommu=off amd_iommu=on\n"}.With(debian),
			[]string{"amd_iommu=off on the kernel's command line", "remove amd_iommu=off " + onGRUB}, nil},
		"amd_iommu=fullflush,off": {hosttest.Tree{tables + "IVRS": ivrs, "proc/cmdline": "amd-iommu=fullflush,off\n"},
			[]string{"change amd-iommu=fullflush,off to amd-iommu=fullflush in"}, nil},
		"intel_iommu=on intel_iommu=igfx_off": {hosttest.Tree{tables + "DMAR": dmar,
			"proc/cmdline": "intel_iommu=on intel_iommu=igfx_off\n"},
			[]string{"did not take it"}, []string{"add "}},
		"intel_iommu=off,on": {hosttest.Tree{tables + "DMAR": dmar, "proc/cmdline": "intel_iommu=off,on\n"},
			[]string{"did not take it"}, nil},
		"intel_iommu=on intel_iommu=off": {hosttest.Tree{tables + "DMAR": dmar,
			"proc/cmdline": "intel_iommu=on intel_iommu=off\n"},
			[]string{"intel_iommu=off on the kernel's command line turns it off", "remove intel_iommu=off"}, nil},
		"DMAR, and the command line is not known": {hosttest.Tree{tables + "DMAR": dmar},
			[]string{"is not known", "intel_iommu=on"},
			[]string{"this kernel uses it only"}},
		// The kernel only warns of this sum, and refuses such an IVRS.
		"DMAR, and its sum is wrong": {hosttest.Tree{tables + "DMAR": dmar[:9] + "\xff" + dmar[10:],
			"proc/cmdline": "intel_iommu=off\n"},
			[]string{"remove intel_iommu=off"}, []string{"firmware's"}},
		"Stoney Ridge": {hosttest.Tree{tables + "IVRS": ivrs, "proc/cmdline": "quiet\n",
			"viaduct/kernel-lines": "AMD-Vi: Disable IOMMU on Stoney Ridge\n"}, []string{"add amd_iommu=force_enable"},
			[]string{"firmware helps"}},
		"AMD, off in the firmware and on the command line": {hosttest.Tree{"proc/cpuinfo": amd,
			"proc/cmdline": "amd_iommu=off iommu=off\n"},
			[]string{"\"IOMMU\" (AMD-Vi)", "then remove amd_iommu=off", "then remove iommu=off"}, nil},
		"Arm, the module is not loaded": {hosttest.Tree{"proc/sys/kernel/arch": arm, tables + "IORT": smmu,
			"boot/config-6.12.0": "CONFIG_ARM_SMMU_V3=m\n"}, []string{"arm_smmu_v3 in the initramfs"},
			[]string{"firmware helps"}},
		"iommu=off": {hosttest.Tree{tables + "IVRS": ivrs, "proc/cmdline": "iommu=off\n"},
			[]string{"remove iommu=off"}, nil},
		"AMD, the kernel is without": {hosttest.Tree{tables + "IVRS": ivrs, "proc/cmdline": "quiet\n",
			"boot/config-6.12.0": "CONFIG_INTEL_IOMMU=y\n"}, []string{"built without CONFIG_AMD_IOMMU"},
			[]string{"iommu="}},
		"AMD, refused": {hosttest.Tree{tables + "IVRS": ivrs, "proc/cmdline": "quiet\n",
			"viaduct/kernel-lines": "AMD-Vi: Failed to allocate\nvfio: x\n"}, []string{"did not take it", "dmesg"},
			[]string{"iommu=on", "iommu=off", "menu"}},
		"AMD, a broken table": {hosttest.Tree{tables + "IVRS": string(broken)},
			[]string{"IVRS table is not sound", "update the firmware"}, nil},
		"AMD, off in the firmware": {hosttest.Tree{"proc/cpuinfo": amd, "proc/sys/kernel/arch": "x86_64\n",
			"proc/cmdline": "quiet\n"},
			[]string{"describes no IOMMU", "\"IOMMU\" (AMD-Vi)"}, []string{"VT-d", "iommu="}},
		"DMAR and nothing": {hosttest.Tree{tables + "DMAR": dmar, "proc/cmdline": "quiet\n", "proc/cpuinfo": intel,
			"boot/config-6.12.0": "CONFIG_INTEL_IOMMU=y\n"}.With(debian), []string{"VT-d on",
			"this kernel uses it only",
			"add intel_iommu=on to GRUB_CMDLINE_LINUX in /etc/default/grub, run `update-grub`"}, []string{"menu"}},
		"intel_iommu=off": {hosttest.Tree{tables + "DMAR": dmar, "proc/cmdline": "intel_iommu=off\n"}.With(debian),
			[]string{"remove intel_iommu=off " + onGRUB}, []string{"menu"}},
		"intel_iommu=on,sm_on, refused": {hosttest.Tree{tables + "DMAR": dmar,
			"proc/cmdline": "intel_iommu=on,sm_on\n"},
			[]string{"did not take it", "dmesg"}, []string{"add "}},
		"Intel, on by default, refused": {hosttest.Tree{tables + "DMAR": dmar, "proc/cmdline": "quiet\n",
			"boot/config-6.12.0":   "CONFIG_INTEL_IOMMU=y\nCONFIG_INTEL_IOMMU_DEFAULT_ON=y\n",
			"viaduct/kernel-lines": "DMAR: dmar0: Failed to map registers\nDMAR: No RMRR found\n"},
			[]string{"Failed to map"}, []string{"add ", "RMRR"}},
		"Intel, off in the firmware": {hosttest.Tree{"proc/cpuinfo": intel, "proc/cmdline": "quiet\n"},
			[]string{"\"VT-d\"", "then add intel_iommu=on"}, []string{"AMD"}},
		"nothing known": {hosttest.Tree{}, []string{"\"IOMMU\" (AMD-Vi) or \"VT-d\""}, nil},
		"Arm": {hosttest.Tree{"proc/sys/kernel/arch": arm}, []string{"turn on the SMMU"},
			[]string{"VT-d", "AMD"}},
		"Arm, an IORT without SMMU": {hosttest.Tree{"proc/sys/kernel/arch": arm, tables + "IORT": noSMMU},
			[]string{"describes no SMMU"}, []string{"VT-d"}},
		"Arm, QEMU": {hosttest.Tree{"proc/sys/kernel/arch": arm, tables + "IORT": noSMMU,
			"sys/class/dmi/id/sys_vendor": "QEMU\n"},
			[]string{"QEMU gives this guest", "iommu=smmuv3"}, []string{"intel"}},
		"Arm, not taken": {hosttest.Tree{"proc/sys/kernel/arch": arm, tables + "IORT": smmu,
			"boot/config-6.12.0": "CONFIG_VFIO=m\n"},
			[]string{"CONFIG_ARM_SMMU_V3"}, nil},
		"Arm, device tree": {hosttest.Tree{"proc/sys/kernel/arch": arm, "sys/firmware/devicetree/base/": ""},
			[]string{"device tree"}, nil},
		"virtio-iommu": {hosttest.Tree{tables + "VIOT": viot}, []string{"load the module virtio_iommu"}, nil},
		"EC2": {hosttest.Tree{"proc/cpuinfo": guest, "sys/class/dmi/id/sys_vendor": "Amazon EC2\n",
			"sys/class/dmi/id/product_name": "m5.large\n"},
			[]string{".metal"}, []string{"menu"}},
		"Azure": {hosttest.Tree{"proc/cpuinfo": guest, "sys/class/dmi/id/sys_vendor": "Microsoft Corporation\n",
			"sys/class/dmi/id/product_name": "Virtual Machine\n"}, []string{"Hyper-V"}, []string{"menu"}},
		"VMware": {hosttest.Tree{"proc/cpuinfo": guest, "sys/class/dmi/id/sys_vendor": "VMware, Inc.\n"},
			[]string{"Expose IOMMU"}, []string{"menu"}},
		"QEMU": {hosttest.Tree{"proc/cpuinfo": guest, "sys/class/dmi/id/sys_vendor": "QEMU\n"},
			[]string{"intremap=on"}, []string{"menu"}},
		"a guest of anybody": {hosttest.Tree{"proc/cpuinfo": guest}, []string{"the hypervisor gives this guest"},
			[]string{"menu"}},
		"container": {hosttest.Tree{"run/systemd/container": "lxc\n", "proc/cpuinfo": amd},
			[]string{"container", "on the host itself"}, []string{"menu"}},
		"Xen's dom0": {hosttest.Tree{"sys/hypervisor/type": "xen\n", "proc/xen/capabilities": "control_d\n",
			tables + "IVRS": ivrs},
			[]string{"Xen has the IOMMU to itself", "xl"}, []string{"menu"}},
		"a Xen guest": {hosttest.Tree{"sys/hypervisor/type": "xen\n", "proc/xen/capabilities": "\n"},
			[]string{"Xen gives this guest"}, []string{"menu"}},
		"WSL": {hosttest.Tree{"proc/sys/kernel/osrelease": "6.6.87.2-microsoft-standard-WSL2\n"},
			[]string{"Windows Subsystem"}, []string{"menu"}},
		"acpi=off": {hosttest.Tree{"proc/cmdline": "acpi=off\n", "proc/cpuinfo": amd}, []string{"remove acpi=off"},
			[]string{"menu"}},
	} {
		tree := hosttest.Made(hosttest.PCI{At: "0000:00:00.2", ID: "1022:1481", Class: "080600", Group: -1},
			hosttest.PCI{At: "0000:00:02.0", ID: "8086:4680", Class: "030000", Group: -1}).With(hosttest.Tree{
			"sys/class/iommu/ivhd0": hosttest.Gone, "sys/devices/pci0000:00/0000:00:00.2/iommu/": hosttest.Gone,
		}).With(c.tree)
		h, err := Open(tree.Dir(t))
		if err != nil {
			t.Fatal(err)
		}
		topology, err := Scan(h)
		if err != nil {
			t.Fatal(err)
		}
		off := WhyOff(h, topology)
		got := off.String()
		h.Close()
		for _, part := range c.want {
			if !strings.Contains(got, part) {
				t.Errorf("%s: %q does not have %q", name, got, part)
			}
		}
		for _, part := range c.not {
			if strings.Contains(got, part) {
				t.Errorf("%s: %q has %q", name, got, part)
			}
		}
		if off.Why == "" || off.Hint == "" {
			t.Errorf("%s: %+v", name, off)
		}
	}
}

// AMD's IOMMU needs no parameter, and its owners are told of none to add, whatever the host is like.
func TestNoParameterForAMD(t *testing.T) {
	ivrs := string(hosttest.ACPITables()["IVRS"])
	for _, line := range []string{"quiet", "amd_iommu=off", "iommu=off", "iommu=pt", "intremap=off"} {
		for _, table := range []string{ivrs, ""} {
			tree := hosttest.Tree{"sys/kernel/": "", "proc/cmdline": line + "\n",
				"proc/cpuinfo": "vendor_id\t: AuthenticAMD\n\n"}
			if table != "" {
				tree["sys/firmware/acpi/tables/IVRS"] = table
			}
			h, err := Open(tree.Dir(t))
			if err != nil {
				t.Fatal(err)
			}
			topology, err := Scan(h)
			if err != nil {
				t.Fatal(err)
			}
			got := WhyOff(h, topology).String()
			h.Close()
			if strings.Contains(got, "iommu=on") || strings.Contains(got, "add ") || strings.Contains(got, "iommu=pt") {
				t.Errorf("%s: %s", line, got)
			}
		}
	}
}

// Why interrupts are not remapped, and what helps, is told by the same means.
func TestWhyNotRemapped(t *testing.T) {
	amd, arm, virtio := []Unit{{"ivhd0", KindAMDVi}}, []Unit{{"smmu3.0x1", KindSMMU}},
		[]Unit{{"0000:00:03.0", KindVirtio}}
	noRemapping := string(hosttest.ACPITable("DMAR", 1, "2604 00000000000000000000",
		hosttest.DMARBlock(0, "01 00 0000 0010d9fe00000000")))
	for name, c := range map[string]struct {
		tree  hosttest.Tree
		units []Unit
		want  string
	}{
		"intremap=off": {hosttest.Tree{"proc/cmdline": "intremap=off\n"}, amd, "remove intremap=off"},
		"nointremap":   {hosttest.Tree{"proc/cmdline": "nointremap\n"}, amd, "remove nointremap"},
		"GICv2":        {hosttest.Tree{}, arm, "gic-version=3"},
		"virtio-iommu": {hosttest.Tree{}, virtio, "another IOMMU"},
		"no IRQ_REMAP": {hosttest.Tree{"boot/config-6.12.0": "CONFIG_AMD_IOMMU=y\n"}, amd, "CONFIG_IRQ_REMAP"},
		"no southbridge": {hosttest.Tree{"viaduct/kernel-lines": "AMD-Vi: [Firmware Bug]: : No southbridge IOAPIC found\nAMD-Vi: Disabling interrupt remapping\n"},
			amd, "leaves out an IO-APIC"},
		"erratum": {hosttest.Tree{"viaduct/kernel-lines": "DMAR-IR: This system BIOS has enabled interrupt remapping on a chipset that contains an erratum\n"}, amd, "no cure"},
		"DMAR": {hosttest.Tree{"sys/firmware/acpi/tables/DMAR": noRemapping}, []Unit{{"dmar0", KindVTd}},
			"says that the machine has none"},
		"a guest":      {hosttest.Tree{"proc/cpuinfo": "flags\t: hypervisor\n"}, amd, "intremap=on"},
		"nobody knows": {hosttest.Tree{}, amd, "firmware's menu"},
	} {
		h, err := Open(hosttest.Tree{"sys/kernel/": "", "proc/sys/kernel/osrelease": "6.12.0\n"}.With(c.tree).Dir(t))
		if err != nil {
			t.Fatal(err)
		}
		got := WhyNotRemapped(h, &Topology{Units: c.units}).String()
		h.Close()
		if !strings.Contains(got, c.want) {
			t.Errorf("%s: %q does not have %q", name, got, c.want)
		}
	}
}
