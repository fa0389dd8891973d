package iommu

import (
	"errors"
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

// Identify returns what can be said of a device while its own driver has it. What it does not have is left out; what
// cannot be read is an error, as it would pass for what the device does not have.
func Identify(h *Host, d *Device) (Identity, error) {
	id := Identity{ID: d.ID}
	var pathErr, serialErr, macErr error
	id.Path, pathErr = PathOf(h, d)
	if d.PhysFn == nil {
		// A VF has no number of its own, and reading config space takes time.
		id.Serial, serialErr = ReadSerial(h, d.Address)
	}
	if len(d.Netdevs) > 0 {
		id.MACs, macErr = PermanentMACs(h, d)
	}
	if err := errors.Join(pathErr, serialErr, macErr); err != nil {
		return Identity{}, fmt.Errorf("what tells %s from other devices cannot be read: %w", d.Name, err)
	}
	return id, nil
}

// Differs says how a device is not the one that was identified, wherever it is now; "" if nothing tells them apart. It
// is an error if that cannot be read.
func (was *Identity) Differs(h *Host, d *Device) (string, error) {
	if d.ID != was.ID {
		return fmt.Sprintf("it is a %04x:%04x, and was a %04x:%04x", d.Vendor, d.Device, was.ID.Vendor,
			was.ID.Device), nil
	}
	if d.PhysFn != nil {
		// It has no serial number of its own, and may have any MAC address.
		return "", nil
	}

	serial, err := ReadSerial(h, d.Address)
	if err != nil {
		return "", fmt.Errorf("the serial number of %s cannot be read: %w", d.Name, err)
	}
	// A driver that tells one may be there now or not.
	if serial != was.Serial && serial != "" && was.Serial != "" {
		return fmt.Sprintf("its serial number is %q instead of %q", serial, was.Serial), nil
	}

	macs, err := PermanentMACs(h, d)
	if err != nil {
		return "", fmt.Errorf("the MAC address of %s cannot be read: %w", d.Name, err)
	}
	old, now := sortedMACs(was.MACs), sortedMACs(macs)
	common := slices.ContainsFunc(now, func(mac string) bool { return slices.Contains(old, mac) })
	if len(old) > 0 && len(now) > 0 && !common {
		return fmt.Sprintf("its MAC address is %s instead of %s", strings.Join(now, ", "), strings.Join(old, ", ")), nil
	}
	return "", nil
}

func sortedMACs(byInterface map[string]string) []string {
	return slices.Sorted(maps.Values(byInterface))
}
