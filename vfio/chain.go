package vfio

import (
	"cmp"
	"fmt"
	"slices"
	"unsafe"

	"viaduct/internal/uapi"
)

// maxInfo is the most that the kernel is let say in one answer, in bytes.
const maxInfo = 1 << 20

// sized asks the kernel for information whose length it tells: b holds the request, which begins with the room there is
// (argsz). If that is too small, the answer has no capabilities, and says how much it takes.
func (f *file) sized(op string, request uintptr, b []byte) ([]byte, error) {
	for ask := b; ; {
		answer := append([]byte(nil), ask...)
		*(*uint32)(unsafe.Pointer(&answer[0])) = uint32(len(answer))
		if _, err := f.ioctl(op, request, unsafe.Pointer(&answer[0]), nil); err != nil {
			return nil, err
		}

		need := *(*uint32)(unsafe.Pointer(&answer[0]))
		if int(need) <= len(answer) {
			return answer, nil
		}
		if need > maxInfo {
			return nil, fmt.Errorf("vfio: %s %s: the kernel's answer has %d bytes, which is too much", op, f.name, need)
		}
		ask = append(append([]byte(nil), b...), make([]byte, int(need)-len(b))...)
	}
}

// at is the structure at an offset of an answer; false if it does not fit.
func at[T any](b []byte, offset uint64) (v T, ok bool) {
	size := uint64(unsafe.Sizeof(v))
	if offset > uint64(len(b)) || uint64(len(b))-offset < size {
		return v, false
	}
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&v)), size), b[offset:])
	return v, true
}

// list is as many structures as there are said to be at an offset; false if they do not fit.
func list[T any](b []byte, offset uint64, count uint32) ([]T, bool) {
	var one T
	size := uint64(unsafe.Sizeof(one))
	if offset > uint64(len(b)) || uint64(count) > (uint64(len(b))-offset)/size {
		return nil, false
	}
	out := make([]T, count)
	for i := range out {
		out[i], _ = at[T](b, offset+uint64(i)*size)
	}
	return out, true
}

// chain has a function see each capability of an answer's chain: its id and where it begins. Where the chain ends is
// told by a zero. The kernel appends capabilities, so that each lies behind the one before it: what does not is an
// error.
func chain(b []byte, first uint32, see func(id uint16, offset uint64) bool) error {
	for last, next := uint32(0), first; next != 0; {
		if next <= last || next < uint32(unsafe.Sizeof(uapi.VfioInfoCapHeader{})) {
			return fmt.Errorf("vfio: a chain of capabilities goes back from byte %d to %d", last, next)
		}
		header, ok := at[uapi.VfioInfoCapHeader](b, uint64(next))
		if !ok || !see(header.Id, uint64(next)) {
			return fmt.Errorf("vfio: a capability at byte %d does not fit into %d bytes", next, len(b))
		}
		last, next = next, header.Next
	}
	return nil
}

func errShort(what string, b []byte) error {
	return fmt.Errorf("vfio: %s of %d bytes is too short", what, len(b))
}

// decodeDevice decodes the answer to VFIO_DEVICE_GET_INFO.
func decodeDevice(b []byte) (DeviceInfo, error) {
	raw, ok := at[uapi.VfioDeviceInfo](b, 0)
	if !ok {
		return DeviceInfo{}, errShort("device information", b)
	}
	info := DeviceInfo{
		PCI: raw.Flags&uapi.VFIO_DEVICE_FLAGS_PCI != 0, Reset: raw.Flags&uapi.VFIO_DEVICE_FLAGS_RESET != 0,
		Regions: int(raw.NumRegions), Interrupts: int(raw.NumIrqs),
	}
	if raw.Flags&uapi.VFIO_DEVICE_FLAGS_CAPS == 0 {
		return info, nil
	}
	err := chain(b, raw.CapOffset, func(id uint16, offset uint64) bool {
		if id != uapi.VFIO_DEVICE_INFO_CAP_PCI_ATOMIC_COMP {
			return true
		}
		atomic, ok := at[uapi.VfioDeviceInfoCapPciAtomicComp](b, offset)
		for i, width := range []int{32, 64, 128} {
			if atomic.Flags&(1<<i) != 0 {
				info.Atomics = append(info.Atomics, width)
			}
		}
		return ok
	})
	return info, err
}

