package declared

import (
	"fmt"
	"slices"
	"strings"

	"viaduct/cmd/internal/hostfile"
	"viaduct/iommu"
	"viaduct/vfio"
	"viaduct/vfio/bind"
)

// planDevices plans the declared devices. Those that share an IOMMU group go together: the first is planned and done
// for all of them.
func (m *Manager) planDevices(devices []hostfile.Device, guard *guard, leased map[iommu.Address]Guest) []*Item {
	var items []*Item
	first := map[string]*Item{}
	for k := range devices {
		i := m.findDevice(&devices[k])
		if items = append(items, i); i.unit == nil {
			continue
		}
		lead := first[i.unit[0].Name]
		if lead == nil {
			first[i.unit[0].Name] = i
			continue
		}
		if err := lead.join(i); err != nil {
			i.Refuse(err)
		}
	}

	for _, i := range items {
		if i.unit != nil && i.State == OK {
			m.planUnit(i, guard, leased)
		}
	}
	follow(items)
	return items
}

// join has another item of the same group go with this one. What one leaves open, the other says.
func (i *Item) join(other *Item) error {
	if i.Device == other.Device {
		return fmt.Errorf("%s: %s is %s, which is already declared at %s", other.At, other.Name, i.Device.Name, i.At)
	}
	differ := func(what, one, two string) error {
		return fmt.Errorf("%s: %s and %s share IOMMU group %d, so they need the same %s: it is %s at %s, "+
			"and %s here", other.At, i.Device.Name, other.Device.Name, *i.Device.Group, what, one, i.At, two)
	}
	switch {
	case i.driver == bind.Auto:
		i.driver = other.driver
	case other.driver != bind.Auto && other.driver != i.driver:
		return differ("driver", i.driver, other.driver)
	}
	switch {
	case i.owner == nil:
		i.owner = other.owner
	case other.owner != nil && other.owner.Text != i.owner.Text:
		return differ("node_owner", i.owner.Text, other.owner.Text)
	}

	other.with, other.unit = i, nil
	other.Notes = append(other.Notes, fmt.Sprintf("%s is taken with %s, which is declared at %s: both are in "+
		"IOMMU group %d",
		other.Device.Name, i.Device.Name, i.At, *i.Device.Group))
	return nil
}

// follow brings items that go with another one to its state.
func follow(items []*Item) {
	for _, i := range items {
		if i.with != nil {
			i.State, i.Err = i.with.State, i.with.Err
		}
	}
}

func (m *Manager) planDevice(dev *hostfile.Device, guard *guard, leased map[iommu.Address]Guest) *Item {
	i := m.findDevice(dev)
	if i.unit != nil {
		m.planUnit(i, guard, leased)
	}
	return i
}

// findDevice finds a declared device and what goes along with it.
func (m *Manager) findDevice(dev *hostfile.Device) *Item {
	i := &Item{Name: dev.Select.String(), At: dev.At, Optional: dev.Optional, State: OK, driver: dev.Driver}
	if i.driver == "" {
		i.driver = bind.Auto
	}
	if !m.found(i, dev.Select, m.find) {
		return i
	}
	if dev.Owner != "" {
		var err error
		if i.owner, err = bind.ParseNodeOwner(dev.Owner); err != nil {
			i.Refuse(fmt.Errorf("%s: node_owner: %w", dev.At, err))
			return i
		}
	}

	if err := bind.Takable(i.Device); err != nil {
		i.Refuse(err)
		return i
	}
	units, err := bind.Units(m.topology, []*iommu.Device{i.Device})
	if err != nil {
		i.Refuse(err)
		return i
	}

	i.unit = units[0]
	return i
}

// planUnit plans a device and what goes along with it.
func (m *Manager) planUnit(i *Item, guard *guard, leased map[iommu.Address]Guest) {
	if slices.ContainsFunc(i.unit, func(d *iommu.Device) bool { return d.PCI && leased[d.Address].OwnDriver }) {
		return
	}
	for _, d := range i.unit {
		change, err := m.handle.Plan(d, bind.Take(i.driver))
		if err != nil {
			i.Refuse(err)
			return
		}
		i.Steps = append(i.Steps, bind.Actions(change.Steps)...)
	}

	if m.host.Live() && i.owner != nil && len(i.Steps) == 0 {
		for _, d := range i.unit {
			nodes, err := vfio.Nodes(m.host, d)
			if err != nil {
				i.Refuse(err)
				return
			}
			if d.VFIO && !i.owner.Keeps(m.host, d) {
				chown := "chown " + i.owner.Text + " " + strings.Join(nodes, " ")
				i.Steps = append(i.Steps, bind.Action{Command: chown})
			}
		}
	}

	if len(i.Steps) == 0 {
		return
	}
	i.State = Differs
	joined, err := m.joined(i)
	if err != nil {
		i.Refuse(err)
		return
	}
	if joined != "" && !m.options.Accept {
		i.State, i.Steps = Changed, nil
		i.Err = fmt.Errorf("%s: %s (viaduct apply --accept takes it too)", i.Name, joined)
		return
	}

	if err := guard.take(i.unit); err != nil {
		i.Refuse(err)
	}
}
