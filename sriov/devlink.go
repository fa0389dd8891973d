package sriov

import (
	"fmt"
	"strings"

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
	var values []string
	for _, v := range p.Values {
		mode := map[uint8]string{0: "now", 1: "from the driver's start", 2: "for the next boot"}[v.CMODE]
		values = append(values, fmt.Sprintf("%v %s", v.Data, mode))
	}
	return "; devlink " + name + ": " + strings.Join(values, ", ")
}
