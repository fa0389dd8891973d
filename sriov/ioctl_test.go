package sriov

import (
	"context"
	"encoding/binary"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
	"viaduct/vfio/bind"
)

// nic answers ethtool's requests for features, of which hw-tc-offload is number 34.
type nic struct {
	on, fixed, ignores bool
	without            bool
	sets               int
}

func (n *nic) ioctl(_ int, request uintptr, arg unsafe.Pointer) (int, error) {
	if request != unix.SIOCETHTOOL {
		return 0, unix.ENOTTY
	}

	command := *(*unsafe.Pointer)(unsafe.Add(arg, unix.IFNAMSIZ))
	words := unsafe.Slice((*uint32)(command), 3)
	switch words[0] {
	case ethtoolSetInfo:
		words = unsafe.Slice((*uint32)(command), 5)
		if words[4] = 40; n.without {
			words[2], words[4] = 0, 0
		}
	case ethtoolStrings:
		text := unsafe.Slice((*byte)(unsafe.Add(command, 12)), 40*nameLength)
		copy(text[34*nameLength:], tcFeature+"\x00")
		copy(text[3*nameLength:], "other\x00")
	case ethtoolGetFeatures:
		words = unsafe.Slice((*uint32)(command), 10)
		if !n.fixed {
			words[2+4] = 1 << 2
		}
		if words[2+4+2] = 0; n.on {
			words[2+4+2] = 1 << 2
		}
	case ethtoolSetFeatures:
		words = unsafe.Slice((*uint32)(command), 6)
		if words[2+2] != 1<<2 || words[2] != 0 {
			return 0, unix.EINVAL
		}
		n.sets++
		if !n.ignores {
			n.on = words[3+2] == 1<<2
		}
	default:
		return 0, unix.EOPNOTSUPP
	}

	return 0, nil
}

func TestOffload(t *testing.T) {
	for name, c := range map[string]struct {
		nic     nic
		want    string
		changes int
		says    string
	}{
		"on":       {nic{}, on, 1, ""},
		"off":      {nic{on: true}, off, 1, ""},
		"as it is": {nic{on: true}, on, 0, ""},
		"fixed":    {nic{fixed: true}, on, 0, "does not allow a change of hw-tc-offload"},
		"none":     {nic{without: true}, on, 0, "does not allow a change of hw-tc-offload"},
		"ignored":  {nic{ignores: true}, on, 1, "reported success and did not"},
	} {
		k := hosttest.NewLab(t, nil)
		k.OnIoctl = c.nic.ioctl
		s := open(t, k)
		plan, err := s.PlanCount(device(t, s, pf), Wish{VFs: Repeat(1, VFWish{Use: UseNone}), Offload: c.want})
		if err == nil {
			if len(plan.Offload) != c.changes || c.changes > 0 &&
				!strings.Contains(strings.Join(bind.Commands(plan.Steps()), "\n"),
					"ethtool -K enp1s0 hw-tc-offload "+c.want) {
				t.Errorf("%s: %+v", name, plan.Offload)
			}
			s.Close()
			_, err = setCount(t, context.Background(), k, Wish{VFs: Repeat(1, VFWish{Use: UseNone}), Offload: c.want})
		}

		if (err == nil) != (c.says == "") || err != nil && !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want %q", name, err, c.says)
		}
		if err == nil && (c.nic.on != (c.want == on) || c.nic.sets != c.changes) {
			t.Errorf("%s: %+v", name, c.nic)
		}
	}
}

// A new mode of the e-switch may make the interface anew, with what the driver begins with: the offload is set again.
func TestOffloadAfterMode(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	k.Net.Eswitch = map[string][3]int{pf: {}}
	n := &nic{}
	k.OnIoctl = n.ioctl
	seen := false
	eswitch := func() (mode int) {
		k.ChangeNet(func(n *hosttest.Network) { mode = n.Eswitch[pf][0] })
		return mode
	}
	k.SetFault(func(op, _ string) error {
		if op == "ioctl" && !seen && eswitch() == 1 {
			seen, n.on = true, false
		}
		return nil
	})
	wish := Wish{VFs: Repeat(2, VFWish{Use: UseNone}), Eswitch: Eswitch{Mode: switchdev}, Offload: on}
	if _, err := setCount(t, context.Background(), k, wish); err != nil || !n.on || n.sets != 2 || !seen {
		t.Errorf("%v, %+v, looked at after the mode: %v", err, n, seen)
	}
	k.Revive()
	if eswitch() != 1 {
		t.Errorf("the e-switch is %v", eswitch())
	}
	s := open(t, k)
	now, err := ReadEswitch(s.Host(), parse(pf))
	if err != nil || now.Mode != switchdev || now.Inline != "none" || now.Encap != "none" {
		t.Errorf("%+v, %v", now, err)
	}
}

