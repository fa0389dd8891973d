package vfio

import (
	"encoding/binary"
	"errors"
	"slices"
	"testing"
)

// words are 32-bit numbers as bytes.
func words(n ...uint32) []byte {
	var b []byte
	for _, w := range n {
		b = binary.NativeEndian.AppendUint32(b, w)
	}
	return b
}

// FuzzDecode: whatever the kernel says, what is decoded stays within it and is in order.
func FuzzDecode(f *testing.F) {
	f.Add(words(60, 0x8f, 0, 32, 1<<16, 0, 0, 0, 1, 0, 1, 0, 0, 0, 4096, 0))
	f.Add(words(24, 3, 0x1000, 0, 24, 0, 1, 0, 1, 0, 0, 0, 0xfee00000, 0))
	f.Add(words(40, 0x82, 9, 5, 24, 0, 5, 0, 7, 0))
	f.Add(words(28, 3, 2, 1, 0x00000100, 2, 0x08000100))
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := decodeRegion(b); err == nil {
			end := int64(0)
			for _, a := range r.Mappable {
				if a.Offset < end || a.Size <= 0 || a.Offset+a.Size > r.Size {
					t.Errorf("areas %v of %d bytes", r.Mappable, r.Size)
				}
				end = a.Offset + a.Size
			}
		}
		if i, err := decodeType1(b); err == nil && !ordered(i.Ranges) {
			t.Errorf("ranges %v", i.Ranges)
		}
		_, _ = decodeDevice(b)
		if _, all, err := decodeHotReset(b); err == nil && 12+8*len(all) > len(b) {
			t.Errorf("%d functions in %d bytes", len(all), len(b))
		}
		if len(b) > 4 {
			_, _ = decodeHardware(binary.NativeEndian.Uint32(b), 0, b[4:])
		}
	})
}

// TestChain: chains that go back, go beyond, or do not end are errors, and no more than that.
func TestChain(t *testing.T) {
	head := func(offset uint32) []uint32 { return []uint32{0, 0x80, 9, 5, offset, 0} }
	for name, c := range map[string]struct {
		answer []uint32
		ok     bool
	}{
		"none":          {head(0), true},
		"one":           {append(head(24), 5, 0, 1, 0), true},
		"unknown":       {append(head(24), 99, 0), true},
		"two":           {append(head(24), 99, 32, 5, 0, 7, 0), true},
		"to itself":     {append(head(24), 99, 24), false},
		"back":          {append(head(32), 0, 0, 99, 24), false},
		"into the head": {append(head(4), 99, 0), false},
		"beyond":        {append(head(24), 99, 400), false},
		"cut":           {append(head(24), 5, 0, 1), false},
		"far":           {append(head(24), 99, 0xffffffff), false},
	} {
		if _, err := decodeDevice(words(c.answer...)); (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// FuzzRanges: what is missing lies in what is wanted and in no range, and all of it is missing.
func FuzzRanges(f *testing.F) {
	f.Add(uint8(3), uint8(5), uint8(8), uint8(200), uint8(0), uint8(255))
	f.Fuzz(func(t *testing.T, a, b, c, d, from, to uint8) {
		points := []uint64{uint64(a), uint64(b), uint64(c), uint64(d)}
		slices.Sort(points)
		ranges := []Range{{points[0], points[1]}, {points[2], points[3]}}
		wanted := Range{uint64(min(from, to)), uint64(max(from, to))}
		if !ordered(ranges) {
			return
		}
		missing := Missing(ranges, wanted)
		if !ordered(missing) {
			t.Fatalf("%v", missing)
		}
		for at := wanted.First; at <= wanted.Last; at++ {
			in := func(all []Range) bool {
				return slices.ContainsFunc(all, func(r Range) bool { return r.Contains(Range{at, at}) })
			}
			if in(ranges) == in(missing) {
				t.Fatalf("%d: of %s, %v misses %v", at, wanted, ranges, missing)
			}
		}
	})
}

// TestPath compares the ways between states with what the kernel does (vfio_mig_get_next_state).
func TestPath(t *testing.T) {
	all := Migration{StopCopy: true, P2P: true, PreCopy: true}
	for _, c := range []struct {
		can      Migration
		from, to State
		want     []State
	}{
		{all, StateRunning, StateStop, []State{StateRunningP2P, StateStop}},
		{Migration{StopCopy: true}, StateRunning, StateStop, []State{StateStop}},
		{all, StateRunning, StateStopCopy, []State{StateRunningP2P, StateStop, StateStopCopy}},
		{all, StatePreCopy, StateStopCopy, []State{StatePreCopyP2P, StateStopCopy}},
		{Migration{StopCopy: true, PreCopy: true}, StatePreCopy, StateStopCopy, []State{StateStopCopy}},
		{all, StateResuming, StateRunning, []State{StateStop, StateRunningP2P, StateRunning}},
		{all, StateStopCopy, StatePreCopy, nil}, {all, StateError, StateRunning, nil},
		{all, StateRunning, StateError, nil},
		{Migration{StopCopy: true}, StateRunning, StatePreCopy, nil}, {all, StateRunning, State(99), nil},
		{all, StateStop, StateStop, []State{}},
	} {
		got, err := c.can.Path(c.from, c.to)
		if !slices.Equal(got, c.want) || (err != nil) != (c.want == nil) || err != nil && !errors.Is(err, ErrRefused) {
			t.Errorf("%+v: %s to %s: %v, %v", c.can, c.from, c.to, got, err)
		}
	}
	for from := StateStop; from <= StatePreCopyP2P; from++ {
		for to := StateStop; to <= StatePreCopyP2P; to++ {
			if path, err := all.Path(from, to); err == nil && len(path) > 4 {
				t.Errorf("%s to %s: %v", from, to, path)
			}
		}
	}
}

func TestBitmap(t *testing.T) {
	for _, wrong := range []struct {
		Range
		page uint64
	}{
		{Range{0, 4095}, 0}, {Range{0, 4095}, 3}, {Range{1, 4096}, 4096}, {Range{0, 4094}, 4096},
		{Range{0, 1<<63 - 1}, 4096}, {Range{8192, 4095}, 4096},
	} {
		if _, err := NewBitmap(wrong.Range, wrong.page); err == nil {
			t.Errorf("%v passes", wrong)
		}
	}
	b := must2(NewBitmap(Range{1 << 20, 1<<20 + 65*4096 - 1}, 4096))(t)
	b.Words[1] = 1
	if got := slices.Collect(b.Pages()); !slices.Equal(got, []uint64{1<<20 + 64*4096}) || b.Count() != 1 {
		t.Errorf("%#x", got)
	}
}

func TestMemory(t *testing.T) {
	for _, wrong := range [][2]int{{0, 0}, {-1, 0}, {4096, 3}, {4096, 100}} {
		if _, err := NewMemory(wrong[0], wrong[1]); err == nil {
			t.Errorf("%v passes", wrong)
		}
	}
	m := must2(NewMemory(1, 0))(t)
	if m.Size() != m.PageSize() || len(m.Bytes()) != m.Size() {
		t.Errorf("%d", m.Size())
	}
	if err := errors.Join(m.Close(), m.Close()); err != nil || m.Bytes() != nil {
		t.Error(err)
	}
}
