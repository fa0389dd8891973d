package iommu

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"viaduct/internal/host"
)

// Selector names devices the way a user does. The forms: an address (0000:01:00.0, 01:00.0), a network interface (enp1s0), a
// VF of a PF (enp1s0/vf3), ids (8086:10c9), mac=, path= (see [PhysicalPath]), serial=, group=, class=.
type Selector struct {
	text    string
	kind    Form
	value   string
	address Address
	number  int // vf: index; group: id
	ids     [2]uint16
	pf      *Selector
}

// Form is what a selector names devices by.
type Form int

// The forms.
const (
	ByAddress Form = iota
	ByNetdev
	ByVF
	ByIDs
	ByMAC
	ByPath
	BySerial
	ByGroup
	ByClass
)

// ErrSyntax is wrapped by errors about a selector that no host could resolve.
var ErrSyntax = errors.New("not a selector")

// AmbiguousError says that a selector which must name one device names several.
type AmbiguousError struct {
	Selector   string
	Candidates []string
}

func (e *AmbiguousError) Error() string {
	return fmt.Sprintf("%s names %d devices, and one is needed: %s", e.Selector, len(e.Candidates), abbreviate(e.Candidates))
}

// NotFoundError says that a selector names nothing on this host. It matches ErrNotFound.
type NotFoundError struct {
	Selector   string
	What       string   // what was looked for
	Candidates []string // what there is of that kind
}

func (e *NotFoundError) Error() string {
	s := fmt.Sprintf("%s: %s", e.Selector, e.What)
	if len(e.Candidates) > 0 {
		s += "; there is " + abbreviate(e.Candidates)
	}
	return s
}

// Is makes it an ErrNotFound.
func (e *NotFoundError) Is(target error) bool { return target == ErrNotFound }

func abbreviate(names []string) string {
	const most = 12
	if len(names) > most {
		return strings.Join(names[:most], ", ") + fmt.Sprintf(" and %d more", len(names)-most)
	}
	return strings.Join(names, ", ")
}

