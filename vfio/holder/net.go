package holder

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"viaduct/internal/host"
	"viaduct/internal/netlink"
	"viaduct/iommu"
)

const netClass = "sys/class/net"

// interfaces is what the kernel says of interfaces in one look, each by its index.
type interfaces struct {
	links  map[int]*netlink.Link
	addrs  map[int][]string // that somebody gave
	routes map[int][]string // that somebody made
	ssh    map[int][]string // peers
	others []elsewhere      // interfaces in other network namespaces
	vague  string           // a route that names no interface; "" if there is none
}

// elsewhere is an interface in another network namespace.
type elsewhere struct {
	*netlink.Link
	below bool // what it stands on, if it stands on something, is in this one
	whose string
}

// Elsewhere says, of a NIC that shows no network interface here, in which network namespace it has one, as in "(eth0)
// is in the network namespace of blue"; "" if that is not known.
func Elsewhere(h *iommu.Host, d *iommu.Device) (string, error) {
	look := netHolders
	if !h.Live() {
		look = func(h *iommu.Host, devices []*iommu.Device) ([]Holder, error) {
			return findCaptured(h, devices, Namespace)
		}
	}
	found, err := look(h, []*iommu.Device{d})
	if err != nil && !errors.Is(err, ErrBlind) {
		return "", err
	}
	for _, f := range found {
		if f.Kind == Namespace {
			return f.What, nil
		}
	}
	return "", nil
}

// anybodys reports whether the interface is a device's and the kernel does not say which one's.
func (o elsewhere) anybodys() bool {
	return o.Device == "" && o.Kind == "" && o.Flags&unix.IFF_LOOPBACK == 0
}

// netHolders finds what stands on the devices' network interfaces, in whichever namespace these are.
func netHolders(h *iommu.Host, devices []*iommu.Device) ([]Holder, error) {
	var out []Holder
	var n *interfaces
	var blind error
	for _, d := range devices {
		if !d.PCI || !d.Blocks() || len(d.Interfaces()) == 0 && !mayHaveInterfaces(d) {
			continue
		}
		if len(d.Interfaces()) == 0 {
			// Nobody has looked for them, or udev names them just now.
			now := *d
			if err := iommu.ReadNetdevs(h, &now); err != nil {
				return nil, err
			}
			d = &now
		}
		if n == nil {
			var err error
			if n, err = readInterfaces(h); errors.Is(err, ErrBlind) {
				blind = err
			} else if err != nil {
				return nil, err
			}
		}

		for _, o := range n.others {
			its, err := belongs(h, o.Link, d)
			if err != nil {
				return nil, err
			}
			if its {
				what := fmt.Sprintf("(%s) is in the network namespace of %s", o.Name, o.whose)
				out = append(out, Holder{Device: d.Name, Kind: Namespace, What: what})
			} else if o.anybodys() && len(d.Interfaces()) == 0 && d.Class>>16 == 2 {
				// Before Linux 5.14.
				blind = fmt.Errorf("%w: %s, in the network namespace of %s, may be an interface of %s: the kernel "+
					"does not say whose it is", ErrBlind, o.Name, o.whose, d.Name)
			}
		}
		var found []Holder
		err := iommu.ByName(h, d, func(now *iommu.Device) (err error) {
			found, err = n.ofDevice(h, d, now.Interfaces())
			return err
		})
		if err != nil {
			return nil, err
		}
		out = append(out, found...)
	}
	return out, blind
}

// mayHaveInterfaces reports whether a device's driver, or that of a USB device below it, may have made network
// interfaces, as far as the class tells.
func mayHaveInterfaces(d *iommu.Device) bool {
	switch base := d.Class >> 16; base {
	case 0x02, 0x0d, 0x12:
		// NICs, wireless ones, and accelerators, as cards with processors of their own call themselves.
		return true
	case 0x0c:
		// USB, and InfiniBand.
		sub := d.Class >> 8 & 0xff
		return sub == 0x03 || sub == 0x06
	}
	return false
}

func (n *interfaces) ofDevice(h *iommu.Host, d *iommu.Device, names []string) ([]Holder, error) {
	var out []Holder
	for _, name := range names {
		found, err := n.holders(h, d, name)
		if err != nil {
			return nil, err
		}
		out = append(out, found...)
	}
	return out, nil
}

