package iommu

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"
)

// Names gives PCI devices the names of the system's hardware data: pci.ids, or udev's hwdb.bin where that is all there is.
// Neither is parsed; a name is searched when it is asked for. The zero value knows no names.
type Names struct {
	ids   []byte // pci.ids
	hwdb  []byte // hwdb.bin
	cache map[[2]uint16]string
}

// Files that hold names, the best first: https://pci-ids.ucw.cz, and systemd-hwdb(8).
var (
	idFiles   = [...]string{"usr/share/misc/pci.ids", "usr/share/hwdata/pci.ids", "usr/share/pci.ids", "var/lib/pciutils/pci.ids"}
	hwdbFiles = [...]string{"etc/udev/hwdb.bin", "usr/lib/udev/hwdb.bin", "lib/udev/hwdb.bin"}
)

// LoadNames reads the host's name file. A host without one has devices without names, which is no error.
func LoadNames(h *Host) *Names {
	n := &Names{cache: map[[2]uint16]string{}}
	for _, f := range idFiles {
		if b, err := h.Read(f); err == nil && len(b) > 0 {
			n.ids = b
			return n
		}
	}
	for _, f := range hwdbFiles {
		if b, err := h.Read(f); err == nil {
			n.hwdb = b
			return n
		}
	}
	return n
}

// Device returns a device's name without its vendor's, "" if it is not known.
func (n *Names) Device(vendor, device uint16) string {
	key := [2]uint16{vendor, device}
	name, ok := n.cache[key]
	if !ok && n.cache != nil {
		if n.ids != nil {
			name = idsLine(idsVendor(n.ids, vendor), fmt.Sprintf("\n\t%04x  ", device))
		} else {
			name = hwdbLookup(n.hwdb, fmt.Sprintf("pci:v0000%04Xd0000%04X", vendor, device), "ID_MODEL_FROM_DATABASE")
		}
		n.cache[key] = name
	}
	return name
}

// Vendor returns a vendor's name, "" if it is not known.
func (n *Names) Vendor(vendor uint16) string {
	if n.ids != nil {
		return idsLine(idsVendor(n.ids, vendor), fmt.Sprintf("\n%04x  ", vendor))
	}
	return hwdbLookup(n.hwdb, fmt.Sprintf("pci:v0000%04X", vendor), "ID_VENDOR_FROM_DATABASE")
}

// idsVendor is the part of pci.ids that belongs to a vendor, from the newline before its own line. Vendors stand in order, so
// half of the file can be left out each time.
func idsVendor(ids []byte, vendor uint16) []byte {
	key := fmt.Sprintf("%04x", vendor)
	low, high := 0, len(ids) // the vendor's line, if there is one, begins behind low and not behind high
	for low < high {
		mid := low + (high-low)/2
		line := nextVendor(ids, mid)
		if line < 0 || line > high {
			high = mid
			continue
		}
		switch id := string(ids[line:min(line+4, len(ids))]); {
		case id == key:
			end := nextVendor(ids, line)
			if end < 0 {
				end = len(ids)
			}
			return ids[line-1 : end]
		case id < key:
			low = line
		default:
			high = mid
		}
	}
	return nil
}

// nextVendor is where the first line after at begins that is a vendor's: one that begins with a hexadecimal digit. Devices
// begin with a tab, comments with #, and the classes at the end with C.
func nextVendor(ids []byte, at int) int {
	for {
		eol := bytes.IndexByte(ids[at:], '\n')
		if eol < 0 || at+eol+1 >= len(ids) {
			return -1
		}
		at += eol + 1
		if c := ids[at]; (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f') {
			return at
		}
	}
}

// idsLine is the rest of the line that begins with key; key has the newline before it.
func idsLine(ids []byte, key string) string {
	i := bytes.Index(ids, []byte(key))
	if i < 0 {
		return ""
	}
	rest := ids[i+len(key):]
	if eol := bytes.IndexByte(rest, '\n'); eol >= 0 {
		rest = rest[:eol]
	}
	return strings.TrimSpace(string(rest))
}

// hwdbLookup walks the trie of hwdb.bin along key and returns a property of the longest pattern that matches it. The layout
// is that of systemd's src/libsystemd/sd-hwdb/hwdb-internal.h: a header with the sizes of its structures, nodes of a prefix
// and of children and values sorted by character, strings by offset. PCI patterns end in "*" and have none before it.
func hwdbLookup(b []byte, key, property string) string {
	u64 := func(at uint64) uint64 {
		if at > uint64(len(b)) || uint64(len(b))-at < 8 {
			return 0
		}
		return binary.LittleEndian.Uint64(b[at:])
	}
	text := func(at uint64) string {
		if at == 0 || at >= uint64(len(b)) {
			return ""
		}
		if s, _, ok := bytes.Cut(b[at:], []byte{0}); ok {
			return string(s)
		}
		return ""
	}
	if len(b) < 80 || string(b[:8]) != "KSLPHHRH" {
		return ""
	}
	nodeSize, childSize, valueSize, node := u64(32), u64(40), u64(48), u64(56)
	if nodeSize < 24 || nodeSize > 4096 || childSize < 16 || childSize > 4096 || valueSize < 16 || valueSize > 4096 {
		return ""
	}
	best := ""
	values := func(node uint64) {
		children, count := uint64(b[node+8]), u64(node+16)
		at := node + nodeSize + children*childSize
		for range min(count, 64) {
			if name := text(u64(at)); name == " "+property { // the space marks a property, apart from names for the compiler
				best = text(u64(at + 8))
			}
			at += valueSize
		}
	}
	child := func(node uint64, c byte) uint64 {
		at := node + nodeSize
		for range b[node+8] {
			if at >= uint64(len(b)) {
				return 0
			}
			if b[at] == c {
				return u64(at + 8)
			}
			at += childSize
		}
		return 0
	}
	for rest := key; node != 0 && node <= uint64(len(b))-24; rest = rest[1:] {
		prefix := text(u64(node))
		if i := strings.IndexByte(prefix, '*'); i >= 0 {
			if i == len(prefix)-1 && strings.HasPrefix(rest, prefix[:i]) {
				values(node)
			}
			return best
		}
		var ok bool
		if rest, ok = strings.CutPrefix(rest, prefix); !ok {
			return best
		}
		if star := child(node, '*'); star != 0 && star <= uint64(len(b))-24 && text(u64(star)) == "" {
			values(star)
		}
		if rest == "" {
			return best
		}
		node = child(node, rest[0])
	}
	return best
}
