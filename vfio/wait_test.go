package vfio

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestVectors asks for each kind of interrupts, and for as many vectors as there are, and not.
func TestVectors(t *testing.T) {
	_, v, host := newVFIO(t)
	_, d := openOne(t, host, Options{}, nic)
	for _, want := range []InterruptInfo{
		{INTx, 1, true, true, true, false}, {MSI, 1, true, false, false, true}, {MSIX, 4, true, false, false, true},
		{ErrorReport, 1, true, false, false, true}, {Request, 1, true, false, false, true},
	} {
		if got, err := d.InterruptInfo(want.Kind); err != nil || got != want {
			t.Errorf("%+v, %v", got, err)
		}
		for _, count := range []int{-1, 0, want.Count + 1} {
			if _, err := d.Interrupts(want.Kind, count); !errors.Is(err, ErrUnsupported) {
				t.Errorf("%d of %s: %v", count, want.Kind, err)
			}
		}
		i := must2(d.Interrupts(want.Kind, want.Count))(t)
		if i.Count() != want.Count || len(v.Devices[nic].Events[uint32(want.Kind)]) != want.Count {
			t.Errorf("%s: %d vectors", want.Kind, i.Count())
		}
		for _, n := range []int{-1, want.Count} {
			_, waited := i.Wait(t.Context(), n)
			for _, err := range []error{waited, i.Trigger(n), i.Mask(n), i.Unmask(n)} {
				if !errors.Is(err, ErrRange) {
					t.Errorf("vector %d of %s: %v", n, want.Kind, err)
				}
			}
		}
		last := want.Count - 1
		if err := errors.Join(i.Trigger(last), i.Trigger(0)); err != nil {
			t.Error(err)
		}
		if n, err := i.Wait(t.Context(), last); n == 0 || err != nil {
			t.Errorf("%s: %d, %v", want.Kind, n, err)
		}
		// Who does not wait any more takes no signal away.
		stopped, stop := context.WithCancel(t.Context())
		stop()
		if err := i.Trigger(last); err != nil {
			t.Error(err)
		}
		if n, err := i.Wait(stopped, last); n != 0 || !errors.Is(err, context.Canceled) {
			t.Errorf("%s, stopped: %d, %v", want.Kind, n, err)
		}
		if n, err := i.Wait(t.Context(), last); n == 0 || err != nil {
			t.Errorf("%s: %d, %v", want.Kind, n, err)
		}
		masks := want.Maskable
		if err := i.Mask(0); (err == nil) != masks {
			t.Errorf("%s: %v", want.Kind, err)
		}
		if err := i.Unmask(0); (err == nil) != masks {
			t.Errorf("%s: %v", want.Kind, err)
		}
		if err := i.Close(); err != nil || v.Devices[nic].Events[uint32(want.Kind)] != nil {
			t.Errorf("%s is closed: %v, %v", want.Kind, v.Devices[nic].Events, err)
		}
	}
	for _, kind := range []Kind{-1, 5} {
		if _, err := d.InterruptInfo(kind); !errors.Is(err, ErrUnsupported) {
			t.Errorf("%s: %v", kind, err)
		}
	}

	// The host has fewer left than the device: whoever wants so few has them then.
	v.Devices[nic].Vacant = 2
	before := openFiles(t)
	_, err := d.Interrupts(MSIX, 3)
	if !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "has 2 vectors") {
		t.Errorf("more than there are left: %v", err)
	}
	if after := openFiles(t); after != before {
		t.Errorf("%d files are open, before %d", after, before)
	}
	if err := must2(d.Interrupts(MSIX, 2))(t).Close(); err != nil {
		t.Error(err)
	}

	// A kind that the kernel does not know of this device is one without vectors.
	v.Fail = failing(0x3b6d, unix.EINVAL)
	if got, err := d.InterruptInfo(ErrorReport); err != nil || got != (InterruptInfo{Kind: ErrorReport}) {
		t.Errorf("%+v, %v", got, err)
	}
}

// failing has a request of the kernel's fail.
func failing(request uintptr, err error) func(uintptr) error {
	return func(r uintptr) error {
		if r == request {
			return err
		}
		return nil
	}
}

// waiting starts to wait for a vector, and returns when that has begun.
func waiting(ctx context.Context, i *Interrupts, vector int) <-chan error {
	done := make(chan error, 1)
	go func() {
		n, err := i.Wait(ctx, vector)
		if (err == nil) != (n == 1) {
			err = errors.Join(err, fmt.Errorf("it was signalled %d times", n))
		}
		done <- err
	}()
	for len(i.vectors[vector].turn) > 0 && len(done) == 0 {
		runtime.Gosched()
	}
	for range 100 {
		runtime.Gosched() // by now it most likely sleeps; the outcome is the same if it does not
	}
	return done
}

