package sriov

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/internal/filelock"
	"viaduct/internal/host/hosttest"
	"viaduct/internal/journal"
	"viaduct/iommu"
	"viaduct/vfio/bind"
)

// A PF or VF that another process changes is not changed, and what is no PF or VF is told.
func TestBusyPF(t *testing.T) {
	k := small(t)
	quiet(t, k, makeVFs(alike(2, UseNone)))
	lock, err := filelock.Open(k.Dir() + "/" + journal.Dir + "/lock")
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	ctx, before := context.Background(), look(t, k)
	busy := func(what string, err error) {
		t.Helper()
		if !isA[*bind.BusyError](err) {
			t.Errorf("%s: %v", what, err)
		}
	}
	byteOf := func(address string) int64 {
		a := parse(address)
		return int64(a.Bus)<<8 | int64(a.Device)<<3 | int64(a.Function)
	}

	for _, address := range []string{vf0, pf} {
		if ok, err := lock.Try(byteOf(address)); !ok || err != nil {
			t.Fatal(ok, err)
		}
		s, err := Open(&iommu.Host{Host: k.Host()}, bind.Options{Timeout: 20 * time.Millisecond})
		if err != nil {
			t.Fatal(err)
		}
		_, err = s.SetVF(ctx, parse(vf0), Settings{VLAN: "7"})
		busy("set, "+address+" is another's", err)
		_, err = s.Make(ctx, parse(pf), Wish{})
		busy("destroy, "+address+" is another's", err)
		s.Close()
		lock.Free(byteOf(address))
	}
	if now := look(t, k); !now.same(before) {
		t.Errorf("changed: %s\nwas %s", now, before)
	}

	s := open(t, k)
	_, err = s.SetVF(ctx, parse(pf), Settings{VLAN: "7"})
	if !isA[*NotVFError](err) {
		t.Errorf("a PF was set as a VF: %v", err)
	}
	_, err = s.SetVF(ctx, parse("0000:0f:00.0"), Settings{VLAN: "7"})
	if !errors.Is(err, iommu.ErrNotFound) {
		t.Errorf("what is not there: %v", err)
	}
	_, err = s.Make(ctx, parse(vf0), alike(1, UseNone))
	if !isA[*NotPFError](err) || !strings.Contains(err.Error(), "is a VF of "+pf) {
		t.Errorf("VFs of a VF: %v", err)
	}
	_, err = s.Make(ctx, parse(edu), alike(1, UseNone))
	if !isA[*NotPFError](err) || !strings.Contains(err.Error(), "no SR-IOV capability") {
		t.Errorf("VFs of what has none: %v", err)
	}
	_, err = s.Make(ctx, parse(pf), alike(8, UseNone))
	if !isA[*RangeError](err) || !strings.Contains(err.Error(), "can have 0 to 7 VFs, not 8") {
		t.Errorf("too many: %v", err)
	}
}

// Settings of VFs whose PF has no interface are refused, but for those that need none.
func TestWithoutInterface(t *testing.T) {
	k := sharing(t)
	s := open(t, k)
	quiet(t, k, func(ctx context.Context, s *Handle) error {
		_, err := s.Make(ctx, parse(nvmePFAddress), alike(1, UseNone))
		return err
	})
	d := device(t, s, nvmePFAddress)
	for want, says := range map[Key]string{VLAN: "has no network interface here: it is not a NIC, so viaduct cannot set vlan of its VFs", MAC: "so there is no MAC address to derive"} {
		_, err := s.SetVF(context.Background(), d.SRIOV.VFs[0].Address,
			Settings{want: map[Key]string{VLAN: "7", MAC: StableMAC}[want]})
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", want, err)
		}
	}
}

// Interrupt vectors are a VF's while it has no driver.
func TestVectorsOfVFs(t *testing.T) {
	for use, says := range map[Use]string{UseNone: "", UseVFIO: "only while it has no driver"} {
		k := switching(t)
		quiet(t, k, makeVFs(alike(1, use)))
		unverified, err := setVF(t, k, Settings{MSIX: "3"})
		if (err == nil) != (says == "") || err != nil && !strings.Contains(err.Error(), says) ||
			err == nil && !slices.Equal(unverified, []Key{MSIX}) {
			t.Errorf("%s: %v, not verified %v", use, err, unverified)
		}
	}
}

// VFs that share a group are told of.
func TestSharedGroups(t *testing.T) {
	one, two := 1, 2
	notes := sharedGroups(&iommu.Device{Name: "pf", Group: &one}, []*iommu.Device{
		{Name: "a", Group: &one}, {Name: "b", Group: &two}, {Name: "c", Group: &two}, {Name: "d"},
	})
	want := []string{
		"a shares IOMMU group 1 with pf: they can be taken only together",
		"c shares IOMMU group 2 with b: they can be taken only together",
	}
	if !slices.Equal(notes, want) {
		t.Errorf("%q", notes)
	}
}

