package sriov

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net"
	"strconv"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// VF settings go through the PF's network interface: rtnetlink's IFLA_VFINFO_LIST. Numbers and structures are those of
// include/uapi/linux/if_link.h; netlink's own reader takes the padding of the statistics for a counter and cuts switch ids.

// VFInfo is what a PF's driver reports of a VF.
type VFInfo struct {
	Index    int
	Settings Settings
	Stats    *Stats // nil if the driver counts nothing
}

// Stats are a VF's counters.
type Stats struct {
	RxPackets uint64 `json:"rx_packets"`
	TxPackets uint64 `json:"tx_packets"`
	RxBytes   uint64 `json:"rx_bytes"`
	TxBytes   uint64 `json:"tx_bytes"`
	Broadcast uint64 `json:"broadcast"`
	Multicast uint64 `json:"multicast"`
	RxDropped uint64 `json:"rx_dropped"`
	TxDropped uint64 `json:"tx_dropped"`
}

// linkInfo is one RTM_NEWLINK as far as it matters here.
type linkInfo struct {
	index    int
	name     string
	address  net.HardwareAddr
	switchID string // of its e-switch, "" if it is none's port
	portName string
	vfs      []VFInfo
	device   string // that it is of, where its asker knows
}

const statsPad = 6 // IFLA_VF_STATS_PAD, between multicast and rx_dropped

var native = binary.NativeEndian

// attributes calls f for each attribute of a netlink payload, and stops at what is cut off.
func attributes(b []byte, f func(kind uint16, value []byte)) {
	for len(b) >= unix.SizeofRtAttr {
		length, kind := int(native.Uint16(b)), native.Uint16(b[2:])
		if length < unix.SizeofRtAttr || length > len(b) {
			return
		}
		f(kind&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[unix.SizeofRtAttr:length])
		b = b[min((length+3)&^3, len(b)):]
	}
}

// decodeLink reads the payload of an RTM_NEWLINK.
func decodeLink(b []byte) (linkInfo, error) {
	var l linkInfo
	if len(b) < unix.SizeofIfInfomsg {
		return l, fmt.Errorf("a link message of %d bytes", len(b))
	}
	l.index = int(native.Uint32(b[4:]))
	attributes(b[unix.SizeofIfInfomsg:], func(kind uint16, value []byte) {
		switch kind {
		case unix.IFLA_IFNAME:
			l.name = unix.ByteSliceToString(value)
		case unix.IFLA_ADDRESS:
			l.address = value
		case unix.IFLA_PHYS_SWITCH_ID:
			l.switchID = hex.EncodeToString(value)
		case unix.IFLA_PHYS_PORT_NAME:
			l.portName = unix.ByteSliceToString(value)
		}
	})
	attributes(b[unix.SizeofIfInfomsg:], func(kind uint16, value []byte) {
		if kind == unix.IFLA_VFINFO_LIST {
			attributes(value, func(kind uint16, value []byte) {
				if vf, ok := decodeVF(value, len(l.address)); ok && kind == nl.IFLA_VF_INFO {
					l.vfs = append(l.vfs, vf)
				}
			})
		}
	})
	return l, nil
}

// decodeVF reads an IFLA_VF_INFO. Each of its structures begins with the VF's index.
func decodeVF(b []byte, addressLength int) (VFInfo, bool) {
	vf := VFInfo{Index: -1, Settings: Settings{}}
	attributes(b, func(kind uint16, v []byte) {
		if kind == nl.IFLA_VF_STATS {
			vf.Stats = decodeStats(v)
			return
		}
		if kind == nl.IFLA_VF_VLAN_LIST {
			attributes(v, func(_ uint16, v []byte) {
				if len(v) >= nl.SizeofVfVlanInfo {
					vf.Settings[Proto] = protoName(binary.BigEndian.Uint16(v[12:]))
				}
			})
			return
		}
		if len(v) < 8 {
			return
		}
		vf.Index = int(native.Uint32(v))
		word := func(at int) uint32 {
			if at+4 > len(v) {
				return 0
			}
			return native.Uint32(v[at:])
		}
		onOff := func(key Key) {
			switch word(4) { // the kernel begins with -1: a driver that reports nothing leaves it
			case 0:
				vf.Settings[key] = off
			case 1:
				vf.Settings[key] = on
			}
		}
		decimal := func(key Key, n uint32) { vf.Settings[key] = strconv.FormatUint(uint64(n), 10) }
		switch kind {
		case nl.IFLA_VF_MAC:
			if n := 4 + addressLength; addressLength > 0 && n <= len(v) {
				vf.Settings[MAC] = net.HardwareAddr(v[4:n]).String()
			}
		case nl.IFLA_VF_VLAN:
			decimal(VLAN, word(4))
			decimal(QoS, word(8))
		case nl.IFLA_VF_RATE:
			decimal(MinRate, word(4))
			decimal(MaxRate, word(8))
		case nl.IFLA_VF_SPOOFCHK:
			onOff(SpoofChk)
		case nl.IFLA_VF_TRUST:
			onOff(Trust)
		case nl.IFLA_VF_RSS_QUERY_EN:
			onOff(RSSQuery)
		case nl.IFLA_VF_LINK_STATE:
			if n := word(4); int(n) < len(linkStates) {
				vf.Settings[LinkState] = linkStates[n]
			}
		case nl.IFLA_VF_IB_NODE_GUID, nl.IFLA_VF_IB_PORT_GUID:
			if guid := make(net.HardwareAddr, 8); len(v) >= nl.SizeofVfGUID && native.Uint64(v[8:]) != 0 {
				binary.BigEndian.PutUint64(guid, native.Uint64(v[8:]))
				vf.Settings[map[uint16]Key{nl.IFLA_VF_IB_NODE_GUID: NodeGUID, nl.IFLA_VF_IB_PORT_GUID: PortGUID}[kind]] = guid.String()
			}
		}
	})
	return vf, vf.Index >= 0
}

