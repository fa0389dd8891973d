package netlink

import (
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"viaduct/internal/host"
)

// Link is a network interface as an RTM_NEWLINK tells of it. Numbers of attributes are those of
// include/uapi/linux/if_link.h.
type Link struct {
	Index        int
	Name         string
	Alternative  []string // other names
	Flags        uint32   // unix.IFF_UP and the like
	MTU          int
	Kind         string // bond, vlan ...; "" of a device's own interface
	Address      net.HardwareAddr
	Permanent    net.HardwareAddr // nil where the kernel does not know it
	SwitchID     string           // of its e-switch, hexadecimal; "" if it is none's port
	PortName     string
	Over         int    // index of the interface it goes over, 0 if none
	Master       int    // index of the bond or bridge it is in, 0 if none
	Elsewhere    *int   // id of the namespace that Over is in, nil if that is this interface's own
	Bus, Device  string // that it is of, by the kernel's name; "" before Linux 5.14 too
	GenMode      *int   // how it makes its IPv6 addresses; nil without IPv6
	NumVF        int    // how many VFs its device has, where VFs were asked for
	VFs          [][]byte
	VFStatistics bool // the VFs' counters were told as well
}

// What an answer is to hold beside the interface itself (IFLA_EXT_MASK).
const (
	maskVFs          = nl.RTEXT_FILTER_VF
	maskNoStatistics = 1 << 3 // RTEXT_FILTER_SKIP_STATS
)

// LinkByName asks for an interface without its VFs, and without statistics, which can take a driver a while.
func (c *Conn) LinkByName(name string) (*Link, error) { return c.link(name, 0, maskNoStatistics) }

// LinkByIndex is LinkByName for an interface that may be renamed meanwhile.
func (c *Conn) LinkByIndex(index int) (*Link, error) { return c.link("", index, maskNoStatistics) }

// LinkWithVFs asks for an interface, by its name or, if that is "", its index, with its VFs: for each the payload of an
// IFLA_VF_INFO. Fewer than NumVF say that the kernel did not tell of all of them.
func (c *Conn) LinkWithVFs(name string, index int) (*Link, error) {
	var best *Link
	for _, mask := range []uint32{maskVFs, maskVFs | maskNoStatistics} {
		l, err := c.link(name, index, mask)
		if errors.Is(err, ErrCut) || errors.Is(err, unix.EMSGSIZE) || errors.Is(err, unix.EINVAL) {
			continue
		}
		if err != nil {
			return nil, err
		}
		l.VFStatistics = mask&maskNoStatistics == 0
		if len(l.VFs) >= l.NumVF {
			return l, nil
		}
		if best == nil || len(l.VFs) > len(best.VFs) {
			best = l
		}
	}
	if best != nil {
		return best, nil
	}

	l, err := c.link(name, index, maskNoStatistics)
	if err == nil {
		l.NumVF = -1
	}
	return l, err
}

// longestName is what an IFLA_IFNAME has room for; an alternative name may be longer.
const longestName = unix.IFNAMSIZ - 1

