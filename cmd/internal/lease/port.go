package lease

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"slices"
	"time"

	"viaduct/iommu"
	"viaduct/vfio/bind"
)

// Port is a device that a network of libvirt's gives to a domain, also to one that runs.
type Port struct {
	Domain  string
	Device  iommu.Address
	Managed bool // libvirt changes drivers itself
}

// portXML is as much of a network's hook data as matters here (docs/hooks.rst, docs/formatnetworkport.rst of libvirt).
type portXML struct {
	Port struct {
		Owner struct {
			Name string `xml:"name"`
		} `xml:"owner"`
		Plug struct {
			Type    string `xml:"type,attr"`
			Managed string `xml:"managed,attr"`
			Address pciXML `xml:"address"`
		} `xml:"plug"`
	} `xml:"networkport"`
}

// ParsePort reads a port, as libvirt gives it to its hooks; nil if it is none of a PCI device.
func ParsePort(text []byte) (*Port, error) {
	var x portXML
	if err := xml.Unmarshal(text, &x); err != nil {
		return nil, fmt.Errorf("the network's port that libvirt handed over: %w", err)
	}
	plug := &x.Port.Plug
	a, ok, err := plug.Address.parse()
	if plug.Type != "hostdev-pci" || !ok || err != nil {
		return nil, err
	}
	return &Port{Domain: x.Port.Owner.Name, Device: a, Managed: plug.Managed == "yes"}, nil
}

// Plug gives a domain the lease of a device that it drew from a network, before libvirt hands it over; an error keeps
// libvirt from that. What is of no pool is left to libvirt, unless it is another guest's or in quarantine.
func (m *Manager) Plug(ctx context.Context, p *Port) error {
	d := &Domain{Name: p.Domain, Devices: []DomainDevice{{Address: p.Device, Managed: p.Managed}}}
	all, err1 := m.all()
	quarantined, err2 := m.quarantinedBy()
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	if wrong := d.mismatch(nil, all, quarantined); len(wrong) > 0 {
		return d.refuse(p.Device, "%s", wrong[0])
	}
	pool, err := m.poolOf(p.Device)
	if pool == "" || err != nil {
		return err
	}
	if p.Managed {
		return d.refuse(p.Device, "%s", managedByLibvirt(p.Device, pool))
	}

	i := slices.IndexFunc(all, func(l *Lease) bool { return l.Guest == p.Domain })
	switch {
	case i < 0:
		_, _, _, err := m.Assign(ctx, &Request{Guest: p.Domain, Sources: []Source{one(pool, p.Device)}})
		return err
	case all[i].Has(p.Device):
		return nil
	case !all[i].Drawn:
		return d.refuse(p.Device, "%s is of pool %q, and %s has a lease that viaduct assign made: it has either that "+
			"or what networks give it", p.Device, pool, p.Domain)
	}
	return m.grow(ctx, p, pool)
}

// grow adds a device to the lease of a domain, which may run.
func (m *Manager) grow(ctx context.Context, p *Port, pool string) error {
	mine, err := m.Book.lockGuest(ctx, p.Domain, m.handle.Timeout())
	if err != nil {
		return err
	}
	defer mine.Close()
	d, err := m.Topology.Find(p.Device)
	if err != nil {
		return err
	}
	l, err := m.reserveMore(ctx, p, pool, d)
	if err != nil {
		return err
	}

	last := len(l.Devices) - 1
	one := l.part(m, last)
	if _, err = m.finish(ctx, one, nil); err == nil {
		return nil
	}
	// Nobody was told of it.
	undone := m.unmake(ctx, one)
	if undone == nil {
		l.dropAt(last)
		undone = m.Book.put(l)
	}
	return errors.Join(err, undone)
}