// TestWait signals, stops and closes who waits already, and who waits for that one.
func TestWait(t *testing.T) {
	_, _, host := newVFIO(t)
	_, d := openOne(t, host, Options{}, nic)
	i := must2(d.Interrupts(MSIX, 2))(t)
	first := waiting(t.Context(), i, 0)
	ctx, stop := context.WithCancel(t.Context())
	second := waiting(ctx, i, 0)
	stop()
	if err := <-second; !errors.Is(err, context.Canceled) {
		t.Errorf("stopped, while another one waits: %v", err)
	}
	if err := i.Trigger(0); err != nil {
		t.Error(err)
	}
	if err := <-first; err != nil {
		t.Error(err)
	}

	// Who is stopped leaves the vector as it was.
	for range 2 {
		ctx, stop := context.WithCancel(t.Context())
		stopped := waiting(ctx, i, 1)
		stop()
		if err := <-stopped; !errors.Is(err, context.Canceled) || strings.Contains(err.Error(), "wait for") {
			t.Error(err)
		}
		after := waiting(t.Context(), i, 1)
		if err := i.Trigger(1); err != nil {
			t.Error(err)
		}
		if err := <-after; err != nil {
			t.Errorf("after another one was stopped: %v", err)
		}
	}

	closed := waiting(t.Context(), i, 1)
	if err := i.Close(); err != nil {
		t.Error(err)
	}
	late := waiting(t.Context(), i, 1)
	for _, done := range []<-chan error{closed, late} {
		if err := <-done; !errors.Is(err, fs.ErrClosed) || !strings.Contains(err.Error(), "wait for MSI-X of "+nic) {
			t.Error(err)
		}
	}
}

// TestSleep has a device sleep until it is woken, by itself or by who let it sleep.
func TestSleep(t *testing.T) {
	_, v, host := newVFIO(t)
	_, d := openOne(t, host, Options{}, nic)
	device := v.Devices[nic]
	if can, err := d.CanSleep(); can || err != nil {
		t.Errorf("%v, %v", can, err)
	}
	device.Sleeps = true
	if can, err := d.CanSleep(); !can || err != nil || device.Asleep {
		t.Errorf("%v, %v", can, err)
	}
	if err := d.Sleep(); err != nil || !device.Asleep {
		t.Error(err)
	}
	if err := d.Sleep(); !errors.Is(err, ErrRefused) {
		t.Errorf("again: %v", err)
	}
	if _, err := d.SleepUntilWoken(); !errors.Is(err, ErrRefused) {
		t.Errorf("again: %v", err)
	}
	if err := d.Wake(); err != nil || device.Asleep {
		t.Error(err)
	}

	s := must2(d.SleepUntilWoken())(t)
	if !device.Asleep || len(device.Wakes) != 1 {
		t.Fatalf("%v", device.Wakes)
	}
	stopped, stop := context.WithCancel(t.Context())
	stop()
	if err := s.Wait(stopped); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if _, err := unix.Write(device.Wakes[0], binary.NativeEndian.AppendUint64(nil, 1)); err != nil {
		t.Fatal(err)
	}
	if err := s.Wait(t.Context()); err != nil {
		t.Error(err)
	}
	if err := errors.Join(s.Close(), s.Close()); err != nil || device.Asleep || len(d.parts) > 0 {
		t.Errorf("%v, %v, %v", err, device.Asleep, d.parts)
	}
	if err := s.Wait(t.Context()); !errors.Is(err, fs.ErrClosed) {
		t.Error(err)
	}
	s = must2(d.SleepUntilWoken())(t)
	if err := d.Close(); err != nil || device.Asleep {
		t.Errorf("%v, %v", err, device.Asleep)
	}
	if err := s.Wait(t.Context()); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("with its device: %v", err)
	}

	// That it cannot be woken is told.
	_, d = openOne(t, host, Options{}, nic)
	s = must2(d.SleepUntilWoken())(t)
	v.Fail = failing(0x3b75, unix.EIO)
	if err := s.Close(); !errors.Is(err, ErrFault) {
		t.Error(err)
	}
	v.Fail = nil
}

// parts begins each part of a device that is closed by itself, or else with the device.
var parts = map[string]func(d *Device) (io.Closer, error){
	"interrupts": func(d *Device) (io.Closer, error) { return d.Interrupts(MSIX, 2) },
	"sleep":      func(d *Device) (io.Closer, error) { return d.SleepUntilWoken() },
	"mapped region": func(d *Device) (io.Closer, error) {
		r, err := d.Region(BAR0)
		if err != nil {
			return nil, err
		}
		return r.Map()
	},
}

