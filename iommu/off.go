package iommu

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"
	"sync"

	"viaduct/internal/bootloader"
	"viaduct/iommu/acpi"
)

// Off is why a host has no active IOMMU, and what turns it on.
type Off struct {
	Why   string // a sentence without its end
	File  string // where that was seen, from the host's root; "" if it follows from what is not there
	Value string // what is there
	Hint  string // an imperative: what to do on this very host
}

func (o Off) String() string { return o.Why + "; " + o.Hint }

// WhyOff says why a host has no active IOMMU, and what to do, by the firmware's tables, the kernel's command line and
// configuration, and where the host runs. It is only for a host that has none: it does not look whether one is active.
func WhyOff(h *Host, t *Topology) Off {
	s := readSetting(h)
	s.faults = CheckFirmware(h, t, slices.Collect(maps.Values(s.tables)))
	return s.whyOff()
}

// setting is what decides whether an IOMMU can be active.
type setting struct {
	arch       string // as uname -m; "" if it is not known
	vendor     string // of the processor: AuthenticAMD, GenuineIntel, HygonGenuine; "" if it is not known
	hypervisor bool   // the processor says that it is a guest's
	maker      string // of the machine, with its model, as the firmware has them
	release    string // of the kernel
	container  string // the kind of container this is; "" if it is none
	sign       string // the file that tells
	xen        string // dom0, guest, or "" if it is none of Xen's
	words      []string
	tables     map[string]Firmware
	modules    map[string]bool // those of IOMMUs that are loaded
	deviceTree bool
	faults     []Fault // of the tables

	// These are read when they are needed: a list of devices says why they are in no group, too.
	config func() map[string]string // options of the kernel, by name; nil if they are not known
	log    func() []string
	loader func() bootloader.Loader
}

const commandLine = "proc/cmdline"

func readSetting(h *Host) *setting {
	text := func(name string) string { s, _ := h.String(name); return strings.TrimSpace(s) }
	s := &setting{
		arch: text("proc/sys/kernel/arch"), release: text("proc/sys/kernel/osrelease"), words: CommandLine(h),
		maker:  strings.TrimSpace(text("sys/class/dmi/id/sys_vendor") + " " + text("sys/class/dmi/id/product_name")),
		tables: map[string]Firmware{}, modules: map[string]bool{}, deviceTree: h.Exists("sys/firmware/devicetree/base"),
		config: sync.OnceValue(func() map[string]string { return KernelConfig(h) }),
		log:    sync.OnceValue(func() []string { return KernelLines(h) }),
		loader: sync.OnceValue(func() bootloader.Loader { return bootloader.Find(h.Host) }),
	}
	for _, f := range ReadFirmware(h) {
		s.tables[f.Signature] = f
	}
	for _, m := range []string{"virtio_iommu", "arm_smmu_v3", "arm_smmu"} {
		s.modules[m] = h.Exists("sys/module/" + m)
	}

	cpu, _ := h.Read("proc/cpuinfo")
	for line := range strings.Lines(string(cpu)) {
		key, value, _ := strings.Cut(line, ":")
		switch strings.TrimSpace(key) {
		case "vendor_id":
			s.vendor = strings.TrimSpace(value)
		case "flags":
			s.hypervisor = slices.Contains(strings.Fields(value), "hypervisor")
		}
		if strings.TrimSpace(line) == "" {
			// The others are alike.
			break
		}
	}
	if text("sys/hypervisor/type") == "xen" {
		s.xen = "guest"
		if strings.Contains(text("proc/xen/capabilities"), "control_d") {
			s.xen = "dom0"
		}
	}
	for _, sign := range []string{"run/systemd/container", ".dockerenv", "run/.containerenv"} {
		if s.container == "" && h.Exists(sign) {
			s.container, s.sign = "container", sign
			if kind := text(sign); kind != "" && !strings.ContainsAny(kind, " =\n") {
				s.container = kind
			}
		}
	}
	return s
}

// CommandLine is the words of the kernel's command line; nil if it cannot be read.
func CommandLine(h *Host) []string {
	line, err := h.Read(commandLine)
	if err != nil {
		return nil
	}
	return append([]string{}, strings.Fields(string(line))...)
}

