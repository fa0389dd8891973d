package iommu

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"viaduct/internal/host"
	"viaduct/internal/nearest"
)

// Form is what a selector names devices by.
type Form int

// The forms, in the order in which those without a key are tried.
const (
	ByAddress Form = iota
	ByVF
	BySlot
	ByIDs
	ByNetdev
	ByMAC
	ByPath
	BySerial
	ByGUID
	ByGroup
	ByClass
)

// form is all that one form of selectors does.
type form struct {
	key string // of KEY=VALUE; "" of a form that is recognised by its shape

	// recognises reports whether a word without a key has this form's shape.
	recognises func(word string) bool
	// parse reads the value into the selector. It returns what is wanted instead, "" if all is well.
	parse func(s *Selector, value string) (want string)
	// matcher returns what decides whether a device is meant; nil of a form with keys.
	matcher func(s Selector, h *Host, t *Topology) (matcher, error)
	// keys are what a device is found by, where that is read beyond the topology: once for all selectors.
	keys func(h *Host, d *Device) ([]string, error)
	// missing says, where no device is meant, what was looked for and what there is of that kind.
	missing func(s Selector, h *Host, t *Topology) (what string, candidates []string)
}

type matcher = func(*Device) (bool, error)

// forms has a value for each form. It is filled by init, as a VF's form parses another selector.
var forms [ByClass + 1]form

func init() {
	forms = [...]form{
		ByAddress: addressForm,
		ByVF:      vfForm,
		BySlot:    slotForm,
		ByIDs:     idsForm,
		ByNetdev:  netdevForm,
		ByMAC:     macForm,
		ByPath:    pathForm,
		BySerial:  serialForm,
		ByGUID:    guidForm,
		ByGroup:   groupForm,
		ByClass:   classForm,
	}
}

// candidates are what f says of each device, but for "", each once and sorted.
func candidates(t *Topology, f func(*Device) string) []string {
	return manyCandidates(t, func(d *Device) []string {
		if text := f(d); text != "" {
			return []string{text}
		}
		return nil
	})
}

// manyCandidates are candidates of devices of which each has any number.
func manyCandidates(t *Topology, f func(*Device) []string) []string {
	var out []string
	t.All(func(d *Device) bool {
		out = append(out, f(d)...)
		return true
	})
	slices.Sort(out)
	return slices.Compact(out)
}

// pciOnly is f for PCI devices, and "" for others.
func pciOnly(f func(*Device) string) func(*Device) string {
	return func(d *Device) string {
		if !d.PCI {
			return ""
		}
		return f(d)
	}
}

// always makes a matcher of what cannot fail.
func always(match func(*Device) bool) (matcher, error) {
	return func(d *Device) (bool, error) { return match(d), nil }, nil
}

var vfForm = form{
	recognises: func(word string) bool { return strings.Contains(word, "/") },
	parse: func(s *Selector, value string) string {
		pf, vf, _ := strings.Cut(value, "/")
		index, isVF := strings.CutPrefix(vf, "vf")
		n, err := strconv.ParseUint(index, 10, 16)
		if !isVF || err != nil {
			return "want a PF and the index of its VF, e.g. enp1s0/vf3"
		}
		parent, err := ParseSelector(pf)
		if err != nil || (parent.kind != ByAddress && parent.kind != ByNetdev) {
			return "want the PF's address or network interface before /vf" + index
		}
		s.pf, s.number = &parent, int(n)
		return ""
	},
	matcher: func(s Selector, h *Host, t *Topology) (matcher, error) {
		pf, err := s.pf.PF(h, t)
		if err != nil {
			return nil, err
		}
		if pf.SRIOV == nil {
			return nil, &NotFoundError{Selector: s.text, What: pf.Name + " is not a PF (it has no SR-IOV capability)"}
		}
		return always(func(d *Device) bool {
			return d.PhysFn != nil && *d.PhysFn == pf.Address && d.VFIndex == s.number
		})
	},
	missing: func(s Selector, _ *Host, t *Topology) (string, []string) {
		vfs := candidates(t, func(d *Device) string {
			if d.PhysFn == nil {
				return ""
			}
			return fmt.Sprintf("%s/vf%d", d.PhysFn, d.VFIndex)
		})
		if len(vfs) == 0 {
			return "no such VF; none is enabled on this host (viaduct vf create " + s.pf.text + " N)", nil
		}
		return "no such VF", vfs
	},
}

