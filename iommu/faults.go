package iommu

import (
	"fmt"
	"slices"

	"viaduct/iommu/acpi"
)

// Fault is something in a firmware's table that cannot be right on this host, although the table is sound by itself.
type Fault struct {
	Signature string
	Offset    int // in the table, of the block that it is about
	Text      string
}

func (f Fault) String() string {
	return fmt.Sprintf("the firmware's %s table is wrong: %s (at %#x)", f.Signature, f.Text, f.Offset)
}

// CheckFirmware compares what the tables say with the devices that the host has.
func CheckFirmware(h *Host, t *Topology, tables []Firmware) []Fault {
	c := faults{functions: map[Address]uint32{}}
	t.All(func(d *Device) bool {
		if d.PCI {
			c.functions[d.Address] = d.Class
		}
		return true
	})
	for _, f := range tables {
		if f.Err != nil || f.Table == nil {
			continue
		}
		before := len(c.out)
		c.blocks(f.Table)
		if len(c.out) == before {
			c.coverage(h, t, f)
		}
	}
	slices.SortStableFunc(c.out, func(a, b Fault) int {
		return slices.Index(acpi.Signatures, a.Signature) - slices.Index(acpi.Signatures, b.Signature)
	})
	return c.out
}

// classIOMMU is base class and subclass of an IOMMU (PCI Code and ID Assignment Specification).
const classIOMMU = 0x0806

type faults struct {
	functions map[Address]uint32 // those of the host, with their classes
	out       []Fault
}

func (c *faults) add(t *acpi.Table, at int, format string, a ...any) {
	c.out = append(c.out, Fault{t.Signature, at, fmt.Sprintf(format, a...)})
}

// blocks checks each block by itself.
func (c *faults) blocks(t *acpi.Table) {
	bases := map[acpi.Hex]bool{}
	nodes := map[int]bool{}
	for _, b := range t.Blocks {
		nodes[b.Offset] = true
	}

	for i := range t.Blocks {
		b := &t.Blocks[i]
		switch f := b.Fields.(type) {
		case *acpi.IVHD:
			own := addressOf(uint32(f.Segment), f.DeviceID)
			switch class, there := c.functions[own]; {
			case len(c.functions) > 0 && !there:
				c.add(t, b.Offset, "it has an IOMMU at %s, where no PCI function is", own)
			case there && class>>8 != classIOMMU:
				c.add(t, b.Offset, "it has an IOMMU at %s, which has the class %06x", own, class)
			case f.BaseAddress == 0:
				c.add(t, b.Offset, "the registers of its IOMMU at %s have no address", own)
			case len(b.Entries) == 0:
				c.add(t, b.Offset, "its IOMMU at %s covers no device", own)
			}
		case *acpi.IVMD:
			if (f.Flags.Unity() || f.Flags.Exclusion()) && f.Start+f.Size < f.Start {
				c.add(t, b.Offset, "a range of memory from %s has %s bytes", f.Start, f.Size)
			}
		case *acpi.DRHD:
			if f.RegisterBase == 0 || bases[f.RegisterBase] {
				c.add(t, b.Offset, "the registers of an IOMMU are at %s, where none or another one is", f.RegisterBase)
			}
			bases[f.RegisterBase] = true
		case *acpi.RMRR:
			// As Linux checks it (drivers/iommu/intel/iommu.c, rmrr_sanity_check).
			if f.Limit <= f.Base || f.Base&0xfff != 0 || (f.Limit+1)&0xfff != 0 {
				c.add(t, b.Offset, "a range of memory is from %s to %s", f.Base, f.Limit)
			}
		case *acpi.VirtioPCI:
			own := addressOf(uint32(f.Segment), f.BDF)
			if _, there := c.functions[own]; len(c.functions) > 0 && !there {
				c.add(t, b.Offset, "it has an IOMMU at %s, where no PCI function is", own)
			}
		case *acpi.PCIRange:
			if !nodes[int(f.OutputNode)] {
				c.add(t, b.Offset, "a range of devices leads to offset %#x, where nothing is", f.OutputNode)
			}
		}
		for _, e := range b.Entries {
			if m, ok := e.Fields.(*acpi.IDMapping); ok && !nodes[int(m.OutputReference)] {
				c.add(t, e.Offset, "a mapping of ids leads to offset %#x, where nothing is", m.OutputReference)
			}
		}
	}
}

// coverage is for a table whose IOMMUs cover none of the host's devices.
func (c *faults) coverage(h *Host, t *Topology, f Firmware) {
	said := decodeFirmware([]Firmware{f})
	devices, err := places(h, t)
	if err != nil || len(devices) == 0 {
		return
	}
	switch {
	case len(said.units) == 0 && (f.Signature == "IVRS" || f.Signature == "DMAR"):
		c.add(f.Table, 0, "it describes no IOMMU")
		return
	case len(said.units) == 0:
		return
	}
	for _, u := range said.units {
		for _, d := range devices {
			if u.covers(d) {
				return
			}
		}
	}
	c.add(f.Table, said.units[0].block.Offset, "its IOMMUs cover none of this host's devices")
}
