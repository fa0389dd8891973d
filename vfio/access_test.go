package vfio

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestTransfer reads and writes in the pieces of the kernel's choice, and ends where it does.
func TestTransfer(t *testing.T) {
	_, _, host := newVFIO(t)
	_, d := openOne(t, host, Options{}, nic)
	r := &Region{RegionInfo{Index: 2, Size: 8, offset: 1000}, d}
	type step struct {
		n   int
		err error
	}

	for name, c := range map[string]struct {
		size   int
		offset int64
		steps  []step
		n      int
		want   error
	}{
		"whole":              {8, 0, []step{{8, nil}}, 8, nil},
		"in pieces":          {8, 0, []step{{1, nil}, {4, nil}, {3, nil}}, 8, nil},
		"interrupted":        {4, 2, []step{{2, nil}, {-1, unix.EINTR}, {2, nil}}, 4, nil},
		"to the end":         {8, 4, []step{{4, nil}}, 4, io.EOF},
		"at the end":         {8, 8, nil, 0, io.EOF},
		"behind the end":     {8, 9, nil, 0, io.EOF},
		"nothing":            {0, 8, nil, 0, nil},
		"it fails":           {8, 0, []step{{2, nil}, {-1, unix.EIO}}, 2, ErrFault},
		"it has no more":     {8, 0, []step{{2, nil}, {0, nil}}, 2, io.ErrUnexpectedEOF},
		"before the begin":   {8, -1, nil, 0, ErrRange},
		"fails at its end":   {8, 4, []step{{-1, unix.EIO}}, 0, ErrFault},
		"out of its bounds":  {1, 1 << 62, nil, 0, io.EOF},
		"the device is gone": {1, 0, []step{{-1, unix.ENODEV}}, 0, ErrFault},
	} {
		at, steps := c.offset, c.steps
		do := func(_ int, p []byte, offset int64) (int, error) {
			if len(steps) == 0 || offset != 1000+at || int64(len(p)) > 8-at {
				t.Errorf("%s: %d bytes at %d", name, len(p), offset)
				return 0, nil
			}
			s := steps[0]
			steps = steps[1:]
			at += int64(max(0, s.n))
			return s.n, s.err
		}
		n, err := r.transfer(transfer{"pread", do, io.EOF}, true, make([]byte, c.size), c.offset)
		if n != c.n || !errors.Is(err, c.want) || len(steps) > 0 {
			t.Errorf("%s: %d, %v, and not done: %v", name, n, err, steps)
		}
		where := fmt.Sprintf("at %#x of region 2", at)
		if err != nil && !errors.Is(err, io.EOF) && !strings.Contains(err.Error(), where) {
			t.Errorf("%s: %v", name, err)
		}
	}

	if _, err := r.ReadAt(make([]byte, 1), 0); !errors.Is(err, ErrUnsupported) {
		t.Errorf("a region that cannot be read: %v", err)
	}
	if _, err := r.WriteAt(make([]byte, 1), 0); !errors.Is(err, ErrUnsupported) {
		t.Errorf("a region that cannot be written: %v", err)
	}
}

// mapped is a BAR of a device, mapped as far as the fields say.
func mapped(t *testing.T, info RegionInfo) *Mapped {
	t.Helper()
	_, _, host := newVFIO(t)
	_, d := openOne(t, host, Options{}, nic)
	return must2((&Region{info, d}).Map())(t)
}

// TestAccess accesses the first and the last bytes of what is mapped, and the first beyond it, with each width.
func TestAccess(t *testing.T) {
	page := int64(unix.Getpagesize())
	areas := []Area{{page, page}, {2 * page, 2 * page}}
	m := mapped(t, RegionInfo{Size: 5 * page, Read: true, Write: true, Mappable: areas})
	loads := map[int64]func(at int64) error{
		1: func(at int64) error { _, err := m.Load8(at); return err },
		2: func(at int64) error { _, err := m.Load16(at); return err },
		4: func(at int64) error { _, err := m.Load32(at); return err },
		8: func(at int64) error { _, err := m.Load64(at); return err },
	}

	stores := map[int64]func(at int64) error{
		1: func(at int64) error { return m.Store8(at, 1) }, 2: func(at int64) error { return m.Store16(at, 1) },
		4: func(at int64) error { return m.Store32(at, 1) }, 8: func(at int64) error { return m.Store64(at, 1) },
	}

	for width := range loads {
		for at, want := range map[int64]error{
			page: nil, 2*page - width: nil, 2 * page: nil, 4*page - width: nil,
			page - width: ErrRange, 4 * page: ErrRange, 5*page - width: ErrRange, 5 * page: ErrRange, -width: ErrRange,
		} {
			for op, do := range map[string]func(at int64) error{"load": loads[width], "store": stores[width]} {
				err := do(at)
				told := fmt.Sprintf("vfio: %s of %d bytes at %#x of region 0 of %s", op, width, at, nic)
				if !errors.Is(err, want) || err != nil && !strings.HasPrefix(err.Error(), told) {
					t.Errorf("%s of %d at %#x: %v", op, width, at, err)
				}
			}
		}
		for at := int64(1); at < width; at++ {
			for _, err := range []error{loads[width](page + at), stores[width](page + at)} {
				if !errors.Is(err, ErrAlignment) {
					t.Errorf("%d bytes at %d: %v", width, at, err)
				}
			}
		}
	}

	// Within a batch what is not mapped is a fault, which tells where.
	for at, want := range map[int64]error{
		0: ErrRange, page - 8: ErrRange, page: nil, 4*page - 8: nil,
		4 * page: ErrRange, 5*page - 8: ErrRange, 5 * page: ErrRange,
	} {
		for name, do := range map[string]func(r Registers){
			"load": func(r Registers) { r.Load64(at) }, "store": func(r Registers) { r.Store64(at, 1) },
		} {
			err := m.Batch(func(r Registers) error { do(r); return nil })
			where := fmt.Sprintf("at %#x of region 0", at)
			if !errors.Is(err, want) || err != nil && !strings.Contains(err.Error(), where) {
				t.Errorf("%s in a batch at %#x: %v", name, at, err)
			}
		}
	}

	if err := m.Batch(func(r Registers) error { r.Load32(6); return nil }); !errors.Is(err, ErrAlignment) {
		t.Error(err)
	}
}

