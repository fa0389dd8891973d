package netlink

import (
	"fmt"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"viaduct/internal/host"
)

// Generic is a family of generic netlink, as devlink. Its owner closes it.
type Generic struct {
	*Conn
	id      int
	version uint8
}

// header is a struct genlmsghdr (include/uapi/linux/genetlink.h). The library's own has no reserved bytes, and sends
// for them what comes next in memory, which the kernel refuses with newer commands (net/netlink/genetlink.c,
// genl_header_check).
type header struct{ command, version uint8 }

func (h header) Len() int { return nl.SizeofGenlmsg }

func (h header) Serialize() []byte { return []byte{h.command, h.version, 0, 0} }

// DialGeneric opens a socket for a family of generic netlink. Where the kernel has no such family it fails with ENOENT.
func DialGeneric(h *host.Host, family string, version uint8) (*Generic, error) {
	c, err := Dial(h, unix.NETLINK_GENERIC)
	if err != nil {
		return nil, err
	}

	answer, err := c.Ask(unix.GENL_ID_CTRL, 0, header{unix.CTRL_CMD_GETFAMILY, 2},
		nl.NewRtAttr(unix.CTRL_ATTR_FAMILY_NAME, nl.ZeroTerminated(family)))
	g := &Generic{Conn: c, version: version}
	Attributes(answer[min(nl.SizeofGenlmsg, len(answer)):], func(kind uint16, value []byte) {
		if kind == unix.CTRL_ATTR_FAMILY_ID && len(value) >= 2 {
			g.id = int(native.Uint16(value))
		}
	})
	if err == nil && g.id == 0 {
		err = fmt.Errorf("%w: it has no number", ErrCut)
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("generic netlink %s: %w", family, err)
	}
	return g, nil
}

// Ask makes a request of the family that has one answer, and returns its attributes.
func (g *Generic) Ask(command uint8, attributes ...nl.NetlinkRequestData) ([]byte, error) {
	parts := append([]nl.NetlinkRequestData{header{command, g.version}}, attributes...)
	answer, err := g.Conn.Ask(g.id, unix.NLM_F_ACK, parts...)
	return answer[min(nl.SizeofGenlmsg, len(answer)):], err
}
