package iommu

import (
	"fmt"
	"slices"
	"strings"

	"viaduct/iommu/acpi"
)

// Direct is a range of memory that the firmware wants to stay where it is for some devices.
type Direct struct {
	// Region is of type direct, or direct-relaxable if it is that for all its devices. An exclusion range is of the
	// type that the kernel gives it: reserved, or direct.
	Region
	Kind      string // the block's name: IVMD, RMRR or RMR
	Exclusion bool   // AMD: left out of translation, rather than mapped one to one
	Table     string
	Offset    int    // in the table
	Whose     string // the devices, as the table names them
	Devices   []DirectDevice
}

// DirectDevice is a device of this host's that such a range belongs to.
type DirectDevice struct {
	Name      string
	Relaxable bool // only until the device's driver has it, so that it can be given to a guest all the same
}

func (r *directRange) direct() Direct {
	return Direct{
		Region: r.Region, Kind: r.kind, Exclusion: r.exclusion, Table: r.table, Offset: r.offset, Whose: r.whose,
	}
}

// direct adds the ranges of the firmware's that belong to devices behind the unit.
func (d *UnitDetails) direct(h *Host, ranges []directRange, devices map[string]*placed) error {
	behind := d.Devices
	if !d.Active {
		behind = d.Described
	}

	for i := range ranges {
		r := &ranges[i]
		out := r.direct()
		relaxed := true
		for _, name := range behind {
			if p := devices[name]; p != nil && r.covers(p) {
				out.Devices = append(out.Devices, DirectDevice{name, r.relaxable(p)})
				relaxed = relaxed && r.relaxable(p)
			}
		}
		if len(out.Devices) == 0 {
			continue
		}
		if relaxed {
			out.Type = "direct-relaxable"
		}
		reserved, err := out.reserved(h, devices)
		if err != nil {
			return err
		}
		if reserved {
			out.Type = "reserved"
		}
		d.Ranges = append(d.Ranges, out)
	}

	return nil
}

// reserved reports whether the kernel keeps guests' memory off an exclusion range, and lets guests have its devices.
// Where the kernel does not tell, it is taken for one that is mapped one to one.
func (r *Direct) reserved(h *Host, devices map[string]*placed) (bool, error) {
	for _, d := range r.Devices {
		group := devices[d.Name].Group
		if !r.Exclusion || group == nil {
			return false, nil
		}
		all, err := ReservedRegions(h, *group)
		if err != nil {
			return false, err
		}
		at := func(kind string) bool {
			return slices.ContainsFunc(all, func(have Region) bool {
				return have.Type == kind && have.Start <= r.Start && r.Start <= have.End
			})
		}
		if at("direct") || !at("reserved") {
			return false, nil
		}
	}
	return r.Exclusion, nil
}

// OtherRanges are the ranges of the firmware's tables that belong to no device behind these units, as those of devices
// that are not there now, or that the host's capture lacks.
func OtherRanges(tables []Firmware, units []UnitDetails) []Direct {
	var out []Direct
	said := decodeFirmware(tables)
	for i := range said.ranges {
		one := said.ranges[i].direct()
		told := func(d Direct) bool { return d.Table == one.Table && d.Offset == one.Offset }
		if !slices.ContainsFunc(units, func(u UnitDetails) bool { return slices.ContainsFunc(u.Ranges, told) }) {
			out = append(out, one)
		}
	}
	return out
}

// ivmdDevices names the devices of an IVMD block.
func ivmdDevices(kind int, m *acpi.IVMD) string {
	first, last := addressOf(uint32(m.Segment), m.DeviceID), addressOf(uint32(m.Segment), m.LastID)
	switch kind {
	case 0x20:
		return "all devices"
	case 0x21:
		return first.String()
	}
	return fmt.Sprintf("%s to %s", first, last)
}

// scopeDevices names the devices of a block's scopes: where a path begins, and how it goes on below.
func scopeDevices(b *acpi.Block, segment uint32) string {
	var out []string
	for i := range b.Entries {
		s, ok := b.Entries[i].Fields.(*acpi.Scope)
		if !ok || len(s.Path) == 0 {
			continue
		}
		name := fmt.Sprintf("%04x:%02x:%s", segment, s.StartBus, s.Path[0])
		for _, step := range s.Path[1:] {
			name += "/" + step.String()
		}
		if b.Entries[i].Type == acpi.ScopeBridge {
			name = "all below " + name
		}
		out = append(out, name)
	}
	return strings.Join(out, ", ")
}

// streamDevices names the devices of an RMR node, by the ids under which they arrive at their SMMU.
func streamDevices(b *acpi.Block) string {
	var out []string
	for i := range b.Entries {
		if m, ok := b.Entries[i].Fields.(*acpi.IDMapping); ok {
			text := fmt.Sprintf("stream %#x", m.OutputBase)
			if m.IDCount > 0 {
				text = fmt.Sprintf("streams %#x to %#x", m.OutputBase, uint64(m.OutputBase)+uint64(m.IDCount))
			}
			out = append(out, text)
		}
	}
	return strings.Join(out, ", ")
}
