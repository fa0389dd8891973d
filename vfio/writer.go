package vfio

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/iommu"
)

// A write to sysfs may block for as long as a guest has the device, and cannot be cut off. So it is made in a child, one for
// all writes of a command, which outlives the command if it must: the write ends when it ends, the command at its deadline.

const writerEnv = "VIADUCT_WRITER"

var served atomic.Bool

// ServeWrites must be called first in main by every program that takes devices, which ends if it returns true: the program
// was started by itself to make its writes, and has made them.
func ServeWrites() bool {
	served.Store(true)
	if os.Getenv(writerEnv) == "" {
		return false
	}
	var in unix.Stat_t
	if err := unix.Fstat(4, &in); err != nil || in.Mode&unix.S_IFMT != unix.S_IFIFO {
		return false // somebody else set it
	}
	_ = serve(&locks{os.NewFile(3, "lock")}, os.NewFile(4, "requests"), os.NewFile(5, "replies"))
	return true
}

// request is a sequence of writes for a device, each made when the one before it succeeded, with the change to be checked.
type request struct {
	ID      int64
	Device  iommu.Address // which the lock is for
	Steps   []Step
	Change  *Change // nil: the caller checks
	Timeout time.Duration
	Batch   int64 // that it can be taken back with; 0 for what is not
	Drop    bool  // instead of all that: what was not begun yet of the batch is not to be
}

// reply is what came of a request; there is one for each.
type reply struct {
	ID    int64
	Err   string
	Errno unix.Errno
	Stuck bool // the write of Step has not returned in time
	Step  int
}

// writeError is an error of the child.
type writeError struct {
	text  string
	errno unix.Errno
}

func (e *writeError) Error() string { return e.text }

func (e *writeError) Unwrap() error {
	if e.errno == 0 {
		return nil
	}
	return e.errno
}

// How many requests are carried out side by side. The kernel serialises part of a probe, but a driver may take a second for
// the rest. A write that takes longer than the patience lets another begin: it may wait for a guest.
const (
	parallel = 8
	patience = time.Second
)

// server is the child.
type server struct {
	host  *iommu.Host
	locks *locks
	slots chan struct{}
	gone  chan struct{} // closed when the parent has no more requests or is no more

	mu      sync.Mutex
	replies *json.Encoder
	running map[iommu.Address]bool
}

// serve writes until the parent has no more requests or is gone, and then ends what it is in the middle of, but no more.
func serve(l *locks, requests io.Reader, replies io.Writer) error {
	h, err := iommu.Open("")
	if err != nil {
		return err
	}
	defer h.Close()
	s := server{
		host: h, locks: l, slots: make(chan struct{}, parallel), gone: make(chan struct{}),
		replies: json.NewEncoder(replies), running: map[iommu.Address]bool{},
	}
	var wg sync.WaitGroup
	drops := map[int64]chan struct{}{} // by batch
	for in := json.NewDecoder(requests); ; {
		var r request
		if err = in.Decode(&r); err != nil {
			break
		}
		dropped := drops[r.Batch]
		if dropped == nil && r.Batch != 0 {
			dropped = make(chan struct{})
			drops[r.Batch] = dropped
		}
		if r.Drop {
			close(dropped)
			delete(drops, r.Batch)
			continue
		}
		wg.Go(func() {
			select {
			case s.slots <- struct{}{}:
				s.do(r)
			case <-dropped:
				s.answer(reply{ID: r.ID, Err: r.Device.String() + ": interrupted before it was touched"})
			case <-s.gone:
			}
		})
	}
	s.mu.Lock()
	close(s.gone)
	l.keepOnly(slices.Collect(maps.Keys(s.running))) // the others are free for the next command, which finishes or undoes them
	s.mu.Unlock()
	wg.Wait()
	return nil
}

func (s *server) over() bool {
	select {
	case <-s.gone:
		return true
	default:
		return false
	}
}

func (s *server) answer(a reply) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_ = s.replies.Encode(a) // without a parent, nobody need know
}

// do carries out a request that has a slot, which it frees when it ends or has no more patience.
func (s *server) do(r request) {
	s.mu.Lock()
	if s.over() {
		s.mu.Unlock()
		return
	}
	s.running[r.Device] = true
	s.mu.Unlock()
	var step atomic.Int32
	late := time.AfterFunc(r.Timeout, func() {
		s.answer(reply{ID: r.ID, Step: int(step.Load()), Stuck: true})
	})
	slow := time.AfterFunc(patience, func() { <-s.slots })
	err := carryOut(s.host, r.Steps, r.Change, func(i int) bool {
		step.Store(int32(i))
		return !s.over()
	})
	if slow.Stop() {
		<-s.slots
	}
	s.mu.Lock()
	delete(s.running, r.Device)
	if s.over() {
		s.locks.free(r.Device)
	}
	s.mu.Unlock()
	if !late.Stop() {
		return // that is answered
	}
	a := reply{ID: r.ID}
	if err != nil {
		a.Err = err.Error()
		errors.As(err, &a.Errno)
	}
	s.answer(a)
}

