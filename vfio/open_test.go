package vfio

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"runtime"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

const (
	nic   = "0000:01:00.0"
	other = "0000:09:00.0"
)

// newVFIO is a host whose NIC and NVMe controller are on vfio-pci.
func newVFIO(t *testing.T) (*hosttest.Kernel, *hosttest.VFIO, *iommu.Host) {
	t.Helper()
	k := hosttest.NewSmallLab(t, "0000:00:05.0", nic, "0000:00:0a.0", other)
	v := k.ServeVFIO()
	for _, address := range []string{nic, other} {
		takeFor(t, k, address)
		d := &hosttest.VFIODevice{Vectors: [5]uint32{1, 1, 4, 1, 1}, State: 2, Together: []string{address}}
		d.Regions[BAR0], d.Regions[Config] = 1<<16, 4096
		v.Devices[address] = d
	}
	return k, v, &iommu.Host{Host: k.Host()}
}

// takeFor gives a device to vfio-pci.
func takeFor(t *testing.T, k *hosttest.Kernel, address string) {
	t.Helper()
	writes := [][2]string{{"devices/" + address + "/driver_override", "vfio-pci"}, {"drivers_probe", address}}
	if d, err := k.Host().LinkBase("sys/bus/pci/devices/" + address + "/driver"); err == nil {
		writes = slices.Insert(writes, 1, [2]string{"drivers/" + d + "/unbind", address})
	}
	for _, w := range writes {
		if err := k.Write("sys/bus/pci/"+w[0], w[1]); err != nil {
			t.Fatal(err)
		}
	}
}

func eachWay(t *testing.T, test func(t *testing.T, way Way)) {
	for _, way := range []Way{IOMMUFD, Container} {
		t.Run(string(way), func(t *testing.T) { test(t, way) })
	}
}

