package holder

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strconv"
	"strings"

	"viaduct/iommu"
)

// libvirtDomains are the devices of the host that running domains have, by domain, from their status files.
func libvirtDomains(h *iommu.Host) (map[string][]iommu.Address, error) {
	const dir = "run/libvirt/qemu"
	names, err := present(h.Names(dir))
	if err != nil {
		return nil, err
	}

	out := map[string][]iommu.Address{}
	for _, n := range names {
		domain, ok := strings.CutSuffix(n, ".xml")
		if !ok {
			continue
		}
		b, err := present(h.Read(path.Join(dir, n)))
		if err != nil {
			return nil, err
		}
		if out[domain], err = sources(b); err != nil {
			return nil, fmt.Errorf("/%s: %w", path.Join(dir, n), err)
		}
	}
	return out, nil
}

// sources are the devices of the host that a domain has: hostdevs, interfaces of that type, NVMe disks. Those have a
// source with an address of the host; a guest's own addresses stand in no source.
func sources(domain []byte) ([]iommu.Address, error) {
	var out []iommu.Address
	var at []string
	d := xml.NewDecoder(bytes.NewReader(domain))

	for {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, err
		}
		switch t := token.(type) {
		case xml.StartElement:
			at = append(at, t.Name.Local)
			if !isSource(at) {
				continue
			}
			if a, ok := sourceAddress(t.Attr); ok {
				out = append(out, a)
			}
		case xml.EndElement:
			at = at[:len(at)-1]
		}
	}
}

// isSource reports whether an element is the address of a source of a domain's device: of a hostdev, of an interface of
// that type, also where a network has given it one, or of an NVMe disk.
func isSource(at []string) bool {
	for _, path := range [][]string{
		{"devices", "hostdev", "source", "address"}, {"devices", "interface", "source", "address"},
		{"devices", "interface", "actual", "source", "address"}, {"devices", "disk", "source", "address"},
	} {
		if n := len(at) - len(path); n >= 0 && slices.Equal(at[n:], path) {
			return true
		}
	}
	return false
}

// sourceAddress reads a PCI address of libvirt's, whose numbers are decimal or hexadecimal; false for one of another
// type, as of USB.
func sourceAddress(attributes []xml.Attr) (a iommu.Address, ok bool) {

	for _, attribute := range attributes {
		bits := map[string]int{"domain": 32, "bus": 8, "slot": 5, "function": 3}[attribute.Name.Local]
		if bits == 0 {
			if attribute.Name.Local == "type" && attribute.Value != "pci" {
				return a, false
			}
			continue
		}
		n, err := strconv.ParseUint(attribute.Value, 0, bits)
		if err != nil {
			return a, false
		}
		switch attribute.Name.Local {
		case "domain":
			a.Domain = uint32(n)
		case "bus":
			a.Bus = uint8(n)
		case "slot":
			// That a USB device has none of.
			a.Device, ok = uint8(n), true
		case "function":
			a.Function = uint8(n)
		}
	}
	return a, ok
}
