package iommu

// The kernel's tables of devices that are not what they say (drivers/pci/quirks.c of Linux 6.12 to 7.2). A newer kernel
// may know more of them.

// idRange are devices of one vendor.
type idRange struct{ vendor, first, last uint16 }

func in(ranges []idRange, id ID) bool {
	for _, r := range ranges {
		if r.vendor == id.Vendor && r.first <= id.Device && id.Device <= r.last {
			return true
		}
	}
	return false
}

// one is a range of one device.
func one(vendor uint16, devices ...uint16) []idRange {
	out := make([]idRange, len(devices))
	for i, d := range devices {
		out[i] = idRange{vendor, d, d}
	}
	return out
}

func ranges(all ...[]idRange) (out []idRange) {
	for _, r := range all {
		out = append(out, r...)
	}
	return out
}

const (
	vendorIntel   = 0x8086
	vendorZhaoxin = 0x1d17
	vendorWangxun = 0x8088
	vendorMarvell = 0x1b4b
)

// separateFunctions are cards whose makers have said that their functions do not reach each other
// (pci_quirk_mf_endpoint_acs).
var separateFunctions = ranges(
	one(0x1924, 0x0903, 0x0923, 0x0a03), // Solarflare
	one(vendorIntel,
		0x10c6, 0x10db, 0x10dd, 0x10e1, 0x10f1, 0x10f7, 0x10f8, 0x10f9, 0x10fa, 0x10fb, 0x10fc, 0x1507, 0x1514, 0x151c,
		0x1529, 0x152a, 0x154d, 0x154f, 0x1551, 0x1558, // 8259x, X540
		0x1509, 0x150e, 0x150f, 0x1510, 0x1511, 0x1516, 0x1527, // 82580
		0x10c9, 0x10e6, 0x10e7, 0x10e8, 0x150a, 0x150d, 0x1518, 0x1526, // 82576
		0x10a7, 0x10a9, 0x10d6, // 82575
		0x1521, 0x1522, 0x1523, 0x1524, // I350
		0x105e, 0x105f, 0x1060, 0x10d9, // 82571
		0x15b7, 0x15b8), // I219
	one(0x19a2, 0x0710), one(0x10df, 0x0720), // Emulex
	one(0x177d, 0xa026, 0xa059, 0xa060),                                         // Cavium
	one(0x14e4, 0x16d7, 0x1750, 0x1751, 0x1752, 0x1760, 0x1761, 0x1762, 0x1763), // Broadcom
	one(vendorZhaoxin, 0x3038, 0x3104, 0x9083),
)

// separatePorts isolate without an ACS capability, whatever they are (pci_quirk_xgene_acs, qcom_rp, nxp_rp, brcm,
// loongson).
var separatePorts = ranges(
	// Qualcomm, HXT, X-Gene, Ampere, Broadcom
	one(0x17cb, 0x0111, 0x0115, 0x0120, 0x0400, 0x0401), one(0x1dbf, 0x0401), one(0x10e8, 0xe004),
	[]idRange{{0x1def, 0xe005, 0xe00c}}, one(0x14e4, 0xd714),
	// Loongson
	one(0x0014, 0x3c09, 0x3c19, 0x3c29, 0x7a09, 0x7a19, 0x7a29, 0x7a39, 0x7a49, 0x7a59, 0x7a69),
	// NXP
	[]idRange{
		{0x1957, 0x8d80, 0x8d83}, {0x1957, 0x8d88, 0x8d8b}, {0x1957, 0x8d90, 0x8d93}, {0x1957, 0x8d98, 0x8d9b},
	},
	one(0x1957, 0x8da0, 0x8da1, 0x8da8, 0x8da9, 0x8db0, 0x8db1, 0x8db8, 0x8db9),
)

// separateRootPorts isolate without an ACS capability as root ports (pci_quirk_cavium_acs, al_acs).
var separateRootPorts = ranges(
	[]idRange{{0x177d, 0xa000, 0xa7ff}}, one(0x177d, 0xaf84, 0xb884), // Cavium
	one(0x1c36, 0x0031), // Annapurna Labs
)

// zhaoxinPorts are those of its root and downstream ports that isolate; the others do not, whatever they say.
var zhaoxinPorts = []idRange{
	{vendorZhaoxin, 0x0710, 0x071e}, {vendorZhaoxin, 0x0721, 0x0721}, {vendorZhaoxin, 0x0723, 0x0752},
}

// wangxunCards are those of its cards whose functions do not reach each other; the others' do, whatever they say.
var wangxunCards = ranges([]idRange{{vendorWangxun, 0x0100, 0x010f}},
	one(vendorWangxun, 0x1001, 0x2001, 0x5010, 0x5025, 0x5040, 0x5110, 0x5125, 0x5140))