// ParseSelector parses a selector without looking at a host. Its errors wrap ErrSyntax.
func ParseSelector(s string) (Selector, error) {
	sel := Selector{text: s}
	bad := func(want string) (Selector, error) {
		return Selector{}, fmt.Errorf("%q is %w: %s", s, ErrSyntax, want)
	}
	if key, value, ok := strings.Cut(s, "="); ok {
		sel.value = value
		switch key {
		case "mac":
			if sel.value = strings.ToLower(value); !isMAC(sel.value) {
				return bad("want mac= and six pairs of hexadecimal digits, as mac=52:54:00:12:34:56")
			}
			sel.kind = ByMAC
		case "path":
			first, rest, below := strings.Cut(strings.ToLower(value), "/")
			root, err := ParseAddress(first)
			if err != nil {
				return bad("want path= and a physical path as `viaduct show` prints it, as path=0000:00:01.0/00.0")
			}
			if sel.value = root.String(); below {
				sel.value += "/" + rest
			}
			sel.kind = ByPath
		case "serial":
			if value == "" {
				return bad("want serial= and the serial number as `viaduct show` prints it")
			}
			sel.kind = BySerial
		case "group":
			n, err := strconv.ParseUint(value, 10, 31)
			if err != nil {
				return bad("want group= and a number, as group=8")
			}
			sel.kind, sel.number = ByGroup, int(n)
		case "class":
			if _, err := strconv.ParseUint(value, 16, 32); err != nil || len(value) < 2 || len(value) > 6 || len(value)%2 != 0 {
				return bad("want class= and two, four or six hexadecimal digits, as class=0200")
			}
			sel.kind, sel.value = ByClass, strings.ToLower(value)
		default:
			return bad("the keys are mac, path, serial, group and class")
		}
		return sel, nil
	}
	if pf, vf, ok := strings.Cut(s, "/"); ok {
		index, isVF := strings.CutPrefix(vf, "vf")
		n, err := strconv.ParseUint(index, 10, 16)
		if !isVF || err != nil {
			return bad("want a PF and the index of its VF, as enp1s0/vf3")
		}
		parent, err := ParseSelector(pf)
		if err != nil || (parent.kind != ByAddress && parent.kind != ByNetdev) {
			return bad("want the PF's address or network interface before /vf" + index)
		}
		sel.kind, sel.pf, sel.number = ByVF, &parent, int(n)
		return sel, nil
	}
	if a, err := ParseAddress(s); err == nil {
		sel.kind, sel.address = ByAddress, a
		return sel, nil
	}
	if vendor, device, ok := strings.Cut(s, ":"); ok {
		v, err1 := strconv.ParseUint(vendor, 16, 16)
		d, err2 := strconv.ParseUint(device, 16, 16)
		if len(vendor) != 4 || len(device) != 4 || err1 != nil || err2 != nil {
			return bad("want a PCI address, as 0000:01:00.0, or ids, as 8086:10c9")
		}
		sel.kind, sel.ids = ByIDs, [2]uint16{uint16(v), uint16(d)}
		return sel, nil
	}
	// What is left can only be an interface's name, by the kernel's own rule (net/core/dev.c, dev_valid_name).
	if s == "" || len(s) > 15 || s == "." || s == ".." || strings.ContainsAny(s, " \t\n\v\f\r") || s[0] == '-' {
		return bad("want a PCI address, a network interface, PF/vfN, vendor:device, or mac=, path=, serial=, group=, class=")
	}
	sel.kind, sel.value = ByNetdev, s
	return sel, nil
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

// String is the selector as it was written.
func (s Selector) String() string { return s.text }

// Form is what the selector names devices by.
func (s Selector) Form() Form { return s.kind }

// Value is the word that a selector with a key, or of an interface, looks for, in the spelling of the kernel.
func (s Selector) Value() string { return s.value }

// Group is the number of a group=N selector.
func (s Selector) Group() (int, bool) { return s.number, s.kind == ByGroup }

// One resolves a selector to the one device it names; *NotFoundError or *AmbiguousError if it names none or several.
func (s Selector) One(h *Host, t *Topology) (*Device, error) {
	all, err := s.Resolve(h, t)
	if err != nil {
		return nil, err
	}
	if len(all) > 1 {
		return nil, &AmbiguousError{s.text, deviceNames(all)}
	}
	return all[0], nil
}

func deviceNames(devices []*Device) []string {
	names := make([]string, len(devices))
	for i, d := range devices {
		names[i] = d.Name
	}
	return names
}

// Resolve finds all devices that a selector names, at least one; *NotFoundError if there is none.
func (s Selector) Resolve(h *Host, t *Topology) ([]*Device, error) {
	match, err := s.matcher(h, t)
	if err != nil {
		return nil, err
	}
	var out []*Device
	t.All(func(d *Device) bool {
		var yes bool
		if yes, err = match(d); yes {
			out = append(out, d)
		}
		return err == nil
	})
	if err != nil {
		return nil, err
	}
	if len(out) == 0 {
		return nil, s.notFound(h, t)
	}
	return out, nil
}

// matcher is what decides whether a device is meant. Only the keys that need it read anything beyond the topology.
func (s Selector) matcher(h *Host, t *Topology) (func(*Device) (bool, error), error) {
	switch s.kind {
	case ByAddress:
		return func(d *Device) (bool, error) { return d.PCI && d.Address == s.address, nil }, nil
	case ByNetdev:
		return func(d *Device) (bool, error) { return slices.Contains(d.Netdevs, s.value), nil }, nil
	case ByIDs:
		return func(d *Device) (bool, error) { return d.PCI && [2]uint16{d.Vendor, d.Device} == s.ids, nil }, nil
	case ByGroup:
		return func(d *Device) (bool, error) { return d.Group == s.number, nil }, nil
	case ByClass:
		return func(d *Device) (bool, error) {
			return d.PCI && strings.HasPrefix(fmt.Sprintf("%06x", d.Class), s.value), nil
		}, nil
	case ByVF:
		pf, err := s.pf.One(h, t)
		if err != nil {
			return nil, err
		}
		if pf.SRIOV == nil {
			return nil, &NotFoundError{Selector: s.text, What: pf.Name + " is no PF (it has no SR-IOV capability)"}
		}
		return func(d *Device) (bool, error) {
			return d.PhysFn != nil && *d.PhysFn == pf.Address && d.VFIndex == s.number, nil
		}, nil
	case ByMAC:
		return func(d *Device) (bool, error) {
			for _, n := range d.Netdevs {
				if mac, err := optional(h.String(path.Join(netClass, n, "address"))); err != nil || mac == s.value {
					return err == nil, err
				}
			}
			return false, nil
		}, nil
	case ByPath:
		return func(d *Device) (bool, error) {
			if !d.PCI {
				return false, nil
			}
			_, p, err := readPath(h, d.Address)
			if host.Absent(err) || errors.Is(err, ErrNotFound) {
				return false, nil
			}
			return p == s.value, err
		}, nil
	default: // BySerial
		return func(d *Device) (bool, error) {
			if !d.PCI {
				return false, nil
			}
			serial, err := ReadSerial(h, d.Address)
			return strings.EqualFold(serial, s.value), err
		}, nil
	}
}

// notFound says what there is instead.
func (s Selector) notFound(h *Host, t *Topology) error {
	e := &NotFoundError{Selector: s.text}
	each := func(f func(*Device) []string) {
		t.All(func(d *Device) bool {
			for _, name := range f(d) {
				if !slices.Contains(e.Candidates, name) {
					e.Candidates = append(e.Candidates, name)
				}
			}
			return true
		})
		slices.Sort(e.Candidates)
	}
	pci := func(f func(*Device) string) {
		each(func(d *Device) []string {
			if text := f(d); d.PCI && text != "" {
				return []string{text}
			}
			return nil
		})
	}
	switch s.kind {
	case ByAddress:
		e.What = "no such device"
		pci(func(d *Device) string { return d.Name })
	case ByNetdev:
		e.What = "no network interface of a PCI device has this name"
		each(func(d *Device) []string { return d.Netdevs })
	case ByIDs:
		e.What = "no device has these ids"
		pci(func(d *Device) string { return fmt.Sprintf("%04x:%04x", d.Vendor, d.Device) })
	case ByClass:
		e.What = "no device is of this class"
		pci(func(d *Device) string { return fmt.Sprintf("class=%04x", d.Class>>8) })
	case ByGroup:
		e.What = "no such IOMMU group"
		if len(t.Groups) == 0 {
			e.What = "this host has no IOMMU groups"
		}
		if _, err := t.Group(s.number); err == nil {
			e.What = "the group is empty"
			break
		}
		for _, g := range t.Groups {
			e.Candidates = append(e.Candidates, "group="+strconv.Itoa(g.ID))
		}
	case ByVF:
		each(func(d *Device) []string {
			if d.PhysFn == nil {
				return nil
			}
			return []string{fmt.Sprintf("%s/vf%d", d.PhysFn, d.VFIndex)}
		})
		e.What = "no such VF"
		if len(e.Candidates) == 0 {
			e.What = "no such VF; none is enabled on this host (viaduct vf create " + s.pf.text + " N)"
		}
	case ByMAC:
		e.What = "no network interface has this MAC address (a device on a vfio driver shows none)"
		each(func(d *Device) []string {
			var macs []string
			for _, n := range d.Netdevs {
				if mac, err := h.String(path.Join(netClass, n, "address")); err == nil {
					macs = append(macs, "mac="+mac)
				}
			}
			return macs
		})
	case ByPath:
		e.What = "no device is at this place"
		pci(func(d *Device) string {
			if _, p, err := readPath(h, d.Address); err == nil {
				return "path=" + p
			}
			return ""
		})
	case BySerial:
		e.What = "no device has this serial number (root alone can read them)"
		pci(func(d *Device) string {
			if serial, err := ReadSerial(h, d.Address); err == nil && serial != "" {
				return "serial=" + serial
			}
			return ""
		})
	}
	return e
}
