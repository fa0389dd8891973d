package netlink

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"viaduct/internal/host"
	"viaduct/internal/host/hosttest"
)

// pf is the igb of the captured lab host, which has an interface.
const (
	pf    = "0000:01:00.0"
	nic   = "enp1s0"
	other = "enp2s0"
)

func dial(t *testing.T, k *hosttest.Kernel, family int) *Conn {
	t.Helper()
	c, err := Dial(k.Host(), family)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func makeVFs(t *testing.T, k *hosttest.Kernel, n int) {
	t.Helper()
	dir := "sys/bus/pci/devices/" + pf
	for file, value := range map[string]string{"sriov_totalvfs": fmt.Sprintln(n), "sriov_offset": "32768\n",
		"sriov_stride": "1\n"} {
		if err := os.WriteFile(k.Dir()+"/"+dir+"/"+file, []byte(value), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(k.Write(dir+"/sriov_drivers_autoprobe", "0"), k.Write(dir+"/sriov_numvfs",
		fmt.Sprint(n))); err != nil {
		t.Fatal(err)
	}
}

// The VFs of a link are told in a list whose length has 16 bits. It is read to its end all the same, whatever it says
// of itself.
func TestManyVFs(t *testing.T) {
	for _, n := range []int{1, 7, 100, 256, 600} {
		k := hosttest.NewLab(t, nil)
		makeVFs(t, k, n)
		c := dial(t, k, unix.NETLINK_ROUTE)
		l, err := c.LinkWithVFs(nic, 0)
		if err != nil {
			t.Fatal(err)
		}
		if l.NumVF != n || len(l.VFs) != n || !l.VFStatistics {
			t.Errorf("%d VFs: told of %d, %d of them, with counters %v", n, l.NumVF, len(l.VFs), l.VFStatistics)
		}
		for i, vf := range l.VFs {
			Attributes(vf, func(kind uint16, v []byte) {
				if kind == nl.IFLA_VF_MAC && int(native.Uint32(v)) != i {
					t.Fatalf("of %d VFs, vf%d is told where vf%d is to be", n, native.Uint32(v), i)
				}
			})
		}
		if len(l.Permanent) != 6 { // what follows the list is read too
			t.Errorf("%d VFs: the interface has no permanent address", n)
		}
	}
}

// A message that was cut is asked for again with less: VFs without counters, and at last no VFs, of which nothing is
// known then.
func TestCutVFs(t *testing.T) {
	for _, cut := range []struct {
		longest int // message that comes whole
		vfs     int
		number  int
	}{{1 << 20, 7, 7}, {1500, 7, 7}, {1000, 0, -1}} {
		k := hosttest.NewLab(t, nil)
		makeVFs(t, k, 7)
		k.Net.Answer = func(_ uint16, b []byte) []byte {
			if len(b) > cut.longest {
				return b[:cut.longest]
			}
			return b
		}
		l, err := dial(t, k, unix.NETLINK_ROUTE).LinkWithVFs(nic, 0)
		if err != nil {
			t.Fatal(err)
		}
		if l.NumVF != cut.number || len(l.VFs) != cut.vfs || l.VFStatistics != (cut.longest == 1<<20) {
			t.Errorf("cut at %d: %d VFs, told %d, counters %v", cut.longest, l.NumVF, len(l.VFs), l.VFStatistics)
		}
	}
}

// Where no VFs are wanted the kernel is not asked for them: of many it would tell more than a list has room for, and
// a driver asks its firmware for each.
func TestNoVFsAskedFor(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	makeVFs(t, k, 256)
	var longest atomic.Int64
	k.Net.Answer = func(_ uint16, b []byte) []byte {
		longest.Store(max(longest.Load(), int64(len(b))))
		return b
	}
	c := dial(t, k, unix.NETLINK_ROUTE)
	all, err1 := c.Links()
	one, err2 := c.LinkByName(nic)
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	again, err1 := c.LinkByIndex(one.Index)
	permanent, err2 := Permanent(k.Host(), []string{nic})
	if err := errors.Join(err1, err2); err != nil || len(permanent) != 1 {
		t.Fatal(permanent, err)
	}
	for _, l := range append(all, one, again) {
		if l.NumVF != 0 || len(l.VFs) != 0 {
			t.Errorf("%s: told of %d VFs, %d of them", l.Name, l.NumVF, len(l.VFs))
		}
	}
	if n := longest.Load(); n == 0 || n > 4<<10 {
		t.Errorf("an answer without VFs has %d bytes", n)
	}
}

// A list of VFs that is shorter than the kernel says, or that it has no room for, is asked for again without counters;
// what is short then too says so.
func TestShortVFs(t *testing.T) {
	shorten := func(longest int) func(uint16, []byte) []byte {
		return func(_ uint16, b []byte) []byte {
			if len(b) > longest {
				b = b[:longest]
				native.PutUint32(b, uint32(longest)) // a whole message, whose list ends early
			}
			return b
		}
	}
	for what, c := range map[string]struct {
		longest, vfs int
		full         bool
	}{"without counters": {1500, 7, false}, "never": {1000, 0, false}, "no room": {1 << 20, 7, true}} {
		k := hosttest.NewLab(t, nil)
		makeVFs(t, k, 7)
		k.Net.Answer = shorten(c.longest)
		if c.full {
			k.FailAt(0, func(op, _ string) bool { return op == "message" }, unix.EMSGSIZE)
		}
		l, err := dial(t, k, unix.NETLINK_ROUTE).LinkWithVFs(nic, 0)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if l.NumVF != 7 || len(l.VFs) != c.vfs || l.VFStatistics != (c.vfs == 0) {
			t.Errorf("%s: %d VFs, told %d, counters %v", what, l.NumVF, len(l.VFs), l.VFStatistics)
		}
	}
}

// An answer that does not come is not waited for without end.
func TestNoAnswer(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	never := make(chan struct{})
	defer close(never)
	c := dial(t, k, unix.NETLINK_ROUTE)
	limit, err := unix.GetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO)
	if err != nil || limit.Nano() != patience.Nanoseconds() {
		t.Fatalf("it waits for %v, %v", limit, err)
	}
	soon := unix.NsecToTimeval(50 * 1e6)
	if err := unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &soon); err != nil {
		t.Fatal(err)
	}
	k.ChangeNet(func(n *hosttest.Network) {
		n.Answer = func(_ uint16, b []byte) []byte {
			<-never
			return b
		}
	})
	if _, err := c.LinkByName(nic); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("one interface: %v", err)
	}
	if _, err := c.Links(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a list: %v", err)
	}
}

