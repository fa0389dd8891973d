//go:build lab

package sriov

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"viaduct/internal/journal"
	"viaduct/iommu"
	"viaduct/vfio"
)

// TestMain serves the writes of the tests' binders: the child is this program again.
func TestMain(m *testing.M) {
	if vfio.ServeWrites() {
		return
	}
	os.Exit(m.Run())
}

// TestNetdevsim sets all that the kernel's simulated NIC knows; it has no PCI function, only a network interface. It runs as
// root in the lab (hack/test).
func TestNetdevsim(t *testing.T) {
	const bus = "/sys/bus/netdevsim/"
	write := func(file, text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o200); err != nil {
			t.Fatal(err)
		}
	}
	write(bus+"new_device", "7 1")
	defer write(bus+"del_device", "7")
	write(bus+"devices/netdevsim7/sriov_numvfs", "4")
	if err := exec.Command("udevadm", "settle").Run(); err != nil { // it names the interfaces
		t.Fatal(err)
	}
	found, err := filepath.Glob(bus + "devices/netdevsim7/net/*")
	if err != nil || len(found) != 1 {
		t.Fatalf("interfaces: %v, %v", found, err)
	}
	h, err := iommu.Open("")
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	a, _ := iommu.ParseAddress("ffff:00:00.0")
	pf := &iommu.Device{Name: "netdevsim7", Address: a, Driver: "netdevsim", Netdevs: []string{filepath.Base(found[0])}}
	vf := &iommu.Device{Name: "vf2", VFIndex: 2}
	b := &vfio.Binder{Host: h, Journal: journal.In(t.TempDir())}
	defer b.Close()
	want := Settings{
		MAC: "52:54:00:79:00:02", VLAN: "100", QoS: "3", Proto: dot1ad, Trust: on, SpoofChk: on, LinkState: "enable", MinRate: "10", MaxRate: "100", RSSQuery: on,
	}
	port, err := ReadPort(h, pf)
	if err != nil || len(port.VFs) != 4 {
		t.Fatalf("%+v, %v", port, err)
	}
	now, _ := port.Of(2)
	plan := &SetPlan{VF: vf, Want: want, Settings: planSettings(now.Settings, want), port: port}
	unverified, err := set(context.Background(), b, plan)
	if err != nil || len(unverified) > 0 {
		t.Fatalf("%v, not verified: %v", err, unverified)
	}
	if port, err = port.again(); err != nil { // udev may have renamed it meanwhile
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
