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
		return nil, fmt.Errorf("%s is no MAC address of six bytes", pf)
	}
	if index < 0 || index > 0xfff {
		return nil, fmt.Errorf("VF %d has no derived MAC address: they go up to 4095", index)
	}
	maker := uint32(pf[0])<<16 | uint32(pf[1])<<8 | uint32(pf[2])
	upper := (maker^maker>>10^maker>>20)&0x3ff<<12 | uint32(index)
	return net.HardwareAddr{byte(upper>>16)<<2 | 2, byte(upper >> 8), byte(upper), pf[3], pf[4], pf[5]}, nil
}