// A message that is longer than there was room for is read whole.
func TestLongMessage(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	c := dial(t, k, unix.NETLINK_ROUTE)
	all, err := c.Links()
	if err != nil {
		t.Fatal(err)
	}
	c.room = nil
	hook := func(kind uint16, b []byte) []byte {
		return append(slices.Clip(b), answer(0, 0, make([]byte, 100<<10))...)
	}
	k.ChangeNet(func(n *hosttest.Network) { n.Answer = hook })
	if links, err := c.Links(); err != nil || len(links) != len(all) || len(c.room) < 100<<10 {
		t.Errorf("%d of %d links, %v, room for %d", len(links), len(all), err, len(c.room))
	}
	if l, err := c.LinkByName(nic); err != nil || l.Name != nic {
		t.Errorf("%+v, %v", l, err)
	}
}

// A dump whose subject changed while it was told is told again, however often; and not for ever.
func TestInterruptedDump(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	k.Net.Addresses = []hosttest.Address{
		{Interface: nic, CIDR: "192.0.2.1/24"},
		{Interface: other, CIDR: "2001:db8::1/64"},
	}
	c := dial(t, k, unix.NETLINK_ROUTE)
	k.ChangeNet(func(n *hosttest.Network) { n.Interrupt = 77 })
	got, err := c.Addresses()
	if err != nil || len(got) != 2 || got[0].String() != "192.0.2.1/24" || got[1].String() != "2001:db8::1/64" {
		t.Errorf("%v, %v", got, err)
	}
	left := 0
	k.ChangeNet(func(n *hosttest.Network) { left = n.Interrupt })
	if left != 0 {
		t.Errorf("%d answers were not asked for again", left)
	}
	k.ChangeNet(func(n *hosttest.Network) { n.Interrupt = 1 << 30 })
	if got, err := c.Addresses(); !errors.Is(err, errInterrupted) || got != nil {
		t.Errorf("what changes all the time: %v, %v", got, err)
	}
}

