package vfio

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"viaduct/internal/host"
	"viaduct/iommu"
)

const netClass = "sys/class/net"

// network is what the kernel says of interfaces in one look.
type network struct {
	links  map[int]netlink.Link
	addrs  map[int][]string // that somebody gave, by interface
	routes map[int][]string // that somebody made
	ssh    map[int][]string // peers
	others []elsewhere      // interfaces in other network namespaces
	vague  bool             // a default route names no interface
}

// elsewhere is an interface in another network namespace.
type elsewhere struct {
	link  netlink.Link
	below bool // what it stands on, if it stands on something, is in this one
	whose string
}

// netHolders finds what stands on the devices' network interfaces, in whichever namespace these are.
func netHolders(h *iommu.Host, devices []*iommu.Device) ([]Holder, error) {
	var out []Holder
	var n *network
	for _, d := range devices {
		if !d.PCI || !d.Blocks() {
			continue
		}
		if len(d.Netdevs) == 0 && d.Class>>16 != 2 {
			continue
		}
		if n == nil {
			var err error
			if n, err = readNetwork(h); err != nil {
				return nil, err
			}
		}
		for _, o := range n.others {
			if belongs(h, o.link, d) {
				what := fmt.Sprintf("(%s) is in the network namespace of %s", o.link.Attrs().Name, o.whose)
				out = append(out, Holder{Device: d.Name, Kind: Namespace, What: what})
			}
		}
		found, err := n.ofDevice(h, d, d.Netdevs)
		for try := 0; host.Absent(err) && try < renames; try++ { // udev names new interfaces, just now maybe
			var names []string
			if names, err = iommu.Netdevs(h, d.Address); err == nil {
				found, err = n.ofDevice(h, d, names)
			}
		}
		if err != nil {
			return nil, err
		}
		out = append(out, found...)
	}
	return out, nil
}

// renames is how often an interface may change its name while it is looked at.
const renames = 10

