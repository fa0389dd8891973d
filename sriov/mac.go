package sriov

import (
	"fmt"
	"net"
)

// DeriveMAC makes a locally administered address out of a PF's permanent one and a VF's index: the same at every boot,
// and of every version of viaduct. The lower half is the PF's own, which tells the cards of one maker apart; in the
// upper, beside the two bits that say "local" and "one station", are twelve bits of index and ten of what the maker's
// number folds to. An error says that the address has not six bytes, or that there is no such index.
func DeriveMAC(pf net.HardwareAddr, index int) (net.HardwareAddr, error) {
	if len(pf) != 6 {
		return nil, fmt.Errorf("%s is not a MAC address of six bytes", pf)
	}
	if index < 0 || index > 0xfff {
		return nil, fmt.Errorf("VF %d has no derived MAC address: they go up to 4095", index)
	}
	maker := uint32(pf[0])<<16 | uint32(pf[1])<<8 | uint32(pf[2])
	upper := (maker^maker>>10^maker>>20)&0x3ff<<12 | uint32(index)
	return net.HardwareAddr{byte(upper>>16)<<2 | 2, byte(upper >> 8), byte(upper), pf[3], pf[4], pf[5]}, nil
}

// DeriveGUID makes an InfiniBand GUID out of a PF's and a VF's index: the same at every boot, and of every version of
// viaduct. It says that it is local, and differs from the PF's in the two bytes in the middle, which hold no number of
// the card where a maker makes GUIDs of MAC addresses. An error says that the GUID has not eight bytes, or that there
// is no such index.
func DeriveGUID(pf net.HardwareAddr, index int) (net.HardwareAddr, error) {
	if len(pf) != 8 {
		return nil, fmt.Errorf("%s is not a GUID of eight bytes", pf)
	}
	if index < 0 || index >= 0xffff {
		return nil, fmt.Errorf("VF %d has no derived GUID: they go up to 65534", index)
	}
	middle := (uint16(pf[3])<<8 | uint16(pf[4])) ^ uint16(index+1)
	return net.HardwareAddr{pf[0] | 2, pf[1], pf[2], byte(middle >> 8), byte(middle), pf[5], pf[6], pf[7]}, nil
}
