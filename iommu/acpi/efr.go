package acpi

// EFR is AMD's Extended Feature Register (MMIO 0030h), or the image of it in an IVRS table (48882, 3.4;
// drivers/iommu/amd/amd_iommu_types.h).
type EFR uint64

var efrBits = []bit{
	{0, 0, "PreFSup"}, {1, 1, "PPRSup"}, {2, 2, "XTSup"}, {3, 3, "NXSup"}, {4, 4, "GTSup"}, {6, 6, "IASup"},
	{7, 7, "GASup"}, {8, 8, "HESup"}, {9, 9, "PCSup"}, {10, 11, "HATS"}, {12, 13, "GATS"}, {14, 15, "GLXSup"},
	{16, 17, "SmiFSup"}, {18, 20, "SmiFRC"}, {21, 23, "GAMSup"}, {24, 25, "DualPprLogSup"}, {28, 29, "DualEventLogSup"},
	{32, 36, "PASmax"}, {37, 37, "USSup"}, {38, 39, "DevTblSegSup"}, {40, 40, "PprOvrflwEarlySup"},
	{41, 41, "PprAutoRspSup"}, {42, 43, "MarcSup"}, {44, 44, "BlkStopMrkSup"}, {45, 45, "PerfOptSup"},
	{46, 46, "MsiCapMmioSup"}, {48, 48, "GIOSup"}, {49, 49, "HASup"}, {50, 50, "EPHSup"}, {51, 51, "AttrFWSup"},
	{52, 52, "HDSup"}, {54, 54, "InvIotlbTypeSup"}, {61, 61, "GAUpdateDisSup"}, {62, 62, "ForcePhyDestSup"},
	{63, 63, "SNPSup"},
}

// Names are the fields that are not zero.
func (e EFR) Names() []string { return named(uint64(e), efrBits) }

// MarshalJSON gives the number and the names.
func (e EFR) MarshalJSON() ([]byte, error) { return bitsJSON(uint64(e), e.Names()) }

func (e EFR) bit(n int) bool { return e>>n&1 != 0 }

// PageRequests reports whether devices may ask for pages (PPRSup, PRI).
func (e EFR) PageRequests() bool { return e.bit(1) }

// X2APIC reports whether interrupts reach more than 255 processors (XTSup), which takes [EFR.GuestAPIC] too.
func (e EFR) X2APIC() bool { return e.bit(2) && e.GuestAPIC() }

// GuestTables reports whether guest page tables, and with them PASIDs, are there (GTSup).
func (e EFR) GuestTables() bool { return e.bit(4) }

// GuestAPIC reports whether interrupt remapping has entries of 128 bits (GASup).
func (e EFR) GuestAPIC() bool { return e.bit(7) }

// AVIC reports whether an interrupt goes to a running guest without the host (GAMSup, by its lowest bit).
func (e EFR) AVIC() bool { return e.bit(21) && e.GuestAPIC() }

// DirtyTracking reports whether host page tables note which pages a device wrote (HDSup).
func (e EFR) DirtyTracking() bool { return e.bit(52) }

// SNP reports whether SEV-SNP is supported.
func (e EFR) SNP() bool { return e.bit(63) }

// HostLevels are the levels of host page tables, 4 to 6; 0 says that there are none.
func (e EFR) HostLevels() int {
	if n := int(e >> 10 & 3); n < 3 {
		return 4 + n
	}
	return 0
}

// GuestLevels are the levels of guest page tables, 4 or 5.
func (e EFR) GuestLevels() int { return 4 + int(e>>12&3) }

// PASIDBits is the width of PASIDs; 0 without guest page tables.
func (e EFR) PASIDBits() int {
	if !e.GuestTables() {
		return 0
	}
	return int(e>>32&31) + 1
}

// Plausible reports whether this can be an EFR, and not the second word of features: each IOMMU with features reports
// IASup or GASup.
func (e EFR) Plausible() bool { return e.bit(6) || e.bit(7) }

// EFR2 is AMD's second feature register (MMIO 01A0h), or its image.
type EFR2 uint64

var efr2Bits = []bit{
	{1, 1, "SevTioSup"}, {3, 3, "GCR3TRPMode"}, {5, 7, "SNPAVICSup"}, {8, 9, "NumIntRemapSup"},
	{11, 11, "HtRangeIgnore"},
}

// Names are the fields that are not zero.
func (e EFR2) Names() []string { return named(uint64(e), efr2Bits) }

// MarshalJSON gives the number and the names.
func (e EFR2) MarshalJSON() ([]byte, error) { return bitsJSON(uint64(e), e.Names()) }

// HTRangeFree reports whether the range at 1 TiB that is HyperTransport's need not be left out (HtRangeIgnore).
func (e EFR2) HTRangeFree() bool { return e>>11&1 != 0 }

// RemapEntries is how many interrupts of a device can be remapped.
func (e EFR2) RemapEntries() int {
	if e>>8&3 == 1 {
		return 2048
	}
	return 512
}
