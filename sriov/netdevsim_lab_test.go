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
	"viaduct/vfio/holder"
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
	if err := os.WriteFile("/sys/kernel/debug/netdevsim/netdevsim7/max_vfs", []byte(strconv.Itoa(vfs)),
		0o600); err != nil {
		t.Fatal(err)
	}
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

// carryOut makes a plan's settings and reads them back. Nothing is remembered of a PF that is no PCI device.
func carryOut(t *testing.T, s *Handle, p *SetPlan) *Port {
	t.Helper()
	over, err := p.port.open()
	if err != nil {
		t.Fatal(err)
	}
	defer over.close()
	if _, err := s.makeAll(context.Background(), over, p); err != nil {
		t.Fatal(err)
	}
	now, err := over.again() // udev may have renamed it meanwhile
	if err != nil {
		t.Fatal(err)
	}
	if unverified, err := p.verify(now); err != nil || len(unverified) > 0 {
		t.Fatalf("%s: %v, not verified: %v", p.VF.Name, err, unverified)
	}
	return now
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
		MAC: "52:54:00:79:00:02", VLAN: "100", QoS: "3", Proto: dot1ad, Trust: on, SpoofChk: on, LinkState: "enable",
		MinRate: "10", MaxRate: "100", RSSQuery: on,
	}
	port, err := ReadPort(h, pf)
	if err != nil || len(port.VFs) != 4 {
		t.Fatalf("%+v, %v", port, err)
	}
	now, _ := port.Of(2)
	plan := &SetPlan{VF: vf, Want: want, Settings: planSettings(now.Settings, want), port: port}
	port = carryOut(t, s, plan)
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

// TestNetdevsimMany: with more VFs than a list of them has room for, each is told as it is, and none as another.
func TestNetdevsimMany(t *testing.T) {
	for _, n := range []int{256, 600} {
		t.Run(strconv.Itoa(n), func(t *testing.T) {
			h, pf := simulated(t, n)
			s, err := Open(h, bind.Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			want := map[int]Settings{}
			for _, i := range []int{0, 214, 215, 255, n - 1} {
				want[i] = Settings{
					MAC:   fmt.Sprintf("52:54:00:7a:%02x:%02x", i/256, i%256),
					VLAN:  strconv.Itoa(i + 1),
					Trust: on,
				}
			}
			for i, settings := range want {
				port, err := ReadPort(h, interfaces(t, pf))
				if err != nil {
					t.Fatal(err)
				}
				now, _ := port.Of(i)
				vf := &iommu.Device{Name: fmt.Sprintf("vf%d", i), VFIndex: i}
				plan := &SetPlan{VF: vf, Want: settings, Settings: planSettings(now.Settings, settings), port: port}
				carryOut(t, s, plan)
			}

			port, err := ReadPort(h, interfaces(t, pf))
			if err != nil {
				t.Fatal(err)
			}
			if len(port.VFs) != n {
				t.Errorf("%d VFs are told of %d", len(port.VFs), n)
			}
			for at, vf := range port.VFs {
				settings := want[at]
				if settings == nil {
					settings = Settings{VLAN: "0", Trust: off}
				}
				if wrong, unknown := compare(vf.Settings, settings); vf.Index != at || len(wrong)+len(unknown) > 0 {
					t.Fatalf("vf%d is told as vf%d: %v, not known: %v", at, vf.Index, wrong, unknown)
				}
				if vf.Stats == nil || *vf.Stats != (Stats{}) {
					t.Fatalf("the counters of vf%d, which counts nothing, are %v", at, vf.Stats)
				}
			}
		})
	}
}

// TestFlappingAddress: none of a thousand looks at who uses a NIC fails while an address comes and goes.
func TestFlappingAddress(t *testing.T) {
	h, err := iommu.Open("")
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	topology, err := iommu.Scan(h)
	if err != nil {
		t.Fatal(err)
	}
	var nic *iommu.Device
	topology.All(func(d *iommu.Device) bool {
		if len(d.Netdevs) > 0 && d.PCI {
			nic = d
		}
		return nic == nil
	})
	if nic == nil {
		t.Fatal("the host has no NIC")
	}
	flap := exec.Command("sh", "-c", `ip link add flap type dummy
		for n in $(seq 2 200); do ip addr add 198.51.100.$n/32 dev flap; done
		while ip addr add 198.51.100.1/32 dev flap && ip addr del 198.51.100.1/32 dev flap; do :; done`)
	if err := flap.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = flap.Process.Kill()
		_ = flap.Wait()
		_ = exec.Command("ip", "link", "del", "flap").Run()
	}()

	failed := 0
	for range 1000 {
		if _, err := holder.Find(h, []*iommu.Device{nic}); err != nil {
			failed++
			t.Log(err)
		}
	}
	if failed > 0 {
		t.Errorf("%d of 1000 looks failed", failed)
	}
}

// TestNetdevsimEswitch changes the mode of the simulated NIC's e-switch, and finds each VF's representor while there
// are some.
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
			if err := setNamedTCOffload(h, o.Name, o.On); err != nil {
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
