package vfio

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
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
	_ = serve(&locks{os.NewFile(3, "lock")}, os.NewFile(4, "requests"), os.NewFile(5, "replies"))
	return true
}

// request is a sequence of writes for a device; each one is made when the one before it succeeded.
type request struct {
	ID     int64
	Device iommu.Address
	Steps  []Step
}

// reply tells how many steps are done, after each; Err is empty but for the last one that failed.
type reply struct {
	ID    int64
	Done  int
	Errno unix.Errno
	Err   string
}

// serve is the child: it writes until its parent has no more requests or is gone, and then ends what it began, but no more.
func serve(l *locks, requests io.Reader, replies io.Writer) error {
	h, err := iommu.Open("")
	if err != nil {
		return err
	}
	defer h.Close()
	var mu sync.Mutex
	running, gone := map[iommu.Address]bool{}, false
	send := json.NewEncoder(replies)
	var wg sync.WaitGroup
	for in := json.NewDecoder(requests); ; {
		var r request
		if err = in.Decode(&r); err != nil {
			break
		}
		mu.Lock()
		running[r.Device] = true
		mu.Unlock()
		wg.Go(func() {
			defer func() {
				mu.Lock()
				defer mu.Unlock()
				delete(running, r.Device)
				if gone {
					l.free(r.Device)
				}
			}()
			for i, s := range r.Steps {
				mu.Lock()
				stop := gone
				mu.Unlock()
				if stop {
					return
				}
				answer := reply{ID: r.ID, Done: i + 1}
				if err := h.Write(s.Path, s.Value); err != nil {
					answer.Done, answer.Err = i, err.Error()
					errors.As(err, &answer.Errno)
				}
				mu.Lock()
				err := send.Encode(answer)
				mu.Unlock()
				if err != nil || answer.Err != "" {
					return
				}
			}
		})
	}
	mu.Lock()
	gone = true
	var still []iommu.Address
	for a := range running {
		still = append(still, a)
	}
	l.keepOnly(still) // the others are free for the next command, which finishes or undoes them
	mu.Unlock()
	wg.Wait()
	return nil
}

// writer is the parent's side of the child.
type writer struct {
	process process
	out     *os.File // requests
	mu      sync.Mutex
	send    *json.Encoder
	next    int64
	waiting map[int64]chan reply
	dead    error // why it serves no more
	ended   chan struct{}
}

// process names a process for good: its number may be another's tomorrow.
type process struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // in clock ticks since the boot (proc_pid_stat(5))
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
	w := &writer{out: out, send: json.NewEncoder(out), waiting: map[int64]chan reply{}, ended: make(chan struct{})}
	w.process.PID = cmd.Process.Pid
	w.process.Start, _ = startTime(h, cmd.Process.Pid)
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

// run makes the writes. At the deadline it returns a *StuckError and leaves the child to it.
func (w *writer) run(device iommu.Address, steps []Step, timeout time.Duration) error {
	answers := make(chan reply, len(steps)) // never blocks the reader
	w.mu.Lock()
	w.next++
	r := request{w.next, device, steps}
	w.waiting[r.ID] = answers
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
		return fmt.Errorf("%s: %w", device, err)
	}
	since, deadline := time.Now(), time.NewTimer(timeout)
	defer deadline.Stop()
	for done := 0; done < len(steps); {
		select {
		case a := <-answers:
			done = a.Done
			if a.Errno != 0 {
				return &fs.PathError{Op: "write", Path: "/" + steps[done].Path, Err: a.Errno}
			}
			if a.Err != "" {
				return errors.New(a.Err)
			}
		case <-w.ended:
			if len(answers) > 0 {
				continue
			}
			return fmt.Errorf("%s: %w", device, w.dead)
		case <-deadline.C:
			return &StuckError{Device: device, What: steps[done].String(), Writer: w.process, Since: since}
		}
	}
	return nil
}

// StuckError says that a write has not returned: something holds the device. The write goes on in its child.
type StuckError struct {
	Device  iommu.Address
	What    string // the write
	Writer  process
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