// writer is the parent's side of the child.
type writer struct {
	host    *iommu.Host
	process Proc
	out     *os.File // requests
	mu      sync.Mutex
	send    *json.Encoder
	next    int64
	waiting map[int64]chan reply
	dead    error // why it serves no more
	ended   chan struct{}
}

func startWriter(h *iommu.Host, l *locks) (*writer, error) {
	if !served.Load() {
		return nil, errors.New("vfio: the program must call vfio.ServeWrites at its start")
	}
	childIn, out, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	in, childOut, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(err, childIn.Close(), out.Close())
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{writerEnv + "=1"}
	cmd.Dir = "/"
	cmd.ExtraFiles = []*os.File{l.file, childIn, childOut}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // a signal of the terminal is for the command, which undoes
	err = cmd.Start()
	childIn.Close()
	childOut.Close()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start the child that writes: %w", err), in.Close(), out.Close())
	}
	w := &writer{host: h, out: out, send: json.NewEncoder(out), waiting: map[int64]chan reply{}, ended: make(chan struct{})}
	w.process = NameProcess(h, cmd.Process.Pid)
	go func() {
		defer in.Close()
		for replies := json.NewDecoder(in); ; {
			var r reply
			if err := replies.Decode(&r); err != nil {
				break
			}
			w.mu.Lock()
			to := w.waiting[r.ID]
			w.mu.Unlock()
			if to != nil {
				to <- r
			}
		}
		_ = cmd.Wait()
		state := cmd.ProcessState.String()
		w.mu.Lock()
		w.dead = fmt.Errorf("the child that writes ended: %s", state)
		w.mu.Unlock()
		close(w.ended)
	}()
	return w, nil
}

// run has the child make writes. At the deadline it returns a *StuckError and leaves the child to it.
func (w *writer) run(r request) error {
	answer := make(chan reply, 1) // never blocks the reader
	since := time.Now()
	w.mu.Lock()
	w.next++
	r.ID = w.next
	w.waiting[r.ID] = answer
	err := w.dead
	if err == nil {
		err = w.send.Encode(r)
	}
	w.mu.Unlock()
	defer func() {
		w.mu.Lock()
		delete(w.waiting, r.ID)
		w.mu.Unlock()
	}()
	if err != nil {
		return fmt.Errorf("%s: %w", r.Device, err)
	}
	var a reply
	for got := false; !got; {
		select {
		case a = <-answer:
			got = true
		case <-w.ended: // and has read all there was to read
			select {
			case a = <-answer:
				got = true
			default:
				return fmt.Errorf("%s: %w", r.Device, w.dead)
			}
		case <-time.After(r.Timeout + patience): // a child that was killed in a write ends with that, and tells nothing until then
			if state, _, ok := processStat(w.host, processDir(w.process.PID)); ok && state == "Z" {
				a, got = reply{Stuck: true}, true
			}
		}
	}
	switch {
	case a.Stuck:
		return &StuckError{Device: r.Device, What: r.Steps[a.Step].String(), Writer: w.process, Since: since}
	case a.Err != "":
		return &writeError{a.Err, a.Errno}
	}
	return nil
}

// drop takes back the requests of a batch that the child has not begun: they fail.
func (w *writer) drop(batch int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	_ = w.send.Encode(request{Drop: true, Batch: batch})
}

// StuckError says that a write has not returned: something holds the device. The write goes on in its child.
type StuckError struct {
	Device  iommu.Address
	What    string // the write
	Writer  Proc
	Since   time.Time
	Holders []Holder // what it waits for, where that can be seen
}

func (e *StuckError) Error() string {
	var holders strings.Builder
	for _, h := range e.Holders {
		holders.WriteString("; it " + h.What)
	}
	return fmt.Sprintf("%s is stuck: %q has not returned since %s", e.Device, e.What, e.Since.Format(time.TimeOnly)) +
		holders.String() + fmt.Sprintf(" (process %d waits on; after that, the next change or viaduct recover does the rest)", e.Writer.PID)
}
