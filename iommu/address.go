// Package iommu sees a host's devices: PCI functions and their addresses, IOMMU groups and what is in them, the IOMMU
// units, topology, names, and the selectors that users name devices by. It changes nothing.
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

// ParseAddress parses "0000:01:00.0", "01:00.0" (domain 0), and domains of more than four digits, as VMD's
// 10000:e1:00.0.
func ParseAddress(s string) (Address, error) {
	a, ok := parseAddress(s)
	if !ok {
		return Address{}, fmt.Errorf("invalid PCI address %q (want [domain:]bus:device.function, e.g. 0000:01:00.0)", s)
	}
	return a, nil
}

func parseAddress(s string) (a Address, ok bool) {
	if domain, rest, found := strings.Cut(s, ":"); found && len(domain) >= 4 && len(domain) <= 8 {
		n, err := strconv.ParseUint(domain, 16, 32)
		if err != nil {
			return Address{}, false
		}
		a.Domain, s = uint32(n), rest
	}
	if len(s) != len("01:00.0") || s[2] != ':' || s[5] != '.' {
		return Address{}, false
	}
	bus, err1 := strconv.ParseUint(s[:2], 16, 8)
	device, err2 := strconv.ParseUint(s[3:5], 16, 5)
	function, err3 := strconv.ParseUint(s[6:], 16, 3)
	if err1 != nil || err2 != nil || err3 != nil {
		return Address{}, false
	}
	a.Bus, a.Device, a.Function = uint8(bus), uint8(device), uint8(function)
	return a, true
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
	return string(
		append(b, ':', digits[a.Bus>>4], digits[a.Bus&15], ':', digits[a.Device>>4], digits[a.Device&15], '.',
			digits[a.Function&7]),
	)
}

// Compare orders addresses as the hardware is numbered.
func (a Address) Compare(b Address) int {
	return cmp.Or(cmp.Compare(a.Domain, b.Domain), cmp.Compare(a.Bus, b.Bus), cmp.Compare(a.Device, b.Device),
		cmp.Compare(a.Function, b.Function))
}

// MarshalText makes an address a JSON string.
func (a Address) MarshalText() ([]byte, error) { return []byte(a.String()), nil }

// UnmarshalText is ParseAddress.
func (a *Address) UnmarshalText(b []byte) (err error) {
	*a, err = ParseAddress(string(b))
	return err
}
