package doctor

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"

	"viaduct/iommu"
	"viaduct/iommu/acpi"
)

// healthy is a host with an AMD IOMMU on which nothing is wrong, and a NIC that was asked about.
func healthy() *Facts {
	group := 1
	nic := iommu.Device{
		Name: "0000:01:00.0", Address: iommu.Address{Bus: 1}, PCI: true, Driver: "igb", Group: &group, NUMANode: new(0),
		ID: iommu.ID{Class: 0x020000}, SRIOV: &iommu.SRIOV{Total: 7},
	}
	t := &iommu.Topology{
		Units:              []iommu.Unit{{Name: "ivhd0", Kind: iommu.KindAMDVi}},
		Groups:             []iommu.Group{{ID: 1, Type: "DMA", Devices: []iommu.Device{nic}}},
		InterruptRemapping: new(true),
	}
	d := &t.Groups[0].Devices[0]
	modules := map[string]Module{}
	for _, m := range []string{"vfio", "vfio_pci", "vfio_iommu_type1", "iommufd"} {
		modules[m] = Module{Available: true}
	}
	return &Facts{
		Topology: t, Selected: []*iommu.Device{d}, Wanted: []*iommu.Device{d}, Whole: true, Live: true, Arch: "x86_64",
		Interrupt: Evidence{"sys/kernel/irq/0/chip_name", "IR-IO-APIC"}, Release: "6.12.1", Words: []string{"quiet"},
		Config:  map[string]string{"CONFIG_VFIO_PCI": "m"},
		Tables:  []iommu.Firmware{{Signature: "IVRS", Table: &acpi.Table{Fields: &acpi.IVRS{}}}},
		Modules: modules, Params: map[string]string{}, Lockdown: "none", Secure: new(false), LockKnown: true,
		HugePages: []HugePages{{Size: 2 << 20}}, NUMANodes: 2, KVM: new(true),
		PFs:    []PF{{Name: d.Name, Total: 7, LastBus: 1, Buses: 1, Port: "0000:00:01.0"}},
		Resets: map[string]iommu.Reset{d.Name: {Way: iommu.ResetFunction, Methods: []string{"flr"}}},
		Power:  map[string]string{d.Name: "D0"},
	}
}

// off takes the host's IOMMU away.
func off(f *Facts, why, hint string) {
	f.Topology.Units, f.Topology.Ungrouped = nil, []iommu.Device{f.Topology.Groups[0].Devices[0]}
	f.Topology.Groups = nil
	f.Off = iommu.Off{Why: why, File: "proc/cmdline", Value: "x", Hint: hint}
}

func TestHealthy(t *testing.T) {
	checks := Examine(healthy())
	for _, c := range checks {
		if c.Status != Passed || c.Text == "" {
			t.Errorf("%+v", c)
		}
	}
	if !Healthy(checks) || len(checks) != 23 {
		t.Errorf("%d checks", len(checks))
	}
}

