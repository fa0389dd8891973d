package bind_test

import (
	"context"
	"fmt"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
	"viaduct/vfio/bind"
)

// On a running host Move takes the device, and what shares its group; on this captured one it says what it would do.
// The program begins with ServeWrites: see the package's description.
func ExampleHandle_Move() {
	captured, remove := hosttest.LabFolder()
	defer remove()
	h, err := iommu.Open(captured)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer h.Close()
	b, err := bind.Open(h, bind.Options{})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer b.Close()

	results, err := b.Move(context.Background(), bind.Take(bind.Auto), iommu.Address{Bus: 7, Device: 1})
	for _, r := range results {
		fmt.Printf("%s from %q\n", r.Device, r.From)
		for _, s := range r.Steps {
			fmt.Println(" ", s)
		}
	}
	fmt.Println(err)
	// Output:
	// 0000:07:01.0 from "e1000"
	//   /sbin/modprobe vfio_pci
	//   echo vfio-pci > /sys/bus/pci/devices/0000:07:01.0/driver_override
	//   echo 0000:07:01.0 > /sys/bus/pci/drivers/e1000/unbind
	//   echo 0000:07:01.0 > /sys/bus/pci/drivers_probe
	// 0000:07:02.0 from ""
	//   /sbin/modprobe vfio_pci
	//   echo vfio-pci > /sys/bus/pci/devices/0000:07:02.0/driver_override
	//   echo 0000:07:02.0 > /sys/bus/pci/drivers_probe
	// <nil>
}
