package iommu

import (
	"encoding/binary"
	"fmt"
	"path"
	"strings"

	"viaduct/internal/host"
)

// ReadSerial reads a device's PCIe serial number, as "00-00-c9-ff-ff-00-00-00"; "" if it has none. It reads config space,
// which wakes a sleeping device and, past its first 64 bytes, needs CAP_SYS_ADMIN.
func ReadSerial(h *Host, a Address) (string, error) {
	b, err := h.Read(path.Join(pciDevices, a.String(), "config"))
	if host.Absent(err) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	return serialNumber(b), nil
}

// serialNumber decodes the Device Serial Number capability (PCIe base specification 7.9.3: id 3, lower dword first).
func serialNumber(config []byte) string {
	at := extendedCapability(config, 0x0003)
	if at == 0 || at+12 > len(config) {
		return ""
	}
	low, high := binary.LittleEndian.Uint32(config[at+4:]), binary.LittleEndian.Uint32(config[at+8:])
	b := binary.BigEndian.AppendUint64(nil, uint64(high)<<32|uint64(low))
	return strings.ReplaceAll(fmt.Sprintf("% x", b), " ", "-")
}

// extendedCapability finds an extended capability's offset in config space, 0 if it is not there. The list begins at 100h;
// each header is id, version and the next offset (PCIe base specification 7.6.3).
func extendedCapability(config []byte, id uint16) int {
	const first, size = 0x100, 0x1000
	at := first
	for range (size - first) / 8 { // no longer list fits, so a loop ends here
		if at < first || at+4 > len(config) {
			return 0
		}
		header := binary.LittleEndian.Uint32(config[at:])
		if header == 0 || header == 0xffffffff {
			return 0
		}
		if uint16(header) == id {
			return at
		}
		at = int(header >> 20 &^ 3)
	}
	return 0
}
