package netlink

import (
	"reflect"
	"testing"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
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
	b := append(nl.NewIfInfomsg(unix.AF_BRIDGE).Serialize(), nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated("eth0")).Serialize()...)
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
