package acpi

import "math/bits"

// VTdCap is the capability register of a VT-d unit (Intel's specification, 10.4.2; drivers/iommu/intel/iommu.h).
type VTdCap uint64

// VTdECap is its extended capability register (10.4.3).
type VTdECap uint64

var vtdCapBits = []bit{
	{0, 2, "ND"}, {4, 4, "RWBF"}, {5, 5, "PLMR"}, {6, 6, "PHMR"}, {7, 7, "CM"}, {8, 12, "SAGAW"}, {16, 21, "MGAW"},
	{22, 22, "ZLR"}, {34, 37, "SSLPS"}, {39, 39, "PSI"}, {54, 54, "DWD"}, {55, 55, "DRD"}, {56, 56, "FL1GP"},
	{59, 59, "PI"}, {60, 60, "FL5LP"}, {61, 61, "ECMDS"}, {62, 62, "ESIRTPS"}, {63, 63, "ESRTPS"},
}

var vtdECapBits = []bit{
	{0, 0, "C"}, {1, 1, "QI"}, {2, 2, "DT"}, {3, 3, "IR"}, {4, 4, "EIM"}, {6, 6, "PT"}, {7, 7, "SC"},
	{20, 23, "MHMV"}, {25, 25, "MTS"}, {26, 26, "NEST"}, {27, 27, "DIS"}, {29, 29, "PRS"}, {30, 30, "ERS"},
	{31, 31, "SRS"}, {33, 33, "NWFS"}, {34, 34, "EAFS"}, {35, 39, "PSS"}, {40, 40, "PASID"}, {41, 41, "DIT"},
	{42, 42, "PDS"}, {43, 43, "SMTS"}, {45, 45, "SSADS"}, {46, 46, "SSTS"}, {47, 47, "FSTS"}, {48, 48, "SMPWCS"},
	{49, 49, "RPS"}, {51, 51, "PMS"},
}

// Names are the fields that are not zero.
func (c VTdCap) Names() []string { return named(uint64(c), vtdCapBits) }

// Names are the fields that are not zero.
func (e VTdECap) Names() []string { return named(uint64(e), vtdECapBits) }

// MarshalJSON gives the number and the names.
func (c VTdCap) MarshalJSON() ([]byte, error) { return bitsJSON(uint64(c), c.Names()) }

// MarshalJSON gives the number and the names.
func (e VTdECap) MarshalJSON() ([]byte, error) { return bitsJSON(uint64(e), e.Names()) }

func (c VTdCap) bit(n int) bool  { return c>>n&1 != 0 }
func (e VTdECap) bit(n int) bool { return e>>n&1 != 0 }

// Domains is how many domains there can be.
func (c VTdCap) Domains() int { return 1 << (4 + 2*(c&7)) }

// GuestBits is the width of the addresses that devices may use: the least of MGAW and of what the deepest page table
// has, 39, 48 or 57 bits.
func (c VTdCap) GuestBits() int {
	width := int(c>>16&0x3f) + 1
	if deepest := bits.Len(uint(c >> 8 & 0x1f)); deepest > 1 {
		width = min(width, 21+9*deepest)
	}
	return width
}

// FiveLevels reports whether page tables of five levels are there.
func (c VTdCap) FiveLevels() bool { return c.bit(8+3) || c.bit(60) }

// PostedInterrupts reports whether an interrupt goes to a running guest without the host.
func (c VTdCap) PostedInterrupts() bool { return c.bit(59) }

// Emulated reports whether the unit is a hypervisor's: no other asks for caching mode.
func (c VTdCap) Emulated() bool { return c.bit(7) }

// InterruptRemapping reports whether interrupts can be remapped.
func (e VTdECap) InterruptRemapping() bool { return e.bit(3) }

// X2APIC reports whether interrupts reach more than 255 processors.
func (e VTdECap) X2APIC() bool { return e.bit(4) && e.bit(3) }

// DeviceTLB reports whether devices may cache translations (ATS).
func (e VTdECap) DeviceTLB() bool { return e.bit(2) }

// PageRequests reports whether devices may ask for pages (PRI).
func (e VTdECap) PageRequests() bool { return e.bit(29) }

// PASIDBits is the width of PASIDs; 0 if there are none.
func (e VTdECap) PASIDBits() int {
	if !e.bit(40) {
		return 0
	}
	return int(e>>35&31) + 1
}

// Nested reports whether a guest's page tables can be used within the host's.
func (e VTdECap) Nested() bool { return e.bit(26) }

// SnoopControl reports whether devices can be made to keep to the processors' caches.
func (e VTdECap) SnoopControl() bool { return e.bit(7) }

// DirtyTracking reports whether page tables can note which pages a device wrote: in scalable mode only, which has to be
// on (drivers/iommu/intel/iommu.h, ssads_supported).
func (e VTdECap) DirtyTracking() bool { return e.bit(43) && e.bit(45) && e.bit(48) }
