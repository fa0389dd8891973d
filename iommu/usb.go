package iommu

import (
	"path"
	"slices"
	"strconv"
	"strings"

	"viaduct/internal/host"
)

// USBDevice is a device on a USB controller's bus.
type USBDevice struct {
	Port            string // the kernel's name of its place, as 1-2.4
	Vendor, Product uint16
	Name            string // what it calls itself: maker and product; "" if it does not
}

// USBDevices returns the USB devices below a PCI device, hubs included and root hubs not, in the order of their ports.
func USBDevices(h *Host, a Address) ([]USBDevice, error) {
	dir, err := h.Open(path.Join(pciDevices, a.String()))
	if err != nil {
		return nil, err
	}
	defer dir.Close()

	paths, err := usbDevices(dir)
	if err != nil {
		return nil, err
	}
	var out []USBDevice
	for _, at := range paths {
		r := reader{dir: dir}
		id := func(file string) uint16 {
			n, _ := strconv.ParseUint(r.text(path.Join(at, file)), 16, 16)
			return uint16(n)
		}
		d := USBDevice{Port: path.Base(at), Vendor: id("idVendor"), Product: id("idProduct")}
		maker, product := r.text(path.Join(at, "manufacturer")), r.text(path.Join(at, "product"))
		if strings.HasPrefix(product, maker) {
			maker = ""
		}
		d.Name = strings.TrimSpace(maker + " " + product)
		if r.err != nil {
			return nil, r.err
		}
		out = append(out, d)
	}
	slices.SortFunc(out, func(a, b USBDevice) int { return strings.Compare(a.Port, b.Port) })
	return out, nil
}

// usbDevices are the directories of the USB devices below a device's: BUS-PORT[.PORT...] without the root hubs usbN and
// the interfaces, which have a colon (Documentation/ABI/stable/sysfs-bus-usb).
func usbDevices(dir *host.Dir) ([]string, error) {
	var out []string
	err := walkBelow(dir, func(at, subsystem string, _ []string) error {
		name := path.Base(at)
		if path.Base(subsystem) == "usb" && strings.Contains(name, "-") && !strings.Contains(name, ":") {
			out = append(out, at)
		}
		return nil
	})
	return out, err
}
