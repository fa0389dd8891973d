package acpi

// The layouts are those of AMD's I/O Virtualization Technology (IOMMU) Specification, 48882, 5.2, and of
// drivers/iommu/amd/init.c.

// IVRS is the fixed part of an IVRS table.
type IVRS struct {
	Info     IVInfo `json:"iv_info"`
	Reserved uint64 `json:"reserved,omitzero"`
}

// IVInfo is what an IVRS says of all IOMMUs.
type IVInfo uint32

var ivInfoBits = []bit{
	{0, 0, "EFRSup"}, {1, 1, "DmaRemap"}, {5, 7, "GVASize"}, {8, 14, "PASize"}, {15, 21, "VASize"},
	{22, 22, "HtAtsResv"},
}

// Names are the fields that are not zero.
func (i IVInfo) Names() []string { return named(uint64(i), ivInfoBits) }

// MarshalJSON gives the number and the names.
func (i IVInfo) MarshalJSON() ([]byte, error) { return bitsJSON(uint64(i), i.Names()) }

// EFRValid reports whether the images of registers in the table are to be used.
func (i IVInfo) EFRValid() bool { return i&1 != 0 }

// PreBootDMA reports whether the firmware had DMA remapped before the kernel began.
func (i IVInfo) PreBootDMA() bool { return i&2 != 0 }

// PhysicalBits is the width of physical addresses.
func (i IVInfo) PhysicalBits() int { return int(i >> 8 & 0x7f) }

// VirtualBits is the width of addresses that devices may use; a table that says 0 means 64.
func (i IVInfo) VirtualBits() int {
	if n := int(i >> 15 & 0x7f); n != 0 {
		return n
	}
	return 64
}

// IVHD describes an IOMMU. The same one is usually described by several blocks, for older and newer kernels.
type IVHD struct {
	Flags            IVHDFlags     `json:"flags"`
	DeviceID         RequesterID   `json:"device_id"` // the IOMMU's own PCI function
	CapabilityOffset uint16        `json:"capability_offset"`
	BaseAddress      Hex           `json:"base_address"`
	Segment          uint16        `json:"segment"`
	Info             uint16        `json:"info"`                 // MSI number and unit id: see MSINumber and UnitID
	Features         *IVHDFeatures `json:"features,omitempty"`   // of type 10h, nil of the others
	Attributes       *Attributes   `json:"attributes,omitempty"` // of types 11h and 40h, as the two after it
	EFR              *EFR          `json:"efr,omitempty"`
	EFR2             *EFR2         `json:"efr2,omitempty"`
}

// MSINumber is that of the IOMMU's own interrupt.
func (h *IVHD) MSINumber() int { return int(h.Info & 0x1f) }

// UnitID is the IOMMU's HyperTransport unit.
func (h *IVHD) UnitID() int { return int(h.Info >> 8 & 0x1f) }

// IVHDFlags are the flags of an IVHD; the last two only of type 10h.
type IVHDFlags uint8

var ivhdFlagBits = []bit{
	{0, 0, "HtTunEn"}, {1, 1, "PassPW"}, {2, 2, "ResPassPW"}, {3, 3, "Isoc"}, {4, 4, "IotlbSup"}, {5, 5, "Coherent"},
	{6, 6, "PreFSup"}, {7, 7, "PPRSup"},
}

// Names are the flags that are set.
func (f IVHDFlags) Names() []string { return named(uint64(f), ivhdFlagBits) }

// MarshalJSON gives the number and the names.
func (f IVHDFlags) MarshalJSON() ([]byte, error) { return bitsJSON(uint64(f), f.Names()) }

// IOTLB reports whether devices may keep their own translations (ATS).
func (f IVHDFlags) IOTLB() bool { return f&0x10 != 0 }

// IVHDFeatures are the features that a block of type 10h reports.
type IVHDFeatures uint32

var ivhdFeatureBits = []bit{
	{0, 0, "XTSup"}, {1, 1, "NXSup"}, {2, 2, "GTSup"}, {3, 4, "GLXSup"}, {5, 5, "IASup"}, {6, 6, "GASup"},
	{7, 7, "HESup"}, {8, 12, "PASmax"}, {13, 16, "PNCounters"}, {17, 22, "PNBanks"}, {23, 27, "MsiNumPPR"},
	{28, 29, "GATS"}, {30, 31, "HATS"},
}

// Names are the fields that are not zero.
func (f IVHDFeatures) Names() []string { return named(uint64(f), ivhdFeatureBits) }

// MarshalJSON gives the number and the names.
func (f IVHDFeatures) MarshalJSON() ([]byte, error) { return bitsJSON(uint64(f), f.Names()) }

// Attributes are those of a block of type 11h or 40h.
type Attributes uint32

var attributeBits = []bit{{0, 0, "HATDis"}, {13, 16, "PNCounters"}, {17, 22, "PNBanks"}, {23, 27, "MsiNumPPR"}}