// decodeRegion decodes the answer to VFIO_DEVICE_GET_REGION_INFO.
func decodeRegion(b []byte) (RegionInfo, error) {
	raw, ok := at[uapi.VfioRegionInfo](b, 0)
	if !ok {
		return RegionInfo{}, errShort("information about a region", b)
	}
	if raw.Size > 1<<62 || raw.Offset > 1<<62 {
		return RegionInfo{}, fmt.Errorf("vfio: a region of %#x bytes at %#x of a file cannot be", raw.Size, raw.Offset)
	}

	info := RegionInfo{
		Index: int(raw.Index), Size: int64(raw.Size), offset: int64(raw.Offset),
		Read:  raw.Flags&uapi.VFIO_REGION_INFO_FLAG_READ != 0,
		Write: raw.Flags&uapi.VFIO_REGION_INFO_FLAG_WRITE != 0,
	}

	mmap := raw.Flags&uapi.VFIO_REGION_INFO_FLAG_MMAP != 0
	sparse := false
	if raw.Flags&uapi.VFIO_REGION_INFO_FLAG_CAPS != 0 {
		err := chain(b, raw.CapOffset, func(id uint16, offset uint64) (ok bool) {
			switch id {
			case uapi.VFIO_REGION_INFO_CAP_SPARSE_MMAP:
				sparse = true
				info.Mappable, ok = decodeAreas(b, offset, raw.Size)
				return ok
			case uapi.VFIO_REGION_INFO_CAP_TYPE:
				t, ok := at[uapi.VfioRegionInfoCapType](b, offset)
				info.Type, info.Subtype = t.Type, t.Subtype
				return ok
			default:
				return true
			}
		})
		if err != nil {
			return RegionInfo{}, err
		}
	}

	switch {
	case !mmap:
		info.Mappable = nil
	case !sparse && info.Size > 0:
		info.Mappable = []Area{{0, info.Size}}
	}

	return info, nil
}

// decodeAreas decodes the parts of a region that can be mapped. They must lie in it, and not over
// each other.
func decodeAreas(b []byte, offset, region uint64) ([]Area, bool) {
	head, ok := at[uapi.VfioRegionInfoCapSparseMmap](b, offset)
	if !ok {
		return nil, false
	}
	all, ok := list[uapi.VfioRegionSparseMmapArea](b, offset+uint64(unsafe.Sizeof(head)), head.NrAreas)
	slices.SortFunc(all, func(a, b uapi.VfioRegionSparseMmapArea) int { return cmp.Compare(a.Offset, b.Offset) })
	var areas []Area
	end := uint64(0)
	for _, a := range all {
		if a.Size == 0 {
			continue
		}
		if a.Offset < end || a.Offset > region || a.Size > region-a.Offset {
			return nil, false
		}
		areas = append(areas, Area{int64(a.Offset), int64(a.Size)})
		end = a.Offset + a.Size
	}
	return areas, ok
}

// decodeType1 decodes the answer to VFIO_IOMMU_GET_INFO.
func decodeType1(b []byte) (Info, error) {
	raw, ok := at[uapi.VfioIommuType1Info](b, 0)
	if !ok {
		return Info{}, errShort("information about an IOMMU", b)
	}
	var info Info
	if raw.Flags&uapi.VFIO_IOMMU_INFO_PGSIZES != 0 && raw.IovaPgsizes != 0 {
		sizes := raw.IovaPgsizes
		info.PageSizes, info.Alignment = &sizes, sizes&-sizes
	}
	if raw.Flags&uapi.VFIO_IOMMU_INFO_CAPS == 0 {
		return info, nil
	}
	err := chain(b, raw.CapOffset, func(id uint16, offset uint64) (ok bool) {
		switch id {
		case uapi.VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE:
			info.Ranges, ok = decodeRanges(b, offset)
			return ok
		case uapi.VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL:
			avail, ok := at[uapi.VfioIommuType1InfoDmaAvail](b, offset)
			info.Left = &avail.Avail
			return ok
		default:
			return true
		}
	})
	return info, err
}

// decodeRanges decodes addresses that can be mapped, which are in order.
func decodeRanges(b []byte, offset uint64) ([]Range, bool) {
	head, ok := at[uapi.VfioIommuType1InfoCapIovaRange](b, offset)
	if !ok {
		return nil, false
	}
	all, ok := list[uapi.VfioIovaRange](b, offset+uint64(unsafe.Sizeof(head)), head.NrIovas)
	var ranges []Range
	for _, r := range all {
		ranges = append(ranges, Range{r.Start, r.End})
	}
	return ranges, ok && ordered(ranges)
}