// reserveMore writes down that a domain's lease has one more device.
func (m *Manager) reserveMore(ctx context.Context, p *Port, pool string, d *iommu.Device) (*Lease, error) {
	held, err := m.Book.lockAll(ctx, m.handle.Timeout())
	if err != nil {
		return nil, err
	}
	defer held.Close()
	all, err := m.all()
	if err != nil {
		return nil, err
	}

	var mine *Lease
	for _, l := range all {
		switch {
		case l.Has(p.Device):
			return nil, fmt.Errorf("%s was assigned to guest %q just now", p.Device, l.Guest)
		case l.Guest == p.Domain:
			mine = l
		}
	}

	if mine == nil {
		return nil, &NoLeaseError{Guest: p.Domain}
	}
	if err := m.handle.Refresh([]*iommu.Device{d}); err != nil {
		return nil, err
	}

	dev, err := m.describe(d, nil)
	if err != nil {
		return nil, err
	}

	mine.Devices = append(mine.Devices, dev)
	mine.Sources = append(mine.Sources, one(pool, p.Device))
	return mine, m.Book.putLocked(mine)
}

// part is one device of a lease as a lease of its own, which is written down where it belongs.
func (l *Lease) part(m *Manager, at int) *Lease {
	one := *l
	one.Devices = slices.Clone(l.Devices[at : at+1])
	one.Ready, one.Runner, one.Holders = false, nil, nil
	one.save = func() error {
		l.Devices[at] = one.Devices[0]
		return m.Book.put(l)
	}
	return &one
}

// Unplug scrubs a device that a domain gives back to a network, whether it goes on or has ended. What it never drew is
// left alone.
func (m *Manager) Unplug(ctx context.Context, p *Port, wait time.Duration) ([]Certificate, error) {
	l, err := m.Book.Get(p.Domain)
	if err != nil || l == nil || !l.Drawn || !l.Has(p.Device) {
		return nil, err
	}
	if len(l.Devices) == 1 {
		return m.Release(ctx, p.Domain, wait)
	}

	mine, err := m.Book.lockGuest(ctx, p.Domain, m.handle.Timeout())
	if err != nil {
		return nil, err
	}
	defer mine.Close()
	if l, err = m.known(p.Domain); err != nil {
		return nil, err
	}
	at := slices.IndexFunc(l.Devices, func(d Device) bool { return d.Address == p.Device })
	if at < 0 {
		return nil, nil
	}
	m.handle.Start()
	one := l.part(m, at)
	devices := m.present(one)
	until := time.Now().Add(wait)
	if err := m.awaitGone(ctx, one, devices, wait); err != nil {
		return nil, err
	}
	if err := m.lock(ctx, m.touched(devices, true)); err != nil {
		return nil, err
	}

	out, unwritten, err := m.scrub(ctx, one, until)
	if out == nil || unwritten != nil {
		return out, errors.Join(err, unwritten)
	}
	if !bind.IsStuck(err) {
		err = errors.Join(err, m.giveBackCompanions(ctx, devices))
	}
	l.dropAt(at)
	return out, errors.Join(err, m.Book.put(l))
}

// dropAt takes a device out of a lease that networks drew, each of whose devices has a source of its own.
func (l *Lease) dropAt(at int) {
	l.Devices = slices.Delete(l.Devices, at, at+1)
	if at < len(l.Sources) {
		l.Sources = slices.Delete(l.Sources, at, at+1)
	}
}

// poolOf is the pool that a device is of; "" if it is known to be of none.
func (m *Manager) poolOf(a iommu.Address) (string, error) {
	d, err := m.Topology.Find(a)
	if err != nil {
		// What is not there is of none.
		return "", nil
	}
	return m.declared.PoolOf(m.declaration, d)
}

// managedByLibvirt is why libvirt must not manage a device of a pool.
func managedByLibvirt(a iommu.Address, pool string) string {
	return fmt.Sprintf("%s is of pool %q and has managed='yes', so libvirt would change its driver: set "+
		"managed='no'", a, pool)
}
