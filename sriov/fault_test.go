package sriov

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

const vf0 = "0000:01:10.0"

// vfSettings are the settings of one of the lab PF's VFs as its driver reports them.
func vfSettings(t *testing.T, k *hosttest.Kernel, index int) Settings {
	t.Helper()
	s := open(t, k)
	defer s.Close()
	port, err := ReadPort(s.Host(), device(t, s, pf))
	if err != nil {
		t.Fatal(err)
	}
	vf, _ := port.Of(index)
	return vf.Settings
}

func setVF(t *testing.T, k *hosttest.Kernel, want Settings) ([]Key, error) {
	t.Helper()
	s := open(t, k)
	defer s.Close()
	unverified, err := s.SetVF(context.Background(), parse(vf0), want)
	if keys, _ := s.journal.Keys("change-"); len(keys) > 0 {
		t.Errorf("records are left: %q", keys)
	}
	return unverified, err
}

// What a driver refuses, or takes and does not do, is told, and the VF is as it was; what it does not report is told
// too.
func TestSetVF(t *testing.T) {
	for name, c := range map[string]struct {
		net        func(*hosttest.Network)
		want       Settings
		says       string
		unverified []Key
	}{
		"taken":       {nil, Settings{MAC: "52:54:00:aa:00:07", VLAN: "7", MaxRate: "100"}, "", nil},
		"nothing new": {nil, Settings{VLAN: "0", Trust: off}, "", nil},
		"refused": {func(n *hosttest.Network) { n.Refuse = map[int]unix.Errno{nl.IFLA_VF_TRUST: unix.EPERM} },
			Settings{VLAN: "7", Trust: on}, "driver igb refused trust", nil},
		"unknown":    {func(n *hosttest.Network) { n.Refuse = map[int]unix.Errno{nl.IFLA_VF_RSS_QUERY_EN: unix.EOPNOTSUPP} }, Settings{VLAN: "7", RSSQuery: on}, "driver igb does not support the VF setting rss_query", nil},
		"no 802.1ad": {func(n *hosttest.Network) { n.Refuse = map[int]unix.Errno{nl.IFLA_VF_VLAN_LIST: unix.EPROTONOSUPPORT} }, Settings{VLAN: "7", Proto: dot1ad}, "only the VLAN protocol 802.1q", nil},
		"rates": {func(n *hosttest.Network) { n.Refuse = map[int]unix.Errno{nl.IFLA_VF_RATE: unix.EINVAL} },
			Settings{MaxRate: "7"}, "rates need the PF's link to be up", nil},
		"not done": {func(n *hosttest.Network) { n.Ignore = map[int]bool{nl.IFLA_VF_TRUST: true} },
			Settings{VLAN: "7", Trust: on}, "reported success, but trust was set to on and is off", nil},
		"not reported": {func(n *hosttest.Network) { n.Unreported = map[int]bool{nl.IFLA_VF_TRUST: true} },
			Settings{VLAN: "7", Trust: on}, "", []Key{Trust}},
		"vectors": {nil, Settings{MSIX: "4"}, "setting msix", nil},
	} {
		t.Run(name, func(t *testing.T) {
			k := hosttest.NewLab(t, nil)
			quiet(t, k, makeVFs(alike(2, UseNone)))
			if c.net != nil {
				c.net(&k.Net)
			}
			before := vfSettings(t, k, 0)
			unverified, err := setVF(t, k, c.want)
			if (err == nil) != (c.says == "") || err != nil && !strings.Contains(err.Error(), c.says) ||
				!slices.Equal(unverified, c.unverified) {
				t.Errorf("error %v, not verified: %v", err, unverified)
			}
			now := vfSettings(t, k, 0)
			if err != nil && !maps.Equal(now, before) {
				t.Errorf("left %v, was %v", now, before)
			}
			if wrong, _ := compare(now, c.want); err == nil && len(wrong) > 0 {
				t.Errorf("it succeeded, but %v", wrong)
			}
			if other := vfSettings(t, k, 1); other[VLAN] != "0" || other[Trust] == on {
				t.Errorf("another VF has %v", other)
			}
		})
	}
}

