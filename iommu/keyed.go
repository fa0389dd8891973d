package iommu

import (
	"errors"
	"slices"
	"strings"
)

// keyed are the devices of a topology by what takes long to read of them, read once.
type keyed struct {
	byKey  map[string][]*Device // in lower case
	all    []string             // the keys as they are
	unread error                // of devices that could not be asked
}

// SelectorsOf are the selectors of a form that has keys (mac=, path=, serial=) by which a device may be found: what
// others have too is among them.
func SelectorsOf(h *Host, d *Device, form Form) ([]Selector, error) {
	if form < 0 || int(form) >= len(forms) || forms[form].keys == nil {
		return nil, nil
	}
	keys, err := forms[form].keys(h, d)
	var out []Selector
	for _, key := range keys {
		// One with blanks in it is none.
		if s, bad := ParseSelector(forms[form].key + "=" + key); bad == nil {
			out = append(out, s)
		}
	}
	return out, err
}

// keyed reads what a form finds devices by, unless that was done.
func (t *Topology) keyed(h *Host, form Form) *keyed {
	l := t.lookup
	if l == nil {
		// Made by hand.
		l = &lookup{}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if k := l.keyed[form]; k != nil {
		return k
	}

	k := &keyed{byKey: map[string][]*Device{}}
	t.All(func(d *Device) bool {
		keys, err := forms[form].keys(h, d)
		k.unread = errors.Join(k.unread, err)
		k.all = append(k.all, keys...)
		for _, key := range keys {
			key = strings.ToLower(key)
			k.byKey[key] = append(k.byKey[key], d)
		}
		return true
	})
	if l.keyed == nil {
		l.keyed = map[Form]*keyed{}
	}
	l.keyed[form] = k
	return k
}

// of are the devices with a key. That there is none is known only when all could be asked.
func (k *keyed) of(key string) ([]*Device, error) {
	if found := k.byKey[strings.ToLower(key)]; len(found) > 0 {
		return slices.Clone(found), nil
	}
	return nil, k.unread
}

// names are all keys, as selectors.
func (k *keyed) names(prefix string) []string {
	out := slices.Compact(slices.Sorted(slices.Values(k.all)))
	for i := range out {
		out[i] = prefix + out[i]
	}
	return out
}
