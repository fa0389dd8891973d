package sriov

import (
	"testing"

	"github.com/vishvananda/netlink/nl"
)

func TestDecodeEswitch(t *testing.T) {
	var b []byte
	for _, a := range []*nl.RtAttr{
		nl.NewRtAttr(nl.DEVLINK_ATTR_BUS_NAME, nl.ZeroTerminated("pci")), nl.NewRtAttr(attrEswitchMode, nl.Uint16Attr(1)),
		nl.NewRtAttr(attrInlineMode, nl.Uint8Attr(3)), nl.NewRtAttr(attrEncapMode, nl.Uint8Attr(9)),
	} {
		b = append(b, a.Serialize()...)
	}
	if got := *decodeEswitch(b); got != (Eswitch{switchdev, "transport", "9"}) {
		t.Errorf("%+v", got)
	}
	now := &Eswitch{Mode: legacy, Encap: "basic"}
	set, back := (&Eswitch{Mode: switchdev, Encap: "basic"}).differs(now)
	if set != (Eswitch{Mode: switchdev}) || back != (Eswitch{Mode: legacy}) {
		t.Errorf("set %+v, back %+v", set, back)
	}
}

func TestParsePortName(t *testing.T) {
	for name, want := range map[string]struct {
		pf, vf int
		kind   rune
	}{
		"p0": {0, 0, wire}, "p1s2": {1, 0, wire}, "l2p3": {3, 0, wire}, "pf0vf3": {0, 3, representor}, "pf1vf12": {1, 12, representor},
		"pf0": {}, "c1pf0vf3": {}, "pf0sf1": {}, "pf0vf": {}, "": {}, "eth0": {},
	} {
		if pf, vf, kind := parsePortName(name); kind != want.kind || kind != 0 && (pf != want.pf || vf != want.vf) {
			t.Errorf("%q: %d, %d, %q, want %+v", name, pf, vf, kind, want)
		}
	}
}
