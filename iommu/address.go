// Package iommu sees a host's devices: PCI functions and their addresses, IOMMU groups and what is in them, the IOMMU units,
// topology, names, and the selectors that users name devices by. It changes nothing.
package iommu

import (
	"cmp"
	"fmt"
	"strconv"
	"strings"
)

// Address is a PCI function's place: domain, bus, device, function. It is where a device is now and not what it is: bus
// numbers move when hardware does.
type Address struct {
	Domain   uint32
	Bus      uint8
	Device   uint8 // 0 to 31
	Function uint8 // 0 to 7
}

// ParseAddress parses "0000:01:00.0", "01:00.0" (domain 0), and domains of more than four digits, as VMD's 10000:e1:00.0.
func ParseAddress(s string) (Address, error) {
	bad := func() (Address, error) {
		return Address{}, fmt.Errorf("%q is no PCI address (want [domain:]bus:device.function, as 0000:01:00.0)", s)
	}
	rest, function, ok := strings.Cut(s, ".")
	if !ok {
		return bad()
	}
	parts := strings.Split(rest, ":")
	if len(parts) == 2 {
		parts = []string{"0000", parts[0], parts[1]}
	}
	if len(parts) != 3 || len(parts[0]) < 4 || len(parts[0]) > 8 || len(parts[1]) != 2 || len(parts[2]) != 2 || len(function) != 1 {
		return bad()
	}
	var n [4]uint64
	for i, p := range [...]struct {
		text string
		bits int
	}{{parts[0], 32}, {parts[1], 8}, {parts[2], 5}, {function, 3}} {
		v, err := strconv.ParseUint(p.text, 16, p.bits)
		if err != nil {
			return bad()
		}
		n[i] = v
	}
	return Address{Domain: uint32(n[0]), Bus: uint8(n[1]), Device: uint8(n[2]), Function: uint8(n[3])}, nil
}

// String is the kernel's name of the device.
func (a Address) String() string {
	const digits = "0123456789abcdef"
	b := make([]byte, 0, 16)
	for shift := 28; shift >= 0; shift -= 4 {
		if v := a.Domain >> shift; v != 0 || shift < 16 {
			b = append(b, digits[v&15])
		}
	}
	return string(append(b, ':', digits[a.Bus>>4], digits[a.Bus&15], ':', digits[a.Device>>4], digits[a.Device&15], '.', digits[a.Function&7]))
}

// Compare orders addresses as the hardware is numbered.
func (a Address) Compare(b Address) int {
	return cmp.Or(cmp.Compare(a.Domain, b.Domain), cmp.Compare(a.Bus, b.Bus), cmp.Compare(a.Device, b.Device), cmp.Compare(a.Function, b.Function))
}

// MarshalText makes an address a JSON string.
func (a Address) MarshalText() ([]byte, error) { return []byte(a.String()), nil }

// UnmarshalText is ParseAddress.
func (a *Address) UnmarshalText(b []byte) (err error) {
	*a, err = ParseAddress(string(b))
	return err
}