// Names are the fields that are not zero.
func (a Attributes) Names() []string { return named(uint64(a), attributeBits) }

// MarshalJSON gives the number and the names.
func (a Attributes) MarshalJSON() ([]byte, error) { return bitsJSON(uint64(a), a.Names()) }

// HostTablesDisabled reports whether host page tables cannot be used (HATDis).
func (a Attributes) HostTablesDisabled() bool { return a&1 != 0 }

// IVMD is a range of memory that devices need where it is: of all devices (type 20h), of one (21h), or of several
// (22h).
type IVMD struct {
	Flags    IVMDFlags   `json:"flags"`
	DeviceID RequesterID `json:"device_id"` // the device, or the first of several
	LastID   RequesterID `json:"last_id"`   // the last of several
	Segment  uint16      `json:"segment"`   // which Linux goes by; reserved in older specifications
	Reserved Bytes       `json:"reserved,omitzero"`
	Start    Hex         `json:"start"`
	Size     Hex         `json:"size"` // in bytes
}

// IVMDFlags are the flags of an IVMD.
type IVMDFlags uint8

var ivmdFlagBits = []bit{{0, 0, "Unity"}, {1, 1, "IR"}, {2, 2, "IW"}, {3, 3, "ExclusionRange"}}

// Names are the flags that are set.
func (f IVMDFlags) Names() []string { return named(uint64(f), ivmdFlagBits) }

// MarshalJSON gives the number and the names.
func (f IVMDFlags) MarshalJSON() ([]byte, error) { return bitsJSON(uint64(f), f.Names()) }

// Unity reports whether the range is mapped one to one.
func (f IVMDFlags) Unity() bool { return f&1 != 0 }

// Exclusion reports whether the range is left out of translation, which Linux takes for a mapping one to one.
func (f IVMDFlags) Exclusion() bool { return f&8 != 0 }

// Covers reports whether the range is a device's, by the type of its block.
func (m *IVMD) Covers(kind int, segment uint16, id RequesterID) bool {
	switch {
	case segment != m.Segment:
		return false
	case kind == 0x20:
		return true
	case kind == 0x21:
		return id == m.DeviceID
	}
	return id >= m.DeviceID && id <= m.LastID
}

// The least lengths of blocks and device entries.
const (
	ivhdLeast, ivhdLater = 24, 40 // bytes before the device entries, of type 10h and of 11h and 40h
	ivmdLength           = 32
	hidLeast             = 22
)

func readIVRS(r *reader) any { return &IVRS{Info: IVInfo(r.u32()), Reserved: r.u64()} }

func ivrsBlocks(t *Table, table []byte) error {
	length := func(b []byte) int { return int(b[2]) | int(b[3])<<8 }
	return split(table, fixedLength, 4, length, func(offset int, b []byte) error {
		block := Block{Type: int(b[0]), Offset: offset, Length: len(b)}
		r := reader{b: b, at: 1}
		var err error
		switch block.Type {
		case 0x10, 0x11, 0x40:
			err = block.ivhd(&r)
		case 0x20, 0x21, 0x22:
			if len(b) < ivmdLength {
				return short("IVMD", offset, len(b), ivmdLength)
			}
			m := &IVMD{Flags: IVMDFlags(r.u8())}
			r.at = 4
			m.DeviceID, m.LastID, m.Segment = RequesterID(r.u16()), RequesterID(r.u16()), r.u16()
			m.Reserved, m.Start, m.Size = r.bytes(6), r.hex(), r.hex()
			block.Name, block.Fields = "IVMD", m
		}
		t.Blocks = append(t.Blocks, block)
		return err
	})
}

func (block *Block) ivhd(r *reader) error {
	least := ivhdLeast
	if block.Type != 0x10 {
		least = ivhdLater
	}
	if block.Length < least {
		return short("IVHD", block.Offset, block.Length, least)
	}
	h := &IVHD{Flags: IVHDFlags(r.u8())}
	r.at = 4
	h.DeviceID, h.CapabilityOffset, h.BaseAddress = RequesterID(r.u16()), r.u16(), r.hex()
	h.Segment, h.Info = r.u16(), r.u16()
	if block.Type == 0x10 {
		h.Features = new(IVHDFeatures(r.u32()))
	} else {
		h.Attributes, h.EFR, h.EFR2 = new(Attributes(r.u32())), new(EFR(r.u64())), new(EFR2(r.u64()))
	}
	block.Name, block.Fields = "IVHD", h

	for r.rest() > 0 {
		at, left := r.at, r.rest()
		entry, err := ivhdEntry(r.b[at:], block.Offset+at)
		if err != nil {
			return err
		}
		if entry.Length > left {
			return short("device entry", entry.Offset, left, entry.Length)
		}
		block.Entries = append(block.Entries, entry)
		r.at += entry.Length
	}
	return nil
}