// What an interrupted change of settings cannot put back is told.
func TestUnknownBefore(t *testing.T) {
	k := switching(t)
	quiet(t, k, makeVFs(everything))
	const address = "0000:01:10.2"
	ended := func(op, name string) bool { return op == "remove" && strings.Contains(name, "/change-") }
	killed(0, ended, func(ctx context.Context, s *Handle) error {
		_, err := s.SetVF(ctx, parse(address), Settings{MSIX: "4", VLAN: "7"})
		return err
	})(t, k)

	s := open(t, k)
	all, err := s.Recover(t.Context())
	if err != nil || len(all) != 1 || all[0].Err != nil || !strings.Contains(all[0].What, "except msix, which") {
		t.Errorf("%+v, %v", all, err)
	}
	if vf := vfSettings(t, k, 1); vf[VLAN] != "0" {
		t.Errorf("left %v", vf)
	}
}

// A driver that is busy with a VF's reset is asked again; one that stays so is told of.
func TestBusyDriver(t *testing.T) {
	for _, times := range []int64{3, 1 << 20} {
		k := hosttest.NewLab(t, nil)
		quiet(t, k, makeVFs(alike(1, UseNone)))
		var left atomic.Int64
		left.Store(times)
		k.SetFault(func(op, name string) error {
			if op == "message" && name == fmt.Sprint(unix.RTM_SETLINK) && left.Add(-1) >= 0 {
				return unix.EBUSY
			}
			return nil
		})
		_, err := setVF(t, k, Settings{VLAN: "7"})
		k.Revive()
		if refused, ok := errors.AsType[*SettingError](err); (err == nil) != (times == 3) ||
			err != nil && (!ok || !errors.Is(refused, unix.EBUSY)) {
			t.Errorf("busy %d times: %v", times, err)
		}
	}
}

// A MAC address that something else on the host has is refused. None, and zero, which has a driver make one up, are
// nobody's.
func TestConflicts(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	k.Net.Permanent = map[string]string{"enp2s0": ""}
	wish := alike(3, UseNone)
	wish.VFs[1].Settings = Settings{MAC: "52:54:00:aa:00:01"}
	quiet(t, k, makeVFs(wish)) // the others have a zero address
	for mac, says := range map[string]string{
		"00:00:00:00:00:00": "", "52:54:00:aa:00:09": "", "52:54:00:aa:00:01": "already belongs to vf1 of enp1s0",
		"52:54:00:00:00:03": "already belongs to ens1",
	} {
		if _, err := setVF(t, k, Settings{MAC: mac}); (err == nil) != (says == "") ||
			err != nil && !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v, want %q", mac, err, says)
		}
	}
	for _, mac := range []string{"00:00:00:00:00:00", "", StableMAC} {
		settings := Settings{}
		if mac != "" {
			settings[MAC] = mac
		}
		quiet(t, k, makeVFs(Wish{}))
		if _, err := setCount(t, context.Background(), k, Wish{VFs: Repeat(3, VFWish{UseNone, settings})}); err != nil {
			t.Errorf("mac=%s for several: %v", mac, err)
		}
	}
	s := open(t, k)
	if _, err := s.PlanCount(device(t, s, pf), Wish{VFs: Repeat(4,
		VFWish{UseNone, Settings{MAC: "52:54:00:aa:00:09"}})}); err == nil {
		t.Error("one address for several VFs")
	}
}

// Beside a VF that is to have an address, those that are to have zero or none have nobody's: other VFs have zero too,
// or their driver reports no address.
func TestNoAddressBesideOne(t *testing.T) {
	for _, reported := range []bool{true, false} {
		k := hosttest.NewLab(t, nil)
		k.Net.Unreported = map[int]bool{nl.IFLA_VF_MAC: !reported}
		s := open(t, k)
		some := VFWish{Settings: Settings{MAC: "52:54:00:aa:00:09"}}
		zero := VFWish{Settings: Settings{MAC: noMAC}}
		wish := Wish{VFs: []VFWish{some, zero, {}}}
		if _, err := s.PlanCount(device(t, s, pf), wish); err != nil {
			t.Errorf("reported %v: %v", reported, err)
		}
	}
}

