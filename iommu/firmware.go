package iommu

import (
	"path"
	"slices"
	"strings"

	"viaduct/internal/host"
	"viaduct/iommu/acpi"
)

const tablesDir = "sys/firmware/acpi/tables"

// Firmware is one of the firmware's tables about IOMMUs, as it was found.
type Firmware struct {
	Signature string
	Table     *acpi.Table // nil if nothing of it could be decoded
	// Err is why it could not be read, which takes root, or not to its end: it then matches acpi.ErrTable.
	Err error
}

// ReadFirmware reads the tables that the host has. It reads no device.
func ReadFirmware(h *Host) []Firmware {
	var out []Firmware
	for _, signature := range acpi.Signatures {
		b, err := h.Read(path.Join(tablesDir, signature))
		if host.Absent(err) {
			// Of several the kernel numbers the files, and uses the first one (drivers/acpi/sysfs.c,
			// acpi_table_attr_init).
			b, err = h.Read(path.Join(tablesDir, signature+"1"))
		}
		if host.Absent(err) {
			continue
		}
		f := Firmware{Signature: signature, Err: err}
		if err == nil {
			f.Table, f.Err = acpi.Parse(b)
		}
		out = append(out, f)
	}
	return out
}

// described is an IOMMU that a table describes.
type described struct {
	table    string
	block    *acpi.Block
	kind     UnitKind
	segment  uint32
	base     uint64    // of its registers; 0 if it is a PCI function
	own      *Address  // its PCI function
	bits     int       // width of physical addresses, as the table has it
	input    int       // width of the addresses that devices may use
	efr      *acpi.EFR // the images of AMD's registers; nil if the table has none to go by
	efr2     *acpi.EFR2
	noHost   bool // AMD: host page tables cannot be used
	noX2APIC bool // Intel: the firmware asks that x2APIC mode be left off
	iotlb    bool // AMD: devices may keep translations
	covers   func(d *placed) bool
}

// placed is a device with the PCI functions above it, from the root bus down to itself. Of a VF it is the PF's place.
type placed struct {
	*Device
	chain []Address
}

// id is the device's requester id.
func (d *placed) id() acpi.RequesterID { return d.Address.requesterID() }

func (a Address) requesterID() acpi.RequesterID {
	return acpi.RequesterID(uint16(a.Bus)<<8 | uint16(a.Device)<<3 | uint16(a.Function))
}

// addressOf is the PCI function that a requester id stands for in a segment.
func addressOf(segment uint32, id acpi.RequesterID) Address {
	return Address{Domain: segment, Bus: uint8(id >> 8), Device: uint8(id>>3) & 31, Function: uint8(id) & 7}
}

// directRange is a range of memory that the firmware wants to stay where it is for some devices.
type directRange struct {
	Region
	kind   string // the block's name: IVMD ...
	table  string
	offset int
	whose  string // the devices, as the table names them
	// exclusion is of an IVMD that is left out of translation. Some kernels keep guests' memory off it, and others take
	// it for one that is mapped one to one (drivers/iommu/amd/iommu.c, amd_iommu_get_resv_regions).
	exclusion bool
	covers    func(d *placed) bool
	// relaxable reports whether the range is needed only until the device's driver has it.
	relaxable func(d *placed) bool
}

// decoded is what the tables say, in the terms of this package.
type decoded struct {
	units  []described
	ranges []directRange
}

func decodeFirmware(tables []Firmware) decoded {
	var out decoded
	for _, f := range tables {
		if f.Table == nil || f.Table.Fields == nil {
			continue
		}
		switch f.Signature {
		case "IVRS":
			out.ivrs(f.Table)
		case "DMAR":
			out.dmar(f.Table)
		case "IORT":
			out.iort(f.Table)
		case "VIOT":
			out.viot(f.Table)
		}
	}
	return out
}

// ivrs takes the blocks of one type only, as Linux does: that of the last block that is of the same IOMMU as the first
// (drivers/iommu/amd/init.c, get_highest_supported_ivhd_type).
func (out *decoded) ivrs(t *acpi.Table) {
	info := t.Fields.(*acpi.IVRS).Info
	kind := ivhdType(t)
	for i := range t.Blocks {
		b := &t.Blocks[i]
		if h, ok := b.Fields.(*acpi.IVHD); ok && b.Type == kind {
			segment := uint32(h.Segment)
			own := addressOf(segment, h.DeviceID)
			unit := described{
				table: t.Signature, block: b, kind: KindAMDVi, segment: segment, base: uint64(h.BaseAddress),
				own:  &own,
				bits: info.PhysicalBits(), input: info.VirtualBits(), iotlb: h.Flags.IOTLB(),
				noHost: h.Attributes != nil && h.Attributes.HostTablesDisabled(),
				covers: func(d *placed) bool {
					return d.Address.Domain == segment && d.Address != own && ivhdCovers(b, d.id())
				},
			}
			if info.EFRValid() {
				unit.efr, unit.efr2 = h.EFR, h.EFR2
			}
			out.units = append(out.units, unit)
		}

		m, ok := b.Fields.(*acpi.IVMD)
		if !ok || !m.Flags.Unity() && !m.Flags.Exclusion() || m.Size == 0 {
			continue
		}
		out.ranges = append(out.ranges, directRange{
			Region: Region{uint64(m.Start), uint64(m.Start) + uint64(m.Size) - 1, "direct"}, kind: b.Name,
			table: t.Signature, offset: b.Offset, whose: ivmdDevices(b.Type, m), exclusion: m.Flags.Exclusion(),
			covers:    func(d *placed) bool { return m.Covers(b.Type, uint16(d.Address.Domain), d.id()) },
			relaxable: func(*placed) bool { return false },
		})
	}
}