// An answer that ends in the middle, or is none, is an error, and never a short list.
func TestCutDump(t *testing.T) {
	for n := 0; n < 200; n += 5 {
		k := hosttest.NewLab(t, nil)
		c := dial(t, k, unix.NETLINK_ROUTE)
		all, err := c.Links()
		if err != nil {
			t.Fatal(err)
		}
		var uncut atomic.Bool
		hook := func(_ uint16, b []byte) []byte {
			at := min(7*n+1, len(b))
			if at < len(b) && isBoundary(b, at) {
				at-- // or it would not be cut, but one of several
			}
			uncut.Store(at == len(b))
			return b[:at]
		}
		k.ChangeNet(func(n *hosttest.Network) { n.Answer = hook })
		links, err := c.Links()
		whole := uncut.Load()
		if err == nil && len(links) != len(all) || whole != (err == nil) || err != nil && !errors.Is(err, ErrCut) {
			t.Fatalf("cut at %d: %d of %d links, %v", 7*n+1, len(links), len(all), err)
		}
		if whole {
			return
		}
	}
}

func TestLinks(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	k.Net.Kinds = map[string]string{other: "bond"}
	k.Net.Over = map[string]string{other: nic}
	k.Net.Permanent = map[string]string{nic: "02:00:00:00:00:99", other: ""}
	c := dial(t, k, unix.NETLINK_ROUTE)
	links, err := c.Links()
	if err != nil {
		t.Fatal(err)
	}

	byName := map[string]*Link{}
	for _, l := range links {
		byName[l.Name] = l
	}

	if l := byName[nic]; l == nil || l.Permanent.String() != "02:00:00:00:00:99" || l.MTU != 1500 || len(l.VFs) != 0 {
		t.Errorf("%+v", l)
	}
	if l := byName[other]; l == nil || l.Kind != "bond" || l.Over != byName[nic].Index || l.Permanent != nil {
		t.Errorf("%+v", l)
	}
	if l, err := c.LinkByIndex(byName[nic].Index); err != nil || l.Name != nic {
		t.Errorf("by its index: %+v, %v", l, err)
	}
	if _, err := c.LinkByName("not-there"); !Gone(err) {
		t.Errorf("an interface that is not there: %v", err)
	}

	permanent, err := Permanent(k.Host(), []string{nic, "not-there", other})
	if err != nil || len(permanent) != 1 || permanent[nic].String() != "02:00:00:00:00:99" {
		t.Errorf("permanent addresses: %v, %v", permanent, err)
	}
}

