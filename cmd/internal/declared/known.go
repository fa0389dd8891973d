package declared

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"viaduct/cmd/internal/spec"
	"viaduct/iommu"
	"viaduct/vfio"
)

// What outlives a boot, in StateDir: known-SELECTOR is what a declaration named when it was last applied; protected is what
// carried the host then.

// known is what a declared device was.
type known struct {
	Selector string        `json:"selector"`
	Address  iommu.Address `json:"address"`
	Identity vfio.Identity `json:"identity"`
	Group    []string      `json:"group"` // the places of all that has to be taken along
}

func knownKey(selector string) string {
	return "known-" + strings.Map(func(r rune) rune {
		if r == '/' || r == 0 {
			return '_'
		}
		return r
	}, selector)
}

// identify is what is known of a device that a match names, nil if nothing is.
func (m *Manager) identify(match spec.Match, _ *iommu.Device) (*known, error) {
	var k known
	if ok, err := m.State.Get(knownKey(match.String()), &k); !ok {
		return nil, err
	}
	return &k, nil
}

// changed says how what is there differs from what was there; "" if it does not. A card that moved to another slot is the same.
func (m *Manager) changed(k *known, d *iommu.Device) string {
	if k == nil {
		return ""
	}
	if why := vfio.Differs(m.Host, &k.Identity, d); why != "" {
		return fmt.Sprintf("%s is another device than %s was: %s", d.Name, k.Address, why)
	}
	return ""
}

// joined says which devices that the host uses have come into a device's group since; "" if none have.
func (m *Manager) joined(i *Item) string {
	if i.known == nil || len(i.known.Group) == 0 {
		return ""
	}
	var out []string
	for _, d := range i.unit {
		place, err := iommu.PathOf(m.Host, d)
		if err == nil && d.Blocks() && !slices.Contains(i.known.Group, place) {
			out = append(out, fmt.Sprintf("%s (%s)", d.Name, d.Driver))
		}
	}
	if len(out) == 0 {
		return ""
	}
	return "its group has grown by what the host uses: " + strings.Join(out, ", ")
}

// Remember writes down what the items are now, and what carries the host, for the next boot.
func (m *Manager) Remember(items []*Item) error {
	if m.State == nil {
		return nil
	}
	var errs []error
	for _, i := range items {
		if i.Device == nil || i.State == Changed || i.State == Refused {
			continue
		}
		k := known{Selector: i.Name, Address: i.Device.Address, Identity: m.Binder.Identify(i.Device)}
		for _, d := range i.unit {
			if place, err := iommu.PathOf(m.Host, d); err == nil {
				k.Group = append(k.Group, place)
			}
		}
		if i.known == nil || !slices.Equal(k.Group, i.known.Group) || k.Address != i.known.Address {
			errs = append(errs, m.State.Put(knownKey(i.Name), k))
		}
	}
	return errors.Join(errs...)
}

const protectedKey = "protected"

// protected is a device that carried the host.
type protected struct {
	Address  iommu.Address `json:"address"`
	Identity vfio.Identity `json:"identity"`
	Why      string        `json:"why"`
}

// Protect writes down which devices carry the host: its addresses and routes, its mounted file systems and its swap.
func (m *Manager) Protect() error {
	var all []*iommu.Device
	m.Topology.All(func(d *iommu.Device) bool {
		if d.PCI && d.PhysFn == nil && d.Blocks() {
			all = append(all, d)
		}
		return true
	})
	holders, err := vfio.Holders(m.Host, all)
	if err != nil {
		return err
	}
	out := []protected{}
	for _, d := range all {
		n := slices.IndexFunc(holders, func(h vfio.Holder) bool { return h.Device == d.Name && h.Kind != vfio.Process })
		if n >= 0 {
			out = append(out, protected{d.Address, m.Binder.Identify(d), holders[n].What})
		}
	}
	var before []protected
	if _, err := m.State.Get(protectedKey, &before); err != nil {
		return err
	}
	if slices.EqualFunc(before, out, func(a, b protected) bool { return a.Address == b.Address && a.Why == b.Why }) {
		return nil
	}
	return m.State.Put(protectedKey, out)
}

// recorded adds what carried the host when it ran to what must not be taken.
func (m *Manager) recorded(g *guard) error {
	var all []protected
	found, err := m.State.Get(protectedKey, &all)
	if err != nil {
		return err
	}
	g.any = g.any || found
	m.Topology.All(func(d *iommu.Device) bool {
		for k := range all {
			if d.PCI && g.names[d.Name] == "" && vfio.Differs(m.Host, &all[k].Identity, d) == "" && m.same(&all[k].Identity, d) {
				g.names[d.Name] = "it carried this host when that last ran: it " + all[k].Why
			}
		}
		return true
	})
	return nil
}

// same reports whether this is the device that was identified: by its own numbers where both are known, else by its place.
func (m *Manager) same(id *vfio.Identity, d *iommu.Device) bool {
	serial, err := iommu.ReadSerial(m.Host, d.Address)
	if err == nil && serial != "" && id.Serial != "" || len(id.MACs) > 0 && len(d.Netdevs) > 0 {
		return true // and Differs found nothing
	}
	place, err := iommu.PathOf(m.Host, d)
	return err == nil && place == id.Path
}
