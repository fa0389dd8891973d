package sriov_test

import (
	"context"
	"fmt"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/bind"
)

// On a running host Make gives the PF its VFs; on this captured one it plans. The program begins with bind.ServeWrites.
func ExampleHandle_Make() {
	captured, remove := hosttest.LabFolder()
	defer remove()
	h, err := iommu.Open(captured)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer h.Close()
	s, err := sriov.Open(h, bind.Options{})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer s.Close()

	guests := sriov.VFWish{
		Use:      sriov.UseVFIO,
		Settings: sriov.Settings{sriov.MAC: "52:54:00:aa:00:01", sriov.VLAN: "100"},
	}
	plan, err := s.Make(context.Background(), iommu.Address{Bus: 1}, sriov.Wish{VFs: sriov.Repeat(1, guests)})
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, step := range plan.Steps() {
		fmt.Println(step)
	}
	// Output:
	// echo 0 > /sys/bus/pci/devices/0000:01:00.0/sriov_drivers_autoprobe
	// echo 1 > /sys/bus/pci/devices/0000:01:00.0/sriov_numvfs
	// echo none > /sys/bus/pci/devices/0000:01:00.0/virtfn0/driver_override
	// echo 1 > /sys/bus/pci/devices/0000:01:00.0/sriov_drivers_autoprobe
	// ip link set enp1s0 vf 0 mac 52:54:00:aa:00:01
	// ip link set enp1s0 vf 0 vlan 100
}

func ExampleParseSettings() {
	s, err := sriov.ParseSettings([]string{"mac=52-54-00-AB-CD-EF", "vlan=100"})
	fmt.Println(s.Text(), err)
	_, err = sriov.ParseSettings([]string{"vlan=5000"})
	fmt.Println(err)
	// Output:
	// mac=52:54:00:ab:cd:ef vlan=100 <nil>
	// vlan=5000: want a number from 0 to 4094
}
