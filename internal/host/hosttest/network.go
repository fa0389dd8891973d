package hosttest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

const sysNet = "sys/class/net"

// Network is what a Kernel answers netlink from, beside the interfaces that its files show.
type Network struct {
	Addresses []Address
	Routes    []Route
	Kinds     map[string]string // by interface: bond, vlan ...
	Over      map[string]string // by interface: the one it goes over, which no upper_ link tells of
	Permanent map[string]string // by interface: the address it was made with, if that is not the one it has
	// Alternative names of interfaces, and which these are.
	Alternative map[string]string

	Eswitch   map[string][3]int // by device: mode, inline mode and encapsulation mode of its e-switch
	Elsewhere map[string][]Elsewhere

	Unreported map[int]bool          // attributes of VFs (IFLA_VF_...) that the drivers do not report
	Refuse     map[int]syscall.Errno // attributes of VFs that they refuse to set
	Ignore     map[int]bool          // attributes of VFs that they report success for, and do not set
	Interrupt  int                   // so many dumps tell that what they tell of changed meanwhile
	Answer     func(request uint16, datagram []byte) []byte

	mu        sync.Mutex
	sockets   []int                           // this end of those that answer
	listeners []int                           // this end of those that are told of what changes
	vfs       map[string]map[int]map[int]vfAt // by PF, VF, and attribute: what was set
}

// vfAt is an attribute's payload without the VF's index in front.
type vfAt []byte

// Address is an address of an interface, as 192.0.2.1/24.
type Address struct{ Interface, CIDR string }

// Route is a route of the main table: to a network or "default", over interfaces.
type Route struct {
	To       string
	Over     []string
	Protocol uint8 // of who made it, as unix.RTPROT_KERNEL; 0 stands for unix.RTPROT_BOOT
}

// Elsewhere is an interface in another network namespace, by the file that stands for that.
type Elsewhere struct {
	Name, Device string
	Over         string // the interface here that it goes over, "" if none
}

// Numbers of include/uapi/linux/if_link.h that golang.org/x/sys/unix does not have.
const (
	vfInfo     = 1
	vfMAC      = 1
	vfVLAN     = 2
	vfSpoofChk = 4
	vfLink     = 5
	vfRate     = 6
	vfRSSQuery = 7
	vfStats    = 8
	vfTrust    = 9
	vfNodeGUID = 10
	vfPortGUID = 11
	vfVLANList = 12

	filterVF      = 1
	filterNoStats = 8
	genlDevlink   = 21
)

// ChangeNet changes what is answered while it may be asked for.
func (k *Kernel) ChangeNet(change func(*Network)) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.Net.mu.Lock()
	defer k.Net.mu.Unlock()
	change(&k.Net)
}

// startNet gives each interface what the kernel has of it and a captured tree may lack.
func (k *Kernel) startNet() {
	k.Net.vfs = map[string]map[int]map[int]vfAt{}
	for i, name := range k.names(sysNet) {
		dir := k.netDir(name)
		if dir == "" {
			continue
		}
		for file, content := range map[string]string{
			"ifindex": strconv.Itoa(i + 2), "flags": "0x1002", "mtu": "1500",
			"address": fmt.Sprintf("02:00:00:00:00:%02x", i),
		} {
			if !k.exists(path.Join(dir, file)) {
				k.put(path.Join(dir, file), content+"\n")
			}
		}

		if parent := k.parentOf(dir); parent != "" && !k.exists(path.Join(dir, "device")) {
			k.must(os.Symlink("../../../"+path.Base(parent), k.at(path.Join(dir, "device"))))
		}
		if mode := path.Join("proc/sys/net/ipv6/conf", name, "addr_gen_mode"); !k.exists(mode) {
			k.put(mode, "0\n")
		}
	}

	k.tb.Cleanup(func() {
		k.Net.mu.Lock()
		defer k.Net.mu.Unlock()
		for _, fd := range append(k.Net.sockets, k.Net.listeners...) {
			_ = unix.Shutdown(fd, unix.SHUT_RDWR)
		}
	})
}

// netDir is an interface's directory, "" if it is a file.
func (k *Kernel) netDir(name string) string {
	dir, err := k.resolve(path.Join(sysNet, name))
	if err != nil {
		return ""
	}
	if st, err := os.Stat(k.at(dir)); err != nil || !st.IsDir() {
		return ""
	}
	return dir
}

