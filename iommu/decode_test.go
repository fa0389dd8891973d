package iommu

import (
	"bytes"
	"encoding/binary"
	"math"
	"reflect"
	"strings"
	"testing"
)

func TestParseModalias(t *testing.T) {
	got, err := ParseModalias("pci:v00008086d000010CAsv00001AF4sd00001100bc02sc01i03")
	want := ID{Vendor: 0x8086, Device: 0x10ca, Subvendor: 0x1af4, Subdevice: 0x1100, Class: 0x020103}
	if err != nil || got != want {
		t.Errorf("%+v, %v", got, err)
	}
	good := "pci:v00008086d000010CAsv00000000sd00000000bc02sc00i00"
	bad := []string{
		"",
		"pci:",
		"usb:v1D6Bp0002",
		good + "0",
		good + "\n",
		" " + good,
		strings.Replace(good, "sv", "sw", 1),
		strings.Replace(good, "0000", "00_0", 1),
		strings.Replace(good, "v00008086", "v+0008086", 1),
		strings.Replace(good, "pci", "vfio_pci", 1),
		strings.Replace(good, "sc00", "sc", 1),
		"pci:v*d*sv*sd*bc*sc*i*",
	}
	for i := range good {
		bad = append(bad, good[:i])
	}
	for _, s := range bad {
		if got, err := ParseModalias(s); err == nil || got != (ID{}) {
			t.Errorf("%q: %+v, %v", s, got, err)
		}
	}
}

// A modalias is taken apart and put together again.
func FuzzModalias(f *testing.F) {
	f.Add("pci:v00008086d000010CAsv00001AF4sd00001100bc02sc00i00")
	f.Add("pci:vFFFFFFFFdFFFFFFFFsvFFFFFFFFsdFFFFFFFFbcFFscFFiFF")
	f.Fuzz(func(t *testing.T, s string) {
		id, err := ParseModalias(s)
		again, err2 := ParseModalias(id.Modalias())
		if err == nil && (id.Class > 0xffffff || err2 != nil || again != id) {
			t.Errorf("%q: %+v, %v", s, id, err2)
		}
	})
}

