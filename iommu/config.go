package iommu

import (
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"path"
	"strings"

	"viaduct/internal/host"
)

// ReadSerial reads a device's PCIe serial number, as "00-00-c9-ff-ff-00-00-00", else that of an NVMe controller, which
// its driver tells; "" if it has none. It reads config space, which wakes a sleeping device and, past its first 64
// bytes, needs CAP_SYS_ADMIN.
func ReadSerial(h *Host, a Address) (string, error) {
	f, err := h.File(path.Join(pciDevices, a.String(), "config"))
	if host.Absent(err) {
		return nvmeSerial(h, a)
	}
	if err != nil {
		return "", err
	}
	defer f.Close()
	if serial := serialNumber(f); serial != "" {
		return serial, nil
	}
	return nvmeSerial(h, a)
}

func nvmeSerial(h *Host, a Address) (string, error) {
	dir := path.Join(pciDevices, a.String(), "nvme")
	names, err := h.Names(dir)
	if err != nil || len(names) == 0 {
		return optional("", err)
	}
	serial, err := optional(h.String(path.Join(dir, names[0], "serial")))
	return strings.TrimSpace(serial), err
}

// Answers reports whether a device answers when its config space is read, as one that fell off its bus does not: all
// that is read of it is ones. A PF or other device has to tell its own vendor and device id. A VF has none of its own,
// but its class (SR-IOV 1.1, 3.4.1.1 and 3.4.1.6). It wakes a sleeping device. It is an error if that cannot be read.
func Answers(h *Host, d *Device) (bool, error) {
	f, err := h.File(path.Join(pciDevices, d.Address.String(), "config"))
	if err != nil {
		return false, err
	}
	defer f.Close()
	var b [12]byte
	if n, err := f.ReadAt(b[:], 0); n < len(b) {
		return false, fmt.Errorf("config space of %s: %d bytes: %w", d.Name, n, err)
	}

	if d.PhysFn != nil {
		return binary.LittleEndian.Uint32(b[8:]) != math.MaxUint32, nil
	}
	vendor, device := binary.LittleEndian.Uint16(b[0:]), binary.LittleEndian.Uint16(b[2:])
	return vendor == d.Vendor && device == d.Device, nil
}

// serialNumber decodes the Device Serial Number capability (PCIe base specification 7.9.3: id 3, lower dword first).
func serialNumber(config io.ReaderAt) string {
	at := extendedCapability(config, 0x0003)
	if at == 0 {
		return ""
	}
	var number [8]byte
	if n, _ := config.ReadAt(number[:], int64(at)+4); n < len(number) {
		return ""
	}
	b := binary.BigEndian.AppendUint64(nil, binary.LittleEndian.Uint64(number[:]))
	return strings.ReplaceAll(fmt.Sprintf("% x", b), " ", "-")
}

// extendedCapability finds an extended capability's offset in config space, 0 if it is not there. The list begins at
// 100h; each header is id, version and the next offset (PCIe base specification 7.6.3). Only the headers are read: each
// four bytes are a transaction with the device.
func extendedCapability(config io.ReaderAt, id uint16) int {
	const first, size = 0x100, 0x1000
	at := first
	for range (size - first) / 8 {
		// No longer list fits, so a loop ends here.
		var b [4]byte
		if at < first || at+4 > size {
			return 0
		}
		if n, _ := config.ReadAt(b[:], int64(at)); n < len(b) {
			return 0
		}
		header := binary.LittleEndian.Uint32(b[:])
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
