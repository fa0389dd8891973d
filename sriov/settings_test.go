package sriov

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"net"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

func TestParseSettings(t *testing.T) {
	got, err := ParseSettings(
		[]string{
			"mac=52-54-00-AB-CD-EF",
			"vlan=0100",
			"state=Disable",
			"query_rss=on",
			"proto=802.1AD",
			"node_guid=00:11:22:33:44:55:66:77",
		},
	)

	want := Settings{
		MAC:       "52:54:00:ab:cd:ef",
		VLAN:      "100",
		LinkState: "disable",
		RSSQuery:  on,
		Proto:     dot1ad,
		NodeGUID:  "00:11:22:33:44:55:66:77",
	}

	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%v, %v, want %v", got, err, want)
	}

	for word, says := range map[string]string{
		"mac": "invalid setting", "speed=1": "invalid setting", "spoof=on": "did you mean spoofchk?",
		"mac=": "want a MAC", "mac=01:00:5e:00:00:01": "multicast",
		"mac=00:11:22:33:44:55:66:77": "want a MAC", "vlan=4095": "0 to 4094", "vlan=-1": "0 to 4094",
		"qos=8":     "0 to 7",
		"trust=yes": "want on or off", "link=up": "auto or enable or disable", "max_tx_rate=4294967296": "4294967295",
		"node_guid=00:00:00:00:00:00:00:00": "not all zero", "port_guid=1": "eight bytes", "proto=802.3": "802.1q",
		"msix=x": "0 to 2048",
	} {
		if _, err := ParseSettings([]string{word}); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v, want an error that says %q", word, err, says)
		}
	}

	if _, err := ParseSettings([]string{"link=auto", "state=auto"}); err == nil ||
		!strings.Contains(err.Error(), "twice") {
		t.Errorf("two words for one setting: %v", err)
	}
}

// vfDevice is a VF that no host has.
var vfDevice = vfAt(iommu.Address{Bus: 1}, iommu.Address{Bus: 2, Device: 16}, 3)

// The address is set before it is checked, and not while it is; what is right already is not set; what is not given
// stays.
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
			plan = append(plan, strings.TrimPrefix(s.action("p0", vfDevice).String(), "ip link set p0 vf 3 "))
		}
		if got := strings.Join(plan, "; "); got != c.plan {
			t.Errorf("%v: %q, want %q", c.want, got, c.plan)
		}
	}
	spoof := planSettings(Settings{SpoofChk: off, MAC: "02:00:00:00:00:01"},
		Settings{SpoofChk: on, MAC: "02:00:00:00:00:02"})
	if len(spoof) != 2 || spoof[0].Keys[0] != MAC {
		t.Errorf("spoof checking was turned on before the address was set: %v", spoof)
	}
}

func TestDeriveMAC(t *testing.T) {
	seen := map[string]string{}
	for _, pf := range []string{"52:54:00:00:00:01", "52:54:00:00:00:02", "b8:ce:f6:00:00:01", "b8:ce:f6:00:00:02",
		"00:1b:21:aa:bb:cc", "3c:fd:fe:aa:bb:cc"} {
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

// message packs an IFLA_VF_INFO with another value in each field.
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
	vf := nl.NewRtAttr(nl.IFLA_VF_INFO, nil)
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
	return vf.Serialize()[unix.SizeofRtAttr:]
}

func TestDecodeVF(t *testing.T) {
	got, ok := decodeVF(message(), 6)
	want := VFInfo{
		Index: 5,
		Settings: Settings{
			MAC: "52:54:00:01:02:03", VLAN: "100", QoS: "3", Proto: dot1ad, MinRate: "11", MaxRate: "22", SpoofChk: on,
			LinkState: "disable", RSSQuery: off, NodeGUID: "00:11:22:33:44:55:66:77",
		},
		Stats: &Stats{1000, 1001, 1002, 1003, 1004, 1005, 1007, 1008},
	}
	if !ok || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v\nwant\n%+v", got, want)
	}
}