// TestWidths stores and loads with each width: as many bytes as that has are changed, in their order, and no more.
func TestWidths(t *testing.T) {
	const at = 8
	m := mapped(t, RegionInfo{Size: 4096, Read: true, Write: true, Mappable: []Area{{0, 4096}}})
	value := func(v uint64, err error) uint64 { return must2(v, err)(t) }
	for _, c := range []struct {
		width int
		store func(v uint64) error
		load  func() uint64
		batch func(r Registers, v uint64) uint64
	}{
		{1, func(v uint64) error { return m.Store8(at, uint8(v)) },
			func() uint64 { v, err := m.Load8(at); return value(uint64(v), err) },
			func(r Registers, v uint64) uint64 { r.Store8(at, uint8(v)); return uint64(r.Load8(at)) }},
		{2, func(v uint64) error { return m.Store16(at, uint16(v)) },
			func() uint64 { v, err := m.Load16(at); return value(uint64(v), err) },
			func(r Registers, v uint64) uint64 { r.Store16(at, uint16(v)); return uint64(r.Load16(at)) }},
		{4, func(v uint64) error { return m.Store32(at, uint32(v)) },
			func() uint64 { v, err := m.Load32(at); return value(uint64(v), err) },
			func(r Registers, v uint64) uint64 { r.Store32(at, uint32(v)); return uint64(r.Load32(at)) }},
		{8, func(v uint64) error { return m.Store64(at, v) },
			func() uint64 { return value(m.Load64(at)) },
			func(r Registers, v uint64) uint64 { r.Store64(at, v); return r.Load64(at) }},
	} {
		want := bytes.Repeat([]byte{0xff}, 24)
		stored := []byte{0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88}
		number := binary.LittleEndian.Uint64(append(slices.Clone(stored[:c.width]), make([]byte, 8-c.width)...))
		copy(want[at:], stored[:c.width])
		bytesNow := m.areas[0].bytes[:24]
		for name, do := range map[string]func() (uint64, error){
			"alone": func() (uint64, error) { err := c.store(number); return c.load(), err },
			"batch": func() (got uint64, err error) {
				err = m.Batch(func(r Registers) error { got = c.batch(r, number); return nil })
				return got, err
			},
		} {
			copy(bytesNow, bytes.Repeat([]byte{0xff}, 24))
			got, err := do()
			if err != nil || got != number || !bytes.Equal(bytesNow, want) {
				t.Errorf("%s, %d bytes: %#x, %v, and there is %x", name, c.width, got, err, bytesNow)
			}
		}
	}
}

// TestOneWay maps regions that can only be read, or only written.
func TestOneWay(t *testing.T) {
	page := int64(unix.Getpagesize())
	for _, c := range []struct {
		read, write bool
		mapped      string // as /proc/self/maps tells
	}{{true, true, "rw-s"}, {true, false, "r--s"}, {false, true, "-w-s"}} {
		m := mapped(t, RegionInfo{Size: page, Read: c.read, Write: c.write, Mappable: []Area{{0, page}}})
		maps, err := os.ReadFile("/proc/self/maps")
		line := fmt.Sprintf("%012x-%012x %s", uintptr(m.base), uintptr(m.base)+m.size, c.mapped)
		if err != nil || !strings.Contains(string(maps), line) {
			t.Errorf("it is not mapped as %s: %v", c.mapped, err)
		}
		if _, err := m.Load32(0); (err == nil) != c.read || err != nil && !errors.Is(err, ErrUnsupported) {
			t.Errorf("load, %s: %v", c.mapped, err)
		}
		if err := m.Store32(0, 1); (err == nil) != c.write || err != nil && !errors.Is(err, ErrUnsupported) {
			t.Errorf("store, %s: %v", c.mapped, err)
		}
		err = m.Batch(func(r Registers) error { r.Store32(0, 1); return nil })
		if (err == nil) != c.write || err != nil && !errors.Is(err, ErrUnsupported) {
			t.Errorf("store in a batch, %s: %v", c.mapped, err)
		}
	}
}

