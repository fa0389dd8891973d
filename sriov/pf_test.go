package sriov

import (
	"context"
	"errors"
	"net"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
	"viaduct/vfio/bind"
)

// What a derived GUID is may never change: subnet managers have it in their partitions.
func TestDeriveGUID(t *testing.T) {
	guid, err := net.ParseMAC("0c:42:a1:03:00:00:00:01")
	if err != nil {
		t.Fatal(err)
	}
	for index, want := range map[int]string{
		0: "0e:42:a1:03:01:00:00:01", 1: "0e:42:a1:03:02:00:00:01", 254: "0e:42:a1:03:ff:00:00:01",
		255:   "0e:42:a1:02:00:00:00:01",
		65534: "0e:42:a1:fc:ff:00:00:01", 65535: "", -1: "",
	} {
		got, err := DeriveGUID(guid, index)
		if got.String() != want || (err == nil) != (want != "") {
			t.Errorf("VF %d has %s, %v, want %s", index, got, err, want)
		}
	}
	if got, err := DeriveGUID(guid[:6], 0); err == nil {
		t.Errorf("%s of six bytes", got)
	}
}

// infiniband is a PF with a port of InfiniBand.
func infiniband(t *testing.T) *hosttest.Kernel {
	k := hosttest.NewKernel(t, hosttest.InfiniBand())
	k.IDs["mlx5_core"] = []string{"15b3:101b"}
	return k
}

// VFs of InfiniBand get GUIDs of the PF's, and no MAC address; a PF is found by its GUIDs.
func TestInfiniBand(t *testing.T) {
	k := infiniband(t)
	s := open(t, k)
	topology, err := s.Topology()
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"guid=0c42:a103:0000:0002", "guid=0c:42:a1:03:00:00:00:01",
		"guid=0x0C42A10300000001"} {
		sel, err := iommu.ParseSelector(text)
		if err != nil {
			t.Fatal(err)
		}
		if d, err := sel.PF(s.Host(), topology); err != nil || d.Name != pf {
			t.Errorf("%s: %v, %v", text, d, err)
		}
	}

	plan := func(settings ...Settings) (*Plan, error) {
		var wish Wish
		for _, one := range settings {
			wish.VFs = append(wish.VFs, VFWish{Settings: one})
		}
		return s.PlanCount(device(t, s, pf), wish)
	}
	stable := Settings{NodeGUID: StableGUID, PortGUID: StableGUID}
	p, err := plan(stable, stable)
	if err != nil {
		t.Fatal(err)
	}
	steps := strings.Join(bind.Commands(p.Steps()), "\n")
	for _, want := range []string{
		"ip link set ibp1s0 vf 0 node_guid 0e:42:a1:03:01:00:00:02",
		"ip link set ibp1s0 vf 1 port_guid 0e:42:a1:03:02:00:00:02",
	} {
		if !strings.Contains(steps, want) {
			t.Errorf("%q is missing in\n%s", want, steps)
		}
	}

	same := Settings{PortGUID: "00:11:22:33:44:55:66:77"}
	for what, c := range map[string]struct {
		vfs  []Settings
		says string
	}{
		"a MAC address": {[]Settings{{MAC: StableMAC}},
			"is InfiniBand, and its VFs have no MAC address: give them node_guid=stable"},
		"twice the same": {[]Settings{same, same},
			"port_guid=00:11:22:33:44:55:66:77 is one value for several VFs"},
		"that of the PF": {[]Settings{{PortGUID: "0c:42:a1:03:00:00:00:02"}},
			"port GUID 0c:42:a1:03:00:00:00:02 already belongs to ibp1s0"},
		"no GUID":            {[]Settings{{PortGUID: "00:11:22:33:44:55:66"}}, "want eight bytes"},
		"of none to be made": {[]Settings{{PortGUID: "0000:0000:0000:0000"}}, "that are not all zero"},
	} {
		if _, err := plan(c.vfs...); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", what, err)
		}
	}
	lab := open(t, small(t))
	if _, err := lab.PlanCount(device(t, lab, pf), Wish{VFs: []VFWish{{Settings: stable}}}); err == nil ||
		!strings.Contains(err.Error(), "has no InfiniBand GUID to derive") {
		t.Errorf("of an Ethernet card: %v", err)
	}
}

