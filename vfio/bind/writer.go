package bind

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/internal/filelock"
	"viaduct/iommu"
	"viaduct/vfio/holder"
)

// A write to sysfs may block for as long as a guest has the device, and cannot be cut off. So it is made in a child,
// one for all writes of a command, which outlives the command if it must: the write ends when it ends, the command at
// its deadline. This is the parent's side.

// child is the process that writes for a Handle, started when it is needed first.
type child struct {
	host  *iommu.Host
	locks *locks

	mu     sync.Mutex
	closed bool
	now    *writer
	self   holder.Proc // this process; known once a writer was started
}

// get is the writer, started if there is none that lives.
func (c *child) get() (*writer, error) {
	l, err := c.locks.open()
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, errors.New("bind: the Handle is closed")
	}
	if c.now != nil {
		select {
		case <-c.now.ended:
		default:
			return c.now, nil
		}
	}

	c.self = holder.NameProcess(c.host, os.Getpid())
	c.now, err = startWriter(c.host, l)
	return c.now, err
}

// command is this process, if a writer was started.
func (c *child) command() holder.Proc {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.self
}

func (c *child) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	if c.now == nil {
		return
	}
	c.now.hangUp()
	if !c.host.Real() {
		// Its locks end with it, as those of a program end that is its own child only in tests.
		select {
		case <-c.now.ended:
		case <-time.After(patience):
		}
	}
	c.now = nil
}

// drop takes back the requests of a batch that the child has not begun: they fail.
func (c *child) drop(batch int64) {
	c.mu.Lock()
	w := c.now
	c.mu.Unlock()
	if w != nil {
		w.drop(batch)
	}
}

// writer is one child.
type writer struct {
	host    *iommu.Host
	process holder.Proc
	ended   chan struct{}

	mu      sync.Mutex
	out     *os.File // requests; nil once no more can be made
	send    *json.Encoder
	next    int64
	waiting map[int64]chan reply
	dead    error // why it serves no more
}

func startWriter(h *iommu.Host, l *filelock.File) (*writer, error) {
	childIn, out, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	in, childOut, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(err, childIn.Close(), out.Close())
	}

	start := startProcess
	if !h.Real() {
		start = startInside
	}
	pid, wait, err := start(h, l, childIn, childOut)
	if err != nil {
		err = fmt.Errorf("start the child that writes: %w", err)
		return nil, errors.Join(err, in.Close(), out.Close())
	}
	w := &writer{
		host: h, process: holder.NameProcess(h, pid), ended: make(chan struct{}),
		out: out, send: json.NewEncoder(out), waiting: map[int64]chan reply{},
	}
	go w.listen(in, wait)
	return w, nil
}

// startProcess starts this program as the child. A signal of the terminal is for the command alone, which undoes.
func startProcess(_ *iommu.Host, l *filelock.File, in, out *os.File) (pid int, wait func() string, err error) {
	defer in.Close()
	defer out.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{writerEnv + "=1"}
	cmd.Dir = "/"
	cmd.ExtraFiles = []*os.File{l.OS(), in, out}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return 0, nil, err
	}
	return cmd.Process.Pid, func() string {
		_ = cmd.Wait()
		return cmd.ProcessState.String()
	}, nil
}

// startInside has this process be its own child, for a host that is not this machine.
func startInside(h *iommu.Host, l *filelock.File, in, out *os.File) (pid int, wait func() string, err error) {
	fd, err := unix.FcntlInt(l.OS().Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return 0, nil, errors.Join(err, in.Close(), out.Close())
	}
	shared := filelock.Of(os.NewFile(uintptr(fd), l.OS().Name()))
	go func() {
		serve(h, shared, in, out)
		in.Close()
		out.Close()
		_ = shared.Close()
	}()
	return os.Getpid(), func() string { return "it ended" }, nil
}

// listen hands replies to who waits for them, until the child has ended and all were read.
func (w *writer) listen(in *os.File, wait func() string) {
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

	state := wait()
	w.mu.Lock()
	w.dead = fmt.Errorf("the child that writes ended: %s", state)
	w.mu.Unlock()
	w.hangUp()
	in.Close()
	close(w.ended)
}

// hangUp tells the child that there is nothing more to do.
func (w *writer) hangUp() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.out != nil {
		w.out.Close()
		w.out = nil
	}
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

// run has the child make writes. When one is late it returns a *StuckError and leaves the child to it.
func (w *writer) run(r request) error {
	// Never blocks the reader.
	answer := make(chan reply, 1)
	since := time.Now()
	if err := w.request(&r, answer); err != nil {
		return fmt.Errorf("%s: %w", r.Device, err)
	}
	defer func() {
		w.mu.Lock()
		delete(w.waiting, r.ID)
		w.mu.Unlock()
	}()

	a, err := w.await(r, answer)
	switch {
	case err != nil:
		return fmt.Errorf("%s: %w", r.Device, err)
	case a.Stuck:
		return &StuckError{Device: r.Device, What: r.Steps[a.Step].String(), Writer: w.process, Since: since}
	case a.Err != "":
		return &writeError{a.Err, a.Errno}
	}
	return nil
}

func (w *writer) request(r *request, answer chan reply) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.dead != nil:
		return w.dead
	case w.out == nil:
		return errors.New("the Handle is closed")
	}
	w.next++
	r.ID = w.next
	w.waiting[r.ID] = answer
	if err := w.send.Encode(r); err != nil {
		delete(w.waiting, r.ID)
		return err
	}
	return nil
}

// await waits for a request's reply. A child that was killed in a write ends with that, and tells nothing until then.
func (w *writer) await(r request, answer chan reply) (reply, error) {
	longest := patience
	for _, t := range r.Times {
		longest = max(longest, t+patience)
	}

	for {
		select {
		case a := <-answer:
			return a, nil
		case <-w.ended:
			// And has read all there was to read.
			select {
			case a := <-answer:
				return a, nil
			default:
				return reply{}, w.dead
			}
		case <-time.After(longest):
			if w.process.Ended(w.host) {
				return reply{Stuck: true}, nil
			}
		}
	}
}

// drop takes back the requests of a batch that the child has not begun: they fail.
func (w *writer) drop(batch int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.out != nil {
		_ = w.send.Encode(request{Drop: true, Batch: batch})
	}
}