func newContext(t *testing.T, h *iommu.Host, o Options) *Context {
	t.Helper()
	c, err := NewContext(h, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func must[T any](t *testing.T, v T, err error) T {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func openOne(t *testing.T, h *iommu.Host, o Options, name string) (*Context, *Device) {
	t.Helper()
	c := newContext(t, h, o)
	d, err := c.Open(name)
	return c, must(t, d, err)
}

// TestOpen opens a device by each way, and what stands against that is an error to act on.
func TestOpen(t *testing.T) {
	_, _, host := newVFIO(t)
	d, err := iommu.ReadDevice(host, iommu.Address{Bus: 1})
	if ways, err2 := Ways(host, &d); err != nil || err2 != nil || !slices.Equal(ways, []Way{IOMMUFD, Container}) {
		t.Errorf("%v, %v, %v", ways, err, err2)
	}
	if c, d := openOne(t, host, Options{}, nic); c.Way() != IOMMUFD || d.Name() != nic || !d.Info().Reset {
		t.Errorf("%s, %s, %+v", c.Way(), d.Name(), d.Info())
	}

	eachWay(t, func(t *testing.T, way Way) {
		for name, c := range map[string]struct {
			spoil func(*hosttest.Kernel, *hosttest.VFIO)
			want  error
		}{
			"nothing wrong": {func(*hosttest.Kernel, *hosttest.VFIO) {}, nil},
			"interrupts not isolated": {func(_ *hosttest.Kernel, v *hosttest.VFIO) { v.Isolated = false },
				ErrNotIsolated},
			"no vfio driver": {func(k *hosttest.Kernel, _ *hosttest.VFIO) {
				_ = k.Write("sys/bus/pci/drivers/vfio-pci/unbind", nic)
			}, ErrNotBound},
			"no such device": {func(k *hosttest.Kernel, _ *hosttest.VFIO) {
				_ = os.RemoveAll(k.Dir() + "/sys/bus/pci/devices/" + nic)
			}, unix.ENODEV},
			"no such way": {func(k *hosttest.Kernel, _ *hosttest.VFIO) {
				_ = os.RemoveAll(k.Dir() + "/dev/vfio/vfio")
				_ = os.RemoveAll(k.Dir() + "/dev/iommu")
			}, ErrUnsupported},
			"no node": {func(k *hosttest.Kernel, _ *hosttest.VFIO) {
				_ = os.RemoveAll(k.Dir() + "/dev/vfio")
				_ = os.RemoveAll(k.Dir() + "/dev/iommu")
			}, fs.ErrNotExist},
			"another device's node": {func(k *hosttest.Kernel, _ *hosttest.VFIO) {
				for _, n := range []string{"1", "2", "devices/vfio0"} {
					_ = os.WriteFile(k.Dir()+"/dev/vfio/"+n, []byte("c 1:1\n"), 0o600)
				}
				groups, _ := os.ReadDir(k.Dir() + "/dev/vfio")
				for _, g := range groups {
					if g.Name() != "vfio" && !g.IsDir() {
						_ = os.WriteFile(k.Dir()+"/dev/vfio/"+g.Name(), []byte("c 1:1\n"), 0o600)
					}
				}
			}, unix.ENODEV},
		} {
			t.Run(name, func(t *testing.T) {
				k, v, host := newVFIO(t)
				c.spoil(k, v)
				_, err := newContext(t, host, Options{Way: way}).Open(nic)
				if !errors.Is(err, c.want) {
					t.Errorf("%v, want %v", err, c.want)
				}
			})
		}
	})
}

// TestInUse opens a device that is open already, by the same way and by the other one.
func TestInUse(t *testing.T) {
	eachWay(t, func(t *testing.T, way Way) {
		_, _, host := newVFIO(t)
		c, _ := openOne(t, host, Options{Way: way}, nic)
		if _, err := c.Open(nic); !errors.Is(err, ErrInUse) {
			t.Errorf("twice in one context: %v", err)
		}
	})
	for _, first := range []Way{IOMMUFD, Container} {
		for _, second := range []Way{IOMMUFD, Container} {
			_, _, host := newVFIO(t)
			openOne(t, host, Options{Way: first}, nic)
			if _, err := newContext(t, host, Options{Way: second}).Open(nic); !errors.Is(err, ErrInUse) {
				t.Errorf("%s, then %s: %v", first, second, err)
			}
		}
	}
}

// TestNotViable names the members of the group that are on drivers of the host.
func TestNotViable(t *testing.T) {
	eachWay(t, func(t *testing.T, way Way) {
		const one, two = "0000:07:02.0", "0000:07:01.0"
		k := hosttest.NewSmallLab(t, "0000:00:08.0", one, two)
		v := k.ServeVFIO()
		v.Devices[one] = &hosttest.VFIODevice{}
		takeFor(t, k, one)
		host := &iommu.Host{Host: k.Host()}
		_, err := newContext(t, host, Options{Way: way}).Open(one)
		viable, ok := errors.AsType[*NotViableError](err)
		if !ok || len(viable.Members) != 1 || viable.Members[0].Name != two || !errors.Is(err, ErrNotViable) {
			t.Errorf("%v", err)
		}
	})
}

// TestFaultOfOpen has each system call of an opening fail in turn: it is an error, and nothing stays open.
func TestFaultOfOpen(t *testing.T) {
	for _, way := range []Way{IOMMUFD, Container, ""} {
		k, _, host := newVFIO(t)
		memory := must2(NewMemory(4096, 0))(t)
		all := func(string, string) bool { return true }
		use := func() (err error) {
			c, err := NewContext(host, Options{Way: way})
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, c.Close()) }()
			d, err := c.Open(nic)
			if err != nil {
				return err
			}
			if err := c.Map(Mapping{IOVA: 1 << 20, Memory: memory, Access: ReadWrite}); err != nil {
				return err
			}
			i, err := d.Interrupts(MSIX, 2)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, i.Close()) }()
			if err := d.Reset(); err != nil {
				return err
			}
			return c.Unmap(1<<20, 4096)
		}

		if err := use(); err != nil {
			t.Fatal(err)
		}

		before := openFiles(t)
		n := 0
		for ; ; n++ {
			k.FailAt(n, all, unix.EIO)
			err := use()
			if !k.Revive() {
				break
			}
			if !errors.Is(err, unix.EIO) {
				t.Errorf("operation %d failed, and was told as %v", n, err)
			}
			if after := openFiles(t); after != before {
				t.Fatalf("operation %d: %d files open, before %d (%v)", n, after, before, err)
			}
		}

		t.Logf("%d operations", n)
		if err := memory.Close(); err != nil {
			t.Error(err)
		}
	}
}

