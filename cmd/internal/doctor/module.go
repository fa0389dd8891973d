package doctor

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"viaduct/iommu"
)

func itoa(n int) string { return strconv.Itoa(n) }

// plural is so many things of a name that takes an s.
func plural(n int, name string) string {
	if n == 1 {
		return "1 " + name
	}
	return itoa(n) + " " + name + "s"
}

func hexRange(r iommu.Region) string { return fmt.Sprintf("%#x-%#x", r.Start, r.End) }

// modules checks that the kernel has VFIO.
func modules(f *Facts) Check {
	c := Check{Name: "vfio_modules", Title: "VFIO modules"}
	dir := "lib/modules/" + cmp.Or(f.Release, "*")
	if f.Modules == nil {
		c.set(Unknown, "not known: the kernel's modules are not there to be looked at")
		c.see(dir+"/modules.dep", "")
		return c
	}

	var missing []string
	if !f.Modules["vfio_pci"].There() {
		missing = append(missing, "vfio-pci")
	}
	if !f.Modules["vfio_iommu_type1"].There() && !f.Modules["iommufd"].There() {
		missing = append(missing, "vfio_iommu_type1 (or iommufd)")
	}

	if len(missing) == 0 {
		var there []string
		for _, m := range []string{"vfio_pci", "vfio_iommu_type1", "iommufd"} {
			if f.Modules[m].There() {
				there = append(there, m)
			}
		}
		c.set(Passed, "there are %s", strings.Join(there, ", "))
		c.see(dir+"/modules.dep", strings.Join(there, " "))
		return c
	}

	c.set(Failed, "this kernel has no %s", strings.Join(missing, " and no "))
	c.see(dir+"/modules.dep", "")
	c.see(dir+"/modules.builtin", "")
	c.Hint = "install the package with the rest of the kernel's modules (linux-modules-extra, kernel-modules), or " +
		"boot a kernel with CONFIG_VFIO_PCI"
	if f.Config != nil && f.Config["CONFIG_VFIO_PCI"] == "" {
		c.see("boot/config-"+f.Release, "# CONFIG_VFIO_PCI is not set")
		c.Hint = "boot a kernel with CONFIG_VFIO_PCI"
	}

	return c
}

// blacklist checks that nothing keeps VFIO's modules from being loaded.
func blacklist(f *Facts) Check {
	c := Check{Name: "blacklist", Title: "module blacklist"}
	var rules []ModuleRule
	for _, r := range f.Rules {
		if r.Module == "iommufd" && f.Modules["vfio_iommu_type1"].There() {
			continue
		}
		rules = append(rules, r)
	}
	if len(rules) == 0 && !f.Whole {
		return f.unseen(c, "etc/modprobe.d")
	}
	if len(rules) == 0 {
		c.see("etc/modprobe.d", "no blacklist or install of a VFIO module")
		c.set(Passed, "nothing keeps VFIO's modules from being loaded")
		return c
	}
	for _, r := range rules {
		c.see(r.File, r.Line)
	}
	missing := func(r ModuleRule) bool { return !f.Modules[r.Module].Loaded && !f.Modules[r.Module].Builtin }
	i := -1
	for _, worst := range []func(r ModuleRule) bool{
		func(r ModuleRule) bool { return r.Hard }, func(r ModuleRule) bool { return !r.Own },
		func(ModuleRule) bool { return true },
	} {
		if i < 0 {
			i = slices.IndexFunc(rules, func(r ModuleRule) bool { return missing(r) && worst(r) })
		}
	}
	r := rules[max(i, 0)]
	name := strings.ReplaceAll(r.Module, "_", "-")
	switch {
	case i < 0:
		c.set(Warned, "%s is loaded, and /%s would keep it from being loaded again: %q", name, r.File, r.Line)
	case r.Own:
		c.set(Unknown, "whether %s can be loaded is not known, as a command of this host does it: /%s has %q", name,
			r.File, r.Line)
		c.Hint = fmt.Sprintf("run `modprobe %s`, and see whether /sys/module/%s is there", name, r.Module)
		return c
	case r.Hard:
		c.set(Failed, "%s cannot be loaded: /%s has %q", name, r.File, r.Line)
	default:
		c.set(Failed, "%s is not loaded by itself: /%s has %q; viaduct and a VMM may load it by its name", name, r.File,
			r.Line)
	}

	c.Hint = fmt.Sprintf("remove that line from /%s, rebuild the initramfs if it is in it, and run `modprobe %s`",
		r.File, name)
	if r.File == "proc/cmdline" {
		c.Hint = f.Loader.Remove(r.Line)
	}
	return c
}