// WordsOf are the words of a command line that set a parameter.
func WordsOf(words []string, name string) []string {
	// The kernel takes both for the same (kernel/params.c, dash2underscore).
	same := func(s string) string { return strings.ReplaceAll(s, "-", "_") }
	var out []string
	for _, w := range words {
		if key, _, _ := strings.Cut(w, "="); same(key) == same(name) {
			out = append(out, w)
		}
	}
	return out
}

// Parameter is the value of a parameter of a command line, the last one if it stands there more than once.
func Parameter(words []string, name string) (value string, is bool) {
	for _, w := range WordsOf(words, name) {
		_, value, _ = strings.Cut(w, "=")
		is = true
	}
	return value, is
}

// LastOf is which of these values stands last in the words of a parameter, and the word that it stands in; "" if none
// does. The kernel's parsers of the IOMMUs' parameters take one value after the other, of each word with the name: of
// two that contradict each other the last one counts, and a value without an opposite counts wherever it stands.
func LastOf(words []string, name string, values ...string) (value, word string) {
	for _, w := range WordsOf(words, name) {
		_, all, _ := strings.Cut(w, "=")
		for v := range strings.SplitSeq(all, ",") {
			if slices.Contains(values, v) {
				value, word = v, w
			}
		}
	}
	return value, word
}

// KernelConfig are the options of the running kernel, by name, as CONFIG_VFIO_PCI: m; nil if they are not known.
func KernelConfig(h *Host) map[string]string {
	release, _ := h.String("proc/sys/kernel/osrelease")
	var text []byte
	for _, name := range []string{"boot/config-" + release, path.Join("lib/modules", release, "config")} {
		if b, err := h.Read(name); err == nil && release != "" {
			text = b
			break
		}
	}

	if text == nil {
		b, err := h.Read("proc/config.gz")
		if err != nil {
			return nil
		}
		z, err := gzip.NewReader(bytes.NewReader(b))
		if err != nil {
			return nil
		}
		const most = 4 << 20
		if text, err = io.ReadAll(io.LimitReader(z, most)); err != nil {
			return nil
		}
	}

	out := map[string]string{}
	for line := range strings.Lines(string(text)) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok && strings.HasPrefix(name, "CONFIG_") {
			out[name] = value
		}
	}

	return out
}

func (s *setting) isArm() bool {
	return strings.HasPrefix(s.arch, "aarch64") || strings.HasPrefix(s.arch, "arm")
}

// lacks reports whether the kernel is known to have been built without an option.
func (s *setting) lacks(option string) bool {
	config := s.config()
	return config != nil && config[option] == ""
}

// last is LastOf of the kernel's command line.
func (s *setting) last(name string, values ...string) string {
	value, _ := LastOf(s.words, name, values...)
	return value
}

// turnedOff is for a value of the command line that turns the IOMMU off.
func (s *setting) turnedOff(name, value string) Off {
	_, word := LastOf(s.words, name, value)
	return Off{
		Why: word + " on the kernel's command line turns it off", File: commandLine, Value: strings.Join(s.words, " "),
		Hint: s.loader().RemoveValue(word, value),
	}
}

// said is the last line of the kernel's log that has one of these words.
func (s *setting) said(words ...string) string {
	for _, line := range slices.Backward(s.log()) {
		for _, w := range words {
			if strings.Contains(line, w) {
				return line
			}
		}
	}
	return ""
}

// complaint is the first line of the kernel's log that has one of these words and says that something went wrong:
// rather one that something failed than one that only something is not so. "" if there is none.
func (s *setting) complaint(words ...string) string {
	for _, wrong := range [][]string{
		{"fail", "error", "timed out", "invalid", "broken", "no supported", "unable"}, {"bug", "not ", "disabl"},
	} {
		for _, line := range s.log() {
			lower := strings.ToLower(line)
			about := func(w string) bool { return strings.Contains(line, w) && !strings.HasPrefix(line, "ACPI: ") }
			if slices.ContainsFunc(words, about) &&
				slices.ContainsFunc(wrong, func(w string) bool { return strings.Contains(lower, w) }) {
				return line
			}
		}
	}
	return ""
}

