package netlink

import (
	"fmt"
	"net"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Address is an IP address of an interface.
type Address struct {
	Index int // of the interface
	net.IPNet
}

// Addresses are the addresses of all interfaces.
func (c *Conn) Addresses() ([]Address, error) {
	answers, err := c.Dump(unix.RTM_GETADDR, nl.NewIfAddrmsg(unix.AF_UNSPEC))
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}

	var out []Address
	for _, b := range answers {
		if a, ok := decodeAddress(b); ok {
			out = append(out, a)
		}
	}
	return out, nil
}

// decodeAddress reads an RTM_NEWADDR. On a link between two hosts IFA_LOCAL is this one's address, and IFA_ADDRESS the
// other's.
func decodeAddress(b []byte) (Address, bool) {
	if len(b) < unix.SizeofIfAddrmsg {
		return Address{}, false
	}
	bits := int(b[1])
	a := Address{Index: int(native.Uint32(b[4:]))}

	var local, address net.IP
	Attributes(b[unix.SizeofIfAddrmsg:], func(kind uint16, value []byte) {
		switch kind {
		case unix.IFA_LOCAL:
			local = append(net.IP(nil), value...)
		case unix.IFA_ADDRESS:
			address = append(net.IP(nil), value...)
		}
	})
	if a.IP = local; a.IP == nil {
		a.IP = address
	}
	if len(a.IP) != net.IPv4len && len(a.IP) != net.IPv6len {
		return Address{}, false
	}
	a.Mask = net.CIDRMask(bits, 8*len(a.IP))
	return a, a.Mask != nil
}

// Route is a route of any table.
type Route struct {
	Kind     uint8 // unix.RTN_UNICAST and the like
	Protocol uint8 // who made it: unix.RTPROT_KERNEL and the like
	To       *net.IPNet
	Over     []int // indexes of the interfaces it leads over; none if it names another thing, as a nexthop object
}

// Default reports whether a route leads to everywhere.
func (r *Route) Default() bool {
	if r.To == nil {
		return true
	}
	ones, _ := r.To.Mask.Size()
	return ones == 0 && r.To.IP.IsUnspecified()
}

// Routes are the routes of all tables.
func (c *Conn) Routes() ([]Route, error) {
	answers, err := c.Dump(unix.RTM_GETROUTE, &nl.RtMsg{})
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}

	var out []Route
	for _, b := range answers {
		if r, ok := decodeRoute(b); ok {
			out = append(out, r)
		}
	}
	return out, nil
}

// RouteTo asks over which interface the kernel sends from one address to another. An errno, as ENETUNREACH, says that
// there is no way.
func (c *Conn) RouteTo(to, from net.IP) ([]int, error) {
	family, length := unix.AF_INET6, net.IPv6len
	if v4 := to.To4(); v4 != nil {
		family, length, to, from = unix.AF_INET, net.IPv4len, v4, from.To4()
	}
	msg := &nl.RtMsg{}
	msg.Family, msg.Dst_len = uint8(family), uint8(8*length)
	parts := []nl.NetlinkRequestData{msg, nl.NewRtAttr(unix.RTA_DST, to)}
	if len(from) == length {
		msg.Src_len = uint8(8 * length)
		parts = append(parts, nl.NewRtAttr(unix.RTA_SRC, from))
	}
	answer, err := c.Ask(unix.RTM_GETROUTE, 0, parts...)
	if err != nil {
		return nil, err
	}
	r, ok := decodeRoute(answer)
	if !ok {
		return nil, fmt.Errorf("%w: a route of %d bytes", ErrCut, len(answer))
	}
	return r.Over, nil
}

// decodeRoute reads an RTM_NEWROUTE.
func decodeRoute(b []byte) (Route, bool) {
	if len(b) < unix.SizeofRtMsg {
		return Route{}, false
	}
	bits := int(b[1])
	r := Route{Protocol: b[5], Kind: b[7]}

	Attributes(b[unix.SizeofRtMsg:], func(kind uint16, value []byte) {
		switch {
		case kind == unix.RTA_DST && (len(value) == net.IPv4len || len(value) == net.IPv6len):
			if mask := net.CIDRMask(bits, 8*len(value)); mask != nil {
				r.To = &net.IPNet{IP: append(net.IP(nil), value...), Mask: mask}
			}
		case kind == unix.RTA_OIF && len(value) >= 4:
			r.Over = append(r.Over, int(native.Uint32(value)))
		case kind == unix.RTA_MULTIPATH:
			r.Over = append(r.Over, decodeHops(value)...)
		}
	})
	return r, true
}

// decodeHops reads the interfaces of the struct rtnexthops of a route with several ways.
func decodeHops(b []byte) []int {
	var out []int
	for len(b) >= unix.SizeofRtNexthop {
		length := int(native.Uint16(b))
		if length < unix.SizeofRtNexthop || length > len(b) {
			break
		}
		out = append(out, int(native.Uint32(b[4:])))
		b = b[min((length+3)&^3, len(b)):]
	}
	return out
}

// Peer is what a network namespace calls another, that of a process; false if it has no name for it.
func (c *Conn) Peer(pid int) (id int, ok bool, err error) {
	msg := &nl.RtGenMsg{}
	pidAttribute := nl.NewRtAttr(unix.NETNSA_PID, nl.Uint32Attr(uint32(pid)))
	answer, err := c.Ask(unix.RTM_GETNSID, 0, &nsMessage{msg}, pidAttribute)
	if err != nil {
		return 0, false, fmt.Errorf("read the name of a network namespace: %w", err)
	}
	if len(answer) < nsHeader {
		return 0, false, fmt.Errorf("%w: the name of a namespace in %d bytes", ErrCut, len(answer))
	}
	Attributes(answer[nsHeader:], func(kind uint16, value []byte) {
		if kind == unix.NETNSA_NSID && len(value) >= 4 {
			id = int(int32(native.Uint32(value)))
			ok = id >= 0
		}
	})
	return id, ok, nil
}

// nsHeader is the length of a struct rtgenmsg where attributes follow it.
const nsHeader = 4

// nsMessage is a struct rtgenmsg, filled up to where attributes may begin.
type nsMessage struct{ *nl.RtGenMsg }

func (m *nsMessage) Len() int { return nsHeader }

func (m *nsMessage) Serialize() []byte { return make([]byte, nsHeader) }
