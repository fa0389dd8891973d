package uapi

import (
	"structs"
	"unsafe"
)

// Of a container (/dev/vfio/vfio), a group, and a device.
const (
	VFIO_GET_API_VERSION                 = vfioIO + 0
	VFIO_CHECK_EXTENSION                 = vfioIO + 1
	VFIO_SET_IOMMU                       = vfioIO + 2
	VFIO_GROUP_GET_STATUS                = vfioIO + 3
	VFIO_GROUP_SET_CONTAINER             = vfioIO + 4
	VFIO_GROUP_UNSET_CONTAINER           = vfioIO + 5
	VFIO_GROUP_GET_DEVICE_FD             = vfioIO + 6
	VFIO_DEVICE_GET_INFO                 = vfioIO + 7
	VFIO_DEVICE_GET_REGION_INFO          = vfioIO + 8
	VFIO_DEVICE_GET_IRQ_INFO             = vfioIO + 9
	VFIO_DEVICE_SET_IRQS                 = vfioIO + 10
	VFIO_DEVICE_RESET                    = vfioIO + 11
	VFIO_DEVICE_GET_PCI_HOT_RESET_INFO   = vfioIO + 12
	VFIO_DEVICE_PCI_HOT_RESET            = vfioIO + 13
	VFIO_DEVICE_FEATURE                  = vfioIO + 17
	VFIO_DEVICE_BIND_IOMMUFD             = vfioIO + 18
	VFIO_DEVICE_ATTACH_IOMMUFD_PT        = vfioIO + 19
	VFIO_DEVICE_DETACH_IOMMUFD_PT        = vfioIO + 20
	VFIO_MIG_GET_PRECOPY_INFO            = vfioIO + 21 // of a data descriptor
	VFIO_IOMMU_GET_INFO                  = vfioIO + 12 // of a container, as are those below
	VFIO_IOMMU_MAP_DMA                   = vfioIO + 13
	VFIO_IOMMU_UNMAP_DMA                 = vfioIO + 14
	VFIO_API_VERSION                     = 0
	VFIO_TYPE1v2_IOMMU                   = 3
	VFIO_UNMAP_ALL                       = 9
	VFIO_GROUP_FLAGS_VIABLE              = 1 << 0
	VFIO_GROUP_FLAGS_CONTAINER_SET       = 1 << 1
	VFIO_DEVICE_FLAGS_RESET              = 1 << 0
	VFIO_DEVICE_FLAGS_PCI                = 1 << 1
	VFIO_DEVICE_FLAGS_CAPS               = 1 << 7
	VFIO_DEVICE_INFO_CAP_PCI_ATOMIC_COMP = 5
)

// Of regions.
const (
	VFIO_REGION_INFO_FLAG_READ         = 1 << 0
	VFIO_REGION_INFO_FLAG_WRITE        = 1 << 1
	VFIO_REGION_INFO_FLAG_MMAP         = 1 << 2
	VFIO_REGION_INFO_FLAG_CAPS         = 1 << 3
	VFIO_REGION_INFO_CAP_SPARSE_MMAP   = 1
	VFIO_REGION_INFO_CAP_TYPE          = 2
	VFIO_REGION_INFO_CAP_MSIX_MAPPABLE = 3
	VFIO_PCI_BAR0_REGION_INDEX         = 0
	VFIO_PCI_BAR5_REGION_INDEX         = 5
	VFIO_PCI_ROM_REGION_INDEX          = 6
	VFIO_PCI_CONFIG_REGION_INDEX       = 7
	VFIO_PCI_VGA_REGION_INDEX          = 8
	VFIO_PCI_NUM_REGIONS               = 9
)

