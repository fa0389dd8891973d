package iommu

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"viaduct/internal/bootloader"
)

// ModprobeDirs are the folders of modprobe's files, in the order in which one hides another's files of the same name
// (modprobe.d(5)).
var ModprobeDirs = []string{
	"etc/modprobe.d", "run/modprobe.d", "usr/local/lib/modprobe.d", "usr/lib/modprobe.d", "lib/modprobe.d",
}

// ModuleParameters are the files of those parameters of modules that matter to passthrough.
var ModuleParameters = []string{
	"sys/module/vfio/parameters/enable_unsafe_noiommu_mode",
	"sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts",
	"sys/module/iommufd/parameters/allow_unsafe_interrupts",
	"sys/module/vfio_iommu_type1/parameters/dma_entry_limit",
	"sys/module/vfio_pci/parameters/disable_denylist",
	"sys/module/vfio_pci/parameters/disable_idle_d3",
	"sys/module/vfio_pci/parameters/disable_vga",
	"sys/module/vfio_pci/parameters/enable_sriov",
	"sys/module/vfio_pci/parameters/nointxmask",
	"sys/module/kvm/parameters/ignore_msrs",
	"sys/module/kvm_amd/parameters/avic",
	"sys/module/kvm_amd/parameters/nested",
	"sys/module/kvm_intel/parameters/enable_apicv",
	"sys/module/kvm_intel/parameters/nested",
	"sys/module/module/parameters/sig_enforce",
}

// system adds what is of the whole host, and not of a device: modules and what keeps them away, how it boots, and what
// its kernel said.
func (c *capture) system() {
	c.files("", ModuleParameters)
	for _, dir := range ModprobeDirs {
		if names, err := c.h.Names(dir); err == nil {
			c.files(dir, slices.DeleteFunc(names, func(n string) bool { return !strings.HasSuffix(n, ".conf") }))
		}
	}
	for _, m := range []string{"vfio", "vfio_pci", "vfio_pci_core", "vfio_iommu_type1", "iommufd", "virtio_iommu",
		"arm_smmu_v3"} {
		c.dir(path.Join("sys/module", m))
	}
	c.dir("sys/firmware/efi")
	c.dir("sys/devices/system/node")
	c.files("", bootloader.Files(c.h.Host))
	for _, name := range append(bootloader.Signs(), bootloader.Files(c.h.Host)...) {
		if c.h.Exists(name) {
			// That it is there counts, also of what was left out just now.
			c.add(name, []byte{})
		}
	}

	c.kernel()
	// How much memory who makes this may lock.
	for file, line := range map[string]string{"status": "CapEff", "limits": "Max locked memory"} {
		if b, err := c.h.Read(path.Join("proc/self", file)); err == nil {
			c.add(path.Join("proc/self", file), keptLines(string(b), line))
		}
	}
	var log []byte
	for _, line := range KernelLog(c.h) {
		log = fmt.Appendln(log, line)
	}
	if len(log) > 0 {
		c.add(kernelLines, log)
	}
	cpu, _ := c.h.Read("proc/cpuinfo")
	first, _, _ := strings.Cut(string(cpu), "\n\n")
	if first != "" {
		c.add("proc/cpuinfo", keptLines(first, "vendor_id", "cpu family", "model", "model name", "flags", "vmx flags"))
	}
	const misc = "sys/class/misc"
	c.dir(misc)
	for _, n := range []string{"iommu", "kvm", "vfio"} {
		c.linked(path.Join(misc, n))
	}
	const huge = "sys/kernel/mm/hugepages"
	if sizes, err := c.h.Names(huge); err == nil {
		for _, s := range sizes {
			c.files(path.Join(huge, s), []string{"nr_hugepages", "free_hugepages"})
		}
	}
}

// kernel adds what the kernel was built with, of what matters here, and which of the modules that matter it has.
func (c *capture) kernel() {
	release, err := c.h.String("proc/sys/kernel/osrelease")
	if err != nil {
		return
	}

	if config := KernelConfig(c.h); config != nil {
		var b strings.Builder
		for name, value := range config {
			if strings.Contains(name, "IOMMU") || strings.Contains(name, "VFIO") || strings.Contains(name, "SMMU") ||
				strings.HasPrefix(name, "CONFIG_KVM") || strings.Contains(name, "LOCKDOWN") ||
				name == "CONFIG_IRQ_REMAP" {
				fmt.Fprintf(&b, "%s=%s\n", name, value)
			}
		}
		lines := strings.Split(b.String(), "\n")
		slices.Sort(lines)
		c.add("boot/config-"+release, []byte(strings.TrimPrefix(strings.Join(lines, "\n")+"\n", "\n")))
	}

	for _, dir := range []string{"lib/modules", "usr/lib/modules"} {
		for _, name := range []string{"modules.dep", "modules.builtin"} {
			at := path.Join(dir, release, name)
			if b, err := c.h.Read(at); err == nil {
				c.add(at, keptLines(string(b), "vfio", "iommufd", "/kvm"))
			}
		}
		if c.h.Exists(path.Join(dir, release)) {
			// The other folder is the same one.
			break
		}
	}
}

// keptLines are the lines of a text that have one of these words.
func keptLines(text string, words ...string) []byte {
	out := []byte{}
	for line := range strings.Lines(text) {
		if slices.ContainsFunc(words, func(w string) bool { return strings.Contains(line, w) }) {
			out = append(append(out, strings.TrimSuffix(line, "\n")...), '\n')
		}
	}
	return out
}
