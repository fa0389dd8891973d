package acpi

import "fmt"

// The layouts are those of Intel's Virtualization Technology for Directed I/O, 8, and of include/acpi/actbl1.h.

// DMAR is the fixed part of a DMAR table.
type DMAR struct {
	HostAddressWidth uint8     `json:"host_address_width"` // one less than the number of bits
	Flags            DMARFlags `json:"flags"`
	Reserved         Bytes     `json:"reserved,omitzero"`
}

// AddressBits is the width of the host's addresses.
func (d *DMAR) AddressBits() int { return int(d.HostAddressWidth) + 1 }

// DMARFlags are the flags of a DMAR table.
type DMARFlags uint8

var dmarFlagBits = []bit{{0, 0, "INTR_REMAP"}, {1, 1, "X2APIC_OPT_OUT"}, {2, 2, "DMA_CTRL_PLATFORM_OPT_IN"}}

// Names are the flags that are set.
func (f DMARFlags) Names() []string { return named(uint64(f), dmarFlagBits) }

// MarshalJSON gives the number and the names.
func (f DMARFlags) MarshalJSON() ([]byte, error) { return bitsJSON(uint64(f), f.Names()) }

// InterruptRemapping reports whether the platform supports it.
func (f DMARFlags) InterruptRemapping() bool { return f&1 != 0 }

// X2APICOptOut reports whether the firmware asks that x2APIC mode be left off.
func (f DMARFlags) X2APICOptOut() bool { return f&2 != 0 }

// PlatformOptIn reports whether the firmware asks that DMA be remapped from the start.
func (f DMARFlags) PlatformOptIn() bool { return f&4 != 0 }

// DRHD is an IOMMU. Its entries are the devices that it covers.
type DRHD struct {
	Flags        DRHDFlags `json:"flags"`
	Size         uint8     `json:"size"` // of the registers: 2 to this power pages
	Segment      uint16    `json:"segment"`
	RegisterBase Hex       `json:"register_base"`
}

// DRHDFlags are the flags of a DRHD.
type DRHDFlags uint8

// Names are the flags that are set.
func (f DRHDFlags) Names() []string { return named(uint64(f), []bit{{0, 0, "INCLUDE_PCI_ALL"}}) }

// MarshalJSON gives the number and the names.
func (f DRHDFlags) MarshalJSON() ([]byte, error) { return bitsJSON(uint64(f), f.Names()) }

// IncludeAll reports whether the unit covers all devices of its segment that no other one names.
func (f DRHDFlags) IncludeAll() bool { return f&1 != 0 }

// RMRR is a range of memory that the devices in its entries need where it is.
type RMRR struct {
	Reserved uint16 `json:"reserved,omitzero"`
	Segment  uint16 `json:"segment"`
	Base     Hex    `json:"base"`
	Limit    Hex    `json:"limit"` // the last address
}

// ATSR names root ports below which devices may use ATS.
type ATSR struct {
	Flags    ATSRFlags `json:"flags"`
	Reserved uint8     `json:"reserved,omitzero"`
	Segment  uint16    `json:"segment"`
}

// ATSRFlags are the flags of an ATSR.
type ATSRFlags uint8

// Names are the flags that are set.
func (f ATSRFlags) Names() []string { return named(uint64(f), []bit{{0, 0, "ALL_PORTS"}}) }

// MarshalJSON gives the number and the names.
func (f ATSRFlags) MarshalJSON() ([]byte, error) { return bitsJSON(uint64(f), f.Names()) }

// RHSA says which NUMA node a unit is near to.
type RHSA struct {
	Reserved        uint32 `json:"reserved,omitzero"`
	RegisterBase    Hex    `json:"register_base"`
	ProximityDomain uint32 `json:"proximity_domain"`
}

// ANDD gives a device of the ACPI name space the number that scopes name it by.
type ANDD struct {
	Reserved     Bytes  `json:"reserved,omitzero"`
	DeviceNumber uint8  `json:"device_number"`
	ObjectName   string `json:"object_name"`
}

// SATC names devices of the chip that have a cache of translations.
type SATC struct {
	Flags    SATCFlags `json:"flags"`
	Reserved uint8     `json:"reserved,omitzero"`
	Segment  uint16    `json:"segment"`
}

// SATCFlags are the flags of a SATC.
type SATCFlags uint8

// Names are the flags that are set.
func (f SATCFlags) Names() []string { return named(uint64(f), []bit{{0, 0, "ATC_REQUIRED"}}) }

// MarshalJSON gives the number and the names.
func (f SATCFlags) MarshalJSON() ([]byte, error) { return bitsJSON(uint64(f), f.Names()) }

