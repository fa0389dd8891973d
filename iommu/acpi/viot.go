package acpi

// The layouts are those of ACPI 6.5, 5.2.34, and of include/acpi/actbl3.h.

// VIOT is the fixed part of a VIOT table.
type VIOT struct {
	NodeCount  uint16 `json:"node_count"`
	NodeOffset uint16 `json:"node_offset"`
	Reserved   uint64 `json:"reserved,omitzero"`
}

// VIOTHead is what all nodes of a VIOT have beside type and length.
type VIOTHead struct {
	Reserved uint8 `json:"reserved0,omitzero"`
}

// PCIRange are PCI functions that a virtio-iommu covers.
type PCIRange struct {
	VIOTHead
	EndpointStart uint32      `json:"endpoint_start"` // the id that the first function has there
	SegmentStart  uint16      `json:"segment_start"`
	SegmentEnd    uint16      `json:"segment_end"`
	BDFStart      RequesterID `json:"bdf_start"`
	BDFEnd        RequesterID `json:"bdf_end"`
	OutputNode    uint16      `json:"output_node"` // offset, in the table, of the virtio-iommu's node
	Reserved      Bytes       `json:"reserved,omitzero"`
}

// MMIOEndpoint is another device that a virtio-iommu covers.
type MMIOEndpoint struct {
	VIOTHead
	Endpoint    uint32 `json:"endpoint"`
	BaseAddress Hex    `json:"base_address"`
	OutputNode  uint16 `json:"output_node"`
	Reserved    Bytes  `json:"reserved,omitzero"`
}

// VirtioPCI is a virtio-iommu that is a PCI function.
type VirtioPCI struct {
	VIOTHead
	Segment  uint16      `json:"segment"`
	BDF      RequesterID `json:"bdf"`
	Reserved uint64      `json:"reserved,omitzero"`
}

// VirtioMMIO is a virtio-iommu at an address.
type VirtioMMIO struct {
	VIOTHead
	Reserved    uint32 `json:"reserved,omitzero"`
	BaseAddress Hex    `json:"base_address"`
}

func readVIOT(r *reader) any {
	return &VIOT{NodeCount: r.u16(), NodeOffset: r.u16(), Reserved: r.u64()}
}

var viotForms = map[int]struct {
	name   string
	least  int
	fields func(h VIOTHead, r *reader) any
}{
	1: {"PCI range", 24, func(h VIOTHead, r *reader) any {
		return &PCIRange{
			VIOTHead: h, EndpointStart: r.u32(), SegmentStart: r.u16(), SegmentEnd: r.u16(),
			BDFStart: RequesterID(r.u16()), BDFEnd: RequesterID(r.u16()), OutputNode: r.u16(), Reserved: r.bytes(6),
		}
	}},
	2: {"MMIO endpoint", 24, func(h VIOTHead, r *reader) any {
		return &MMIOEndpoint{
			VIOTHead: h, Endpoint: r.u32(), BaseAddress: r.hex(), OutputNode: r.u16(), Reserved: r.bytes(6),
		}
	}},
	3: {"virtio-iommu PCI", 16, func(h VIOTHead, r *reader) any {
		return &VirtioPCI{VIOTHead: h, Segment: r.u16(), BDF: RequesterID(r.u16()), Reserved: r.u64()}
	}},
	4: {"virtio-iommu MMIO", 16, func(h VIOTHead, r *reader) any {
		return &VirtioMMIO{VIOTHead: h, Reserved: r.u32(), BaseAddress: r.hex()}
	}},
}

// viotBlocks goes by the number of nodes, as Linux does (drivers/acpi/viot.c).
func viotBlocks(t *Table, table []byte) error {
	head := t.Fields.(*VIOT)
	if head.NodeCount == 0 {
		return nil
	}
	if head.NodeOffset < fixedLength || int(head.NodeOffset) > len(table) {
		return bad("the first node is said to be at offset %#x of %#x", head.NodeOffset, len(table))
	}
	length := func(b []byte) int { return int(b[2]) | int(b[3])<<8 }
	return counted(table, int(head.NodeOffset), 4, uint64(head.NodeCount), length, func(offset int, b []byte) error {
		block := Block{Type: int(b[0]), Offset: offset, Length: len(b)}
		if f, known := viotForms[block.Type]; known {
			if len(b) < f.least {
				return short(f.name, offset, len(b), f.least)
			}
			block.Name, block.Fields = f.name, f.fields(VIOTHead{b[1]}, &reader{b: b, at: 4})
		}
		t.Blocks = append(t.Blocks, block)
		return nil
	})
}