func must2[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T { t.Helper(); return must(t, v, err) }
}

func openFiles(t *testing.T) int {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// TestMap maps all or nothing, and knows what cannot be mapped before the kernel is asked.
func TestMap(t *testing.T) {
	eachWay(t, func(t *testing.T, way Way) {
		_, v, host := newVFIO(t)
		c := newContext(t, host, Options{Way: way})
		m := must2(NewMemory(4*4096, 0))(t)
		if err := c.Map(Mapping{Memory: m, Access: Read}); !errors.Is(err, ErrNoDevice) {
			t.Errorf("without a device: %v", err)
		}
		must2(c.Open(nic))(t)
		at := func(iova uint64) Mapping { return Mapping{IOVA: iova, Memory: m, Access: ReadWrite} }
		if err := c.Map(at(0x10000)); err != nil {
			t.Fatal(err)
		}
		for i, access := range []Access{Read, Write, ReadWrite} {
			iova := uint64(0x900000 + i<<20)
			if err := c.Map(Mapping{IOVA: iova, Memory: m, Access: access}); err != nil ||
				v.Access(iova) != uint32(access) {
				t.Errorf("%v, access %d instead of %d", err, v.Access(iova), access)
			}
			if err := c.Unmap(iova, uint64(m.Size())); err != nil {
				t.Error(err)
			}
		}

		asked := len(v.Requests)
		for what, wrong := range map[string]struct {
			Mapping
			want error
		}{
			"mapped already": {at(0x11000), ErrRange}, "unaligned": {at(0x20800), ErrAlignment},
			"reserved": {at(0xfee00000), ErrRange}, "beyond the width": {at(1 << 48), ErrRange},
			"at the end": {at(1<<64 - 4096), ErrRange}, "no memory": {Mapping{IOVA: 0x40000, Access: Read}, nil},
			"no access": {Mapping{IOVA: 0x40000, Memory: m}, ErrRange},
			"too much": {Mapping{IOVA: 0x40000, Memory: m, Offset: 4096, Size: 4 * 4096, Access: Read},
				ErrRange},
			"odd offset":      {Mapping{IOVA: 0x40000, Memory: m, Offset: 1, Size: 4096, Access: Read}, ErrAlignment},
			"negative size":   {Mapping{IOVA: 0x40000, Memory: m, Size: -4096, Access: Read}, ErrRange},
			"negative offset": {Mapping{IOVA: 0x40000, Memory: m, Offset: -4096, Size: 4096, Access: Read}, ErrRange},
		} {
			if err := c.Map(at(0x80000), wrong.Mapping); err == nil || wrong.want != nil &&
				!errors.Is(err, wrong.want) {
				t.Errorf("%s: %v", what, err)
			}
		}
		for _, request := range v.Requests[asked:] {
			if request == 0x3b71 || request == 0x3b85 {
				t.Error("the kernel was asked to map")
			}
		}
		if got := c.Mappings(); len(got) != 1 || got[0].IOVA != 0x10000 || got[0].Size != m.Size() {
			t.Errorf("%v", got)
		}

		if err := m.Close(); !errors.Is(err, ErrInUse) {
			t.Errorf("close of mapped memory: %v", err)
		}
		for _, wrong := range [][2]uint64{{0x10000, 4096}, {0x11000, 4096}, {0x10000, 0}, {0x20000, 4096}} {
			if err := c.Unmap(wrong[0], wrong[1]); !errors.Is(err, ErrRange) {
				t.Errorf("unmap of %#x: %v", wrong, err)
			}
		}
		if err := c.Unmap(0x10000, uint64(m.Size())); err != nil || len(c.Mappings()) != 0 {
			t.Errorf("%v, %v", err, c.Mappings())
		}

		// The second of three fails in the kernel.
		n := 0
		v.Fail = func(request uintptr) error {
			if request == 0x3b71 || request == 0x3b85 {
				if n++; n == 2 {
					return unix.ENOMEM
				}
			}
			return nil
		}
		err := c.Map(at(0x10000), at(0x20000), at(0x30000))
		if !errors.Is(err, unix.ENOMEM) || len(c.Mappings()) != 0 {
			t.Errorf("%v, %v", err, c.Mappings())
		}
		v.Fail = nil
		if err := c.Map(at(0x10000), at(0x20000)); err != nil {
			t.Error(err)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		if err := m.Close(); err != nil {
			t.Errorf("after the context: %v", err)
		}
	})
}

// TestInfo tells the same of the IOMMU by both ways, but what one of them cannot tell.
func TestInfo(t *testing.T) {
	eachWay(t, func(t *testing.T, way Way) {
		_, v, host := newVFIO(t)
		v.Allowed = nil
		for i := range uint64(40) {
			v.Allowed = append(v.Allowed, [2]uint64{i << 30, i<<30 + 1<<29 - 1})
		}
		c, _ := openOne(t, host, Options{Way: way}, nic)
		info, err := c.Info()
		if err != nil || len(info.Ranges) != 40 || info.Width() != 36 || len(info.Reserved()) != 39 ||
			info.Alignment != 4096 {
			t.Errorf("%+v, %v", info, err)
		}
		if told := way == Container; (info.PageSizes != nil) != told || (info.Left != nil) != told {
			t.Errorf("%+v", info)
		}
	})
}

// TestRegion reads and writes regions, and accesses a mapped one.
func TestRegion(t *testing.T) {
	eachWay(t, func(t *testing.T, way Way) {
		_, v, host := newVFIO(t)
		v.Devices[nic].Sparse = [][2]uint64{{0, 4096}, {8192, 8192}}
		_, d := openOne(t, host, Options{Way: way}, nic)
		config := must2(d.Region(Config))(t)
		if n, err := config.WriteAt([]byte{1, 2, 3}, 4094); n != 2 || !errors.Is(err, io.ErrShortWrite) {
			t.Errorf("%d, %v", n, err)
		}
		b := make([]byte, 4)
		if n, err := config.ReadAt(b, 4092); n != 4 || err != nil || !bytes.Equal(b, []byte{0, 0, 1, 2}) {
			t.Errorf("%d, %v, %x", n, err, b)
		}
		if n, err := config.ReadAt(b, 4094); n != 2 || !errors.Is(err, io.EOF) {
			t.Errorf("%d, %v", n, err)
		}
		if _, err := config.ReadAt(b, -1); !errors.Is(err, ErrRange) {
			t.Error(err)
		}
		for _, index := range []int{VGA, 9, -1} {
			if _, err := d.Region(index); !errors.Is(err, ErrUnsupported) {
				t.Errorf("region %d: %v", index, err)
			}
		}
		if _, err := config.Map(); !errors.Is(err, ErrUnsupported) {
			t.Errorf("map of config space: %v", err)
		}

		bar := must2(d.Region(BAR0))(t)
		if want := []Area{{0, 4096}, {8192, 8192}}; !slices.Equal(bar.Mappable, want) {
			t.Errorf("%v", bar.Mappable)
		}
		m := must2(bar.Map())(t)
		for _, err := range []error{m.Store8(1, 0x12), m.Store16(2, 0x3456), m.Store32(4, 0x789abcde),
			m.Store64(8192, 1<<63)} {
			if err != nil {
				t.Error(err)
			}
		}
		got := must2(m.Load64(0))(t)
		if want := uint64(0x789abcde34561200); got != want {
			t.Errorf("%#x, want %#x", got, want)
		}
		if a, b, c := must2(m.Load8(1))(t), must2(m.Load16(2))(t), must2(m.Load32(4))(t); a != 0x12 || b != 0x3456 ||
			c != 0x789abcde {
			t.Errorf("%#x, %#x, %#x", a, b, c)
		}
		for _, err := range []error{
			m.Store8(1<<20, 1), m.Store16(1<<20, 1), m.Store32(1<<20, 1), m.Store64(1<<20, 1),
		} {
			if !errors.Is(err, ErrRange) {
				t.Errorf("a store beyond the end: %v", err)
			}
		}
		if v := must2(m.Load64(8192))(t); v != 1<<63 {
			t.Errorf("%#x was stored", v)
		}
		for at, want := range map[int64]error{4096: ErrRange, 4094: ErrAlignment, 16384: ErrRange, -8: ErrRange,
			1: ErrAlignment} {
			if _, err := m.Load64(at); !errors.Is(err, want) {
				t.Errorf("at %d: %v", at, err)
			}
		}
		sameInBatch(t, m)
		if err := errors.Join(m.Close(), m.Close()); err != nil {
			t.Error(err)
		}
		if _, err := m.Load8(0); !errors.Is(err, fs.ErrClosed) {
			t.Error(err)
		}
		if err := m.Batch(func(Registers) error { return nil }); !errors.Is(err, fs.ErrClosed) {
			t.Error(err)
		}
	})
}

// sameInBatch makes many accesses in one, and those that a region refuses.
func sameInBatch(t *testing.T, m *Mapped) {
	t.Helper()
	own := errors.New("the function's own")
	err := m.Batch(func(r Registers) error {
		r.Store8(9, 0x12)
		r.Store16(10, 0x3456)
		r.Store32(12, 0x789abcde)
		r.Store64(16376, 1<<62)
		if a, b, c, d := r.Load8(9), r.Load16(10), r.Load32(12), r.Load64(8); a != 0x12 || b != 0x3456 ||
			c != 0x789abcde || d != 0x789abcde34561200 {
			t.Errorf("%#x, %#x, %#x, %#x", a, b, c, d)
		}
		return own
	})
	if got := must2(m.Load64(16376))(t); got != 1<<62 || !errors.Is(err, own) {
		t.Errorf("%#x, %v", got, err)
	}

	// Of the second page nothing is mapped.
	for at, want := range map[int64]error{
		4096: ErrRange, 8184: ErrRange, 4094: ErrAlignment, 1 << 16: ErrRange, -8: ErrRange, 1: ErrAlignment,
	} {
		for name, do := range map[string]func(r Registers){
			"load":  func(r Registers) { r.Load64(at) },
			"store": func(r Registers) { r.Store64(at, 1) },
		} {
			err := m.Batch(func(r Registers) error {
				do(r)
				t.Errorf("after a %s at %d it goes on", name, at)
				return nil
			})
			if !errors.Is(err, want) {
				t.Errorf("%s at %d: %v", name, at, err)
			}
		}
	}

	func() {
		defer func() {
			if r := recover(); r != "of its own" {
				t.Errorf("a panic came out as %v", r)
			}
		}()
		_ = m.Batch(func(Registers) error { panic("of its own") })
	}()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = m.Batch(func(Registers) error { runtime.Goexit(); return nil })
		t.Error("what ends a goroutine did not")
	}()
	<-ended
}

// TestFault accesses memory that is not there any more: that is an error, and only that.
func TestFault(t *testing.T) {
	_, _, host := newVFIO(t)
	_, d := openOne(t, host, Options{}, nic)
	m := must2(must2(d.Region(BAR0))(t).Map())(t)
	// A file that is too short raises the signal that a device does.
	if err := d.file.use("", func(fd int) error { return unix.Ftruncate(fd, 0) }); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Load32(0); !errors.Is(err, ErrFault) {
		t.Error(err)
	}
	if err := m.Store8(9, 1); !errors.Is(err, ErrFault) {
		t.Error(err)
	}
	if err := m.Batch(func(r Registers) error { r.Load32(8); return nil }); !errors.Is(err, ErrFault) {
		t.Error(err)
	}
	if err := m.Batch(func(r Registers) error { r.Store64(8, 1); return nil }); !errors.Is(err, ErrFault) {
		t.Error(err)
	}
}

// TestInterrupts waits for vectors, and stops waiting.
func TestInterrupts(t *testing.T) {
	eachWay(t, func(t *testing.T, way Way) {
		_, _, host := newVFIO(t)
		_, d := openOne(t, host, Options{Way: way}, nic)
		if _, err := d.Interrupts(MSIX, 5); !errors.Is(err, ErrUnsupported) {
			t.Error(err)
		}
		i := must2(d.Interrupts(MSIX, 4))(t)
		for _, kind := range []Kind{MSIX, MSI, INTx} {
			if _, err := d.Interrupts(kind, 1); !errors.Is(err, ErrInUse) {
				t.Errorf("%s beside MSI-X: %v", kind, err)
			}
		}
		request := must2(d.Interrupts(Request, 1))(t)
		if err := errors.Join(request.Close(), must2(d.Interrupts(Request, 1))(t).Close()); err != nil {
			t.Error(err)
		}
		for range 3 {
			if err := i.Trigger(2); err != nil {
				t.Fatal(err)
			}
		}
		if n, err := i.Wait(t.Context(), 2); n != 3 || err != nil {
			t.Errorf("%d, %v", n, err)
		}

		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error, 2)
		for range cap(done) {
			go func() {
				_, err := i.Wait(ctx, 1)
				done <- err
			}()
		}
		stop()
		for range cap(done) {
			if err := <-done; !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		}
		if err := i.Trigger(1); err != nil {
			t.Error(err)
		}
		if n, err := i.Wait(ctx, 1); !errors.Is(err, context.Canceled) {
			t.Errorf("a wait that has ended before it began: %d, %v", n, err)
		}
		if n, err := i.Wait(t.Context(), 1); n != 1 || err != nil {
			t.Errorf("after a wait that was ended: %d, %v", n, err)
		}

		go func() {
			_, err := i.Wait(t.Context(), 0)
			done <- err
		}()
		if err := errors.Join(d.Close(), i.Close()); err != nil {
			t.Error(err)
		}
		if err := <-done; !errors.Is(err, fs.ErrClosed) {
			t.Error(err)
		}
	})
}

