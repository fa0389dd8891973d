package sriov

import (
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"

	"viaduct/iommu"
)

// Settings are what a PF decides for a VF, each by its key and in one spelling. A key that is missing is not reported by the
// PF's driver, or not to be changed.
type Settings map[Key]string

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

// Keys are all keys, in the order they are shown in.
var Keys = []Key{MAC, VLAN, QoS, Proto, Trust, SpoofChk, LinkState, MaxRate, MinRate, RSSQuery, NodeGUID, PortGUID, MSIX}

// synonyms are ip's words.
var synonyms = map[string]Key{"state": LinkState, "query_rss": RSSQuery}

// StableMAC as the value of mac stands for what [DeriveMAC] makes.
const StableMAC = "stable"

const (
	on, off = "on", "off"
	dot1q   = "802.1q"
	dot1ad  = "802.1ad"
)

// Usual are the settings that a VF begins with on most drivers.
var Usual = Settings{
	VLAN: "0", QoS: "0", Proto: dot1q, Trust: off, SpoofChk: on, LinkState: "auto", MaxRate: "0", MinRate: "0", RSSQuery: off,
}

// linkStates by the kernel's numbers (include/uapi/linux/if_link.h).
var linkStates = []string{"auto", "enable", "disable"}

// Text is what [ParseSettings] reads, the keys in their order.
func (s Settings) Text() string {
	var words []string
	for _, k := range Keys {
		if v, ok := s[k]; ok {
			words = append(words, string(k)+"="+v)
		}
	}
	return strings.Join(words, " ")
}

// ParseSettings reads KEY=VALUE words. Its errors name the word and what is wanted.
func ParseSettings(words []string) (Settings, error) {
	s := Settings{}
	for _, w := range words {
		name, value, ok := strings.Cut(w, "=")
		key := Key(name)
		if synonym, known := synonyms[name]; known {
			key = synonym
		}
		if !ok || !slices.Contains(Keys, key) {
			return nil, fmt.Errorf("%q is no setting; want KEY=VALUE, the keys are %s", w, keyNames())
		}
		if _, twice := s[key]; twice {
			return nil, fmt.Errorf("%s is given twice", key)
		}
		text, err := parseValue(key, value)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", w, err)
		}
		s[key] = text
	}
	return s, nil
}

func keyNames() string {
	var names []string
	for _, k := range Keys {
		names = append(names, string(k))
	}
	return strings.Join(names, ", ")
}

// parseValue checks a value and spells it as it is read back.
func parseValue(key Key, value string) (string, error) {
	oneOf := func(words ...string) (string, error) {
		if v := strings.ToLower(value); slices.Contains(words, v) {
			return v, nil
		}
		return "", fmt.Errorf("want %s", strings.Join(words, " or "))
	}
	upTo := func(most uint64) (string, error) {
		n, err := strconv.ParseUint(value, 10, 64)
		if err != nil || n > most {
			return "", fmt.Errorf("want a number from 0 to %d", most)
		}
		return strconv.FormatUint(n, 10), nil
	}
	switch key {
	case MAC:
		if value == StableMAC {
			return value, nil
		}
		mac, err := net.ParseMAC(value)
		if err != nil || len(mac) != 6 {
			return "", fmt.Errorf("want a MAC address, as 52:54:00:12:34:56, or %s", StableMAC)
		}
		if mac[0]&1 != 0 {
			return "", fmt.Errorf("%s is a multicast address, which no interface can have", mac)
		}
		return mac.String(), nil
	case NodeGUID, PortGUID:
		guid, err := net.ParseMAC(value)
		if err != nil || len(guid) != 8 || strings.Trim(value, "0:-") == "" {
			return "", fmt.Errorf("want eight bytes that are not all zero, as 00:11:22:33:44:55:66:77")
		}
		return guid.String(), nil
	case VLAN:
		return upTo(4094)
	case QoS:
		return upTo(7)
	case MaxRate, MinRate:
		return upTo(1<<32 - 1)
	case MSIX:
		return upTo(2048) // the size of an MSI-X table has 11 bits
	case Proto:
		return oneOf(dot1q, dot1ad)
	case LinkState:
		return oneOf(linkStates...)
	}
	return oneOf(on, off)
}

