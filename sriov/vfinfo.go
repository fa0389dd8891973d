package sriov

import (
	"encoding/binary"

	"github.com/vishvananda/netlink/nl"

	"viaduct/internal/netlink"
)

var native = binary.NativeEndian

// VFInfo is what a PF's driver reports of a VF.
type VFInfo struct {
	Index    int
	Settings Settings
	Stats    *Stats // nil if the driver counts nothing, or the kernel did not tell
}

// Stats are a VF's counters. The kernel's numbers of the attributes leave one out, IFLA_VF_STATS_PAD.
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

// decodeVF reads the payload of an IFLA_VF_INFO. Each of its structures begins with the VF's index.
func decodeVF(b []byte, addressLength int) (VFInfo, bool) {
	vf := VFInfo{Index: -1, Settings: Settings{}}
	netlink.Attributes(b, func(kind uint16, v []byte) {
		if kind == nl.IFLA_VF_STATS {
			vf.Stats = decodeStats(v)
			return
		}
		if len(v) < 8 {
			return
		}
		if kind != nl.IFLA_VF_VLAN_LIST {
			vf.Index = int(native.Uint32(v))
		}

		for i := range table {
			r := &table[i]
			if r.decode == nil || r.attribute != int(kind) {
				continue
			}
			if value, known := r.decode(v, addressLength); known {
				vf.Settings[r.key] = value
			}
		}
	})
	return vf, vf.Index >= 0
}

func decodeStats(b []byte) *Stats {
	var s Stats
	into := []*uint64{
		&s.RxPackets, &s.TxPackets, &s.RxBytes, &s.TxBytes, &s.Broadcast, &s.Multicast, nil, &s.RxDropped, &s.TxDropped,
	}
	netlink.Attributes(b, func(kind uint16, v []byte) {
		if int(kind) < len(into) && into[kind] != nil && len(v) >= 8 {
			*into[kind] = native.Uint64(v)
		}
	})
	return &s
}