// SIDP names devices of the chip that have special properties.
type SIDP struct {
	Reserved uint16 `json:"reserved,omitzero"`
	Segment  uint16 `json:"segment"`
}

// Scope is a device scope: a device, or, if it is a bridge, all that is below it too.
type Scope struct {
	Flags         uint8  `json:"flags"`
	Reserved      uint8  `json:"reserved,omitzero"`
	EnumerationID uint8  `json:"enumeration_id"`
	StartBus      uint8  `json:"start_bus"`
	Path          []Step `json:"path"` // the first is on the start bus, each other on the bus below the one before
}

// Step is a device and function on a bus. As text it is "1f.0".
type Step struct{ Device, Function uint8 }

func (s Step) String() string { return fmt.Sprintf("%02x.%d", s.Device, s.Function) }

// MarshalText gives the text of [Step.String].
func (s Step) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// The types of device scopes that name PCI devices.
const (
	ScopeEndpoint = 1
	ScopeBridge   = 2
)

var scopeNames = map[int]string{
	ScopeEndpoint: "endpoint", ScopeBridge: "bridge", 3: "IOAPIC", 4: "HPET", 5: "ACPI namespace device",
}

func readDMAR(r *reader) any {
	return &DMAR{HostAddressWidth: r.u8(), Flags: DMARFlags(r.u8()), Reserved: r.bytes(10)}
}

// dmarForms are the blocks of a DMAR: their names, how many bytes stand before the device scopes, and what these are.
var dmarForms = map[int]struct {
	name   string
	fixed  int
	scopes bool
	fields func(r *reader) any
}{
	0: {"DRHD", 16, true, func(r *reader) any {
		return &DRHD{Flags: DRHDFlags(r.u8()), Size: r.u8(), Segment: r.u16(), RegisterBase: r.hex()}
	}},
	1: {"RMRR", 24, true, func(r *reader) any {
		return &RMRR{Reserved: r.u16(), Segment: r.u16(), Base: r.hex(), Limit: r.hex()}
	}},
	2: {"ATSR", 8, true, func(r *reader) any {
		return &ATSR{Flags: ATSRFlags(r.u8()), Reserved: r.u8(), Segment: r.u16()}
	}},
	3: {"RHSA", 20, false, func(r *reader) any {
		return &RHSA{Reserved: r.u32(), RegisterBase: r.hex(), ProximityDomain: r.u32()}
	}},
	4: {"ANDD", 8, false, func(r *reader) any {
		return &ANDD{Reserved: r.bytes(3), DeviceNumber: r.u8(), ObjectName: r.text(r.rest())}
	}},
	5: {"SATC", 8, true, func(r *reader) any {
		return &SATC{Flags: SATCFlags(r.u8()), Reserved: r.u8(), Segment: r.u16()}
	}},
	6: {"SIDP", 8, true, func(r *reader) any { return &SIDP{Reserved: r.u16(), Segment: r.u16()} }},
}

func dmarBlocks(t *Table, table []byte) error {
	length := func(b []byte) int { return int(b[2]) | int(b[3])<<8 }
	return split(table, fixedLength, 4, length, func(offset int, b []byte) error {
		block := Block{Type: int(b[0]) | int(b[1])<<8, Offset: offset, Length: len(b)}
		f, known := dmarForms[block.Type]
		if !known {
			t.Blocks = append(t.Blocks, block)
			return nil
		}
		if len(b) < f.fixed {
			return short(f.name, offset, len(b), f.fixed)
		}

		block.Name, block.Fields = f.name, f.fields(&reader{b: b, at: 4})
		var err error
		if f.scopes {
			err = block.scopes(b, f.fixed)
		}
		t.Blocks = append(t.Blocks, block)
		return err
	})
}

// scopes adds the device scopes, which begin at an offset in the block.
func (block *Block) scopes(b []byte, from int) error {
	const least = 6
	length := func(b []byte) int { return int(b[1]) }
	return split(b, from, least, length, func(offset int, b []byte) error {
		r := reader{b: b, at: 2}
		s := &Scope{Flags: r.u8(), Reserved: r.u8(), EnumerationID: r.u8(), StartBus: r.u8(), Path: []Step{}}
		for r.rest() >= 2 {
			s.Path = append(s.Path, Step{r.u8(), r.u8()})
		}
		block.Entries = append(block.Entries, Entry{
			Type: int(b[0]), Name: scopeNames[int(b[0])], Offset: block.Offset + offset, Length: len(b), Fields: s,
		})
		return nil
	})
}