// Of each fault there is one check that tells it before all others, says what shows it, and what to do.
func TestFaults(t *testing.T) {
	for name, c := range map[string]struct {
		fault  func(f *Facts)
		check  string
		status Status
		text   string
		hint   string
	}{
		"no table": {func(f *Facts) { f.Tables = nil; off(f, "the firmware describes no IOMMU", "turn it on") },
			"table", Failed, "describes no IOMMU", "turn it on"},
		"unsound table": {func(f *Facts) {
			off(f, "x", "y")
			f.Tables[0].Err = fmt.Errorf("%w: cut", acpi.ErrTable)
		}, "table", Failed, "cut", "firmware"},
		"unsound table, and an IOMMU": {func(f *Facts) { f.Tables[0].Err = fmt.Errorf("%w: cut", acpi.ErrTable) },
			"table", Warned,
			"takes it all the same", "firmware"},
		"table not shown": {func(f *Facts) {
			f.Tables = nil
			f.Topology.Units = []iommu.Unit{{Name: "ivhd0", Kind: iommu.KindAMDVi}}
		},
			"table", Unknown, "not shown", ""},
		"hidden table": {func(f *Facts) { f.Tables[0].Err = fs.ErrPermission; f.Tables[0].Table = nil }, "table",
			Unknown, "root", "root"},
		"unreadable table": {func(f *Facts) { f.Tables[0].Err = errors.New("broken"); f.Tables[0].Table = nil },
			"table", Unknown,
			"broken", ""},
		"wrong table": {func(f *Facts) {
			off(f, "x", "y")
			f.Faults = []iommu.Fault{{Signature: "IVRS", Offset: 48, Text: "it has an IOMMU at 00:1e.0"}}
		}, "table", Failed, "00:1e.0", "update the firmware"},
		"wrong table, and an IOMMU": {func(f *Facts) { f.Faults = []iommu.Fault{{Signature: "DMAR", Text: "a range"}} },
			"table", Warned, "a range", ""},
		"the kernel complains": {func(f *Facts) {
			off(f, "x", "y")
			f.Log = []string{"DMAR: [Firmware Bug]: Your BIOS is broken; DMAR reported at address fed90000 returns all ones!"}
		}, "table", Failed, "all ones", "firmware"},
		"no IOMMU where the table has it": {func(f *Facts) {
			off(f, "x", "y")
			f.Log = []string{"DMAR: Host address width 39",
				"DMAR: dmar0: No supported address widths. Not attempting DMA translation."}
		}, "table", Failed, "No supported address widths", "firmware"},
		"amd_iommu=off": {func(f *Facts) { off(f, "amd_iommu=off turns it off", "remove amd_iommu=off") }, "iommu",
			Failed, "amd_iommu=off", "remove"},
		"not covered": {func(f *Facts) { f.Selected[0].Group = nil }, "coverage", Failed, "0000:01:00.0", "slot"},
		"not covered, not asked about": {func(f *Facts) { f.Selected[0].Group = nil; f.Selected = nil },
			"coverage", Warned,
			"0000:01:00.0", ""},
		"left out, not asked about": {func(f *Facts) {
			f.Selected[0].Group, f.Selected = nil, nil
			f.Units = []iommu.UnitDetails{{Active: true, Table: "IVRS", Described: []string{"0000:02:00.0"}}}
		}, "coverage", Failed, "IVRS table leaves out 0000:01:00.0", "update the firmware"},
		"igfx_off": {func(f *Facts) { f.Selected[0].Group = nil; f.Words = []string{"intel_iommu=on,igfx_off"} },
			"coverage", Failed, "",
			"change intel_iommu=on,igfx_off to intel_iommu=on"},
		"noiommu groups": {func(f *Facts) { f.Topology.Groups[0].NoIOMMU = true }, "groups", Failed, "noiommu",
			"unbind"},
		"intremap=off": {func(f *Facts) {
			f.Topology.InterruptRemapping = new(false)
			f.NotRemapped = iommu.Off{Why: "intremap=off turns it off", Hint: "remove intremap=off"}
		}, "interrupt_remapping", Failed, "intremap=off", "remove intremap=off"},
		"remapping unknown": {func(f *Facts) { f.Topology.InterruptRemapping = nil }, "interrupt_remapping", Unknown,
			"not known", ""},
		"modules missing": {func(f *Facts) { f.Modules["vfio_pci"] = Module{} }, "vfio_modules", Failed,
			"vfio-pci", "install"},
		"kernel without":  {func(f *Facts) { f.Modules["vfio_pci"] = Module{}; f.Config = map[string]string{"CONFIG_X": "y"} }, "vfio_modules", Failed, "vfio-pci", "CONFIG_VFIO_PCI"},
		"modules unknown": {func(f *Facts) { f.Modules = nil }, "vfio_modules", Unknown, "not known", ""},
		"blacklisted": {func(f *Facts) {
			f.Rules = []ModuleRule{{Module: "vfio_pci", File: "etc/modprobe.d/x.conf", Line: "blacklist vfio-pci"}}
		}, "blacklist", Failed, "etc/modprobe.d/x.conf", "remove that line from /etc/modprobe.d/x.conf"},
		"blacklisted at boot": {func(f *Facts) {
			f.Rules = []ModuleRule{{Module: "vfio_pci", File: "proc/cmdline", Line: "modprobe.blacklist=vfio_pci"}}
		}, "blacklist", Failed, "modprobe.blacklist", "remove modprobe.blacklist=vfio_pci"},
		"blacklisted, and by name": {func(f *Facts) {
			f.Rules = []ModuleRule{{Module: "vfio_pci", File: "etc/modprobe.d/x.conf", Line: "blacklist vfio-pci"},
				{Module: "vfio", File: "etc/modprobe.d/y.conf", Line: "install vfio /bin/false", Hard: true}}
		}, "blacklist", Failed, "vfio cannot be loaded", "y.conf"},
		"blacklisted, and loaded": {func(f *Facts) {
			f.Modules["vfio_pci"] = Module{Loaded: true}
			f.Rules = []ModuleRule{{Module: "vfio_pci", File: "etc/modprobe.d/x.conf", Line: "blacklist vfio-pci"}}
		}, "blacklist", Warned, "vfio-pci is loaded", ""},
		"a command of the host's own": {func(f *Facts) {
			f.Rules = []ModuleRule{{Module: "vfio_pci", File: "etc/modprobe.d/x.conf",
				Line: "install vfio-pci /sbin/mine", Own: true}}
		}, "blacklist", Unknown, "is not known", "modprobe vfio-pci"},
		"RMRR": {func(f *Facts) {
			f.Direct = []GroupRange{{1, iommu.Region{Start: 1 << 20, End: 2<<20 - 1, Type: "direct"},
				[]string{"0000:01:00.0"}}}
		}, "direct_ranges", Failed, "0000:01:00.0", "firmware"},
		"RMRR, not asked about": {func(f *Facts) {
			f.Selected = nil
			f.Direct = []GroupRange{{1, iommu.Region{Start: 1 << 20, End: 2<<20 - 1, Type: "direct"},
				[]string{"0000:01:00.0"}}}
		}, "direct_ranges", Warned, "0000:01:00.0", ""},
		"IVMD, and an older kernel": {func(f *Facts) {
			f.Release = "6.1.0-44-amd64"
			f.Topology.Units = []iommu.Unit{{Name: "ivhd0", Kind: iommu.KindAMDVi}}
			f.Direct = []GroupRange{{1, iommu.Region{Start: 1 << 20, End: 2<<20 - 1, Type: "direct"},
				[]string{"0000:01:00.0"}}}
		}, "direct_ranges", Warned, "newer kernels refuse it", ""},
		"lockdown":          {func(f *Facts) { f.Lockdown = "integrity" }, "lockdown", Warned, "VFIO works", ""},
		"noiommu mode":      {func(f *Facts) { f.Params["sys/module/vfio/parameters/enable_unsafe_noiommu_mode"] = "Y" }, "unsafe_modes", Warned, "noiommu", "echo N"},
		"unsafe interrupts": {func(f *Facts) { f.Params["sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts"] = "Y" }, "unsafe_modes", Warned, "forge interrupts", "echo N"},
		"unsafe interrupts of iommufd": {func(f *Facts) { f.Params["sys/module/iommufd/parameters/allow_unsafe_interrupts"] = "Y" },
			"unsafe_modes", Warned, "allow_unsafe_interrupts of iommufd is on", "echo N > /sys/module/iommufd"},
		"no IOMMU, and a mode without one": {func(f *Facts) {
			off(f, "x", "y")
			f.Params["sys/module/vfio/parameters/enable_unsafe_noiommu_mode"] = "Y"
		}, "iommu", Failed, "", ""},
		"ACS override": {func(f *Facts) {
			f.Words = []string{"pcie_acs_override=downstream",
				"pcie_acs_override=id:1:2"}
		},
			"acs_override", Warned, "if this kernel has the patch", "remove pcie_acs_override=id:1:2"},
		"no free huge page": {func(f *Facts) { f.HugePages = []HugePages{{Size: 2 << 20, Total: 512}} },
			"huge_pages", Warned,
			"512 of 2 MiB", "vm.nr_hugepages"},
		"memlock": {func(f *Facts) { f.LockLimit = new(uint64(8 << 20)) }, "memlock", Warned, "8 MiB",
			"memlock unlimited"},
		"open node": {func(f *Facts) { f.Nodes = []Node{{"dev/vfio/vfio", 0o666}, {"dev/vfio/7", 0o666}} },
			"nodes", Warned, "/dev/vfio/7", "chmod"},
		"no room in memory": {func(f *Facts) { f.PFs[0].Unmapped = true }, "sriov_room", Failed, "memory",
			"pci=realloc"},
		"no room on buses": {func(f *Facts) { f.PFs[0].LastBus = 2 }, "sriov_room", Failed, "buses", "ARI"},
		"no reset": {func(f *Facts) { f.Resets["0000:01:00.0"] = iommu.Reset{Way: iommu.ResetNone} }, "reset",
			Warned, "nothing can reset it", ""},
		"D3cold": {func(f *Facts) { f.Power["0000:01:00.0"] = "D3cold" }, "power", Warned, "0000:01:00.0",
			"d3cold_allowed"},
		"boot display": {func(f *Facts) {
			f.Displays = []Display{{Device: "0000:01:00.0", What: "is the display this host started on"}}
		}, "boot_display", Warned, "started on", "firmware"},
		"blind":        {func(f *Facts) { f.Blind = "cannot see" }, "boot_display", Unknown, "cannot see", "root"},
		"no NUMA node": {func(f *Facts) { f.Wanted[0].NUMANode = nil }, "numa", Warned, "0000:01:00.0", ""},
		"old kernel": {func(f *Facts) {
			f.Release = "6.1.0"
			f.Units = []iommu.UnitDetails{{Features: iommu.Features{DirtyTracking: new(true)}}}
		}, "kernel_version", Warned, "6.1.0 is too old", "newer"},
		"no KVM, as Xen is there": {func(f *Facts) { f.KVM, f.Xen = new(false), true }, "kvm", Warned, "emulated",
			"without Xen"},
		"no KVM": {func(f *Facts) { f.KVM, f.CPUVirt = new(false), new(false) }, "kvm", Warned,
			"emulated", "SVM"},
		"unsigned modules": {func(f *Facts) {
			f.Secure, f.Unsigned = new(true),
				[]string{"lib/modules/x/nvidia.ko"}
		}, "vendor_modules", Warned, "nvidia.ko", "mokutil"},
	} {
		f := healthy()
		c.fault(f)
		checks := Examine(f)
		var first *Check
		for _, status := range []Status{Failed, Warned, Unknown} {
			for i := range checks {
				if first == nil && checks[i].Status == status {
					first = &checks[i]
				}
			}
		}

		if first == nil {
			t.Errorf("%s: nothing was found", name)
			continue
		}

		if first.Name != c.check || first.Status != c.status || !strings.Contains(first.Text, c.text) ||
			!strings.Contains(first.Hint, c.hint) {
			t.Errorf("%s: %+v, want %s %s with %q and %q", name, first, c.check, c.status, c.text, c.hint)
		}
		if first.Status == Failed && (first.Hint == "" || len(first.Evidence) == 0) {
			t.Errorf("%s: nothing shows it, or mends it: %+v", name, first)
		}
		if Healthy(checks) == (c.status == Failed) {
			t.Errorf("%s: healthy %v", name, Healthy(checks))
		}
	}
}

// What is not known is never passed.
func TestNothingKnown(t *testing.T) {
	checks := Examine(&Facts{Topology: &iommu.Topology{}, Off: iommu.Off{Why: "x", Hint: "y"}})
	// These say of nothing that it is so: there is no device to say it of, or no IOMMU to use.
	about := map[string]bool{"sriov_room": true, "reset": true, "power": true, "boot_display": true}
	for _, c := range checks {
		if c.Status == Passed && !about[c.Name] {
			t.Errorf("%+v", c)
		}
	}
}

// Each check has a name and a title of its own.
func TestNames(t *testing.T) {
	seen := map[string]bool{}
	for _, c := range Examine(healthy()) {
		if c.Name == "" || c.Title == "" || seen[c.Name] || seen[c.Title] {
			t.Errorf("%+v", c)
		}
		seen[c.Name], seen[c.Title] = true, true
	}
}
