package iommu

import (
	"errors"
	"fmt"
	"io/fs"

	"viaduct/internal/host"
)

// Isolation is whether a function keeps apart what goes through it or comes from it: the kernel's pci_acs_enabled, for
// the services that a group of its own takes (drivers/pci/pci.c).
type Isolation struct {
	// Known is false where config space could not be read.
	Known, Isolated bool
	// Reason continues a sentence that begins with the function's address.
	Reason string

	cause   cause
	missing ACSFlags // that are off, of causeACSOff
}

// needed are the services without which a port or a function among several is not isolated (drivers/iommu/iommu.c,
// REQ_ACS_FLAGS).
const needed = SourceValidation | RequestRedirect | CompletionRedirect | UpstreamForwarding

// cause is why something is not isolated, which decides what can be done about it.
type cause int

const (
	causeNone cause = iota
	causeNoACS
	causeACSOff
	causeConventional
	causeVendor
)

func isolated(format string, a ...any) Isolation {
	return Isolation{Known: true, Isolated: true, Reason: fmt.Sprintf(format, a...)}
}

func open(why cause, format string, a ...any) Isolation {
	return Isolation{Known: true, Reason: fmt.Sprintf(format, a...), cause: why}
}

// unread is for what could not be read.
func (n *node) unread() Isolation {
	return Isolation{Reason: "may or may not isolate: its config space " + n.gap()}
}

// gap says how the node's config space is not known.
func (n *node) gap() string {
	switch {
	case n.failed == nil:
		return "could be read only in part (that takes root)"
	case host.Absent(n.failed):
		return "is not there, or was not captured"
	case errors.Is(n.failed, fs.ErrPermission):
		return "cannot be read (that takes root)"
	}
	return fmt.Sprintf("cannot be read: %v", n.failed)
}

// function is what the node's config space says, as far as it could be read.
func (n *node) function(h *Host) *Function {
	if !n.asked {
		n.asked = true
		if n.config, n.failed = ReadFunction(h, n.at); n.failed != nil {
			n.config = &Function{}
		}
	}
	return n.config
}

// express is what the node is to PCI Express; ok is false of conventional PCI. The kernel corrects ports that cannot be
// what they say (drivers/pci/probe.c, set_pcie_port_type).
func (g *Grouping) express(n *node) (t PortType, ok, known bool) {
	f := n.function(g.host)
	if f.Express == nil {
		return 0, false, f.Whole
	}
	t = f.Express.Type
	if n.up == nil || t != DownstreamPort && t != UpstreamPort {
		return t, true, true
	}
	above, ok, known := g.express(n.up)
	switch {
	case !known:
		return 0, true, false
	case ok && t == DownstreamPort && above.above():
		t = UpstreamPort
	case ok && t == UpstreamPort && above == UpstreamPort:
		t = DownstreamPort
	}
	return t, true, true
}

// multifunction reports whether the kernel takes the function for one of several: it does not ask a VF's header, nor
// that of any function but the first (drivers/pci/probe.c, pci_scan_slot; iov.c, pci_iov_add_virtfn).
func (g *Grouping) multifunction(n *node) (yes, known bool) {
	switch {
	case g.isVF(n):
		return false, true
	case n.at.Function > 0:
		return true, true
	}
	if n.at.Device > 0 && n.up != nil {
		// There is only device 0 behind a link; what seems to be another one is a function of it with a high number.
		if t, ok, known := g.express(n.up); known && ok && t.above() {
			return true, true
		}
	}
	f := n.function(g.host)
	return f.Multifunction, n.failed == nil
}

// isolation is memory for what isolates finds.
func (g *Grouping) isolation(n *node) Isolation {
	if n.verdict == nil {
		v := g.isolates(n)
		n.verdict = &v
	}
	return *n.verdict
}

