package vfio_test

import (
	"fmt"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
	"viaduct/vfio"
)

// A virtual machine monitor needs these nodes, and nothing else of the host, to have a device.
func ExampleNodes() {
	captured, remove := hosttest.LabFolder()
	defer remove()
	h, err := iommu.Open(captured)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer h.Close()
	d, err := iommu.ReadDevice(h, iommu.Address{Bus: 7, Device: 1})
	if err != nil {
		fmt.Println(err)
		return
	}

	nodes, err := vfio.Nodes(h, &d)
	fmt.Println(nodes, err)
	// Output:
	// [/dev/vfio/7] <nil>
}