func (s *setting) whyOff() Off {
	if o, elsewhere := s.elsewhere(); elsewhere {
		return o
	}
	if s.last("acpi", "off", "force") == "off" {
		return s.turnedOff("acpi", "off")
	}

	for _, signature := range acpi.Signatures {
		f := s.tables[signature]
		if errors.Is(f.Err, acpi.ErrTable) && (signature == "IVRS" || !errors.Is(f.Err, acpi.ErrSum)) {
			return Off{
				Why: fmt.Sprintf("the firmware's %s table is not sound (%v), and the kernel refuses it", signature,
					f.Err),
				File: path.Join(tablesDir, signature), Value: f.Err.Error(),
				Hint: "update the firmware, or tell its maker",
			}
		}
	}

	for _, f := range s.faults {
		return Off{
			Why: f.String(), File: path.Join(tablesDir, f.Signature), Value: f.Text,
			Hint: "update the firmware, or tell its maker",
		}
	}

	_, ivrs := s.tables["IVRS"]
	_, dmar := s.tables["DMAR"]
	_, iort := s.tables["IORT"]
	_, viot := s.tables["VIOT"]
	switch {
	case (ivrs || dmar) && s.last("iommu", "off") != "":
		return s.turnedOff("iommu", "off")
	case ivrs:
		return s.amd()
	case dmar:
		return s.intel()
	case viot:
		return s.virtio()
	case iort && (s.arch == "" || s.isArm()):
		return s.arm()
	}

	return s.noTable()
}

// elsewhere is for where there is no firmware to set and no kernel to start: it is not this system's to have an IOMMU.
func (s *setting) elsewhere() (Off, bool) {
	switch {
	case s.container != "":
		return Off{
			Why: "this is a container, which is shown no IOMMU", File: s.sign, Value: s.container,
			Hint: "run viaduct on the host itself",
		}, true
	case s.xen == "dom0":
		return Off{
			Why:  "this is Xen's control domain, and Xen has the IOMMU to itself",
			File: "proc/xen/capabilities", Value: "control_d",
			Hint: "pass devices by Xen's own means (`xl pci-assignable-add`; see `xl dmesg | grep -i iommu`), or " +
				"boot this kernel without Xen",
		}, true
	case strings.Contains(strings.ToLower(s.release), "microsoft"):
		return Off{
			Why:  "this is the Windows Subsystem for Linux, which gives Linux no IOMMU",
			File: "proc/sys/kernel/osrelease", Value: s.release, Hint: "boot Linux on the machine itself",
		}, true
	}
	return Off{}, false
}

// amd is for an IVRS without an IOMMU. AMD's is on by default: no parameter turns it on.
func (s *setting) amd() Off {
	if s.last("amd_iommu", "off") != "" {
		return s.turnedOff("amd_iommu", "off")
	}
	// Its graphics stop where they are translated (drivers/iommu/amd/init.c, detect_ivrs).
	if line := s.said("Disable IOMMU on Stoney Ridge"); line != "" {
		return Off{
			Why:  "Linux keeps the IOMMU of Stoney Ridge off, as its graphics may stop",
			File: "dev/kmsg", Value: line, Hint: s.loader().Add("amd_iommu=force_enable"),
		}
	}
	return s.refused("IVRS", "AMD-Vi", "CONFIG_AMD_IOMMU", "AMD-Vi", "IVRS")
}

// intel is for a DMAR without an IOMMU. Linux has Intel's on by default only if it was built so.
func (s *setting) intel() Off {
	set := s.last("intel_iommu", "on", "off")
	if set == "off" {
		return s.turnedOff("intel_iommu", "off")
	}
	if set == "" && s.config()["CONFIG_INTEL_IOMMU_DEFAULT_ON"] != "y" && !s.lacks("CONFIG_INTEL_IOMMU") {
		o := Off{
			Why:  "the firmware has VT-d on, and this kernel uses it only with intel_iommu=on",
			File: commandLine, Value: strings.Join(s.words, " "), Hint: s.loader().Add("intel_iommu=on"),
		}
		switch {
		case s.words == nil:
			o.Why = "the firmware has VT-d on, and many kernels use it only with intel_iommu=on; the command line of " +
				"this one is not known"
		case s.config() == nil:
			o.Why = "the firmware has VT-d on, and many kernels use it only with intel_iommu=on"
		}
		return o
	}
	return s.refused("DMAR", "VT-d", "CONFIG_INTEL_IOMMU", "DMAR")
}