// DeriveMAC makes a locally administered address out of a PF's permanent one and a VF's index: the same at every boot. The lower
// half is the PF's own, which tells the cards of one maker apart; in the upper, beside the two bits that say "local" and "one
// station", are twelve bits of index and ten of what the maker's number folds to.
func DeriveMAC(pf net.HardwareAddr, index int) (net.HardwareAddr, error) {
	if len(pf) != 6 {
		return nil, fmt.Errorf("%s is no MAC address of six bytes", pf)
	}
	if index < 0 || index > 0xfff {
		return nil, fmt.Errorf("VF %d has no derived MAC address: they go up to 4095", index)
	}
	maker := uint32(pf[0])<<16 | uint32(pf[1])<<8 | uint32(pf[2])
	upper := (maker^maker>>10^maker>>20)&0x3ff<<12 | uint32(index)
	return net.HardwareAddr{byte(upper>>16)<<2 | 2, byte(upper >> 8), byte(upper), pf[3], pf[4], pf[5]}, nil
}

// group is the keys that one message sets.
type group []Key

func (g group) name() string {
	var names []string
	for _, k := range g {
		names = append(names, string(k))
	}
	return strings.Join(names, ", ")
}

// order is the order the hardware needs: interrupts while nothing uses them, the address before it is checked and not while it
// is, the rest as drivers take it.
func order(want Settings) []group {
	check := group{SpoofChk}
	rest := []group{{MAC}, {VLAN, QoS, Proto}, {MinRate, MaxRate}, {Trust}, {LinkState}, {RSSQuery}, {NodeGUID}, {PortGUID}}
	if want[SpoofChk] == off {
		rest = append([]group{check}, rest...)
	} else {
		rest = append(rest, check)
	}
	return append([]group{{MSIX}}, rest...)
}

// Setting is one message, or write, that brings a VF from one set of values to another.
type Setting struct {
	Keys     group
	From, To Settings // of these keys; From lacks what the driver does not report
}

// planSettings is what it takes to get a VF's settings to what is wanted, in order: nothing for what is right already.
func planSettings(now, want Settings) []Setting {
	var out []Setting
	for _, g := range order(want) {
		s := Setting{Keys: g, From: Settings{}, To: Settings{}}
		differs := false
		for _, k := range g {
			if v, known := now[k]; known {
				s.From[k], s.To[k] = v, v
			}
			if v, asked := want[k]; asked {
				differs = differs || now[k] != v
				s.To[k] = v
			}
		}
		if differs {
			out = append(out, s)
		}
	}
	return out
}

// compare says which of the wanted settings are not as they are to be, and which cannot be told.
func compare(now, want Settings) (wrong, unknown []string) {
	for _, k := range Keys {
		w, asked := want[k]
		is, known := now[k]
		switch {
		case !asked || known && is == w:
		case !known:
			unknown = append(unknown, string(k))
		default:
			wrong = append(wrong, fmt.Sprintf("%s was set to %s and is %s", k, w, is))
		}
	}
	return wrong, unknown
}

// command is a setting as a shell command.
func (s Setting) command(iface string, vf *iommu.Device) string {
	if s.Keys[0] == MSIX {
		return fmt.Sprintf("echo %s > /%s", s.To[MSIX], attribute(vf.Address, msixFile))
	}
	words := map[Key]string{LinkState: "state", RSSQuery: "query_rss"}
	line := []string{fmt.Sprintf("ip link set %s vf %d", iface, vf.VFIndex)}
	for _, k := range s.Keys {
		v, ok := s.To[k]
		if name := words[k]; ok && name != "" {
			line = append(line, name, v)
		} else if ok {
			line = append(line, string(k), v)
		}
	}
	return strings.Join(line, " ")
}
