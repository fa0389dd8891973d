package vfio

import (
	"bytes"
	"errors"
	"reflect"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

// TestEachRequest has each request of the kernel's fail: whoever makes it tells.
func TestEachRequest(t *testing.T) {
	memory := must2(NewMemory(4096, 0))(t)
	bitmap := must2(NewBitmap(Range{0, 1<<20 - 1}, 4096))(t)
	mapping := Mapping{IOVA: 1 << 20, Memory: memory, Access: Read}
	// With an error goes nothing else.
	values := func(v any, err error) error {
		if err != nil && !reflect.ValueOf(v).IsZero() {
			t.Errorf("%+v, and %v", v, err)
		}
		return err
	}

	// These are no requests to a device, which then would not answer.
	ofSpace := []string{"Info", "Map", "Hardware", "TrackDirty", "Dirty"}
	for name, c := range map[string]struct {
		requests []uintptr // of which each one is made
		tracks   bool
		do       func(c *Context, d *Device, i *Interrupts) error
	}{
		"Info": {[]uintptr{0x3b70, 0x3b84}, false, func(c *Context, _ *Device,
			_ *Interrupts) error {
			return values(c.Info())
		}},
		"Map": {[]uintptr{0x3b71, 0x3b85}, false, func(c *Context, _ *Device,
			_ *Interrupts) error {
			return c.Map(mapping)
		}},
		"Region": {[]uintptr{0x3b6c}, false, func(_ *Context, d *Device,
			_ *Interrupts) error {
			return values(d.Region(BAR0))
		}},
		"InterruptInfo": {[]uintptr{0x3b6d}, false, func(_ *Context, d *Device,
			_ *Interrupts) error {
			return values(d.InterruptInfo(MSI))
		}},
		"Interrupts": {[]uintptr{0x3b6d, 0x3b6e}, false, func(_ *Context, d *Device,
			_ *Interrupts) error {
			return values(d.Interrupts(Request, 1))
		}},
		"Trigger": {[]uintptr{0x3b6e}, false, func(_ *Context, _ *Device,
			i *Interrupts) error {
			return i.Trigger(0)
		}},
		"Mask": {[]uintptr{0x3b6e}, false, func(_ *Context, _ *Device,
			i *Interrupts) error {
			return i.Mask(0)
		}},
		"Unmask": {[]uintptr{0x3b6e}, false, func(_ *Context, _ *Device,
			i *Interrupts) error {
			return i.Unmask(0)
		}},
		"close vectors": {[]uintptr{0x3b6e}, false, func(_ *Context, _ *Device,
			i *Interrupts) error {
			return i.Close()
		}},
		"Reset": {[]uintptr{0x3b6f}, false, func(_ *Context, d *Device,
			_ *Interrupts) error {
			return d.Reset()
		}},
		"HotResetInfo": {[]uintptr{0x3b70}, false, func(_ *Context, d *Device,
			_ *Interrupts) error {
			return values(d.HotResetInfo())
		}},
		"HotReset": {[]uintptr{0x3b70, 0x3b71}, false, func(_ *Context, d *Device,
			_ *Interrupts) error {
			return d.HotReset()
		}},
		"Migration": {[]uintptr{0x3b75}, false, func(_ *Context, d *Device,
			_ *Interrupts) error {
			return values(d.Migration())
		}},
		"State": {[]uintptr{0x3b75}, false, func(_ *Context, d *Device,
			_ *Interrupts) error {
			return values(d.State())
		}},
		"SetState": {[]uintptr{0x3b75}, false, func(_ *Context, d *Device,
			_ *Interrupts) error {
			return values(d.SetState(StateStop))
		}},
		"DataSize": {[]uintptr{0x3b75}, false, func(_ *Context, d *Device,
			_ *Interrupts) error {
			return values(d.DataSize())
		}},
		"Save": {[]uintptr{0x3b75}, false, func(_ *Context, d *Device,
			_ *Interrupts) error {
			return values(d.Save())
		}},
		"Load": {[]uintptr{0x3b75}, false, func(_ *Context, d *Device,
			_ *Interrupts) error {
			return d.Load(t.Context(), bytes.NewReader(nil))
		}},
		"CanLog": {[]uintptr{0x3b75}, false, func(_ *Context, d *Device,
			_ *Interrupts) error {
			return values(d.CanLog())
		}},
		"StartLog": {[]uintptr{0x3b75}, false, func(_ *Context, d *Device,
			_ *Interrupts) error {
			return values(d.StartLog(4096, nil))
		}},
		"StopLog": {[]uintptr{0x3b75}, false, func(_ *Context, d *Device,
			_ *Interrupts) error {
			return d.StopLog()
		}},
		"Log": {[]uintptr{0x3b75}, false, func(_ *Context, d *Device,
			_ *Interrupts) error {
			return d.Log(bitmap)
		}},
		"CanSleep": {[]uintptr{0x3b75}, false, func(_ *Context, d *Device,
			_ *Interrupts) error {
			return values(d.CanSleep())
		}},
		"Sleep": {[]uintptr{0x3b75}, false, func(_ *Context, d *Device,
			_ *Interrupts) error {
			return d.Sleep()
		}},
		"SleepUntil": {[]uintptr{0x3b75}, false, func(_ *Context, d *Device,
			_ *Interrupts) error {
			return values(d.SleepUntilWoken())
		}},
		"Wake": {[]uintptr{0x3b75}, false, func(_ *Context, d *Device,
			_ *Interrupts) error {
			return d.Wake()
		}},
		"SetToken": {[]uintptr{0x3b75}, false, func(_ *Context, d *Device,
			_ *Interrupts) error {
			return d.SetToken(Token{})
		}},
		"Hardware": {[]uintptr{0x3b8a}, true, func(_ *Context, d *Device,
			_ *Interrupts) error {
			return values(d.Hardware())
		}},
		"TrackDirty": {[]uintptr{0x3b8b}, true, func(c *Context, _ *Device,
			_ *Interrupts) error {
			return c.TrackDirty(false)
		}},
		"Dirty": {[]uintptr{0x3b8c}, true, func(c *Context, _ *Device,
			_ *Interrupts) error {
			return c.Dirty(bitmap, false)
		}},
	} {
		for _, way := range []Way{IOMMUFD, Container} {
			if c.tracks && way == Container {
				continue
			}
			for n := range c.requests {
				t.Run(name+" by "+string(way), func(t *testing.T) {
					_, v, host := newVFIO(t)
					v.Dirty = true
					v.Devices[nic].Migration, v.Devices[nic].Log = 1, true
					context, d := openOne(t, host, Options{Way: way, DirtyTracking: c.tracks}, nic)
					i := must2(d.Interrupts(INTx, 1))(t)
					if c.tracks {
						if err := context.TrackDirty(true); err != nil {
							t.Fatal(err)
						}
					}
					before, made, failed := openFiles(t), 0, false
					v.Fail = func(request uintptr) error {
						if !slices.Contains(c.requests, request) {
							return nil
						}
						if made++; made != n+1 {
							return nil
						}
						failed = true
						return unix.EIO
					}
					err := c.do(context, d, i)
					v.Fail = nil
					if failed && !errors.Is(err, unix.EIO) {
						t.Errorf("%v", err)
					}
					if failed && errors.Is(err, ErrFault) == slices.Contains(ofSpace, name) {
						t.Errorf("what it means that it failed: %v", err)
					}
					if !failed && n == 0 {
						t.Errorf("%s made none of its requests: %v", name, err)
					}
					if after := openFiles(t); err != nil && after > before {
						t.Errorf("%d files are open, before %d", after, before)
					}
				})
			}
		}
	}
}

// TestClosed uses what is closed.
func TestClosed(t *testing.T) {
	_, _, host := newVFIO(t)
	c, d := openOne(t, host, Options{}, nic)
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	for what, err := range map[string]error{
		"Open": func() error { _, err := c.Open(nic); return err }(), "Map": c.Map(), "Unmap": c.Unmap(0, 4096),
		"Info": func() error { _, err := c.Info(); return err }(), "Reset": d.Reset(),
		"Interrupts": func() error { _, err := d.Interrupts(MSI, 1); return err }(),
	} {
		if err == nil {
			t.Errorf("%s works after it was closed", what)
		}
	}
	if err := errors.Join(c.Close(), d.Close()); err != nil {
		t.Error(err)
	}

	for name, o := range map[string]Options{
		"no such way": {Way: "usb"}, "tracking by a container": {Way: Container, DirtyTracking: true},
	} {
		if _, err := NewContext(host, o); err == nil {
			t.Errorf("%s passes", name)
		}
	}
	if _, err := NewContext(&iommu.Host{Host: hosttest.Lab(t).Host(t)}, Options{}); !errors.Is(err, iommu.ErrReadOnly) {
		t.Errorf("a captured host: %v", err)
	}
}

// TestDecode decodes answers of the kernel's, and what is wrong in them.
func TestDecode(t *testing.T) {
	if d, err := decodeDevice(words(40, 0x83, 9, 5, 24, 0, 5, 0, 5, 0)); err != nil || !d.PCI || !d.Reset ||
		d.Regions != 9 ||
		d.Interrupts != 5 || !slices.Equal(d.Atomics, []int{32, 128}) {
		t.Errorf("%+v, %v", d, err)
	}
	for flags, want := range map[uint32][]int{0: nil, 1: {32}, 2: {64}, 4: {128}, 7: {32, 64, 128}, 8: nil} {
		d, err := decodeDevice(words(40, 0x80, 9, 5, 24, 0, 5, 0, flags, 0))
		if err != nil || !slices.Equal(d.Atomics, want) || d.PCI || d.Reset {
			t.Errorf("atomics %d: %+v, %v", flags, d, err)
		}
	}
	for flags, want := range map[uint32]DeviceInfo{
		1: {Reset: true, Regions: 9, Interrupts: 5}, 2: {PCI: true, Regions: 9, Interrupts: 5},
	} {
		if d, err := decodeDevice(words(24, flags, 9, 5, 0, 0)); err != nil || !reflect.DeepEqual(d, want) {
			t.Errorf("flags %d: %+v, %v", flags, d, err)
		}
	}
	if d, err := decodeDevice(words(24, 0, 1, 2, 99, 0)); err != nil || d.PCI || d.Reset || d.Atomics != nil {
		t.Errorf("without capabilities: %+v, %v", d, err)
	}

	if _, err := decodeDevice(words(24, 0, 1, 2, 0)); err == nil {
		t.Error("information on a device that is cut passes")
	}

	region := func(flags, size uint32, more ...uint32) []byte {
		return words(append([]uint32{uint32(32 + 4*len(more)), flags, 3, 32, size, 0, 0, 0x300}, more...)...)
	}
	if r, err := decodeRegion(region(7, 8192)); err != nil || r.Index != 3 || r.Size != 8192 || r.offset != 0x300<<32 ||
		!r.Read || !r.Write || !slices.Equal(r.Mappable, []Area{{0, 8192}}) {
		t.Errorf("%+v, %v", r, err)
	}
	if r, err := decodeRegion(region(1, 8192)); err != nil || !r.Read || r.Write || r.Mappable != nil {
		t.Errorf("%+v, %v", r, err)
	}
	if r, err := decodeRegion(region(7, 0)); err != nil || r.Mappable != nil {
		t.Errorf("an empty one: %+v, %v", r, err)
	}
	if r, err := decodeRegion(region(15, 8192, 2, 0, 0x80008086, 1)); err != nil || r.Type != 0x80008086 ||
		r.Subtype != 1 {
		t.Errorf("%+v, %v", r, err)
	}
	unknown := region(15, 8192, 99, 0)
	if r, err := decodeRegion(unknown); err != nil || r.Type != 0 || !slices.Equal(r.Mappable, []Area{{0, 8192}}) {
		t.Errorf("%+v, %v", r, err)
	}
	sparse := func(areas ...uint32) []byte {
		more := []uint32{1, 0, uint32(len(areas) / 2), 0}
		for _, a := range areas {
			more = append(more, a, 0)
		}
		return region(15, 8192, more...)
	}
	for _, c := range []struct {
		answer []byte
		want   []Area
		ok     bool
	}{
		{sparse(0, 4096), []Area{{0, 4096}}, true},
		{sparse(4096, 4096, 0, 4096), []Area{{0, 4096}, {4096, 4096}}, true},
		{sparse(0, 0, 4096, 4096), []Area{{4096, 4096}}, true},
		{sparse(), nil, true},
		{sparse(0, 4097, 4096, 4096), nil, false}, {sparse(4096, 8192), nil, false}, {sparse(12288, 1), nil, false},
		{sparse(8192, 1), nil, false}, {region(15, 8192, 1, 0, 7, 0), nil, false},
		{region(15, 8192, 1, 0, 7), nil, false},
		{region(15, 8192, 2, 0, 1), nil, false},
		{words(32, 7, 0, 0, 0, 0x40000001, 0, 0), nil, false}, {words(32, 7, 0, 0, 1, 0, 0, 0x40000001), nil, false},
		{words(32, 7), nil, false},
	} {
		if r, err := decodeRegion(c.answer); (err == nil) != c.ok || !slices.Equal(r.Mappable, c.want) {
			t.Errorf("%v: %v, %v", c.answer, r.Mappable, err)
		}
	}

	type1 := func(flags, sizes uint32, more ...uint32) []byte {
		return words(append([]uint32{uint32(24 + 4*len(more)), flags, sizes, 0, 24, 0}, more...)...)
	}
	i, err := decodeType1(type1(3, 0x3000, 1, 72, 2, 0, 0, 0, 0xfff, 0, 0x2000, 0, 0x2fff, 1, 3, 0, 77))
	if err != nil || *i.PageSizes != 0x3000 || i.Alignment != 0x1000 || *i.Left != 77 ||
		!slices.Equal(i.Ranges, []Range{{0, 0xfff}, {0x2000, 0x1_00002fff}}) ||
		!slices.Equal(i.Reserved(), []Range{{0x1000, 0x1fff}}) {
		t.Errorf("%+v, %v", i, err)
	}
	for _, wrong := range [][]byte{
		type1(3, 0x1000, 1, 0, 1, 0, 0x2000, 0, 0x1fff, 0), type1(2, 0, 1, 0, 2, 0, 0, 0, 1, 0), type1(2, 0, 3, 0),
		type1(2, 0, 1, 0, 2), type1(2, 0, 1, 0, 2, 0, 0, 0, 8, 0, 8, 0, 9, 0), words(24, 3),
	} {
		if i, err := decodeType1(wrong); err == nil {
			t.Errorf("%v: %+v", wrong, i)
		}
	}
	for _, none := range [][]byte{type1(0, 0x1000), type1(1, 0)} {
		if i, err := decodeType1(none); err != nil || i.PageSizes != nil || i.Ranges != nil || i.Width() != 0 {
			t.Errorf("%v: %+v, %v", none, i, err)
		}
	}
}

// TestGroupOfAnother opens a device of a group that another context has: it is in use, and not unisolated.
func TestGroupOfAnother(t *testing.T) {
	const one, two = "0000:07:01.0", "0000:07:02.0"
	for _, first := range []Way{IOMMUFD, Container} {
		for _, second := range []Way{IOMMUFD, Container} {
			k := hosttest.NewSmallLab(t, "0000:00:08.0", one, two)
			v := k.ServeVFIO()
			for _, a := range []string{one, two} {
				takeFor(t, k, a)
				v.Devices[a] = &hosttest.VFIODevice{}
			}
			host := &iommu.Host{Host: k.Host()}
			openOne(t, host, Options{Way: first}, one)
			if _, err := newContext(t, host, Options{Way: second}).Open(two); !errors.Is(err, ErrInUse) {
				t.Errorf("%s, then %s: %v", first, second, err)
			}
		}
	}
}

// TestUnits opens devices whose numbers are not 0, and resets them together.
func TestUnits(t *testing.T) {
	const one, two = "0000:07:01.0", "0000:07:02.0"
	eachWay(t, func(t *testing.T, way Way) {
		k := hosttest.NewSmallLab(t, "0000:00:08.0", one, two)
		v := k.ServeVFIO()
		for _, a := range []string{one, two} {
			takeFor(t, k, a)
			v.Devices[a] = &hosttest.VFIODevice{NoReset: true, Together: []string{one, two}}
		}
		c := newContext(t, &iommu.Host{Host: k.Host()}, Options{Way: way})
		d := must2(c.Open(one))(t)
		all, err := d.HotResetInfo()
		want := []Dependent{{iommu.Address{Bus: 7, Device: 1}, true}, {iommu.Address{Bus: 7, Device: 2}, true}}
		if err != nil || !slices.Equal(all, want) {
			t.Errorf("%+v, %v", all, err)
		}
		if err := d.HotReset(); err != nil || v.Devices[two].Resets != 1 {
			t.Errorf("%v", err)
		}
		// The kernel refuses when one of them is on no VFIO driver.
		if err := k.Write("sys/bus/pci/drivers/vfio-pci/unbind", two); err != nil {
			t.Fatal(err)
		}
		v.Fail = func(request uintptr) error {
			if request == 0x3b71 {
				return unix.EINVAL
			}
			return nil
		}
		owned, ok := errors.AsType[*NotOwnedError](d.HotReset())
		if !ok || len(owned.Members) != 1 || owned.Members[0].String() != two || owned.Error() == "" {
			t.Errorf("%+v", owned)
		}
	})
}