// holders are those of one interface and of all that stands on it.
func (n *interfaces) holders(h *iommu.Host, d *iommu.Device, name string) ([]Holder, error) {
	stack, err := stackedOn(h, name)
	if err != nil {
		return nil, err
	}

	var out []Holder
	add := func(kind Kind, format string, a ...any) {
		what := "(" + name + ") " + fmt.Sprintf(format, a...)
		out = append(out, Holder{Device: d.Name, Kind: kind, What: what})
	}
	below := map[int]bool{}
	for _, top := range stack {
		index, err := h.Int(path.Join(netClass, top, "ifindex"))
		if err != nil {
			// Nobody knows who uses an interface that was just renamed, or is gone: what stands here is looked at
			// again.
			return nil, err
		}
		below[index] = true
		if top != name {
			add(Stacked, "is under %s%s", n.kindOf(index), top)
		}
		for _, a := range n.addrs[index] {
			add(Addressed, "has address %s%s", a, over(name, top))
		}
		for _, r := range n.routes[index] {
			add(Route, "carries %s%s", r, over(name, top))
		}
		for _, peer := range n.ssh[index] {
			add(SSH, "carries the ssh connection of %s%s", peer, over(name, top))
		}
	}
	if n.vague != "" {
		add(Route, "may carry %s, which does not name an interface", n.vague)
	}

	// Tunnels have no upper_ link, but name the interface they go over.
	for index, l := range n.links {
		if below[l.Over] && !below[index] && l.Elsewhere == nil {
			add(Stacked, "is under %s%s", n.kindOf(index), l.Name)
		}
	}
	for _, o := range n.others {
		if o.below && below[o.Over] {
			add(Stacked, "is under %s %s in the network namespace of %s", o.Kind, o.Name, o.whose)
		}
	}
	return out, nil
}

func (n *interfaces) kindOf(index int) string {
	if l := n.links[index]; l != nil && l.Kind != "" {
		return l.Kind + " "
	}
	return ""
}

func over(n, top string) string {
	if n == top {
		return ""
	}
	return " over " + top
}

