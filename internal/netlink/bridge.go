package netlink

import (
	"fmt"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// PortVLAN is a VLAN that a bridge's port, or the bridge itself, lets through.
type PortVLAN struct {
	ID       int  `json:"id"`
	PVID     bool `json:"pvid"`     // frames without a tag that come in are of it
	Untagged bool `json:"untagged"` // its frames go out without a tag
}

// Of include/uapi/linux/if_link.h, rtnetlink.h and if_bridge.h.
const (
	filterBridgeVLANs = 1 << 2 // RTEXT_FILTER_BRVLAN_COMPRESSED: ranges take two entries
	bridgeVLANInfo    = 2      // IFLA_BRIDGE_VLAN_INFO
	vlanPVID          = 1 << 1
	vlanUntagged      = 1 << 2
	vlanRangeBegin    = 1 << 3
	vlanRangeEnd      = 1 << 4
)

// BridgeVLANs are the VLANs of the ports of all bridges, and of the bridges, by the name of the interface. One of a
// bridge that keeps no VLANs apart has none.
func (c *Conn) BridgeVLANs() (map[string][]PortVLAN, error) {
	mask := nl.NewRtAttr(unix.IFLA_EXT_MASK, nl.Uint32Attr(filterBridgeVLANs))
	answers, err := c.Dump(unix.RTM_GETLINK, nl.NewIfInfomsg(unix.AF_BRIDGE), mask)
	if err != nil {
		return nil, fmt.Errorf("list the VLANs of bridges: %w", err)
	}
	out := map[string][]PortVLAN{}
	for _, b := range answers {
		if name, vlans := decodePortVLANs(b); name != "" {
			out[name] = append(out[name], vlans...)
		}
	}
	return out, nil
}

// decodePortVLANs reads an RTM_NEWLINK of the family AF_BRIDGE.
func decodePortVLANs(b []byte) (name string, vlans []PortVLAN) {
	if len(b) < unix.SizeofIfInfomsg {
		return "", nil
	}
	Attributes(b[unix.SizeofIfInfomsg:], func(kind uint16, value []byte) {
		switch kind {
		case unix.IFLA_IFNAME:
			name = unix.ByteSliceToString(value)
		case unix.IFLA_AF_SPEC:
			vlans = decodeVLANs(value)
		}
	})
	return name, vlans
}

// decodeVLANs reads entries of struct bridge_vlan_info: flags and a number, of which two may be the ends of a range.
func decodeVLANs(b []byte) (out []PortVLAN) {
	begin := 0
	Attributes(b, func(kind uint16, value []byte) {
		if kind != bridgeVLANInfo || len(value) < 4 {
			return
		}
		flags, id := native.Uint16(value), int(native.Uint16(value[2:]))
		const most = 4094
		if id < 1 || id > most {
			return
		}
		if flags&vlanRangeBegin != 0 {
			begin = id
			return
		}
		first := id
		if flags&vlanRangeEnd != 0 && begin > 0 && begin <= id {
			first = begin
		}
		begin = 0
		for n := first; n <= id && len(out) <= most; n++ {
			out = append(out, PortVLAN{ID: n, PVID: flags&vlanPVID != 0, Untagged: flags&vlanUntagged != 0})
		}
	})
	return out
}