// ivhdType is the type of the IVHD blocks that Linux uses.
func ivhdType(t *acpi.Table) int {
	const newest = 0x40
	ids := func(b *acpi.Block) (acpi.RequesterID, bool) {
		switch f := b.Fields.(type) {
		case *acpi.IVHD:
			return f.DeviceID, true
		case *acpi.IVMD:
			return f.DeviceID, true
		}
		return 0, false
	}
	kind, first := 0, acpi.RequesterID(0)
	for i := range t.Blocks {
		b := &t.Blocks[i]
		id, known := ids(b)
		if b.Type > newest {
			break
		}
		if i == 0 {
			first = id
		}
		if i == 0 || known && id == first {
			kind = b.Type
		}
	}
	return kind
}

// ivhdCovers reports whether a device is among the entries of an IVHD.
func ivhdCovers(b *acpi.Block, id acpi.RequesterID) bool {
	var from acpi.RequesterID
	for i := range b.Entries {
		var d acpi.DeviceEntry
		switch f := b.Entries[i].Fields.(type) {
		case *acpi.DeviceEntry:
			d = *f
		case *acpi.AliasEntry:
			d = f.DeviceEntry
		case *acpi.ExtendedEntry:
			d = f.DeviceEntry
		}
		switch b.Entries[i].Type {
		case 0x01:
			return true
		case 0x02, 0x42, 0x46:
			if id == d.DeviceID {
				return true
			}
		case 0x03, 0x43, 0x47:
			from = d.DeviceID
		case 0x04:
			if id >= from && id <= d.DeviceID {
				return true
			}
		}
	}
	return false
}

// dmar takes a unit's own scopes before the one that includes all that no other names (drivers/iommu/intel/dmar.c,
// dmar_find_matched_drhd_unit).
func (out *decoded) dmar(t *acpi.Table) {
	head := t.Fields.(*acpi.DMAR)
	var named []func(d *placed) bool
	for i := range t.Blocks {
		b := &t.Blocks[i]
		switch f := b.Fields.(type) {
		case *acpi.DRHD:
			segment := uint32(f.Segment)
			own := func(d *placed) bool { return inScopes(b, segment, d) }
			covers := own
			if f.Flags.IncludeAll() {
				covers = func(d *placed) bool {
					other := func(covers func(d *placed) bool) bool { return covers(d) }
					return d.chain[0].Domain == segment && !slices.ContainsFunc(named, other)
				}
			} else {
				named = append(named, own)
			}
			out.units = append(out.units, described{
				table: t.Signature, block: b, kind: KindVTd, segment: segment, base: uint64(f.RegisterBase),
				bits:   head.AddressBits(),
				covers: covers, noX2APIC: head.Flags.X2APICOptOut(),
			})
		case *acpi.RMRR:
			segment := uint32(f.Segment)
			out.ranges = append(out.ranges, directRange{
				Region: Region{uint64(f.Base), uint64(f.Limit), "direct"}, kind: b.Name, table: t.Signature,
				offset: b.Offset, whose: scopeDevices(b, segment),
				covers: func(d *placed) bool { return inScopes(b, segment, d) }, relaxable: byClass,
			})
		}
	}
}

// byClass reports whether Linux lets go of a device's RMRR when a driver has it: that of USB and of displays
// (drivers/iommu/intel/iommu.c, device_rmrr_is_relaxable).
func byClass(d *placed) bool { return d.Class>>8 == 0x0c03 || d.Class>>16 == 0x03 }

// inScopes reports whether a device is one of a block's scopes, or below a bridge that is one.
func inScopes(b *acpi.Block, segment uint32, d *placed) bool {
	for i := range b.Entries {
		s, ok := b.Entries[i].Fields.(*acpi.Scope)
		kind := b.Entries[i].Type
		if !ok || kind != acpi.ScopeEndpoint && kind != acpi.ScopeBridge || len(s.Path) == 0 {
			continue
		}
		for from := range d.chain {
			if d.chain[from].Bus != s.StartBus || d.chain[from].Domain != segment {
				continue
			}
			rest := d.chain[from:]
			if len(rest) < len(s.Path) || kind == acpi.ScopeEndpoint && len(rest) > len(s.Path) {
				continue
			}
			on := true
			for j, step := range s.Path {
				on = on && rest[j].Device == step.Device && rest[j].Function == step.Function
			}
			if on {
				return true
			}
		}
	}
	return false
}

