package acpi

// The layouts are those of Arm's IO Remapping Table, DEN0049E.f, and of include/acpi/actbl2.h.

// IORT is the fixed part of an IORT table.
type IORT struct {
	NodeCount  uint32 `json:"node_count"`
	NodeOffset uint32 `json:"node_offset"`
	Reserved   uint32 `json:"reserved,omitzero"`
}

// Node is what all nodes of an IORT begin with.
type Node struct {
	Revision      uint8  `json:"revision"`
	Identifier    uint32 `json:"identifier"` // reserved before revision 3 of the table
	MappingCount  uint32 `json:"mapping_count"`
	MappingOffset uint32 `json:"mapping_offset"` // in the node
}

// IDMapping is an entry of a node: a range of ids that leave it, and what they are where they arrive.
type IDMapping struct {
	InputBase       uint32       `json:"input_base"`
	IDCount         uint32       `json:"id_count"` // one less than there are
	OutputBase      uint32       `json:"output_base"`
	OutputReference uint32       `json:"output_reference"` // offset, in the table, of the node where they arrive
	Flags           MappingFlags `json:"flags"`
}

// MappingFlags are the flags of a mapping.
type MappingFlags uint32

// Names are the flags that are set.
func (f MappingFlags) Names() []string { return named(uint64(f), []bit{{0, 0, "SingleMapping"}}) }

// MarshalJSON gives the number and the names.
func (f MappingFlags) MarshalJSON() ([]byte, error) { return bitsJSON(uint64(f), f.Names()) }

// Single reports whether the mapping has one id, whatever the input is.
func (f MappingFlags) Single() bool { return f&1 != 0 }

// ITSGroup are interrupt translation services.
type ITSGroup struct {
	Node
	ITSCount    uint32   `json:"its_count"`
	Identifiers []uint32 `json:"identifiers"`
}

// MemoryProperties are how a device's accesses to memory behave.
type MemoryProperties struct {
	CacheCoherency uint32      `json:"cache_coherency"`
	Hints          MemoryHints `json:"hints"`
	Reserved       uint16      `json:"reserved,omitzero"`
	Flags          MemoryFlags `json:"flags"`
}

// MemoryHints are hints to caches.
type MemoryHints uint8

// Names are the hints that are set.
func (h MemoryHints) Names() []string {
	return named(uint64(h), []bit{
		{0, 0, "Transient"}, {1, 1, "WriteAllocate"}, {2, 2, "ReadAllocate"}, {3, 3, "Override"},
	})
}

// MarshalJSON gives the number and the names.
func (h MemoryHints) MarshalJSON() ([]byte, error) { return bitsJSON(uint64(h), h.Names()) }

// MemoryFlags say how far coherency goes.
type MemoryFlags uint8

// Names are the flags that are set.
func (f MemoryFlags) Names() []string {
	return named(uint64(f), []bit{{0, 0, "Coherency"}, {1, 1, "DeviceAttribute"}, {2, 2, "EnsuredCoherency"}})
}

// MarshalJSON gives the number and the names.
func (f MemoryFlags) MarshalJSON() ([]byte, error) { return bitsJSON(uint64(f), f.Names()) }

// NamedComponent is a device of the ACPI name space.
type NamedComponent struct {
	Node
	Flags       ComponentFlags   `json:"flags"`
	Memory      MemoryProperties `json:"memory_properties"`
	AddressBits uint8            `json:"memory_address_limit"`
	Device      string           `json:"device_name"`
}

// ComponentFlags are the flags of a named component.
type ComponentFlags uint32

// Names are the fields that are not zero.
func (f ComponentFlags) Names() []string {
	return named(uint64(f), []bit{{0, 0, "StallSupported"}, {1, 5, "PASIDBits"}})
}

// MarshalJSON gives the number and the names.
func (f ComponentFlags) MarshalJSON() ([]byte, error) { return bitsJSON(uint64(f), f.Names()) }

// RootComplex is a PCI root complex.
type RootComplex struct {
	Node
	Memory      MemoryProperties `json:"memory_properties"`
	ATS         ATSAttribute     `json:"ats_attribute"`
	Segment     uint32           `json:"segment"`
	AddressBits uint8            `json:"memory_address_limit"`
	PASID       uint16           `json:"pasid_capabilities"` // bits 4 to 0: width
	Reserved    Bytes            `json:"reserved,omitzero"`
}