// A VF for the host that vfio-pci claims is told with who claims it, and undone.
func TestClaimedVF(t *testing.T) {
	k := hosttest.NewLab(t, hosttest.Tree{"proc/cmdline": "vfio-pci.ids=8086:10ca\n"})
	if err := os.RemoveAll(k.Dir() + "/sys/bus/pci/drivers/igbvf"); err != nil {
		t.Fatal(err)
	}
	k.Register("vfio-pci", "8086:10ca")
	_, err := setCount(t, context.Background(), k, alike(1, UseHome))
	if err == nil || !strings.Contains(err.Error(), "the kernel bound it to vfio-pci, because vfio-pci.ids= in ") {
		t.Error(err)
	}
	if got := state(t, k); got != "1" {
		t.Errorf("left %s", got)
	}
}

// Records of changes that cannot be finished, as what they are about is not there any more, are told of once.
func TestOddRecords(t *testing.T) {
	old, err := json.Marshal(setRecord{VF: parse(vf0), Old: Settings{VLAN: "7"}})
	if err != nil {
		t.Fatal(err)
	}

	for name, c := range map[string]struct {
		host func(*testing.T) *hosttest.Kernel
		pf   string
		call bind.Recoverer
		data string
		says string
		err  bool
	}{
		"no VF any more":  {small, pf, recoverSet, string(old), "no longer has vf0", false},
		"no interface":    {sharing, nvmePFAddress, recoverSet, string(old), "no longer has an interface", false},
		"torn settings":   {small, pf, recoverSet, "{", "has a record that cannot be read", true},
		"torn count":      {small, pf, recoverCount, "{", "has a record that cannot be read", true},
		"no device":       {small, "0000:0f:00.0", recoverCount, "{}", "cannot be read", true},
		"no device's VFs": {small, "0000:0f:00.0", recoverSet, string(old), "cannot be read", true},
		"no PF any more":  {small, edu, recoverCount, `{"have":2,"want":1}`, "cannot have any", false},
	} {
		s := open(t, c.host(t))
		if err := s.LockAt(context.Background(), parse(c.pf)); err != nil {
			t.Fatal(err)
		}
		what, err := c.call(context.Background(), s.Handle, parse(c.pf), json.RawMessage(c.data))
		if (err != nil) != c.err || !strings.Contains(what, c.says) {
			t.Errorf("%s: %q, %v", name, what, err)
		}
	}
}

// What is read of an e-switch's ports and fails is told, and no VF is taken for another's.
func TestPortsThatFail(t *testing.T) {
	k := hosttest.NewLab(t, hosttest.Tree{
		"sys/class/net/rep0":                                  "-> ../../devices/virtual/net/rep0",
		"sys/devices/virtual/net/rep0/phys_switch_id":         "deadbeef\n",
		"sys/devices/virtual/net/rep0/phys_port_name":         "pf0vf0\n",
		"sys/devices/virtual/net/rep0/device":                 "-> ../../../pci0000:00/0000:00:05.0/" + pf,
		"sys/class/net/p0":                                    "-> ../../devices/virtual/net/p0",
		"sys/devices/virtual/net/p0/phys_switch_id":           "deadbeef\n",
		"sys/devices/virtual/net/p0/phys_port_name":           "p0\n",
		"sys/class/net/foreign":                               "-> ../../devices/virtual/net/foreign",
		"sys/devices/virtual/net/foreign/phys_switch_id":      "cafe\n",
		"sys/devices/virtual/net/foreign/phys_port_name":      "pf0vf1\n",
		"sys/devices/virtual/net/not-a-port/phys_port_name":   "pf0vf2\n",
		"sys/class/net/not-a-port":                            "-> ../../devices/virtual/net/not-a-port",
		"sys/devices/virtual/net/not-a-port/operstate":        "up\n",
		"sys/devices/virtual/net/not-a-port/addr_assign_type": "0\n",
	})

	h := &iommu.Host{Host: k.Host()}
	port := &Port{PF: &iommu.Device{Address: parse(pf)}, SwitchID: "deadbeef"}
	hosttest.EachFailure(t, k, "ports", func() (any, error) {
		ports, err := ReadPorts(h, port)
		if err == nil && (len(ports.VFs) != 1 || ports.VFs[0] != "rep0" ||
			!slices.Equal(ports.Uplinks, []string{"p0"})) {
			err = errors.New("other ports")
		}
		return ports, err
	})

	for _, none := range []*Port{nil, {}} {
		if ports, err := ReadPorts(h, none); err != nil || len(ports.VFs) > 0 {
			t.Errorf("%+v, %v", ports, err)
		}
	}

	k.SetFault(func(op, name string) error {
		if strings.HasSuffix(name, "phys_switch_id") {
			return unix.EOPNOTSUPP
		}
		return nil
	})
	defer k.Revive()
	if ports, err := ReadPorts(h, port); err != nil || len(ports.VFs) > 0 {
		t.Errorf("no port of a switch: %+v, %v", ports, err)
	}
}
