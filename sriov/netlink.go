package sriov

import (
	"bytes"
	"errors"
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"viaduct/iommu"
)

// VF settings go through the PF's network interface: rtnetlink's IFLA_VFINFO_LIST (include/uapi/linux/if_link.h).

// pfLink is the PF's own interface. A PF in switchdev mode also carries the VFs' representors; only its own has VFs.
func pfLink(pf *iommu.Device) (netlink.Link, error) {
	if len(pf.Netdevs) == 0 {
		return nil, fmt.Errorf("%s has no network interface, so its VFs have no MAC address to set", pf.Name)
	}
	var first netlink.Link
	for _, n := range pf.Netdevs {
		l, err := netlink.LinkByName(n)
		if err != nil {
			return nil, fmt.Errorf("interface %s: %w", n, err)
		}
		if len(l.Attrs().Vfs) > 0 {
			return l, nil
		}
		if first == nil {
			first = l
		}
	}
	return first, nil
}

// MACs are the MAC addresses of a PF's VFs by index, as the PF's driver reports them; empty for a PF without a network
// interface.
func MACs(pf *iommu.Device) (map[int]net.HardwareAddr, error) {
	out := map[int]net.HardwareAddr{}
	if len(pf.Netdevs) == 0 {
		return out, nil
	}
	l, err := pfLink(pf)
	if err != nil {
		return nil, err
	}
	for _, vf := range l.Attrs().Vfs {
		out[vf.ID] = vf.Mac
	}
	return out, nil
}

// SetMAC sets the MAC address of a PF's VF and reads it back. A VF's driver sees it when it binds next.
func SetMAC(pf *iommu.Device, index int, mac net.HardwareAddr) error {
	l, err := pfLink(pf)
	if err != nil {
		return err
	}
	if err := netlink.LinkSetVfHardwareAddr(l, index, mac); err != nil {
		if errors.Is(err, unix.EOPNOTSUPP) {
			return fmt.Errorf("driver %s cannot set the MAC address of a VF: %w", pf.Driver, err)
		}
		return fmt.Errorf("set MAC address %s of VF %d over %s: %w", mac, index, l.Attrs().Name, err)
	}
	now, err := MACs(pf)
	if err != nil {
		return err
	}
	if !bytes.Equal(now[index], mac) {
		return fmt.Errorf("VF %d of %s: MAC address %s was set, and the driver reports %s", index, pf.Name, mac, now[index])
	}
	return nil
}
