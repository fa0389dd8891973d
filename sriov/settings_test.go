package sriov

import (
	"encoding/binary"
	"net"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

func TestParseSettings(t *testing.T) {
	got, err := ParseSettings([]string{"mac=52-54-00-AB-CD-EF", "vlan=0100", "state=Disable", "query_rss=on", "proto=802.1AD", "node_guid=00:11:22:33:44:55:66:77"})
	want := Settings{MAC: "52:54:00:ab:cd:ef", VLAN: "100", LinkState: "disable", RSSQuery: on, Proto: dot1ad, NodeGUID: "00:11:22:33:44:55:66:77"}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%v, %v, want %v", got, err, want)
	}
	for word, says := range map[string]string{
		"mac": "is no setting", "speed=1": "is no setting", "mac=": "want a MAC", "mac=01:00:5e:00:00:01": "multicast",
		"mac=00:11:22:33:44:55:66:77": "want a MAC", "vlan=4095": "0 to 4094", "vlan=-1": "0 to 4094", "qos=8": "0 to 7",
		"trust=yes": "want on or off", "link=up": "auto or enable or disable", "max_tx_rate=4294967296": "4294967295",
		"node_guid=00:00:00:00:00:00:00:00": "not all zero", "port_guid=1": "eight bytes", "proto=802.3": "802.1q", "msix=x": "0 to 2048",
	} {
		if _, err := ParseSettings([]string{word}); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v, want an error that says %q", word, err, says)
		}
	}
	if _, err := ParseSettings([]string{"link=auto", "state=auto"}); err == nil || !strings.Contains(err.Error(), "twice") {
		t.Errorf("two words for one setting: %v", err)
	}
}

// The address is set before it is checked, and not while it is; what is right already is not set; what is not given stays.
func TestPlanSettings(t *testing.T) {
	now := Settings{MAC: "02:00:00:00:00:01", VLAN: "7", QoS: "3", SpoofChk: on, Trust: off, MinRate: "0", MaxRate: "0"}
	for _, c := range []struct {
		want Settings
		plan string
	}{
		{Settings{MAC: now[MAC], Trust: off}, ""},
		{Settings{SpoofChk: off, MAC: "02:00:00:00:00:02"}, "spoofchk off; mac 02:00:00:00:00:02"},
		{Settings{VLAN: "8"}, "vlan 8 qos 3"},
		{Settings{MaxRate: "100", Trust: on}, "min_tx_rate 0 max_tx_rate 100; trust on"},
		{Settings{LinkState: "enable", RSSQuery: off}, "state enable; query_rss off"},
		{Settings{VLAN: "8", Proto: dot1ad}, "vlan 8 qos 3 proto 802.1ad"},
	} {
		var plan []string
		for _, s := range planSettings(now, c.want) {
			plan = append(plan, strings.TrimPrefix(s.command("p0", vfDevice(3)), "ip link set p0 vf 3 "))
		}
		if got := strings.Join(plan, "; "); got != c.plan {
			t.Errorf("%v: %q, want %q", c.want, got, c.plan)
		}
	}
	spoof := planSettings(Settings{SpoofChk: off, MAC: "02:00:00:00:00:01"}, Settings{SpoofChk: on, MAC: "02:00:00:00:00:02"})
	if len(spoof) != 2 || spoof[0].Keys[0] != MAC {
		t.Errorf("spoof checking was turned on before the address was set: %v", spoof)
	}
}

func TestDeriveMAC(t *testing.T) {
	seen := map[string]string{}
	for _, pf := range []string{"52:54:00:00:00:01", "52:54:00:00:00:02", "b8:ce:f6:00:00:01", "b8:ce:f6:00:00:02", "00:1b:21:aa:bb:cc", "3c:fd:fe:aa:bb:cc"} {
		mac, err := net.ParseMAC(pf)
		if err != nil {
			t.Fatal(err)
		}
		for index := range 256 {
			got, err := DeriveMAC(mac, index)
			if err != nil || got[0]&3 != 2 {
				t.Fatalf("%s vf%d: %s, %v", pf, index, got, err)
			}
			if other := seen[got.String()]; other != "" {
				t.Errorf("%s is that of %s and of %s vf%d", got, other, pf, index)
			}
			seen[got.String()] = pf
		}
	}
	if _, err := DeriveMAC(make(net.HardwareAddr, 20), 0); err == nil {
		t.Error("an address of InfiniBand was taken")
	}
}

