package iommu

import (
	"fmt"
	"slices"
)

// classRow is a class of devices in words.
type classRow struct {
	base, sub uint32 // sub is 0xff for all others of the base class
	name      string
}

// classes are the classes in the words that people use (PCI Code and ID Assignment Specification).
var classes = []classRow{
	{0x00, 0x01, "vga"}, {0x00, 0xff, "other"},
	{0x01, 0x00, "scsi"}, {0x01, 0x01, "ide"}, {0x01, 0x04, "raid"}, {0x01, 0x06, "sata"}, {0x01, 0x07, "sas"},
	{0x01, 0x08, "nvme"}, {0x01, 0xff, "storage"},
	{0x02, 0x00, "ethernet"}, {0x02, 0x07, "infiniband"}, {0x02, 0xff, "network"},
	{0x03, 0x00, "vga"}, {0x03, 0x02, "3d"}, {0x03, 0xff, "display"},
	{0x04, 0x00, "video"}, {0x04, 0x01, "audio"}, {0x04, 0x03, "audio"}, {0x04, 0xff, "multimedia"},
	{0x05, 0xff, "memory"},
	{0x06, 0x00, "host bridge"}, {0x06, 0x01, "isa bridge"}, {0x06, 0x04, "bridge"}, {0x06, 0x07, "cardbus"},
	{0x06, 0xff, "bridge"},
	{0x07, 0xff, "serial"},
	{0x08, 0x05, "sd card"}, {0x08, 0x06, "iommu"}, {0x08, 0xff, "system"},
	{0x09, 0xff, "input"}, {0x0a, 0xff, "dock"}, {0x0b, 0xff, "processor"},
	{0x0c, 0x00, "firewire"}, {0x0c, 0x03, "usb"}, {0x0c, 0x04, "fibre"}, {0x0c, 0x05, "smbus"},
	{0x0c, 0x06, "infiniband"}, {0x0c, 0xff, "serial bus"},
	{0x0d, 0x11, "bluetooth"}, {0x0d, 0xff, "wireless"},
	{0x10, 0xff, "crypto"}, {0x11, 0xff, "signal"}, {0x12, 0xff, "accelerator"}, {0x13, 0xff, "other"},
	{0x40, 0xff, "coprocessor"}, {0xff, 0xff, "other"},
}

// ClassName is the class of a PCI device in a word or two, as "nvme"; its number where there is none for it.
func ClassName(class uint32) string {
	base, sub := class>>16, class>>8&0xff
	for _, c := range classes {
		if c.base == base && (c.sub == sub || c.sub == 0xff) {
			return c.name
		}
	}
	return fmt.Sprintf("%04x", class>>8)
}

// word is a word that names devices on a command line: classes by their numbers of four digits, or two for all of a
// base class, or vendors.
type word struct {
	name    string
	classes []uint32 // base classes, or base class and subclass from 0x100 on
	vendors []uint16
}

var words = []word{
	{name: "gpu", classes: []uint32{0x03}}, {name: "vga", classes: []uint32{0x0300}},
	{name: "nic", classes: []uint32{0x02, 0x0d, 0x0c06}}, {name: "nvme", classes: []uint32{0x0108}},
	{name: "usb", classes: []uint32{0x0c03}}, {name: "sata", classes: []uint32{0x0106}},
	{name: "audio", classes: []uint32{0x0401, 0x0403}}, {name: "storage", classes: []uint32{0x01}},
	{name: "wifi", classes: []uint32{0x0280, 0x0d}}, {name: "accelerator", classes: []uint32{0x12}},
	{name: "nvidia", vendors: []uint16{0x10de}}, {name: "amd", vendors: []uint16{0x1002, 0x1022}},
	{name: "intel", vendors: []uint16{0x8086}}, {name: "mellanox", vendors: []uint16{0x15b3}},
	{name: "broadcom", vendors: []uint16{0x14e4}}, {name: "samsung", vendors: []uint16{0x144d}},
	{name: "realtek", vendors: []uint16{0x10ec}}, {name: "virtio", vendors: []uint16{0x1af4}},
	{name: "amazon", vendors: []uint16{0x1d0f}}, {name: "marvell", vendors: []uint16{0x11ab, 0x177d, 0x1b4b}},
	{name: "chelsio", vendors: []uint16{0x1425}}, {name: "xilinx", vendors: []uint16{0x10ee}},
}

// Words are the words that name devices on a command line: see [ParseArgument].
func Words() []string {
	var out []string
	for _, w := range words {
		out = append(out, w.name)
	}
	return out
}

// wordNamed finds a word.
func wordNamed(name string) (word, bool) {
	i := slices.IndexFunc(words, func(w word) bool { return w.name == name })
	if i < 0 {
		return word{}, false
	}
	return words[i], true
}

// means reports whether a device is what the word names. Bridges are never meant.
func (w word) means(d *Device) bool {
	if !d.PCI || d.Class>>16 == 0x06 {
		return false
	}
	return slices.Contains(w.vendors, d.Vendor) || slices.Contains(w.classes, d.Class>>16) ||
		slices.Contains(w.classes, d.Class>>8)
}