func (g *Grouping) isolates(n *node) Isolation {
	if v, ok := g.vouched(n); ok {
		return v
	}
	t, express, known := g.express(n)
	if !known {
		return n.unread()
	}
	if !express {
		return open(causeConventional, "does not isolate: it is conventional PCI, where a bus is shared")
	}
	if v, ok := g.vouchedAs(n, t); ok {
		return v
	}

	switch t {
	case PCIeToPCIBridge, PCIToPCIeBridge:
		return open(causeConventional, "does not isolate: it is a %s, and all behind it has one requester ID", t)
	case EventCollector:
		return open(causeNoACS, "does not isolate: it is an event collector, which never has ACS")
	case RootPort, DownstreamPort:
		return g.acs(n)
	case Endpoint, LegacyEndpoint, UpstreamPort, IntegratedEndpoint:
		many, known := g.multifunction(n)
		if !known {
			return n.unread()
		}
		if many {
			return g.acs(n)
		}
	}
	return isolated("isolates: a single function needs no ACS")
}

// acs judges a function by its ACS capability: what it does not offer is taken for always on.
func (g *Grouping) acs(n *node) Isolation {
	a := n.function(g.host).ACS
	dwords := in(intelDwords, g.id(n))
	if (a == nil || dwords) && !n.config.ExtendedWhole {
		return n.unread()
	}
	if a == nil {
		return open(causeNoACS, "does not isolate: it has no ACS capability")
	}
	want, control := needed&a.Capability, a.Control
	if dwords {
		control = ACSFlags(a.Vector)
	}
	if in(noSourceValidation, g.id(n)) {
		want &^= SourceValidation
	}
	switch missing := want &^ control; {
	case missing != 0:
		v := open(causeACSOff, "does not isolate: its ACS is off (%s)", missing)
		v.missing = missing
		return v
	case want == 0:
		return isolated("isolates: its ACS is always on")
	}
	return isolated("isolates: its ACS is on (%s)", want)
}

// vouched is for what the kernel knows by id alone (drivers/pci/quirks.c, pci_dev_specific_acs_enabled).
func (g *Grouping) vouched(n *node) (v Isolation, ok bool) {
	id := g.id(n)
	switch {
	case in(amdSouthbridge, id) && n.up == nil && g.ivrs:
		many, known := g.multifunction(n)
		if !known {
			return n.unread(), true
		}
		return isolated("isolates, by the kernel's list: AMD says so of its chipset"), many
	case in(separateFunctions, id):
		return isolated("isolates, by the kernel's list: its maker says that its functions are apart"), true
	case in(separatePorts, id):
		return isolated("isolates, by the kernel's list of ports that do so without ACS"), true
	case in(wangxunCards, id):
		return isolated("isolates, by the kernel's list: its maker says that its functions are apart"), true
	case id.Vendor == vendorWangxun:
		return open(causeVendor, "does not isolate: it is not on the kernel's list of this maker's cards that do"), true
	}
	return Isolation{}, false
}

// vouchedAs is for what the kernel knows by id and type.
func (g *Grouping) vouchedAs(n *node, t PortType) (v Isolation, ok bool) {
	id := g.id(n)
	switch {
	case id.Vendor == vendorIntel && t == IntegratedEndpoint:
		return isolated("isolates: it is part of the processor, where VT-d asks for that"), true
	case in(separateRootPorts, id) && t == RootPort, in(zhaoxinPorts, id) && (t == RootPort || t == DownstreamPort):
		return isolated("isolates, by the kernel's list of ports that do so without ACS"), true
	case id.Vendor == vendorZhaoxin && (t == RootPort || t == DownstreamPort):
		return open(causeVendor, "does not isolate: it is not on the kernel's list of this maker's ports that do"), true
	case in(intelPCH, id) && t == RootPort:
		return g.pch(n), true
	}
	return Isolation{}, false
}

// pch judges Intel's older root ports. At boot the kernel turns on what they have instead of ACS, and remembers it; it
// turns the check of bus numbers on last, if it could do the rest (pci_quirk_enable_intel_pch_acs).
func (g *Grouping) pch(n *node) Isolation {
	const miscellaneous, busNumberCheck = 0xd8, 1 << 26
	f, err := g.host.File(configOf(n.at))
	if err != nil {
		return n.unread()
	}
	defer f.Close()
	switch d, ok := dword(f, miscellaneous); {
	case !ok:
		return n.unread()
	case d&busNumberCheck == 0:
		return open(causeVendor, "does not isolate: the kernel could not turn on what it has instead of ACS")
	}
	return isolated("isolates without ACS: the kernel has turned on what Intel's chipset has instead")
}
