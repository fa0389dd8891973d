package gather

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"viaduct/cmd/internal/doctor"
	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

// whole is a host with all that doctor reads.
func whole() hosttest.Tree {
	const dir = "sys/devices/pci0000:00/0000:00:01.0/"
	return hosttest.Made(
		hosttest.PCI{At: "0000:00:00.2", ID: "1022:1481", Class: "080600", Group: -1},
		hosttest.PCI{At: "0000:00:01.0", ID: "8086:10c9", Class: "020000", Driver: "vfio-pci", Group: 1,
			Files: hosttest.Tree{
				"power_state": "D3cold\n", "reset_method": "flr\n", "reset": "",
			}},
	).With(hosttest.Tree{
		dir + "sriov_totalvfs": "7\n", dir + "sriov_offset": "128\n", dir + "sriov_stride": "2\n",
		dir + "sriov_numvfs": "0\n",
		dir + "resource": strings.Repeat("0x0000000000000000 0x0000000000000000 0x0000000000000000\n", 7) +
			"0x0000000000000000 0x0000000000003fff 0x0000000020040200\n",
		"sys/kernel/iommu_groups/1/reserved_regions": "0x0000000000100000 0x00000000001fffff direct\n",

		"proc/cmdline":         "quiet modprobe.blacklist=vfio_iommu_type1\n",
		"proc/cpuinfo":         "vendor_id\t: AuthenticAMD\nflags\t\t: svm hypervisor\n\nx\t: y\n",
		"proc/sys/kernel/arch": "x86_64\n", "proc/self/status": "Name:\tx\nCapEff:\t0000000000000000\n",
		"proc/self/limits":   "Limit Soft\nMax locked memory         8388608              8388608              bytes\n",
		"boot/config-6.12.0": "CONFIG_VFIO_PCI=m\nCONFIG_USB=y\n# CONFIG_KVM is not set\n",
		"lib/modules/6.12.0/modules.dep": "kernel/drivers/vfio/pci/vfio-pci.ko.xz: kernel/drivers/vfio/vfio.ko.xz\nkernel/x/usb.ko:\n" +
			"kernel/drivers/iommu/iommufd/iommufd.ko.xz:\n",
		"lib/modules/6.12.0/modules.builtin":                    "kernel/drivers/vfio/vfio_iommu_type1.ko\nkernel/fs/ext4.ko\n",
		"etc/modprobe.d/keep.conf":                              "# all\nblacklist vfio-pci\ninstall vfio_pci /bin/false\noptions vfio-pci ids=1:2\nblacklist nouveau\n",
		"lib/modprobe.d/keep.conf":                              "blacklist iommufd\n", // hidden by the other of that name
		"etc/default/grub":                                      "GRUB_CMDLINE_LINUX=\"quiet\"\n",
		"usr/sbin/update-grub":                                  "#!/bin/sh\n",
		"sys/module/vfio/parameters/enable_unsafe_noiommu_mode": "Y\n",
		"sys/kernel/security/lockdown":                          "none [integrity] confidentiality\n",
		"sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c": "\x06\x00\x00\x00\x01",
		"sys/devices/system/node/online":                                           "0-1\n",
		"sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages":                    "16\n",
		"sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages":                  "4\n",
		"sys/class/misc/kvm":            "-> ../../devices/virtual/misc/kvm",
		"sys/devices/virtual/misc/kvm/": "",
		"viaduct/kernel-lines":          "AMD-Vi: IOMMU performance counters supported\n",
		"sys/firmware/acpi/tables/IVRS": string(hosttest.ACPITables()["IVRS"]),
	})
}