// mac=stable is the same in the plan and in what is applied, whatever address the PF's interface was given meanwhile.
func TestStableIsPermanent(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	k.Net.Permanent = map[string]string{"enp1s0": "52:54:00:00:00:77"}
	wish := Wish{VFs: Repeat(2, VFWish{UseNone, Settings{MAC: StableMAC}})}
	plan, err := setCount(t, context.Background(), k, wish)
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []string{"26:00:00:00:00:77", "26:00:01:00:00:77"} {
		if got := vfSettings(t, k, i)[MAC]; got != want || plan.Set[i].Want[MAC] != want {
			t.Errorf("vf%d has %s, planned was %s, want %s", i, got, plan.Set[i].Want[MAC], want)
		}
	}
	k.SetFault(func(op, name string) error {
		if op == "message" && name == fmt.Sprint(unix.RTM_GETLINK) {
			return unix.ENOBUFS
		}
		return nil
	})
	defer k.Revive()
	if _, err := setVF(t, k, Settings{MAC: StableMAC}); !errors.Is(err, unix.ENOBUFS) {
		t.Errorf("who cannot ask derives an address from nothing: %v", err)
	}
}

// With so many VFs that an answer which holds them is cut, mac=stable is what it is without; and whichever look at an
// interface fails, it is that or an error, and never derived from another address.
func TestStableOfMany(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	k.Net.Permanent = map[string]string{"enp1s0": "52:54:00:00:00:77"}
	quiet(t, k, makeVFs(alike(7, UseNone)))
	k.ChangeNet(func(n *hosttest.Network) {
		n.Answer = func(_ uint16, b []byte) []byte { return b[:min(len(b), 600)] }
	})
	s := open(t, k)
	d := device(t, s, pf)
	isLook := func(op, name string) bool { return op == "message" && name == fmt.Sprint(unix.RTM_GETLINK) }
	for n := 0; ; n++ {
		k.FailAt(n, isLook, unix.ENOBUFS)
		plan, err := s.PlanSet(d, vfAt(d.Address, parse(vf0), 0), Settings{MAC: StableMAC})
		failed := k.Revive()
		if err == nil && plan.Want[MAC] != "26:00:00:00:00:77" || err != nil && !failed {
			t.Errorf("look %d fails: %v: %+v, %v", n, failed, plan, err)
		}
		if !failed {
			break
		}
	}
	if _, err := setVF(t, k, Settings{MAC: StableMAC}); err != nil {
		t.Error(err)
	}
	k.ChangeNet(func(n *hosttest.Network) { n.Answer = nil })
	if got := vfSettings(t, k, 0)[MAC]; got != "26:00:00:00:00:77" {
		t.Errorf("it has %s", got)
	}
}

