package iommu

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"viaduct/internal/host"
)

// ResetWay is how a device can be reset once nobody uses it.
type ResetWay string

// The ways.
const (
	// ResetUnknown is that of a captured host that does not tell.
	ResetUnknown ResetWay = "unknown"
	// ResetFunction is a reset of the device alone.
	ResetFunction ResetWay = "function"
	// ResetBus is one of all that is on its bus, which VFIO makes for who has all of it.
	ResetBus ResetWay = "bus"
	// ResetNone is that nothing resets it: it is on a root bus.
	ResetNone ResetWay = "none"
)

// Reset is how a device can be reset, as far as sysfs tells.
type Reset struct {
	Way ResetWay
	// Methods are those of a reset of the device alone, in the kernel's order; nil if the kernel does not tell, as
	// before Linux 5.15.
	Methods []string
	// With are those that a reset of its bus takes along.
	With []*Device
}

// ResetOf tells how a device can be reset.
func ResetOf(h *Host, t *Topology, d *Device) (Reset, error) {
	dir, err := h.Open(path.Join(pciDevices, d.Address.String()))
	if err != nil {
		return Reset{}, err
	}
	defer dir.Close()
	alone, err := canReset(h, dir)
	if err != nil {
		return Reset{}, err
	}
	text, err := dir.String("reset_method")
	if err != nil && !host.Absent(err) {
		return Reset{}, err
	}
	told := err == nil
	out := Reset{Way: ResetFunction, Methods: strings.Fields(text)}
	switch {
	case alone == nil && len(out.Methods) == 0:
		return Reset{Way: ResetUnknown}, nil
	case alone == nil:
		// Who captured the host did not look for the other file.
		alone = new(true)
	case *alone && !told:
		return out, nil
	}

	with := t.onBusOf(d)
	byItself := func(method string) bool {
		// The kernel offers the reset of a bus to what is on it with others too, if these came later
		// (drivers/pci/pci.c, pci_parent_bus_reset).
		return len(with) == 0 || method != "bus" && method != "cxl_bus"
	}
	if *alone && slices.ContainsFunc(out.Methods, byItself) {
		return out, nil
	}
	target, err := optional(h.Link(path.Join(pciDevices, d.Name)))
	if err != nil {
		return Reset{}, err
	}
	if len(pathAddresses(target)) < 2 {
		return Reset{Way: ResetNone}, nil
	}
	return Reset{Way: ResetBus, With: with}, nil
}

// onBusOf are the other functions on a device's bus, but for VFs, which go with their PF.
func (t *Topology) onBusOf(d *Device) []*Device {
	var out []*Device
	t.All(func(o *Device) bool {
		if o.PCI && o.PhysFn == nil && o.Address.Domain == d.Address.Domain && o.Address.Bus == d.Address.Bus &&
			o.Name != d.Name {
			out = append(out, o)
		}
		return true
	})
	slices.SortFunc(out, func(a, b *Device) int { return a.Address.Compare(b.Address) })
	return out
}

// Problem says why a device cannot be reset between two guests who are given all those that has tells; "" if it can, or
// if that is not known.
func (r Reset) Problem(has func(*Device) bool) string {
	if r.Way == ResetNone {
		return "nothing can reset it: the kernel has no way, and it is on a root bus"
	}
	var others []string
	for _, o := range r.With {
		if !has(o) {
			others = append(others, o.Name)
		}
	}
	if len(others) == 0 {
		return ""
	}
	return fmt.Sprintf("it can be reset only together with %s, which %s with the host", strings.Join(others, ", "),
		map[bool]string{true: "stays", false: "stay"}[len(others) == 1])
}

// String is how a device can be reset, in words.
func (r Reset) String() string {
	switch {
	case r.Way == ResetFunction && len(r.Methods) > 0:
		return "by itself: " + strings.Join(r.Methods, " ")
	case r.Way == ResetFunction:
		return "by itself (a kernel older than 5.15 does not say how)"
	case r.Way == ResetBus && len(r.With) == 0:
		return "with its bus, which has nothing else on it"
	case r.Way == ResetBus:
		var names []string
		for _, o := range r.With {
			names = append(names, o.Name)
		}
		return "only together with " + strings.Join(names, ", ")
	case r.Way == ResetNone:
		return "not at all: the kernel has no way, and it is on a root bus"
	}
	return "not known"
}