func (n *network) ofDevice(h *iommu.Host, d *iommu.Device, names []string) ([]Holder, error) {
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
func (n *network) holders(h *iommu.Host, d *iommu.Device, name string) ([]Holder, error) {
	stack, err := stackedOn(h, name)
	if err != nil {
		return nil, err
	}
	var out []Holder
	add := func(kind Kind, format string, a ...any) {
		out = append(out, Holder{Device: d.Name, Kind: kind, What: "(" + name + ") " + fmt.Sprintf(format, a...)})
	}
	below := map[int]bool{}
	for _, top := range stack {
		index, err := h.Int(path.Join(netClass, top, "ifindex"))
		if host.Absent(err) && top != name {
			continue
		}
		if err != nil { // nobody knows who uses an interface that was just renamed
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
	if n.vague {
		add(Route, "may carry the default route, which names no interface")
	}
	for index, l := range n.links { // tunnels have no upper_ link, but name the interface they go over
		if below[l.Attrs().ParentIndex] && !below[index] && l.Attrs().NetNsID < 0 {
			add(Stacked, "is under %s%s", n.kindOf(index), l.Attrs().Name)
		}
	}
	for _, o := range n.others {
		if o.below && below[o.link.Attrs().ParentIndex] {
			add(Stacked, "is under %s %s in the network namespace of %s", o.link.Type(), o.link.Attrs().Name, o.whose)
		}
	}
	return out, nil
}

func (n *network) kindOf(index int) string {
	if l := n.links[index]; l != nil && l.Type() != "" && l.Type() != "device" {
		return l.Type() + " "
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

func readNetwork(h *iommu.Host) (*network, error) {
	n := &network{links: map[int]netlink.Link{}, addrs: map[int][]string{}, routes: map[int][]string{}, ssh: map[int][]string{}}
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list network interfaces: %w", err)
	}
	for _, l := range links {
		n.links[l.Attrs().Index] = l
	}
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addrs {
		if a.IP.To4() != nil || !a.IP.IsLinkLocalUnicast() { // which the kernel gives every link that is up
			n.addrs[a.LinkIndex] = append(n.addrs[a.LinkIndex], a.IPNet.String())
		}
	}
	routes, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	for _, r := range routes {
		if r.Protocol == unix.RTPROT_KERNEL || r.Type != unix.RTN_UNICAST { // made with an address, or for every link that is up
			continue
		}
		text := routeText(r)
		if r.LinkIndex == 0 && len(r.MultiPath) == 0 {
			n.vague = n.vague || text == defaultRoute // by a nexthop object only: it may be any interface's
			continue
		}
		if r.LinkIndex != 0 {
			n.routes[r.LinkIndex] = append(n.routes[r.LinkIndex], text)
		}
		for _, hop := range r.MultiPath {
			n.routes[hop.LinkIndex] = append(n.routes[hop.LinkIndex], text)
		}
	}
	peers, err := sshPeers(h)
	if err != nil {
		return nil, err
	}
	for _, c := range peers {
		for _, a := range addrs { // a link-local peer is behind the interface with the connection's own address, whatever the routes
			if c.peer.IsLinkLocalUnicast() && a.IP.Equal(c.local) {
				n.ssh[a.LinkIndex] = append(n.ssh[a.LinkIndex], c.peer.String())
			}
		}
		if c.peer.IsLinkLocalUnicast() {
			continue
		}
		routes, err := netlink.RouteGetWithOptions(c.peer, &netlink.RouteGetOptions{SrcAddr: c.local})
		if err != nil {
			continue // no way back to it: the connection is dead already
		}
		for _, r := range routes {
			n.ssh[r.LinkIndex] = append(n.ssh[r.LinkIndex], c.peer.String())
		}
	}
	n.others, err = linksElsewhere(h)
	return n, err
}

const defaultRoute = "the default route"

func routeText(r netlink.Route) string {
	if r.Dst == nil {
		return defaultRoute
	}
	if ones, _ := r.Dst.Mask.Size(); ones == 0 && r.Dst.IP.IsUnspecified() {
		return defaultRoute
	}
	return "the route to " + r.Dst.String()
}

// linksElsewhere are the interfaces in all other network namespaces, of processes and under /run/netns.
func linksElsewhere(h *iommu.Host) ([]elsewhere, error) {
	var out []elsewhere
	own, err := h.Link("proc/self/ns/net")
	if err != nil {
		return nil, err
	}
	seen := map[string]bool{}
	look := func(file, whose string) bool {
		links, err := linksIn(h.Path(file), own, whose, seen)
		out = append(out, links...)
		return err == nil
	}
	names, err := h.Names("run/netns")
	if err != nil && !host.Absent(err) {
		return nil, err
	}
	for _, n := range names {
		look(path.Join("run/netns", n), n)
	}
	err = namespaces(h, "net", func(pid string) bool {
		return look(path.Join("proc", pid, "ns/net"), fmt.Sprintf("process %s (%s)", pid, processName(h, pid)))
	})
	return out, err
}

// linksIn are the interfaces of a namespace that was not seen yet.
func linksIn(file, own, whose string, seen map[string]bool) ([]elsewhere, error) {
	ns, err := netns.GetFromPath(file)
	if err != nil {
		return nil, err
	}
	defer unix.Close(int(ns))
	var st unix.Stat_t
	if err := unix.Fstat(int(ns), &st); err != nil {
		return nil, err
	}
	id := fmt.Sprintf("net:[%d]", st.Ino)
	if id == own || seen[id] {
		return nil, nil
	}
	there, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	defer there.Close()
	links, err := there.LinkList()
	if err != nil {
		return nil, err
	}
	seen[id] = true
	here, err := there.GetNetNsIdByPid(unix.Getpid()) // what that namespace calls this one
	var out []elsewhere
	for _, l := range links {
		out = append(out, elsewhere{l, err == nil && here >= 0 && l.Attrs().NetNsID == here, whose})
	}
	return out, nil
}

// belongs reports whether a device's driver made an interface, be it by way of a device on another bus, as virtio's.
func belongs(h *iommu.Host, l netlink.Link, d *iommu.Device) bool {
	bus, name := l.Attrs().ParentDevBus, l.Attrs().ParentDev
	if name == "" || name == d.Name {
		return name != ""
	}
	target, err := h.Link(path.Join("sys/bus", bus, "devices", name))
	return err == nil && slices.Contains(strings.Split(target, "/"), d.Name)
}

// connection is one of TCP.
type connection struct{ local, peer net.IP }

// sshPeers are the established connections that an ssh server has: of any user, through sudo, tmux and whatever else loses the
// environment variable that names one.
func sshPeers(h *iommu.Host) ([]connection, error) {
	all := map[string]connection{} // by socket
	for _, file := range []string{"proc/self/net/tcp", "proc/self/net/tcp6"} {
		b, err := h.Read(file)
		if host.Absent(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		parseTCP(b, all)
	}
	if len(all) == 0 {
		return nil, nil
	}
	pids, err := processes(h)
	if err != nil {
		return nil, err
	}
	var out []connection
	for _, pid := range pids {
		if name := processName(h, pid); !strings.HasPrefix(name, "sshd") && name != "dropbear" {
			continue
		}
		fds, err := h.Names(path.Join("proc", pid, "fd"))
		if err != nil {
			continue
		}
		for _, fd := range fds {
			target, err := h.Link(path.Join("proc", pid, "fd", fd))
			if err != nil {
				continue
			}
			inode, _ := strings.CutPrefix(target, "socket:[")
			c, ok := all[strings.TrimSuffix(inode, "]")]
			known := slices.ContainsFunc(out, func(o connection) bool { return o.local.Equal(c.local) && o.peer.Equal(c.peer) })
			if ok && !known {
				out = append(out, c)
			}
		}
	}
	return out, nil
}

// parseTCP adds the established connections in a /proc/net/tcp or tcp6, by their sockets' inodes
// (Documentation/networking/proc_net_tcp.rst).
func parseTCP(b []byte, all map[string]connection) {
	for lines := bufio.NewScanner(bytes.NewReader(b)); lines.Scan(); {
		f := strings.Fields(lines.Text())
		if len(f) < 10 || f[3] != "01" || f[9] == "0" {
			continue
		}
		local, ok1 := parseIP(f[1])
		peer, ok2 := parseIP(f[2])
		if _, err := strconv.ParseUint(f[9], 10, 64); err == nil && ok1 && ok2 {
			all[f[9]] = connection{local, peer}
		}
	}
}

// parseIP reads ADDRESS:PORT, the address in words of the machine's order.
func parseIP(s string) (net.IP, bool) {
	address, _, _ := strings.Cut(s, ":")
	raw, err := hex.DecodeString(address)
	if err != nil || (len(raw) != 4 && len(raw) != 16) {
		return nil, false
	}
	for i := 0; i < len(raw); i += 4 {
		binary.NativeEndian.PutUint32(raw[i:], binary.BigEndian.Uint32(raw[i:]))
	}
	return net.IP(raw), true
}

// MACs are the [PermanentMACs] of a device's interfaces, also of those that udev has named since the device was looked at.
func MACs(h *iommu.Host, d *iommu.Device) map[string]string {
	out := PermanentMACs(h, d.Netdevs)
	if len(out) < len(d.Netdevs) && d.PCI {
		if now, err := iommu.ClassDevices(h, d.Address); err == nil {
			return PermanentMACs(h, now["net"])
		}
	}
	return out
}

// PermanentMACs are, by interface, the addresses that interfaces were made with, or those they have where the kernel does not know these.
func PermanentMACs(h *iommu.Host, names []string) map[string]string {
	out := map[string]string{}
	for _, n := range names {
		if mac, err := h.String(path.Join(netClass, n, "address")); err == nil {
			out[n] = mac
		}
		if !h.Live() {
			continue
		}
		if l, err := netlink.LinkByName(n); err == nil && len(l.Attrs().PermHWAddr) > 0 {
			out[n] = l.Attrs().PermHWAddr.String()
		}
	}
	return out
}
