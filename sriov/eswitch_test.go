package sriov

import (
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink/nl"

	"viaduct/iommu"
	"viaduct/vfio/bind"
)

func TestDecodeEswitch(t *testing.T) {
	var b []byte
	for _, a := range []*nl.RtAttr{
		nl.NewRtAttr(nl.DEVLINK_ATTR_BUS_NAME, nl.ZeroTerminated("pci")),
		nl.NewRtAttr(nl.DEVLINK_ATTR_ESWITCH_MODE, nl.Uint16Attr(1)),
		nl.NewRtAttr(nl.DEVLINK_ATTR_ESWITCH_INLINE_MODE, nl.Uint8Attr(3)),
		nl.NewRtAttr(nl.DEVLINK_ATTR_ESWITCH_ENCAP_MODE, nl.Uint8Attr(9)),
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

// The mode is set where the driver needs it: ice has none but without VFs, mlx5 becomes switchdev when they are there
// and have no driver, and legacy before.
func TestEswitchOrder(t *testing.T) {
	for _, c := range []struct{ driver, mode, want string }{
		{"ice", switchdev, "clear mode count override"},
		{"ice", legacy, "clear mode count override"},
		{"mlx5_core", switchdev, "clear count mode override"},
		{"mlx5_core", legacy, "clear mode count override"},
	} {
		step := func(word string) []bind.Step { return []bind.Step{{Path: word, Value: "1"}} }
		p := Plan{
			PF: &iommu.Device{Name: "0000:01:00.0", Driver: c.driver}, Eswitch: Eswitch{Mode: c.mode},
			Clear: step("clear"), Before: step("count"), After: step("override"),
		}
		var got []string
		for _, line := range bind.Commands(p.Steps()) {
			for _, word := range []string{"clear", "mode", "count", "override"} {
				if strings.Contains(line, word) {
					got = append(got, word)
				}
			}
		}
		if !slices.Equal(got, strings.Fields(c.want)) {
			t.Errorf("%s to %s: %v, want %s", c.driver, c.mode, got, c.want)
		}
	}
}