// lockdown checks the kernel's lockdown, which VFIO survives.
func lockdown(f *Facts) Check {
	c := Check{Name: "lockdown", Title: "lockdown"}
	const file = "sys/kernel/security/lockdown"
	switch {
	case f.Lockdown == "" && f.Config != nil && f.Config["CONFIG_SECURITY_LOCKDOWN_LSM"] == "":
		c.set(Passed, "this kernel has none")
		c.see("boot/config-"+f.Release, "# CONFIG_SECURITY_LOCKDOWN_LSM is not set")
	case f.Lockdown == "":
		c.set(Unknown, "not known: securityfs is not mounted, or this kernel has no lockdown")
		c.see(file, "")
	case f.Lockdown == "none":
		c.set(Passed, "none")
		c.see(file, f.Lockdown)
	default:
		c.see(file, f.Lockdown)
		c.set(Warned, "%s: VFIO works; setpci, unsigned modules, and other ways past the devices' drivers do not",
			f.Lockdown)
		c.Hint = "nothing to do for passthrough; it goes with Secure Boot, or lockdown= on the kernel's command line"
	}
	return c
}

// The parameters by which containers, and iommufd, take devices that can forge interrupts.
const (
	unsafeInterrupts        = "sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts"
	unsafeInterruptsIOMMUFD = "sys/module/iommufd/parameters/allow_unsafe_interrupts"
)

const (
	noIOMMUMode = "sys/module/vfio/parameters/enable_unsafe_noiommu_mode"
	forged      = "a guest can forge interrupts of the host and of other guests"
)

// verb agrees with so many things.
func verb(n int) string {
	if n == 1 {
		return "is"
	}
	return "are"
}

// unsafeModes checks that VFIO's ways around an IOMMU are off.
func unsafeModes(f *Facts) Check {
	c := Check{Name: "unsafe_modes", Title: "unsafe modes"}
	var on, danger []string
	for _, p := range []struct{ file, name, danger string }{
		{noIOMMUMode, "VFIO's noiommu mode", "a device without an IOMMU reaches all of the host's memory"},
		{unsafeInterrupts, "allow_unsafe_interrupts of VFIO's containers", forged},
		{unsafeInterruptsIOMMUFD, "allow_unsafe_interrupts of iommufd", forged},
	} {
		if v := f.Params[p.file]; v == "Y" || v == "1" {
			on = append(on, p.name)
			if !slices.Contains(danger, p.danger) {
				danger = append(danger, p.danger)
			}
			c.see(p.file, v)
			if c.Hint == "" {
				c.Hint = "`echo N > /" + p.file + "`, and remove it from /etc/modprobe.d and the kernel's command line"
			}
		}
	}

	switch {
	case len(on) == 0 && !f.Whole && len(f.Params) == 0:
		return f.unseen(c, "sys/module/vfio/parameters")
	case len(on) == 0:
		c.set(Passed, "off")
		c.see(noIOMMUMode, f.Params[noIOMMUMode])
	case f.present():
		c.set(Warned, "%s %s on: %s", strings.Join(on, " and "), verb(len(on)), strings.Join(danger, ", and "))
	default:
		c.set(Failed, "%s %s on, and no IOMMU is active: a guest reaches all of the host's memory",
			strings.Join(on, " and "), verb(len(on)))
	}

	return c
}

// acsOverride checks that groups are not only said to be apart.
func acsOverride(f *Facts) Check {
	c := Check{Name: "acs_override", Title: "ACS override"}
	if f.Words == nil {
		return f.unseen(c, "proc/cmdline")
	}
	f.seeLine(&c)
	words := iommu.WordsOf(f.Words, "pcie_acs_override")
	if len(words) == 0 {
		c.set(Passed, "not in use")
		return c
	}
	c.set(Warned, "%s is on the kernel's command line: if this kernel has the patch for it, devices in different "+
		"groups may reach each other's memory", strings.Join(words, " "))
	var hints []string
	for _, w := range words {
		hints = append(hints, f.Loader.Remove(w))
	}
	c.Hint = strings.Join(hints, "; ")
	return c
}

