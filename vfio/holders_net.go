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
	vague  bool             // a default route names no interface
}

// netHolders finds what stands on the devices' network interfaces.
func netHolders(h *iommu.Host, devices []*iommu.Device) ([]Holder, error) {
	var out []Holder
	var n *network
	for _, d := range devices {
		if !d.PCI || !d.Blocks() {
			continue
		}
		if len(d.Netdevs) == 0 {
			if d.Class>>16 == 2 {
				found, err := inNamespace(h, d)
				if err != nil {
					return nil, err
				}
				out = append(out, found...)
			}
			continue
		}
		if n == nil {
			var err error
			if n, err = readNetwork(h); err != nil {
				return nil, err
			}
		}
		for _, name := range d.Netdevs {
			found, err := n.holders(h, d, name)
			if err != nil {
				return nil, err
			}
			out = append(out, found...)
		}
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
		if host.Absent(err) {
			continue
		}
		if err != nil {
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
		if !a.IP.IsLinkLocalUnicast() { // which the kernel gives every link that is up
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
	for _, peer := range peers {
		routes, err := netlink.RouteGet(peer)
		if err != nil {
			continue // no way back to it: the connection is dead already
		}
		for _, r := range routes {
			n.ssh[r.LinkIndex] = append(n.ssh[r.LinkIndex], peer.String())
		}
	}
	return n, nil
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

// inNamespace looks for the interfaces of a network device that shows none here: in the other network namespaces, of
// processes and under /run/netns.
func inNamespace(h *iommu.Host, d *iommu.Device) ([]Holder, error) {
	var out []Holder
	look := func(file, whose string) bool {
		links, err := linksIn(h.Path(file))
		for _, l := range links {
			if l.Attrs().ParentDev == d.Name {
				what := fmt.Sprintf("(%s) is in the network namespace of %s", l.Attrs().Name, whose)
				out = append(out, Holder{Device: d.Name, Kind: Namespace, What: what})
			}
		}
		return err == nil
	}
	names, err := h.Names("run/netns")
	if err != nil && !host.Absent(err) {
		return nil, err
	}
	for _, n := range names {
		look(path.Join("run/netns", n), n)
	}
	if len(out) > 0 {
		return out[:1], nil // processes in it would only say the same
	}
	err = namespaces(h, "net", func(pid string) bool {
		return look(path.Join("proc", pid, "ns/net"), fmt.Sprintf("process %s (%s)", pid, processName(h, pid)))
	})
	return out, err
}

func linksIn(file string) ([]netlink.Link, error) {
	ns, err := netns.GetFromPath(file)
	if err != nil {
		return nil, err
	}
	defer unix.Close(int(ns))
	there, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	defer there.Close()
	return there.LinkList()
}

// sshPeers are the other ends of the established connections that an ssh server has: of any user, through sudo, tmux and
// whatever else loses the environment variable that names it.
func sshPeers(h *iommu.Host) ([]net.IP, error) {
	peers := map[string]net.IP{} // by socket
	for _, file := range []string{"proc/self/net/tcp", "proc/self/net/tcp6"} {
		b, err := h.Read(file)
		if host.Absent(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		parseTCP(b, peers)
	}
	if len(peers) == 0 {
		return nil, nil
	}
	pids, err := processes(h)
	if err != nil {
		return nil, err
	}
	var out []net.IP
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
			inode, ok := strings.CutPrefix(target, "socket:[")
			if ip := peers[strings.TrimSuffix(inode, "]")]; ok && ip != nil && !slices.ContainsFunc(out, ip.Equal) {
				out = append(out, ip)
			}
		}
	}
	return out, nil
}

// parseTCP adds the peers of established connections in a /proc/net/tcp or tcp6, by their sockets' inodes
// (Documentation/networking/proc_net_tcp.rst).
func parseTCP(b []byte, peers map[string]net.IP) {
	for lines := bufio.NewScanner(bytes.NewReader(b)); lines.Scan(); {
		f := strings.Fields(lines.Text())
		if len(f) < 10 || f[3] != "01" {
			continue
		}
		address, _, _ := strings.Cut(f[2], ":")
		raw, err := hex.DecodeString(address)
		if err != nil || (len(raw) != 4 && len(raw) != 16) {
			continue
		}
		for i := 0; i < len(raw); i += 4 { // words in the machine's order
			binary.NativeEndian.PutUint32(raw[i:], binary.BigEndian.Uint32(raw[i:]))
		}
		if _, err := strconv.ParseUint(f[9], 10, 64); err == nil && f[9] != "0" {
			peers[f[9]] = net.IP(raw)
		}
	}
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
