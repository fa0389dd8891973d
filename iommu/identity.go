package iommu

import (
	"fmt"
	"maps"
	"net"
	"path"
	"slices"
	"strings"

	"viaduct/internal/netlink"
)

// Identity is what tells a device from all others for longer than its address does. A device on a vfio driver has no
// network interface to ask for its MAC address, so it is recorded when the device is taken.
type Identity struct {
	Path   string            `json:"path,omitempty"` // see PhysicalPath
	Serial string            `json:"serial,omitempty"`
	ID     ID                `json:"id"`
	MACs   map[string]string `json:"macs,omitempty"` // see MACs
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
		id.MACs = MACs(h, d)
	}
	return id
}

// Differs says how a device is not the one that was identified, wherever it is now; "" if nothing tells them apart.
func (was *Identity) Differs(h *Host, d *Device) string {
	if d.ID != was.ID {
		return fmt.Sprintf("it is a %04x:%04x, which was a %04x:%04x", d.Vendor, d.Device, was.ID.Vendor, was.ID.Device)
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

	old, now := sortedMACs(was.MACs), sortedMACs(MACs(h, d))
	common := slices.ContainsFunc(now, func(mac string) bool { return slices.Contains(old, mac) })
	if len(old) > 0 && len(now) > 0 && !common {
		return fmt.Sprintf("its MAC address is %s instead of %s", strings.Join(now, ", "), strings.Join(old, ", "))
	}
	return ""
}

func sortedMACs(byInterface map[string]string) []string {
	return slices.Sorted(maps.Values(byInterface))
}

// MACs returns the [PermanentMACs] of a device's interfaces, also of those that udev has named since the device was
// looked at.
func MACs(h *Host, d *Device) map[string]string {
	out := PermanentMACs(h, d.Netdevs)
	if len(out) < len(d.Netdevs) && d.PCI {
		if now, err := ClassDevices(h, d.Address); err == nil {
			return PermanentMACs(h, now["net"])
		}
	}
	return out
}

// PermanentMACs returns, by interface, the addresses that interfaces were made with, or those they have where the
// kernel does not know these. Interfaces that are gone are left out.
func PermanentMACs(h *Host, names []string) map[string]string {
	out := map[string]string{}
	for _, n := range names {
		if mac, err := h.String(path.Join(netClass, n, "address")); err == nil {
			out[n] = mac
		}
	}
	if !h.Live() || len(names) == 0 {
		return out
	}

	permanent, err := netlink.Permanent(h.Host, names)
	if err != nil {
		return out
	}
	for n, mac := range permanent {
		out[n] = mac.String()
	}
	return out
}

// PermanentMAC returns the address that an interface was made with, or that it has where the kernel does not know that.
// An error says that the kernel could not be asked: then it is not known, and nothing may be derived from it.
func PermanentMAC(h *Host, name string) (net.HardwareAddr, error) {
	if h.Live() {
		permanent, err := netlink.Permanent(h.Host, []string{name})
		if err != nil {
			return nil, err
		}
		if mac := permanent[name]; mac != nil {
			return mac, nil
		}
	}

	text, err := h.String(path.Join(netClass, name, "address"))
	if err != nil {
		return nil, err
	}
	mac, err := net.ParseMAC(text)
	if err != nil {
		return nil, fmt.Errorf("interface %s: %w", name, err)
	}
	return mac, nil
}
