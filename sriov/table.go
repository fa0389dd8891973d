package sriov

import (
	"encoding/binary"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"viaduct/iommu"
)

// Key names a setting.
type Key string

// The keys. Switches are "on" or "off", rates in Mbit/s with 0 for no limit.
const (
	MAC       Key = "mac"
	VLAN      Key = "vlan"  // 0 to 4094, 0 for none
	QoS       Key = "qos"   // 0 to 7
	Proto     Key = "proto" // 802.1q or 802.1ad
	Trust     Key = "trust"
	SpoofChk  Key = "spoofchk"
	LinkState Key = "link" // auto, enable or disable
	MaxRate   Key = "max_tx_rate"
	MinRate   Key = "min_tx_rate"
	RSSQuery  Key = "rss_query"
	NodeGUID  Key = "node_guid"
	PortGUID  Key = "port_guid"
	MSIX      Key = "msix" // interrupt vectors, 0 for the default
)

// StableMAC as the value of mac stands for what [DeriveMAC] makes. StableGUID, as that of node_guid and port_guid, does
// so for [DeriveGUID].
const (
	StableMAC  = "stable"
	StableGUID = StableMAC
)

const (
	on, off = "on", "off"
	dot1q   = "802.1q"
	dot1ad  = "802.1ad"

	// noMAC has a driver make up an address, or none.
	noMAC = "00:00:00:00:00:00"
)

// row is all that there is to know of a setting. Settings go through the PF's network interface as attributes of an
// IFLA_VF_INFO (include/uapi/linux/if_link.h), each a structure that begins with the VF's index; or are written to a
// file.
type row struct {
	key Key
	// ip is ip(8)'s word for it, "" if that is the key; users may give either.
	ip string
	// help is what a user types and what that does.
	help [2]string
	// parse checks a value and spells it as it is read back.
	parse func(value string) (string, error)
	// with is the key whose message sets this one as well; the key itself if it has a message of its own.
	with Key
	// order is when the message with this value is sent among others.
	order func(value string) int
	// byDefault is what a VF begins with on most drivers, "" if that is not known.
	byDefault string

	// attribute is what the kernel reports it in, and decode its value there; false if the driver reports none. Length
	// is that of the PF's own address.
	attribute int
	decode    func(v []byte, length int) (string, bool)
	// encode is the attribute that sets it, with all that is set along.
	encode func(vf int, s Setting) (kind int, value []byte)

	// file of the VF it is written to, instead of all that. It is not read back.
	file string
}

// table has a row for each setting, in the order in which they are shown.
var table = [...]row{
	{
		key: MAC, with: MAC, order: at(2),
		help: [2]string{
			"mac=52:54:00:12:34:56",
			"MAC address; `stable` derives one from the PF's address and the VF index",
		},
		parse:     parseMAC,
		attribute: nl.IFLA_VF_MAC, decode: decodeMAC, encode: encodeMAC,
	},
	{
		key: VLAN, with: VLAN, order: at(3), byDefault: "0",
		help:      [2]string{"vlan=100 qos=3", "VLAN ID and priority of the VF's frames; vlan=0 for none"},
		parse:     upTo(4094),
		attribute: nl.IFLA_VF_VLAN, decode: decodeVLAN, encode: encodeVLAN,
	},
	{
		key: QoS, with: VLAN, order: at(3), byDefault: "0",
		parse:     upTo(7),
		attribute: nl.IFLA_VF_VLAN, decode: number(8), encode: encodeVLAN,
	},
	{
		key: Proto, with: VLAN, order: at(3), byDefault: dot1q,
		help:      [2]string{"proto=802.1q|802.1ad", "protocol of the VLAN"},
		parse:     oneOf(dot1q, dot1ad),
		attribute: nl.IFLA_VF_VLAN_LIST, decode: decodeProto, encode: encodeVLAN,
	},
	{
		key: Trust, with: Trust, order: at(5), byDefault: off,
		help:      [2]string{"trust=on|off", "allow the guest to change its address and to be promiscuous"},
		parse:     oneOf(on, off),
		attribute: nl.IFLA_VF_TRUST, decode: onOff, encode: word(nl.IFLA_VF_TRUST, off, on),
	},
	{
		// The address is set before it is checked, and not while it is.
		key: SpoofChk, with: SpoofChk, byDefault: on,
		order: func(value string) int {
			if value == off {
				return 1
			}
			return 10
		},
		help:      [2]string{"spoofchk=on|off", "drop frames with another source address"},
		parse:     oneOf(on, off),
		attribute: nl.IFLA_VF_SPOOFCHK, decode: onOff, encode: word(nl.IFLA_VF_SPOOFCHK, off, on),
	},
	{
		key: LinkState, ip: "state", with: LinkState, order: at(6), byDefault: "auto",
		help:      [2]string{"link=auto|enable|disable", "link state of the VF (also state=)"},
		parse:     oneOf("auto", "enable", "disable"),
		attribute: nl.IFLA_VF_LINK_STATE, decode: oneOfWords("auto", "enable", "disable"),
		encode: word(nl.IFLA_VF_LINK_STATE, "auto", "enable", "disable"),
	},
	{
		key: MaxRate, with: MinRate, order: at(4), byDefault: "0",
		help:      [2]string{"max_tx_rate=N min_tx_rate=N", "rates in Mbit/s, 0 for no limit"},
		parse:     upTo(1<<32 - 1),
		attribute: nl.IFLA_VF_RATE, decode: number(8), encode: encodeRate,
	},
	{
		key: MinRate, with: MinRate, order: at(4), byDefault: "0",
		parse:     upTo(1<<32 - 1),
		attribute: nl.IFLA_VF_RATE, decode: number(4), encode: encodeRate,
	},
	{
		key: RSSQuery, ip: "query_rss", with: RSSQuery, order: at(7), byDefault: off,
		help:      [2]string{"rss_query=on|off", "allow the guest to read the RSS configuration (also query_rss=)"},
		parse:     oneOf(on, off),
		attribute: nl.IFLA_VF_RSS_QUERY_EN, decode: onOff, encode: word(nl.IFLA_VF_RSS_QUERY_EN, off, on),
	},
	{
		key: NodeGUID, with: NodeGUID, order: at(8),
		help: [2]string{
			"node_guid=... port_guid=...",
			"InfiniBand GUIDs; `stable` derives one from the PF's GUID and the VF index",
		},
		parse:     parseGUID,
		attribute: nl.IFLA_VF_IB_NODE_GUID, decode: decodeGUID, encode: encodeGUID(NodeGUID, nl.IFLA_VF_IB_NODE_GUID),
	},
	{
		key: PortGUID, with: PortGUID, order: at(9),
		parse:     parseGUID,
		attribute: nl.IFLA_VF_IB_PORT_GUID, decode: decodeGUID, encode: encodeGUID(PortGUID, nl.IFLA_VF_IB_PORT_GUID),
	},
	{
		// While nothing uses them: before all others. The size of an MSI-X table has 11 bits.
		key: MSIX, with: MSIX, order: at(0),
		help:  [2]string{"msix=N", "interrupt vectors, while the VF has no driver; 0 for the default"},
		parse: upTo(2048),
		file:  "sriov_vf_msix_count",
	},
}

