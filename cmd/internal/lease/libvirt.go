package lease

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/holder"
)

// Domain is what a libvirt domain says of its host devices.
type Domain struct {
	Name    string
	Devices []DomainDevice
}

// DomainDevice is a host device of a domain: a hostdev, or an interface of that type.
type DomainDevice struct {
	Address   iommu.Address
	Managed   bool   // libvirt changes drivers itself
	MAC, VLAN string // of an interface; "" if not said
}

// domainXML is as much of a domain as matters here (docs/formatdomain.rst of libvirt).
type domainXML struct {
	Name    string `xml:"name"`
	Devices struct {
		Hostdevs   []hostdevXML `xml:"hostdev"`
		Interfaces []hostdevXML `xml:"interface"`
	} `xml:"devices"`
}

type hostdevXML struct {
	Mode    string `xml:"mode,attr"`
	Type    string `xml:"type,attr"`
	Managed string `xml:"managed,attr"`
	MAC     struct {
		Address string `xml:"address,attr"`
	} `xml:"mac"`
	VLAN struct {
		Tags []struct {
			ID string `xml:"id,attr"`
		} `xml:"tag"`
	} `xml:"vlan"`
	Source struct {
		Address pciXML `xml:"address"`
	} `xml:"source"`
}

// pciXML is a PCI address of libvirt's (docs/formatdomain.rst): zero where it says nothing.
type pciXML struct {
	Domain   string `xml:"domain,attr"`
	Bus      string `xml:"bus,attr"`
	Slot     string `xml:"slot,attr"`
	Function string `xml:"function,attr"`
}

// parse reads it; ok is false of what is no PCI address, as a USB device's.
func (x *pciXML) parse() (a iommu.Address, ok bool, err error) {
	if x.Bus == "" || x.Slot == "" {
		return a, false, nil
	}
	pad := func(n string, digits int) string {
		n = strings.TrimPrefix(n, "0x")
		return strings.Repeat("0", max(0, digits-len(n))) + n
	}
	place := pad(x.Domain, 4) + ":" + pad(x.Bus, 2) + ":" + pad(x.Slot, 2) + "." + pad(x.Function, 1)
	a, err = iommu.ParseAddress(place)
	return a, true, err
}

// ParseDomain reads a domain, as libvirt gives it to its hooks.
func ParseDomain(text []byte) (*Domain, error) {
	var x domainXML
	if err := xml.Unmarshal(text, &x); err != nil {
		return nil, fmt.Errorf("read the domain from libvirt: %w", err)
	}
	out := &Domain{Name: x.Name}
	for _, h := range append(slices.Clone(x.Devices.Hostdevs), x.Devices.Interfaces...) {
		a, ok, err := h.Source.Address.parse()
		if err != nil {
			return nil, fmt.Errorf("domain %s: %w", x.Name, err)
		}
		if !ok {
			continue
		}
		d := DomainDevice{Address: a, Managed: h.Managed == "yes", MAC: strings.ToLower(h.MAC.Address)}
		if len(h.VLAN.Tags) == 1 {
			d.VLAN = h.VLAN.Tags[0].ID
		}
		out.Devices = append(out.Devices, d)
	}
	return out, nil
}

func (d *Domain) has(a iommu.Address) *DomainDevice {
	if i := slices.IndexFunc(d.Devices, func(x DomainDevice) bool { return x.Address == a }); i >= 0 {
		return &d.Devices[i]
	}
	return nil
}

// mismatch says how a domain does not have exactly what is assigned to it, or has what it must not.
func (d *Domain) mismatch(l *Lease, all []*Lease, quarantined func(iommu.Address) string) []string {
	var out []string
	for _, x := range d.Devices {
		if why := quarantined(x.Address); why != "" {
			out = append(out, fmt.Sprintf("%s is in quarantine: %s", x.Address, why))
		}
		for _, other := range all {
			if other.Guest != d.Name && other.Has(x.Address) {
				out = append(out, fmt.Sprintf("%s is assigned to guest %q", x.Address, other.Guest))
			}
		}
	}

	if l == nil {
		return out
	}
	for _, dev := range l.Devices {
		x := d.has(dev.Address)
		switch want, vlan := dev.Now[sriov.MAC], dev.Now[sriov.VLAN]; {
		case x == nil && l.Moving == Incoming:
			// It is plugged when the domain runs here.
		case x == nil:
			out = append(
				out,
				fmt.Sprintf(
					"%s is assigned to it and missing in its XML (viaduct assign %s --from %s --format libvirt prints "+
						"what belongs there)",
					dev.Address,
					d.Name,
					l.DrawnFrom(),
				),
			)
		case x.Managed:
			out = append(out, fmt.Sprintf("%s has managed='yes', so libvirt would change its driver: set "+
				"managed='no'", dev.Address))
		case x.MAC != "" && dev.Wanted[sriov.MAC] != "" && want != "" && x.MAC != want:
			out = append(out,
				fmt.Sprintf("%s has MAC address %s in the XML, and %s in its lease", dev.Address, x.MAC, want))
		case x.MAC != "" && vlan != "" && vlan != "0" && x.VLAN != vlan:
			out = append(out, fmt.Sprintf("%s has VLAN %q in the XML, and %s in its lease", dev.Address, x.VLAN, vlan))
		}
	}
	return out
}

