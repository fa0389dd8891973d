package vfio

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"viaduct/iommu"
)

// Identity is what tells a device from all others for longer than its address does. A device on a vfio driver has no network
// interface to ask for its MAC address, so it is recorded when the device is taken.
type Identity struct {
	Path   string            `json:"path,omitempty"` // see iommu.PhysicalPath
	Serial string            `json:"serial,omitempty"`
	ID     iommu.ID          `json:"id"`
	MACs   map[string]string `json:"macs,omitempty"` // permanent where the interface tells, by interface
}

// Identify is what can be said of a device while its own driver has it. What cannot be read is left out.
func (b *Binder) Identify(d *iommu.Device) Identity {
	id := Identity{ID: d.ID}
	id.Path, _ = iommu.PathOf(b.Host, d)
	if d.PhysFn == nil { // a VF has no number of its own, and reading config space takes time
		id.Serial, _ = iommu.ReadSerial(b.Host, d.Address)
	}
	if len(d.Netdevs) > 0 {
		id.MACs = MACs(b.Host, d)
	}
	return id
}

// Taken is what was written down of a device when it was taken; nothing of one that was not.
func (b *Binder) Taken(d *iommu.Device) (Identity, error) {
	r, _, err := b.taken(d)
	return r.Identity, err
}

// Differs says how a device is not the one that was identified, wherever it is now; "" if nothing tells them apart.
func Differs(h *iommu.Host, was *Identity, d *iommu.Device) string {
	if d.ID != was.ID {
		return fmt.Sprintf("it is a %04x:%04x, which was a %04x:%04x", d.Vendor, d.Device, was.ID.Vendor, was.ID.Device)
	}
	if d.PhysFn != nil { // which has no number of its own, and any MAC address
		return ""
	}
	if serial, err := iommu.ReadSerial(h, d.Address); err != nil || serial != was.Serial && serial != "" && was.Serial != "" { // a driver that tells one may be there now or not
		return fmt.Sprintf("its serial number is %q instead of %q", serial, was.Serial)
	}
	old, now := macs(was.MACs), macs(MACs(h, d))
	if len(old) > 0 && len(now) > 0 && !slices.ContainsFunc(now, func(mac string) bool { return slices.Contains(old, mac) }) {
		return fmt.Sprintf("its MAC address is %s instead of %s", strings.Join(now, ", "), strings.Join(old, ", "))
	}
	return ""
}

func macs(byInterface map[string]string) []string {
	return slices.Sorted(maps.Values(byInterface))
}