// Of interrupts.
const (
	VFIO_IRQ_INFO_EVENTFD       = 1 << 0
	VFIO_IRQ_INFO_MASKABLE      = 1 << 1
	VFIO_IRQ_INFO_AUTOMASKED    = 1 << 2
	VFIO_IRQ_INFO_NORESIZE      = 1 << 3
	VFIO_IRQ_SET_DATA_NONE      = 1 << 0
	VFIO_IRQ_SET_DATA_BOOL      = 1 << 1
	VFIO_IRQ_SET_DATA_EVENTFD   = 1 << 2
	VFIO_IRQ_SET_ACTION_MASK    = 1 << 3
	VFIO_IRQ_SET_ACTION_UNMASK  = 1 << 4
	VFIO_IRQ_SET_ACTION_TRIGGER = 1 << 5
	VFIO_PCI_INTX_IRQ_INDEX     = 0
	VFIO_PCI_MSI_IRQ_INDEX      = 1
	VFIO_PCI_MSIX_IRQ_INDEX     = 2
	VFIO_PCI_ERR_IRQ_INDEX      = 3
	VFIO_PCI_REQ_IRQ_INDEX      = 4
	VFIO_PCI_NUM_IRQS           = 5
)

// Of hot resets.
const (
	VFIO_PCI_HOT_RESET_FLAG_DEV_ID       = 1 << 0
	VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED = 1 << 1
	VFIO_PCI_DEVID_OWNED                 = 0
	VFIO_PCI_DEVID_NOT_OWNED             = -1
)

// Of features.
const (
	VFIO_DEVICE_FEATURE_MASK                        = 0xffff
	VFIO_DEVICE_FEATURE_GET                         = 1 << 16
	VFIO_DEVICE_FEATURE_SET                         = 1 << 17
	VFIO_DEVICE_FEATURE_PROBE                       = 1 << 18
	VFIO_DEVICE_FEATURE_PCI_VF_TOKEN                = 0
	VFIO_DEVICE_FEATURE_MIGRATION                   = 1
	VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE            = 2
	VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY             = 3
	VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP = 4
	VFIO_DEVICE_FEATURE_LOW_POWER_EXIT              = 5
	VFIO_DEVICE_FEATURE_DMA_LOGGING_START           = 6
	VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP            = 7
	VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT          = 8
	VFIO_DEVICE_FEATURE_MIG_DATA_SIZE               = 9
	VFIO_DEVICE_BIND_FLAG_TOKEN                     = 1 << 0 // newer
	VFIO_MIGRATION_STOP_COPY                        = 1 << 0
	VFIO_MIGRATION_P2P                              = 1 << 1
	VFIO_MIGRATION_PRE_COPY                         = 1 << 2
	VFIO_DEVICE_STATE_ERROR                         = 0
	VFIO_DEVICE_STATE_STOP                          = 1
	VFIO_DEVICE_STATE_RUNNING                       = 2
	VFIO_DEVICE_STATE_STOP_COPY                     = 3
	VFIO_DEVICE_STATE_RESUMING                      = 4
	VFIO_DEVICE_STATE_RUNNING_P2P                   = 5
	VFIO_DEVICE_STATE_PRE_COPY                      = 6
	VFIO_DEVICE_STATE_PRE_COPY_P2P                  = 7
)

// Of a type1 IOMMU.
const (
	VFIO_IOMMU_INFO_PGSIZES              = 1 << 0
	VFIO_IOMMU_INFO_CAPS                 = 1 << 1
	VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE = 1
	VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION  = 2
	VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL      = 3
	VFIO_DMA_MAP_FLAG_READ               = 1 << 0
	VFIO_DMA_MAP_FLAG_WRITE              = 1 << 1
	VFIO_DMA_UNMAP_FLAG_ALL              = 1 << 1
)

// VfioInfoCapHeader begins each element of a chain of capabilities. Next is its offset from the information's start.
type VfioInfoCapHeader struct {
	_       structs.HostLayout
	Id      uint16
	Version uint16
	Next    uint32
}

type VfioGroupStatus struct {
	_            structs.HostLayout
	Argsz, Flags uint32
}

type VfioDeviceInfo struct {
	_            structs.HostLayout
	Argsz, Flags uint32
	NumRegions   uint32
	NumIrqs      uint32
	CapOffset    uint32
	Pad          uint32
}

type VfioDeviceInfoCapPciAtomicComp struct {
	_        structs.HostLayout
	Header   VfioInfoCapHeader
	Flags    uint32
	Reserved uint32
}