// samples are values of each setting, of which no two may be sent alike.
var samples = map[Key][]string{
	MAC: {
		"52:54:00:01:02:03",
		"00:00:00:00:00:00",
	}, VLAN: {"0", "100", "4094"}, QoS: {"0", "7"}, Proto: {dot1q, dot1ad},
	Trust: {
		on,
		off,
	}, SpoofChk: {on, off}, LinkState: {"auto", "enable", "disable"}, MaxRate: {"0", "1000", "4294967295"},
	MinRate: {"0", "10"}, RSSQuery: {on, off}, NodeGUID: {"00:11:22:33:44:55:66:77", "80:00:00:00:00:00:00:01"},
	PortGUID: {"01:11:22:33:44:55:66:77"}, MSIX: {"0", "2048"},
}

// Each row of the table is whole: its words, how it is read, sent and decoded, when, and with what. What is sent for
// one setting and value is sent for no other, and is what is decoded.
func TestTable(t *testing.T) {
	words, sent := map[string]Key{}, map[string]string{}
	helped := strings.Join(func() (lines []string) {
		for _, h := range Help() {
			lines = append(lines, h[0], h[1])
		}
		return lines
	}(), " ")
	for i := range table {
		r := &table[i]
		for _, w := range []string{string(r.key), r.ip} {
			if other, twice := words[w]; twice && w != "" {
				t.Errorf("%s and %s are both called %s", other, r.key, w)
			}
			words[w] = r.key
		}
		if r.key == "" || r.parse == nil || r.order == nil || r.with == "" || rowNamed(string(r.with)) == nil {
			t.Errorf("%q lacks a name, how it is read, when it is sent, or with what: %+v", r.key, r)
			continue
		}
		if !strings.Contains(helped, string(r.key)+"=") && !strings.Contains(helped, r.ipWord()+"=") {
			t.Errorf("no line of help tells of %s", r.key)
		}
		if r.byDefault != "" {
			if v, err := r.parse(r.byDefault); err != nil || v != r.byDefault {
				t.Errorf("%s begins with %q, which is not how it is spelled: %q, %v", r.key, r.byDefault, v, err)
			}
		}
		if len(samples[r.key]) == 0 {
			t.Errorf("there is no sample of %s", r.key)
		}
		if r.file != "" {
			if r.encode != nil || r.decode != nil || r.with != r.key {
				t.Errorf("%s is written to %s, and sent as well", r.key, r.file)
			}
			continue
		}
		if r.decode == nil || r.encode == nil || r.attribute == 0 || r.order("") != rowNamed(string(r.with)).order("") {
			t.Errorf("%s is not decoded, or not sent, or not when %s is", r.key, r.with)
			continue
		}

		for _, value := range samples[r.key] {
			if v, err := r.parse(value); err != nil || v != value {
				t.Errorf("%s=%s: %q, %v", r.key, value, v, err)
			}
			to := Settings{r.key: value}
			if r.with == VLAN { // which the kernel takes together
				to = Settings{VLAN: "1", QoS: "1"}
				to[r.key] = value
			}
			if r.with == MinRate {
				to = Settings{MinRate: "1", MaxRate: "1"}
				to[r.key] = value
			}
			kind, payload := r.encode(7, Setting{Keys: []Key{r.with}, From: Settings{}, To: to})
			b := nl.NewRtAttr(kind, payload).Serialize()
			if other := sent[string(b)]; other != "" {
				t.Errorf("%s=%s is sent as %s is", r.key, value, other)
			}
			sent[string(b)] = fmt.Sprintf("%s=%s", r.key, value)

			if got, known := decoded(r, kind, payload); !known || got != value {
				t.Errorf("%s=%s is decoded as %q, %v", r.key, value, got, known)
			}
		}
	}
}

// A key that has only its constant is one that nothing sends: each has a row.
func TestKeysHaveRows(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "table.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	ast.Inspect(file, func(node ast.Node) bool {
		v, ok := node.(*ast.ValueSpec)
		if !ok || fmt.Sprint(v.Type) != "Key" {
			return true
		}
		n++
		name, err := strconv.Unquote(v.Values[0].(*ast.BasicLit).Value)
		if err != nil || !slices.Contains(Keys(), Key(name)) {
			t.Errorf("%s has no row, %v", v.Names[0], err)
		}
		return true
	})
	if n != len(Keys()) {
		t.Errorf("%d constants for %d keys", n, len(Keys()))
	}
}