// A change of the mode that fails later is undone.
func TestModeUndone(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	k.Net.Eswitch = map[string][3]int{pf: {}}
	k.Fail[pfDir+"/virtfn1/driver_override"] = unix.EACCES
	wish := Wish{VFs: Repeat(2, VFWish{Use: UseNone}), Eswitch: Eswitch{Mode: switchdev}}
	if _, err := setCount(t, context.Background(), k, wish); err == nil || k.Net.Eswitch[pf][0] != 0 ||
		state(t, k) != "1" {
		t.Errorf("%v, e-switch %v, left %s", err, k.Net.Eswitch[pf], state(t, k))
	}
	k.Net.Eswitch = nil
	if _, err := setCount(t, context.Background(), k, wish); err == nil ||
		!strings.Contains(err.Error(), "no e-switch") {
		t.Errorf("a PF without an e-switch: %v", err)
	}
}

// controller answers NVMe's administration commands.
type controller struct {
	q, v    pool
	all     []secondary
	refuse  map[uint32]int // status by action
	fewer   bool
	asleep  bool // no VF comes online
	unknown bool
}

func (c *controller) ioctl(_ int, request uintptr, arg unsafe.Pointer) (int, error) {
	if request != ioctlAdmin {
		return 0, unix.ENOTTY
	}

	cmd := (*passthru)(arg)
	switch {
	case cmd.Opcode == opIdentify && c.unknown:
		return int(invalidField) | 0x4000, nil
	case cmd.Opcode == opIdentify:
		page := unsafe.Slice(*(**byte)(unsafe.Pointer(&cmd.Addr)), cmd.DataLen)
		if cmd.CDW10&0xff == primaryCaps {
			copy(page, primaryPage(c.q, c.v))
			return 0, nil
		}
		from := cmd.CDW10 >> secondaryFromID
		var some []secondary
		for _, s := range c.all {
			if uint32(s.ID) >= from && len(some) < perSecondPage {
				some = append(some, s)
			}
		}
		copy(page, secondaryPage(some))
	case cmd.Opcode == opVirtManage:
		act := cmd.CDW10 & 0xff
		if status := c.refuse[act]; status != 0 {
			return status, nil
		}
		i := slices.IndexFunc(c.all, func(s secondary) bool { return uint32(s.ID) == cmd.CDW10>>16 })
		if act == online {
			c.all[i].Online = !c.asleep
			return 0, nil
		}
		if cmd.Result = cmd.CDW11; c.fewer {
			cmd.Result--
		}
		c.all[i].Has[resource(cmd.CDW10>>8&7)] = cmd.Result
	}

	return 0, nil
}

const nvmePFAddress = "0000:09:00.0"

func TestNVMeShares(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*controller)
		says   string
	}{
		"shared out":     {func(*controller) {}, ""},
		"nothing shared": {func(c *controller) { c.unknown = true }, ""},
		"refused":        {func(c *controller) { c.refuse = map[uint32]int{assign: 0x11f} }, "NVMe status 0x11f"},
		"fewer":          {func(c *controller) { c.fewer = true }, "it took"},
		"not online":     {func(c *controller) { c.refuse = map[uint32]int{online: 0x120} }, "0x120"},
		"asleep":         {func(c *controller) { c.asleep = true }, "4 of its VFs did not come online"},
		"too few queues": {func(c *controller) { c.q.Total = 3 }, "need 2"},
	} {
		t.Run(name, func(t *testing.T) {
			k := hosttest.NewLab(t, hosttest.Tree{"dev/nvme0": "c 250:0\n"})
			fake := &controller{q: pool{400, 2, 16, 1}, v: pool{200, 1, 16, 1}, all: controllers(130, 0, 0)}
			c.change(fake)
			k.OnIoctl = fake.ioctl
			h := &iommu.Host{Host: k.Host()}
			d, err := iommu.ReadDevice(h, parse(nvmePFAddress))
			if err != nil {
				t.Fatal(err)
			}
			device, actions, err := planShares(h, &d, 4)
			if err == nil {
				err = doShares(h, &d, actions)
			}
			if err == nil && !fake.unknown {
				if device == "" || len(actions) != 8 {
					t.Errorf("%s shares %v", device, actions)
				}
				err = setOnline(h, d.Address, 4)
			}
			if (err == nil) != (c.says == "") || err != nil && !strings.Contains(err.Error(), c.says) {
				t.Fatalf("%v, want %q", err, c.says)
			}
			if err == nil && !fake.unknown {
				for i, s := range fake.all {
					if want := i < 4; s.Online != want || s.Has[queues] > 0 != want || s.Has[interrupts] > 0 != want {
						t.Fatalf("VF %d has %+v", i+1, s)
					}
				}
			}
		})
	}
}