// amdSouthbridge are functions that do not reach each other where there is an AMD IOMMU (pci_quirk_amd_sb_acs).
var amdSouthbridge = ranges(one(0x1002, 0x4383, 0x4384, 0x4385, 0x4399, 0x439c, 0x439d), one(0x1022, 0x7809, 0x780f))

// intelPCH are root ports with a switch of their own for what ACS is for (pci_quirk_intel_pch_acs_ids).
var intelPCH = ranges(
	[]idRange{
		{vendorIntel, 0x3b42, 0x3b51}, {vendorIntel, 0x1c10, 0x1c1f}, {vendorIntel, 0x1e10, 0x1e1f},
		{vendorIntel, 0x8c10, 0x8c1f}, {vendorIntel, 0x9c10, 0x9c1b}, {vendorIntel, 0x9c90, 0x9c9b},
		{vendorIntel, 0x8d10, 0x8d1e},
	},
	one(vendorIntel, 0x1d10, 0x1d12, 0x1d14, 0x1d16, 0x1d18, 0x1d1a, 0x1d1c, 0x1d1e),
	one(vendorIntel, 0x8c90, 0x8c92, 0x8c94, 0x8c96, 0x8c98, 0x8c9a, 0x8c9c, 0x8c9e),
)

// intelDwords are root ports whose ACS registers are dwords (pci_quirk_intel_spt_pch_acs_match).
var intelDwords = []idRange{
	{vendorIntel, 0xa110, 0xa11f}, {vendorIntel, 0xa167, 0xa16a}, {vendorIntel, 0xa290, 0xa29f},
	{vendorIntel, 0xa2e7, 0xa2ee}, {vendorIntel, 0x9d10, 0x9d1b},
}

// noSourceValidation are switches whose source validation is broken; newer kernels do without it.
var noSourceValidation = one(0x111d, 0x80b5, 0x8090)

// Devices whose DMA comes from other functions than their own: from function 0 or function 1 of the same device
// (quirk_dma_func0_alias, quirk_dma_func1_alias), or from any function of the bus.
var (
	asFunction0 = ranges(one(0x1180, 0xe832, 0xe476), one(0x6766, 0x3d40, 0x3d41))
	asFunction1 = ranges(
		one(vendorMarvell, 0x9120, 0x9123, 0x9125, 0x9128, 0x9130, 0x9170, 0x9172, 0x917a, 0x9182, 0x9183, 0x91a0,
			0x9215, 0x9220, 0x9230, 0x9235),
		one(0x1103, 0x0642, 0x0645), one(0x197b, 0x2392), one(0x1c28, 0x0122),
	)
	asAnyFunction = one(0x10b5, 0x87b0, 0x87b1)                                      // PLX (quirk_plx_ntb_dma_alias)
	asAnyDevice   = one(vendorIntel, 0x2954, 0x2955, 0x2956, 0x2958, 0x2959, 0x295a) // quirk_pex_vca_alias
	asMIC         = one(vendorIntel, 0x2260, 0x2264)                                 // quirk_mic_x200_dma_alias
	asAdaptec     = one(0x9005, 0x0285)                                              // quirk_fixed_dma_alias
	// These have in their own memory which functions (quirk_switchtec_ntb_dma_alias).
	asTheySay = []idRange{{0x11f8, 0x4000, 0x85ff}, {0x1055, 0x1001, 0x1008}}
)

// devfn is a device and function as the hardware numbers them.
func (a Address) devfn() int { return int(a.Device)<<3 | int(a.Function) }

// appearsAs reports whether the DMA of a device comes, by quirk, from another function of its bus too. It is not known,
// false, of devices that have that in their memory.
func appearsAs(a Address, id ID, other int) (yes, known bool) {
	slot, function := other>>3, other&7
	switch {
	case in(asFunction0, id):
		return slot == int(a.Device) && function == 0, true
	case in(asFunction1, id):
		return slot == int(a.Device) && function == 1, true
	case in(asAnyFunction, id):
		return true, true
	case in(asAnyDevice, id):
		return function < 5, true
	case in(asMIC, id):
		return other == 0x10<<3 || other == 0x11<<3 || other == 0x12<<3|3, true
	case in(asAdaptec, id):
		return id.Subvendor == 0x9005 && (id.Subdevice == 0x02bb || id.Subdevice == 0x02bc) && other == 1<<3, true
	case in(asTheySay, id) && id.Class>>8 == 0x0680:
		return false, false
	}
	return false, true
}