// Hook does what libvirt's hook is for (docs/hooks.rst of libvirt): before a domain starts its devices are checked,
// configured and taken, or its start fails; when it has stopped, extra says why (migrated, e.g.), they are scrubbed. It
// never calls libvirt.
func (m *Manager) Hook(ctx context.Context, d *Domain, op, sub, extra string) ([]Certificate, error) {
	switch op + " " + sub {
	case "migrate begin":
		_, err := m.match(d)
		return nil, err
	case "prepare begin":
		return nil, m.prepare(ctx, d)
	case "start begin":
		// What comes from a network is known by now.
		return nil, m.claim(ctx, d)
	case "started begin":
		_, err := m.Look()
		return nil, err
	case "release end":
		return m.stopped(ctx, d, extra)
	case "reconnect begin":
		// The domain runs, whatever the books say.
		_, _ = m.Look()
	}
	return nil, nil
}

func (m *Manager) prepare(ctx context.Context, d *Domain) error {
	l, err := m.match(d)
	if l == nil || err != nil || l.Moving == Incoming {
		// What a domain that comes is to have is as it must be while it comes.
		return err
	}
	return m.Again(ctx, d.Name)
}

// match is the lease of a domain that has exactly what is assigned to it; nil if nothing is.
func (m *Manager) match(d *Domain) (*Lease, error) {
	all, err1 := m.all()
	quarantined, err2 := m.quarantinedBy()
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	var l *Lease
	if i := slices.IndexFunc(all, func(l *Lease) bool { return l.Guest == d.Name }); i >= 0 {
		l = all[i]
	}
	if wrong := d.mismatch(l, all, quarantined); len(wrong) > 0 {
		refused := &holder.RefusedError{What: "start " + d.Name}
		for _, text := range wrong {
			refused.Reasons = append(refused.Reasons, holder.Reason{Kind: holder.Guest, Text: text})
		}
		return nil, refused
	}
	return l, nil
}

// quarantinedBy says of a device why it is in quarantine, "" if it is not.
func (m *Manager) quarantinedBy() (func(iommu.Address) string, error) {
	quarantine, err := m.Book.Quarantined()
	return func(a iommu.Address) string {
		found, err := m.Topology.Find(a)
		if err != nil {
			return ""
		}
		return quarantine.Why(m.host, found)
	}, err
}

// claim writes down what a domain drew from a network that was made of a pool.
func (m *Manager) claim(ctx context.Context, d *Domain) error {
	l, err := m.match(d)
	if err != nil {
		return err
	}
	var drawn []Source
	for _, x := range d.Devices {
		pool, err := m.poolOf(x.Address)
		switch {
		case err != nil:
			return err
		case pool == "" || l != nil && l.Has(x.Address):
		case x.Managed:
			return d.refuse(x.Address, "%s", managedByLibvirt(x.Address, pool))
		default:
			drawn = append(drawn, one(pool, x.Address))
		}
	}

	if len(drawn) == 0 {
		return nil
	}
	if l != nil {
		return d.refuse(drawn[0].exactly[0], "%s is of pool %q, and what is assigned to it is not all it has: it has "+
			"either a lease or what networks give it", drawn[0].exactly[0], drawn[0].From)
	}
	_, _, _, err = m.Assign(ctx, &Request{Guest: d.Name, Sources: drawn})
	return err
}

// one is a device of a pool that somebody else has drawn.
func one(pool string, device iommu.Address) Source {
	return Source{From: pool, Count: 1, exactly: []iommu.Address{device}}
}

// refuse refuses to start a domain for one of its devices.
func (d *Domain) refuse(device iommu.Address, format string, a ...any) error {
	why := holder.Reason{Kind: holder.Guest, Device: device.String(), Text: fmt.Sprintf(format, a...)}
	return holder.Because("start "+d.Name, why, "")
}

// stopped scrubs what a domain had, whose VMM has ended. A lease that outlives the boot waits for its next start,
// unless that is on another host; one of a move of viaduct's is the move's to end.
func (m *Manager) stopped(ctx context.Context, d *Domain, extra string) ([]Certificate, error) {
	l, err := m.Book.Get(d.Name)
	const wait = 20 * time.Second
	switch {
	case l == nil || err != nil || l.Moving != "":
		return nil, err
	case extra == "migrated":
		return m.Release(ctx, d.Name, wait)
	}
	return m.Rest(ctx, d.Name, wait)
}
