package acpi

import "fmt"

// DeviceEntry is a device entry of four bytes: a setting for all devices, for one, for the first of a range, or for the
// last one.
type DeviceEntry struct {
	DeviceID RequesterID `json:"device_id"`
	Setting  DTESetting  `json:"setting"`
}

// AliasEntry is a device, or the first of a range, whose DMA comes under another's requester id.
type AliasEntry struct {
	DeviceEntry
	Reserved1 uint8       `json:"reserved1,omitzero"`
	SourceID  RequesterID `json:"source_id"`
	Reserved2 uint8       `json:"reserved2,omitzero"`
}

// ExtendedEntry is a device, or the first of a range, with a second setting: of bit 31 ACPICA and coreboot say that it
// turns ATS off, and Linux that bit 28 does.
type ExtendedEntry struct {
	DeviceEntry
	Extended uint32 `json:"extended"`
}

// SpecialEntry is an IO-APIC or an HPET: what interrupts, and has no PCI function of its own.
type SpecialEntry struct {
	DeviceEntry
	Handle   uint8       `json:"handle"` // the IO-APIC's id, or the HPET's number
	SourceID RequesterID `json:"source_id"`
	Variety  Variety     `json:"variety"`
}

// Variety is a kind of special device.
type Variety uint8

// The kinds.
const (
	VarietyIOAPIC Variety = 1
	VarietyHPET   Variety = 2
)

func (v Variety) String() string {
	switch v {
	case VarietyIOAPIC:
		return "IOAPIC"
	case VarietyHPET:
		return "HPET"
	}
	return fmt.Sprintf("%d", uint8(v))
}

// MarshalText gives the text of [Variety.String].
func (v Variety) MarshalText() ([]byte, error) { return []byte(v.String()), nil }

// HIDEntry is a device of the ACPI name space, without a PCI function.
type HIDEntry struct {
	DeviceEntry
	HID       string `json:"hid"`
	CID       string `json:"cid"`
	UIDFormat uint8  `json:"uid_format"` // 0 none, 1 a number, 2 text
	UIDLength uint8  `json:"uid_length"`
	UID       string `json:"uid"` // a number in hexadecimal
}

// DTESetting is what the device table is to let through.
type DTESetting uint8

var dteBits = []bit{
	{0, 0, "INITPass"}, {1, 1, "EIntPass"}, {2, 2, "NMIPass"}, {4, 5, "SysMgt"}, {6, 6, "LINT0Pass"},
	{7, 7, "LINT1Pass"},
}

// Names are the fields that are not zero.
func (s DTESetting) Names() []string { return named(uint64(s), dteBits) }

// MarshalJSON gives the number and the names.
func (s DTESetting) MarshalJSON() ([]byte, error) { return bitsJSON(uint64(s), s.Names()) }

// entryNames are the names of device entries by their type.
var entryNames = map[int]string{
	0x00: "pad", 0x01: "all", 0x02: "select", 0x03: "start of range", 0x04: "end of range", 0x40: "pad",
	0x42: "alias select", 0x43: "alias start of range", 0x46: "extended select", 0x47: "extended start of range",
	0x48: "special device", 0xf0: "ACPI HID device",
}

// ivhdEntry decodes the device entry that b begins with. An entry of a type below 80h has four or eight bytes, by the
// upper two bits of the type; of those above, only F0h tells its length.
func ivhdEntry(b []byte, offset int) (Entry, error) {
	e := Entry{Type: int(b[0]), Name: entryNames[int(b[0])], Offset: offset}
	switch {
	case e.Type < 0x80:
		e.Length = 4 << (e.Type >> 6)
	case e.Type == 0xf0 && len(b) >= hidLeast:
		e.Length = hidLeast + int(b[hidLeast-1])
	case e.Type == 0xf0:
		return e, short("device entry", offset, len(b), hidLeast)
	default:
		return e, bad("the device entry at offset %#x has type %02xh, of which no length is known", offset, e.Type)
	}
	if len(b) < e.Length {
		return e, short("device entry", offset, len(b), e.Length)
	}

	r := reader{b: b[:e.Length], at: 1}
	d := DeviceEntry{DeviceID: RequesterID(r.u16()), Setting: DTESetting(r.u8())}
	switch e.Type {
	case 0x00, 0x01, 0x02, 0x03, 0x04:
		e.Fields = &d
	case 0x42, 0x43:
		e.Fields = &AliasEntry{DeviceEntry: d, Reserved1: r.u8(), SourceID: RequesterID(r.u16()), Reserved2: r.u8()}
	case 0x40, 0x46, 0x47:
		e.Fields = &ExtendedEntry{DeviceEntry: d, Extended: r.u32()}
	case 0x48:
		e.Fields = &SpecialEntry{
			DeviceEntry: d, Handle: r.u8(), SourceID: RequesterID(r.u16()), Variety: Variety(r.u8()),
		}
	case 0xf0:
		h := &HIDEntry{DeviceEntry: d, HID: r.id(), CID: r.id(), UIDFormat: r.u8(), UIDLength: r.u8()}
		if h.UID = r.text(int(h.UIDLength)); h.UIDFormat == 1 && h.UIDLength > 0 {
			r.at = hidLeast
			h.UID = Hex(r.number(min(8, int(h.UIDLength)))).String()
		}
		e.Fields = h
	}
	return e, nil
}

// id reads the eight bytes of a HID or CID: characters, or, where the upper four bytes are zero, a number (ACPI 6.5,
// 6.1.5). None is "".
func (r *reader) id() string {
	b := r.take(8)
	n := reader{b: b}
	low, high := n.u32(), n.u32()
	switch {
	case low == 0 && high == 0:
		return ""
	case high == 0:
		return Hex(low).String()
	}
	n = reader{b: b}
	return n.text(8)
}