func TestSet(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	makeVFs(t, k, 2)
	c := dial(t, k, unix.NETLINK_ROUTE)
	l, err := c.LinkByName(nic)
	if err != nil {
		t.Fatal(err)
	}
	mtu := nl.NewRtAttr(unix.IFLA_MTU, nl.Uint32Attr(9000))
	mac := append([]byte{1, 0, 0, 0, 2, 3, 4, 5, 6, 7}, make([]byte, 26)...)
	if err := errors.Join(c.SetLink(l.Index, unix.IFF_UP, unix.IFF_UP, mtu), c.SetGenMode(l.Index, 1),
		c.SetVF(l.Index, nl.IFLA_VF_MAC, mac)); err != nil {
		t.Fatal(err)
	}
	now, err := c.LinkWithVFs("", l.Index)
	if err != nil || now.MTU != 9000 || now.Flags&unix.IFF_UP == 0 || now.GenMode == nil || *now.GenMode != 1 {
		t.Errorf("%+v, %v", now, err)
	}
	if !bytes.Contains(now.VFs[1], mac) || bytes.Contains(now.VFs[0], mac[4:10]) {
		t.Errorf("VFs %x", now.VFs)
	}
	k.ChangeNet(func(n *hosttest.Network) { n.Refuse = map[int]unix.Errno{nl.IFLA_VF_MAC: unix.EPERM} })
	if err := c.SetVF(l.Index, nl.IFLA_VF_MAC, mac); !errors.Is(err, unix.EPERM) {
		t.Errorf("refused: %v", err)
	}
	if err := c.SetVF(1<<20, nl.IFLA_VF_MAC, mac); !Gone(err) {
		t.Errorf("an interface that is gone: %v", err)
	}
}

func TestRoutes(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	k.Net.Routes = []hosttest.Route{
		{
			To:       "192.0.2.0/24",
			Over:     []string{nic},
			Protocol: unix.RTPROT_KERNEL,
		}, {To: "default", Over: []string{other, nic}},
	}

	c := dial(t, k, unix.NETLINK_ROUTE)
	one, _ := c.LinkByName(nic)
	two, _ := c.LinkByName(other)
	routes, err := c.Routes()
	if err != nil || len(routes) != 2 {
		t.Fatalf("%+v, %v", routes, err)
	}

	if r := routes[0]; r.Default() || r.To.String() != "192.0.2.0/24" || !slices.Equal(r.Over, []int{one.Index}) ||
		r.Protocol != unix.RTPROT_KERNEL {
		t.Errorf("%+v", r)
	}

	if r := routes[1]; !r.Default() || !slices.Equal(r.Over, []int{two.Index, one.Index}) ||
		r.Kind != unix.RTN_UNICAST {
		t.Errorf("%+v", r)
	}

	if over, err := c.RouteTo(net.ParseIP("192.0.2.7"), nil); err != nil || !slices.Equal(over, []int{one.Index}) {
		t.Errorf("over %v, %v", over, err)
	}

	k.ChangeNet(func(n *hosttest.Network) { n.Routes = nil })
	if over, err := c.RouteTo(net.ParseIP("192.0.2.7"), net.ParseIP("192.0.2.1")); !errors.Is(err, unix.ENETUNREACH) {
		t.Errorf("over %v, %v", over, err)
	}
	if id, ok, err := c.Peer(1); err != nil || !ok || id != 0 {
		t.Errorf("the namespace of process 1 is %d, %v", id, ok)
	}
}

func TestGeneric(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	if _, err := DialGeneric(k.Host(), "devlink", 1); !errors.Is(err, unix.ENOENT) {
		t.Errorf("a kernel without devlink: %v", err)
	}
	k.ChangeNet(func(n *hosttest.Network) { n.Eswitch = map[string][3]int{pf: {1, 0, 0}} })
	g, err := DialGeneric(k.Host(), "devlink", 1)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	ask := func(device string) ([]byte, error) {
		return g.Ask(nl.DEVLINK_CMD_ESWITCH_GET, nl.NewRtAttr(nl.DEVLINK_ATTR_DEV_NAME, nl.ZeroTerminated(device)))
	}
	for range 2 { // its acknowledgement is not the answer to the next
		b, err := ask(pf)
		mode := -1
		Attributes(b, func(kind uint16, v []byte) {
			if kind == nl.DEVLINK_ATTR_ESWITCH_MODE {
				mode = int(v[0])
			}
		})
		if err != nil || mode != 1 {
			t.Errorf("mode %d, %v", mode, err)
		}
	}
	if b, err := ask("0000:7f:00.0"); !errors.Is(err, unix.ENODEV) || len(b) != 0 {
		t.Errorf("%x, %v", b, err)
	}
}

