package iommu

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"strings"

	"viaduct/internal/host"
)

// Names gives PCI devices the names of the system's hardware data: pci.ids, or udev's hwdb.bin where that is all there
// is. Neither is parsed or read whole; a name is searched when it is asked for. The zero value knows no names.
type Names struct {
	file  host.File
	hwdb  bool // file is a hwdb.bin, not a pci.ids
	cache map[[2]uint16]string

	vendors map[uint16]string

	probes []probe // looks into a pci.ids for vendors
	part   idsPart // of a pci.ids
}

// idsPart is the part of a pci.ids that was read last: most searches end close to where they looked before.
type idsPart struct {
	room []byte
	at   int64
	text []byte
	end  bool // the file ends with it
}

// Files that hold names, the best first: https://pci-ids.ucw.cz, and systemd-hwdb(8).
var (
	idFiles = [...]string{
		"usr/share/misc/pci.ids",
		"usr/share/hwdata/pci.ids",
		"usr/share/pci.ids",
		"var/lib/pciutils/pci.ids",
	}
	hwdbFiles = [...]string{"etc/udev/hwdb.bin", "usr/lib/udev/hwdb.bin", "lib/udev/hwdb.bin"}
)

// OpenNames opens the host's name file. A host without one has devices without names, which is no error. The caller
// closes the names.
func OpenNames(h *Host) *Names {
	n := &Names{cache: map[[2]uint16]string{}}
	for i, f := range append(idFiles[:], hwdbFiles[:]...) {
		file, err := h.File(f)
		if err != nil {
			continue
		}
		if file.Size() > 0 {
			n.file, n.hwdb = file, i >= len(idFiles)
			return n
		}
		_ = file.Close()
	}
	return n
}

// Close closes the name file; names that were asked for before are still known.
func (n *Names) Close() error {
	if n.file == nil {
		return nil
	}
	f := n.file
	n.file = nil
	return f.Close()
}

// Device returns a device's name without its vendor's, "" if it is not known.
func (n *Names) Device(vendor, device uint16) string {
	key := [2]uint16{vendor, device}
	name, ok := n.cache[key]
	if !ok && n.file != nil {
		if n.hwdb {
			name = hwdbLookup(n.file, fmt.Sprintf("pci:v0000%04Xd0000%04X", vendor, device), "ID_MODEL_FROM_DATABASE")
		} else {
			start, end := n.idsVendor(vendor)
			name = n.idsName(n.idsFind(start, end, "\t", device), "\t", device)
		}
		n.cache[key] = name
	}
	return name
}

// Vendor returns a vendor's name, "" if it is not known.
func (n *Names) Vendor(vendor uint16) string {
	name, ok := n.vendors[vendor]
	if ok || n.file == nil {
		return name
	}
	if n.hwdb {
		name = hwdbLookup(n.file, fmt.Sprintf("pci:v0000%04X", vendor), "ID_VENDOR_FROM_DATABASE")
	} else {
		start, _ := n.idsVendor(vendor)
		name = n.idsName(start, "", vendor)
	}
	if n.vendors == nil {
		n.vendors = map[uint16]string{}
	}
	n.vendors[vendor] = name
	return name
}

// A pci.ids has a line "8086  Vendor" for each vendor, in order, and below it lines "\t10c9  Device", in order, below
// these "\t\t..." for subsystems; comments begin with #, and the classes at its end with C. So it can be bisected.

// idsVendor is where a vendor's line begins and where the next vendor's does; the same if it is not there.
func (n *Names) idsVendor(vendor uint16) (start, end int64) {
	end = n.file.Size()
	if start = n.idsFind(0, end, "", vendor); vendor < 0xffff {
		end = n.idsFind(start-1, end, "", vendor+1)
	}
	return start, end
}

// idsFind bisects the lines that begin with indent and an id and stand behind low and not behind high. It returns where
// the first one with this id or a greater one begins, high if there is none.
func (n *Names) idsFind(low, high int64, indent string, id uint16) int64 {
	key, found := fmt.Sprintf("%04x", id), high
	if indent == "" {
		// What earlier searches saw of the vendors narrows this one: the large ones take long to pass over.
		for _, p := range n.probes {
			if p.id < key {
				low = max(low, p.at)
			} else if p.from < high {
				high, found = p.from, p.at
			}
		}
	}

	for low < high {
		p := n.idsLine(low+(high-low)/2, high, indent)
		switch {
		case p.at < 0:
			high = p.from
			continue
		case p.id < key:
			low = p.at
		default:
			high, found = p.from, p.at
		}
		if indent == "" {
			n.probes = append(n.probes, p)
		}
	}
	return found
}

// probe is a look into a pci.ids: the first line with an id that begins behind from begins at at; -1 if there is none.
type probe struct {
	from, at int64
	id       string
}

