package iommu

import (
	"fmt"
	"runtime"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// firmwares is where a snapshot has the versions of network cards' firmware, which no file of the kernel tells: a line
// for each interface, with its name first.
const firmwares = "viaduct/firmware-versions"

// FirmwareVersion is the version of the firmware of the card that an interface is of, as its driver tells it; "" if it
// tells none, or nobody can be asked.
func FirmwareVersion(h *Host, netdev string) (string, error) {
	if h.Live() {
		return askFirmware(h, netdev), nil
	}
	text, err := h.Read(firmwares)
	if err != nil {
		return "", unlessAbsent(err)
	}
	for line := range strings.Lines(string(text)) {
		if name, version, _ := strings.Cut(strings.TrimSpace(line), " "); name == netdev {
			return version, nil
		}
	}
	return "", nil
}

// askFirmware asks by ETHTOOL_GDRVINFO (include/uapi/linux/ethtool.h). Who does not answer is not known.
func askFirmware(h *Host, netdev string) string {
	if len(netdev) >= unix.IFNAMSIZ {
		return ""
	}
	info := unix.EthtoolDrvinfo{Cmd: unix.ETHTOOL_GDRVINFO}
	var request struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}
	copy(request.name[:], netdev)
	request.data = unsafe.Pointer(&info)
	_, err := h.Ioctl(-1, netdev, unix.SIOCETHTOOL, unsafe.Pointer(&request))
	runtime.KeepAlive(&info)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(unix.ByteSliceToString(info.Fw_version[:]))
}

// firmwareText is what a snapshot has of them; nil if there are none.
func firmwareText(h *Host) ([]byte, error) {
	if !h.Live() {
		text, err := h.Read(firmwares)
		return text, unlessAbsent(err)
	}
	names, err := h.Names(netClass)
	if err != nil {
		return nil, unlessAbsent(err)
	}
	var out []byte
	for _, n := range slices.Sorted(slices.Values(names)) {
		if version := askFirmware(h, n); version != "" {
			out = fmt.Appendln(out, n, version)
		}
	}
	return out, nil
}
