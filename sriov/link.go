package sriov

import (
	"context"
	"errors"
	"fmt"
	"path"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"viaduct/internal/host"
	"viaduct/iommu"
)

const netClass = "sys/class/net"

// Link is an interface of a PF that is brought up. Many drivers make VFs of a PF that is down, which then do not work.
type Link struct {
	Name    string `json:"name"`
	Index   int    `json:"index"`              // which it keeps when udev renames it
	GenMode *int   `json:"gen_mode,omitempty"` // how it makes its IPv6 addresses; nil without IPv6
}

// genModes are the kernel's modes (include/uapi/linux/if_link.h) in the words of ip.
var genModes = []string{"eui64", "none", "stable_secret", "random"}

const genNone = 1

// renames is how often an interface may change its name while it is looked at: udev names new ones.
const renames = 10

// byName looks at a PF's interfaces by their names, and again by their new ones if they were renamed meanwhile.
func byName(h *iommu.Host, pf *iommu.Device, look func(*iommu.Device) error) error {
	err := look(pf)
	for try := 0; host.Absent(err) && h.Live() && try < renames; try++ {
		now := *pf
		if now.Netdevs, err = iommu.Netdevs(h, pf.Address); err == nil {
			err = look(&now)
		}
	}
	return err
}

// linksDown are a PF's own interfaces that are down.
func linksDown(h *iommu.Host, pf *iommu.Device) ([]Link, error) {
	var out []Link
	err := byName(h, pf, func(pf *iommu.Device) (err error) {
		out, err = readLinksDown(h, pf)
		return err
	})
	return out, err
}

func readLinksDown(h *iommu.Host, pf *iommu.Device) ([]Link, error) {
	var out []Link
	for _, n := range ownInterfaces(h, pf) {
		text, err := h.String(path.Join(netClass, n, "flags"))
		if host.Absent(err) && !h.Live() {
			continue // not captured
		}
		if err != nil {
			return nil, err
		}
		index, err := h.Int(path.Join(netClass, n, "ifindex"))
		if err != nil && h.Live() { // nobody needs it of a captured host
			return nil, err
		}
		flags, err := strconv.ParseUint(text, 0, 32)
		if err != nil {
			return nil, fmt.Errorf("/%s: %w", path.Join(netClass, n, "flags"), err)
		}
		if flags&unix.IFF_UP != 0 {
			continue
		}
		l := Link{Name: n, Index: index}
		if mode, err := h.Int(path.Join("proc/sys/net/ipv6/conf", n, "addr_gen_mode")); err == nil && mode != genNone {
			l.GenMode = &mode
		}
		out = append(out, l)
	}
	return out, nil
}

// ownInterfaces are a PF's interfaces but for the representors of its VFs, whose phys_port_name is like pf0vf1.
func ownInterfaces(h *iommu.Host, pf *iommu.Device) []string {
	var out []string
	for _, n := range pf.Netdevs {
		port, err := h.String(path.Join(netClass, n, "phys_port_name"))
		if err != nil || !strings.Contains(port, "pf") {
			out = append(out, n)
		}
	}
	return out
}

func (l Link) commands() []string {
	set := "ip link set dev " + l.Name + " "
	if l.GenMode == nil || *l.GenMode < 0 || *l.GenMode >= len(genModes) {
		return []string{set + "up"}
	}
	return []string{set + "addrgenmode none", set + "up", set + "addrgenmode " + genModes[*l.GenMode]}
}

// up brings the interface up without giving it an address; settle has to follow.
func (l Link) up() error {
	link, err := netlink.LinkByIndex(l.Index)
	if err != nil {
		return fmt.Errorf("interface %s: %w", l.Name, err)
	}
	if l.GenMode != nil {
		if err := netlink.LinkSetIP6AddrGenMode(link, genNone); err != nil {
			return fmt.Errorf("interface %s: turn off IPv6 addresses: %w", l.Name, err)
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring %s up: %w", l.Name, err)
	}
	return nil
}

// unlessGone passes over what can no longer be done to an interface, as it is no more: its driver was loaded anew.
func unlessGone(err error) error {
	if _, gone := errors.AsType[netlink.LinkNotFoundError](err); gone || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// carrier is how long an interface is waited for that may have no cable.
const carrier = 5 * time.Second

// settle puts back how the interface makes its addresses. The kernel makes one when the link is first there, which is waited
// for; after that, and over netlink, the old mode makes none any more.
func (l Link) settle(ctx context.Context) error {
	if l.GenMode == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, carrier)
	defer cancel()
	events := make(chan netlink.LinkUpdate)
	done := make(chan struct{})
	defer func() {
		close(done)
		go func() {
			for range events { // its sender must not hang
			}
		}()
	}()
	if err := netlink.LinkSubscribe(events, done); err != nil {
		return fmt.Errorf("watch network interfaces: %w", err)
	}
	link, err := netlink.LinkByIndex(l.Index)
	if err != nil {
		return fmt.Errorf("interface %s: %w", l.Name, err)
	}
	for there := link.Attrs().RawFlags&unix.IFF_RUNNING != 0; !there; {
		select {
		case e, ok := <-events:
			there = !ok || int(e.Index) == link.Attrs().Index && e.Flags&unix.IFF_RUNNING != 0
		case <-ctx.Done():
			there = true // without a cable there is no address either, until there is one
		}
	}
	return l.restore(link)
}

func (l Link) restore(link netlink.Link) error {
	if l.GenMode == nil {
		return nil
	}
	return netlink.LinkSetIP6AddrGenMode(link, *l.GenMode)
}

// down undoes up, whatever of it was done.
func (l Link) down() error {
	link, err := netlink.LinkByIndex(l.Index)
	if err != nil {
		return fmt.Errorf("interface %s: %w", l.Name, err)
	}
	if err := netlink.LinkSetDown(link); err != nil {
		return fmt.Errorf("bring %s down: %w", l.Name, err)
	}
	return l.restore(link)
}

// MTU is the MTU of an interface of a PF that is raised: a VF's can be no larger.
type MTU struct {
	Name  string `json:"name"`
	Index int    `json:"index"`
	From  int    `json:"from"`
	To    int    `json:"to"`
}

// mtusBelow are a PF's own interfaces whose MTU is lower.
func mtusBelow(h *iommu.Host, pf *iommu.Device, mtu int) ([]MTU, error) {
	var out []MTU
	if mtu == 0 {
		return nil, nil
	}
	err := byName(h, pf, func(pf *iommu.Device) error {
		out = nil
		own := ownInterfaces(h, pf)
		if len(own) == 0 {
			return fmt.Errorf("%s has no network interface, and so no MTU", pf.Name)
		}
		for _, n := range own {
			now, err := h.Int(path.Join(netClass, n, "mtu"))
			if err != nil {
				return err
			}
			index, err := h.Int(path.Join(netClass, n, "ifindex"))
			if err != nil && h.Live() {
				return err
			}
			if now < mtu {
				out = append(out, MTU{n, index, now, mtu})
			}
		}
		return nil
	})
	return out, err
}

func (m MTU) set(mtu int) error {
	link, err := netlink.LinkByIndex(m.Index)
	if err == nil {
		err = netlink.LinkSetMTU(link, mtu)
	}
	if err == nil {
		link, err = netlink.LinkByIndex(m.Index)
	}
	if err != nil {
		return fmt.Errorf("set the MTU of %s to %d: %w", m.Name, mtu, err)
	}
	if is := link.Attrs().MTU; is != mtu {
		return fmt.Errorf("interface %s: MTU was set to %d and is %d", m.Name, mtu, is)
	}
	return nil
}
