package iommu

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"strings"
	"testing"

	"viaduct/internal/host/hosttest"
)

const ids = `#
#	List of PCI IDs
#
0001  First Vendor
	0002  First device
# a comment within
	0003  Third device
		0001 0004  Subsystem of the third
		8086  0005  no device of this vendor
10c9  Vendor by that number
8086  Intel Corporation
	10c9  82576 Gigabit Network Connection
		8086 10ca  Not the virtual function
	10ca  82576 Virtual Function
ffff  Last Vendor
	fffe  Last device

C 02  Network controller
	00  Ethernet controller
`

// memoryFile is a host.File of bytes.
type memoryFile struct{ *bytes.Reader }

func (memoryFile) Close() error { return nil }

func inMemory(b []byte) memoryFile { return memoryFile{bytes.NewReader(b)} }

func TestIDs(t *testing.T) {
	for _, text := range []string{ids, strings.TrimSuffix(ids[:strings.Index(ids, "\nC 02")], "\n"),
		strings.ReplaceAll(ids, "\n", "\r\n")} {
		h := hostOf(t, hosttest.Tree{"usr/share/misc/pci.ids": text})
		n := OpenNames(h)
		for range 2 { // the second time from memory
			for key, want := range map[[2]uint16]string{
				{0x0001, 0x0002}: "First device", {0x0001, 0x0003}: "Third device", {0x0001, 0x0004}: "",
				{0x0001, 0x8086}: "",
				{0x8086, 0x10c9}: "82576 Gigabit Network Connection", {0x8086, 0x10ca}: "82576 Virtual Function",
				{0x8086, 0x0002}: "",
				{0x10c9, 0x10ca}: "", {0xffff, 0xfffe}: "Last device", {0xffff, 0x0000}: "", {0x1234, 0x0002}: "",
				{0x8085, 0x10c9}: "", {0x0000, 0x0002}: "", {0x0000, 0x0000}: "",
			} {
				if got := n.Device(key[0], key[1]); got != want {
					t.Errorf("%04x: %q, want %q", key, got, want)
				}
			}
		}
		for vendor, want := range map[uint16]string{1: "First Vendor", 0x8086: "Intel Corporation",
			0x10c9: "Vendor by that number", 0xffff: "Last Vendor", 2: "", 0x10ca: "", 0xc: ""} {
			if got := n.Vendor(vendor); got != want {
				t.Errorf("vendor %04x: %q, want %q", vendor, got, want)
			}
		}
	}
}

func TestNoNames(t *testing.T) {
	for what, n := range map[string]*Names{"zero value": {},
		"host without": OpenNames(hostOf(t, hosttest.Tree{"sys/": ""}))} {
		if d, v := n.Device(0x8086, 0x10c9), n.Vendor(0x8086); d != "" || v != "" {
			t.Errorf("%s: %q, %q", what, d, v)
		}
	}
}

// trie builds a small hwdb.bin: what is at an offset is built before what points to it.
type trie struct{ b []byte }

type trieNode struct {
	prefix   string
	children map[byte]trieNode
	values   [][2]string
}

func (w *trie) text(s string) uint64 {
	at := len(w.b)
	w.b = append(append(w.b, s...), 0)
	return uint64(at)
}

func (w *trie) node(n trieNode) uint64 {
	prefix := w.text(n.prefix)
	var children, values []byte
	count := 0
	for c := range 256 {
		child, ok := n.children[byte(c)]
		if !ok {
			continue
		}
		count++
		children = append(children, byte(c), 0, 0, 0, 0, 0, 0, 0)
		children = binary.LittleEndian.AppendUint64(children, w.node(child))
	}
	for _, v := range n.values {
		values = binary.LittleEndian.AppendUint64(values, w.text(" "+v[0]))
		values = binary.LittleEndian.AppendUint64(values, w.text(v[1]))
	}
	at := len(w.b)
	w.b = binary.LittleEndian.AppendUint64(w.b, prefix)
	w.b = append(w.b, byte(count), 0, 0, 0, 0, 0, 0, 0)
	w.b = binary.LittleEndian.AppendUint64(w.b, uint64(len(n.values)))
	w.b = append(append(w.b, children...), values...)
	return uint64(at)
}

func hwdb(root trieNode) []byte {
	w := &trie{make([]byte, 80)}
	at := w.node(root)
	copy(w.b, "KSLPHHRH")
	for i, v := range []uint64{uint64(len(w.b)), 80, 24, 16, 16, at} {
		binary.LittleEndian.PutUint64(w.b[16+8*i:], v)
	}
	return w.b
}

func star(key, value string) map[byte]trieNode {
	return map[byte]trieNode{'*': {values: [][2]string{{"OTHER", "x"}, {key, value}}}}
}

const model, maker = "ID_MODEL_FROM_DATABASE", "ID_VENDOR_FROM_DATABASE"