// A PF that is on vfio-pci with enable_sriov gives VFs that vfio-pci has at once, and they go again.
func TestPFOnVFIO(t *testing.T) {
	const may = "sys/module/vfio_pci/parameters/enable_sriov"
	k := hosttest.NewLab(t, hosttest.Tree{may: "N\n"})
	quiet(t, k, func(ctx context.Context, s *Handle) error { return move(ctx, s, pf, bind.Take(bind.Auto)) })
	refused := func(want string) {
		t.Helper()
		k.Log = nil
		if _, err := setCount(t, context.Background(), k, alike(2, UseNone)); err == nil || len(k.Log) > 0 ||
			!strings.Contains(err.Error(), want) {
			t.Errorf("%v, writes %q", err, k.Log)
		}
	}
	refused("is on vfio-pci, which cannot make VFs: give it back")

	// It is not to be taken from a guest.
	lease := k.Dir() + "/run/viaduct/" + holder.LeasePrefix + "web.json"
	record := `{"guest": "web", "for": "pod default/web", "devices": [{"address": "` + pf + `"}]}`
	if err := os.WriteFile(lease, []byte(record), 0o600); err != nil {
		t.Fatal(err)
	}
	refused(`and it is assigned to guest "web" (pod default/web): end that (viaduct release web)`)
	if err := os.Remove(lease); err != nil {
		t.Fatal(err)
	}

	if err := os.WriteFile(k.Dir()+"/"+may, []byte("Y\n"), 0o600); err != nil {
		t.Fatal(err)
	}

	k.EnableSRIOV = true
	for _, use := range []Use{UseNone, UseVFIO} {
		plan, err := setCount(t, context.Background(), k, alike(2, use))
		if err != nil || !strings.Contains(strings.Join(plan.Notes, ";"), "which gets its VFs at once") {
			t.Fatalf("%s: %v", use, err)
		}
		if got := state(t, k); got != "vfio-pci/vfio-pci vfio-pci/vfio-pci 1" {
			t.Errorf("%s: %s", use, got)
		}
		quiet(t, k, makeVFs(Wish{}))
		if got := state(t, k); got != "1" {
			t.Errorf("%s: left %s", use, got)
		}
	}

	k.Fail[pfDir+"/sriov_drivers_autoprobe"] = nil
	k.Partial = 1
	if _, err := setCount(t, context.Background(), k, alike(2, UseVFIO)); err == nil || state(t, k) != "1" {
		t.Errorf("a VF too few: %v, left %s", err, state(t, k))
	}
}

// VFs for the host are looked at again: one that its driver did not take is told of.
func TestHomeIsReadBack(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	k.Probe[vf0] = unix.ENOMEM
	plan, err := setCount(t, context.Background(), k, alike(2, UseHome))
	if err != nil || !strings.Contains(strings.Join(plan.Notes, ";"), vf0) {
		t.Errorf("%v, notes %q", err, plan.Notes)
	}
}

// VFs for the host that a VFIO driver has, as vfio-pci.ids= has it, are not the host's: that is told, and undone.
func TestHomeOnVFIO(t *testing.T) {
	for _, settings := range []Settings{nil, {VLAN: "7"}} { // probed as they are made, and last
		k := hosttest.NewLab(t, hosttest.Tree{"proc/cmdline": "quiet vfio-pci.ids=8086:10ca\n"})
		k.IDs["vfio-pci"], k.IDs["igbvf"] = []string{"8086:10ca"}, nil
		_, err := setCount(t, context.Background(), k, Wish{VFs: Repeat(2, VFWish{UseHome, settings})})
		if err == nil || !strings.Contains(err.Error(), "is for the host") ||
			!strings.Contains(err.Error(), "because vfio-pci.ids= in ") || state(t, k) != "1" {
			t.Errorf("%v: %v, left %s", settings, err, state(t, k))
		}
	}
}

// Each probe is a request of its own: one that waits keeps no other.
func TestProbesSideBySide(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	other := make(chan struct{})
	k.Before = func(name, value string) {
		switch {
		case !strings.HasSuffix(name, "drivers_probe"):
		case value != vf0:
			close(other)
		default:
			select {
			case <-other:
			case <-time.After(5 * time.Second):
				t.Error("while one VF is probed, no other is")
			}
		}
	}
	wish := Wish{VFs: Repeat(2, VFWish{UseHome, Settings{VLAN: "7"}})}
	if _, err := setCount(t, context.Background(), k, wish); err != nil || state(t, k) != "igbvf/ igbvf/ 1" {
		t.Errorf("%v, left %s", err, state(t, k))
	}
}