func (c *Conn) link(name string, index int, mask uint32) (*Link, error) {
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(index)
	parts := []nl.NetlinkRequestData{msg}
	if index == 0 && len(name) <= longestName {
		parts = append(parts, nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
	} else if index == 0 {
		parts = append(parts, nl.NewRtAttr(unix.IFLA_ALT_IFNAME, nl.ZeroTerminated(name)))
	}
	parts = append(parts, nl.NewRtAttr(unix.IFLA_EXT_MASK, nl.Uint32Attr(mask)))
	answer, err := c.Ask(unix.RTM_GETLINK, 0, parts...)
	if err != nil {
		return nil, err
	}
	return DecodeLink(answer)
}

// Links are all interfaces of the socket's network namespace, without their VFs: a list has no room for many.
func (c *Conn) Links() ([]*Link, error) {
	mask := nl.NewRtAttr(unix.IFLA_EXT_MASK, nl.Uint32Attr(maskNoStatistics))
	answers, err := c.Dump(unix.RTM_GETLINK, nl.NewIfInfomsg(unix.AF_UNSPEC), mask)
	if err != nil {
		return nil, fmt.Errorf("list network interfaces: %w", err)
	}

	out := make([]*Link, len(answers))
	for i, a := range answers {
		if out[i], err = DecodeLink(a); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// DecodeLink reads the payload of an RTM_NEWLINK.
func DecodeLink(b []byte) (*Link, error) {
	if len(b) < unix.SizeofIfInfomsg {
		return nil, fmt.Errorf("%w: an interface of %d bytes", ErrCut, len(b))
	}
	l := &Link{Index: int(native.Uint32(b[4:])), Flags: native.Uint32(b[8:])}

	b = b[unix.SizeofIfInfomsg:]
	for {
		kind, value, rest, ok := attribute(b)
		if !ok {
			return l, nil
		}
		if kind == unix.IFLA_VFINFO_LIST {
			l.VFs, rest = walkVFs(b, len(value), l.NumVF)
		} else {
			l.decode(kind, value)
		}
		b = rest
	}
}

func (l *Link) decode(kind uint16, value []byte) {
	word := func() int {
		if len(value) < 4 {
			return 0
		}
		return int(int32(native.Uint32(value)))
	}

	switch kind {
	case unix.IFLA_IFNAME:
		l.Name = unix.ByteSliceToString(value)
	case unix.IFLA_MTU:
		l.MTU = word()
	case unix.IFLA_LINK:
		l.Over = word()
	case unix.IFLA_MASTER:
		l.Master = word()
	case unix.IFLA_LINK_NETNSID:
		id := word()
		l.Elsewhere = &id
	case unix.IFLA_ADDRESS:
		l.Address = append(net.HardwareAddr(nil), value...)
	case unix.IFLA_PERM_ADDRESS:
		l.Permanent = append(net.HardwareAddr(nil), value...)
	case unix.IFLA_PHYS_SWITCH_ID:
		l.SwitchID = hex.EncodeToString(value)
	case unix.IFLA_PHYS_PORT_NAME:
		l.PortName = unix.ByteSliceToString(value)
	case unix.IFLA_NUM_VF:
		l.NumVF = word()
	case unix.IFLA_PARENT_DEV_NAME:
		l.Device = unix.ByteSliceToString(value)
	case unix.IFLA_PARENT_DEV_BUS_NAME:
		l.Bus = unix.ByteSliceToString(value)
	case unix.IFLA_LINKINFO:
		Attributes(value, func(kind uint16, value []byte) {
			if kind == unix.IFLA_INFO_KIND {
				l.Kind = unix.ByteSliceToString(value)
			}
		})
	case unix.IFLA_PROP_LIST:
		Attributes(value, func(kind uint16, value []byte) {
			if kind == unix.IFLA_ALT_IFNAME {
				l.Alternative = append(l.Alternative, unix.ByteSliceToString(value))
			}
		})
	case unix.IFLA_AF_SPEC:
		l.decodeFamilies(value)
	}
}

func (l *Link) decodeFamilies(value []byte) {
	Attributes(value, func(family uint16, value []byte) {
		if family != unix.AF_INET6 {
			return
		}
		Attributes(value, func(kind uint16, value []byte) {
			if kind == unix.IFLA_INET6_ADDR_GEN_MODE && len(value) > 0 {
				mode := int(value[0])
				l.GenMode = &mode
			}
		})
	})
}

// walkVFs reads the VFs of an IFLA_VFINFO_LIST that begins at b. Its own length has 16 bits, which some 215 VFs with
// counters overflow: so it is walked up to the number of VFs that the kernel told before it, and what follows the last
// is what follows the list.
func walkVFs(b []byte, length, count int) (vfs [][]byte, rest []byte) {
	at := b[unix.SizeofRtAttr:]
	end := at[min((length+3)&^3, len(at)):]
	for len(vfs) < count || count <= 0 && len(at) > len(end) {
		kind, value, next, ok := attribute(at)
		if !ok || kind != nl.IFLA_VF_INFO {
			break
		}
		vfs, at = append(vfs, value), next
	}
	if len(at) < len(end) {
		return vfs, at
	}
	return vfs, end
}

// SetLink changes an interface: flags of change to those of flags, and attributes.
func (c *Conn) SetLink(index int, flags, change uint32, attributes ...nl.NetlinkRequestData) error {
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index, msg.Flags, msg.Change = int32(index), flags, change
	_, err := c.Ask(unix.RTM_SETLINK, unix.NLM_F_ACK, append([]nl.NetlinkRequestData{msg}, attributes...)...)
	return err
}

// SetVF makes one setting of a VF of an interface's device: an attribute of an IFLA_VF_INFO.
func (c *Conn) SetVF(index, kind int, value []byte) error {
	list := nl.NewRtAttr(unix.IFLA_VFINFO_LIST, nil)
	list.AddRtAttr(nl.IFLA_VF_INFO, nil).AddRtAttr(kind, value)
	return c.SetLink(index, 0, 0, list)
}

// SetGenMode sets how an interface makes its IPv6 addresses.
func (c *Conn) SetGenMode(index, mode int) error {
	families := nl.NewRtAttr(unix.IFLA_AF_SPEC, nil)
	families.AddRtAttr(unix.AF_INET6, nil).AddRtAttr(unix.IFLA_INET6_ADDR_GEN_MODE, []byte{byte(mode)})
	return c.SetLink(index, 0, 0, families)
}

// Alternatives are the alternative names of all interfaces, by interface, of those that have any.
func Alternatives(h *host.Host) (map[string][]string, error) {
	c, err := Dial(h, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	all, err := c.Links()
	if err != nil {
		return nil, err
	}

	out := map[string][]string{}
	for _, l := range all {
		if len(l.Alternative) > 0 {
			out[l.Name] = l.Alternative
		}
	}
	return out, nil
}

// FirstName is the name of an interface that may be called by an alternative one (Linux 5.5); "" if there is none.
func FirstName(h *host.Host, name string) (string, error) {
	c, err := Dial(h, unix.NETLINK_ROUTE)
	if err != nil {
		return "", err
	}
	defer c.Close()
	l, err := c.LinkByName(name)
	if errors.Is(err, unix.ENODEV) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("interface %s: %w", name, err)
	}
	return l.Name, nil
}

// Permanent is, by interface, the addresses that interfaces were made with, where the kernel knows these. An interface
// that is gone, or that was renamed just now, is left out.
func Permanent(h *host.Host, names []string) (map[string]net.HardwareAddr, error) {
	c, err := Dial(h, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	defer c.Close()

	out := map[string]net.HardwareAddr{}
	for _, n := range names {
		l, err := c.LinkByName(n)
		if errors.Is(err, unix.ENODEV) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("interface %s: %w", n, err)
		}
		if len(l.Permanent) > 0 {
			out[n] = l.Permanent
		}
	}
	return out, nil
}

// Gone reports whether an error says that an interface is no more.
func Gone(err error) bool { return errors.Is(err, unix.ENODEV) || errors.Is(err, os.ErrNotExist) }