// TestHotReset resets what shares the bus, if the context has all of it.
func TestHotReset(t *testing.T) {
	eachWay(t, func(t *testing.T, way Way) {
		_, v, host := newVFIO(t)
		for _, address := range []string{nic, other} {
			v.Devices[address].NoReset, v.Devices[address].Together = true, []string{nic, other}
		}
		c, d := openOne(t, host, Options{Way: way}, nic)
		if err := d.Reset(); !errors.Is(err, ErrUnsupported) {
			t.Error(err)
		}
		err := d.HotReset()
		owned, ok := errors.AsType[*NotOwnedError](err)
		if !ok || len(owned.Members) != 1 || owned.Members[0].String() != other || v.Devices[nic].Resets != 0 {
			t.Errorf("%v", err)
		}
		must2(c.Open(other))(t)
		if err := d.HotReset(); err != nil || v.Devices[nic].Resets != 1 || v.Devices[other].Resets != 1 {
			t.Errorf("%v", err)
		}
	})
}

// TestDirty has the IOMMU, and the device, tell what was written to; this kernel's IOMMU can.
func TestDirty(t *testing.T) {
	_, v, host := newVFIO(t)
	c := newContext(t, host, Options{DirtyTracking: true})
	if _, err := c.Open(nic); !errors.Is(err, ErrUnsupported) {
		t.Errorf("an IOMMU that cannot: %v", err)
	}
	v.Dirty = true
	d := must2(c.Open(nic))(t)
	b := must2(NewBitmap(Range{0x100000, 0x1fffff}, 4096))(t)
	if err := c.Dirty(b, false); !errors.Is(err, ErrRefused) {
		t.Errorf("before it is on: %v", err)
	}
	if err := c.TrackDirty(true); err != nil {
		t.Fatal(err)
	}
	for _, wrong := range []*Bitmap{
		{Range{0, 128*4096 - 1}, 4096, make([]uint64, 1)}, {Range{0, 4095}, 4096, nil}, {b.Range, 8192, b.Words[:1]},
	} {
		if err := c.Dirty(wrong, false); !errors.Is(err, ErrRange) {
			t.Errorf("a bitmap that is too short: %v", err)
		}
	}
	written := []uint64{0x100000, 0x141000, 0x1ff000}
	v.Devices[nic].Written = slices.Clone(written)
	for _, keep := range []bool{true, false} {
		b.Clear()
		if err := c.Dirty(b, keep); err != nil || !slices.Equal(slices.Collect(b.Pages()), written) || b.Count() != 3 {
			t.Errorf("%v, %x", err, slices.Collect(b.Pages()))
		}
	}
	b.Clear()
	if err := c.Dirty(b, false); err != nil || b.Count() != 0 {
		t.Errorf("told twice: %v, %d", err, b.Count())
	}

	if can, err := d.CanLog(); can || err != nil {
		t.Errorf("%v, %v", can, err)
	}
	if _, err := d.StartLog(4096, []Range{b.Range}); !errors.Is(err, ErrUnsupported) {
		t.Error(err)
	}
	v.Devices[nic].Log, v.Devices[nic].Written = true, slices.Clone(written)
	if page, err := d.StartLog(4096, []Range{b.Range}); page != 4096 || err != nil {
		t.Errorf("%d, %v", page, err)
	}
	if err := d.Log(b); err != nil || !slices.Equal(slices.Collect(b.Pages()), written) {
		t.Errorf("%v, %x", err, slices.Collect(b.Pages()))
	}
	if err := d.StopLog(); err != nil {
		t.Error(err)
	}

	_, plain := openOne(t, host, Options{Way: Container}, other)
	if err := plain.context.TrackDirty(true); !errors.Is(err, ErrUnsupported) {
		t.Error(err)
	}
}