// Socket is one end of a pair whose other end answers as the kernel does. Each message is a datagram.
func (k *Kernel) Socket(family int, groups uint32, namespace string) (int, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	for _, fd := range pair {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 4<<20)
	}
	k.Net.mu.Lock()
	defer k.Net.mu.Unlock()
	if groups != 0 {
		k.Net.listeners = append(k.Net.listeners, pair[1])
		return pair[0], nil
	}
	k.Net.sockets = append(k.Net.sockets, pair[1])
	go k.serve(pair[1], family, namespace)
	return pair[0], nil
}

// tell tells all who listen that something changed.
func (k *Kernel) tell() {
	k.Net.mu.Lock()
	defer k.Net.mu.Unlock()
	for _, fd := range k.Net.listeners {
		_ = unix.Sendto(fd, []byte("change"), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, nil)
	}
}

// serve answers the requests on a socket until the other end is closed.
func (k *Kernel) serve(fd int, family int, namespace string) {
	defer func() {
		k.Net.mu.Lock()
		defer k.Net.mu.Unlock()
		k.Net.sockets = slices.DeleteFunc(k.Net.sockets, func(s int) bool { return s == fd })
		unix.Close(fd)
	}()
	b := make([]byte, 64<<10)
	for {
		n, _, err := unix.Recvfrom(fd, b, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n < unix.SizeofNlMsghdr {
			return
		}
		kind, flags := binary.NativeEndian.Uint16(b[4:]), binary.NativeEndian.Uint16(b[6:])
		c := &conversation{
			k:         k,
			kind:      kind,
			flags:     flags,
			sequence:  binary.NativeEndian.Uint32(b[8:]),
			namespace: namespace,
		}
		answers := c.fault()
		if answers == nil {
			answers = c.answer(family, b[unix.SizeofNlMsghdr:n])
		}

		for _, datagram := range answers {
			k.mu.Lock()
			change := k.Net.Answer
			k.mu.Unlock()
			if change != nil {
				datagram = change(kind, datagram)
			}
			if err := unix.Sendto(fd, datagram, unix.MSG_NOSIGNAL, nil); err != nil {
				return
			}
		}
	}
}

// conversation is a request and its answers.
type conversation struct {
	k           *Kernel
	kind, flags uint16
	sequence    uint32
	namespace   string
}

func (c *conversation) message(kind, flags uint16, payload []byte) []byte {
	b := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(payload)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = binary.NativeEndian.AppendUint16(b, flags)
	b = binary.NativeEndian.AppendUint32(b, c.sequence)
	b = append(binary.NativeEndian.AppendUint32(b, 0), payload...)
	return pad(b)
}

func (c *conversation) ack(err syscall.Errno) [][]byte {
	b := binary.NativeEndian.AppendUint32(nil, uint32(-int32(err)))
	return [][]byte{c.message(unix.NLMSG_ERROR, 0, append(b, make([]byte, unix.SizeofNlMsghdr)...))}
}

// fault is the answer to a request that is to fail, nil if it is not.
func (c *conversation) fault() [][]byte {
	err := c.k.Operation("message", strconv.Itoa(int(c.kind)))
	if err == nil {
		return nil
	}
	errno := syscall.EIO
	errors.As(err, &errno)
	return c.ack(errno)
}

// dump is the answer to a request for a list. The kernel tells in each message whether the list changed.
func (c *conversation) dump(kind uint16, payloads [][]byte) [][]byte {
	flags := uint16(unix.NLM_F_MULTI)
	c.k.Net.mu.Lock()
	if c.k.Net.Interrupt > 0 {
		c.k.Net.Interrupt--
		flags |= unix.NLM_F_DUMP_INTR
	}
	c.k.Net.mu.Unlock()
	var datagram []byte
	for _, p := range payloads {
		datagram = append(datagram, c.message(kind, flags, p)...)
	}
	return [][]byte{append(datagram, c.message(unix.NLMSG_DONE, flags, make([]byte, 4))...)}
}

func pad(b []byte) []byte { return append(b, make([]byte, (4-len(b)%4)%4)...) }

// attr packs an attribute. Its length has 16 bits, which a long list overflows, as in the kernel.
func attr(kind int, payload []byte) []byte {
	b := binary.NativeEndian.AppendUint16(nil, uint16(4+len(payload)))
	b = binary.NativeEndian.AppendUint16(b, uint16(kind))
	return pad(append(b, payload...))
}

func u32(n ...int) []byte {
	var b []byte
	for _, n := range n {
		b = binary.NativeEndian.AppendUint32(b, uint32(n))
	}
	return b
}

// attrs reads the attributes of a payload.
func attrs(b []byte, f func(kind int, value []byte)) {
	for len(b) >= 4 {
		n := int(binary.NativeEndian.Uint16(b))
		if n < 4 || n > len(b) {
			return
		}
		f(int(binary.NativeEndian.Uint16(b[2:])&0x3fff), b[4:n])
		b = b[min((n+3)&^3, len(b)):]
	}
}

func (c *conversation) answer(family int, payload []byte) [][]byte {
	k := c.k
	k.mu.Lock()
	defer k.mu.Unlock()
	isDump := c.flags&unix.NLM_F_DUMP == unix.NLM_F_DUMP
	switch {
	case family == unix.NETLINK_GENERIC:
		return c.generic(payload)
	case c.kind == unix.RTM_GETLINK && isDump:
		return c.dump(unix.RTM_NEWLINK, c.links(payload))
	case c.kind == unix.RTM_GETLINK:
		return c.getLink(payload)
	case c.kind == unix.RTM_SETLINK:
		return c.ack(c.setLink(payload))
	case c.kind == unix.RTM_GETADDR && isDump:
		return c.dump(unix.RTM_NEWADDR, c.addresses())
	case c.kind == unix.RTM_GETROUTE && isDump:
		return c.dump(unix.RTM_NEWROUTE, c.routes())
	case c.kind == unix.RTM_GETROUTE:
		return c.routeTo(payload)
	case c.kind == unix.RTM_GETNSID:
		return [][]byte{c.message(unix.RTM_NEWNSID, 0, append(make([]byte, 4), attr(unix.NETNSA_NSID, u32(0))...))}
	}
	return c.ack(syscall.EOPNOTSUPP)
}

// links are all interfaces, with their VFs if these are asked for; of another namespace those that are there.
func (c *conversation) links(payload []byte) [][]byte {
	var out [][]byte
	if c.namespace != "" {
		for i, e := range c.k.Net.Elsewhere[c.namespace] {
			b := append(make([]byte, unix.SizeofIfInfomsg), attr(unix.IFLA_IFNAME, append([]byte(e.Name), 0))...)
			binary.NativeEndian.PutUint32(b[4:], uint32(900+i))
			if e.Device != "" {
				b = append(b, attr(unix.IFLA_PARENT_DEV_NAME, append([]byte(e.Device), 0))...)
				b = append(b, attr(unix.IFLA_PARENT_DEV_BUS_NAME, append([]byte("pci"), 0))...)
			}
			if e.Over != "" {
				b = append(b, attr(unix.IFLA_LINK, u32(c.k.number(c.k.netDir(e.Over), "ifindex")))...)
				b = append(b, attr(unix.IFLA_LINK_NETNSID, u32(0))...)
			}
			out = append(out, b)
		}
		return out
	}

	_, mask := linkAsked(payload)
	for _, name := range c.k.names(sysNet) {
		if c.k.netDir(name) != "" {
			out = append(out, c.k.linkMessage(name, mask))
		}
	}
	return out
}

// linkAsked reads whose interface an RTM_GETLINK asks for, and what the answer is to hold beside it.
func linkAsked(payload []byte) (name string, mask int) {
	attrs(payload[min(unix.SizeofIfInfomsg, len(payload)):], func(kind int, v []byte) {
		switch kind {
		case unix.IFLA_IFNAME, unix.IFLA_ALT_IFNAME:
			name = unix.ByteSliceToString(v)
		case unix.IFLA_EXT_MASK:
			mask = int(binary.NativeEndian.Uint32(v))
		}
	})
	return name, mask
}

func (c *conversation) getLink(payload []byte) [][]byte {
	if len(payload) < unix.SizeofIfInfomsg {
		return c.ack(syscall.EINVAL)
	}
	name, mask := linkAsked(payload)
	if index := int(binary.NativeEndian.Uint32(payload[4:])); index != 0 {
		name = c.k.nameOf(index)
	}
	if first := c.k.Net.Alternative[name]; first != "" {
		name = first
	}
	if name == "" || strings.Contains(name, "/") || c.k.netDir(name) == "" {
		return c.ack(syscall.ENODEV)
	}
	return [][]byte{c.message(unix.RTM_NEWLINK, 0, c.k.linkMessage(name, mask))}
}

// nameOf is the name of an interface, "" if there is none with this index.
func (k *Kernel) nameOf(index int) string {
	for _, name := range k.names(sysNet) {
		if dir := k.netDir(name); dir != "" && k.number(dir, "ifindex") == index {
			return name
		}
	}
	return ""
}

// linkMessage is the payload of an RTM_NEWLINK, its attributes in the kernel's order.
func (k *Kernel) linkMessage(name string, mask int) []byte {
	dir := k.netDir(name)
	b := make([]byte, unix.SizeofIfInfomsg)
	binary.NativeEndian.PutUint32(b[4:], uint32(k.number(dir, "ifindex")))
	flags, _ := strconv.ParseUint(k.text(dir, "flags"), 0, 32)
	if flags&unix.IFF_UP != 0 {
		flags |= unix.IFF_RUNNING
	}
	binary.NativeEndian.PutUint32(b[8:], uint32(flags))
	add := func(kind int, payload []byte) { b = append(b, attr(kind, payload)...) }
	text := func(kind int, s string) {
		if s != "" {
			add(kind, append([]byte(s), 0))
		}
	}

	text(unix.IFLA_IFNAME, name)
	add(unix.IFLA_MTU, u32(k.number(dir, "mtu")))
	if over := k.Net.Over[name]; over != "" {
		add(unix.IFLA_LINK, u32(k.number(k.netDir(over), "ifindex")))
	}
	address, _ := net.ParseMAC(k.text(dir, "address"))
	add(unix.IFLA_ADDRESS, address)
	text(unix.IFLA_PHYS_PORT_NAME, k.text(dir, "phys_port_name"))
	if id := k.text(dir, "phys_switch_id"); id != "" {
		raw := make([]byte, len(id)/2)
		for i := range raw {
			n, _ := strconv.ParseUint(id[2*i:2*i+2], 16, 8)
			raw[i] = byte(n)
		}
		add(unix.IFLA_PHYS_SWITCH_ID, raw)
	}
	if device := k.parentOf(dir); device != "" && mask&filterVF != 0 {
		count := len(k.vfs(device))
		add(unix.IFLA_NUM_VF, u32(count))
		if count > 0 {
			add(unix.IFLA_VFINFO_LIST, k.vfList(device, count, mask))
		}
	}
	if kind := k.Net.Kinds[name]; kind != "" {
		add(unix.IFLA_LINKINFO, attr(unix.IFLA_INFO_KIND, append([]byte(kind), 0)))
	}
	var others []byte
	for other, first := range k.Net.Alternative {
		if first == name {
			others = append(others, attr(unix.IFLA_ALT_IFNAME, append([]byte(other), 0))...)
		}
	}
	if others != nil {
		add(unix.IFLA_PROP_LIST, others)
	}
	if mode, err := strconv.Atoi(k.text("proc/sys/net/ipv6/conf/"+name, "addr_gen_mode")); err == nil {
		add(unix.IFLA_AF_SPEC, attr(unix.AF_INET6, attr(unix.IFLA_INET6_ADDR_GEN_MODE, []byte{byte(mode)})))
	}
	if permanent, ok := k.Net.Permanent[name]; ok {
		if address, _ = net.ParseMAC(permanent); address == nil {
			return b
		}
	}
	add(unix.IFLA_PERM_ADDRESS, address)
	return b
}

// parentOf is the directory of the device that an interface is of, "" if it is of none.
func (k *Kernel) parentOf(dir string) string {
	if parent := path.Dir(path.Dir(dir)); path.Base(path.Dir(dir)) == "net" && k.exists(path.Join(parent, "vendor")) {
		return parent
	}
	return ""
}

// usual is what a VF begins with.
func usual() map[int]vfAt {
	return map[int]vfAt{
		vfMAC: make([]byte, 32), vfVLAN: u32(0, 0), vfVLANList: append(u32(0, 0), 0x81, 0, 0, 0), vfRate: u32(0, 0),
		vfSpoofChk: u32(1), vfLink: u32(0), vfRSSQuery: u32(0), vfTrust: u32(0),
	}
}

// vfList is the payload of an IFLA_VFINFO_LIST.
func (k *Kernel) vfList(device string, count, mask int) []byte {
	var out []byte
	for i := range count {
		all := usual()
		maps.Copy(all, k.Net.vfs[path.Base(device)][i])
		var one []byte
		for _, kind := range slices.Sorted(maps.Keys(all)) {
			if k.Net.Unreported[kind] {
				continue
			}
			value := append(u32(i), all[kind]...)
			if kind == vfVLANList {
				value = attr(1, value)
			}
			one = append(one, attr(kind, value)...)
		}

		if mask&filterNoStats == 0 {
			var stats []byte
			for n := range 9 {
				stats = append(stats, attr(n, binary.NativeEndian.AppendUint64(nil, uint64(1000*i+n)))...)
			}
			one = append(one, attr(vfStats, stats)...)
		}

		out = append(out, attr(vfInfo, one)...)
	}
	return out
}

// setLink is RTM_SETLINK.
func (c *conversation) setLink(payload []byte) syscall.Errno {
	k := c.k
	if len(payload) < unix.SizeofIfInfomsg {
		return syscall.EINVAL
	}
	name := k.nameOf(int(binary.NativeEndian.Uint32(payload[4:])))
	if name == "" {
		return syscall.ENODEV
	}
	dir := k.netDir(name)
	if change := binary.NativeEndian.Uint32(payload[12:]); change != 0 {
		flags, _ := strconv.ParseUint(k.text(dir, "flags"), 0, 32)
		flags = flags&^uint64(change) | uint64(binary.NativeEndian.Uint32(payload[8:])&change)
		k.put(path.Join(dir, "flags"), fmt.Sprintf("%#x\n", flags))
	}

	var errno syscall.Errno
	attrs(payload[unix.SizeofIfInfomsg:], func(kind int, v []byte) {
		switch kind {
		case unix.IFLA_MTU:
			k.put(path.Join(dir, "mtu"), fmt.Sprintf("%d\n", binary.NativeEndian.Uint32(v)))
		case unix.IFLA_AF_SPEC:
			attrs(v, func(_ int, v []byte) {
				attrs(v, func(_ int, v []byte) {
					k.put(path.Join("proc/sys/net/ipv6/conf", name, "addr_gen_mode"), fmt.Sprintf("%d\n", v[0]))
				})
			})
		case unix.IFLA_VFINFO_LIST:
			attrs(v, func(_ int, v []byte) { attrs(v, func(kind int, v []byte) { errno = k.setVF(dir, kind, v) }) })
		}
	})
	go k.tell()
	return errno
}

// setVF is do_setvfinfo of net/core/rtnetlink.c.
func (k *Kernel) setVF(dir string, kind int, v []byte) syscall.Errno {
	if errno := k.Net.Refuse[kind]; errno != 0 {
		return errno
	}
	device := k.parentOf(dir)
	if kind == vfVLANList {
		attrs(v, func(_ int, inner []byte) { v = inner })
	}
	if device == "" || len(v) < 4 || int(binary.NativeEndian.Uint32(v)) >= len(k.vfs(device)) {
		return syscall.EINVAL
	}

	if k.Net.Ignore[kind] {
		return 0
	}
	pf, index, value := path.Base(device), int(binary.NativeEndian.Uint32(v)), append(vfAt(nil), v[4:]...)
	if k.Net.vfs[pf] == nil {
		k.Net.vfs[pf] = map[int]map[int]vfAt{}
	}
	if k.Net.vfs[pf][index] == nil {
		k.Net.vfs[pf][index] = map[int]vfAt{}
	}

	k.Net.vfs[pf][index][kind] = value
	switch kind {
	case vfVLAN:
		// Of the protocol that VLANs begin with.
		k.Net.vfs[pf][index][vfVLANList] = append(append(vfAt(nil), value...), 0x81, 0, 0, 0)
	case vfVLANList:
		k.Net.vfs[pf][index][vfVLAN] = append(vfAt(nil), value[:8]...)
	}
	return 0
}

func (c *conversation) addresses() [][]byte {
	var out [][]byte
	for _, a := range c.k.Net.Addresses {
		ip, network, err := net.ParseCIDR(a.CIDR)
		c.k.must(err)
		ones, _ := network.Mask.Size()
		family, raw := unix.AF_INET6, []byte(ip)
		if v4 := ip.To4(); v4 != nil {
			family, raw = unix.AF_INET, v4
		}
		b := append([]byte{byte(family), byte(ones), 0, 0}, u32(c.k.number(c.k.netDir(a.Interface), "ifindex"))...)
		out = append(out, append(b, attr(unix.IFA_ADDRESS, raw)...))
	}
	return out
}

func (c *conversation) routes() [][]byte {
	var out [][]byte
	for _, r := range c.k.Net.Routes {
		out = append(out, c.k.routeMessage(r))
	}
	return out
}

func (k *Kernel) routeMessage(r Route) []byte {
	b := make([]byte, unix.SizeofRtMsg)
	b[0], b[4], b[5], b[7] = unix.AF_INET, unix.RT_TABLE_MAIN, unix.RTPROT_BOOT, unix.RTN_UNICAST
	if r.Protocol != 0 {
		b[5] = r.Protocol
	}
	if r.To != "default" {
		_, network, err := net.ParseCIDR(r.To)
		k.must(err)
		ones, _ := network.Mask.Size()
		b[1] = byte(ones)
		b = append(b, attr(unix.RTA_DST, network.IP)...)
	}

	index := func(name string) int { return k.number(k.netDir(name), "ifindex") }
	if len(r.Over) == 1 {
		return append(b, attr(unix.RTA_OIF, u32(index(r.Over[0])))...)
	}
	var hops []byte
	for _, name := range r.Over {
		hops = append(hops, append([]byte{8, 0, 0, 0}, u32(index(name))...)...)
	}
	if len(hops) > 0 {
		b = append(b, attr(unix.RTA_MULTIPATH, hops)...)
	}
	return b
}

// routeTo finds the first route that leads to an address.
func (c *conversation) routeTo(payload []byte) [][]byte {
	var to net.IP
	if len(payload) >= unix.SizeofRtMsg {
		attrs(payload[unix.SizeofRtMsg:], func(kind int, v []byte) {
			if kind == unix.RTA_DST {
				to = net.IP(v)
			}
		})
	}
	for _, r := range c.k.Net.Routes {
		if r.To != "default" {
			if _, network, _ := net.ParseCIDR(r.To); !network.Contains(to) {
				continue
			}
		}
		return [][]byte{c.message(unix.RTM_NEWROUTE, 0, c.k.routeMessage(r))}
	}
	return c.ack(syscall.ENETUNREACH)
}

// generic answers for devlink alone.
func (c *conversation) generic(payload []byte) [][]byte {
	if len(payload) < 4 {
		return c.ack(syscall.EINVAL)
	}
	texts := map[int]string{}
	var set [3]int
	var has [3]bool
	attrs(payload[4:], func(kind int, v []byte) {
		texts[kind] = unix.ByteSliceToString(v)
		for i, a := range []int{25, 26, 62} {
			// DEVLINK_ATTR_ESWITCH_MODE, ..._INLINE_MODE, ..._ENCAP_MODE.
			if kind == a && len(v) > 0 {
				set[i], has[i] = int(v[0]), true
			}
		}
	})

	if c.kind == unix.GENL_ID_CTRL {
		if c.k.Net.Eswitch == nil || texts[unix.CTRL_ATTR_FAMILY_NAME] != "devlink" {
			return c.ack(syscall.ENOENT)
		}
		b := append(make([]byte, 4), attr(unix.CTRL_ATTR_FAMILY_ID, []byte{genlDevlink, 0})...)
		return [][]byte{c.message(unix.GENL_ID_CTRL, 0, b)}
	}

	now, known := c.k.Net.Eswitch[texts[2]]
	if !known {
		return c.ack(syscall.ENODEV)
	}
	switch payload[0] {
	case 29:
		// DEVLINK_CMD_ESWITCH_GET.
		b := append(make([]byte, 4), attr(25, []byte{byte(now[0]), 0})...)
		b = append(append(b, attr(26, []byte{byte(now[1])})...), attr(62, []byte{byte(now[2])})...)
		return append([][]byte{c.message(genlDevlink, 0, b)}, c.ack(0)...)
	case 30:
		// DEVLINK_CMD_ESWITCH_SET.
		for i := range now {
			if has[i] {
				now[i] = set[i]
			}
		}
		c.k.Net.Eswitch[texts[2]] = now
		return c.ack(0)
	}
	return c.ack(syscall.EOPNOTSUPP)
}

// forgetVFs is for VFs that are no more.
func (k *Kernel) forgetVFs(pf string) { delete(k.Net.vfs, path.Base(pf)) }