// A PF that has gone down since its VFs were made is brought up, and nothing else is done to it.
func TestPFThatWentDown(t *testing.T) {
	k := small(t)
	flags := func(to string) string {
		file := k.Dir() + "/" + pfDir + "/net/enp1s0/flags"
		if to != "" {
			if err := os.WriteFile(file, []byte(to), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(b))
	}
	quiet(t, k, makeVFs(alike(2, UseVFIO)))
	up := flags("")
	quiet(t, k, makeVFs(alike(2, UseVFIO)))
	if len(k.Log) == 0 || flags("") != up {
		t.Errorf("again: %s, was %s", flags(""), up)
	}

	flags("0x1002\n")
	k.Log = nil
	s := open(t, k)
	plan, err := s.Make(t.Context(), parse(pf), alike(2, UseVFIO))
	if err != nil || flags("") != up || len(k.Log) > 0 || !slices.Contains(bind.Commands(plan.Steps()),
		"ip link set dev enp1s0 up") {
		t.Errorf("%v, flags %s, writes %q, steps %q", err, flags(""), k.Log, plan.Steps())
	}
}

// A NIC whose interface is not there, or elsewhere, is said to be so in the same words wherever that matters.
func TestNoInterface(t *testing.T) {
	gone := func(t *testing.T, where map[string][]hosttest.Elsewhere) (*hosttest.Kernel, *Handle) {
		k := hosttest.NewSmallLab(t, "0000:00:05.0", pf)
		for _, name := range []string{"sys/class/net/enp1s0", pfDir + "/net"} {
			if err := os.RemoveAll(k.Dir() + "/" + name); err != nil {
				t.Fatal(err)
			}
		}
		if where != nil {
			if err := errors.Join(os.MkdirAll(k.Dir()+"/run/netns", 0o755),
				os.WriteFile(k.Dir()+"/run/netns/blue", nil, 0o600)); err != nil {
				t.Fatal(err)
			}
			k.Net.Elsewhere = where
		}
		return k, open(t, k)
	}
	wishes := map[string]Wish{
		"VFs":     alike(2, UseNone),
		"setting": {VFs: []VFWish{{Settings: Settings{VLAN: "7"}}}},
		"address": {VFs: []VFWish{{Settings: Settings{MAC: StableMAC}}}},
		"MTU":     {VFs: []VFWish{{}}, MTU: 9000},
	}

	k, s := gone(t, nil)
	for what, wish := range wishes {
		_, err := s.Make(context.Background(), parse(pf), wish)
		if e, ok := errors.AsType[*NoInterfaceError](err); !ok ||
			!strings.Contains(e.Why, "driver igb has not made one") || len(k.Log) > 0 {
			t.Errorf("%s: %v, writes %q", what, err, k.Log)
		}
	}

	_, s = gone(t, map[string][]hosttest.Elsewhere{"run/netns/blue": {{Name: "eth0", Device: pf}}})
	const where = "one (eth0) is in the network namespace of blue"
	for what, wish := range wishes {
		plan, err := s.Make(context.Background(), parse(pf), wish)
		if what == "VFs" {
			if err != nil || !strings.Contains(strings.Join(plan.Notes, "\n"), where) {
				t.Errorf("%s: %v, %+v", what, err, plan)
			}
			if _, err := s.Make(context.Background(), parse(pf), Wish{}); err != nil {
				t.Error(err)
			}
			continue
		}
		if e, ok := errors.AsType[*NoInterfaceError](err); !ok || !strings.Contains(e.Why, where) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// What a driver refuses in mode switchdev is known before the first write.
func TestLegacyOnly(t *testing.T) {
	for driver, c := range map[string]struct {
		settings Settings
		says     string
	}{
		"mlx5_core": {Settings{MAC: StableMAC, VLAN: "7", Trust: on, SpoofChk: on, MaxRate: "7"},
			"does not support vlan, trust, spoofchk for VFs"},
		"ice": {Settings{MAC: StableMAC, VLAN: "7", Trust: on}, "does not support trust for VFs"},
		"igb": {Settings{VLAN: "7", Trust: on}, ""},
	} {
		for _, mode := range []string{switchdev, "legacy"} {
			p := SetPlan{Want: c.settings, Settings: planSettings(Settings{}, c.settings)}
			err := p.possible(&iommu.Device{Driver: driver}, mode)
			if wrong := mode == switchdev && c.says != ""; (err != nil) != wrong || wrong &&
				!strings.Contains(err.Error(), c.says) {
				t.Errorf("%s in mode %s: %v", driver, mode, err)
			}
		}
	}
	none := Settings{VLAN: "0", QoS: "0", Trust: off, SpoofChk: off}
	p := SetPlan{Want: none, Settings: planSettings(Settings{VLAN: "7"}, none)}
	if err := p.possible(&iommu.Device{Driver: "mlx5_core"}, switchdev); err != nil {
		t.Errorf("no VLAN: %v", err)
	}

	// The mode that it has, and the one that it is to have.
	k := switching(t)
	k.Net.Eswitch[pf] = [3]int{1}
	legacyOnly["igb"] = Settings{Trust: off}
	defer delete(legacyOnly, "igb")
	s := open(t, k)
	for what, wish := range map[string]Wish{
		"as it is":    {VFs: []VFWish{{Settings: Settings{Trust: on}}}},
		"as it is to": {VFs: []VFWish{{Settings: Settings{Trust: on}}}, Eswitch: Eswitch{Mode: switchdev}},
	} {
		if _, err := s.Make(t.Context(), parse(pf), wish); err == nil ||
			!strings.Contains(err.Error(), "does not support trust") || len(k.Log) > 0 {
			t.Errorf("%s: %v, writes %q", what, err, k.Log)
		}
	}
	if _, err := s.Make(t.Context(), parse(pf), Wish{VFs: []VFWish{{Settings: Settings{Trust: on}}},
		Eswitch: Eswitch{Mode: "legacy"}}); err != nil {
		t.Errorf("in mode legacy: %v", err)
	}
	if _, err := s.Make(t.Context(), parse(pf), Wish{VFs: []VFWish{{}},
		Eswitch: Eswitch{Mode: switchdev}}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.SetVF(t.Context(), parse(vf0), Settings{Trust: on}); err == nil ||
		!strings.Contains(err.Error(), "does not support trust") {
		t.Errorf("of a VF that is there: %v", err)
	}
}

// A driver's own word for no VLAN is none.
func TestNoVLAN(t *testing.T) {
	value := native.AppendUint32(native.AppendUint32(native.AppendUint32(nil, 0), 4095), 0)
	if got, ok := VLAN.row().decode(value, 6); got != "0" || !ok {
		t.Errorf("4095 is %s, %v", got, ok)
	}
}

// Each error of the kernel's comes with what helps against it, and with the kernel's own line.
func TestHints(t *testing.T) {
	for errno, says := range map[unix.Errno]string{
		unix.ENOMEM: "pci=realloc", unix.ENOENT: "cannot make VFs", unix.ERANGE: "now allows less",
		unix.EBUSY: "something else made VFs",
		unix.EPERM: "SmartNIC", unix.EAGAIN: "try again in a moment", unix.ENOSPC: "not enough queues",
		unix.EINVAL:     "make fewer",
		unix.EOPNOTSUPP: "SR-IOV may be off in the card's firmware (the firmware decides",
		unix.EIO:        "do not agree about its VFs",
	} {
		k := small(t)
		k.Fail = map[string]error{"sys/bus/pci/devices/" + pf + "/sriov_numvfs": errno}
		s := open(t, k)
		if _, err := s.Make(t.Context(), parse(pf), alike(2, UseNone)); !errors.Is(err, errno) ||
			!strings.Contains(err.Error(), says) {
			t.Errorf("%v: %v", errno, err)
		}
		if len(device(t, s, pf).SRIOV.VFs) != 0 {
			t.Errorf("%v: VFs are left", errno)
		}
	}
	for vendor, says := range map[uint16]string{
		0x8086: "virtualization mode", 0x1022: "SR-IOV support", 0x15b3: "SRIOV_EN", 0x14e4: "bnxtnvm",
		0x1924: "sfboot", 0x1234: "",
	} {
		hint := firmwareHint(&iommu.Host{}, &iommu.Device{ID: iommu.ID{Vendor: vendor}})
		if (hint == "") != (says == "") || !strings.Contains(hint, says) {
			t.Errorf("%04x: %q", vendor, hint)
		}
	}
}
