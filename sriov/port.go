package sriov

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"viaduct/iommu"
	"viaduct/vfio"
)

// Port is a PF's own network interface, over which its VFs' settings go, with what its driver reports of each VF.
type Port struct {
	PF       *iommu.Device
	Name     string
	SwitchID string // of its e-switch; "" if it is no port of one
	VFs      []VFInfo

	index     int
	permanent string  // its permanent MAC address, once it was asked for
	session   *kernel // for many settings, between open and close
}

// open has all requests up to close go over one socket.
func (p *Port) open() (err error) {
	p.session, err = dial(unix.NETLINK_ROUTE)
	return err
}

func (p *Port) close() {
	p.session.close()
	p.session = nil
}

// permanentMAC is what the addresses of VFs are derived from.
func (p *Port) permanentMAC(h *iommu.Host) string {
	if p.permanent == "" {
		p.permanent = vfio.PermanentMACs(h, []string{p.Name})[p.Name]
	}
	return p.permanent
}

// ReadPort asks for a PF's own interface; nil for a PF that has none, as one of NVMe. On a captured host nobody can be asked,
// and nothing is known of the VFs.
func ReadPort(h *iommu.Host, pf *iommu.Device) (*Port, error) {
	var port *Port
	err := byName(h, pf, func(pf *iommu.Device) (err error) {
		port, err = readPort(h, pf)
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
	if d.Netdevs, err = iommu.Netdevs(h, pf); err != nil {
		return nil, nil, err
	}
	port, err := ReadPort(h, &d)
	return &d, port, err
}

func readPort(h *iommu.Host, pf *iommu.Device) (*Port, error) {
	own := ownInterfaces(h, pf)
	switch {
	case len(own) == 0:
		return nil, nil
	case !h.Live():
		return &Port{PF: pf, Name: own[0]}, nil
	}
	k, err := dial(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	defer k.close()
	var port *Port
	for _, n := range own {
		l, err := k.link(n, 0)
		if err != nil {
			return nil, fmt.Errorf("interface %s: %w", n, err)
		}
		if port == nil || len(l.vfs) > len(port.VFs) { // a card with several ports a function has its VFs on one
			port = &Port{PF: pf, Name: l.name, SwitchID: l.switchID, VFs: l.vfs, index: l.index}
		}
	}
	return port, nil
}

// Of is what is reported of a VF, false if nothing is.
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

// again asks for the same interface, whatever its name is now.
func (p *Port) again() (*Port, error) {
	if p.index == 0 {
		return p, nil
	}
	if p.session == nil {
		if err := p.open(); err != nil {
			return nil, err
		}
		defer p.close()
	}
	l, err := p.session.link("", p.index)
	return &Port{PF: p.PF, Name: l.name, SwitchID: l.switchID, VFs: l.vfs, index: l.index}, err
}

// link asks for one interface, by name or by index, with its VFs: a dump of all has no room for many.
func (k *kernel) link(name string, index int) (linkInfo, error) {
	ask := func(filter uint32) ([]byte, error) {
		req := nl.NewNetlinkRequest(unix.RTM_GETLINK, 0)
		msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
		msg.Index = int32(index)
		req.AddData(msg)
		if index == 0 {
			req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
		}
		req.AddData(nl.NewRtAttr(unix.IFLA_EXT_MASK, nl.Uint32Attr(filter)))
		return k.ask(req)
	}
	const withoutStats = 1 << 3 // RTEXT_FILTER_SKIP_STATS
	answer, err := ask(nl.RTEXT_FILTER_VF)
	for _, less := range []uint32{nl.RTEXT_FILTER_VF | withoutStats, 0} {
		if errors.Is(err, unix.EMSGSIZE) || errors.Is(err, unix.EINVAL) { // more VFs than an attribute, or a message, of 64 KiB holds
			answer, err = ask(less)
		}
	}
	if err != nil {
		return linkInfo{}, err
	}
	return decodeLink(answer)
}

// send makes one setting.
func (p *Port) send(vf int, s Setting) error {
	if p.session == nil {
		if err := p.open(); err != nil {
			return err
		}
		defer p.close()
	}
	kind, value := s.encode(vf)
	req := nl.NewNetlinkRequest(unix.RTM_SETLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(p.index) // not the name, which may change meanwhile
	req.AddData(msg)
	list := nl.NewRtAttr(unix.IFLA_VFINFO_LIST, nil)
	list.AddRtAttr(nl.IFLA_VF_INFO, nil).AddRtAttr(kind, value)
	req.AddData(list)
	_, err := p.session.ask(req)
	return err
}