// ATSAttribute is what a root complex supports.
type ATSAttribute uint32

// Names are the fields that are not zero.
func (a ATSAttribute) Names() []string {
	return named(uint64(a), []bit{{0, 0, "ATS"}, {1, 1, "PRI"}, {2, 2, "PASIDForward"}})
}

// MarshalJSON gives the number and the names.
func (a ATSAttribute) MarshalJSON() ([]byte, error) { return bitsJSON(uint64(a), a.Names()) }

// SMMU is an SMMU of version 1 or 2.
type SMMU struct {
	Node
	BaseAddress            Hex       `json:"base_address"`
	Span                   Hex       `json:"span"`
	Model                  uint32    `json:"model"`
	Flags                  SMMUFlags `json:"flags"`
	GlobalInterruptOffset  uint32    `json:"global_interrupt_offset"`
	ContextInterruptCount  uint32    `json:"context_interrupt_count"`
	ContextInterruptOffset uint32    `json:"context_interrupt_offset"`
	PMUInterruptCount      uint32    `json:"pmu_interrupt_count"`
	PMUInterruptOffset     uint32    `json:"pmu_interrupt_offset"`
	GlobalInterrupts       []Hex     `json:"global_interrupts"` // number and flags each, as the others
	ContextInterrupts      []Hex     `json:"context_interrupts"`
	PMUInterrupts          []Hex     `json:"pmu_interrupts"`
}

// SMMUFlags are the flags of an SMMU of version 1 or 2.
type SMMUFlags uint32

// Names are the flags that are set.
func (f SMMUFlags) Names() []string {
	return named(uint64(f), []bit{{0, 0, "DVMSupported"}, {1, 1, "CoherentWalk"}})
}

// MarshalJSON gives the number and the names.
func (f SMMUFlags) MarshalJSON() ([]byte, error) { return bitsJSON(uint64(f), f.Names()) }

// SMMUv3 is an SMMU of version 3.
type SMMUv3 struct {
	Node
	BaseAddress    Hex         `json:"base_address"`
	Flags          SMMUv3Flags `json:"flags"`
	Reserved       uint32      `json:"reserved,omitzero"`
	VATOSAddress   Hex         `json:"vatos_address"`
	Model          uint32      `json:"model"`
	EventGSIV      uint32      `json:"event_gsiv"`
	PRIGSIV        uint32      `json:"pri_gsiv"`
	GERRGSIV       uint32      `json:"gerr_gsiv"`
	SyncGSIV       uint32      `json:"sync_gsiv"`
	Proximity      uint32      `json:"proximity_domain"`
	IDMappingIndex uint32      `json:"id_mapping_index"`
}

// SMMUv3Flags are the flags of an SMMU of version 3.
type SMMUv3Flags uint32

// Names are the fields that are not zero.
func (f SMMUv3Flags) Names() []string {
	return named(uint64(f), []bit{
		{0, 0, "COHACCOverride"}, {1, 2, "HTTUOverride"}, {3, 3, "ProximityValid"}, {4, 4, "DeviceIDValid"},
	})
}

// MarshalJSON gives the number and the names.
func (f SMMUv3Flags) MarshalJSON() ([]byte, error) { return bitsJSON(uint64(f), f.Names()) }

// PMCG is a group of performance counters.
type PMCG struct {
	Node
	Page0Base     Hex    `json:"page0_base"`
	OverflowGSIV  uint32 `json:"overflow_gsiv"`
	NodeReference uint32 `json:"node_reference"`
	Page1Base     Hex    `json:"page1_base"`
}

// RMR are ranges of memory, its entries, that the devices whose ids its mappings are need where they are.
type RMR struct {
	Node
	Flags  RMRFlags `json:"flags"`
	Count  uint32   `json:"rmr_count"`
	Offset uint32   `json:"rmr_offset"` // in the node
}

// RMRFlags are the flags of an RMR node.
type RMRFlags uint32

// Names are the fields that are not zero.
func (f RMRFlags) Names() []string {
	return named(uint64(f), []bit{{0, 0, "RemapPermitted"}, {1, 1, "AccessPrivilege"}, {2, 9, "AccessAttributes"}})
}

