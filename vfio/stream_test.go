package vfio

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"viaduct/internal/host/hosttest"
)

// newMigration opens a device whose state can be saved while it runs, and by parts.
func newMigration(t *testing.T) (*hosttest.VFIO, *hosttest.VFIODevice, *Device) {
	t.Helper()
	_, v, host := newVFIO(t)
	_, d := openOne(t, host, Options{}, nic)
	device := v.Devices[nic]
	device.Migration, device.Changed = 1|4, 77
	device.Content, device.Rest = []byte("while it runs, "), []byte("the rest")
	return v, device, d
}

// TestMigration tells what a device can of migration: each of it by itself.
func TestMigration(t *testing.T) {
	_, device, d := newMigration(t)
	for flags, want := range map[uint64]Migration{1: {StopCopy: true}, 2: {P2P: true}, 4: {PreCopy: true}} {
		device.Migration = flags
		if got, err := d.Migration(); err != nil || got != want {
			t.Errorf("%d: %+v, %v", flags, got, err)
		}
	}

	for state := StateError; state <= StatePreCopyP2P; state++ {
		device.State = uint32(state)
		if got, err := d.State(); err != nil || got != state {
			t.Errorf("%s, not %s: %v", got, state, err)
		}
	}

	if n, err := d.DataSize(); err != nil || n != uint64(len(device.Content)) {
		t.Errorf("%d, %v", n, err)
	}

	for _, c := range []struct {
		can  Migration
		has  []State
		lack []State
	}{
		{Migration{}, []State{StateError, StateStop, StateResuming}, []State{StateRunningP2P, StatePreCopy, 8}},
		{Migration{P2P: true}, []State{StateRunningP2P}, []State{StatePreCopy, StatePreCopyP2P}},
		{Migration{PreCopy: true}, []State{StatePreCopy}, []State{StateRunningP2P, StatePreCopyP2P}},
		{Migration{P2P: true, PreCopy: true}, []State{StatePreCopyP2P}, []State{8, 9}},
	} {
		for _, s := range c.has {
			if !c.can.has(s) {
				t.Errorf("%+v has no %s", c.can, s)
			}
		}
		for _, s := range c.lack {
			if c.can.has(s) {
				t.Errorf("%+v has %s", c.can, s)
			}
		}
	}
}

// TestPreCopy saves a device while it runs, and what is left when it has stopped.
func TestPreCopy(t *testing.T) {
	_, device, d := newMigration(t)
	var b bytes.Buffer
	s := must2(d.Save())(t)
	if now := must2(d.State())(t); now != StatePreCopy {
		t.Errorf("%s", now)
	}
	if left, err := s.stream.PreCopyInfo(); err != nil || left != (PreCopyInfo{uint64(len(device.Content)), 77}) {
		t.Errorf("%+v, %v", left, err)
	}
	for range 2 {
		left, err := s.PreCopy(t.Context(), &b)
		if err != nil || left != (PreCopyInfo{0, 77}) || b.String() != "while it runs, " {
			t.Errorf("%+v, %v, %q", left, err, b.String())
		}
	}
	n, err := s.Finish(t.Context(), &b)
	if err != nil || n != int64(b.Len()) || b.String() != "while it runs, the rest" {
		t.Errorf("%d, %v, %q", n, err, b.String())
	}
	if now := must2(d.State())(t); now != StateStop {
		t.Errorf("%s", now)
	}
	if _, err := s.stream.PreCopyInfo(); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("of what has ended: %v", err)
	}

	// Of a device that does not run, and of one that cannot, nothing is saved before it has stopped.
	for name, spoil := range map[string]func(){
		"stopped": func() {}, "without": func() { device.Migration, device.State = 1, uint32(StateRunning) },
	} {
		spoil()
		b.Reset()
		s := must2(d.Save())(t)
		if left, err := s.PreCopy(t.Context(), &b); err != nil || left != (PreCopyInfo{}) || b.Len() != 0 {
			t.Errorf("%s: %+v, %v, %q", name, left, err, b.String())
		}
		if n, err := s.Finish(t.Context(), &b); err != nil || n != 23 {
			t.Errorf("%s: %d, %v", name, n, err)
		}
	}
	// A state may be short, and end where what is in memory at a time does; of none nothing is written.
	for _, size := range []int{1, chunk, chunk + 1} {
		b.Reset()
		device.Content, device.Rest, device.State = bytes.Repeat([]byte{7}, size), nil, uint32(StateRunning)
		n, err := must2(d.Save())(t).Finish(t.Context(), writerFunc(func(p []byte) {
			if b.Write(p); len(p) > 1<<20 {
				t.Errorf("%d bytes of a state are in memory at a time", len(p))
			}
		}))
		if n != int64(size) || err != nil || !bytes.Equal(b.Bytes(), device.Content) {
			t.Errorf("a state of %d bytes: %d, %v", size, n, err)
		}
	}
	device.Content, device.State = nil, uint32(StateRunning)
	if n, err := must2(d.Save())(t).Finish(t.Context(), brokenWriter{io.ErrClosedPipe}); n != 0 || err != nil {
		t.Errorf("an empty state: %d, %v", n, err)
	}
	stream := must2(d.SetState(StateStopCopy))(t)
	if _, err := stream.PreCopyInfo(); !errors.Is(err, ErrRefused) {
		t.Errorf("of a device that has stopped: %v", err)
	}
	if err := errors.Join(stream.Close(), stream.Close()); err != nil {
		t.Error(err)
	}
	_, read := stream.Read(make([]byte, 1))
	_, wrote := stream.Write(make([]byte, 1))
	if !errors.Is(read, fs.ErrClosed) || !errors.Is(wrote, fs.ErrClosed) {
		t.Errorf("%v, %v", read, wrote)
	}
}

