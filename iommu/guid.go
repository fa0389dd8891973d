package iommu

import (
	"encoding/hex"
	"net"
	"path"
	"slices"
	"strings"

	"viaduct/internal/host"
)

// ParseGUID reads an InfiniBand GUID: eight bytes, as 0c:42:a1:03:00:00:00:01, as the kernel writes it
// (0c42:a103:0000:0001), or without signs.
func ParseGUID(s string) (net.HardwareAddr, bool) {
	digits := strings.NewReplacer(":", "", "-", "").Replace(strings.TrimPrefix(strings.ToLower(s), "0x"))
	guid, err := hex.DecodeString(digits)
	return guid, err == nil && len(guid) == 8
}

// GUIDs are the InfiniBand GUIDs of a device, those of its ports first; none of a device of another kind. A port's is
// in the address of its network interface, the node's is what its driver tells.
func GUIDs(h *Host, d *Device) ([]net.HardwareAddr, error) {
	if !d.PCI || d.PhysFn != nil || d.Class>>16 != 0x02 && d.Class>>16 != 0x0c {
		return nil, nil
	}
	macs, err := PermanentMACs(h, d)
	if err != nil {
		return nil, err
	}
	var out []net.HardwareAddr
	add := func(guid net.HardwareAddr) {
		same := func(g net.HardwareAddr) bool { return g.String() == guid.String() }
		if strings.Trim(guid.String(), "0:") != "" && !slices.ContainsFunc(out, same) {
			out = append(out, guid)
		}
	}
	for _, n := range d.Netdevs {
		// INFINIBAND_ALEN of include/uapi/linux/if_infiniband.h
		const length = 20
		if mac, err := net.ParseMAC(macs[n]); err == nil && len(mac) == length {
			add(mac[length-8:])
		}
	}

	const class = "sys/class/infiniband"
	all, err := h.Names(class)
	if host.Absent(err) {
		return out, nil
	}
	if err != nil {
		return nil, err
	}
	for _, n := range all {
		target, err := h.Link(path.Join(class, n))
		if err != nil {
			return nil, unlessAbsent(err)
		}
		if at, ok := lastAddress(target); !ok || at != d.Address {
			continue
		}
		text, err := h.String(path.Join(class, n, "node_guid"))
		if err != nil && !host.Absent(err) {
			return nil, err
		}
		if guid, ok := ParseGUID(text); ok {
			add(guid)
		}
	}
	return out, nil
}

// HasInfiniBand reports whether a device has a port of InfiniBand. Others with GUIDs do RDMA over Ethernet.
func HasInfiniBand(h *Host, d *Device) (bool, error) {
	guids, err := GUIDs(h, d)
	if err != nil || len(guids) == 0 {
		return false, err
	}

	const class = "sys/class/infiniband"
	all, err := h.Names(class)
	if err != nil && !host.Absent(err) {
		return false, err
	}

	ethernet := false
	for _, n := range all {
		target, err := h.Link(path.Join(class, n))
		if at, ok := lastAddress(target); err != nil || !ok || at != d.Address {
			continue
		}
		ports, err := h.Names(path.Join(class, n, "ports"))
		if err != nil && !host.Absent(err) {
			return false, err
		}
		for _, p := range ports {
			layer, err := h.String(path.Join(class, n, "ports", p, "link_layer"))
			if err != nil && !host.Absent(err) {
				return false, err
			}
			if layer != "Ethernet" {
				return true, nil
			}
			ethernet = true
		}
	}

	return !ethernet, nil
}