// What cannot be asked is an error, and never an empty answer.
func TestLooksThatFail(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	makeVFs(t, k, 2)
	k.Net.Addresses = []hosttest.Address{{Interface: nic, CIDR: "192.0.2.1/24"}}
	k.Net.Routes = []hosttest.Route{{To: "default", Over: []string{nic}}}
	k.Net.Eswitch = map[string][3]int{pf: {1, 0, 0}}
	with := func(look func(c *Conn) (any, error)) func() (any, error) {
		return func() (any, error) {
			c, err := Dial(k.Host(), unix.NETLINK_ROUTE)
			if err != nil {
				return nil, err
			}
			defer c.Close()
			return look(c)
		}
	}
	none := func(err error) (any, error) { return nil, err }
	for what, look := range map[string]func() (any, error){
		"LinkByName":   with(func(c *Conn) (any, error) { return c.LinkByName(nic) }),
		"LinkByIndex":  with(func(c *Conn) (any, error) { return c.LinkByIndex(2) }),
		"Peer":         with(func(c *Conn) (any, error) { id, _, err := c.Peer(1); return id, err }),
		"SetLink":      with(func(c *Conn) (any, error) { return none(c.SetLink(2, unix.IFF_UP, unix.IFF_UP)) }),
		"SetGenMode":   with(func(c *Conn) (any, error) { return none(c.SetGenMode(2, 0)) }),
		"Links":        with(func(c *Conn) (any, error) { return c.Links() }),
		"LinkWithVFs":  with(func(c *Conn) (any, error) { return c.LinkWithVFs(nic, 0) }),
		"Addresses":    with(func(c *Conn) (any, error) { return c.Addresses() }),
		"Routes":       with(func(c *Conn) (any, error) { return c.Routes() }),
		"RouteTo":      with(func(c *Conn) (any, error) { return c.RouteTo(net.ParseIP("192.0.2.7"), nil) }),
		"Permanent":    func() (any, error) { return Permanent(k.Host(), []string{nic, other}) },
		"Alternatives": func() (any, error) { return Alternatives(k.Host()) },
		"FirstName":    func() (any, error) { return FirstName(k.Host(), nic) },
		"DialGeneric": func() (any, error) {
			g, err := DialGeneric(k.Host(), "devlink", 1)
			if err != nil {
				return nil, err
			}
			defer g.Close()
			return g.Ask(nl.DEVLINK_CMD_ESWITCH_GET, nl.NewRtAttr(nl.DEVLINK_ATTR_DEV_NAME, nl.ZeroTerminated(pf)))
		},
	} {
		if strings.HasPrefix(what, "Set") {
			_, err := look()
			if err != nil {
				t.Errorf("%s: %v", what, err)
			}
		} else {
			hosttest.EachFailure(t, k, what, look)
		}

		cut := func(_ uint16, b []byte) []byte { return b[:7] }
		k.ChangeNet(func(n *hosttest.Network) { n.Answer = cut })
		if got, err := look(); !errors.Is(err, ErrCut) {
			t.Errorf("%s of a cut answer: %v, %v", what, got, err)
		}
		k.ChangeNet(func(n *hosttest.Network) { n.Answer = nil })
		k.SetFault(func(op, _ string) error {
			if strings.HasPrefix(op, "message") {
				return unix.EBUSY
			}
			return nil
		})
		if got, err := look(); !errors.Is(err, unix.EBUSY) {
			t.Errorf("%s that is refused: %v, %v", what, got, err)
		}
		k.Revive()

		if isList := slices.Contains([]string{"Links", "Addresses", "Routes", "Alternatives"}, what); isList {
			// One datagram has all of it, its end too.
			continue
		}
		empty := func(kind uint16, b []byte) []byte {
			if kind < unix.NLMSG_MIN_TYPE {
				return b
			}
			native.PutUint32(b, unix.SizeofNlMsghdr)
			return b[:unix.SizeofNlMsghdr]
		}
		k.ChangeNet(func(n *hosttest.Network) { n.Answer = empty })
		if got, err := look(); !errors.Is(err, ErrCut) && !strings.HasPrefix(what, "Set") {
			t.Errorf("%s of an answer that says nothing: %v, %v", what, got, err)
		}
		k.ChangeNet(func(n *hosttest.Network) { n.Answer = nil })
	}
}

