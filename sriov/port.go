package sriov

import (
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"viaduct/internal/netlink"
	"viaduct/iommu"
	"viaduct/vfio/holder"
)

// Port is a PF's own network interface, over which its VFs' settings go, with what its driver reports of each VF.
type Port struct {
	PF       *iommu.Device
	Name     string
	SwitchID string // of its e-switch; "" if it is no port of one
	VFs      []VFInfo
	Known    bool // its driver was asked for the VFs: false where a captured host does not tell of them

	host      *iommu.Host
	index     int
	permanent string // its permanent MAC address, once it was asked for
}

// ReadPort asks for a PF's own interface; nil for a PF that has none, as one of NVMe. Of a captured host it tells what
// [Capture] was told there, and where that is missing, nothing is known of the VFs.
func ReadPort(h *iommu.Host, pf *iommu.Device) (*Port, error) {
	var port *Port
	err := iommu.ByName(h, pf, func(now *iommu.Device) (err error) {
		port, err = readPort(h, pf, now.Netdevs)
		return err
	})
	return port, err
}

// portOf reads a PF as it is now, and its port.
func portOf(h *iommu.Host, pf iommu.Address) (*iommu.Device, *Port, error) {
	d, err := iommu.ReadDevice(h, pf)
	if err != nil {
		return nil, nil, err
	}
	if err := iommu.ReadNetdevs(h, &d); err != nil {
		return nil, nil, err
	}
	port, err := ReadPort(h, &d)
	return &d, port, err
}

func readPort(h *iommu.Host, pf *iommu.Device, own []string) (*Port, error) {
	switch {
	case len(own) == 0:
		return nil, nil
	case !h.Live():
		return capturedPortOf(h, pf, own)
	}
	c, err := netlink.Dial(h.Host, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	defer c.Close()

	var port *Port
	for _, n := range own {
		l, err := c.LinkWithVFs(n, 0)
		if err != nil {
			return nil, fmt.Errorf("interface %s: %w", n, err)
		}
		// A card with several ports a function has its VFs on one.
		if port == nil || len(l.VFs) > len(port.VFs) {
			port = portAt(h, pf, l)
		}
	}
	return port, nil
}

// portAt is the port that an interface is.
func portAt(h *iommu.Host, pf *iommu.Device, l *netlink.Link) *Port {
	return &Port{
		PF: pf, Name: l.Name, SwitchID: l.SwitchID, VFs: decodeVFs(l), Known: true, host: h, index: l.Index,
	}
}

// decodeVFs are the VFs that an interface tells of.
func decodeVFs(l *netlink.Link) []VFInfo {
	var out []VFInfo
	for _, b := range l.VFs {
		if vf, ok := decodeVF(b, len(l.Address)); ok {
			out = append(out, vf)
		}
	}
	return out
}

// Of is what is reported of a VF, false if nothing is: its driver does not tell, or the kernel could not.
func (p *Port) Of(index int) (VFInfo, bool) {
	if p != nil {
		for _, vf := range p.VFs {
			if vf.Index == index {
				return vf, true
			}
		}
	}
	return VFInfo{Settings: Settings{}}, false
}

// permanentMAC is what the addresses of VFs are derived from.
func (p *Port) permanentMAC() (string, error) {
	if p.permanent == "" {
		err := iommu.ByName(p.host, p.PF, func(now *iommu.Device) error {
			name, err := nameIn(now, p.Name)
			if err != nil {
				return err
			}
			mac, err := iommu.PermanentMAC(p.host, name)
			p.permanent = mac.String()
			return err
		})
		if err != nil {
			return "", err
		}
	}
	return p.permanent, nil
}

// nameIn is the name that one of a PF's own interfaces has now, which may have been renamed since it was looked at; of
// several only the one that is still called so is known.
func nameIn(pf *iommu.Device, name string) (string, error) {
	switch {
	case slices.Contains(pf.Netdevs, name):
		return name, nil
	case len(pf.Netdevs) == 1:
		return pf.Netdevs[0], nil
	}
	return "", fmt.Errorf("interface %s of %s: %w", name, pf.Name, unix.ENODEV)
}

// session is a Port for many settings, over one socket.
type session struct {
	*Port
	c *netlink.Conn
}

// open opens a session; the caller closes it. A Port without an interface has no socket.
func (p *Port) open() (*session, error) {
	if p.index == 0 {
		return &session{Port: p}, nil
	}
	c, err := netlink.Dial(p.host.Host, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	return &session{p, c}, nil
}

func (s *session) close() {
	if s.c != nil {
		s.c.Close()
	}
}

// again asks for the same interface, whatever its name is now.
func (s *session) again() (*Port, error) {
	if s.c == nil {
		return s.Port, nil
	}
	l, err := s.c.LinkWithVFs("", s.index)
	if err != nil {
		return nil, fmt.Errorf("interface %s: %w", s.Name, err)
	}
	return portAt(s.host, s.PF, l), nil
}

// NoInterfaceError says that a PF shows no network interface, over which its VFs' settings go.
type NoInterfaceError struct {
	PF  iommu.Address
	Why string

	elsewhere bool // in another network namespace
}

func (e *NoInterfaceError) Error() string {
	return fmt.Sprintf("%s has no network interface here: %s", e.PF, e.Why)
}

// noInterface is a NoInterfaceError with the reason, as far as that is known.
func noInterface(h *iommu.Host, pf *iommu.Device) error {
	e := &NoInterfaceError{PF: pf.Address}

	switch {
	case pf.Driver == "":
		e.Why = "it has no driver"
	case pf.VFIO:
		e.Why = "it is on " + pf.Driver
	case pf.Class>>16 != 0x02:
		e.Why = "it is not a NIC"
	default:
		where, err := holder.Elsewhere(h, pf)
		if err != nil {
			return err
		}
		if e.Why = "one " + where; where == "" {
			e.Why = "its driver " + pf.Driver + " has not made one"
		}
		e.elsewhere = where != ""
	}
	return e
}

// withoutInterface are drivers of NICs whose PFs have no network interface of their own
// (drivers/net/ethernet/cavium/thunder/nic_main.c, marvell/octeontx2/af/rvu.c), or not before they have VFs
// (chelsio/cxgb4/cxgb4_main.c).
var withoutInterface = []string{"thunder-nic", "octeontx2-af", "cxgb4"}

// CheckInterface is a *NoInterfaceError of a NIC whose driver is to have made a network interface, and that shows none.
func CheckInterface(h *iommu.Host, pf *iommu.Device) error {
	if pf.Class>>8 != 0x0200 || pf.VFIO || len(pf.Netdevs) > 0 || slices.Contains(withoutInterface, pf.Driver) ||
		!h.Live() && !h.Exists("sys/class/net") {
		return nil
	}
	if infiniband, err := iommu.HasInfiniBand(h, pf); err != nil || infiniband {
		return err
	}
	return noInterface(h, pf)
}

// ready refuses a NIC whose driver has not made its interface yet: its VFs would not work, or not be configured. One
// whose interface is elsewhere can have VFs, which is a note.
func (p *Plan) ready(h *iommu.Host) error {
	if !h.Live() && p.PF.Class>>8 == 0x0200 && !h.Exists("sys/class/net") {
		p.Notes = append(p.Notes, "the capture has no network interfaces of this host")
		return nil
	}
	none := CheckInterface(h, p.PF)
	if e, ok := errors.AsType[*NoInterfaceError](none); ok && e.elsewhere {
		p.Notes = append(p.Notes, e.Error()+", so viaduct does not bring it up")
		return nil
	}
	return none
}