func open(t *testing.T, tree hosttest.Tree) (*iommu.Host, *iommu.Topology) {
	t.Helper()
	h, err := iommu.Open(tree.Dir(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	topology, err := iommu.Scan(h)
	if err != nil {
		t.Fatal(err)
	}
	return h, topology
}

// A snapshot that is redacted still tells the boot loader, and what is wrong on the command line.
func TestRedacted(t *testing.T) {
	h, _ := open(t, whole().With(hosttest.Tree{"proc/cmdline": "root=UUID=1 pcie_acs_override=downstream acpi=off\n"}))
	var b bytes.Buffer
	file := filepath.Join(t.TempDir(), "host.tar.gz")
	if err := errors.Join(iommu.CaptureRedacted(h, &b), os.WriteFile(file, b.Bytes(), 0o600)); err != nil {
		t.Fatal(err)
	}
	again, err := iommu.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	topology, err := iommu.Scan(again)
	if err != nil {
		t.Fatal(err)
	}
	f, err := Facts(again, topology, nil)
	want := []string{"pcie_acs_override=downstream", "acpi=off"}
	if err != nil || f.Loader.Name != "GRUB" || !slices.Equal(f.Words, want) {
		t.Errorf("%v: %q, %q", err, f.Loader.Name, f.Words)
	}
}

// What a host's files say is what the checks go by.
func TestFacts(t *testing.T) {
	h, topology := open(t, whole())
	f, err := Facts(h, topology, nil)
	if err != nil {
		t.Fatal(err)
	}

	limit := uint64(8 << 20)
	for name, pair := range map[string][2]any{
		"whole":     {f.Whole, true},
		"words":     {f.Words, []string{"quiet", "modprobe.blacklist=vfio_iommu_type1"}},
		"config":    {f.Config, map[string]string{"CONFIG_VFIO_PCI": "m", "CONFIG_USB": "y"}},
		"loader":    {f.Loader.Name, "GRUB"},
		"vfio-pci":  {f.Modules["vfio_pci"], doctor.Module{Available: true}},
		"type1":     {f.Modules["vfio_iommu_type1"], doctor.Module{Builtin: true}},
		"iommufd":   {f.Modules["iommufd"], doctor.Module{Available: true}},
		"guest":     {f.Guest, true},
		"virtual":   {*f.CPUVirt, true},
		"lockdown":  {f.Lockdown, "integrity"},
		"secure":    {*f.Secure, true},
		"limit":     {*f.LockLimit, limit},
		"nodes":     {f.NUMANodes, 2},
		"huge":      {f.HugePages, []doctor.HugePages{{Size: 2 << 20, Total: 16, Free: 4}}},
		"kvm":       {*f.KVM, true},
		"log":       {len(f.Log), 1},
		"table":     {len(f.Tables), 1},
		"wanted":    {len(f.Wanted), 1},
		"power":     {f.Power, map[string]string{"0000:00:01.0": "D3cold"}},
		"reset":     {f.Resets["0000:00:01.0"].Way, iommu.ResetFunction},
		"parameter": {f.Params, map[string]string{"sys/module/vfio/parameters/enable_unsafe_noiommu_mode": "Y"}},
		"direct":    {len(f.Direct) == 1 && f.Direct[0].Devices[0] == "0000:00:01.0", true},
		"PF":        {f.PFs, []doctor.PF{{Name: "0000:00:01.0", Total: 7, LastBus: 0, Buses: -1, Unmapped: true}}},
		"rules": {f.Rules, []doctor.ModuleRule{
			{Module: "vfio_iommu_type1", File: "proc/cmdline", Line: "modprobe.blacklist=vfio_iommu_type1"},
			{Module: "vfio_pci", File: "etc/modprobe.d/keep.conf", Line: "blacklist vfio-pci"},
			{Module: "vfio_pci", File: "etc/modprobe.d/keep.conf", Line: "install vfio_pci /bin/false", Hard: true},
		}},
	} {
		if !reflect.DeepEqual(pair[0], pair[1]) {
			t.Errorf("%s: %+v, want %+v", name, pair[0], pair[1])
		}
	}
}

// A snapshot says of its host what the host says of itself.
func TestSnapshot(t *testing.T) {
	for name, tree := range map[string]hosttest.Tree{"whole": whole(), "lab": hosttest.Lab(t)} {
		h, topology := open(t, tree)
		var b bytes.Buffer
		file := filepath.Join(t.TempDir(), "host.tar.gz")
		if err := iommu.Capture(h, &b); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, b.Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
		again, err := iommu.Open(file)
		if err != nil {
			t.Fatal(err)
		}
		defer again.Close()
		second, err := iommu.Scan(again)
		if err != nil {
			t.Fatal(err)
		}

		one, err1 := Facts(h, topology, nil)
		two, err2 := Facts(again, second, nil)
		if err1 != nil || err2 != nil {
			t.Fatal(err1, err2)
		}
		before, after := doctor.Examine(one), doctor.Examine(two)
		if !reflect.DeepEqual(before, after) {
			for i := range before {
				if !reflect.DeepEqual(before[i], after[i]) {
					t.Errorf("%s:\n%+v, from its snapshot\n%+v", name, before[i], after[i])
				}
			}
		}
		if name == "whole" && !slices.ContainsFunc(after,
			func(c doctor.Check) bool { return c.Status == doctor.Failed }) {
			t.Error("nothing failed")
		}
		// What has no business in it is not there.
		if again.Exists("sys/kernel/notes") || again.Exists("etc/shadow") {
			t.Error("a snapshot holds too much")
		}
	}
}

func TestParsing(t *testing.T) {
	for list, want := range map[string]int{"0": 1, "0-3": 4, "0-1,4-5,7": 5, "": 0, "x": 0, "3-1": 0} {
		if got := count(list); got != want {
			t.Errorf("%q: %d, want %d", list, got, want)
		}
	}
	for text, want := range map[string]string{"[none] integrity": "none",
		"none integrity [confidentiality]": "confidentiality", "": ""} {
		if got := chosen(text); got != want {
			t.Errorf("%q: %q", text, got)
		}
	}
}