// answer is a netlink message as the kernel sends it.
func answer(kind uint16, sequence uint32, payload []byte) []byte {
	b := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(payload)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = binary.NativeEndian.AppendUint16(b, 0)
	b = binary.NativeEndian.AppendUint32(b, sequence)
	return append(binary.NativeEndian.AppendUint32(b, 0), payload...)
}

func TestDecodeMessage(t *testing.T) {
	words := append([]byte{13, 0, unix.NLMSGERR_ATTR_MSG, 0}, "no way!\x00\x00\x00\x00\x00"...)
	errno := -int32(unix.EPERM)
	refused := append(binary.NativeEndian.AppendUint32(nil, uint32(errno)), make([]byte, unix.SizeofNlMsghdr)...)
	m, rest, err := decodeMessage(append(answer(unix.NLMSG_ERROR, 7, append(refused, words...)), 1, 2, 3))
	if err != nil || m.kind != unix.NLMSG_ERROR || m.sequence != 7 || len(rest) != 3 {
		t.Fatalf("%+v, %v, %v", m, rest, err)
	}
	if err := decodeAck(m.payload); !errors.Is(err, unix.EPERM) || !strings.HasSuffix(err.Error(), ": no way!") {
		t.Errorf("an error with words: %v", err)
	}
	if err := decodeAck(refused); !errors.Is(err, unix.EPERM) {
		t.Errorf("an error without words: %v", err)
	}
	if err := decodeAck(make([]byte, 20)); err != nil {
		t.Errorf("success: %v", err)
	}
	if err := decodeAck(nil); !errors.Is(err, ErrCut) {
		t.Errorf("an acknowledgement without an errno: %v", err)
	}
	if err := decodeDone(refused); !errors.Is(err, unix.EPERM) {
		t.Errorf("a dump that the kernel ends: %v", err)
	}
	if err := errors.Join(decodeDone(nil), decodeDone(make([]byte, 4))); err != nil {
		t.Errorf("a dump that ends: %v", err)
	}

	for _, length := range []uint32{0, 15, 17} {
		b := answer(unix.RTM_NEWLINK, 7, nil)
		binary.NativeEndian.PutUint32(b, length)
		if _, _, err := decodeMessage(b); !errors.Is(err, ErrCut) {
			t.Errorf("16 bytes that say they are %d: %v", length, err)
		}
	}
}