// MarshalJSON gives the number and the names.
func (f RMRFlags) MarshalJSON() ([]byte, error) { return bitsJSON(uint64(f), f.Names()) }

// RemapPermitted reports whether the range may be mapped anew once a driver has the device: Linux calls it
// direct-relaxable.
func (f RMRFlags) RemapPermitted() bool { return f&1 != 0 }

// RMRDescriptor is an entry of an RMR: one range.
type RMRDescriptor struct {
	Base     Hex    `json:"base"`
	Size     Hex    `json:"size"` // in bytes
	Reserved uint32 `json:"reserved,omitzero"`
}

// IWB is an interrupt wire bridge.
type IWB struct {
	Node
	BaseAddress Hex    `json:"base_address"`
	Index       uint16 `json:"index"`
	Device      string `json:"device_name"`
}

func readIORT(r *reader) any {
	return &IORT{NodeCount: r.u32(), NodeOffset: r.u32(), Reserved: r.u32()}
}

const nodeLength = 16 // of what all nodes begin with

// iortForms are the nodes of an IORT: their names, the least bytes that one has, and what is read from the end of what
// all have. The reader ends where the mappings begin.
var iortForms = map[int]struct {
	name   string
	least  int
	fields func(n Node, node []byte, r *reader) (any, error)
}{
	0: {"ITS group", 20, func(n Node, _ []byte, r *reader) (any, error) {
		g := &ITSGroup{Node: n, ITSCount: r.u32(), Identifiers: []uint32{}}
		if uint64(g.ITSCount)*4 > uint64(r.rest()) {
			return g, bad("an ITS group is said to have %d identifiers, in %d bytes", g.ITSCount, r.rest())
		}
		for range g.ITSCount {
			g.Identifiers = append(g.Identifiers, r.u32())
		}
		return g, nil
	}},
	1: {"named component", 29, func(n Node, _ []byte, r *reader) (any, error) {
		return &NamedComponent{
			Node: n, Flags: ComponentFlags(r.u32()), Memory: r.memory(), AddressBits: r.u8(), Device: r.text(r.rest()),
		}, nil
	}},
	2: {"root complex", 32, func(n Node, _ []byte, r *reader) (any, error) {
		return &RootComplex{
			Node: n, Memory: r.memory(), ATS: ATSAttribute(r.u32()), Segment: r.u32(), AddressBits: r.u8(),
			PASID: r.u16(), Reserved: r.bytes(r.rest()),
		}, nil
	}},
	3: {"SMMU", 60, readSMMU},
	4: {"SMMUv3", 60, func(n Node, _ []byte, r *reader) (any, error) {
		return &SMMUv3{
			Node: n, BaseAddress: r.hex(), Flags: SMMUv3Flags(r.u32()), Reserved: r.u32(), VATOSAddress: r.hex(),
			Model: r.u32(), EventGSIV: r.u32(), PRIGSIV: r.u32(), GERRGSIV: r.u32(), SyncGSIV: r.u32(),
			Proximity: r.u32(), IDMappingIndex: r.u32(),
		}, nil
	}},
	5: {"PMCG", 32, func(n Node, _ []byte, r *reader) (any, error) {
		return &PMCG{
			Node: n, Page0Base: r.hex(), OverflowGSIV: r.u32(), NodeReference: r.u32(), Page1Base: r.hex(),
		}, nil
	}},
	6: {"RMR", 28, func(n Node, _ []byte, r *reader) (any, error) {
		return &RMR{Node: n, Flags: RMRFlags(r.u32()), Count: r.u32(), Offset: r.u32()}, nil
	}},
	7: {"IWB", 26, func(n Node, _ []byte, r *reader) (any, error) {
		return &IWB{Node: n, BaseAddress: r.hex(), Index: r.u16(), Device: r.text(r.rest())}, nil
	}},
}

func (r *reader) memory() MemoryProperties {
	return MemoryProperties{
		CacheCoherency: r.u32(), Hints: MemoryHints(r.u8()), Reserved: r.u16(), Flags: MemoryFlags(r.u8()),
	}
}

