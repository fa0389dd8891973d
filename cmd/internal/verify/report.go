// Package verify opens a device through VFIO, as a guest's VMM would, and says whether it works.
package verify

import (
	"viaduct/iommu"
	"viaduct/vfio"
)

// Report is what is known of a device after it was opened. A pointer is nil, and a list null, where that could not be
// told.
type Report struct {
	Address iommu.Address `json:"address"`
	Driver  *string       `json:"driver"`
	// Usable says that the device can go to a guest. If not, Reasons say why not. Notes are what else should be known.
	Usable  bool     `json:"usable"`
	Reasons []string `json:"reasons"`
	Notes   []string `json:"notes"`
	// Ways are by their names: iommufd and container.
	Ways          map[vfio.Way]*Way `json:"ways"`
	Regions       []Region          `json:"regions"`
	Interrupts    []Interrupts      `json:"interrupts"`
	Reset         Reset             `json:"reset"`
	Migration     Migration         `json:"migration"`
	DirtyTracking DirtyTracking     `json:"dirty_tracking"`
	Memory        *Memory           `json:"memory"` // nil if none was asked about
}

// Way is what came of one way into VFIO.
type Way struct {
	OK    bool    `json:"ok"`
	Error *string `json:"error"`
	// Exists says whether the kernel has this way for the device.
	Exists       bool     `json:"exists"`
	PageSizes    []uint64 `json:"page_sizes"` // in bytes
	Alignment    *uint64  `json:"alignment"`  // in bytes, of what is mapped
	AddressWidth *int     `json:"address_width"`
	IOVARanges   []Span   `json:"iova_ranges"`
	Reserved     []Span   `json:"reserved"`
	MappingsLeft *uint32  `json:"mappings_left"`
	Mapping      []Timing `json:"mapping"`
	IOMMU        *string  `json:"iommu"` // the kind: amd-vi, vt-d, smmu-v3
	Interrupt    *bool    `json:"interrupt"`

	err    error
	ranges []vfio.Range
}

// Span is a range of addresses, in hexadecimal.
type Span struct {
	Start string `json:"start"`
	End   string `json:"end"`
}

// Timing is how long memory of one page size took to be mapped and unmapped.
type Timing struct {
	PageSize uint64 `json:"page_size"` // in bytes
	Size     uint64 `json:"size"`      // in bytes
	Map      int64  `json:"map_ns"`
	Unmap    int64  `json:"unmap_ns"`
}

// Region is a region of the device.
type Region struct {
	Name     string `json:"name"`
	Size     int64  `json:"size"` // in bytes
	Read     bool   `json:"read"`
	Write    bool   `json:"write"`
	Mappable int64  `json:"mappable"` // how many of the bytes can be mapped
}

// Interrupts is a kind of interrupts of the device.
type Interrupts struct {
	Name     string `json:"name"`
	Vectors  int    `json:"vectors"`
	Maskable bool   `json:"maskable"`
	Fixed    bool   `json:"fixed"` // all vectors are enabled at once, or none
}

// Reset is how the device can be reset, and what came of it.
type Reset struct {
	Methods  []string `json:"methods"` // the kernel's, in its order; null if it does not tell
	ByItself *bool    `json:"alone"`   // it can be reset by itself
	Worked   *bool    `json:"worked"`  // that was tried
	Error    *string  `json:"error"`
	// Together are the functions that a hot reset of its bus or slot resets; null if there is no such reset.
	Together []string `json:"together"`
}

// Migration is what the device's driver can of moving its state to another host.
type Migration struct {
	OK       *bool   `json:"ok"`
	Reason   *string `json:"reason"` // why not
	P2P      *bool   `json:"p2p"`
	PreCopy  *bool   `json:"pre_copy"`
	DataSize *uint64 `json:"data_size"` // in bytes, an estimate
}

// DirtyTracking is who can note what memory the device writes to.
type DirtyTracking struct {
	Device Ability `json:"device"`
	IOMMU  Ability `json:"iommu"`
}

// Ability is whether something can be done, and why not.
type Ability struct {
	OK     *bool   `json:"ok"`
	Reason *string `json:"reason"`
}

// Memory is whether a guest's memory can be mapped for the device.
type Memory struct {
	Size      uint64   `json:"size"` // in bytes
	OK        *bool    `json:"ok"`
	Ranges    []Span   `json:"ranges"`     // where a guest has it
	LockLimit *uint64  `json:"lock_limit"` // in bytes, of this process; null is no limit
	HugePages []Huge   `json:"huge_pages"`
	Missing   []string `json:"missing"`
}

// Huge is how many huge pages of a size are free.
type Huge struct {
	Size   uint64 `json:"size"` // in bytes
	Free   uint64 `json:"free"`
	Enough bool   `json:"enough"`
}

func spans(ranges []vfio.Range) []Span {
	out := []Span{}
	for _, r := range ranges {
		out = append(out, Span{hex(r.First), hex(r.Last)})
	}
	return out
}