// refused is for a table that describes an IOMMU which the kernel did not take, for no reason that a parameter is.
func (s *setting) refused(table, name, option string, words ...string) Off {
	o := Off{File: path.Join(tablesDir, table), Value: "there"}
	if s.lacks(option) {
		o.Why = "this kernel was built without " + option
		o.File, o.Value = "boot/config-"+s.release, "# "+option+" is not set"
		o.Hint = "boot a kernel that has it"
		return o
	}
	o.Why = fmt.Sprintf("the firmware describes %s (%s), and the kernel did not take it", name, table)
	o.Hint = fmt.Sprintf("see why in the kernel's log (`dmesg | grep -e %s`); often newer firmware helps",
		strings.Join(words, " -e "))
	if line := s.complaint(words...); line != "" {
		o.File, o.Value = "dev/kmsg", line
		o.Why += fmt.Sprintf(" (it says: %s)", line)
	}
	return o
}

func (s *setting) virtio() Off {
	o := Off{File: path.Join(tablesDir, "VIOT"), Value: "there"}
	switch {
	case s.lacks("CONFIG_VIRTIO_IOMMU"):
		o.Why = "there is a virtio-iommu, and this kernel was built without CONFIG_VIRTIO_IOMMU"
		o.Hint = "boot a kernel that has it"
	case !s.modules["virtio_iommu"]:
		o.Why = "there is a virtio-iommu, and its module is not loaded"
		o.Hint = "load the module virtio_iommu before the drivers of the devices, in the initramfs"
	default:
		return s.refused("VIOT", "a virtio-iommu", "CONFIG_VIRTIO_IOMMU", "virtio_iommu", "VIOT")
	}
	return o
}

// arm is for an IORT without an SMMU in use: many describe none.
func (s *setting) arm() Off {
	t := s.tables["IORT"].Table
	if t == nil {
		return Off{
			Why: "no SMMU is in use", File: path.Join(tablesDir, "IORT"),
			Hint: "run this as root, which may read the table that says whether there is one",
		}
	}
	for _, b := range t.Blocks {
		switch b.Fields.(type) {
		case *acpi.SMMU:
			return s.smmu("CONFIG_ARM_SMMU", "arm_smmu")
		case *acpi.SMMUv3:
			return s.smmu("CONFIG_ARM_SMMU_V3", "arm_smmu_v3")
		}
	}
	return s.noTable()
}

// smmu is for an SMMU of an IORT, with the kernel's option for it and its module.
func (s *setting) smmu(option, module string) Off {
	if s.modules[module] || s.lacks(option) {
		return s.refused("IORT", "an SMMU", option, "smmu", "IORT")
	}
	return Off{
		Why: "the firmware describes an SMMU (IORT), and its module is not loaded", File: "sys/module/" + module,
		Hint: "load the module " + module + " in the initramfs, before the drivers of the devices",
	}
}

// noTable is for firmware that describes no IOMMU at all.
func (s *setting) noTable() Off {
	if place := s.guestOf(); place.Hint != "" {
		return place
	}

	o := Off{Why: "the firmware describes no IOMMU"}
	switch {
	case s.isArm():
		o.Why = "the firmware describes no SMMU"
		o.Hint = "turn on the SMMU in the firmware, if this machine has one"
		if s.deviceTree {
			o.Why = "no SMMU is in use; whether the device tree has one was not looked at"
			o.Hint = "boot with a device tree that has the SMMU, and a kernel with its driver, or with ACPI " +
				"(`acpi=force`)"
		}
	case s.vendor == "AuthenticAMD" || s.vendor == "HygonGenuine":
		o.Hint = "turn on \"IOMMU\" (AMD-Vi) in the firmware's menu (often under AMD CBS, NBIO, or Advanced; " +
			"\"Auto\" may mean off)"
		o.Hint += s.thenOn("amd_iommu")
	case s.vendor == "GenuineIntel":
		o.Hint = "turn on \"VT-d\" (Intel VT for Directed I/O) in the firmware's menu" + s.thenOn("intel_iommu")
		if s.last("intel_iommu", "on") == "" && s.config()["CONFIG_INTEL_IOMMU_DEFAULT_ON"] != "y" {
			o.Hint += "; then " + s.loader().Add("intel_iommu=on")
		}
	case s.arch == "" || s.arch == "x86_64" || s.arch == "i686":
		o.Hint = "turn on \"IOMMU\" (AMD-Vi) or \"VT-d\" (Intel) in the firmware's menu"
	default:
		o.Why = "this kernel shows no IOMMU"
		o.Hint = "see that the kernel has the driver of this machine's IOMMU (" + s.arch + ")"
	}

	return o
}