var addressForm = form{
	recognises: func(word string) bool { _, ok := parseAddress(word); return ok },
	parse: func(s *Selector, value string) string {
		s.address, _ = parseAddress(value)
		return ""
	},
	matcher: func(s Selector, _ *Host, _ *Topology) (matcher, error) {
		return always(func(d *Device) bool { return d.PCI && d.Address == s.address })
	},
	missing: func(_ Selector, _ *Host, t *Topology) (string, []string) {
		return "no such device", candidates(t, pciOnly(func(d *Device) string { return d.Name }))
	},
}

// parseSlot reads what an address has before its function: 0a:00, 0000:0a:00.
func parseSlot(word string) (Address, bool) {
	if strings.Contains(word, ".") || len(word) < len("0a:00") || word[len(word)-3] != ':' {
		return Address{}, false
	}
	return parseAddress(word + ".0")
}

var slotForm = form{
	recognises: func(word string) bool { _, ok := parseSlot(word); return ok },
	parse: func(s *Selector, value string) string {
		s.address, _ = parseSlot(value)
		return ""
	},
	matcher: func(s Selector, _ *Host, _ *Topology) (matcher, error) {
		return always(func(d *Device) bool {
			at := d.Address
			at.Function = 0
			return d.PCI && at == s.address && d.PhysFn == nil
		})
	},
	missing: func(_ Selector, _ *Host, t *Topology) (string, []string) {
		return "no device is in this slot", candidates(t, pciOnly(func(d *Device) string {
			slot, _, _ := strings.Cut(d.Name, ".")
			return slot
		}))
	},
}

var idsForm = form{
	recognises: func(word string) bool { return strings.Contains(word, ":") },
	parse: func(s *Selector, value string) string {
		vendor, device, _ := strings.Cut(value, ":")
		v, err1 := strconv.ParseUint(vendor, 16, 16)
		d, err2 := strconv.ParseUint(device, 16, 16)
		if len(vendor) != 4 || len(device) != 4 || err1 != nil || err2 != nil {
			return "want a PCI address, e.g. 0000:01:00.0, or ids, e.g. 8086:10c9"
		}
		s.ids = [2]uint16{uint16(v), uint16(d)}
		return ""
	},
	matcher: func(s Selector, _ *Host, _ *Topology) (matcher, error) {
		return always(func(d *Device) bool { return d.PCI && [2]uint16{d.Vendor, d.Device} == s.ids })
	},
	missing: func(_ Selector, _ *Host, t *Topology) (string, []string) {
		return "no device has these ids", candidates(t, pciOnly(func(d *Device) string {
			return fmt.Sprintf("%04x:%04x", d.Vendor, d.Device)
		}))
	},
}

// longestAlternative is the length of the longest name of an interface (ALTIFNAMSIZ of include/uapi/linux/if.h).
const longestAlternative = 127

var netdevForm = form{
	// By the kernel's own rule (net/core/dev.c, dev_valid_name), which alternative names may exceed in length.
	recognises: func(word string) bool {
		return word != "" && len(word) <= longestAlternative && word != "." && word != ".." &&
			!strings.ContainsAny(word, " \t\n\v\f\r") && word[0] != '-'
	},
	parse: func(s *Selector, value string) string {
		s.value = value
		return ""
	},
	matcher: func(s Selector, h *Host, t *Topology) (matcher, error) {
		named := func(name string) func(*Device) bool {
			return func(d *Device) bool { return slices.Contains(d.Netdevs, name) }
		}
		known := false
		t.All(func(d *Device) bool {
			known = known || slices.Contains(d.Interfaces(), s.value)
			return !known
		})
		if known {
			return always(named(s.value))
		}
		first, err := firstName(h, s.value)
		if err != nil {
			return nil, err
		}
		word, spoken := wordNamed(s.value)
		if first == "" && s.spoken && spoken && !h.Exists(path.Join(netClass, s.value)) {
			return always(word.means)
		}
		return always(named(first))
	},
	missing: func(s Selector, _ *Host, t *Topology) (string, []string) {
		what := "no network interface of a PCI device has this name"
		if _, word := wordNamed(s.value); s.spoken && word {
			return "no device is one, and no network interface has this name", nil
		}
		t.All(func(d *Device) bool {
			if slices.Contains(d.Ports, s.value) {
				what = "this network interface is made from " + d.Name + "; only the PF's own interface selects the PF"
			}
			return true
		})
		names := manyCandidates(t, func(d *Device) []string { return d.Netdevs })
		if near := nearest.To(s.value, Words()); s.spoken && len(near) > 0 && near[0] != s.value {
			names = append(names, near...)
		}
		return what, names
	},
}

