// Package doctor says whether a host is ready for device passthrough, and what to change if it is not. It only judges:
// package gather reads what it judges by.
package doctor

import (
	"fmt"
	"slices"
	"strings"

	"viaduct/internal/bootloader"
	"viaduct/iommu"
)

// Status is what a check came to.
type Status string

// What a check can come to. Only Failed is a reason that passthrough does not work.
const (
	Passed  Status = "passed"
	Warned  Status = "warned"
	Failed  Status = "failed"
	Unknown Status = "unknown" // what it goes by could not be read, or an earlier check has failed that it depends on
)

// Check is one check and its outcome.
type Check struct {
	Name     string // short and stable, e.g. interrupt_remapping
	Title    string // what it is about, for people
	Status   Status
	Text     string // what was found, as a sentence without its end
	Evidence []Evidence
	Hint     string   // what to do on this host; "" if there is nothing to do
	Devices  []string // those that it is about; none if it is about the host
}

// Evidence is where something was seen.
type Evidence struct {
	File  string // from the host's root
	Value string // what it holds, or the part of it that counts; "" if the file is not there
}

// Facts are what the checks go by. What could not be read is nil or empty, as each field says.
type Facts struct {
	Topology *iommu.Topology
	// Selected are the devices that were asked about; nil if it is the host alone. Wanted are these, or, without any,
	// those that a vfio driver has.
	Selected, Wanted []*iommu.Device

	// Whole is set of a running host, and of a capture of all that is read of one: what is not there then is not
	// there.
	Whole, Live   bool
	Arch, Release string            // of the kernel; "" if not known
	Words         []string          // of its command line; nil if not known
	Config        map[string]string // options of the kernel; nil if not known
	Log           []string          // lines of the kernel's about devices; none if not known
	Loader        bootloader.Loader
	Guest         bool // a hypervisor's
	Xen           bool // it runs on Xen

	// Interrupt is the interrupt controller that tells whether interrupts are remapped.
	Interrupt Evidence

	Tables []iommu.Firmware
	Faults []iommu.Fault // of the tables
	Units  []iommu.UnitDetails
	Off    iommu.Off // why no IOMMU is active; of a host that has one it says nothing
	// NotRemapped is why interrupts are not remapped; of a host that remaps them it says nothing.
	NotRemapped iommu.Off

	Modules   map[string]Module // by name, with underscores; nil if it is not known which there are
	Rules     []ModuleRule
	Params    map[string]string // parameters of loaded modules, by file; those that are not there are left out
	Direct    []GroupRange
	Lockdown  string // none, integrity, confidentiality; "" if not known
	Secure    *bool  // Secure Boot; nil if not known
	Unsigned  []string
	LockLimit *uint64 // bytes that this program's user may lock; nil if there is no limit, or it is not known
	LockKnown bool
	HugePages []HugePages
	NUMANodes int // 0: not known
	Nodes     []Node
	KVM       *bool
	CPUVirt   *bool // the processor has virtualization

	PFs      []PF
	Resets   map[string]iommu.Reset // of Wanted
	Power    map[string]string      // power_state of Wanted
	Displays []Display
	Blind    string // why it could not be seen whether a device is a display; "" if it could
}

// Module is a module that passthrough may need.
type Module struct{ Loaded, Builtin, Available bool }

// There reports whether the module is loaded, or can be.
func (m Module) There() bool { return m.Loaded || m.Builtin || m.Available }

// ModuleRule is a line that keeps a module from being loaded.
type ModuleRule struct {
	Module string // with underscores
	File   string
	Line   string
	Hard   bool // it is not loaded by name either
	Own    bool // it is loaded by a command of the host's own, which may load it or not
}

// GroupRange is a range that a group's devices need mapped one to one.
type GroupRange struct {
	Group   int
	Region  iommu.Region
	Devices []string
}

// HugePages are those of one size.
type HugePages struct {
	Size        uint64 // in bytes
	Total, Free int
}

// Node is a device file that a VMM opens.
type Node struct {
	Path string
	Mode uint32 // 0: not known
}

// PF is a device that can have VFs.
type PF struct {
	Name     string
	Unmapped bool   // the firmware left no room for the VFs' memory
	Total    int    // VFs it can have
	LastBus  int    // that the last of them would be on
	Buses    int    // the last one that the port above it has; -1 if not known
	Port     string // above it
}

// Display is a device that the host's screen is on, and where that was seen.
type Display struct {
	Device, What string
	Evidence
}

// Examine makes all checks, in the order in which one depends on those before it.
func Examine(f *Facts) []Check {
	checks := []func(f *Facts) Check{
		table, active, coverage, groups, remapping, modules, blacklist, directRanges, lockdown, unsafeModes,
		acsOverride,
		defaultDomain, memlock, nodes, sriovRoom, resets, power, bootDisplay, hugePages, numa, kernelVersion, kvm,
		vendorModules,
	}
	out := make([]Check, len(checks))
	for i, check := range checks {
		out[i] = check(f)
	}
	return out
}

// Healthy reports whether no check failed.
func Healthy(checks []Check) bool {
	return !slices.ContainsFunc(checks, func(c Check) bool { return c.Status == Failed })
}

// present reports whether an IOMMU is in use.
func (f *Facts) present() bool {
	real := func(g iommu.Group) bool { return !g.NoIOMMU }
	return len(f.Topology.Units) > 0 || slices.ContainsFunc(f.Topology.Groups, real)
}

// without is a check that makes no sense without an IOMMU.
func (c Check) without() Check {
	c.Status, c.Text = Unknown, "not checked: no IOMMU is active"
	return c
}

// unseen is a check whose file is not there, or not in this capture of the host.
func (f *Facts) unseen(c Check, file string) Check {
	c.Status, c.Text = Unknown, "not known: this capture of the host does not have it"
	if f.Live {
		c.Text = "not known: this host does not show it"
	}
	c.see(file, "")
	return c
}

func (c *Check) set(s Status, format string, a ...any) {
	c.Status, c.Text = s, fmt.Sprintf(format, a...)
}

// see adds evidence.
func (c *Check) see(file, value string) { c.Evidence = append(c.Evidence, Evidence{file, value}) }

func (f *Facts) parameter(name string) (string, bool) { return iommu.Parameter(f.Words, name) }

// seeLine adds the kernel's command line as evidence.
func (f *Facts) seeLine(c *Check) { c.see("proc/cmdline", strings.Join(f.Words, " ")) }

// older reports whether the kernel is known to be before a version.
func (f *Facts) older(major, minor int) bool {
	var a, b int
	if n, _ := fmt.Sscanf(f.Release, "%d.%d", &a, &b); n != 2 {
		return false
	}
	return a < major || a == major && b < minor
}

// some are the first of many names.
func some(names []string) string {
	const most = 6
	if len(names) <= most {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
}

func namesOf(devices []*iommu.Device) []string {
	var out []string
	for _, d := range devices {
		out = append(out, d.Name)
	}
	return out
}
