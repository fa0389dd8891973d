package sriov

import (
	"fmt"

	"github.com/vishvananda/netlink"

	"viaduct/iommu"
)

// devlinkParam is a devlink parameter's values as an addition to a sentence, "" where there is none.
func devlinkParam(h *iommu.Host, d *iommu.Device, name string) string {
	if !h.Live() {
		return ""
	}
	p, err := netlink.DevlinkGetDeviceParamByName("pci", d.Name, name)
	if err != nil {
		return ""
	}
	text := "; devlink " + name + ":"
	for _, v := range p.Values {
		mode := map[uint8]string{0: "now", 1: "from the driver's start", 2: "for the next boot"}[v.CMODE]
		text += fmt.Sprintf(" %v %s", v.Data, mode)
	}
	return text
}