// message packs an RTM_NEWLINK with one VF, with another value in each field.
func message() []byte {
	u32 := func(n ...uint32) []byte {
		var b []byte
		for _, n := range n {
			b = binary.NativeEndian.AppendUint32(b, n)
		}
		return b
	}
	u64 := func(n uint64) []byte { return binary.NativeEndian.AppendUint64(nil, n) }
	mac := append([]byte{0x52, 0x54, 0, 1, 2, 3}, make([]byte, 26)...)
	list := nl.NewRtAttr(unix.IFLA_VFINFO_LIST, nil)
	vf := list.AddRtAttr(nl.IFLA_VF_INFO, nil)
	vf.AddRtAttr(nl.IFLA_VF_MAC, append(u32(5), mac...))
	vf.AddRtAttr(nl.IFLA_VF_VLAN, u32(5, 100, 3))
	vf.AddRtAttr(nl.IFLA_VF_RATE, u32(5, 11, 22))
	vf.AddRtAttr(nl.IFLA_VF_SPOOFCHK, u32(5, 1))
	vf.AddRtAttr(nl.IFLA_VF_LINK_STATE, u32(5, 2))
	vf.AddRtAttr(nl.IFLA_VF_RSS_QUERY_EN, u32(5, 0))
	vf.AddRtAttr(nl.IFLA_VF_TRUST, u32(5, 0xffffffff))
	vf.AddRtAttr(nl.IFLA_VF_IB_NODE_GUID, append(u32(5, 0), u64(0x0011223344556677)...))
	vf.AddRtAttr(nl.IFLA_VF_IB_PORT_GUID, append(u32(5, 0), u64(0)...))
	stats := vf.AddRtAttr(nl.IFLA_VF_STATS, nil)
	for i, kind := range []int{0, 1, 2, 3, 4, 5, 6, 7, 8} { // 6 is padding
		stats.AddRtAttr(kind, u64(uint64(1000+i)))
	}
	vlans := vf.AddRtAttr(nl.IFLA_VF_VLAN_LIST, nil)
	vlans.AddRtAttr(nl.IFLA_VF_VLAN_INFO, append(u32(5, 100, 3), 0x88, 0xa8, 0, 0))
	b := make([]byte, unix.SizeofIfInfomsg)
	binary.NativeEndian.PutUint32(b[4:], 42)
	b = append(b, nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated("p0")).Serialize()...)
	b = append(b, nl.NewRtAttr(unix.IFLA_ADDRESS, []byte{2, 0, 0, 0, 0, 1}).Serialize()...)
	b = append(b, nl.NewRtAttr(unix.IFLA_PHYS_SWITCH_ID, []byte{0xde, 0xad, 0xbe, 0xef, 1, 2, 3, 4, 5}).Serialize()...)
	b = append(b, nl.NewRtAttr(unix.IFLA_PHYS_PORT_NAME, nl.ZeroTerminated("p0")).Serialize()...)
	return append(b, list.Serialize()...)
}

func TestDecodeLink(t *testing.T) {
	got, err := decodeLink(message())
	if err != nil {
		t.Fatal(err)
	}
	want := linkInfo{
		index: 42, name: "p0", address: net.HardwareAddr{2, 0, 0, 0, 0, 1}, switchID: "deadbeef0102030405", portName: "p0",
		vfs: []VFInfo{{
			Index: 5,
			Settings: Settings{
				MAC: "52:54:00:01:02:03", VLAN: "100", QoS: "3", Proto: dot1ad, MinRate: "11", MaxRate: "22", SpoofChk: on, LinkState: "disable",
				RSSQuery: off, NodeGUID: "00:11:22:33:44:55:66:77",
			},
			Stats: &Stats{1000, 1001, 1002, 1003, 1004, 1005, 1007, 1008},
		}},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%+v\nwant\n%+v", got, want)
	}
}

// What is encoded is what is decoded: the kernel's structures are the same in both directions.
func TestEncode(t *testing.T) {
	for _, to := range []Settings{
		{MAC: "52:54:00:01:02:03"}, {VLAN: "100", QoS: "3"}, {VLAN: "5", QoS: "0", Proto: dot1ad}, {MinRate: "1", MaxRate: "1000"}, {Trust: on}, {SpoofChk: off},
		{RSSQuery: on}, {LinkState: "enable"}, {NodeGUID: "00:11:22:33:44:55:66:77"}, {PortGUID: "01:11:22:33:44:55:66:77"},
	} {
		for _, g := range order(to) {
			if _, ok := to[g[0]]; !ok {
				continue
			}
			kind, value := Setting{Keys: g, From: Settings{}, To: to}.encode(7)
			b := nl.NewRtAttr(kind, value).Serialize()
			got, ok := decodeVF(b, 6)
			if kind == nl.IFLA_VF_VLAN_LIST {
				got.Settings[VLAN], got.Settings[QoS], got.Index, ok = to[VLAN], to[QoS], 7, true
			}
			if !ok || got.Index != 7 || !reflect.DeepEqual(got.Settings, to) {
				t.Errorf("%v: %+v", to, got)
			}
		}
	}
}

func FuzzDecodeLink(f *testing.F) {
	f.Add(message())
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := decodeLink(b)
		if err != nil {
			return
		}
		for _, vf := range l.vfs {
			for k := range vf.Settings {
				if vf.Index < 0 || !slices.Contains(Keys, k) {
					t.Errorf("%+v", vf)
				}
			}
		}
	})
}

func FuzzParseSettings(f *testing.F) {
	f.Add("mac=52:54:00:01:02:03")
	f.Add("vlan=4094")
	f.Fuzz(func(t *testing.T, word string) {
		s, err := ParseSettings([]string{word})
		for k, v := range s {
			if again, err := parseValue(k, v); err != nil || again != v {
				t.Errorf("%q: %s=%s is spelled %s, %v", word, k, v, again, err)
			}
		}
		if err == nil && len(s) != 1 {
			t.Errorf("%q: %v", word, s)
		}
	})
}