// row is the key's row; an empty one for a key that is none.
func (k Key) row() *row {
	for i := range table {
		if table[i].key == k {
			return &table[i]
		}
	}
	return &row{key: k, with: k}
}

// rowNamed is the row of a key by either of its names, nil if there is none.
func rowNamed(name string) *row {
	for i := range table {
		if string(table[i].key) == name || table[i].ip == name && name != "" {
			return &table[i]
		}
	}
	return nil
}

func (r *row) ipWord() string {
	if r.ip != "" {
		return r.ip
	}
	return string(r.key)
}

// Keys returns all keys, in the order they are shown in.
func Keys() []Key {
	out := make([]Key, len(table))
	for i := range table {
		out[i] = table[i].key
	}
	return out
}

// Help returns, for each line that tells users of settings, what to type and what that does.
func Help() [][2]string {
	var out [][2]string
	for i := range table {
		if table[i].help[0] != "" {
			out = append(out, table[i].help)
		}
	}
	return out
}

// DefaultSettings returns the settings that a VF begins with on most drivers.
func DefaultSettings() Settings {
	out := Settings{}
	for i := range table {
		if table[i].byDefault != "" {
			out[table[i].key] = table[i].byDefault
		}
	}
	return out
}

// Default returns what a VF begins with on most drivers; false if that is not known.
func (k Key) Default() (value string, known bool) {
	value = k.row().byDefault
	return value, value != ""
}

// at is the order of a setting whatever its value.
func at(n int) func(string) int { return func(string) int { return n } }

func oneOf(words ...string) func(string) (string, error) {
	return func(value string) (string, error) {
		if v := strings.ToLower(value); slices.Contains(words, v) {
			return v, nil
		}
		return "", fmt.Errorf("want %s", strings.Join(words, " or "))
	}
}

func upTo(most uint64) func(string) (string, error) {
	return func(value string) (string, error) {
		n, err := strconv.ParseUint(value, 10, 64)
		if err != nil || n > most {
			return "", fmt.Errorf("want a number from 0 to %d", most)
		}
		return strconv.FormatUint(n, 10), nil
	}
}

func parseMAC(value string) (string, error) {
	if value == StableMAC {
		return value, nil
	}
	mac, err := net.ParseMAC(value)
	if err != nil || len(mac) != 6 {
		return "", fmt.Errorf("want a MAC address, e.g. 52:54:00:12:34:56, or %s", StableMAC)
	}
	if mac[0]&1 != 0 {
		return "", fmt.Errorf("%s is a multicast address, which no interface can have", mac)
	}
	return mac.String(), nil
}