// A devlink parameter's values, each with when it is in force.
func TestDecodeParam(t *testing.T) {
	value := func(when byte, data []byte) []byte {
		b := nl.NewRtAttr(nl.DEVLINK_ATTR_PARAM_VALUE_CMODE, []byte{when}).Serialize()
		if data != nil {
			b = append(b, nl.NewRtAttr(nl.DEVLINK_ATTR_PARAM_VALUE_DATA, data).Serialize()...)
		}
		return nl.NewRtAttr(nl.DEVLINK_ATTR_PARAM_VALUE, b).Serialize()
	}
	for name, c := range map[string]struct {
		kind   byte
		values []byte
		want   string
	}{
		"switch": {nl.DEVLINK_PARAM_TYPE_BOOL, append(value(0, nil), value(2, []byte{})...),
			"false now, true for the next boot"},
		"text":    {nl.DEVLINK_PARAM_TYPE_STRING, value(1, []byte("abc\x00")), "abc from the driver's start"},
		"number":  {nl.DEVLINK_PARAM_TYPE_U32, value(0, binary.NativeEndian.AppendUint32(nil, 70000)), "70000 now"},
		"shorter": {nl.DEVLINK_PARAM_TYPE_U16, value(0, binary.NativeEndian.AppendUint16(nil, 300)), "300 now"},
		"short":   {nl.DEVLINK_PARAM_TYPE_U8, value(0, []byte{7}), "7 now"},
	} {
		inner := append(nl.NewRtAttr(nl.DEVLINK_ATTR_PARAM_TYPE, []byte{c.kind}).Serialize(),
			nl.NewRtAttr(nl.DEVLINK_ATTR_PARAM_VALUES_LIST, c.values).Serialize()...)
		got := strings.Join(decodeParam(nl.NewRtAttr(nl.DEVLINK_ATTR_PARAM, inner).Serialize()), ", ")
		if got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

// Words that users see.
func TestWords(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	h := &iommu.Host{Host: k.Host()}
	a := parse(pf)
	for name, c := range map[string]struct{ got, want string }{
		"mlx5":       {firmwareHint(h, &iommu.Device{ID: iommu.ID{Vendor: 0x15b3}}), "SRIOV_EN"},
		"bnxt":       {firmwareHint(h, &iommu.Device{ID: iommu.ID{Vendor: 0x14e4}}), "bnxtnvm"},
		"other":      {firmwareHint(h, &iommu.Device{ID: iommu.ID{Vendor: 0x8086}}) + "-", "-"},
		"down":       {silentCause(&iommu.Device{Driver: "bnxt_en", Netdevs: []string{"p0"}}), "ip link set dev p0 up"},
		"no VF":      {(&NotVFError{a}).Error(), pf + " is not a VF"},
		"unverified": {strings.Join(Unverified(&iommu.Device{Name: "x"}, []Key{Trust}), ""), "not verified"},
		"verified":   {strings.Join(Unverified(&iommu.Device{Name: "x"}, nil), "") + "-", "-"},
	} {
		if !strings.Contains(c.got, c.want) {
			t.Errorf("%s: %q, want %q", name, c.got, c.want)
		}
	}

	if d := DefaultSettings(); d[VLAN] != "0" || d[Trust] != off || d[MAC] != "" {
		t.Errorf("what VFs begin with: %v", d)
	}
	if v, known := VLAN.Default(); v != "0" || !known {
		t.Errorf("%q, %v", v, known)
	}
	if _, known := MAC.Default(); known {
		t.Error("an address is known that a VF begins with")
	}

	p := &SetPlan{Want: Settings{VLAN: "7", Trust: on}, Settings: planSettings(Settings{VLAN: "0", Trust: off},
		Settings{VLAN: "7", Trust: on})}
	if p.Restores(Settings{VLAN: "7"}) || !p.Restores(Settings{VLAN: "7", Trust: on}) {
		t.Error("what was asked for before is not told from what is new")
	}
}