// TestPanicOnFault leaves a goroutine as it was: whether its own faults are panics or its end.
func TestPanicOnFault(t *testing.T) {
	m := mapped(t, RegionInfo{Size: 8192, Read: true, Write: true, Mappable: []Area{{0, 4096}}})
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(false))
	for _, was := range []bool{false, true} {
		for name, do := range map[string]func(){
			"a load":  func() { _, _ = m.Load32(0) },
			"a batch": func() { _ = m.Batch(func(r Registers) error { r.Load32(0); return nil }) },
			"a fault": func() { _ = m.Batch(func(r Registers) error { r.Load32(4096); return nil }) },
			"a panic": func() {
				defer func() { _ = recover() }()
				_ = m.Batch(func(Registers) error { panic("of its own") })
			},
		} {
			debug.SetPanicOnFault(was)
			do()
			if now := debug.SetPanicOnFault(was); now != was {
				t.Errorf("after %s it is %v, before %v", name, now, was)
			}
		}
	}
}

// TestOddSize maps a region whose size is no multiple of the widths, nor of pages.
func TestOddSize(t *testing.T) {
	m := mapped(t, RegionInfo{Size: 12, Read: true, Write: true, Mappable: []Area{{0, 12}}})
	if err := m.Store32(8, 5); err != nil || m.size != uintptr(unix.Getpagesize()) {
		t.Errorf("%v, mapped are %d bytes", err, m.size)
	}
	for name, c := range map[string]struct {
		do   func(r Registers)
		want error
	}{
		"the first 8":  {func(r Registers) { r.Load64(0) }, nil},
		"the last 4":   {func(r Registers) { r.Load32(8) }, ErrRange}, // which are for the methods outside
		"beyond it":    {func(r Registers) { r.Load8(12) }, ErrRange},
		"not a 64-bit": {func(r Registers) { r.Load64(8) }, ErrRange},
	} {
		if err := m.Batch(func(r Registers) error { c.do(r); return nil }); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if v, err := m.Load32(8); v != 5 || err != nil {
		t.Errorf("%d, %v", v, err)
	}
}

// TestNotMapped maps what cannot be mapped, and leaves nothing behind.
func TestNotMapped(t *testing.T) {
	_, _, host := newVFIO(t)
	_, d := openOne(t, host, Options{}, nic)
	page := int64(unix.Getpagesize())
	mappings := func() int {
		maps, err := os.ReadFile("/proc/self/maps")
		if err != nil {
			t.Fatal(err)
		}
		return strings.Count(string(maps), "memfd:")
	}

	before := mappings()
	for name, c := range map[string]struct {
		info RegionInfo
		want error
	}{
		"nothing":           {RegionInfo{Size: page}, ErrUnsupported},
		"beyond the end":    {RegionInfo{Size: page, Mappable: []Area{{0, page}, {0, page + 1}}}, unix.EINVAL},
		"behind the end":    {RegionInfo{Size: page, Mappable: []Area{{page, 1}}}, unix.EINVAL},
		"before the begin":  {RegionInfo{Size: page, Mappable: []Area{{-page, page}}}, unix.EINVAL},
		"an empty one":      {RegionInfo{Size: page, Mappable: []Area{{0, 0}}}, unix.EINVAL},
		"not whole pages":   {RegionInfo{Size: page, Mappable: []Area{{0, page / 2}, {page / 2, 1}}}, unix.EINVAL},
		"more than memory":  {RegionInfo{Size: 1 << 60, Mappable: []Area{{0, page}}}, unix.ENOMEM},
		"an empty region":   {RegionInfo{Mappable: []Area{{0, page}}}, unix.EINVAL},
		"at an odd address": {RegionInfo{Size: page, offset: 1, Mappable: []Area{{0, page}}}, unix.EINVAL},
	} {
		c.info.Read = true
		if _, err := (&Region{c.info, d}).Map(); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
		if after := mappings(); after != before || len(d.parts) > 0 {
			t.Errorf("%s: %d mappings, before %d", name, after, before)
		}
	}

	whole := must2((&Region{RegionInfo{Size: page, Read: true, Mappable: []Area{{0, page}}}, d}).Map())(t)
	if err := whole.Close(); err != nil || mappings() != before {
		t.Errorf("%v, %d mappings, before %d", err, mappings(), before)
	}

	gone := &Device{context: d.context, target: d.target, file: &file{fd: -1}}
	if _, err := (&Region{whole.region.RegionInfo, gone}).Map(); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("of a device that is closed: %v", err)
	}
}