// Each attribute of an interface goes where it belongs, and one that is cut off is none.
func TestDecodeLink(t *testing.T) {
	number := binary.NativeEndian.AppendUint32(nil, 7)
	list := nl.NewRtAttr(unix.IFLA_PROP_LIST, nil)
	list.AddRtAttr(unix.IFLA_ALT_IFNAME, nl.ZeroTerminated("one"))
	list.AddRtAttr(unix.IFLA_ALT_IFNAME, nl.ZeroTerminated("two"))
	list.AddRtAttr(99, nl.ZeroTerminated("three"))
	b := make([]byte, unix.SizeofIfInfomsg)
	b[4], b[8] = 5, unix.IFF_UP
	for _, a := range []*nl.RtAttr{
		nl.NewRtAttr(unix.IFLA_LINK_NETNSID, number),
		nl.NewRtAttr(unix.IFLA_PHYS_SWITCH_ID, []byte{0xde, 0xad}),
		nl.NewRtAttr(unix.IFLA_PHYS_PORT_NAME, nl.ZeroTerminated("pf0vf1")),
		nl.NewRtAttr(unix.IFLA_PERM_ADDRESS, []byte{2, 0, 0, 0, 0, 1}),
		nl.NewRtAttr(unix.IFLA_LINK, number),
		nl.NewRtAttr(unix.IFLA_MTU, number[:2]),
		list,
	} {
		b = append(b, a.Serialize()...)
	}

	l, err := DecodeLink(b)
	if err != nil || l.Index != 5 || l.Flags != unix.IFF_UP || l.Elsewhere == nil || *l.Elsewhere != 7 || l.Over != 7 ||
		l.SwitchID != "dead" || l.PortName != "pf0vf1" || l.Permanent.String() != "02:00:00:00:00:01" || l.MTU != 0 ||
		!slices.Equal(l.Alternative, []string{"one", "two"}) {
		t.Errorf("%+v, %v", l, err)
	}

	if l, err := DecodeLink(b[:unix.SizeofIfInfomsg-1]); !errors.Is(err, ErrCut) {
		t.Errorf("a cut header: %+v, %v", l, err)
	}
	if a, ok := decodeAddress(make([]byte, unix.SizeofIfAddrmsg-1)); ok {
		t.Errorf("a cut address: %+v", a)
	}
	if r, ok := decodeRoute(make([]byte, unix.SizeofRtMsg-1)); ok {
		t.Errorf("a cut route: %+v", r)
	}

	hops := append(append([]byte{8, 0, 0, 0}, number...), 200, 0, 0, 0, 1, 0, 0, 0)
	if over := decodeHops(hops); !slices.Equal(over, []int{7}) {
		t.Errorf("a hop that is longer than its list: %v", over)
	}
}

// Answers to a request that was given up are passed over; without an answer, or anybody there, it is an error.
func TestLateAnswer(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET, 0)
	if err != nil {
		t.Fatal(err)
	}
	c := &Conn{fd: pair[0]}
	defer c.Close()
	for _, b := range [][]byte{
		answer(unix.RTM_NEWLINK, 6, []byte("late")), answer(unix.RTM_NEWLINK, 7, []byte("mine")),
		slices.Concat(answer(unix.RTM_NEWLINK, 6, []byte("late")), answer(unix.RTM_NEWLINK, 7, []byte("mine"))),
		answer(unix.NLMSG_DONE, 6, nil), answer(unix.NLMSG_DONE, 7, nil),
	} {
		if err := unix.Sendto(pair[1], b, 0, nil); err != nil {
			t.Fatal(err)
		}
	}
	if b, err := c.answer(7); err != nil || string(b) != "mine" {
		t.Errorf("%q, %v", b, err)
	}
	if all, whole, err := c.answers(7); err != nil || !whole || len(all) != 1 || string(all[0]) != "mine" {
		t.Errorf("%q, %v, %v", all, whole, err)
	}

	soon := unix.NsecToTimeval(int64(time.Millisecond))
	if err := unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &soon); err != nil {
		t.Fatal(err)
	}
	if _, err := c.answer(7); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("no answer: %v", err)
	}
	unix.Close(pair[1])
	if _, err := c.answer(7); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("nobody there: %v", err)
	}
	if _, err := c.Ask(unix.RTM_GETLINK, 0); err == nil {
		t.Error("nobody was asked")
	}
	if _, err := c.Dump(unix.RTM_GETLINK); err == nil {
		t.Error("nobody was asked for a list")
	}
}

