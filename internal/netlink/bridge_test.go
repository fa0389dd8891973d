package netlink

import (
	"reflect"
	"testing"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"viaduct/internal/host"
)

func vlanInfo(flags, id uint16) *nl.RtAttr {
	b := make([]byte, 4)
	native.PutUint16(b, flags)
	native.PutUint16(b[2:], id)
	return nl.NewRtAttr(bridgeVLANInfo, b)
}

// A port's VLANs, single ones and ranges; what is cut or out of bounds adds none.
func TestDecodePortVLANs(t *testing.T) {
	spec := nl.NewRtAttr(unix.IFLA_AF_SPEC, nil)
	for _, v := range []*nl.RtAttr{
		vlanInfo(vlanPVID|vlanUntagged, 1), vlanInfo(vlanRangeBegin, 10), vlanInfo(vlanRangeEnd, 12),
		vlanInfo(0, 0), vlanInfo(0, 4095), vlanInfo(vlanRangeEnd, 20),
	} {
		spec.AddChild(v)
	}
	b := append(nl.NewIfInfomsg(unix.AF_BRIDGE).Serialize(), nl.NewRtAttr(unix.IFLA_IFNAME,
		nl.ZeroTerminated("eth0")).Serialize()...)
	name, vlans := decodePortVLANs(append(b, spec.Serialize()...))
	want := []PortVLAN{{ID: 1, PVID: true, Untagged: true}, {ID: 10}, {ID: 11}, {ID: 12}, {ID: 20}}
	if name != "eth0" || !reflect.DeepEqual(vlans, want) {
		t.Errorf("%q %+v", name, vlans)
	}
}

func FuzzDecodePortVLANs(f *testing.F) {
	f.Add(append(nl.NewIfInfomsg(unix.AF_BRIDGE).Serialize(), vlanInfo(0, 1).Serialize()...))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, vlans := decodePortVLANs(b); len(vlans) > 1<<14 {
			t.Errorf("%d VLANs", len(vlans))
		}
	})
}

// An entry of a bridge's forwarding table.
func TestDecodeNeighbor(t *testing.T) {
	b := neighborMessage{index: 4}.Serialize()
	for _, a := range []*nl.RtAttr{
		nl.NewRtAttr(unix.NDA_LLADDR, []byte{0x52, 0x54, 0, 0xaa, 0, 1}), nl.NewRtAttr(unix.NDA_MASTER,
			nl.Uint32Attr(3)),
		nl.NewRtAttr(unix.NDA_VLAN, nl.Uint16Attr(100)),
	} {
		b = append(b, a.Serialize()...)
	}
	n, ok := decodeNeighbor(b)
	if !ok || n.Index != 4 || n.Bridge != 3 || n.VLAN != 100 || n.Address.String() != "52:54:00:aa:00:01" || n.Own {
		t.Errorf("%+v, %v", n, ok)
	}
	native.PutUint16(b[8:], unix.NUD_PERMANENT)
	if n, _ := decodeNeighbor(b); !n.Own {
		t.Errorf("%+v", n)
	}
	if _, ok := decodeNeighbor(b[:8]); ok {
		t.Error("a cut one is taken")
	}
}

// The kernel's own tables are read without an error, whatever is in them.
func TestNeighborsOfKernel(t *testing.T) {
	h, err := host.Open("/")
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	c, err := Dial(h, unix.NETLINK_ROUTE)
	if err != nil {
		t.Skipf("no socket to ask by: %v", err)
	}
	defer c.Close()
	if _, err := c.Neighbors(); err != nil {
		t.Error(err)
	}
	if _, err := c.BridgeVLANs(); err != nil {
		t.Error(err)
	}
}
