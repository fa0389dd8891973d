package netlink

import (
	"encoding/binary"
	"fmt"
	"net"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Neighbor is an entry of a bridge's forwarding table: over which of its ports an address is reached.
type Neighbor struct {
	Index   int // of the port
	Bridge  int // the bridge's index; 0: the entry is a NIC's own
	VLAN    int // 0: of none
	Address net.HardwareAddr
	Own     bool // it is the port's own address, or was written by somebody: it was not learned
}

// Neighbors are the forwarding tables of all bridges.
func (c *Conn) Neighbors() ([]Neighbor, error) {
	answers, err := c.Dump(unix.RTM_GETNEIGH, neighborMessage{})
	if err != nil {
		return nil, fmt.Errorf("list the forwarding tables of bridges: %w", err)
	}
	var out []Neighbor
	for _, b := range answers {
		if n, ok := decodeNeighbor(b); ok {
			out = append(out, n)
		}
	}
	return out, nil
}

// neighborMessage is struct ndmsg (include/uapi/linux/neighbour.h).
type neighborMessage struct {
	index int
	flags byte
}

const neighborHeader = 12

func (neighborMessage) Len() int { return neighborHeader }

func (m neighborMessage) Serialize() []byte {
	b := make([]byte, neighborHeader)
	b[0] = unix.AF_BRIDGE
	binary.NativeEndian.PutUint32(b[4:], uint32(m.index))
	b[10] = m.flags
	return b
}

func decodeNeighbor(b []byte) (Neighbor, bool) {
	if len(b) < neighborHeader || b[0] != unix.AF_BRIDGE {
		return Neighbor{}, false
	}
	state := binary.NativeEndian.Uint16(b[8:])
	n := Neighbor{Index: int(int32(native.Uint32(b[4:]))), Own: state&(unix.NUD_PERMANENT|unix.NUD_NOARP) != 0}
	Attributes(b[neighborHeader:], func(kind uint16, value []byte) {
		switch {
		case kind == unix.NDA_LLADDR && len(value) == 6:
			n.Address = append(net.HardwareAddr(nil), value...)
		case kind == unix.NDA_MASTER && len(value) == 4:
			n.Bridge = int(int32(native.Uint32(value)))
		case kind == unix.NDA_VLAN && len(value) == 2:
			n.VLAN = int(native.Uint16(value))
		}
	})
	return n, n.Address != nil
}

// Forget takes an entry out of a bridge's forwarding table.
func (c *Conn) Forget(n Neighbor) error {
	parts := []nl.NetlinkRequestData{
		neighborMessage{index: n.Index, flags: unix.NTF_MASTER}, nl.NewRtAttr(unix.NDA_LLADDR, n.Address),
	}
	if n.VLAN != 0 {
		parts = append(parts, nl.NewRtAttr(unix.NDA_VLAN, nl.Uint16Attr(uint16(n.VLAN))))
	}
	_, err := c.Ask(unix.RTM_DELNEIGH, unix.NLM_F_ACK, parts...)
	return err
}