// TestSavingFails ends savings and loads in each way that they can fail: the device is as it was before, or runs.
func TestSavingFails(t *testing.T) {
	broken := errors.New("broken")
	toStop := func(*hosttest.VFIO, *hosttest.VFIODevice, *Device) {}
	for name, c := range map[string]struct {
		before State
		meet   func(v *hosttest.VFIO, device *hosttest.VFIODevice, d *Device) // after it began
		w      io.Writer
		after  State
		want   error
	}{
		"a writer":               {StateRunning, toStop, brokenWriter{broken}, StateRunning, broken},
		"a writer, when stopped": {StateStop, toStop, brokenWriter{broken}, StateStop, broken},
		"a reset meanwhile": {StateRunning, func(_ *hosttest.VFIO, _ *hosttest.VFIODevice, d *Device) { _ = d.Reset() },
			io.Discard, StateRunning, ErrRefused},
		"another saving":                    {StateStopCopy, toStop, io.Discard, StateStopCopy, ErrInUse},
		"the device dies":                   {StateRunning, dies(1), io.Discard, StateRunning, ErrFault},
		"the device dies, that was stopped": {StateStop, dies(1), io.Discard, StateStop, ErrFault},
		"the device dies at the end":        {StateRunning, dies(2), io.Discard, StateRunning, ErrFault},
		"it cannot be reset": {StateRunning, func(v *hosttest.VFIO, device *hosttest.VFIODevice, d *Device) {
			device.NoReset = true
			dies(1)(v, device, d)
		}, io.Discard, StateError, ErrUnsupported},
		"its state is not told": {StateStop, func(v *hosttest.VFIO, _ *hosttest.VFIODevice, _ *Device) {
			v.Fail = failing(0x3b75, unix.ENXIO)
		}, io.Discard, StateStop, unix.ENXIO},
	} {
		v, device, d := newMigration(t)
		device.State = uint32(c.before)
		before := openFiles(t)
		s := must2(d.Save())(t)
		c.meet(v, device, d)
		_, err := s.Finish(t.Context(), c.w)
		v.Fail = nil
		if !errors.Is(err, c.want) || must2(d.State())(t) != c.after {
			t.Errorf("%s: %v, and the device is in %s", name, err, must2(d.State())(t))
		}
		if err := s.Cancel(); err != nil {
			t.Errorf("%s: cancelled after it ended: %v", name, err)
		}
		if after := openFiles(t); after != before {
			t.Errorf("%s: %d files are open, before %d", name, after, before)
		}
	}

	v, device, d := newMigration(t)
	before := openFiles(t)
	s := must2(d.Save())(t)
	if _, err := s.PreCopy(t.Context(), brokenWriter{broken}); !errors.Is(err, broken) {
		t.Error(err)
	}
	if err := s.Cancel(); err != nil || device.State != uint32(StateRunning) {
		t.Errorf("%v, %d", err, device.State)
	}
	v.Fail = failing(0x3b79, unix.EIO)
	s = must2(d.Save())(t)
	if _, err := s.PreCopy(t.Context(), io.Discard); !errors.Is(err, unix.EIO) {
		t.Error(err)
	}
	v.Fail = nil
	_ = s.stream.os.Close()
	if err := s.Cancel(); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("a stream that cannot be closed: %v", err)
	}
	device.Full = true
	if err := d.Load(t.Context(), bytes.NewReader([]byte("state"))); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("a device that takes no more: %v", err)
	}
	device.Full = false
	stream := must2(d.SetState(StateResuming))(t)
	err := d.Load(t.Context(), bytes.NewReader(nil))
	if !errors.Is(err, ErrInUse) || device.State != uint32(StateRunning) {
		t.Errorf("another load: %v, %d", err, device.State)
	}
	if err := stream.Close(); err != nil {
		t.Error(err)
	}
	// A saving that the device does not begin.
	for n := range 3 {
		made := 0
		v.Fail = func(request uintptr) error {
			if made++; made == n+1 {
				return unix.EIO
			}
			return nil
		}
		if s, err := d.Save(); !errors.Is(err, ErrFault) || s != nil {
			t.Errorf("request %d fails: %v", n, err)
		}
		v.Fail = nil
		if device.State != uint32(StateRunning) {
			t.Errorf("request %d fails, and it is in %s", n, State(device.State))
		}
	}
	if after := openFiles(t); after != before {
		t.Errorf("%d files are open, before %d", after, before)
	}
}