var macForm = form{
	key: "mac",
	parse: func(s *Selector, value string) string {
		if s.value = strings.ToLower(value); !isMAC(s.value) {
			return "want mac= and six pairs of hexadecimal digits, e.g. mac=52:54:00:12:34:56"
		}
		return ""
	},
	keys: macsOf,
	missing: func(_ Selector, h *Host, t *Topology) (string, []string) {
		return "no device has this permanent MAC address (one on a vfio driver that viaduct did not take shows none)",
			t.keyed(h, ByMAC).names("mac=")
	},
}

func isMAC(s string) bool {
	parts := strings.Split(s, ":")
	for _, p := range parts {
		if _, err := strconv.ParseUint(p, 16, 8); err != nil || len(p) != 2 {
			return false
		}
	}
	return len(parts) == 6
}

var pathForm = form{
	key: "path",
	parse: func(s *Selector, value string) string {
		first, rest, below := strings.Cut(strings.ToLower(value), "/")
		root, err := ParseAddress(first)
		if err != nil {
			return "want path= and a physical path as `viaduct show` prints it, e.g. path=0000:00:01.0/00.0"
		}
		if s.value = root.String(); below {
			s.value += "/" + rest
		}
		return ""
	},
	keys: func(h *Host, d *Device) ([]string, error) {
		if !d.PCI {
			return nil, nil
		}
		_, p, err := readPath(h, d.Address)
		if host.Absent(err) || errors.Is(err, ErrNotFound) {
			return nil, nil
		}
		return []string{p}, err
	},
	missing: func(_ Selector, h *Host, t *Topology) (string, []string) {
		return "no device is at this place", t.keyed(h, ByPath).names("path=")
	},
}

var serialForm = form{
	key: "serial",
	parse: func(s *Selector, value string) string {
		if s.value = value; value == "" {
			return "want serial= and the serial number as `viaduct show` prints it"
		}
		return ""
	},
	keys: func(h *Host, d *Device) ([]string, error) {
		if !d.PCI {
			return nil, nil
		}
		serial, err := serialOf(h, d)
		if serial == "" {
			return nil, err
		}
		return []string{serial}, err
	},
	missing: func(_ Selector, h *Host, t *Topology) (string, []string) {
		return "no device has this serial number (only root can read them)", t.keyed(h, BySerial).names("serial=")
	},
}

var guidForm = form{
	key: "guid",
	parse: func(s *Selector, value string) string {
		guid, ok := ParseGUID(value)
		if s.value = guid.String(); !ok {
			return "want guid= and eight pairs of hexadecimal digits, e.g. guid=0c:42:a1:03:00:00:00:01"
		}
		return ""
	},
	keys: func(h *Host, d *Device) ([]string, error) {
		guids, err := GUIDs(h, d)
		var out []string
		for _, g := range guids {
			out = append(out, g.String())
		}
		return out, err
	},
	missing: func(_ Selector, h *Host, t *Topology) (string, []string) {
		return "no device has this InfiniBand GUID", t.keyed(h, ByGUID).names("guid=")
	},
}

var groupForm = form{
	key: "group",
	parse: func(s *Selector, value string) string {
		n, err := strconv.ParseUint(value, 10, 31)
		if err != nil {
			return "want group= and a number, e.g. group=8"
		}
		s.value, s.number = value, int(n)
		return ""
	},
	matcher: func(s Selector, _ *Host, _ *Topology) (matcher, error) {
		return always(func(d *Device) bool { return d.InGroup(s.number) })
	},
	missing: func(s Selector, _ *Host, t *Topology) (string, []string) {
		if len(t.Groups) == 0 {
			return "this host has no IOMMU groups", nil
		}
		if _, err := t.Group(s.number); err == nil {
			return "the group is empty", nil
		}
		var groups []string
		for _, g := range t.Groups {
			groups = append(groups, "group="+strconv.Itoa(g.ID))
		}
		return "no such IOMMU group", groups
	},
}

var classForm = form{
	key: "class",
	parse: func(s *Selector, value string) string {
		_, err := strconv.ParseUint(value, 16, 32)
		if err != nil || len(value) < 2 || len(value) > 6 || len(value)%2 != 0 {
			return "want class= and two, four or six hexadecimal digits, e.g. class=0200"
		}
		s.value = strings.ToLower(value)
		return ""
	},
	matcher: func(s Selector, _ *Host, _ *Topology) (matcher, error) {
		return always(func(d *Device) bool {
			return d.PCI && strings.HasPrefix(fmt.Sprintf("%06x", d.Class), s.value)
		})
	},
	missing: func(_ Selector, _ *Host, t *Topology) (string, []string) {
		return "no device is of this class", candidates(t, pciOnly(func(d *Device) string {
			return fmt.Sprintf("class=%04x", d.Class>>8)
		}))
	},
}
