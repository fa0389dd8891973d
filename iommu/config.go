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
	f, err := h.File(configOf(a))
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

func configOf(a Address) string { return path.Join(pciDevices, a.String(), "config") }

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
	f, err := h.File(configOf(d.Address))
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
	list, _ := extendedCapabilities(config, 0x0003)
	at := offsetOf(list, 0x0003)
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

// Capability is an entry of one of the two lists of a function's config space.
type Capability struct {
	ID     uint16
	Offset int
}

// offsetOf is where the first capability of that id is, as the kernel takes it; 0 if there is none.
func offsetOf(list []Capability, id uint16) int {
	for _, c := range list {
		if c.ID == id {
			return c.Offset
		}
	}
	return 0
}

// Where the two parts of config space begin and end (PCIe base specification 7.2).
const (
	standardStart = 0x40
	extendedStart = 0x100
	configEnd     = 0x1000
)

// allCapabilities is for who looks for none in particular.
const allCapabilities = -1

// extendedCapabilities reads the list that begins at 100h, up to a capability of the id that is looked for; each header
// is id, version and the next offset (PCIe base specification 7.6.3). Only the headers are read: each four bytes are a
// transaction with the device. The list is whole unless config space ends before it does.
func extendedCapabilities(config io.ReaderAt, last int) (list []Capability, whole bool) {
	at := extendedStart
	for range (configEnd - extendedStart) / 8 {
		// No longer list fits, so a loop ends here.
		if at < extendedStart || at+4 > configEnd {
			return list, true
		}
		header, ok := dword(config, at)
		if !ok {
			return list, false
		}
		if header == 0 || header == math.MaxUint32 {
			return list, true
		}

		list = append(list, Capability{uint16(header), at})
		if int(uint16(header)) == last {
			return list, true
		}
		at = int(header >> 20 &^ 3)
	}
	return list, true
}

// standardCapabilities reads the list that begins where the header says (PCI Local Bus Specification 3.0, 6.7).
func standardCapabilities(config io.ReaderAt, at int) (list []Capability, whole bool) {
	for range (extendedStart - standardStart) / 4 {
		if at &^= 3; at < standardStart {
			return list, true
		}
		header, ok := dword(config, at)
		if !ok {
			return list, false
		}
		if uint8(header) == math.MaxUint8 {
			return list, true
		}
		list = append(list, Capability{uint16(uint8(header)), at})
		at = int(uint8(header >> 8))
	}
	return list, true
}

func dword(config io.ReaderAt, at int) (uint32, bool) {
	var b [4]byte
	n, _ := config.ReadAt(b[:], int64(at))
	return binary.LittleEndian.Uint32(b[:]), n == len(b)
}