// dies has a change of a device's state, that of a number, leave it in StateError.
func dies(at int) func(v *hosttest.VFIO, device *hosttest.VFIODevice, d *Device) {
	return func(v *hosttest.VFIO, device *hosttest.VFIODevice, _ *Device) {
		made := 0
		v.Fail = func(uintptr) error {
			if made++; made != at {
				return nil
			}
			device.State = uint32(StateError)
			return unix.EIO
		}
	}
}

// TestStreamWaits stops who waits for data of a driver that can be waited for: here, of a pipe.
func TestStreamWaits(t *testing.T) {
	_, _, d := newMigration(t)
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[1])
	s := &Saving{device: d, buffer: make([]byte, chunk), stream: must2(newStream(d, fds[0]))(t)}
	var b bytes.Buffer
	for _, text := range []string{"one", "two"} {
		ctx, stop := context.WithCancel(t.Context())
		if _, err := unix.Write(fds[1], []byte(text)); err != nil {
			t.Fatal(err)
		}
		// What is there is written, and then it waits until it is stopped.
		if err := s.copy(ctx, writerFunc(func(p []byte) { b.Write(p); stop() })); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}

	if b.String() != "onetwo" || s.sent != 6 {
		t.Errorf("%q, %d bytes", b.String(), s.sent)
	}
	if err := s.stream.Close(); err != nil {
		t.Error(err)
	}

	folder := must2(unix.Open(t.TempDir(), unix.O_RDONLY|unix.O_CLOEXEC, 0))(t)
	s.stream = must2(newStream(d, folder))(t)
	if _, err := s.PreCopy(t.Context(), &b); !errors.Is(err, unix.EISDIR) {
		t.Errorf("what cannot be read: %v", err)
	}
	if err := s.stream.Close(); err != nil {
		t.Error(err)
	}
	if _, err := newStream(d, 1<<20); !errors.Is(err, unix.EBADF) {
		t.Error(err)
	}
}

type writerFunc func(p []byte)

func (w writerFunc) Write(p []byte) (int, error) {
	w(p)
	return len(p), nil
}

// TestExplain tells what a driver's errors of a stream mean, and passes on what is none of them.
func TestExplain(t *testing.T) {
	s := &Stream{file: &file{name: "the stream"}}
	for err, want := range map[error]error{
		unix.ENOMSG: ErrNoData, unix.EINVAL: ErrRefused, &fs.PathError{Op: "read", Err: unix.ENOMSG}: ErrNoData,
		unix.EIO: unix.EIO,
	} {
		if got := s.explain("read", err); !errors.Is(got, want) || !strings.Contains(got.Error(), "read the stream") {
			t.Errorf("%v: %v", err, got)
		}
	}
	for _, same := range []error{nil, io.EOF, os.ErrDeadlineExceeded, fs.ErrClosed} {
		if got := s.explain("read", same); got != same { //nolint:errorlint // it must be the same one
			t.Errorf("%v became %v", same, got)
		}
	}
}

// TestSavingStopped: who does not save any more gets nothing, and the device runs on.
func TestSavingStopped(t *testing.T) {
	_, device, d := newMigration(t)
	device.Migration = 1
	stopped, stop := context.WithCancel(t.Context())
	stop()
	s := must2(d.Save())(t)
	var got bytes.Buffer
	if n, err := s.Finish(stopped, &got); n != 0 || got.Len() > 0 || !errors.Is(err, context.Canceled) {
		t.Errorf("%d bytes, %d written, %v", n, got.Len(), err)
	}
	if state, err := d.State(); err != nil || state != StateRunning {
		t.Errorf("it is %s, %v", state, err)
	}
}