// iort follows the mappings of root complexes to SMMUs.
func (out *decoded) iort(t *acpi.Table) {
	at := map[int]*acpi.Block{}
	for i := range t.Blocks {
		at[t.Blocks[i].Offset] = &t.Blocks[i]
	}
	// stream is where a device's requests arrive, and under which id.
	stream := func(d *placed) (*acpi.Block, uint32) {
		for i := range t.Blocks {
			b := &t.Blocks[i]
			root, ok := b.Fields.(*acpi.RootComplex)
			if !ok || root.Segment != d.Address.Domain {
				continue
			}
			if m, id := mapped(b, uint32(d.id())); m != nil {
				return at[int(m.OutputReference)], id
			}
		}
		return nil, 0
	}

	for i := range t.Blocks {
		b := &t.Blocks[i]
		unit := described{table: t.Signature, block: b, kind: KindSMMU, covers: func(d *placed) bool {
			arrives, _ := stream(d)
			return arrives == b
		}}
		switch f := b.Fields.(type) {
		case *acpi.SMMU:
			unit.base = uint64(f.BaseAddress)
			out.units = append(out.units, unit)
		case *acpi.SMMUv3:
			unit.base = uint64(f.BaseAddress)
			out.units = append(out.units, unit)
		case *acpi.RMR:
			out.rmr(t, b, f, at, stream)
		}
	}
}

// rmr takes the ranges of an RMR node, whose mappings are the ids of devices where these arrive.
func (out *decoded) rmr(t *acpi.Table, b *acpi.Block, f *acpi.RMR, at map[int]*acpi.Block,
	stream func(d *placed) (*acpi.Block, uint32)) {
	covers := func(d *placed) bool {
		unit, id := stream(d)
		for i := range b.Entries {
			m, ok := b.Entries[i].Fields.(*acpi.IDMapping)
			if ok && unit != nil && at[int(m.OutputReference)] == unit && id >= m.OutputBase &&
				uint64(id) <= uint64(m.OutputBase)+uint64(m.IDCount) {
				return true
			}
		}
		return false
	}
	for i := range b.Entries {
		r, ok := b.Entries[i].Fields.(*acpi.RMRDescriptor)
		if !ok || r.Size == 0 {
			continue
		}
		out.ranges = append(out.ranges, directRange{
			Region: Region{uint64(r.Base), uint64(r.Base) + uint64(r.Size) - 1, "direct"}, kind: b.Name,
			table: t.Signature, offset: b.Entries[i].Offset, whose: streamDevices(b), covers: covers,
			relaxable: func(*placed) bool { return f.Flags.RemapPermitted() },
		})
	}
}

// mapped is the mapping of a node that an id leaves it by, and what it then is.
func mapped(b *acpi.Block, id uint32) (*acpi.IDMapping, uint32) {
	for i := range b.Entries {
		m, ok := b.Entries[i].Fields.(*acpi.IDMapping)
		switch {
		case !ok:
		case m.Flags.Single():
			return m, m.OutputBase
		case id >= m.InputBase && uint64(id) <= uint64(m.InputBase)+uint64(m.IDCount):
			return m, id - m.InputBase + m.OutputBase
		}
	}
	return nil, 0
}

// viot takes the ranges of functions that lead to each virtio-iommu.
func (out *decoded) viot(t *acpi.Table) {
	for i := range t.Blocks {
		b := &t.Blocks[i]
		unit := described{table: t.Signature, block: b, kind: KindVirtio}
		switch f := b.Fields.(type) {
		case *acpi.VirtioPCI:
			own := addressOf(uint32(f.Segment), f.BDF)
			unit.own, unit.segment = &own, uint32(f.Segment)
		case *acpi.VirtioMMIO:
			unit.base = uint64(f.BaseAddress)
		default:
			continue
		}
		unit.covers = func(d *placed) bool {
			return (unit.own == nil || d.Address != *unit.own) && slices.ContainsFunc(t.Blocks,
				func(r acpi.Block) bool {
					f, ok := r.Fields.(*acpi.PCIRange)
					return ok && int(f.OutputNode) == b.Offset && d.Address.Domain >= uint32(f.SegmentStart) &&
						d.Address.Domain <= uint32(f.SegmentEnd) && d.id() >= f.BDFStart && d.id() <= f.BDFEnd
				})
		}
		out.units = append(out.units, unit)
	}
}

// places gives each PCI device its place: see [placed].
func places(h *Host, t *Topology) (map[string]*placed, error) {
	out := map[string]*placed{}
	var err error
	t.All(func(d *Device) bool {
		if !d.PCI {
			return true
		}
		name := d.Name
		if d.PhysFn != nil {
			name = d.PhysFn.String()
		}
		var target string
		if target, err = optional(h.Link(path.Join(pciDevices, name))); err != nil {
			return false
		}
		chain := pathAddresses(strings.TrimPrefix(target, "../../../devices/"))
		if len(chain) == 0 {
			chain = []Address{d.Address}
		}
		out[d.Name] = &placed{d, chain}
		return true
	})
	return out, err
}
