package iommu

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"viaduct/internal/host"
	"viaduct/internal/nearest"
)

// Selector names devices the way a user does. The forms: an address (0000:01:00.0, 01:00.0), a slot (0a:00), a network
// interface (enp1s0), a VF of a PF (enp1s0/vf3), ids (8086:10c9), mac=, path= (see [PhysicalPath]), serial=, guid=,
// group=, class=. [ParseSelector] makes one, and [ParseArgument] one that may be a word such as gpu.
type Selector struct {
	text    string
	kind    Form
	value   string
	address Address
	number  int // vf: index; group: id
	ids     [2]uint16
	pf      *Selector
	spoken  bool // a word such as gpu counts, where no interface has that name
}

// ErrSyntax is wrapped by errors about a selector that no host could resolve.
const ErrSyntax = host.Error("not a selector")

// AmbiguousError says that a selector which must name one device names several.
type AmbiguousError struct {
	Selector   string
	Candidates []string
}

func (e *AmbiguousError) Error() string {
	return fmt.Sprintf("%s matches %d devices; name one of them: %s", e.Selector, len(e.Candidates),
		abbreviate(e.Candidates))
}

// NotFoundError says that a selector names nothing on this host. It matches ErrNotFound.
type NotFoundError struct {
	Selector   string
	What       string   // what was looked for
	Candidates []string // what there is of that kind
	Like       string   // the selector as candidates are written; "" is Selector
}

func (e *NotFoundError) Error() string {
	s := fmt.Sprintf("%s: %s", e.Selector, e.What)
	const few = 4
	near := nearest.To(cmp.Or(e.Like, e.Selector), e.Candidates)
	switch {
	case len(e.Candidates) == 0:
	case len(near) > 0:
		s += "; did you mean " + nearest.Or(near) + "?"
	case len(e.Candidates) <= few:
		s += "; there is " + strings.Join(e.Candidates, ", ")
	default:
		s += fmt.Sprintf("; there are %d others, e.g. %s", len(e.Candidates), e.Candidates[0])
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
	want := ""
	switch key, value, keyed := strings.Cut(s, "="); {
	case keyed:
		want = sel.parseKey(key, value)
	default:
		want = sel.parsePlain(s)
	}

	if want != "" {
		return Selector{}, fmt.Errorf("%q is %w: %s", s, ErrSyntax, want)
	}
	return sel, nil
}

// ParseArgument is ParseSelector for a command line, where also one of [Words] may stand: it names devices by their
// class or vendor, unless a network interface has that name. A file may not have words, which mean other devices once a
// card is added.
func ParseArgument(s string) (Selector, error) {
	sel, err := ParseSelector(s)
	sel.spoken = err == nil && sel.kind == ByNetdev
	return sel, err
}

// parseKey reads KEY=VALUE. It returns what is wanted instead, "" if all is well.
func (s *Selector) parseKey(key, value string) (want string) {
	for kind, form := range forms {
		if form.key == key && key != "" {
			s.kind = Form(kind)
			return form.parse(s, value)
		}
	}
	var keys []string
	for _, form := range forms {
		if form.key != "" {
			keys = append(keys, form.key)
		}
	}
	return "the keys are " + strings.Join(keys, ", ") + nearest.Ask(key, keys)
}

// parsePlain reads a selector without a key: the first form that recognises it.
func (s *Selector) parsePlain(text string) (want string) {
	for kind, form := range forms {
		if form.key == "" && form.recognises(text) {
			s.kind = Form(kind)
			return form.parse(s, text)
		}
	}
	return "want a PCI address, a network interface, PF/vfN, vendor:device, or mac=, path=, serial=, group=, class="
}

// String is the selector as it was written.
func (s Selector) String() string { return s.text }

// Form is what the selector names devices by.
func (s Selector) Form() Form { return s.kind }

// Value is the word that a selector with a key, or of an interface, looks for, in the spelling of the kernel.
func (s Selector) Value() string { return s.value }

// Group is the number of a group=N selector.
func (s Selector) Group() (int, bool) { return s.number, s.kind == ByGroup }

// Address is the address that a selector is.
func (s Selector) Address() (Address, bool) { return s.address, s.kind == ByAddress }

// One resolves a selector to the one device it names; *NotFoundError or *AmbiguousError if it names none or several.
func (s Selector) One(h *Host, t *Topology) (*Device, error) {
	all, err := s.Resolve(h, t)
	if err != nil {
		return nil, err
	}
	return s.one(all)
}

func (s Selector) one(all []*Device) (*Device, error) {
	if len(all) > 1 {
		return nil, &AmbiguousError{s.text, deviceNames(all)}
	}
	return all[0], nil
}

// PF resolves a selector where only a PF can stand: of several devices only PFs are meant, as VFs may have the ids of
// theirs. Errors are those of One; the one device may be no PF, which its users tell best.
func (s Selector) PF(h *Host, t *Topology) (*Device, error) {
	all, err := s.Resolve(h, t)
	if err != nil {
		return nil, err
	}
	d, err := s.one(OnlyPFs(all))
	if err != nil {
		return nil, err
	}
	if err := s.OtherPort(h, d); err != nil {
		return nil, err
	}
	return d, nil
}

// OtherPortError says that a PF was named by a port of its card that the settings of its VFs do not go over.
type OtherPortError struct{ Selector, PF, Port string }

func (e *OtherPortError) Error() string {
	return fmt.Sprintf("%s is another port of %s than %s, which makes the settings of its VFs: name %s or %s",
		e.Selector, e.PF, e.Port, e.Port, e.PF)
}

// OtherPort is an *OtherPortError if the selector names a function with several ports by one that is not its first.
func (s Selector) OtherPort(h *Host, d *Device) error {
	if d.SRIOV == nil || len(d.Netdevs) < 2 {
		return nil
	}
	first := d.Netdevs[0]
	named := first
	switch s.kind {
	case ByNetdev:
		if named = s.value; !slices.Contains(d.Netdevs, named) {
			var err error
			if named, err = firstName(h, s.value); err != nil {
				return err
			}
		}
	case ByMAC:
		macs, err := PermanentMACs(h, d)
		if err != nil {
			return err
		}
		if known := macs[first]; known != "" && known != s.value {
			named = ""
		}
	}
	if named == first {
		return nil
	}
	return &OtherPortError{s.text, d.Name, first}
}

// OnlyPFs are the PFs of several devices; all of them if there is none.
func OnlyPFs(devices []*Device) []*Device {
	var pfs []*Device
	for _, d := range devices {
		if d.SRIOV != nil {
			pfs = append(pfs, d)
		}
	}
	if len(pfs) == 0 {
		return devices
	}
	return pfs
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
	if forms[s.kind].keys != nil {
		found, err := t.keyed(h, s.kind).of(s.value)
		if err == nil && len(found) == 0 {
			err = s.notFound(h, t)
		}
		return found, err
	}
	match, err := forms[s.kind].matcher(s, h, t)
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

// notFound says what there is instead.
func (s Selector) notFound(h *Host, t *Topology) error {
	e := &NotFoundError{Selector: s.text}
	e.What, e.Candidates = forms[s.kind].missing(s, h, t)
	switch s.kind {
	case ByAddress:
		e.Like = s.address.String()
	case BySlot:
		e.Like, _, _ = strings.Cut(s.address.String(), ".")
	}
	return e
}