// The kernel's own answers, against what Go's library says.
func TestKernel(t *testing.T) {
	h, err := host.Open("")
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	c, err := Dial(h, unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	lo, err := net.InterfaceByName("lo")
	if err != nil {
		t.Skip("there is no loopback interface here:", err)
	}

	byName, err1 := c.LinkByName("lo")
	byIndex, err2 := c.LinkByIndex(lo.Index)
	if err := errors.Join(err1, err2); err != nil || byName.Index != lo.Index || byIndex.Name != "lo" ||
		byName.MTU != lo.MTU {
		t.Errorf("%+v, %+v, %v", byName, byIndex, err)
	}

	if l, err := c.LinkWithVFs("lo", 0); err != nil || l.NumVF != 0 || len(l.VFs) != 0 {
		t.Errorf("%+v, %v", l, err)
	}
	if _, err := c.LinkByName("not-there"); !Gone(err) {
		t.Errorf("an interface that is not there: %v", err)
	}

	addresses, err := c.Addresses()
	theirs, _ := lo.Addrs()
	for _, a := range theirs {
		if !slices.ContainsFunc(addresses,
			func(b Address) bool { return b.Index == lo.Index && b.String() == a.String() }) {
			t.Errorf("%v is not among %v, %v", a, addresses, err)
		}
	}
}

func FuzzDecodeMessage(f *testing.F) {
	f.Add(answer(unix.NLMSG_ERROR, 1, make([]byte, 20)))
	f.Fuzz(func(t *testing.T, b []byte) {
		for {
			m, rest, err := decodeMessage(b)
			if err != nil {
				return
			}
			_, _ = decodeAck(m.payload), decodeDone(m.payload)
			if len(rest) >= len(b) {
				t.Fatal("it does not end")
			}
			b = rest
		}
	})
}

func FuzzDecodeLink(f *testing.F) {
	f.Add(make([]byte, unix.SizeofIfInfomsg))
	f.Add(append(make([]byte, unix.SizeofIfInfomsg), 8, 0, 22, 0, 1, 0, 0, 0, 5, 0, 1, 0))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := DecodeLink(b)
		if err != nil {
			return
		}
		total := 0
		for _, vf := range l.VFs {
			total += len(vf)
		}
		if total > len(b) {
			t.Errorf("%d bytes of VFs in %d", total, len(b))
		}
	})
}

func FuzzDecodeRoute(f *testing.F) {
	f.Add(append(make([]byte, unix.SizeofRtMsg), 12, 0, 9, 0, 8, 0, 0, 0, 1, 0, 0, 0))
	f.Fuzz(func(_ *testing.T, b []byte) {
		if r, ok := decodeRoute(b); ok {
			_ = r.Default()
		}
		if a, ok := decodeAddress(b); ok {
			_ = a.String()
		}
	})
}

// isBoundary reports whether a message of a datagram ends there.
func isBoundary(b []byte, at int) bool {
	for rest := b; len(rest) > 0; {
		var err error
		if _, rest, err = decodeMessage(rest); err != nil {
			return false
		}
		if len(b)-len(rest) == at {
			return true
		}
	}
	return false
}

// A route leads to everywhere if it names no network, or the one that all addresses are in.
func TestDefault(t *testing.T) {
	for text, want := range map[string]bool{
		"": true, "0.0.0.0/0": true, "::/0": true, "0.0.0.0/1": false, "128.0.0.0/1": false, "::/1": false,
		"10.0.0.0/8": false,
	} {
		r := Route{}
		if text != "" {
			_, r.To, _ = net.ParseCIDR(text)
		}
		if r.Default() != want {
			t.Errorf("%q: %v", text, r.Default())
		}
	}
}

// An interface that has gone keeps nobody from asking for the others.
func TestPermanentOfSome(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	got, err := Permanent(k.Host(), []string{"gone0", nic, other})
	if err != nil || len(got) != 2 || got[nic] == nil {
		t.Errorf("%v, %v", got, err)
	}
}