// What was taken of old VFs is forgotten when these go, and what was taken of new ones never: a VF that a guest has
// goes back to no driver, and not to the host's.
func TestRecordsOfNewVFs(t *testing.T) {
	for n := range 60 {
		k := hosttest.NewLab(t, nil)
		quiet(t, k, makeVFs(alike(2, UseVFIO)))
		s := open(t, k)
		k.KillAt(n, isWrite)
		_, _ = s.Make(context.Background(), parse(pf), alike(3, UseVFIO))
		s.Close()
		if !k.Revive() {
			return
		}
		quiet(t, k, func(ctx context.Context, s *Handle) error { _, err := s.Recover(ctx); return err })
		for vf := range strings.FieldsSeq(state(t, k)) {
			if vf != "vfio-pci/vfio-pci" && vf != "1" {
				t.Fatalf("killed before write %d: %s", n, state(t, k))
			}
		}
		if !strings.HasPrefix(state(t, k), "vfio") {
			if n == 0 {
				t.Errorf("killed before the old VFs went: left %s", state(t, k))
			}
			continue
		}
		quiet(t, k, func(ctx context.Context, s *Handle) error { return move(ctx, s, vf0, bind.GiveBack()) })
		if got := state(t, k); !strings.HasPrefix(got, "/none vfio-pci/vfio-pci") {
			t.Errorf("killed before write %d: given back, vf0 is %s", n, got)
		}
	}
}

// What is known of VFs goes with them, wherever the run that removes them is killed.
func TestRecordsOfOldVFs(t *testing.T) {
	for n := 0; ; n++ {
		k := small(t)
		quiet(t, k, makeVFs(alike(2, UseVFIO)))
		s := open(t, k)
		k.KillAt(n, func(op, name string) bool { return isWrite(op, name) || op == "replace" || op == "remove" })
		_, _ = s.Make(context.Background(), parse(pf), Wish{})
		s.Close()
		if !k.Revive() {
			return
		}

		next := open(t, k)
		recovered, err := next.Recover(context.Background())
		for _, r := range recovered {
			err = errors.Join(err, r.Err)
		}
		taken, failed := next.journal.Keys("taken-")
		if err = errors.Join(err, failed); err != nil {
			t.Fatalf("killed before change %d: %v", n, err)
		}
		if vfs := device(t, next, pf).SRIOV.VFs; len(vfs) != len(taken) {
			t.Errorf("killed before change %d: %d VFs, known are %q", n, len(vfs), taken)
		}
		next.Close()
	}
}

// VFs that somebody uses are not removed, unless that is overridden.
func TestUsedVFs(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	quiet(t, k, makeVFs(alike(2, UseVFIO)))
	usesNode(t, k, vf0)
	s := open(t, k)
	plan, err := s.Make(context.Background(), parse(pf), Wish{})
	refused, ok := errors.AsType[*holder.RefusedError](err)
	if !ok || !strings.Contains(refused.Error(), "process 4711") || plan == nil || len(plan.Victims) != 2 {
		t.Errorf("%+v, %v", plan, err)
	}
	if _, err := s.Make(context.Background(), parse(pf), Wish{}, holder.Process); err != nil || state(t, k) != "1" {
		t.Errorf("overridden: %v, left %s", err, state(t, k))
	}
}

// The number of a PF in its representors' names is the function's with some drivers, the port's with others.
func TestRepresentors(t *testing.T) {
	const one, two = "sys/devices/pci0000:00/0000:00:05.0/0000:01:00.0/net/",
		"sys/devices/pci0000:00/0000:00:06.0/0000:02:00.0/net/"
	tree := hosttest.Tree{}
	add := func(dir, name, port string) {
		tree[dir+name+"/phys_switch_id"], tree[dir+name+"/phys_port_name"] = "deadbeef\n", port+"\n"
		tree[dir+name+"/device"] = "-> ../../../" + path.Base(path.Dir(path.Clean(dir)))
		tree["sys/class/net/"+name] = "-> ../../" + strings.TrimPrefix(dir, "sys/") + name
	}
	add(one, "enp1s0", "p0")
	add(one, "rep0", "pf1vf0") // mlx5: the second port, by whichever function
	add(one, "rep1", "pf1vf1")
	add(two, "rep2", "pf0vf0") // of another PF of the same card
	tree["sys/class/net/other"] = "-> ../../devices/virtual/net/other"
	tree["sys/devices/virtual/net/other/phys_switch_id"] = "deadbeef\n"
	tree["sys/devices/virtual/net/other/phys_port_name"] = "pf0vf2\n" // of no device: then the number tells
	k := hosttest.NewLab(t, tree)
	h := &iommu.Host{Host: k.Host()}
	ports, err := ReadPorts(h, &Port{PF: &iommu.Device{Address: parse(pf)}, SwitchID: "deadbeef"})
	if err != nil || !slices.Equal(ports.Uplinks, []string{"enp1s0"}) ||
		!maps.Equal(ports.VFs, map[int]string{0: "rep0", 1: "rep1", 2: "other"}) {
		t.Errorf("%+v, %v", ports, err)
	}
}

