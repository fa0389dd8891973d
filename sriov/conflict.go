package sriov

import (
	"errors"
	"fmt"
	"path"
	"slices"
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
	has := func(vf VFWish) bool {
		return slices.ContainsFunc(unique, func(k Key) bool { return isAddress(vf.Settings[k]) })
	}
	if !h.Live() || !anyVF(vfs, has) {
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

// unique are the settings that no two VFs of a network may have alike.
var unique = []Key{MAC, NodeGUID, PortGUID}

// isAddress reports whether a value of one of these is one that only one may have, or stands for one.
func isAddress(mac string) bool { return strings.Trim(mac, "0:") != "" }

// unused refuses an address that something else on this host has: a device's interface, or another VF.
func (o owners) unused(want Settings, port *Port, vf *iommu.Device) error {
	for _, k := range unique {
		address := want[k]
		if !isAddress(address) {
			continue
		}
		for _, l := range o {
			its := l.Address.String() == address || k != MAC && strings.HasSuffix(l.Address.String(), ":"+address)
			if its && l.device != vf.Name {
				return fmt.Errorf("%s %s already belongs to %s", addressNames[k], address, l.Name)
			}
			for _, other := range l.vfs {
				if other.Settings[k] == address && (l.Index != port.index || other.Index != vf.VFIndex) {
					return fmt.Errorf("%s %s already belongs to vf%d of %s", addressNames[k], address, other.Index,
						l.Name)
				}
			}
		}
	}
	return nil
}

var addressNames = map[Key]string{MAC: "MAC address", NodeGUID: "node GUID", PortGUID: "port GUID"}
