package vfio

import (
	"fmt"
	"runtime"
	"unsafe"

	"viaduct/internal/uapi"
)

// Hardware is what the kernel tells of the IOMMU in front of a device (IOMMU_GET_HW_INFO). At most one of AMD, VTd and
// SMMU is not nil: which one depends on the kernel, too, as each kind was added later.
type Hardware struct {
	DirtyTracking bool // it can note what devices write to
	AMD           *AMDInfo
	VTd           *VTdInfo
	SMMU          *SMMUInfo
}

// AMDInfo are registers of an AMD IOMMU: its extended features (MMIO offsets 0x30 and 0x1a0 of AMD's specification
// 48882).
type AMDInfo struct{ EFR, EFR2 uint64 }

// VTdInfo are registers of Intel's VT-d: capabilities and extended capabilities (offsets 0x08 and 0x10, chapter 11 of
// its specification).
type VTdInfo struct{ Capability, Extended uint64 }

// Width is how many bits an address for DMA can have (MGAW).
func (v VTdInfo) Width() int { return int(v.Capability>>16&0x3f) + 1 }

// SMMUInfo are registers of Arm's SMMUv3: its identification (chapter 6.3 of IHI 0070).
type SMMUInfo struct {
	IDR        [6]uint32
	IIDR, AIDR uint32
}

// Width is how many bits an address can have that it puts out (IDR5.OAS); 0 if the value is reserved.
func (s SMMUInfo) Width() int {
	widths := []int{32, 36, 40, 42, 44, 48, 52, 56}
	return widths[s.IDR[5]&7]
}

// Hardware asks about the IOMMU in front of the device. It is an ErrUnsupported by the way of containers, and of an
// IOMMU of which the kernel tells nothing.
func (d *Device) Hardware() (Hardware, error) {
	s, ok := d.context.current().(*iommufd)
	if !ok {
		return Hardware{}, fmt.Errorf("vfio: %s: only iommufd reports the IOMMU: %w", d.Name(), ErrUnsupported)
	}
	var pin runtime.Pinner
	defer pin.Unpin()
	data := make([]byte, 64)
	a := uapi.IommuHwInfo{
		Size: uint32(unsafe.Sizeof(uapi.IommuHwInfo{})), DevId: d.id, DataLen: uint32(len(data)),
		DataUptr: pointer(&pin, data),
	}
	if _, err := s.file.ioctl("IOMMU_GET_HW_INFO", uapi.IOMMU_GET_HW_INFO, unsafe.Pointer(&a), nil); err != nil {
		return Hardware{}, err
	}
	return decodeHardware(a.OutDataType, a.OutCapabilities, data[:min(int(a.DataLen), len(data))])
}

// decodeHardware decodes the answer to IOMMU_GET_HW_INFO. What the kernel has of another kind is no error.
func decodeHardware(kind uint32, capabilities uint64, data []byte) (Hardware, error) {
	h := Hardware{DirtyTracking: capabilities&uapi.IOMMU_HW_CAP_DIRTY_TRACKING != 0}
	ok := true
	switch kind {
	case uapi.IOMMU_HW_INFO_TYPE_AMD:
		var raw uapi.IommuHwInfoAmd
		raw, ok = at[uapi.IommuHwInfoAmd](data, 0)
		h.AMD = &AMDInfo{raw.Efr, raw.Efr2}
	case uapi.IOMMU_HW_INFO_TYPE_INTEL_VTD:
		var raw uapi.IommuHwInfoVtd
		raw, ok = at[uapi.IommuHwInfoVtd](data, 0)
		h.VTd = &VTdInfo{raw.CapReg, raw.EcapReg}
	case uapi.IOMMU_HW_INFO_TYPE_ARM_SMMUV3:
		var raw uapi.IommuHwInfoArmSmmuv3
		raw, ok = at[uapi.IommuHwInfoArmSmmuv3](data, 0)
		h.SMMU = &SMMUInfo{raw.Idr, raw.Iidr, raw.Aidr}
	}
	if !ok {
		return Hardware{}, errShort(fmt.Sprintf("information of kind %d about the IOMMU", kind), data)
	}
	return h, nil
}
