package sriov

import (
	"errors"
	"fmt"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"viaduct/internal/host"
	"viaduct/internal/netlink"
	"viaduct/iommu"
)

// owners are the interfaces of this host that devices have, each with its VFs: what has a MAC address.
type owners []addressOwner

type addressOwner struct {
	*netlink.Link
	device string // that it is of
	vfs    []VFInfo
}

// readOwners finds them, if a wish has a MAC address that somebody could have: none has no address, or the one that
// stands for none.
func readOwners(h *iommu.Host, vfs []VFWish) (owners, error) {
	if !h.Live() || !anyVF(vfs, func(vf VFWish) bool { return isAddress(vf.Settings[MAC]) }) {
		return nil, nil
	}
	names, err := h.Names(netClass)
	if err != nil {
		return nil, err
	}
	c, err := netlink.Dial(h.Host, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	defer c.Close()

	var out owners
	for _, n := range names {
		device, err := h.LinkBase(path.Join(netClass, n, "device"))
		if host.Absent(err) || errors.Is(err, unix.ENOTDIR) {
			// Of no device.
			continue
		}
		if err != nil {
			return nil, err
		}
		l, err := c.LinkWithVFs(n, 0)
		if netlink.Gone(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("interface %s: %w", n, err)
		}
		out = append(out, addressOwner{l, device, decodeVFs(l)})
	}
	return out, nil
}

// isAddress reports whether a value of mac is one that only one may have, or stands for one.
func isAddress(mac string) bool { return strings.Trim(mac, "0:") != "" }

// unused refuses a MAC address that something else on this host has: a device's interface, or another VF.
func (o owners) unused(mac string, port *Port, vf *iommu.Device) error {
	if !isAddress(mac) {
		return nil
	}
	for _, l := range o {
		if l.device != vf.Name && l.Address.String() == mac {
			return fmt.Errorf("MAC address %s is that of %s already", mac, l.Name)
		}
		for _, other := range l.vfs {
			if other.Settings[MAC] == mac && (l.Index != port.index || other.Index != vf.VFIndex) {
				return fmt.Errorf("MAC address %s is that of vf%d of %s already", mac, other.Index, l.Name)
			}
		}
	}
	return nil
}