// decoded is a row's value in an attribute. The kernel tells the VLAN's numbers in another one as well.
func decoded(r *row, kind int, payload []byte) (string, bool) {
	if kind == nl.IFLA_VF_VLAN_LIST && r.attribute == nl.IFLA_VF_VLAN {
		return r.decode(payload[unix.SizeofRtAttr:], 6)
	}
	return r.decode(payload, 6)
}

// A setting that nothing sends is refused, and not told to be made.
func TestSettingWithoutMessage(t *testing.T) {
	s := session{Port: &Port{}}
	if err := s.send(0, Setting{Keys: []Key{"veb"}, To: Settings{"veb": on}}); !errors.Is(err, unix.EOPNOTSUPP) {
		t.Errorf("error %v", err)
	}
}

// What mac=stable stands for may never change: guests are known by it.
func TestStableMAC(t *testing.T) {
	for _, c := range []struct {
		pf    string
		index int
		want  string
	}{
		{"52:54:00:00:00:01", 0, "26:00:00:00:00:01"},
		{"52:54:00:00:00:01", 1, "26:00:01:00:00:01"},
		{"b8:ce:f6:00:00:01", 0, "32:e0:00:00:00:01"},
		{"b8:ce:f6:00:00:01", 255, "32:e0:ff:00:00:01"},
		{"3c:fd:fe:aa:bb:cc", 63, "b2:20:3f:aa:bb:cc"},
	} {
		mac, err := net.ParseMAC(c.pf)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := DeriveMAC(mac, c.index); err != nil || got.String() != c.want {
			t.Errorf("vf%d of %s: %s, %v, want %s", c.index, c.pf, got, err, c.want)
		}
	}
}

func FuzzDecodeVF(f *testing.F) {
	f.Add(message(), 6)
	f.Add([]byte{}, 0)
	f.Fuzz(func(t *testing.T, b []byte, length int) {
		vf, ok := decodeVF(b, length)
		for k := range vf.Settings {
			if ok && vf.Index < 0 || !slices.Contains(Keys(), k) {
				t.Errorf("%+v", vf)
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
			if again, err := k.row().parse(v); err != nil || again != v {
				t.Errorf("%q: %s=%s is spelled %s, %v", word, k, v, again, err)
			}
		}
		if err == nil && len(s) != 1 {
			t.Errorf("%q: %v", word, s)
		}
	})
}

// What is no value of a setting is refused, also from a program that did not parse it; another spelling is the one that is read back.
func TestCheckedSettings(t *testing.T) {
	for _, s := range []Settings{{VLAN: "9999"}, {"veb": on}, {"state": "auto"}, {MAC: "nonsense"}, {Trust: ""}} {
		if got, err := s.checked(); err == nil {
			t.Errorf("%v: %v", s, got)
		}
	}
	got, err := Settings{VLAN: "007", MAC: "52-54-00-AA-00-01"}.checked()
	if err != nil || got[VLAN] != "7" || got[MAC] != "52:54:00:aa:00:01" {
		t.Errorf("%v, %v", got, err)
	}
	k := hosttest.NewLab(t, nil)
	quiet(t, k, makeVFs(alike(1, UseNone)))
	if _, err := setVF(t, k, Settings{VLAN: "5000"}); err == nil || vfSettings(t, k, 0)[VLAN] != "0" {
		t.Errorf("VLAN 5000 of a VF: %v", err)
	}
	if _, err := setCount(t, context.Background(), k, Wish{VFs: Repeat(2,
		VFWish{UseNone, Settings{VLAN: "5000"}})}); err == nil ||
		state(t, k) != "/none 1" {
		t.Errorf("VLAN 5000 of new VFs: %v, left %s", err, state(t, k))
	}
}
