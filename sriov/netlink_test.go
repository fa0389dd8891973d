package sriov

import (
	"encoding/binary"
	"errors"
	"net"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// answer is a netlink message as the kernel sends it.
func answer(kind uint16, sequence uint32, payload []byte) []byte {
	b := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(payload)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = binary.NativeEndian.AppendUint16(b, 0)
	b = binary.NativeEndian.AppendUint32(b, sequence)
	return append(binary.NativeEndian.AppendUint32(b, 0), payload...)
}

func TestAnswer(t *testing.T) {
	words := append([]byte{13, 0, unix.NLMSGERR_ATTR_MSG, 0}, "no way!\x00\x00\x00\x00\x00"...)
	errno := -int32(unix.EPERM)
	refused := append(binary.NativeEndian.AppendUint32(nil, uint32(errno)), make([]byte, unix.SizeofNlMsghdr)...)
	kind, payload, ok := decodeAnswer(answer(unix.NLMSG_ERROR, 7, append(refused, words...)), 7)
	if !ok || kind != unix.NLMSG_ERROR {
		t.Fatalf("kind %d, %v", kind, ok)
	}
	if err := decodeAck(payload); !errors.Is(err, unix.EPERM) || !strings.HasSuffix(err.Error(), ": no way!") {
		t.Errorf("an error with words: %v", err)
	}
	if err := decodeAck(refused); !errors.Is(err, unix.EPERM) {
		t.Errorf("an error without words: %v", err)
	}
	if err := decodeAck(make([]byte, 20)); err != nil {
		t.Errorf("success: %v", err)
	}
	if err := decodeAck(nil); err == nil {
		t.Error("an acknowledgement without an errno was taken for success")
	}
	if _, _, ok := decodeAnswer(answer(unix.RTM_NEWLINK, 6, nil), 7); ok {
		t.Error("the answer to an earlier request was taken for this one's")
	}
	for _, length := range []uint32{0, 15, 17} {
		b := answer(unix.RTM_NEWLINK, 7, nil)
		binary.NativeEndian.PutUint32(b, length)
		if _, _, ok := decodeAnswer(b, 7); ok {
			t.Errorf("16 bytes that say they are %d were taken", length)
		}
	}
}

// The kernel's own answers, against what Go's library says.
func TestKernel(t *testing.T) {
	k, err := dial(unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer k.close()
	lo, err := net.InterfaceByName("lo")
	if err != nil {
		t.Skip("there is no loopback interface here:", err)
	}
	for _, byIndex := range []bool{false, true} {
		name, index := "lo", 0
		if byIndex {
			name, index = "", lo.Index
		}
		if l, err := k.link(name, index); err != nil || l.name != "lo" || l.index != lo.Index {
			t.Errorf("by index %v: %+v, %v", byIndex, l, err)
		}
	}
	if _, err := k.link("not-there", 0); !errors.Is(err, unix.ENODEV) {
		t.Errorf("an interface that is not there: %v", err)
	}
}

func FuzzAnswer(f *testing.F) {
	f.Add(answer(unix.NLMSG_ERROR, 1, make([]byte, 20)))
	f.Fuzz(func(_ *testing.T, b []byte) {
		if _, payload, ok := decodeAnswer(b, 1); ok {
			_ = decodeAck(payload)
		}
	})
}
