package vfio

import (
	"cmp"
	"fmt"
	"math/bits"
	"slices"
)

// Range is addresses for DMA, from the first to the last.
type Range struct{ First, Last uint64 }

// String is as 0x1000-0x1fff.
func (r Range) String() string { return fmt.Sprintf("%#x-%#x", r.First, r.Last) }

// Contains reports whether all addresses of the other are in the range.
func (r Range) Contains(o Range) bool { return r.First <= o.First && o.Last <= r.Last }

// Overlaps reports whether the two have an address in common.
func (r Range) Overlaps(o Range) bool { return r.First <= o.Last && o.First <= r.Last }

// ordered reports whether ranges are that, and lie one behind the other.
func ordered(ranges []Range) bool {
	for i, r := range ranges {
		if r.Last < r.First || i > 0 && r.First <= ranges[i-1].Last {
			return false
		}
	}
	return true
}

func width(ranges []Range) int {
	if len(ranges) == 0 {
		return 0
	}
	return bits.Len64(ranges[len(ranges)-1].Last)
}

// gaps are what lies before and between ranges, which are in order.
func gaps(ranges []Range) []Range {
	var out []Range
	next := uint64(0)
	for _, r := range ranges {
		if r.First > next {
			out = append(out, Range{next, r.First - 1})
		}
		next = r.Last + 1
	}
	return out
}

// Missing are the parts of what is wanted that are in none of the ranges, which are in order.
func Missing(ranges []Range, wanted Range) []Range {
	var out []Range
	next := wanted.First
	for _, r := range ranges {
		if r.Last < next || r.First > wanted.Last {
			continue
		}
		if r.First > next {
			out = append(out, Range{next, r.First - 1})
		}
		if r.Last >= wanted.Last {
			return out
		}
		next = r.Last + 1
	}
	return append(out, Range{next, wanted.Last})
}

// find is where in mappings, which are by address, one begins at an address, or would stand.
func find(mappings []Mapping, iova uint64) (int, bool) {
	return slices.BinarySearchFunc(mappings, iova, func(m Mapping, a uint64) int { return cmp.Compare(m.IOVA, a) })
}

// placeOf is where among those that there are a mapping belongs, if it may be made. It fills in its size.
func placeOf(mappings []Mapping, m *Mapping, info Info) (int, error) {
	if m.Memory == nil {
		return 0, fmt.Errorf("vfio: map at %#x: no memory was given: %w", m.IOVA, ErrRange)
	}
	m.fill()
	fail := func(err error, format string, a ...any) (int, error) {
		return 0, fmt.Errorf("vfio: map %#x bytes at %#x: %s: %w", m.Size, m.IOVA, fmt.Sprintf(format, a...), err)
	}
	switch size := m.Memory.Size(); {
	case m.Offset < 0 || m.Size <= 0 || m.Offset > size-m.Size:
		return fail(ErrRange, "the memory has %#x bytes, from which offset %#x leaves too few", size, m.Offset)
	case m.Access&^ReadWrite != 0 || m.Access == 0:
		return fail(ErrRange, "access %d is neither reading nor writing", m.Access)
	case m.IOVA+uint64(m.Size)-1 < m.IOVA:
		return fail(ErrRange, "it ends beyond the last address")
	}
	if a := info.Alignment; a > 1 && (m.IOVA|uint64(m.Offset)|uint64(m.Size))%a != 0 {
		return fail(ErrAlignment, "address, offset and size must be multiples of %#x", a)
	}
	if missing := Missing(info.Ranges, m.span()); info.Ranges != nil && len(missing) > 0 {
		return fail(ErrRange, "the IOMMU does not allow %s", missing[0])
	}

	i, found := find(mappings, m.IOVA)
	switch {
	case found || i < len(mappings) && mappings[i].span().Overlaps(m.span()):
		return fail(ErrRange, "%s is already mapped", mappings[i].span())
	case i > 0 && mappings[i-1].span().Overlaps(m.span()):
		return fail(ErrRange, "%s is already mapped", mappings[i-1].span())
	}
	return i, nil
}

// within are the indexes of the mappings from an address on that size covers, whole.
func within(mappings []Mapping, iova, size uint64) (first, end int, err error) {
	fail := func(what string) (int, int, error) {
		return 0, 0, fmt.Errorf("vfio: unmap %#x bytes at %#x: %s: %w", size, iova, what, ErrRange)
	}
	last := iova + size - 1
	if size == 0 || last < iova {
		return fail("invalid range")
	}
	first, found := find(mappings, iova)
	if !found {
		return fail("no mapping begins there")
	}
	for end = first; end < len(mappings) && mappings[end].IOVA <= last; end++ {
		if mappings[end].span().Last > last {
			return fail("the mapping " + mappings[end].span().String() + " reaches beyond it")
		}
	}
	return first, end, nil
}
