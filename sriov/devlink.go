package sriov

import (
	"fmt"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"viaduct/internal/netlink"
	"viaduct/iommu"
)

// devlinkParam is a devlink parameter's values as an addition to a sentence, "" where there is none.
func devlinkParam(h *iommu.Host, d *iommu.Device, name string) string {
	if !h.Live() {
		return ""
	}
	answer, err := askDevlink(h, nl.DEVLINK_CMD_PARAM_GET, "pci", d.Name,
		nl.NewRtAttr(nl.DEVLINK_ATTR_PARAM_NAME, nl.ZeroTerminated(name)))
	values := decodeParam(answer)
	if err != nil || len(values) == 0 {
		return ""
	}
	return "; devlink " + name + ": " + strings.Join(values, ", ")
}

// decodeParam reads the values of a devlink parameter, each with when it is in force.
func decodeParam(b []byte) []string {
	var kind byte
	var out []string
	netlink.Attributes(b, func(attribute uint16, v []byte) {
		if attribute != nl.DEVLINK_ATTR_PARAM {
			return
		}
		netlink.Attributes(v, func(attribute uint16, v []byte) {
			switch {
			case attribute == nl.DEVLINK_ATTR_PARAM_TYPE && len(v) > 0:
				kind = v[0]
			case attribute == nl.DEVLINK_ATTR_PARAM_VALUES_LIST:
				netlink.Attributes(v, func(_ uint16, v []byte) { out = append(out, decodeParamValue(kind, v)) })
			}
		})
	})
	return out
}

func decodeParamValue(kind byte, b []byte) string {
	// Of a switch that is off there is no value.
	value, when := "false", ""
	netlink.Attributes(b, func(attribute uint16, v []byte) {
		switch {
		case attribute == nl.DEVLINK_ATTR_PARAM_VALUE_CMODE && len(v) > 0:
			when = map[byte]string{0: "now", 1: "from the driver's start", 2: "for the next boot"}[v[0]]
		case attribute != nl.DEVLINK_ATTR_PARAM_VALUE_DATA:
		case kind == nl.DEVLINK_PARAM_TYPE_BOOL:
			value = "true"
		case kind == nl.DEVLINK_PARAM_TYPE_STRING:
			value = unix.ByteSliceToString(v)
		case len(v) >= 4:
			value = fmt.Sprint(native.Uint32(v))
		case len(v) >= 2:
			value = fmt.Sprint(native.Uint16(v))
		case len(v) >= 1:
			value = fmt.Sprint(v[0])
		}
	})
	return strings.TrimSpace(value + " " + when)
}