// smallHWDB has pci:v00008086*, pci:v00008086d000010C9*, ...CA*, pci:v00001AF4* with the star within a prefix, and a
// pattern that is none.
func smallHWDB() []byte {
	intel := star(maker, "Intel")
	intel['d'] = trieNode{prefix: "000010C", children: map[byte]trieNode{
		'9': {children: star(model, "PF")}, 'A': {children: star(model, "VF")},
	}}
	return hwdb(trieNode{prefix: "", children: map[byte]trieNode{
		'a': {prefix: "cpi:", children: star(model, "no")},
		'p': {prefix: "ci:v", children: map[byte]trieNode{
			'*': {prefix: "d*sv*bc02*", values: [][2]string{{model, "class"}}},
			'0': {prefix: "000", children: map[byte]trieNode{
				'8': {prefix: "086", children: intel},
				'1': {prefix: "AF4*", values: [][2]string{{maker, "Red Hat"}}},
			}},
		}},
	}})
}

func TestHWDB(t *testing.T) {
	b := smallHWDB()
	for key, want := range map[[2]uint16]string{{0x8086, 0x10c9}: "PF", {0x8086, 0x10ca}: "VF", {0x8086, 0x10cb}: "",
		{0x8086, 0x20c9}: "", {0x1af4, 0x1000}: "", {0x1111, 0}: ""} {
		if got := hwdbLookup(inMemory(b), fmt.Sprintf("pci:v0000%04Xd0000%04X", key[0], key[1]), model); got != want {
			t.Errorf("%04x: %q, want %q", key, got, want)
		}
	}
	n := OpenNames(hostOf(t, hosttest.Tree{"usr/lib/udev/hwdb.bin": string(b)}))
	if n.Vendor(0x8086) != "Intel" || n.Vendor(0x1af4) != "Red Hat" || n.Vendor(0x8087) != "" ||
		n.Device(0x8086, 0x10ca) != "VF" {
		t.Errorf("%q %q %q %q", n.Vendor(0x8086), n.Vendor(0x1af4), n.Vendor(0x8087), n.Device(0x8086, 0x10ca))
	}
	for size := range b { // nothing cut short is read beyond its end
		hwdbLookup(inMemory(b[:size:size]), "pci:v00008086d000010C9", model)
	}
}

// TestRealHWDB compares a hwdb.bin of systemd's with the pci.ids that it is made of.
func TestRealHWDB(t *testing.T) {
	file := os.Getenv("VIADUCT_TEST_HWDB")
	if file == "" {
		file = "/usr/lib/udev/hwdb.bin"
	}

	b, err := os.ReadFile(file)
	if err != nil {
		t.Skipf("no hwdb.bin to read (VIADUCT_TEST_HWDB names one): %v", err)
	}

	n := &Names{file: inMemory(b), hwdb: true, cache: map[[2]uint16]string{}}
	if got := n.Vendor(0x8086); got != "Intel Corporation" {
		t.Errorf("8086 is %q", got)
	}
	if got := n.Device(0x8086, 0x10ca); got != "82576 Virtual Function" {
		t.Errorf("8086:10ca is %q", got)
	}
	if got := n.Device(0x8086, 0xfffe); got != "" {
		t.Errorf("8086:fffe is %q", got)
	}

	text, err := os.ReadFile(os.Getenv("VIADUCT_TEST_IDS"))
	if err != nil {
		t.Logf("not compared with a pci.ids (VIADUCT_TEST_IDS names one): %v", err)
		return
	}

	other := &Names{file: inMemory(text), cache: map[[2]uint16]string{}}
	compared, unequal := 0, 0
	var vendor, device uint16
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, "C ") {
			break
		}
		if _, err := fmt.Sscanf(line, "%04x  ", &vendor); err == nil && line[0] != '\t' {
			continue
		}
		if _, err := fmt.Sscanf(line, "\t%04x  ", &device); err != nil || line[0] != '\t' || line[1] == '\t' {
			continue
		}
		if device%7 != 0 {
			continue
		}
		compared++
		if a, b := n.Device(vendor, device), other.Device(vendor, device); a != b {
			if unequal++; unequal < 20 {
				t.Logf("%04x:%04x is %q and %q", vendor, device, a, b)
			}
		}
	}

	t.Logf("%d of %d differ", unequal, compared)
	if compared < 1000 || unequal > compared/10 { // the two files may be of different years
		t.Error("too many differ")
	}
}

func FuzzHWDB(f *testing.F) {
	f.Add(smallHWDB(), "pci:v00008086d000010C9")
	f.Add(smallHWDB(), "pci:v00001AF4")
	f.Fuzz(func(t *testing.T, b []byte, key string) {
		if name := hwdbLookup(inMemory(b), key, model); len(name) > len(b) {
			t.Errorf("%d bytes of %d", len(name), len(b))
		}
	})
}

func FuzzIDs(f *testing.F) {
	f.Add([]byte(ids), uint16(0x8086), uint16(0x10ca))
	f.Fuzz(func(t *testing.T, b []byte, vendor, device uint16) {
		n := &Names{file: inMemory(b), cache: map[[2]uint16]string{}}
		if name := n.Device(vendor, device); strings.Contains(name, "\n") || len(name) > len(b) ||
			n.Device(vendor, device) != name {
			t.Errorf("%q", name)
		}
		if name := n.Vendor(vendor); strings.Contains(name, "\n") {
			t.Errorf("%q", name)
		}
	})
}