// TestParts begins what ends with the device while that ends: then it is closed again at once.
func TestParts(t *testing.T) {
	for name, begin := range parts {
		_, v, host := newVFIO(t)
		v.Devices[nic].Sleeps = true
		_, d := openOne(t, host, Options{}, nic)
		before := openFiles(t)
		d.closed = true
		if _, err := begin(d); !errors.Is(err, fs.ErrClosed) {
			t.Errorf("%s: %v", name, err)
		}
		if after := openFiles(t); after != before || v.Devices[nic].Asleep || len(v.Devices[nic].Events) > 0 {
			t.Errorf("%s: %d files are open, before %d", name, after, before)
		}
		d.closed = false
		part, err := begin(d)
		if err != nil || !slices.ContainsFunc(d.parts, func(p io.Closer) bool { return p == part }) {
			t.Errorf("%s: %v, %v", name, d.parts, err)
			continue
		}
		if err := part.Close(); err != nil || len(d.parts) > 0 {
			t.Errorf("%s: %v, %v", name, d.parts, err)
		}
	}
}

// fewFiles leaves room for so many more open files.
func fewFiles(t *testing.T, left int) (again func()) {
	t.Helper()
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}

	was := limit
	limit.Cur = 256
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}

	var all []int
	for {
		fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
		if err != nil {
			break
		}
		all = append(all, fd)
	}

	for _, fd := range all[len(all)-left:] {
		_ = unix.Close(fd)
	}

	return func() {
		for _, fd := range all[:len(all)-left] {
			_ = unix.Close(fd)
		}
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
			t.Error(err)
		}
	}
}

// TestFewFiles has the process reach its limit of open files: what was begun is closed again.
func TestFewFiles(t *testing.T) {
	for left := range 2 {
		_, v, host := newVFIO(t)
		v.Devices[nic].Sleeps = true
		_, d := openOne(t, host, Options{}, nic)
		before := openFiles(t)
		for name, begin := range map[string]func() error{
			"interrupts": func() error { _, err := d.Interrupts(MSIX, 2+left); return err },
			"sleep":      func() error { _, err := d.SleepUntilWoken(); return err },
		} {
			if name == "sleep" && left > 0 {
				continue // it takes one
			}
			again := fewFiles(t, left)
			err := begin()
			again()
			if !errors.Is(err, unix.EMFILE) || v.Devices[nic].Asleep || len(v.Devices[nic].Events) > 0 {
				t.Errorf("%s: %v", name, err)
			}
			if after := openFiles(t); after != before {
				t.Errorf("%s: %d files are open, before %d", name, after, before)
			}
		}
		if err := must2(d.Interrupts(MSIX, 4))(t).Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestCloseFails has each close fail: that is told, and told again by who remembers it.
func TestCloseFails(t *testing.T) {
	eachWay(t, func(t *testing.T, way Way) {
		_, v, host := newVFIO(t)
		v.Devices[nic].Sleeps = true
		for name, c := range map[string]struct {
			of   func(c *Context, d *Device) func() error // what is closed
			want error
		}{
			"device": {func(_ *Context, d *Device) func() error { spoil(d.file); return d.Close }, unix.EBADF},
			"context": {func(c *Context, d *Device) func() error {
				switch s := c.space.(type) {
				case *iommufd:
					spoil(s.file)
				case *container:
					spoil(s.file)
				}
				return c.Close
			}, unix.EBADF},
			"group": {func(c *Context, d *Device) func() error {
				if s, ok := c.space.(*container); ok {
					for _, g := range s.groups {
						spoil(g.file)
					}
					return c.space.close
				}
				spoil(d.file)
				return c.Close
			}, unix.EBADF},
			"interrupts": {func(_ *Context, d *Device) func() error {
				i := must2(d.Interrupts(MSIX, 2))(t)
				_ = i.vectors[1].file.Close()
				return i.Close
			}, fs.ErrClosed},
			"interrupts of a device": {func(_ *Context, d *Device) func() error {
				_ = must2(d.Interrupts(MSIX, 2))(t).vectors[0].file.Close()
				return d.Close
			}, fs.ErrClosed},
			"sleep": {func(_ *Context, d *Device) func() error {
				s := must2(d.SleepUntilWoken())(t)
				_ = s.vector.file.Close()
				return s.Close
			}, fs.ErrClosed},
			"mapped region": {func(_ *Context, d *Device) func() error {
				m := must2(must2(d.Region(BAR0))(t).Map())(t)
				base, size := m.base, m.size
				t.Cleanup(func() { _ = unix.MunmapPtr(base, size) })
				m.size = 1 << 62
				return m.Close
			}, unix.EINVAL},
		} {
			context := must2(NewContext(host, Options{Way: way}))(t)
			d := must2(context.Open(nic))(t)
			if err := c.of(context, d)(); !errors.Is(err, c.want) {
				t.Errorf("%s: %v", name, err)
			}
			_ = context.Close() // which may tell it again
		}
	})

	m := must2(NewMemory(4096, 0))(t)
	whole := m.bytes
	m.bytes = m.bytes[:1]
	if err := m.Close(); !errors.Is(err, unix.EINVAL) {
		t.Errorf("memory: %v", err)
	}
	if err := unix.Munmap(whole); err != nil {
		t.Error(err)
	}
}

// spoil closes a file under its owner.
func spoil(f *file) {
	_ = unix.Close(f.fd)
	f.fd = 1 << 20
}
