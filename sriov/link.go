package sriov

import (
	"context"
	"fmt"
	"path"
	"strconv"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"viaduct/internal/host"
	"viaduct/internal/netlink"
	"viaduct/internal/shell"
	"viaduct/internal/uevent"
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
var genModes = [...]string{"eui64", "none", "stable_secret", "random"}

const genNone = 1

// linksDown are a PF's own interfaces that are down.
func linksDown(h *iommu.Host, pf *iommu.Device) ([]Link, error) {
	var out []Link
	err := iommu.ByName(h, pf, func(now *iommu.Device) (err error) {
		out, err = readLinksDown(h, now.Netdevs)
		return err
	})
	return out, err
}

func readLinksDown(h *iommu.Host, names []string) ([]Link, error) {
	var out []Link
	for _, n := range names {
		text, err := h.String(path.Join(netClass, n, "flags"))
		if host.Absent(err) && !h.Live() {
			// Not captured.
			continue
		}
		if err != nil {
			return nil, err
		}
		flags, err := strconv.ParseUint(text, 0, 32)
		if err != nil {
			return nil, fmt.Errorf("/%s: %w", path.Join(netClass, n, "flags"), err)
		}
		if flags&unix.IFF_UP != 0 {
			continue
		}
		index, err := indexOf(h, n)
		if err != nil {
			return nil, err
		}

		l := Link{Name: n, Index: index}
		mode, err := h.Int(path.Join("proc/sys/net/ipv6/conf", n, "addr_gen_mode"))
		if err != nil && !host.Absent(err) {
			return nil, err
		}
		if err == nil && mode != genNone {
			l.GenMode = &mode
		}
		out = append(out, l)
	}
	return out, nil
}

// indexOf is an interface's index. Nobody needs that of a captured host.
func indexOf(h *iommu.Host, name string) (int, error) {
	index, err := h.Int(path.Join(netClass, name, "ifindex"))
	if err != nil && !h.Live() {
		return 0, nil
	}
	return index, err
}

func (l Link) commands() []string {
	set := "ip link set dev " + shell.Quote(l.Name) + " "
	if l.GenMode == nil || *l.GenMode < 0 || *l.GenMode >= len(genModes) {
		return []string{set + "up"}
	}
	return []string{set + "addrgenmode none", set + "up", set + "addrgenmode " + genModes[*l.GenMode]}
}

// onLink does something with a socket for interfaces.
func onLink(h *iommu.Host, do func(*netlink.Conn) error) error {
	c, err := netlink.Dial(h.Host, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer c.Close()
	return do(c)
}

// up brings the interface up without giving it an address; settle has to follow.
func (l Link) up(h *iommu.Host) error {
	return onLink(h, func(c *netlink.Conn) error {
		if l.GenMode != nil {
			if err := c.SetGenMode(l.Index, genNone); err != nil {
				return fmt.Errorf("interface %s: turn off IPv6 addresses: %w", l.Name, err)
			}
		}
		if err := c.SetLink(l.Index, unix.IFF_UP, unix.IFF_UP); err != nil {
			return fmt.Errorf("bring %s up: %w", l.Name, err)
		}
		return nil
	})
}

// down undoes up, whatever of it was done.
func (l Link) down(h *iommu.Host) error {
	return onLink(h, func(c *netlink.Conn) error {
		if err := c.SetLink(l.Index, 0, unix.IFF_UP); err != nil {
			return fmt.Errorf("bring %s down: %w", l.Name, err)
		}
		return l.restoreGenMode(c)
	})
}

func (l Link) restoreGenMode(c *netlink.Conn) error {
	if l.GenMode == nil {
		return nil
	}
	if err := c.SetGenMode(l.Index, *l.GenMode); err != nil {
		return fmt.Errorf("interface %s: put back how it makes IPv6 addresses: %w", l.Name, err)
	}
	return nil
}

// unlessGone passes over what can no longer be done to an interface, as it is no more: its driver was loaded anew.
func unlessGone(err error) error {
	if netlink.Gone(err) {
		return nil
	}
	return err
}

// carrier is how long an interface is waited for that may have no cable.
const carrier = 5 * time.Second

// settle puts back how the interface makes its addresses. The kernel makes one when the link is first there, which is
// waited for; after that, and over netlink, the old mode makes none any more. Without a cable there is no address
// either, until there is one.
func (l Link) settle(ctx context.Context, h *iommu.Host) error {
	if l.GenMode == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, carrier)
	defer cancel()
	events, err := uevent.Open(h.Host)
	if err != nil {
		return err
	}
	defer events.Close()

	return onLink(h, func(c *netlink.Conn) error {
		for {
			now, err := c.LinkByIndex(l.Index)
			if err != nil {
				return fmt.Errorf("interface %s: %w", l.Name, err)
			}
			if now.Flags&unix.IFF_RUNNING != 0 || ctx.Err() != nil {
				return l.restoreGenMode(c)
			}
			events.Await(ctx, time.Second)
		}
	})
}

// settleAll settles what was brought up.
func settleAll(ctx context.Context, h *iommu.Host, up []Link) []error {
	var errs []error
	for _, l := range up {
		errs = append(errs, unlessGone(l.settle(ctx, h)))
	}
	return errs
}

// MTU is the MTU of an interface of a PF that is raised: a VF's can be no larger.
type MTU struct {
	Name  string `json:"name"`
	Index int    `json:"index"`
	From  int    `json:"from"`
	To    int    `json:"to"`
}

// mtusBelow are a PF's own interfaces whose MTU is lower; none if mtu is 0.
func mtusBelow(h *iommu.Host, pf *iommu.Device, mtu int) ([]MTU, error) {
	if mtu == 0 {
		return nil, nil
	}

	var out []MTU
	err := iommu.ByName(h, pf, func(now *iommu.Device) error {
		out = nil
		if len(now.Netdevs) == 0 {
			return fmt.Errorf("%w, so it has no MTU", noInterface(h, pf))
		}
		for _, n := range now.Netdevs {
			now, err := h.Int(path.Join(netClass, n, "mtu"))
			if err != nil {
				return err
			}
			index, err := indexOf(h, n)
			if err != nil {
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

func (m MTU) set(h *iommu.Host, mtu int) error {
	return onLink(h, func(c *netlink.Conn) error {
		err := c.SetLink(m.Index, 0, 0, nl.NewRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(mtu))))
		if err != nil {
			return fmt.Errorf("set the MTU of %s to %d: %w", m.Name, mtu, err)
		}
		now, err := c.LinkByIndex(m.Index)
		if err != nil {
			return fmt.Errorf("interface %s: %w", m.Name, err)
		}
		if now.MTU != mtu {
			return fmt.Errorf("interface %s: MTU was set to %d and is %d", m.Name, mtu, now.MTU)
		}
		return nil
	})
}