// A captured host is planned for, and never changed.
func TestCapturedHost(t *testing.T) {
	h := &iommu.Host{Host: hosttest.Lab(t).Host(t)}
	s, err := Open(h, bind.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	plan, err := s.Make(context.Background(), parse(pf), alike(2, UseVFIO))
	if err != nil || len(plan.Steps()) < 3 {
		t.Errorf("%v, %v", plan, err)
	}
	if _, err := s.Apply(context.Background(), plan); !errors.Is(err, iommu.ErrReadOnly) {
		t.Errorf("carried out: %v", err)
	}
}

// A look at a PF and its VFs, and a plan, of which a part fails tells so, or is the same.
func TestLooksThatFail(t *testing.T) {
	k := small(t)
	k.Net.Eswitch = map[string][3]int{pf: {}}
	k.OnIoctl = (&nic{}).ioctl
	quiet(t, k, makeVFs(alike(2, UseNone)))
	look := func(do func(s *Handle, pf *iommu.Device) (any, error)) func() (any, error) {
		return func() (any, error) {
			s, err := Open(&iommu.Host{Host: k.Host()}, bind.Options{})
			if err != nil {
				return nil, err
			}
			defer s.Close()
			topology, err := s.Topology()
			if err != nil {
				return nil, err
			}
			d, err := topology.Find(parse(pf))
			if err != nil {
				return nil, err
			}
			return do(s, d)
		}
	}

	steps := func(p *Plan, err error) (any, error) {
		if err != nil {
			return nil, err
		}
		return p.Steps(), nil
	}

	for what, do := range map[string]func() (any, error){
		"port": look(func(s *Handle, d *iommu.Device) (any, error) {
			port, err := ReadPort(s.Host(), d)
			if err != nil || port == nil {
				return nil, err
			}
			return port.VFs, nil
		}),
		"e-switch": look(func(s *Handle, d *iommu.Device) (any, error) { return ReadEswitch(s.Host(), d.Address) }),
		"count": look(func(s *Handle, d *iommu.Device) (any, error) {
			return steps(s.PlanCount(d, Wish{
				VFs:     Repeat(3, VFWish{UseVFIO, Settings{MAC: StableMAC, VLAN: "7"}}),
				Eswitch: Eswitch{Mode: switchdev}, Offload: on, MTU: 9000,
			}))
		}),
		"check": look(func(s *Handle, d *iommu.Device) (any, error) {
			p, err := s.PlanCount(d, Wish{})
			if err == nil {
				err = s.CheckCount(p, nil)
			}
			return nil, err
		}),
		"set": look(func(s *Handle, d *iommu.Device) (any, error) {
			p, err := s.PlanSet(d, vfAt(d.Address, parse(vf0), 0), Settings{MAC: "52:54:00:aa:00:05", VLAN: "7"})
			if err != nil {
				return nil, err
			}
			return p.Steps(), nil
		}),
		"sets": look(func(s *Handle, d *iommu.Device) (any, error) {
			vfs := []*iommu.Device{vfAt(d.Address, parse(vf0), 0)}
			plans, err := s.PlanSets(d, vfs, Repeat(1, VFWish{UseNone, Settings{VLAN: "7"}}))
			return len(plans), err
		}),
		"what was asked": look(func(s *Handle, d *iommu.Device) (any, error) { return s.LastRequested(d) }),
	} {
		hosttest.EachFailure(t, k, what, do)
	}
}

// Who took a VF until it was locked is seen: a look from before the lock is none.
func TestMakeLooksAgain(t *testing.T) {
	k := small(t)
	quiet(t, k, makeVFs(alike(2, UseNone)))
	s := open(t, k)
	var once atomic.Bool
	k.SetFault(func(op, name string) error {
		// The last device of a look.
		if op == "read" && strings.HasSuffix(name, edu+"/modalias") && once.CompareAndSwap(false, true) {
			dir := "sys/bus/pci/devices/" + vf0
			if err := errors.Join(k.Write(dir+"/driver_override", "vfio-pci"),
				k.Write("sys/bus/pci/drivers_probe", vf0)); err != nil {
				t.Error(err)
			}
			usesNode(t, k, vf0)
		}
		return nil
	})
	_, err := s.Make(context.Background(), parse(pf), Wish{})
	k.Revive()
	if !once.Load() || !errors.Is(err, holder.ErrRefused) || !strings.HasPrefix(state(t, k), "vfio-pci/vfio-pci") {
		t.Errorf("seen %v: %v, left %s", once.Load(), err, state(t, k))
	}
}

// What is known of VFs goes with them, and of new ones is what was done with these; one handle does all of it.
func TestForgotten(t *testing.T) {
	k := small(t)
	s := open(t, k)
	known := func() string {
		t.Helper()
		taken, err1 := s.journal.Keys("taken-")
		all, err2 := s.LastRequested(device(t, s, pf))
		if err := errors.Join(err1, err2); err != nil {
			t.Fatal(err)
		}
		return fmt.Sprint(taken, all)
	}

	for _, c := range []struct {
		wish Wish
		want string
	}{
		{alike(2, UseVFIO), "[taken-0000:01:10.0 taken-0000:01:10.2] map[]"},
		{wished, "[taken-0000:01:10.0] map[0:map[mac:52:54:00:aa:00:01 trust:on vlan:100]]"},
		{Wish{}, "[] map[]"},
	} {
		if _, err := s.Make(context.Background(), parse(pf), c.wish); err != nil {
			t.Fatal(err)
		}
		if got := known(); got != c.want {
			t.Errorf("of %d VFs is known %s, want %s", len(c.wish.VFs), got, c.want)
		}
		if len(c.wish.VFs) == 0 {
			continue
		}
		if _, err := s.SetVF(context.Background(), parse(vf0), Settings{QoS: "0"}); err != nil {
			t.Errorf("a VF of the same handle: %v", err)
		}
		if err := s.rememberRequested(device(t, s, pf), SetPlan{VF: vfAt(parse(pf), parse(vf0), 0),
			Want: c.wish.VFs[0].Settings}); err != nil {
			t.Fatal(err)
		}
	}
}

// What no PF can be is refused before anything is looked at.
func TestWishes(t *testing.T) {
	s := open(t, small(t))
	d := device(t, s, pf)
	for says, wish := range map[string]Wish{
		"want vfio, none": {VFs: Repeat(1, VFWish{Use: "vfoi"})},
		"0 to 4094":       {VFs: Repeat(1, VFWish{Settings: Settings{VLAN: "5000"}})},
		"unknown setting": {VFs: Repeat(1, VFWish{Settings: Settings{"veb": on}})},
		"invalid mode":    {Eswitch: Eswitch{Mode: "foo"}},
		"invalid encap":   {Eswitch: Eswitch{Encap: "foo"}},
		"hw-tc-offload":   {Offload: "maybe"},
		"invalid MTU":     {MTU: -5},
	} {
		if _, err := s.PlanCount(d, wish); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%v, want %q", err, says)
		}
	}
	if p, err := s.PlanCount(d, Wish{VFs: Repeat(-1, VFWish{})}); err != nil || p.Want != 0 {
		t.Errorf("%+v, %v", p, err)
	}
	var none *Eswitch
	if none.String() != "" {
		t.Error(none)
	}
}
