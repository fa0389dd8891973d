package vfio

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"viaduct/internal/uapi"
)

// Stream is the state of a device while it is saved or resumed: bytes whose order matters, and their meaning is the
// driver's. It ends with the saving or resuming that it is of.
type Stream struct {
	file *file
	os   *os.File // owns the descriptor
}

func newStream(d *Device, fd int) (*Stream, error) {
	// With a driver that can, the runtime waits for data.
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, errors.Join(failure("fcntl", d.Name(), err, nil), unix.Close(fd))
	}
	name := "migration data of " + d.Name()
	f := &file{host: d.context.host, name: name, fd: fd, means: deviceMeans}
	return &Stream{f, os.NewFile(uintptr(fd), name)}, nil
}

// Read reads of the state that is saved. In StateStopCopy it ends with io.EOF; while the device runs, an ErrNoData says
// that there is no more for now.
func (s *Stream) Read(p []byte) (int, error) {
	n, err := s.os.Read(p)
	return n, s.explain("read", err)
}

// Write writes the state that is resumed. It is an ErrRefused if the driver knows at once that it is not for this
// device.
func (s *Stream) Write(p []byte) (int, error) {
	n, err := s.os.Write(p)
	return n, s.explain("write", err)
}

func (s *Stream) explain(op string, err error) error {
	if err == nil || errors.Is(err, io.EOF) || errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, fs.ErrClosed) {
		return err
	}
	return s.file.failure(op, err, map[unix.Errno]error{unix.ENOMSG: ErrNoData, unix.EINVAL: ErrRefused})
}

// PreCopyInfo is how much of a state there is to read, in bytes: Initial is what should be read before the device is
// stopped, and Dirty what has changed since.
type PreCopyInfo struct{ Initial, Dirty uint64 }

// PreCopyInfo asks for it (VFIO_MIG_GET_PRECOPY_INFO), in StatePreCopy and StatePreCopyP2P: an ErrRefused in others.
func (s *Stream) PreCopyInfo() (PreCopyInfo, error) {
	i := uapi.VfioPrecopyInfo{Argsz: uint32(unsafe.Sizeof(uapi.VfioPrecopyInfo{}))}
	const op = "VFIO_MIG_GET_PRECOPY_INFO"
	_, err := s.file.ioctl(op, uapi.VFIO_MIG_GET_PRECOPY_INFO, unsafe.Pointer(&i), stateMeans)
	runtime.KeepAlive(s.os) // which owns the descriptor
	return PreCopyInfo{i.InitialBytes, i.DirtyBytes}, err
}

// Close closes the stream. The device's state stays. Again is no error.
func (s *Stream) Close() error {
	s.file.mu.Lock()
	defer s.file.mu.Unlock()
	if s.file.fd < 0 {
		return nil
	}
	s.file.fd = -1
	return s.os.Close()
}

// Saving is a device that is being saved.
type Saving struct {
	device *Device
	stream *Stream
	buffer []byte
	sent   int64
	before State
	done   bool // by Finish, or Cancel
}

// chunk is how much of a state is in memory at a time, in bytes.
const chunk = 1 << 20

// Save begins to save the state of a device: what can be is saved while it runs, with [Saving.PreCopy], and the rest by
// [Saving.Finish], or the device stays as it is by [Saving.Cancel]. The caller ends it by one of the two. A device that
// does not run is saved as it stands. Not more than a mebibyte of the state is in memory at a time.
func (d *Device) Save() (*Saving, error) {
	m, err := d.Migration()
	if err != nil {
		return nil, err
	}
	before, err := d.State()
	if err != nil {
		return nil, err
	}
	s := &Saving{device: d, buffer: make([]byte, chunk), before: before}
	if m.PreCopy && before == StateRunning {
		if s.stream, err = d.SetState(StatePreCopy); err != nil {
			return nil, d.recoverTo(before, err)
		}
	}
	return s, nil
}