// stackedOn is an interface and all that stand on it: bonds, bridges, VLANs, Open vSwitch, through any depth, by their
// upper_ links.
func stackedOn(h *iommu.Host, name string) ([]string, error) {
	out := []string{name}
	for i := 0; i < len(out); i++ {
		names, err := h.Names(path.Join(netClass, out[i]))
		if host.Absent(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, n := range names {
			if upper, ok := strings.CutPrefix(n, "upper_"); ok && !slices.Contains(out, upper) {
				out = append(out, upper)
			}
		}
	}
	return out, nil
}

// readInterfaces asks for all of them. With an ErrBlind it returns what could be seen.
func readInterfaces(h *iommu.Host) (*interfaces, error) {
	c, err := netlink.Dial(h.Host, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	defer c.Close()

	n := &interfaces{
		links: map[int]*netlink.Link{}, addrs: map[int][]string{}, routes: map[int][]string{}, ssh: map[int][]string{},
	}
	addrs, err := n.readHere(c)
	if err != nil {
		return nil, err
	}

	var blind error
	if err := n.readPeers(h, c, addrs); errors.Is(err, ErrBlind) {
		blind = err
	} else if err != nil {
		return nil, err
	}
	if n.others, err = linksElsewhere(h); err == nil || errors.Is(err, ErrBlind) {
		return n, errors.Join(blind, err)
	}
	return nil, err
}

// readHere asks for the links, addresses and routes of this network namespace.
func (n *interfaces) readHere(c *netlink.Conn) ([]netlink.Address, error) {
	links, err := c.Links()
	if err != nil {
		return nil, err
	}
	for _, l := range links {
		n.links[l.Index] = l
	}

	addrs, err := c.Addresses()
	if err != nil {
		return nil, err
	}
	for _, a := range addrs {
		// The kernel gives every link that is up a link-local address of IPv6.
		if a.IP.To4() != nil || !a.IP.IsLinkLocalUnicast() {
			n.addrs[a.Index] = append(n.addrs[a.Index], a.String())
		}
	}
	return addrs, n.readRoutes(c)
}

// defaultRoute is what the route to everywhere is called.
const defaultRoute = "the default route"

// readRoutes adds the routes that somebody made: not those that come with an address, or with every link that is up.
func (n *interfaces) readRoutes(c *netlink.Conn) error {
	routes, err := c.Routes()
	if err != nil {
		return err
	}

	for _, r := range routes {
		if r.Protocol == unix.RTPROT_KERNEL || r.Kind != unix.RTN_UNICAST {
			continue
		}
		text := defaultRoute
		if !r.Default() {
			text = "the route to " + r.To.String()
		}
		if len(r.Over) == 0 {
			// By a nexthop object only: it may be any interface's.
			if n.vague == "" || r.Default() {
				n.vague = text
			}
		}
		for _, index := range r.Over {
			n.routes[index] = append(n.routes[index], text)
		}
	}
	return nil
}

// linksElsewhere are the interfaces in all other network namespaces, of processes and under /run/netns.
func linksElsewhere(h *iommu.Host) ([]elsewhere, error) {
	own, err := h.Link("proc/self/ns/net")
	if host.Absent(err) {
		// A kernel without network namespaces (CONFIG_NET_NS) has those of other kinds, and no interface elsewhere.
		kinds, failed := h.Names("proc/self/ns")
		if failed == nil && len(kinds) > 0 && !slices.Contains(kinds, "net") {
			return nil, nil
		}
	}
	if err != nil {
		return nil, err
	}

	var out []elsewhere
	seen := map[string]bool{own: true}
	look := func(file, id, whose string) error {
		if seen[id] {
			return nil
		}
		links, err := linksIn(h, file, whose)
		if err == nil {
			seen[id] = true
		}
		out = append(out, links...)
		return err
	}

	named, err := names(h, "run/netns")
	if err != nil {
		return nil, err
	}
	var blind error
	for _, n := range named {
		file := path.Join("run/netns", n)
		id, err := namespaceID(h, file)
		if err == nil {
			err = look(file, id, n)
		}
		if err = unseen(file, err); errors.Is(err, ErrBlind) {
			blind = err
		} else if err != nil {
			return nil, err
		}
	}

	err = namespaces(h, "net", func(pid string) (bool, error) {
		file := path.Join("proc", pid, "ns/net")
		id, err := h.Link(file)
		if err == nil {
			err = look(file, id, fmt.Sprintf("process %s (%s)", pid, processName(h, pid)))
		}
		return err == nil, err
	})
	if err == nil {
		err = blind
	}
	return out, err
}

// namespaceID names the namespace that a file stands for as the links of /proc/PID/ns do.
func namespaceID(h *iommu.Host, file string) (string, error) {
	fd, err := h.OpenNode(file, unix.O_RDONLY)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)

	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return "", err
	}
	return fmt.Sprintf("net:[%d]", st.Ino), nil
}

// linksIn are the interfaces of a namespace.
func linksIn(h *iommu.Host, file, whose string) ([]elsewhere, error) {
	there, err := netlink.DialIn(h.Host, file, unix.NETLINK_ROUTE)
	if errors.Is(err, unix.EPERM) {
		return nil, fmt.Errorf("%w: /%s: %w", ErrBlind, file, fs.ErrPermission)
	}
	if err != nil {
		return nil, err
	}
	defer there.Close()
	links, err := there.Links()
	if err != nil {
		return nil, err
	}

	// What that namespace calls this one.
	here, known, err := there.Peer(unix.Getpid())
	if err != nil {
		return nil, err
	}
	var out []elsewhere
	for _, l := range links {
		out = append(out, elsewhere{l, known && l.Elsewhere != nil && *l.Elsewhere == here, whose})
	}
	return out, nil
}

// belongs reports whether a device's driver made an interface, be it by way of a device on another bus, as virtio's.
func belongs(h *iommu.Host, l *netlink.Link, d *iommu.Device) (bool, error) {
	if l.Device == "" || l.Device == d.Name {
		return l.Device != "", nil
	}
	target, err := h.Link(path.Join("sys/bus", l.Bus, "devices", l.Device))
	if host.Absent(err) {
		return false, nil
	}
	return slices.Contains(strings.Split(target, "/"), d.Name), err
}