// TestHardware decodes what is told of IOMMUs.
func TestHardware(t *testing.T) {
	_, v, host := newVFIO(t)
	_, d := openOne(t, host, Options{}, nic)
	vtd := make([]byte, 24)
	vtd[10] = 38 // MGAW
	v.Hardware, v.Info, v.Dirty = 1, vtd, true
	if hw, err := d.Hardware(); err != nil || hw.VTd == nil || hw.VTd.Width() != 39 || !hw.DirtyTracking {
		t.Errorf("%+v, %v", hw, err)
	}
	smmu := make([]byte, 40)
	smmu[28] = 4 // IDR5.OAS
	v.Hardware, v.Info = 2, smmu
	if hw, err := d.Hardware(); err != nil || hw.SMMU == nil || hw.SMMU.Width() != 44 {
		t.Errorf("%+v, %v", hw, err)
	}
	v.Hardware, v.Info = 4, []byte{1, 0, 0, 0, 0, 0, 0, 0x80, 2, 0, 0, 0, 0, 0, 0, 0}
	if hw, err := d.Hardware(); err != nil || hw.AMD == nil || *hw.AMD != (AMDInfo{1<<63 | 1, 2}) {
		t.Errorf("%+v, %v", hw, err)
	}
	v.Info = v.Info[:4]
	if _, err := d.Hardware(); err == nil {
		t.Error("a short answer passes")
	}
	v.Hardware = 77
	if hw, err := d.Hardware(); err != nil || hw != (Hardware{DirtyTracking: true}) {
		t.Errorf("%+v, %v", hw, err)
	}
}