func TestParseResources(t *testing.T) {
	const rest = "0x0000000000000000 0x0000000000000000 0x0000000000000000\n"
	for name, c := range map[string]struct {
		text string
		want []BAR
	}{
		"empty": {"", nil},
		"network card": {
			"0x00000000fe800000 0x00000000fe81ffff 0x0000000000040200\n" +
				"0x00000000fe400000 0x00000000fe7fffff 0x0000000000040200\n" +
				"0x000000000000c000 0x000000000000c01f 0x0000000000040101\n" +
				"0x000000383fe00000 0x000000383fe03fff 0x000000000014220c\n" + rest + rest +
				"0x00000000fe300000 0x00000000fe33ffff 0x0000000000046200\n",
			[]BAR{{Index: 0, Size: 128 << 10}, {Index: 1, Size: 4 << 20}, {Index: 2, Size: 32, IO: true},
				{Index: 3, Size: 16 << 10, Prefetchable: true, Wide: true}},
		},
		"the last alone": {rest + rest + rest + rest + rest + "0x1000 0x1fff 0x200", []BAR{{Index: 5, Size: 4096}}},
		"end first":      {"0x2000 0x1fff 0x200\n", nil},
	} {
		if got, err := parseResources(c.text); err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	for _, s := range []string{"0x0 0x1", "0x0 0x1 0x2 0x3", "x 0x1 0x2", "0x0 0x10000000000000000 0x200", "-1 0 0",
		rest + "junk"} {
		if got, err := parseResources(s); err == nil || got != nil || !strings.Contains(err.Error(), "resource line") {
			t.Errorf("%q: %+v, %v", s, got, err)
		}
	}
}

func FuzzResources(f *testing.F) {
	f.Add(
		"0x00000000fe800000 0x00000000fe81ffff 0x0000000000040200\n0x0 0x0 0x0\n0x000000383fe00000 0x000000383fe03fff 0x000000000014220c\n",
	)
	f.Fuzz(func(t *testing.T, s string) {
		bars, err := parseResources(s)
		if len(bars) > 6 || (err != nil && bars != nil) {
			t.Errorf("%+v, %v", bars, err)
		}
		for i, b := range bars {
			if b.Index > 5 || (i > 0 && b.Index <= bars[i-1].Index) {
				t.Errorf("%+v", bars)
			}
		}
	})
}

func TestParseRegions(t *testing.T) {
	got, err := parseRegions(
		"0x00000000fee00000 0x00000000feefffff msi\n0x000000fd00000000 0x000000ffffffffff reserved\n0x0 0xffffffffffffffff direct-relaxable",
	)
	want := []Region{
		{0xfee00000, 0xfeefffff, "msi"},
		{0xfd00000000, 0xffffffffff, "reserved"},
		{0, math.MaxUint64, "direct-relaxable"},
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
	if got, err := parseRegions(""); got != nil || err != nil {
		t.Errorf("%+v, %v", got, err)
	}
	for _, s := range []string{"\n", "0x0 0x1", "0x0 0x1 msi msi", "0x1 0x0 msi", "x 0x1 msi", "0x0 x msi",
		"0x0 0x10000000000000000 msi"} {
		if got, err := parseRegions(s); err == nil || got != nil || !strings.Contains(err.Error(), "line ") {
			t.Errorf("%q: %+v, %v", s, got, err)
		}
	}
}

func FuzzRegions(f *testing.F) {
	f.Add("0x00000000fee00000 0x00000000feefffff msi\n0x000000fd00000000 0x000000ffffffffff reserved\n")
	f.Fuzz(func(t *testing.T, s string) {
		regions, err := parseRegions(s)
		if err != nil && regions != nil {
			t.Errorf("%+v, %v", regions, err)
		}
		for _, r := range regions {
			if r.End < r.Start || r.Type == "" {
				t.Errorf("%+v", r)
			}
		}
	})
}

// chain is config space with extended capabilities: at each offset, a header of id and next.
func chain(size int, headers map[int][2]int) []byte {
	b := make([]byte, size)
	for at, h := range headers {
		binary.LittleEndian.PutUint32(b[at:], uint32(h[0])|1<<16|uint32(h[1])<<20)
	}
	return b
}

func TestExtendedCapability(t *testing.T) {
	whole := map[int][2]int{0x100: {1, 0x148}, 0x148: {3, 0x158}, 0x158: {0x10, 0}}
	for name, c := range map[string]struct {
		config []byte
		id     uint16
		want   int
	}{
		"first":                 {chain(4096, whole), 1, 0x100},
		"middle":                {chain(4096, whole), 3, 0x148},
		"last":                  {chain(4096, whole), 0x10, 0x158},
		"not there":             {chain(4096, whole), 0xb, 0},
		"nothing":               {nil, 3, 0},
		"64 bytes":              {make([]byte, 64), 3, 0},
		"256 bytes":             {make([]byte, 256), 3, 0},
		"none":                  {make([]byte, 4096), 0, 0},
		"all ones":              {[]byte(strings.Repeat("\xff", 4096)), 0xffff, 0},
		"header cut":            {chain(4096, whole)[:0x14a], 3, 0},
		"header whole":          {chain(4096, whole)[:0x14c], 3, 0x148},
		"loop to itself":        {chain(4096, map[int][2]int{0x100: {1, 0x100}}), 3, 0},
		"loop of two":           {chain(4096, map[int][2]int{0x100: {1, 0x200}, 0x200: {2, 0x100}}), 3, 0},
		"before the list":       {chain(4096, map[int][2]int{0x100: {1, 0x40}, 0x40: {3, 0}}), 3, 0},
		"behind the end":        {chain(0x200, map[int][2]int{0x100: {1, 0x200}}), 3, 0},
		"last dword":            {chain(4096, map[int][2]int{0x100: {1, 0xffc}, 0xffc: {3, 0}}), 3, 0xffc},
		"low bits of the next":  {chain(4096, map[int][2]int{0x100: {1, 0x14b}, 0x148: {3, 0}}), 3, 0x148},
		"list as long as it is": {chain(4096, longest()), 3, 0xff8},
	} {
		if got := findExtended(c.config, c.id); got != c.want {
			t.Errorf("%s: %#x, want %#x", name, got, c.want)
		}
	}
}

func findExtended(config []byte, id uint16) int {
	list, _ := extendedCapabilities(bytes.NewReader(config), int(id))
	return offsetOf(list, id)
}

// longest has a capability every 8 bytes.
func longest() map[int][2]int {
	m := map[int][2]int{}
	for at := 0x100; at < 0xff8; at += 8 {
		m[at] = [2]int{1, at + 8}
	}
	m[0xff8] = [2]int{3, 0}
	return m
}

func TestSerialNumber(t *testing.T) {
	b := chain(4096, map[int][2]int{0x100: {1, 0x140}, 0x140: {3, 0}})
	binary.LittleEndian.PutUint32(b[0x144:], 0xff2a3b4c)
	binary.LittleEndian.PutUint32(b[0x148:], 0x00001b21)
	for size, want := range map[int]string{4096: "00-00-1b-21-ff-2a-3b-4c", 0x14c: "00-00-1b-21-ff-2a-3b-4c", 0x14b: "",
		0x144: "", 64: ""} {
		if got := serialNumber(bytes.NewReader(b[:size])); got != want {
			t.Errorf("of %#x bytes: %q, want %q", size, got, want)
		}
	}
	if got := serialNumber(bytes.NewReader(chain(4096, map[int][2]int{0x100: {1, 0xffc}, 0xffc: {3, 0}}))); got != "" {
		t.Errorf("at the end: %q", got)
	}
}

func FuzzConfig(f *testing.F) {
	f.Add(chain(4096, map[int][2]int{0x100: {1, 0x140}, 0x140: {3, 0}}), uint16(3))
	f.Add(chain(0x200, map[int][2]int{0x100: {1, 0x104}, 0x104: {1, 0x100}}), uint16(0xb))
	f.Fuzz(func(t *testing.T, b []byte, id uint16) {
		if at := findExtended(b, id); at != 0 &&
			(at < 0x100 || at+4 > len(b) || binary.LittleEndian.Uint16(b[at:]) != id) {
			t.Errorf("%#x of %#x", at, len(b))
		}
		if s := serialNumber(bytes.NewReader(b)); s != "" && len(s) != 23 {
			t.Errorf("%q", s)
		}
	})
}

func TestRemaps(t *testing.T) {
	for chip, want := range map[string][2]bool{
		"IO-APIC": {false, true}, "IR-IO-APIC": {true, true}, "IR-PCI-MSI": {true, true},
		"IR-PCI-MSI-0000:00:01.0":  {true, true},
		"IR-PCI-MSIX-0000:00:02.0": {true, true}, "PCI-MSI": {false, false}, "PCI-MSI-0000:00:01.0": {false, false},
		"XT-PIC":   {false, false},
		"DMAR-MSI": {false, false}, "IR-": {true, false}, "": {false, false}, "GICv3": {false, false},
		"ITS-PCI-MSI":              {true, true},
		"ITS-PCI-MSI-0000:00:01.0": {true, true}, "GICv2m-PCI-MSI-0000:00:01.0": {false, true},
	} {
		on, known := remaps(chip)
		if known != want[1] || (known && on != want[0]) {
			t.Errorf("%q: %v, known %v", chip, on, known)
		}
	}
}

func TestKindOf(t *testing.T) {
	for name, device := range map[string]string{"0000:00:05.0": "virtio3", "8.virtio": "virtio0"} {
		if got := kindOf(name, device); got != KindVirtio {
			t.Errorf("%q of %s: %s", name, device, got)
		}
	}
	for name, want := range map[string]UnitKind{
		"ivhd0": KindAMDVi, "dmar12": KindVTd, "smmu3.0x0000000009050000": KindSMMU, "smmu.0x5000000": KindSMMU,
		"virtio3":                  KindVirtio,
		"riscv-iommu@0000:00:01.0": KindOther, "s390-iommu.00000000": KindOther, "": KindOther, "xivhd0": KindOther,
	} {
		if got := kindOf(name, "0000:00:00.2"); got != want {
			t.Errorf("%q: %s, want %s", name, got, want)
		}
	}
}

func TestDeviceRoles(t *testing.T) {
	for driver, want := range map[string]bool{
		"": false, "pci-stub": false, "pcieport": false, "vfio-pci": false, "mlx5_vfio_pci": false,
		"xe-vfio-pci": false,
		"igb":         true, "nvme": true, "pciehp": true,
	} {
		if got := (&Device{Driver: driver, VFIO: IsVFIODriver(driver)}).Blocks(); got != want {
			t.Errorf("%q blocks: %v", driver, got)
		}
	}
	for class, want := range map[uint32]bool{0x060400: true, 0x060401: true, 0x060700: true, 0x060000: false,
		0x060100: false, 0x020000: false, 0x060900: false} {
		if got := (&Device{PCI: true, ID: ID{Class: class}}).IsBridge(); got != want {
			t.Errorf("%06x is a bridge: %v", class, got)
		}
	}
	if (&Device{ID: ID{Class: 0x060400}}).IsBridge() {
		t.Error("a device that is not PCI is a bridge")
	}
}
