package iommu

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Identity is what tells a device from all others for longer than its address does. A device on a vfio driver has no
// network interface to ask for its MAC address, so it is recorded when the device is taken.
type Identity struct {
	Path   string            `json:"path,omitempty"` // see PhysicalPath
	Serial string            `json:"serial,omitempty"`
	ID     ID                `json:"id"`
	MACs   map[string]string `json:"macs,omitempty"` // see PermanentMACs
}

// Identify returns what can be said of a device while its own driver has it. What cannot be read is left out.
func Identify(h *Host, d *Device) Identity {
	id := Identity{ID: d.ID}
	id.Path, _ = PathOf(h, d)
	if d.PhysFn == nil {
		// A VF has no number of its own, and reading config space takes time.
		id.Serial, _ = ReadSerial(h, d.Address)
	}
	if len(d.Netdevs) > 0 {
		id.MACs, _ = PermanentMACs(h, d)
	}
	return id
}

// Differs says how a device is not the one that was identified, wherever it is now; "" if nothing tells them apart.
func (was *Identity) Differs(h *Host, d *Device) string {
	if d.ID != was.ID {
		return fmt.Sprintf("it is a %04x:%04x, and was a %04x:%04x", d.Vendor, d.Device, was.ID.Vendor, was.ID.Device)
	}
	if d.PhysFn != nil {
		// It has no serial number of its own, and may have any MAC address.
		return ""
	}

	serial, err := ReadSerial(h, d.Address)
	// A driver that tells one may be there now or not.
	if err != nil || serial != was.Serial && serial != "" && was.Serial != "" {
		return fmt.Sprintf("its serial number is %q instead of %q", serial, was.Serial)
	}

	macs, err := PermanentMACs(h, d)
	if err != nil {
		return "its MAC address cannot be read: " + err.Error()
	}
	old, now := sortedMACs(was.MACs), sortedMACs(macs)
	common := slices.ContainsFunc(now, func(mac string) bool { return slices.Contains(old, mac) })
	if len(old) > 0 && len(now) > 0 && !common {
		return fmt.Sprintf("its MAC address is %s instead of %s", strings.Join(now, ", "), strings.Join(old, ", "))
	}
	return ""
}

func sortedMACs(byInterface map[string]string) []string {
	return slices.Sorted(maps.Values(byInterface))
}
