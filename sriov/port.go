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
	permanent string           // its permanent MAC address, once it was asked for
	session   *nl.SocketHandle // for many settings, between open and close
}

// open has all settings up to close go over one socket.
func (p *Port) open() error {
	s, err := socket(unix.NETLINK_ROUTE)
	p.session = s
	return err
}

func (p *Port) close() {
	if p.session != nil {
		p.session.Socket.Close()
		p.session = nil
	}
}

// socket is one on which the kernel's own words come with its errnos.
func socket(protocol int) (*nl.SocketHandle, error) {
	s, err := nl.Subscribe(protocol)
	if err != nil {
		return nil, err
	}
	if err := s.SetExtAck(true); err != nil {
		s.Close()
		return nil, err
	}
	return &nl.SocketHandle{Socket: s}, nil
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
	var port *Port
	for _, n := range ownInterfaces(h, pf) {
		if !h.Live() {
			return &Port{PF: pf, Name: n}, nil
		}
		l, err := readLink(n, 0)
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
	l, err := readLink("", p.index)
	return &Port{PF: p.PF, Name: l.name, SwitchID: l.switchID, VFs: l.vfs, index: l.index}, err
}

// readLink asks for one interface, by name or by index, with its VFs: a dump of all has no room for many.
func readLink(name string, index int) (linkInfo, error) {
	ask := func(filter uint32) ([][]byte, error) {
		req := nl.NewNetlinkRequest(unix.RTM_GETLINK, 0)
		msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
		msg.Index = int32(index)
		req.AddData(msg)
		if index == 0 {
			req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
		}
		req.AddData(nl.NewRtAttr(unix.IFLA_EXT_MASK, nl.Uint32Attr(filter)))
		return req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
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
	if len(answer) == 0 {
		return linkInfo{}, unix.ENODEV
	}
	return decodeLink(answer[0])
}

// send makes one setting. The kernel's own words come with its errno where it has some.
func (p *Port) send(vf int, s Setting) error {
	kind, value := s.encode(vf)
	if p.session == nil {
		if err := p.open(); err != nil {
			return err
		}
		defer p.close()
	}
	req := nl.NewNetlinkRequest(unix.RTM_SETLINK, unix.NLM_F_ACK)
	req.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: p.session}
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(p.index) // not the name, which may change meanwhile
	req.AddData(msg)
	list := nl.NewRtAttr(unix.IFLA_VFINFO_LIST, nil)
	list.AddRtAttr(nl.IFLA_VF_INFO, nil).AddRtAttr(kind, value)
	req.AddData(list)
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}