// TestMigrate saves the state of one device and loads it into another one.
func TestMigrate(t *testing.T) {
	_, v, host := newVFIO(t)
	_, from := openOne(t, host, Options{}, nic)
	if _, err := from.Migration(); !errors.Is(err, ErrUnsupported) {
		t.Error(err)
	}
	state := bytes.Repeat([]byte("state"), 1<<19)
	v.Devices[nic].Migration, v.Devices[nic].Content = 1, state
	v.Devices[other].Migration, v.Devices[other].Content = 1, make([]byte, len(state))
	_, to := openOne(t, host, Options{Way: Container}, other)

	var b bytes.Buffer
	saving := must2(from.Save())(t)
	if n, err := saving.Finish(t.Context(), &b); err != nil || n != int64(len(state)) {
		t.Fatalf("%d, %v", n, err)
	}
	if err := saving.Cancel(); err != nil || must2(from.State())(t) != StateStop {
		t.Errorf("cancelled after it ended: %v, %s", err, must2(from.State())(t))
	}
	if _, err := saving.Finish(t.Context(), &b); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("ended again: %v", err)
	}
	stopped := must2(from.Save())(t)
	if err := errors.Join(stopped.Cancel(), stopped.Cancel()); err != nil || must2(from.State())(t) != StateStop {
		t.Errorf("the saving of a stopped device was cancelled: %v, %s", err, must2(from.State())(t))
	}
	if err := to.Load(t.Context(), bytes.NewReader(b.Bytes())); err != nil ||
		!bytes.Equal(v.Devices[other].Content, state) {
		t.Errorf("%v", err)
	}

	// What it does not take leaves it as after a reset.
	err := to.Load(t.Context(), bytes.NewReader([]byte("other")))
	if !errors.Is(err, ErrRefused) || must2(to.State())(t) != StateRunning {
		t.Errorf("%v, %s", err, must2(to.State())(t))
	}
	// A reader, a writer and a context that fail.
	broken := errors.New("broken")
	if err := to.Load(t.Context(), io.MultiReader(bytes.NewReader(state), brokenReader{broken})); !errors.Is(err,
		broken) {
		t.Error(err)
	}
	must2(from.SetState(StateRunning))(t)
	if _, err := must2(from.Save())(t).Finish(t.Context(), brokenWriter{broken}); !errors.Is(err, broken) ||
		must2(from.State())(t) != StateRunning {
		t.Errorf("%v, %s", err, must2(from.State())(t))
	}
	ended, end := context.WithCancel(t.Context())
	end()
	if err := to.Load(ended, bytes.NewReader(state)); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

