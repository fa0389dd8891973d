package declared

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"viaduct/cmd/internal/hostfile"
	"viaduct/iommu"
	"viaduct/sriov"
)

// What a declaration named when it was last applied is kept in StateDir, as known-SELECTOR.

// known is what a declared device was.
type known struct {
	Selector string         `json:"selector"`
	Address  iommu.Address  `json:"address"`
	Identity iommu.Identity `json:"identity"`
	Group    []string       `json:"group"` // the places of all that has to be taken along
	// Equal are the places of all devices with the ids of this one, itself included. Where nothing else tells them
	// apart they show that places are numbered anew.
	Equal []string `json:"equal,omitempty"`

	Settings map[int]sriov.Settings `json:"settings,omitempty"` // that were declared of its VFs
}

func knownKey(selector string) string {
	return "known-" + strings.Map(func(r rune) rune {
		if r == '/' || r == 0 {
			return '_'
		}
		return r
	}, selector)
}

// remembered is what a match named when it was last applied, nil if it was not.
func (m *Manager) remembered(match hostfile.Match) (*known, error) {
	var k known
	if ok, err := m.state.Get(knownKey(match.String()), &k); !ok {
		return nil, err
	}
	return &k, nil
}

// byRecord is the one device that was recorded, nil if it is not there, or if several may be it.
func (m *Manager) byRecord(k *known) (*iommu.Device, error) {
	var there []*iommu.Device
	m.topology.All(func(d *iommu.Device) bool {
		if d.PCI && d.PhysFn == nil {
			there = append(there, d)
		}
		return true
	})
	found, err := m.oneOf(there, &k.Identity)
	if err != nil || len(found) != 1 {
		return nil, err
	}
	return found[0], nil
}

// changed says how what is there differs from what was there; "" if it does not. A card that moved to another slot is
// the same, which its own numbers tell, those that it was found by as well.
func (m *Manager) changed(k *known, match hostfile.Match, d *iommu.Device) (string, error) {
	if k == nil {
		return "", nil
	}
	why, err := k.Identity.Differs(m.host, d)
	if err != nil {
		return "", err
	}
	if why != "" {
		return fmt.Sprintf("%s is not the device that %s was: %s", d.Name, k.Address, why), nil
	}
	place, err := iommu.PathOf(m.host, d)
	if err != nil {
		return "", err
	}
	if place != k.Identity.Path && !match.Has(iommu.ByMAC, iommu.ByGUID, iommu.BySerial) {
		same, err := m.Same(&k.Identity, d)
		if err != nil {
			return "", err
		}
		if !same {
			return fmt.Sprintf("%s is at path=%s instead of %s, and viaduct cannot tell whether it is the same device",
				d.Name, place, k.Identity.Path), nil
		}
	}

	numbered, err := m.numbered(d)
	if err != nil || numbered || len(k.Equal) < 2 {
		return "", err
	}
	equal, err := m.equal(d)
	if err != nil {
		return "", err
	}
	moved := func(place string) bool { return !slices.Contains(equal, place) }
	if slices.ContainsFunc(k.Equal, moved) {
		return fmt.Sprintf("equal cards such as %s are at %s now and were at %s, and viaduct cannot tell which "+
			"one it is",
			d.Name,
			strings.Join(equal, ", "), strings.Join(k.Equal, ", ")), nil
	}
	return "", nil
}

// numbered reports whether a number of its own tells a device from others with its ids, now: the driver that told its
// may be gone.
func (m *Manager) numbered(d *iommu.Device) (bool, error) {
	for _, form := range []iommu.Form{iommu.ByMAC, iommu.ByGUID, iommu.BySerial} {
		if numbers, err := iommu.SelectorsOf(m.host, d, form); err != nil || len(numbers) > 0 {
			return true, err
		}
	}
	return false, nil
}

// equal are the places of all devices with the ids of this one, with its own. Where root buses are numbered anew, one
// of them may be where another was.
func (m *Manager) equal(d *iommu.Device) (out []string, err error) {
	m.topology.All(func(other *iommu.Device) bool {
		if other.PCI && other.PhysFn == nil && other.ID == d.ID {
			var place string
			place, err = iommu.PathOf(m.host, other)
			out = append(out, place)
		}
		return err == nil
	})
	slices.Sort(out)
	return out, err
}

// joined says which devices that the host uses have come into a device's group since; "" if none have.
func (m *Manager) joined(i *Item) (string, error) {
	if i.known == nil || len(i.known.Group) == 0 {
		return "", nil
	}
	var out []string
	for _, d := range i.unit {
		place, err := iommu.PathOf(m.host, d)
		if err != nil {
			return "", err
		}
		if d.Blocks() && !slices.Contains(i.known.Group, place) {
			out = append(out, fmt.Sprintf("%s (%s)", d.Name, d.Driver))
		}
	}
	if len(out) == 0 {
		return "", nil
	}
	return "its group now includes devices that the host uses: " + strings.Join(out, ", "), nil
}

// dropped adds to a wish what was declared of VFs when that was last applied, and is not any more: it goes back to what
// VFs begin with. A MAC address stays, as there is none to go back to.
func (i *Item) dropped(vfs []*iommu.Device, wish []sriov.VFWish, leased map[iommu.Address]Guest) {
	if i.known == nil {
		return
	}
	for _, vf := range vfs {
		if _, ours := leased[vf.Address]; ours {
			continue
		}
		now := wish[vf.VFIndex].Settings
		for k := range i.known.Settings[vf.VFIndex] {
			if usual, known := k.Default(); known && now[k] == "" {
				now[k] = usual
			}
		}
	}
}

// Remember writes down what the items are now.
func (m *Manager) Remember(items []*Item) error {
	var errs []error
	for _, i := range items {
		if i.Device == nil || i.State == Changed {
			// But also of what was refused: at the next boot something else may be there.
			continue
		}
		k, err := m.knownOf(i)
		if err != nil {
			errs = append(errs, err)
			continue
		}

		if i.State == OK && i.pf != nil {
			k.Settings = settingsOf(i.pf)
		} else if i.known != nil {
			k.Settings = i.known.Settings
		}

		if i.known == nil || m.options.Accept || !slices.Equal(k.Group, i.known.Group) ||
			k.Address != i.known.Address || !slices.Equal(k.Equal, i.known.Equal) ||
			!maps.EqualFunc(k.Settings, i.known.Settings, maps.Equal) {
			errs = append(errs, m.state.Put(knownKey(i.Name), k))
		}
	}
	return errors.Join(errs...)
}

// knownOf is what a device of an item is now.
func (m *Manager) knownOf(i *Item) (k known, err error) {
	k.Selector, k.Address = i.Name, i.Device.Address
	// From when it could still be asked.
	if k.Identity, err = m.handle.Taken(i.Device); err == nil && k.Identity.Path == "" {
		k.Identity, err = iommu.Identify(m.host, i.Device)
	}
	if err != nil {
		return k, err
	}

	unit := i.unit
	if i.with != nil {
		unit = i.with.unit
	}
	for _, d := range unit {
		place, err := iommu.PathOf(m.host, d)
		if err != nil {
			return k, err
		}
		k.Group = append(k.Group, place)
	}
	k.Equal, err = m.equal(i.Device)
	return k, err
}
