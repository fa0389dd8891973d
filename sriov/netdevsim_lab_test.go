//go:build lab

package sriov

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"viaduct/iommu"
	"viaduct/vfio/bind"
)

// TestMain serves the writes of the tests' binders: the child is this program again.
func TestMain(m *testing.M) {
	if bind.ServeWrites() {
		return
	}
	os.Exit(m.Run())
}

const simulator = "/sys/bus/netdevsim/"

// simulated makes one of the kernel's simulated NICs, with VFs. It has no PCI function, only network interfaces.
func simulated(t *testing.T, vfs int) (*iommu.Host, *iommu.Device) {
	t.Helper()
	write := func(file, text string) {
		t.Helper()
		if err := os.WriteFile(simulator+file, []byte(text), 0o200); err != nil {
			t.Fatal(err)
		}
	}
	write("new_device", "7 1")
	t.Cleanup(func() { write("del_device", "7") })
	write("devices/netdevsim7/sriov_numvfs", strconv.Itoa(vfs))
	udevSettle(t)
	h, err := iommu.Open("")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	a, _ := iommu.ParseAddress("ffff:00:00.0")
	return h, interfaces(t, &iommu.Device{Name: "netdevsim7", Address: a, Driver: "netdevsim"})
}

// udevSettle waits until udev has named the interfaces.
func udevSettle(t *testing.T) {
	t.Helper()
	if err := exec.Command("udevadm", "settle").Run(); err != nil {
		t.Fatal(err)
	}
}

// interfaces gives the device its interfaces as they are called now.
func interfaces(t *testing.T, pf *iommu.Device) *iommu.Device {
	t.Helper()
	found, err := filepath.Glob(simulator + "devices/" + pf.Name + "/net/*")
	if err != nil || len(found) == 0 {
		t.Fatalf("interfaces: %v, %v", found, err)
	}
	now := *pf
	now.Netdevs = nil
	for _, f := range found {
		now.Netdevs = append(now.Netdevs, filepath.Base(f))
	}
	return &now
}

// TestNetdevsim sets all that the kernel's simulated NIC knows. It runs as root in the lab (hack/test).
func TestNetdevsim(t *testing.T) {
	h, pf := simulated(t, 4)
	vf := &iommu.Device{Name: "vf2", VFIndex: 2}
	s, err := Open(h, bind.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	want := Settings{
		MAC: "52:54:00:79:00:02", VLAN: "100", QoS: "3", Proto: dot1ad, Trust: on, SpoofChk: on, LinkState: "enable", MinRate: "10", MaxRate: "100", RSSQuery: on,
	}
	port, err := ReadPort(h, pf)
	if err != nil || len(port.VFs) != 4 {
		t.Fatalf("%+v, %v", port, err)
	}
	now, _ := port.Of(2)
	plan := &SetPlan{VF: vf, Want: want, Settings: planSettings(now.Settings, want), port: port}
	unverified, err := s.makeOrUndo(context.Background(), plan)
	if err != nil || len(unverified) > 0 {
		t.Fatalf("%v, not verified: %v", err, unverified)
	}
	over, err := port.open()
	if err != nil {
		t.Fatal(err)
	}
	defer over.close()
	if port, err = over.again(); err != nil { // udev may have renamed it meanwhile
		t.Fatal(err)
	}
	now, _ = port.Of(2)
	if wrong, unknown := compare(now.Settings, want); len(wrong)+len(unknown) > 0 {
		t.Errorf("wrong %v, unknown %v", wrong, unknown)
	}
	other, _ := port.Of(1)
	if other.Settings[VLAN] != "0" || strings.Contains(other.Settings[MAC], "79:00") {
		t.Errorf("another VF was set: %v", other.Settings)
	}
	if left := planSettings(now.Settings, want); len(left) > 0 {
		t.Errorf("what is right already would be set again: %v", left)
	}
}

// TestNetdevsimEswitch changes the mode of the simulated NIC's e-switch, and finds each VF's representor while there are some.
func TestNetdevsimEswitch(t *testing.T) {
	h, pf := simulated(t, 3)
	for _, mode := range []string{switchdev, legacy, switchdev, legacy} {
		if err := setEswitch(h, "netdevsim", pf.Name, Eswitch{Mode: mode}); err != nil {
			t.Fatal(err)
		}
		now, err := readEswitch(h, "netdevsim", pf.Name)
		if err != nil || now == nil || now.Mode != mode {
			t.Fatalf("%+v, %v, want %s", now, err, mode)
		}
		udevSettle(t)
		port, err := ReadPort(h, interfaces(t, pf))
		if err != nil || port == nil {
			t.Fatalf("%v, %v", port, err)
		}
		ports, err := ReadPorts(h, port)
		if err != nil {
			t.Fatal(err)
		}
		want := 0
		if mode == switchdev {
			want = 3
		}
		if len(ports.VFs) != want || len(ports.Uplinks) != 1 || ports.Uplinks[0] != port.Name {
			t.Errorf("%s: %+v, want %d representors and %s", mode, ports, want, port.Name)
		}
		for vf, name := range ports.VFs {
			said, err := exec.Command("ip", "-d", "link", "show", "dev", name).Output()
			if err != nil || !strings.Contains(string(said), fmt.Sprintf("portname pf0vf%d ", vf)) {
				t.Errorf("vf%d: ip says of %s: %s, %v", vf, name, said, err)
			}
		}
	}
	own := interfaces(t, pf)
	for _, want := range []string{off, on} {
		changes, err := offloadsBut(h, own, want)
		if err != nil || len(changes) > 1 {
			t.Fatalf("%v, %v", changes, err)
		}
		for _, o := range changes {
			if err := setTCOffload(h, o.Name, o.On); err != nil {
				t.Error(err)
			}
			said, err := exec.Command("ethtool", "-k", o.Name).Output()
			if err != nil || !strings.Contains(string(said), "hw-tc-offload: "+want) {
				t.Errorf("ethtool says %s, %v; want hw-tc-offload %s", said, err, want)
			}
		}
	}
	err := setEswitch(h, "netdevsim", pf.Name, Eswitch{Inline: "link"})
	if !errors.Is(err, unix.EOPNOTSUPP) {
		t.Errorf("an inline mode, which netdevsim has not: %v", err)
	}
}