type brokenReader struct{ error }

func (b brokenReader) Read([]byte) (int, error) { return 0, b.error }

type brokenWriter struct{ error }

func (b brokenWriter) Write([]byte) (int, error) { return 0, b.error }

// TestTokenOfVF gives the token that a VF asks for.
func TestTokenOfVF(t *testing.T) {
	_, v, host := newVFIO(t)
	token := NewToken()
	v.Devices[nic].Token = token.String()
	if _, err := newContext(t, host, Options{Way: IOMMUFD}).OpenToken(nic, token); !errors.Is(err, ErrToken) {
		t.Errorf("a kernel whose iommufd takes no token: %v", err)
	}

	c := newContext(t, host, Options{})
	if d, err := c.OpenToken(nic, token); err != nil || c.Way() != Container {
		t.Errorf("%v, by %s", err, c.Way())
	} else if err := d.Close(); err != nil {
		t.Error(err)
	}

	c = newContext(t, host, Options{Way: Container})
	if _, err := c.Open(nic); !errors.Is(err, ErrToken) {
		t.Error(err)
	}
	if _, err := c.OpenToken(nic, NewToken()); !errors.Is(err, ErrToken) {
		t.Error(err)
	}
	if again, err := ParseToken(token.String()); again != token || err != nil {
		t.Errorf("%s, %v", again, err)
	}
	if _, err := c.OpenToken(nic, token); err != nil {
		t.Error(err)
	}

	for _, wrong := range []string{"", "8ce5d3a63e0c4b0c9d2e5f1a7c1b2d3e", "8ce5d3a6-3e0c-4b0c-9d2e-5f1a7c1b2d3", "x"} {
		if _, err := ParseToken(wrong); err == nil {
			t.Errorf("%q is a token", wrong)
		}
	}
}
