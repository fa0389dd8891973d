package vfio

import (
	"fmt"
	"strings"

	"viaduct/iommu"
)

// Unit is what must be taken together with the given devices: the endpoints of their groups, each once. Bridges are left
// alone. A device without a group is a unit of its own.
func Unit(t *iommu.Topology, devices []*iommu.Device) ([]*iommu.Device, error) {
	var out []*iommu.Device
	seen := map[string]bool{}
	for _, d := range devices {
		members := []*iommu.Device{d}
		if d.Group >= 0 {
			g, err := t.Group(d.Group)
			if err != nil {
				return nil, err
			}
			members = g.Endpoints()
		}
		for _, m := range members {
			if !seen[m.Name] {
				seen[m.Name] = true
				out = append(out, m)
			}
		}
	}
	return out, nil
}

// CheckTake refuses, with a *RefusedError that names every reason, what must not be or cannot be taken: devices the host
// itself stands on, PFs with VFs, bridges, devices that no IOMMU is in front of.
func CheckTake(h *iommu.Host, t *iommu.Topology, asked, unit []*iommu.Device) error {
	var reasons []string
	cure := ""
	add := func(format string, a ...any) { reasons = append(reasons, fmt.Sprintf(format, a...)) }
	for _, d := range asked {
		switch {
		case d.IsBridge():
			add("%s is a bridge, which no guest can have", d.Name)
		case d.Group < 0 && len(t.Groups) == 0:
			add("%s is in no IOMMU group, because no IOMMU is active on this host", d.Name)
			cure = "turn on AMD-Vi or VT-d in the firmware; an Intel host may need intel_iommu=on on the kernel command line"
		case d.Group < 0:
			add("%s is in no IOMMU group: the IOMMU does not cover it", d.Name)
		}
	}
	for _, d := range unit {
		switch {
		case !d.PCI:
			add("%s shares the group and is no PCI device", d.Name)
		case d.SRIOV != nil && len(d.SRIOV.VFs) > 0:
			add("%s is a PF with %d VFs, and VFIO takes no such PF", d.Name, len(d.SRIOV.VFs))
			cure = "viaduct vf destroy " + d.Name
		}
	}
	for _, d := range asked {
		if d.Group < 0 {
			continue
		}
		g, err := t.Group(d.Group)
		if err != nil {
			return err
		}
		for _, m := range g.Blockers() {
			if m.IsBridge() {
				add("bridge %s of the group is on %s and so keeps the group from being viable", m.Name, m.Driver)
			}
		}
	}
	holders, err := Holders(h, unit)
	if err != nil {
		return err
	}
	reasons = append(reasons, holders...)
	return refused("take "+strings.Join(names(asked), " "), reasons, cure)
}

// CheckGiveBack refuses to give back what a guest still has: the write would wait for the guest.
func CheckGiveBack(h *iommu.Host, asked, unit []*iommu.Device) error {
	holders, err := processHolders(h, unit)
	if err != nil {
		return err
	}
	return refused("give back "+strings.Join(names(asked), " "), holders, "end the guest first")
}

func refused(what string, reasons []string, cure string) error {
	if len(reasons) == 0 {
		return nil
	}
	return &RefusedError{What: what, Reasons: reasons, Cure: cure}
}

func names(devices []*iommu.Device) []string {
	out := make([]string, len(devices))
	for i, d := range devices {
		out[i] = d.Name
	}
	return out
}
