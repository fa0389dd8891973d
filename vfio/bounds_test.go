package vfio

import (
	"errors"
	"math"
	"os"
	"reflect"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

// TestRange compares ranges that touch, overlap by one address, and lie in each other.
func TestRange(t *testing.T) {
	r := Range{0x1000, 0x1fff}
	for _, c := range []struct {
		other              Range
		contains, overlaps bool
	}{
		{r, true, true}, {Range{0x1001, 0x1ffe}, true, true},
		{Range{0xfff, 0x1fff}, false, true}, {Range{0x1000, 0x2000}, false, true},
		{Range{0, 0x1000}, false, true}, {Range{0x1fff, 0x2fff}, false, true}, {Range{0, 0x2fff}, false, true},
		{Range{0, 0xfff}, false, false}, {Range{0x2000, 0x2fff}, false, false},
	} {
		if r.Contains(c.other) != c.contains || r.Overlaps(c.other) != c.overlaps || c.other.Overlaps(r) != c.overlaps {
			t.Errorf("%s and %s", r, c.other)
		}
	}

	for _, c := range []struct {
		ranges, gaps []Range
		ordered      bool
		width        int
	}{
		{nil, nil, true, 0},
		{[]Range{{0, 0}}, nil, true, 0},
		{[]Range{{1, 1}}, []Range{{0, 0}}, true, 1},
		{[]Range{{0, 0xff}, {0x100, 0x1ff}, {0x201, 0x201}}, []Range{{0x200, 0x200}}, true, 10},
		{[]Range{{0x10, 0xff}, {0x200, math.MaxUint64}}, []Range{{0, 0xf}, {0x100, 0x1ff}}, true, 64},
		{[]Range{{1, 0}}, []Range{{0, 0}}, false, 0},
		{[]Range{{0, 0xff}, {0xff, 0x1ff}}, nil, false, 9},
	} {
		if got := gaps(c.ranges); ordered(c.ranges) != c.ordered || c.ordered && !slices.Equal(got, c.gaps) ||
			width(c.ranges) != c.width {
			t.Errorf("%v: %v, %v, %d bits", c.ranges, ordered(c.ranges), got, width(c.ranges))
		}
	}
}

// TestMissing wants what lies before, between, behind and in ranges, up to the last address that there is.
func TestMissing(t *testing.T) {
	ranges := []Range{{0x1000, 0x1fff}, {0x4000, 0x4fff}, {0x5000, 0x5fff}, {0x8000, math.MaxUint64}}
	for _, c := range []struct {
		wanted Range
		want   []Range
	}{
		{Range{0x1000, 0x1fff}, nil}, {Range{0x4800, 0x57ff}, nil}, {Range{0x9000, math.MaxUint64}, nil},
		{Range{0xfff, 0x2000}, []Range{{0xfff, 0xfff}, {0x2000, 0x2000}}},
		{Range{0x2000, 0x3fff}, []Range{{0x2000, 0x3fff}}},
		{Range{0, 0x8000}, []Range{{0, 0xfff}, {0x2000, 0x3fff}, {0x6000, 0x7fff}}},
		{Range{0x1fff, 0x1fff}, nil}, {Range{0x2000, 0x4000}, []Range{{0x2000, 0x3fff}}},
	} {
		if got := Missing(ranges, c.wanted); !slices.Equal(got, c.want) {
			t.Errorf("of %s: %v, want %v", c.wanted, got, c.want)
		}
	}
}

// TestPlace maps at each bound of what can be mapped: as far as that goes is right, and one page more is not.
func TestPlace(t *testing.T) {
	m := must2(NewMemory(4*4096, 0))(t)
	there := []Mapping{{IOVA: 0x20000, Memory: m, Size: 0x2000}, {IOVA: 0x30000, Memory: m, Size: 0x1000}}
	info := Info{Alignment: 4096, Ranges: []Range{{0x10000, 0x3ffff}, {math.MaxUint64 - 0xffff, math.MaxUint64}}}
	part := func(iova uint64, offset, size int) Mapping { return Mapping{iova, m, offset, size, Read} }
	for _, c := range []struct {
		Mapping
		at, size int
		want     error
	}{
		{part(0x10000, 0, 0), 0, 0x4000, nil}, {part(0x10000, 0x1000, 0), 0, 0x3000, nil},
		{part(0x10000, 0x3000, 0x1000), 0, 0x1000, nil}, {part(0x10000, 0x3000, 0x2000), 0, 0, ErrRange},
		{part(0x10000, 0x4000, 0), 0, 0, ErrRange}, {part(0x10000, 0, 0x4000), 0, 0x4000, nil},
		{part(0x1e000, 0, 0x2000), 0, 0x2000, nil}, {part(0x1f000, 0, 0x2000), 0, 0, ErrRange},
		{part(0x20000, 0, 0x1000), 0, 0, ErrRange}, {part(0x21000, 0, 0x1000), 0, 0, ErrRange},
		{part(0x22000, 0, 0), 1, 0x4000, nil}, {part(0x2e000, 0, 0x3000), 0, 0, ErrRange},
		{part(0x31000, 0, 0), 2, 0x4000, nil}, {part(0x30000, 0, 0), 0, 0, ErrRange},
		{part(0x3c000, 0, 0), 2, 0x4000, nil}, {part(0x3d000, 0, 0), 0, 0, ErrRange},
		{part(0xf000, 0, 0x1000), 0, 0, ErrRange},
		{part(math.MaxUint64-0x3fff, 0, 0), 2, 0x4000, nil}, {part(math.MaxUint64-0x2fff, 0, 0), 0, 0, ErrRange},
		{Mapping{0x10000, m, 0, 0, ReadWrite + 1}, 0, 0, ErrRange}, {Mapping{0x10000, m, 0, 0, -1}, 0, 0, ErrRange},
		{Mapping{0x10000, nil, 0, 0, Read}, 0, 0, ErrRange},
	} {
		asked := c.Mapping
		at, err := placeOf(there, &asked, info)
		if !errors.Is(err, c.want) || at != c.at || err == nil && asked.Size != c.size {
			t.Errorf("%#x bytes at %#x: place %d, %#x bytes, %v", c.Size, c.IOVA, at, asked.Size, err)
		}
	}

	// What is not told, or tells nothing, forbids nothing.
	for _, info := range []Info{{}, {Alignment: 1}} {
		odd := part(0x7001, 1, 1)
		if at, err := placeOf(there, &odd, info); at != 0 || err != nil {
			t.Errorf("%+v: %v", info, err)
		}
	}

	two := part(0x7002, 3, 2)
	if _, err := placeOf(there, &two, Info{Alignment: 2}); !errors.Is(err, ErrAlignment) {
		t.Error(err)
	}
	if _, err := placeOf(there, &two, Info{Ranges: []Range{}}); !errors.Is(err, ErrRange) {
		t.Errorf("an IOMMU that can map nothing: %v", err)
	}
}

// TestWithin unmaps whole mappings, from the beginning of one to the end of one or in the midst of a gap.
func TestWithin(t *testing.T) {
	there := []Mapping{{IOVA: 0x1000, Size: 0x1000}, {IOVA: 0x2000, Size: 0x2000}, {IOVA: 0x8000, Size: 0x1000},
		{IOVA: 0xa000, Size: 1}}
	for _, c := range []struct {
		iova, size uint64
		first, end int
		want       error
	}{
		{0x1000, 0x1000, 0, 1, nil}, {0x1000, 0x3000, 0, 2, nil}, {0x1000, 0x7000, 0, 2, nil},
		{0x2000, 0x7000, 1, 3, nil}, {0x8000, math.MaxUint64 - 0x7fff, 2, 4, nil},
		{0xa000, 1, 3, 4, nil},
		{0x1000, 0xfff, 0, 0, ErrRange}, {0x1000, 0x1001, 0, 0, ErrRange}, {0x1000, 0x7001, 0, 0, ErrRange},
		{0x1000, 0, 0, 0, ErrRange}, {0x1001, 0x1000, 0, 0, ErrRange}, {0x9000, 0x1000, 0, 0, ErrRange},
		{0x8000, math.MaxUint64, 0, 0, ErrRange}, {0x8000, math.MaxUint64 - 0x7ffe, 0, 0, ErrRange},
	} {
		first, end, err := within(there, c.iova, c.size)
		if !errors.Is(err, c.want) || first != c.first || end != c.end {
			t.Errorf("%#x bytes at %#x: %d to %d, %v", c.size, c.iova, first, end, err)
		}
	}
}

// TestBitmapBounds sizes bitmaps up to the most pages that one may have.
func TestBitmapBounds(t *testing.T) {
	for _, c := range []struct {
		Range
		page  uint64
		words int
		want  error
	}{
		{Range{0, 0}, 1, 1, nil}, {Range{0, 64*4096 - 1}, 4096, 1, nil}, {Range{0, 65*4096 - 1}, 4096, 2, nil},
		{Range{4096, 65*4096 - 1}, 4096, 1, nil}, {Range{4096, 8191}, 8192, 0, ErrAlignment},
		{Range{0, 1<<43 - 1}, 4096, 1 << 25, nil}, {Range{0, 1<<43 + 4095}, 4096, 0, ErrRange},
		{Range{1 << 63, 1<<62 - 1}, 1 << 62, 0, ErrRange}, {Range{0, math.MaxUint64}, 1 << 62, 0, ErrRange},
		{Range{1 << 62, math.MaxUint64}, 1 << 62, 1, nil},
	} {
		b := Bitmap{Range: c.Range, Page: c.page}
		words, err := b.need()
		if words != c.words || !errors.Is(err, c.want) {
			t.Errorf("%s in pages of %#x: %d words, %v", c.Range, c.page, words, err)
		}
		if words > 0 && words < 9 {
			b.Words = make([]uint64, words)
			exact := b.check()
			b.Words = b.Words[1:]
			if exact != nil || !errors.Is(b.check(), ErrRange) {
				t.Errorf("%s: with enough words %v, with fewer %v", c.Range, exact, b.check())
			}
		}
	}

	b := must2(NewBitmap(Range{1 << 20, 1<<20 + 128*4096 - 1}, 4096))(t)
	b.Words[0], b.Words[1] = 1|1<<63, 1<<63
	want := []uint64{1 << 20, 1<<20 + 63*4096, 1<<20 + 127*4096}
	if got := slices.Collect(b.Pages()); !slices.Equal(got, want) || b.Count() != 3 || b.length() != 128*4096 {
		t.Errorf("%#x, %d pages of %#x bytes", got, b.Count(), b.length())
	}
	for at := range b.Pages() {
		if at != want[0] {
			t.Errorf("after the first page came %#x", at)
		}
		break
	}
	b.Clear()
	if b.Count() != 0 {
		t.Errorf("%#x", b.Words)
	}
}

// TestMemoryBounds makes memory of sizes and pages at their bounds, and gives it back.
func TestMemoryBounds(t *testing.T) {
	own := unix.Getpagesize()
	for _, c := range []struct {
		size, page int
		want       error
	}{
		{0, own, ErrRange}, {own, own / 2, ErrAlignment}, {own, -own, ErrAlignment}, {own, 3 * own, ErrAlignment},
		{1<<62 + 1, 0, ErrRange}, {1 << 62, 0, unix.ENOMEM}, {1 << 55, 0, unix.ENOMEM},
	} {
		if m, err := NewMemory(c.size, c.page); !errors.Is(err, c.want) {
			t.Errorf("%d bytes in pages of %d: %v, %v", c.size, c.page, m, err)
		}
	}

	for _, c := range [][3]int{{1, 0, own}, {own, own, own}, {own + 1, own, 2 * own}, {2 * own, 0, 2 * own}} {
		m := must2(NewMemory(c[0], c[1]))(t)
		if m.Size() != c[2] || m.PageSize() != own || len(m.Bytes()) != c[2] || slices.Max(m.Bytes()) != 0 {
			t.Errorf("%v: %d bytes in pages of %d", c, m.Size(), m.PageSize())
		}
		m.Bytes()[c[2]-1] = 1
		// One use after the other, it stays until the last has ended.
		fails := func(uintptr) error { return unix.EIO }
		if err := m.mapped(fails); !errors.Is(err, unix.EIO) {
			t.Error(err)
		}
		for range 2 {
			if err := m.mapped(func(uintptr) error { return nil }); err != nil {
				t.Error(err)
			}
		}
		for range 2 {
			if err := m.Close(); !errors.Is(err, ErrInUse) {
				t.Error(err)
			}
			m.unmapped()
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
		if err := m.mapped(fails); !errors.Is(err, ErrRange) {
			t.Errorf("memory that is closed: %v", err)
		}
	}

	// Huge pages are those of the size that was asked for: there are none of so large a one.
	if m, err := NewMemory(1, 1<<40); err == nil || errors.Is(err, ErrAlignment) || errors.Is(err, ErrRange) {
		t.Errorf("%v, %v", m, err)
	}
}

// TestNames names each kind of interrupts and each state, and has a number for those that there are not.
func TestNames(t *testing.T) {
	for kind, want := range map[Kind]string{
		INTx: "INTx", MSI: "MSI", MSIX: "MSI-X", ErrorReport: "error", Request: "request",
		-1: "interrupt index -1", 5: "interrupt index 5",
	} {
		if kind.String() != want {
			t.Errorf("%d is %s, not %s", int(kind), kind, want)
		}
	}

	for state, want := range map[State]string{
		StateError: "ERROR", StateStop: "STOP", StateRunning: "RUNNING", StateStopCopy: "STOP_COPY",
		StateResuming: "RESUMING", StateRunningP2P: "RUNNING_P2P", StatePreCopy: "PRE_COPY",
		StatePreCopyP2P: "PRE_COPY_P2P", 8: "state 8",
	} {
		if state.String() != want {
			t.Errorf("%d is %s, not %s", uint32(state), state, want)
		}
	}

	const first = "; take the whole group from the host first (viaduct bind)"
	both := []*iommu.Device{{Name: "a", Driver: "b"}, {Name: "c", Driver: "d"}}
	for err, want := range map[error]string{
		&Error{"op", "file", unix.EIO, nil}:  "op file: input/output error",
		&Error{"op", "", unix.EIO, ErrFault}: "op: the device did not answer (input/output error)",
		&NotViableError{7, nil}: "group 7 is not viable: a driver of the host has one of its devices" +
			first,
		&NotViableError{7, both}: "group 7 is not viable: a is on b, c is on d" + first,
		&NotOwnedError{"a", []iommu.Address{{Bus: 1}, {Bus: 2}}}: "a: a hot reset also resets 0000:01:00.0, " +
			"0000:02:00.0, which this context has not opened: open it in the same context",
	} {
		if err.Error() != want {
			t.Errorf("%s, not %s", err, want)
		}
	}

	if !errors.Is(&NotViableError{}, ErrNotViable) || errors.Is(&NotViableError{}, ErrNotOwned) ||
		!errors.Is(&NotOwnedError{}, ErrNotOwned) || errors.Is(&NotOwnedError{}, ErrNotViable) {
		t.Error("an error matches another's, or not its own")
	}
}

// TestWays finds the ways of a device by what the kernel has made: its own node, its group's, and those of the ways.
func TestWays(t *testing.T) {
	both := []Way{IOMMUFD, Container}
	for name, c := range map[string]struct {
		remove []string // below the host's root
		want   []Way
	}{
		"all": {nil, both}, "neither": {[]string{"dev/iommu", "dev/vfio/vfio"}, nil},
		"no iommufd": {[]string{"dev/iommu"}, both[1:]}, "no container": {[]string{"dev/vfio/vfio"}, both[:1]},
		"no node of its group": {[]string{"sys/class/vfio"}, both[:1]},
		"no node of its own":   {[]string{"sys/bus/pci/devices/" + nic + "/vfio-dev"}, both[1:]},
	} {
		k, _, host := newVFIO(t)
		for _, file := range c.remove {
			if err := os.RemoveAll(k.Dir() + "/" + file); err != nil {
				t.Fatal(err)
			}
		}

		d, err := iommu.ReadDevice(host, iommu.Address{Bus: 1})
		if err != nil {
			t.Fatal(err)
		}

		ways, err := Ways(host, &d)
		if err != nil || !slices.Equal(ways, c.want) {
			t.Errorf("%s: %v, %v", name, ways, err)
		}

		found := must2(findTarget(host, nic))(t)
		if again, err := found.ways(); err != nil || !reflect.DeepEqual(again, ways) {
			t.Errorf("%s: the device to be opened has %v, %v", name, again, err)
		}

		opened, err := newContext(t, host, Options{}).Open(nic)
		switch {
		case len(c.want) == 0 && !errors.Is(err, ErrUnsupported), len(c.want) > 0 && err != nil:
			t.Errorf("%s: %v", name, err)
		case err == nil && opened.context.Way() != c.want[0]:
			t.Errorf("%s: it was opened by %s", name, opened.context.Way())
		}

		hosttest.EachFailure(t, k, "Ways", func() (any, error) { return Ways(host, &d) })
		hosttest.EachFailure(t, k, "findTarget", func() (any, error) {
			f, err := findTarget(host, nic)
			if err != nil {
				return nil, err
			}
			return f.ways()
		})
	}
}