type VfioRegionInfo struct {
	_            structs.HostLayout
	Argsz, Flags uint32
	Index        uint32
	CapOffset    uint32
	Size         uint64
	Offset       uint64
}

type VfioRegionSparseMmapArea struct {
	_            structs.HostLayout
	Offset, Size uint64
}

// VfioRegionInfoCapSparseMmap is followed by its areas.
type VfioRegionInfoCapSparseMmap struct {
	_        structs.HostLayout
	Header   VfioInfoCapHeader
	NrAreas  uint32
	Reserved uint32
}

type VfioRegionInfoCapType struct {
	_       structs.HostLayout
	Header  VfioInfoCapHeader
	Type    uint32
	Subtype uint32
}

type VfioIrqInfo struct {
	_            structs.HostLayout
	Argsz, Flags uint32
	Index        uint32
	Count        uint32
}

// VfioIrqSet is followed by its data, at byte 20.
type VfioIrqSet struct {
	_            structs.HostLayout
	Argsz, Flags uint32
	Index        uint32
	Start        uint32
	Count        uint32
}

// VfioPciDependentDevice has a group's number, or in a context of iommufd the id of a device (VFIO_PCI_DEVID_OWNED and
// such), in its first field.
type VfioPciDependentDevice struct {
	_       structs.HostLayout
	GroupId uint32
	Segment uint16
	Bus     uint8
	Devfn   uint8
}

// VfioPciHotResetInfo is followed by its devices.
type VfioPciHotResetInfo struct {
	_            structs.HostLayout
	Argsz, Flags uint32
	Count        uint32
}

// VfioPciHotReset is followed by descriptors of groups, int32 each.
type VfioPciHotReset struct {
	_            structs.HostLayout
	Argsz, Flags uint32
	Count        uint32
}

// VfioDeviceFeature is followed by its data.
type VfioDeviceFeature struct {
	_            structs.HostLayout
	Argsz, Flags uint32
}

// VfioDeviceBindIommufd has 16 bytes, without the token, in older headers; kernels take the longer one without flags.
type VfioDeviceBindIommufd struct {
	_            structs.HostLayout
	Argsz, Flags uint32
	Iommufd      int32
	OutDevid     uint32
	TokenUuidPtr uint64 // newer
}

// VfioDeviceAttachIommufdPt has another field, for a PASID, in newer headers.
type VfioDeviceAttachIommufdPt struct {
	_            structs.HostLayout
	Argsz, Flags uint32
	PtId         uint32
}

type VfioDeviceFeatureMigration struct {
	_     structs.HostLayout
	Flags uint64
}

type VfioDeviceFeatureMigState struct {
	_           structs.HostLayout
	DeviceState uint32
	DataFd      int32
}

type VfioPrecopyInfo struct {
	_            structs.HostLayout
	Argsz, Flags uint32
	InitialBytes uint64
	DirtyBytes   uint64
}

type VfioDeviceLowPowerEntryWithWakeup struct {
	_             structs.HostLayout
	WakeupEventfd int32
	Reserved      uint32
}

type VfioDeviceFeatureDmaLoggingControl struct {
	_         structs.HostLayout
	PageSize  uint64
	NumRanges uint32
	Reserved  uint32 `c:"__reserved"`
	Ranges    uint64
}

type VfioDeviceFeatureDmaLoggingRange struct {
	_            structs.HostLayout
	Iova, Length uint64
}

type VfioDeviceFeatureDmaLoggingReport struct {
	_            structs.HostLayout
	Iova, Length uint64
	PageSize     uint64
	Bitmap       uint64
}

type VfioDeviceFeatureMigDataSize struct {
	_              structs.HostLayout
	StopCopyLength uint64
}

type VfioIommuType1Info struct {
	_            structs.HostLayout
	Argsz, Flags uint32
	IovaPgsizes  uint64
	CapOffset    uint32
	Pad          uint32
}

// VfioIovaRange ends with End, inclusive.
type VfioIovaRange struct {
	_          structs.HostLayout
	Start, End uint64
}