// defaultDomain says how the host's own devices are translated.
func defaultDomain(f *Facts) Check {
	c := Check{Name: "default_domain", Title: "default domain"}
	if !f.present() {
		return c.without()
	}

	kinds := map[string]int{}
	for i := range f.Topology.Groups {
		g := &f.Topology.Groups[i]
		asked := func(d *iommu.Device) bool { return d.InGroup(g.ID) }
		if g.Type != "" && (f.Selected == nil || slices.ContainsFunc(f.Selected, asked)) {
			kinds[g.Type]++
		}
	}

	var text []string
	for kind, n := range kinds {
		text = append(text, fmt.Sprintf("%s of %s", kind, plural(n, "group")))
	}

	slices.Sort(text)
	if len(text) == 0 {
		c.set(Passed, "the kernel does not show it")
		return c
	}

	c.set(Passed, "%s", strings.Join(text, ", "))
	c.see("sys/kernel/iommu_groups/*/type", c.Text)
	if kinds["identity"] > 0 {
		c.Text += "; identity (passthrough mode) leaves the host's own devices untranslated, which guests do not mind"
	}

	for _, name := range []string{"iommu", "iommu.passthrough"} {
		if v, is := f.parameter(name); is {
			c.see("proc/cmdline", name+"="+v)
		}
	}

	return c
}

// kernelVersion checks that the kernel is new enough for what the hardware could do.
func kernelVersion(f *Facts) Check {
	c := Check{Name: "kernel_version", Title: "kernel"}
	if f.Release == "" {
		c.set(Unknown, "not known")
		return c
	}
	c.see("proc/sys/kernel/osrelease", f.Release)
	var lacks []string
	tracks := func(u iommu.UnitDetails) bool { return u.Features.DirtyTracking != nil && *u.Features.DirtyTracking }
	switch {
	case f.older(4, 0):
		lacks = append(lacks, "VFIO as viaduct uses it")
	case f.older(6, 0) && slices.ContainsFunc(f.Wanted, func(d *iommu.Device) bool { return d.PhysFn != nil }):
		lacks = append(lacks, "live migration of VFs (6.0)")
	}
	if f.older(6, 7) && slices.ContainsFunc(f.Units, tracks) {
		lacks = append(lacks, "dirty tracking by the IOMMU, which this one has (6.7)")
	}
	if len(lacks) > 0 {
		c.set(Warned, "%s is too old for %s", f.Release, strings.Join(lacks, " and "))
		c.Hint = "boot a newer kernel if that is wanted"
		return c
	}
	c.set(Passed, "%s", f.Release)
	if !f.Modules["iommufd"].There() && f.Modules != nil {
		c.Text += ", without iommufd; VFIO's containers do instead"
	}
	return c
}

// kvm checks that guests can run at speed.
func kvm(f *Facts) Check {
	c := Check{Name: "kvm", Title: "KVM"}
	switch {
	case f.KVM == nil:
		return f.unseen(c, "dev/kvm")
	case *f.KVM:
		c.set(Passed, "there is /dev/kvm")
		c.see("dev/kvm", "there")
		return c
	}
	c.see("dev/kvm", "")
	c.set(Warned, "there is no /dev/kvm, so guests are emulated, which is slow")
	switch {
	case f.Xen:
		c.Hint = "nothing to do: Xen is this machine's hypervisor; boot this kernel without Xen for KVM"
	case strings.HasPrefix(f.Arch, "aarch64"):
		c.Hint = "boot a kernel with CONFIG_KVM, at exception level 2 (QEMU's virt: virtualization=on)"
	case f.CPUVirt != nil && !*f.CPUVirt && f.Guest:
		c.Hint = "turn on nested virtualization where this guest is defined"
	case f.CPUVirt != nil && !*f.CPUVirt:
		c.Hint = "turn on virtualization (SVM of AMD, VT-x of Intel) in the firmware's menu"
	case f.Config != nil && f.Config["CONFIG_KVM"] == "":
		c.Hint = "boot a kernel with CONFIG_KVM"
	default:
		c.Hint = "run `modprobe kvm_amd` or `modprobe kvm_intel`, and see the kernel's log if that fails"
	}
	return c
}

// vendorModules checks for modules that Secure Boot refuses.
func vendorModules(f *Facts) Check {
	c := Check{Name: "vendor_modules", Title: "vendors' modules"}
	switch {
	case f.Secure == nil:
		c.set(Unknown, "not known: this does not show whether Secure Boot is on")
		c.see("sys/firmware/efi/efivars", "")
	case !*f.Secure:
		c.set(Passed, "Secure Boot is off")
	case len(f.Unsigned) == 0:
		c.set(Passed, "Secure Boot is on, and each module beside the kernel's own is signed")
	default:
		for _, file := range f.Unsigned {
			c.see(file, "no signature")
		}
		c.set(Warned, "Secure Boot is on, and these modules are not signed, so they cannot be loaded: %s",
			some(f.Unsigned))
		c.Hint = "sign them with a key of this machine's (`mokutil --import`; DKMS does it by itself), or turn " +
			"Secure Boot off"
	}
	return c
}
