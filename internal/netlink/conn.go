// Package netlink asks the kernel over netlink: one request, and its answer or answers. It knows the messages of
// interfaces, addresses and routes, and finds families of generic netlink; what their attributes mean to VFs stands
// above it.
//
// What the kernel says is not always whole. A message that was cut is asked for again with less in it, and a list that
// changed while it was told is told again. A receive has a deadline.
package netlink

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"viaduct/internal/host"
)

// ErrCut is wrapped by errors that say that an answer did not come whole.
var ErrCut = errors.New("the kernel's answer was cut")

var errInterrupted = errors.New("the answer kept changing while the kernel gave it")

const (
	// patience is how long an answer is waited for. The kernel has it when a request was sent.
	patience = 30 * time.Second
	// firstRoom is what most answers fit in, and mostRoom what one may take at all: that of an interface with 4,096 VFs
	// does.
	firstRoom = 64 << 10
	mostRoom  = 16 << 20
	// retells is how often a list may change while it is told.
	retells = 1000
)

var native = binary.NativeEndian

// The library finds out on first use and without a lock, which two callers at a time would do at a time.
var _ = nl.NativeEndian()

// Conn is a netlink socket for one request after the other. It blocks: the kernel has answered when a request is sent,
// and to have the runtime wait for that would take longer than the request. Its owner closes it.
type Conn struct {
	fd   int
	to   unix.Sockaddr
	room []byte
}

// Dial opens a socket of a netlink family, as unix.NETLINK_ROUTE.
func Dial(h *host.Host, family int) (*Conn, error) { return DialIn(h, "", family) }

// DialIn is Dial in the network namespace that a file of the host stands for.
func DialIn(h *host.Host, namespace string, family int) (*Conn, error) {
	fd, err := h.SocketIn(namespace, family, 0)
	if err != nil {
		return nil, err
	}

	c := &Conn{fd: fd}
	if h.Real() {
		// A test's socket is no netlink socket.
		c.to = &unix.SockaddrNetlink{Family: unix.AF_NETLINK}
		// The kernel's own words, and not our own.
		for _, option := range []int{unix.NETLINK_EXT_ACK, unix.NETLINK_CAP_ACK} {
			if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, option, 1); err != nil {
				unix.Close(fd)
				return nil, os.NewSyscallError("setsockopt", err)
			}
		}
	}
	limit := unix.NsecToTimeval(patience.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("setsockopt", err)
	}
	return c, nil
}

// Close closes the socket.
func (c *Conn) Close() { unix.Close(c.fd) }

// Ask makes a request that has one answer, and returns the answer's payload; nil if it is only that it was done. Errors
// wrap the errno, and ErrCut.
func (c *Conn) Ask(kind int, flags int, parts ...nl.NetlinkRequestData) ([]byte, error) {
	req := request(kind, flags, parts)
	if err := c.send(req); err != nil {
		return nil, err
	}
	return c.answer(req.Seq)
}

func (c *Conn) answer(sequence uint32) ([]byte, error) {
	for {
		b, err := c.receive()
		if err != nil {
			return nil, err
		}
		m, _, err := decodeMessage(b)
		if err != nil {
			return nil, err
		}

		switch {
		case m.sequence != sequence:
			// Of a request that was given up.
		case m.kind == unix.NLMSG_ERROR:
			return nil, decodeAck(m.payload)
		default:
			return append([]byte(nil), m.payload...), nil
		}
	}
}

// Dump makes a request that has any number of answers, and returns their payloads. What changes while it is told is
// told again from the beginning.
func (c *Conn) Dump(kind int, parts ...nl.NetlinkRequestData) ([][]byte, error) {
	for range retells {
		req := request(kind, unix.NLM_F_DUMP, parts)
		if err := c.send(req); err != nil {
			return nil, err
		}

		out, whole, err := c.answers(req.Seq)
		if err != nil || whole {
			return out, err
		}
	}
	return nil, errInterrupted
}

// answers reads to the end of a dump; whole is false if what it tells of changed meanwhile.
func (c *Conn) answers(sequence uint32) (out [][]byte, whole bool, err error) {
	whole = true
	for {
		b, err := c.receive()
		if err != nil {
			return nil, false, err
		}

		for len(b) > 0 {
			m, rest, err := decodeMessage(b)
			if err != nil {
				return nil, false, err
			}
			b = rest
			if m.sequence != sequence {
				continue
			}
			if m.flags&unix.NLM_F_DUMP_INTR != 0 {
				whole = false
			}
			switch m.kind {
			case unix.NLMSG_DONE:
				return out, whole, decodeDone(m.payload)
			case unix.NLMSG_ERROR:
				return nil, false, decodeAck(m.payload)
			}
			out = append(out, append([]byte(nil), m.payload...))
		}
	}
}