func decodeStats(b []byte) *Stats {
	var s Stats
	into := []*uint64{&s.RxPackets, &s.TxPackets, &s.RxBytes, &s.TxBytes, &s.Broadcast, &s.Multicast, statsPad: nil, &s.RxDropped, &s.TxDropped}
	attributes(b, func(kind uint16, v []byte) {
		if int(kind) < len(into) && into[kind] != nil && len(v) >= 8 {
			*into[kind] = native.Uint64(v)
		}
	})
	return &s
}

func protoName(ethertype uint16) string {
	if ethertype == unix.ETH_P_8021AD {
		return dot1ad
	}
	return dot1q
}

// encode is a setting as the attribute of an IFLA_VF_INFO that sets it.
func (s Setting) encode(index int) (kind int, value []byte) {
	b := native.AppendUint32(nil, uint32(index))
	number := func(k Key) uint32 {
		n, _ := strconv.ParseUint(s.To[k], 10, 32)
		return uint32(n)
	}
	onOff := func(k Key) uint32 {
		if s.To[k] == on {
			return 1
		}
		return 0
	}
	switch s.Keys[0] {
	case MAC:
		mac, _ := net.ParseMAC(s.To[MAC])
		return nl.IFLA_VF_MAC, append(append(b, mac...), make([]byte, 32-len(mac))...)
	case VLAN:
		if s.To[Proto] != s.From[Proto] && s.To[Proto] != "" || s.To[Proto] == dot1ad { // which older kernels do not have
			info := native.AppendUint32(native.AppendUint32(b, number(VLAN)), number(QoS))
			proto := uint16(unix.ETH_P_8021Q)
			if s.To[Proto] == dot1ad {
				proto = unix.ETH_P_8021AD
			}
			info = append(binary.BigEndian.AppendUint16(info, proto), 0, 0)
			return nl.IFLA_VF_VLAN_LIST, nl.NewRtAttr(nl.IFLA_VF_VLAN_INFO, info).Serialize()
		}
		return nl.IFLA_VF_VLAN, native.AppendUint32(native.AppendUint32(b, number(VLAN)), number(QoS))
	case MinRate:
		return nl.IFLA_VF_RATE, native.AppendUint32(native.AppendUint32(b, number(MinRate)), number(MaxRate))
	case Trust:
		return nl.IFLA_VF_TRUST, native.AppendUint32(b, onOff(Trust))
	case SpoofChk:
		return nl.IFLA_VF_SPOOFCHK, native.AppendUint32(b, onOff(SpoofChk))
	case RSSQuery:
		return nl.IFLA_VF_RSS_QUERY_EN, native.AppendUint32(b, onOff(RSSQuery))
	case LinkState:
		state := uint32(0)
		for i, word := range linkStates {
			if s.To[LinkState] == word {
				state = uint32(i)
			}
		}
		return nl.IFLA_VF_LINK_STATE, native.AppendUint32(b, state)
	}
	guid, _ := net.ParseMAC(s.To[s.Keys[0]])
	kind = nl.IFLA_VF_IB_NODE_GUID
	if s.Keys[0] == PortGUID {
		kind = nl.IFLA_VF_IB_PORT_GUID
	}
	return kind, native.AppendUint64(append(b, 0, 0, 0, 0), binary.BigEndian.Uint64(append(guid, make([]byte, 8)...)))
}