// idsLine looks behind from and not behind high.
func (n *Names) idsLine(from, high int64, indent string) probe {
	none := probe{from, -1, ""}
	for at, b := max(from, 0), n.idsNear(max(from, 0)); at <= high; b = n.idsAt(at, 0) {
		next := at + int64(len(b))
		for pos := 0; ; {
			eol := bytes.IndexByte(b[pos:], '\n')
			if eol < 0 {
				break
			}
			begin := pos + eol + 1
			id := begin + len(indent)
			if at+int64(begin) > high {
				return none
			}
			if id+4 > len(b) {
				// Cut off: again, from the newline on.
				next = at + int64(begin-1)
				break
			}

			if string(b[begin:id]) == indent && isID(b[id:id+4]) {
				return probe{from, at + int64(begin), string(b[id : id+4])}
			}
			pos = begin
		}

		if n.part.end {
			return none
		}
		at = next
	}
	return none
}

// idsName is what stands on the line at at, if its id is this one.
func (n *Names) idsName(at int64, indent string, id uint16) string {
	b := n.idsNear(at)
	if bytes.IndexByte(b, '\n') < 0 {
		b = n.idsAt(at, 0)
	}
	line, _, _ := strings.Cut(string(b[:min(len(b), 512)]), "\n")
	name, ok := strings.CutPrefix(line, fmt.Sprintf("%s%04x  ", indent, id))
	if !ok {
		return ""
	}
	return strings.TrimSpace(name)
}

// idsNear is what follows at, as far as it was read; it may be little.
func (n *Names) idsNear(at int64) []byte {
	if p := &n.part; at >= p.at && at < p.at+int64(len(p.text)) {
		return p.text[at-p.at:]
	}
	return n.idsAt(at, 4096)
}

// idsAt reads anew what follows at, and so much before it.
func (n *Names) idsAt(at, before int64) []byte {
	p := &n.part
	if p.room == nil {
		p.room = make([]byte, 16384)
	}
	p.at = max(at-before, 0)
	k, _ := n.file.ReadAt(p.room, p.at)
	p.text, p.end = p.room[:k], k < len(p.room)
	return p.text[min(at-p.at, int64(k)):]
}

func isID(b []byte) bool {
	for _, c := range b {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// hwdbLookup walks the trie of hwdb.bin along key and returns a property of the longest pattern that matches it. The
// layout is that of systemd's src/libsystemd/sd-hwdb/hwdb-internal.h: a header with the sizes of its structures, nodes
// of a prefix and of children and values sorted by character, strings by offset. PCI patterns end in "*" and have none
// before it.
func hwdbLookup(f host.File, key, property string) string {
	var buf [1024]byte
	bytesAt := func(at uint64, n int) []byte {
		// N bytes, or fewer at the end, valid until the next call.
		if at > math.MaxInt64 {
			return nil
		}
		n, _ = f.ReadAt(buf[:n], int64(at))
		return buf[:n]
	}
	u64 := func(at uint64) uint64 {
		if b := bytesAt(at, 8); len(b) == 8 {
			return binary.LittleEndian.Uint64(b)
		}
		return 0
	}
	text := func(at uint64) string {
		if at == 0 {
			return ""
		}
		s, _, ok := bytes.Cut(bytesAt(at, len(buf)), []byte{0})
		if !ok {
			return ""
		}
		return string(s)
	}

	children := func(node uint64) uint64 {
		if b := bytesAt(node+8, 1); len(b) == 1 {
			return uint64(b[0])
		}
		return 0
	}
	if string(bytesAt(0, 8)) != "KSLPHHRH" {
		return ""
	}
	nodeSize, childSize, valueSize, node := u64(32), u64(40), u64(48), u64(56)
	if nodeSize < 24 || nodeSize > 4096 || childSize < 16 || childSize > 4096 || valueSize < 16 || valueSize > 4096 {
		return ""
	}

	best := ""
	values := func(node uint64) {
		at := node + nodeSize + children(node)*childSize
		for range min(u64(node+16), 64) {
			if name := text(u64(at)); name == " "+property {
				// The space marks a property, apart from names for the compiler.
				best = text(u64(at + 8))
			}
			at += valueSize
		}
	}

	child := func(node uint64, c byte) uint64 {
		at := node + nodeSize
		for range children(node) {
			if b := bytesAt(at, 1); len(b) == 1 && b[0] == c {
				return u64(at + 8)
			}
			at += childSize
		}
		return 0
	}

	for rest := key; node != 0; rest = rest[1:] {
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
		if star := child(node, '*'); star != 0 && text(u64(star)) == "" {
			values(star)
		}
		if rest == "" {
			return best
		}

		node = child(node, rest[0])
	}
	return best
}
