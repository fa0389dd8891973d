package uapi

import (
	"structs"
	"unsafe"
)

// Of /dev/iommu.
const (
	IOMMU_DESTROY                        = iommuIO + 0
	IOMMU_IOAS_ALLOC                     = iommuIO + 1
	IOMMU_IOAS_IOVA_RANGES               = iommuIO + 4
	IOMMU_IOAS_MAP                       = iommuIO + 5
	IOMMU_IOAS_UNMAP                     = iommuIO + 6
	IOMMU_OPTION                         = iommuIO + 7
	IOMMU_HWPT_ALLOC                     = iommuIO + 9
	IOMMU_GET_HW_INFO                    = iommuIO + 10
	IOMMU_HWPT_SET_DIRTY_TRACKING        = iommuIO + 11
	IOMMU_HWPT_GET_DIRTY_BITMAP          = iommuIO + 12
	IOMMU_IOAS_MAP_FIXED_IOVA            = 1 << 0
	IOMMU_IOAS_MAP_WRITEABLE             = 1 << 1
	IOMMU_IOAS_MAP_READABLE              = 1 << 2
	IOMMU_OPTION_HUGE_PAGES              = 1
	IOMMU_OPTION_OP_SET                  = 0
	IOMMU_HWPT_ALLOC_DIRTY_TRACKING      = 1 << 1
	IOMMU_HWPT_DATA_NONE                 = 0
	IOMMU_HWPT_DIRTY_TRACKING_ENABLE     = 1 << 0
	IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR = 1 << 0
	IOMMU_HW_CAP_DIRTY_TRACKING          = 1 << 0
	IOMMU_HW_CAP_PCI_PASID_EXEC          = 1 << 1 // newer
	IOMMU_HW_CAP_PCI_PASID_PRIV          = 1 << 2 // newer
	IOMMU_HW_INFO_TYPE_NONE              = 0
	IOMMU_HW_INFO_TYPE_INTEL_VTD         = 1
	IOMMU_HW_INFO_TYPE_ARM_SMMUV3        = 2 // newer
	IOMMU_HW_INFO_TYPE_AMD               = 4 // newer
)

type IommuDestroy struct {
	_        structs.HostLayout
	Size, Id uint32
}

type IommuIoasAlloc struct {
	_         structs.HostLayout
	Size      uint32
	Flags     uint32
	OutIoasId uint32
}

// IommuIovaRange ends with Last, inclusive.
type IommuIovaRange struct {
	_           structs.HostLayout
	Start, Last uint64
}

type IommuIoasIovaRanges struct {
	_                structs.HostLayout
	Size             uint32
	IoasId           uint32
	NumIovas         uint32
	Reserved         uint32 `c:"__reserved"`
	AllowedIovas     uint64
	OutIovaAlignment uint64
}

type IommuIoasMap struct {
	_        structs.HostLayout
	Size     uint32
	Flags    uint32
	IoasId   uint32
	Reserved uint32 `c:"__reserved"`
	UserVa   uint64
	Length   uint64
	Iova     uint64
}

type IommuIoasUnmap struct {
	_      structs.HostLayout
	Size   uint32
	IoasId uint32
	Iova   uint64
	Length uint64
}

type IommuOption struct {
	_        structs.HostLayout
	Size     uint32
	OptionId uint32
	Op       uint16
	Reserved uint16 `c:"__reserved"`
	ObjectId uint32
	Val64    uint64
}

// IommuHwptAlloc has another name for its last field but one, a fault queue's id, in newer headers.
type IommuHwptAlloc struct {
	_         structs.HostLayout
	Size      uint32
	Flags     uint32
	DevId     uint32
	PtId      uint32
	OutHwptId uint32
	Reserved  uint32 `c:"__reserved"`
	DataType  uint32
	DataLen   uint32
	DataUptr  uint64
	FaultId   uint32 // newer
	Reserved2 uint32 // newer
}

type IommuHwInfo struct {
	_               structs.HostLayout
	Size            uint32
	Flags           uint32
	DevId           uint32
	DataLen         uint32
	DataUptr        uint64
	OutDataType     uint32
	OutMaxPasidLog2 uint8    // newer
	Reserved        [3]uint8 // newer
	OutCapabilities uint64
}

type IommuHwInfoVtd struct {
	_        structs.HostLayout
	Flags    uint32
	Reserved uint32 `c:"__reserved"`
	CapReg   uint64
	EcapReg  uint64
}

// newer
type IommuHwInfoArmSmmuv3 struct {
	_        structs.HostLayout
	Flags    uint32
	Reserved uint32 `c:"__reserved"`
	Idr      [6]uint32
	Iidr     uint32
	Aidr     uint32
}

// newer
type IommuHwInfoAmd struct {
	_    structs.HostLayout
	Efr  uint64
	Efr2 uint64
}

type IommuHwptSetDirtyTracking struct {
	_        structs.HostLayout
	Size     uint32
	Flags    uint32
	HwptId   uint32
	Reserved uint32 `c:"__reserved"`
}

type IommuHwptGetDirtyBitmap struct {
	_        structs.HostLayout
	Size     uint32
	HwptId   uint32
	Flags    uint32
	Reserved uint32 `c:"__reserved"`
	Iova     uint64
	Length   uint64
	PageSize uint64
	Data     uint64
}

// The sizes that the kernel expects.
var (
	_ [8]byte  = [unsafe.Sizeof(IommuDestroy{})]byte{}
	_ [12]byte = [unsafe.Sizeof(IommuIoasAlloc{})]byte{}
	_ [16]byte = [unsafe.Sizeof(IommuIovaRange{})]byte{}
	_ [32]byte = [unsafe.Sizeof(IommuIoasIovaRanges{})]byte{}
	_ [40]byte = [unsafe.Sizeof(IommuIoasMap{})]byte{}
	_ [24]byte = [unsafe.Sizeof(IommuIoasUnmap{})]byte{}
	_ [24]byte = [unsafe.Sizeof(IommuOption{})]byte{}
	_ [48]byte = [unsafe.Sizeof(IommuHwptAlloc{})]byte{}
	_ [40]byte = [unsafe.Sizeof(IommuHwInfo{})]byte{}
	_ [24]byte = [unsafe.Sizeof(IommuHwInfoVtd{})]byte{}
	_ [40]byte = [unsafe.Sizeof(IommuHwInfoArmSmmuv3{})]byte{}
	_ [16]byte = [unsafe.Sizeof(IommuHwInfoAmd{})]byte{}
	_ [16]byte = [unsafe.Sizeof(IommuHwptSetDirtyTracking{})]byte{}
	_ [48]byte = [unsafe.Sizeof(IommuHwptGetDirtyBitmap{})]byte{}
)