func request(kind, flags int, parts []nl.NetlinkRequestData) *nl.NetlinkRequest {
	req := nl.NewNetlinkRequest(kind, flags)
	for _, p := range parts {
		req.AddData(p)
	}
	return req
}

func (c *Conn) send(req *nl.NetlinkRequest) error {
	err := uninterrupted(func() error { return unix.Sendto(c.fd, req.Serialize(), 0, c.to) })
	return os.NewSyscallError("sendto", err)
}

// receive reads one datagram, which is valid until the next call. It asks for the length first, and makes room for it:
// the rest of one that was cut is lost, with the end of a list that it may hold.
func (c *Conn) receive() ([]byte, error) {
	n, err := c.recv(nil, unix.MSG_PEEK)
	if err != nil {
		return nil, err
	}
	if n > mostRoom {
		return nil, fmt.Errorf("%w: it has %d bytes", ErrCut, n)
	}
	if n > len(c.room) {
		c.room = make([]byte, max(n, firstRoom))
	}

	got, err := c.recv(c.room, 0)
	if err == nil && got != n {
		err = fmt.Errorf("%w: %d bytes of %d", ErrCut, n, got)
	}
	return c.room[:n], err
}

// recv is recvmsg, which returns the length of the whole datagram.
func (c *Conn) recv(room []byte, flags int) (n int, err error) {
	err = uninterrupted(func() (err error) {
		n, _, _, _, err = unix.Recvmsg(c.fd, room, nil, flags|unix.MSG_TRUNC)
		return err
	})
	switch {
	case errors.Is(err, unix.EAGAIN):
		return 0, fmt.Errorf("netlink: no answer within %s: %w", patience, os.ErrDeadlineExceeded)
	case err != nil:
		return 0, os.NewSyscallError("recvmsg", err)
	case n == 0:
		return 0, errors.New("netlink: the other side is gone")
	}
	return n, nil
}

func uninterrupted(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// message is one netlink message.
type message struct {
	kind, flags uint16
	sequence    uint32
	payload     []byte
}

// decodeMessage reads the first message of a datagram, and returns what follows it.
func decodeMessage(b []byte) (m message, rest []byte, err error) {
	if len(b) < unix.SizeofNlMsghdr {
		return m, nil, fmt.Errorf("%w: a message of %d bytes", ErrCut, len(b))
	}
	length := int(native.Uint32(b))
	m = message{kind: native.Uint16(b[4:]), flags: native.Uint16(b[6:]), sequence: native.Uint32(b[8:])}
	if length < unix.SizeofNlMsghdr || length > len(b) {
		return m, nil, fmt.Errorf("%w: %d bytes of a message of %d", ErrCut, len(b), length)
	}
	m.payload = b[unix.SizeofNlMsghdr:length]
	return m, b[min((length+3)&^3, len(b)):], nil
}

// decodeAck is the error that an NLMSG_ERROR tells, with the kernel's own words where it has some; nil if it tells
// success.
func decodeAck(b []byte) error {
	// The errno and the request's header; the rest of the request is left out (NETLINK_CAP_ACK).
	const head = 4 + unix.SizeofNlMsghdr
	if len(b) < 4 {
		return fmt.Errorf("%w: an acknowledgement of %d bytes", ErrCut, len(b))
	}
	errno := int32(native.Uint32(b))
	if errno == 0 {
		return nil
	}

	err := error(unix.Errno(-errno))
	Attributes(b[min(head, len(b)):], func(kind uint16, value []byte) {
		if kind == unix.NLMSGERR_ATTR_MSG {
			err = fmt.Errorf("%w: %s", err, unix.ByteSliceToString(value))
		}
	})
	return err
}

// decodeDone is the error that the end of a dump tells: the kernel ends one so that it cannot go on with.
func decodeDone(b []byte) error {
	if len(b) < 4 {
		return nil
	}
	if errno := int32(native.Uint32(b)); errno < 0 {
		return unix.Errno(-errno)
	}
	return nil
}

// Attributes calls f for each attribute of a netlink payload, and stops at what is cut off.
func Attributes(b []byte, f func(kind uint16, value []byte)) {
	for {
		kind, value, rest, ok := attribute(b)
		if !ok {
			return
		}
		f(kind, value)
		b = rest
	}
}

// attribute reads the first attribute of a payload, and returns what follows it.
func attribute(b []byte) (kind uint16, value, rest []byte, ok bool) {
	if len(b) < unix.SizeofRtAttr {
		return 0, nil, nil, false
	}
	length := int(native.Uint16(b))
	if length < unix.SizeofRtAttr || length > len(b) {
		return 0, nil, nil, false
	}
	kind = native.Uint16(b[2:]) &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)
	return kind, b[unix.SizeofRtAttr:length], b[min((length+3)&^3, len(b)):], true
}