func parseGUID(value string) (string, error) {
	if value == StableGUID {
		return value, nil
	}
	guid, ok := iommu.ParseGUID(value)
	if !ok || strings.Trim(value, "0x:-") == "" {
		return "", fmt.Errorf("want eight bytes that are not all zero, e.g. 00:11:22:33:44:55:66:77, or %s", StableGUID)
	}
	return guid.String(), nil
}

// u32 is the word at an offset of a structure, 0 if it is shorter.
func u32(v []byte, at int) uint32 {
	if at+4 > len(v) {
		return 0
	}
	return native.Uint32(v[at:])
}

// number decodes the word at an offset.
func number(at int) func([]byte, int) (string, bool) {
	return func(v []byte, _ int) (string, bool) { return strconv.FormatUint(uint64(u32(v, at)), 10), true }
}

// decodeVLAN reads a VLAN. Some drivers report that there is none by the number that no VLAN can have.
func decodeVLAN(v []byte, _ int) (string, bool) {
	const none = 4095
	n := u32(v, 4)
	if n == none {
		n = 0
	}
	return strconv.FormatUint(uint64(n), 10), true
}

// oneOfWords decodes a word that numbers words.
func oneOfWords(words ...string) func([]byte, int) (string, bool) {
	return func(v []byte, _ int) (string, bool) {
		n := u32(v, 4)
		if int64(n) >= int64(len(words)) {
			return "", false
		}
		return words[n], true
	}
}

// onOff decodes a switch. The kernel begins with -1: a driver that reports nothing leaves it.
func onOff(v []byte, _ int) (string, bool) { return oneOfWords(off, on)(v, 0) }

// word encodes a structure of the index and a word that numbers words.
func word(kind int, words ...string) func(int, Setting) (int, []byte) {
	return func(vf int, s Setting) (int, []byte) {
		n := max(slices.Index(words, s.To[s.Keys[0]]), 0)
		return kind, native.AppendUint32(native.AppendUint32(nil, uint32(vf)), uint32(n))
	}
}

// value is a number among the settings that are to be.
func (s Setting) value(k Key) uint32 {
	n, _ := strconv.ParseUint(s.To[k], 10, 32)
	return uint32(n)
}

func decodeMAC(v []byte, length int) (string, bool) {
	if length <= 0 || length > len(v)-4 {
		return "", false
	}
	return net.HardwareAddr(v[4 : 4+length]).String(), true
}

func encodeMAC(vf int, s Setting) (int, []byte) {
	mac, _ := net.ParseMAC(s.To[MAC])
	value := append(native.AppendUint32(nil, uint32(vf)), mac...)
	return nl.IFLA_VF_MAC, append(value, make([]byte, 32-len(mac))...)
}

// decodeProto reads the protocol in an IFLA_VF_VLAN_INFO, which is all that an IFLA_VF_VLAN_LIST holds.
func decodeProto(v []byte, _ int) (string, bool) {
	const proto = unix.SizeofRtAttr + 12
	if len(v) < proto+2 {
		return "", false
	}
	if binary.BigEndian.Uint16(v[proto:]) == unix.ETH_P_8021AD {
		return dot1ad, true
	}
	return dot1q, true
}

// encodeVLAN uses the attribute that older kernels do not have only for what the older attribute cannot say.
func encodeVLAN(vf int, s Setting) (int, []byte) {
	value := native.AppendUint32(nil, uint32(vf))
	value = native.AppendUint32(native.AppendUint32(value, s.value(VLAN)), s.value(QoS))
	if s.To[Proto] == "" || s.To[Proto] == s.From[Proto] && s.To[Proto] != dot1ad {
		return nl.IFLA_VF_VLAN, value
	}
	proto := uint16(unix.ETH_P_8021Q)
	if s.To[Proto] == dot1ad {
		proto = unix.ETH_P_8021AD
	}
	value = append(binary.BigEndian.AppendUint16(value, proto), 0, 0)
	return nl.IFLA_VF_VLAN_LIST, nl.NewRtAttr(nl.IFLA_VF_VLAN_INFO, value).Serialize()
}

func encodeRate(vf int, s Setting) (int, []byte) {
	value := native.AppendUint32(nil, uint32(vf))
	return nl.IFLA_VF_RATE, native.AppendUint32(native.AppendUint32(value, s.value(MinRate)), s.value(MaxRate))
}

// decodeGUID reads a GUID, which a driver that has none reports as zero.
func decodeGUID(v []byte, _ int) (string, bool) {
	if len(v) < nl.SizeofVfGUID || native.Uint64(v[8:]) == 0 {
		return "", false
	}
	guid := make(net.HardwareAddr, 8)
	binary.BigEndian.PutUint64(guid, native.Uint64(v[8:]))
	return guid.String(), true
}

func encodeGUID(key Key, kind int) func(int, Setting) (int, []byte) {
	return func(vf int, s Setting) (int, []byte) {
		guid, _ := net.ParseMAC(s.To[key])
		value := append(native.AppendUint32(nil, uint32(vf)), 0, 0, 0, 0)
		return kind, native.AppendUint64(value, binary.BigEndian.Uint64(append(guid, make([]byte, 8)...)))
	}
}