// thenOn is what of the command line has to go as well, once the firmware has the IOMMU on.
func (s *setting) thenOn(parameter string) string {
	var then strings.Builder
	for _, name := range []string{parameter, "iommu"} {
		if value, word := LastOf(s.words, name, "off", "on"); value == "off" {
			then.WriteString("; then " + s.loader().RemoveValue(word, value))
		}
	}
	return then.String()
}

// guestOf is what to do where a hypervisor's guest is to have an IOMMU; without a hint if this is no guest.
func (s *setting) guestOf() Off {
	arm := s.isArm()
	for _, p := range [...]struct{ maker, name, hint string }{
		{"Amazon EC2", "Amazon EC2", "use an instance type whose name ends in .metal: no other has one"},
		{"Google", "Google Compute Engine", "use a bare metal instance: virtual ones have none"},
		{"Microsoft Corporation Virtual Machine", "Hyper-V or Azure", "use a machine of your own or a bare metal " +
			"host: " +
			"Hyper-V gives its guests none; it can itself assign devices (Discrete Device Assignment)"},
		{"VMware", "VMware", "turn on \"Expose IOMMU to the guest OS\" (vvtd.enable = \"TRUE\") in this VM's " +
			"settings"},
		{"innotek", "VirtualBox", "run `VBoxManage modifyvm NAME --chipset=ich9 --iommu=automatic` on its host"},
		{"Xen", "Xen", "use a machine of your own: Xen gives its guests none"},
		{"OpenStack", "OpenStack", "set hw_viommu_model on this server's image or flavor (hw:viommu_model)"},
		{"Alibaba Cloud", "Alibaba Cloud", "use an ECS Bare Metal instance"},
		{"DigitalOcean", "DigitalOcean", "use a bare metal host: virtual ones have none"},
		{"Hetzner", "Hetzner Cloud", "use a dedicated server: virtual ones have none"},
		{"Parallels", "Parallels", "use a machine of your own: Parallels gives its guests none"},
		{"Apple Inc. Apple Virtualization", "Apple's Virtualization", "use a machine of your own: it gives its " +
			"guests none"},
		{"QEMU", "QEMU", virtualUnit(arm)},
		{"Red Hat KVM", "KVM", virtualUnit(arm)},
		{"KubeVirt", "KubeVirt", virtualUnit(arm)},
	} {
		if strings.HasPrefix(s.maker, p.maker) && (s.hypervisor || arm || s.vendor == "" || p.name == "QEMU") {
			return Off{
				Why: p.name + " gives this guest no IOMMU", File: "sys/class/dmi/id/sys_vendor",
				Value: s.maker, Hint: p.hint,
			}
		}
	}

	if s.xen == "guest" {
		return Off{
			Why: "Xen gives this guest no IOMMU", File: "sys/hypervisor/type", Value: "xen",
			Hint: "use a machine of your own: Xen gives its guests none",
		}
	}

	if s.hypervisor {
		return Off{
			Why: "the hypervisor gives this guest no IOMMU", File: "proc/cpuinfo", Value: "hypervisor",
			Hint: "turn on a virtual IOMMU where this guest is defined, or use a machine of your own",
		}
	}

	return Off{}
}

func virtualUnit(arm bool) string {
	if arm {
		return "give it one where it is defined: QEMU -machine virt,iommu=smmuv3, libvirt <iommu model='smmuv3'/>"
	}
	return "give it one where it is defined: QEMU -machine q35,kernel-irqchip=split -device " +
		"intel-iommu,intremap=on, libvirt <iommu model='intel'><driver intremap='on'/></iommu>, Proxmox VE " +
		"`qm set VMID --machine q35,viommu=intel`"
}