func readSMMU(n Node, node []byte, r *reader) (any, error) {
	s := &SMMU{
		Node: n, BaseAddress: r.hex(), Span: r.hex(), Model: r.u32(), Flags: SMMUFlags(r.u32()),
		GlobalInterruptOffset: r.u32(), ContextInterruptCount: r.u32(), ContextInterruptOffset: r.u32(),
		PMUInterruptCount: r.u32(), PMUInterruptOffset: r.u32(),
	}
	list := func(offset, count uint32) ([]Hex, error) {
		b, err := part(node, offset, count, 8)
		r, out := reader{b: b}, []Hex{}
		for r.rest() > 0 {
			out = append(out, r.hex())
		}
		return out, err
	}
	var err error
	if s.GlobalInterrupts, err = list(s.GlobalInterruptOffset, 2); err != nil {
		return s, err
	}
	if s.ContextInterrupts, err = list(s.ContextInterruptOffset, s.ContextInterruptCount); err != nil {
		return s, err
	}
	s.PMUInterrupts, err = list(s.PMUInterruptOffset, s.PMUInterruptCount)
	return s, err
}

// part is an array within a node, of so many items of a size.
func part(node []byte, offset, count uint32, size int) ([]byte, error) {
	end := uint64(offset) + uint64(count)*uint64(size)
	if count == 0 {
		return nil, nil
	}
	if offset < nodeLength || end > uint64(len(node)) {
		return nil, bad("%d items of %d bytes at offset %#x are not within their node of %d bytes", count, size, offset,
			len(node))
	}
	return node[offset:end], nil
}

// iortBlocks goes by the number of nodes, as Linux does: what follows them is padding.
func iortBlocks(t *Table, table []byte) error {
	head := t.Fields.(*IORT)
	if head.NodeCount == 0 {
		return nil
	}
	if head.NodeOffset < fixedLength || uint64(head.NodeOffset) > uint64(len(table)) {
		return bad("the first node is said to be at offset %#x of %#x", head.NodeOffset, len(table))
	}
	length := func(b []byte) int { return int(b[1]) | int(b[2])<<8 }
	return counted(table, int(head.NodeOffset), nodeLength, uint64(head.NodeCount), length, t.node)
}

func (t *Table) node(offset int, b []byte) error {
	block := Block{Type: int(b[0]), Offset: offset, Length: len(b)}
	r := reader{b: b, at: 3}
	n := Node{Revision: r.u8(), Identifier: r.u32(), MappingCount: r.u32(), MappingOffset: r.u32()}
	mappings, err := part(b, n.MappingOffset, n.MappingCount, 20)
	if err != nil {
		return err
	}

	f, known := iortForms[block.Type]
	if known {
		if len(b) < f.least {
			return short(f.name, offset, len(b), f.least)
		}
		own := reader{b: b, at: nodeLength}
		if n.MappingCount > 0 && int(n.MappingOffset) >= f.least {
			own.b = b[:n.MappingOffset]
		}
		block.Name = f.name
		if block.Fields, err = f.fields(n, b, &own); err != nil {
			return err
		}
	}

	block.items("id mapping", mappings, int(n.MappingOffset), func(r *reader) any {
		return &IDMapping{
			InputBase: r.u32(), IDCount: r.u32(), OutputBase: r.u32(), OutputReference: r.u32(),
			Flags: MappingFlags(r.u32()),
		}
	})
	if rmr, ok := block.Fields.(*RMR); ok {
		ranges, err := part(b, rmr.Offset, rmr.Count, 20)
		if err != nil {
			return err
		}
		block.items("RMR descriptor", ranges, int(rmr.Offset), func(r *reader) any {
			return &RMRDescriptor{Base: r.hex(), Size: r.hex(), Reserved: r.u32()}
		})
	}
	t.Blocks = append(t.Blocks, block)
	return nil
}

// items adds an array of 20 bytes each as entries.
func (block *Block) items(name string, b []byte, offset int, fields func(r *reader) any) {
	for at := 0; at < len(b); at += 20 {
		block.Entries = append(block.Entries, Entry{
			Type: -1, Name: name, Offset: block.Offset + offset + at, Length: 20,
			Fields: fields(&reader{b: b[at : at+20]}),
		})
	}
}