// PreCopy writes all of the state that there is for now, while the device runs on. It returns what is left: no more
// than has changed meanwhile. It writes nothing for a device that cannot be saved while it runs.
func (s *Saving) PreCopy(ctx context.Context, w io.Writer) (PreCopyInfo, error) {
	if s.stream == nil {
		return PreCopyInfo{}, nil
	}
	if err := s.copy(ctx, w); err != nil && !errors.Is(err, ErrNoData) {
		return PreCopyInfo{}, err
	}
	return s.stream.PreCopyInfo()
}

// Finish stops the device and writes the rest of its state; then the device is in StateStop. It returns how many bytes
// of state were written in all. After an error the device is as it was before.
func (s *Saving) Finish(ctx context.Context, w io.Writer) (int64, error) {
	if s.done {
		return s.sent, fmt.Errorf("vfio: the saving of %s has ended: %w", s.device.Name(), fs.ErrClosed)
	}
	stream, err := s.device.SetState(StateStopCopy)
	switch {
	case err != nil:
	case stream != nil && s.stream != nil:
		err = errors.Join(fmt.Errorf("vfio: %s was reset while it was saved: %w", s.device.Name(), ErrRefused),
			stream.Close())
	case stream != nil:
		s.stream = stream
	case s.stream == nil:
		err = fmt.Errorf("vfio: %s is being saved: %w", s.device.Name(), ErrInUse)
	}
	if err == nil {
		err = s.copy(ctx, w)
	}
	if err == nil {
		_, err = s.device.SetState(StateStop)
	}
	if err != nil {
		return s.sent, s.cancel(err)
	}
	s.done = true
	return s.sent, s.stream.Close()
}

// Cancel ends the saving; the device is as it was before. After [Saving.Finish], and again, it does nothing.
func (s *Saving) Cancel() error {
	if s.done {
		return nil
	}
	return s.cancel(nil)
}

func (s *Saving) cancel(err error) error {
	s.done = true
	err = s.device.recoverTo(s.before, err)
	if s.stream != nil {
		err = errors.Join(err, s.stream.Close())
	}
	return err
}

func (s *Saving) copy(ctx context.Context, w io.Writer) error {
	end := s.stream.within(ctx)
	defer end()
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := s.stream.Read(s.buffer)
		if n > 0 {
			if _, err := w.Write(s.buffer[:n]); err != nil {
				return fmt.Errorf("write the state of %s: %w", s.device.Name(), err)
			}
			s.sent += int64(n)
		}
		switch {
		case errors.Is(err, io.EOF) || err == nil && n == 0:
			return nil
		case err != nil:
			return errors.Join(err, ctx.Err())
		}
	}
}

// within has what waits for the stream end with the context.
func (s *Stream) within(ctx context.Context) (end func()) {
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		_ = s.os.SetDeadline(time.Unix(1, 0)) // a driver that cannot be waited for does not wait either
	})
	return func() {
		if !stop() {
			<-done
			_ = s.os.SetDeadline(time.Time{})
		}
	}
}

// Load gives the device a state that was saved of another one, to the reader's end; then the device is in StateStop,
// and [Device.SetState] has it run. An ErrRefused says that the state is not for this device. After an error it is
// reset and runs, as it was before it had any state. Not more than a mebibyte of the state is in memory at a time.
func (d *Device) Load(ctx context.Context, r io.Reader) error {
	err := d.load(ctx, r)
	if err != nil {
		return d.recoverTo(StateRunning, err)
	}
	return nil
}

func (d *Device) load(ctx context.Context, r io.Reader) (err error) {
	stream, err := d.SetState(StateResuming)
	if err != nil {
		return err
	}
	if stream == nil {
		return fmt.Errorf("vfio: %s is being resumed: %w", d.Name(), ErrInUse)
	}
	defer func() { err = errors.Join(err, stream.Close()) }()
	end := stream.within(ctx)
	defer end()

	buffer := make([]byte, chunk)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, readErr := r.Read(buffer)
		if _, err := stream.Write(buffer[:n]); n > 0 && err != nil {
			return errors.Join(err, ctx.Err())
		}
		if errors.Is(readErr, io.EOF) {
			break
		}
		if readErr != nil {
			return fmt.Errorf("read the state for %s: %w", d.Name(), readErr)
		}
	}
	_, err = d.SetState(StateStop)
	return err
}
