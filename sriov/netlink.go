package sriov

import (
	"errors"
	"fmt"
	"os"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// kernel is a netlink socket for one request after the other. It blocks: the kernel has answered when a request is sent, and to
// have the runtime wait for that would take longer than the request. Its owner closes it.
type kernel struct{ fd int }

// dial opens a socket of a netlink family, as unix.NETLINK_ROUTE.
func dial(family int) (*kernel, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, family)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	k := &kernel{fd}
	for _, option := range []int{unix.NETLINK_EXT_ACK, unix.NETLINK_CAP_ACK} { // the kernel's own words, and not our own
		if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, option, 1); err != nil {
			k.close()
			return nil, os.NewSyscallError("setsockopt", err)
		}
	}
	return k, nil
}

func (k *kernel) close() { unix.Close(k.fd) }

// ask makes a request that has one answer, and returns that; nil if it is only that it was done.
func (k *kernel) ask(req *nl.NetlinkRequest) ([]byte, error) {
	if err := uninterrupted(func() error {
		return unix.Sendto(k.fd, req.Serialize(), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	}); err != nil {
		return nil, os.NewSyscallError("sendto", err)
	}
	b := make([]byte, nl.RECEIVE_BUFFER_SIZE)
	for {
		n := 0
		err := uninterrupted(func() (err error) { n, _, err = unix.Recvfrom(k.fd, b, 0); return err })
		if err != nil {
			return nil, os.NewSyscallError("recvfrom", err)
		}
		if kind, payload, ok := decodeAnswer(b[:n], req.Seq); ok {
			if kind == unix.NLMSG_ERROR {
				return nil, decodeAck(payload)
			}
			return payload, nil
		}
	}
}

func uninterrupted(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// decodeAnswer is the kind and payload of a message, if it answers the request of this number.
func decodeAnswer(b []byte, sequence uint32) (kind uint16, payload []byte, ok bool) {
	if len(b) < unix.SizeofNlMsghdr {
		return 0, nil, false
	}
	length := int(native.Uint32(b))
	if length < unix.SizeofNlMsghdr || length > len(b) || native.Uint32(b[8:]) != sequence {
		return 0, nil, false
	}
	return native.Uint16(b[4:]), b[unix.SizeofNlMsghdr:length], true
}

// decodeAck is the error that an NLMSG_ERROR tells, with the kernel's own words where it has some; nil if it tells success.
func decodeAck(b []byte) error {
	const head = 4 + unix.SizeofNlMsghdr // the errno and the request's header; the rest is left out (NETLINK_CAP_ACK)
	if len(b) < 4 {
		return fmt.Errorf("an acknowledgement of %d bytes", len(b))
	}
	errno := int32(native.Uint32(b))
	if errno == 0 {
		return nil
	}
	err := error(unix.Errno(-errno))
	attributes(b[min(head, len(b)):], func(kind uint16, value []byte) {
		if kind == unix.NLMSGERR_ATTR_MSG {
			err = fmt.Errorf("%w: %s", err, unix.ByteSliceToString(value))
		}
	})
	return err
}