// VfioIommuType1InfoCapIovaRange is followed by its ranges.
type VfioIommuType1InfoCapIovaRange struct {
	_        structs.HostLayout
	Header   VfioInfoCapHeader
	NrIovas  uint32
	Reserved uint32
}

type VfioIommuType1InfoDmaAvail struct {
	_      structs.HostLayout
	Header VfioInfoCapHeader
	Avail  uint32
}

type VfioIommuType1DmaMap struct {
	_                 structs.HostLayout
	Argsz, Flags      uint32
	Vaddr, Iova, Size uint64
}

type VfioIommuType1DmaUnmap struct {
	_            structs.HostLayout
	Argsz, Flags uint32
	Iova, Size   uint64
}

// The sizes that the kernel expects.
var (
	_ [8]byte  = [unsafe.Sizeof(VfioInfoCapHeader{})]byte{}
	_ [8]byte  = [unsafe.Sizeof(VfioGroupStatus{})]byte{}
	_ [24]byte = [unsafe.Sizeof(VfioDeviceInfo{})]byte{}
	_ [16]byte = [unsafe.Sizeof(VfioDeviceInfoCapPciAtomicComp{})]byte{}
	_ [32]byte = [unsafe.Sizeof(VfioRegionInfo{})]byte{}
	_ [16]byte = [unsafe.Sizeof(VfioRegionSparseMmapArea{})]byte{}
	_ [16]byte = [unsafe.Sizeof(VfioRegionInfoCapSparseMmap{})]byte{}
	_ [16]byte = [unsafe.Sizeof(VfioRegionInfoCapType{})]byte{}
	_ [16]byte = [unsafe.Sizeof(VfioIrqInfo{})]byte{}
	_ [20]byte = [unsafe.Sizeof(VfioIrqSet{})]byte{}
	_ [8]byte  = [unsafe.Sizeof(VfioPciDependentDevice{})]byte{}
	_ [12]byte = [unsafe.Sizeof(VfioPciHotResetInfo{})]byte{}
	_ [12]byte = [unsafe.Sizeof(VfioPciHotReset{})]byte{}
	_ [8]byte  = [unsafe.Sizeof(VfioDeviceFeature{})]byte{}
	_ [24]byte = [unsafe.Sizeof(VfioDeviceBindIommufd{})]byte{}
	_ [12]byte = [unsafe.Sizeof(VfioDeviceAttachIommufdPt{})]byte{}
	_ [8]byte  = [unsafe.Sizeof(VfioDeviceFeatureMigration{})]byte{}
	_ [8]byte  = [unsafe.Sizeof(VfioDeviceFeatureMigState{})]byte{}
	_ [24]byte = [unsafe.Sizeof(VfioPrecopyInfo{})]byte{}
	_ [8]byte  = [unsafe.Sizeof(VfioDeviceLowPowerEntryWithWakeup{})]byte{}
	_ [24]byte = [unsafe.Sizeof(VfioDeviceFeatureDmaLoggingControl{})]byte{}
	_ [16]byte = [unsafe.Sizeof(VfioDeviceFeatureDmaLoggingRange{})]byte{}
	_ [32]byte = [unsafe.Sizeof(VfioDeviceFeatureDmaLoggingReport{})]byte{}
	_ [8]byte  = [unsafe.Sizeof(VfioDeviceFeatureMigDataSize{})]byte{}
	_ [24]byte = [unsafe.Sizeof(VfioIommuType1Info{})]byte{}
	_ [16]byte = [unsafe.Sizeof(VfioIovaRange{})]byte{}
	_ [16]byte = [unsafe.Sizeof(VfioIommuType1InfoCapIovaRange{})]byte{}
	_ [12]byte = [unsafe.Sizeof(VfioIommuType1InfoDmaAvail{})]byte{}
	_ [32]byte = [unsafe.Sizeof(VfioIommuType1DmaMap{})]byte{}
	_ [24]byte = [unsafe.Sizeof(VfioIommuType1DmaUnmap{})]byte{}
)
