package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/cmd/internal/qmp"
	"viaduct/cmd/internal/qmp/qmptest"
	"viaduct/cmd/internal/vmm"
)

const theAddress = "52:54:00:aa:00:01"

// hostPair is two hosts on this machine: real QEMUs, with made-up leases. Their guest has a USB mouse for a VF, which
// comes and goes without the guest.
type hostPair struct {
	t    *testing.T
	dir  string
	mu   sync.Mutex
	from place // the source's
	to   place

	way    Way
	words  []string       // of both QEMUs
	other  []string       // and of the destination's
	first  []string       // and of the source's, with which the guest has its device
	device map[string]any // as device_add takes it

	consoles [2]string // of the guest here, and there; "" if it has none
}

// place is what one host has, as it is written down there.
type place struct {
	record  *Record
	lease   bool
	address string
	qemu    *qmptest.QEMU
}

func (p *place) save(r *Record) {
	now := *r
	p.record = &now
}

func newPair(t *testing.T) *hostPair {
	t.Helper()
	p := &hostPair{
		way: ByReplug, words: []string{"-machine", "q35,accel=tcg", "-m", "32M", "-device", "qemu-xhci,id=bus"},
		first:  []string{"-device", "usb-mouse,bus=bus.0,id=" + vmm.PrimaryID},
		device: map[string]any{"driver": "usb-mouse", "bus": "bus.0", "id": vmm.PrimaryID},
	}
	p.start(t)
	return p
}

// console are the words for the guest's console on a host.
func (p *hostPair) console(host int) []string {
	if p.consoles[host] == "" {
		return nil
	}
	return []string{"-serial", "file:" + p.consoles[host]}
}

// start starts the guest on the source.
func (p *hostPair) start(t *testing.T) {
	t.Helper()
	// Of a short name: a socket's has at most 107 bytes.
	dir, err := os.MkdirTemp("", "m")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	p.t, p.dir = t, dir
	p.from.qemu = qmptest.Start(t, filepath.Join(dir, "from"), slices.Concat(p.words, p.first, p.console(0))...)
	p.from.lease, p.from.address = true, theAddress
}

func (p *hostPair) record() *Record {
	return &Record{ID: NewID(), Guest: "web", Phase: Checked, Source: true, Peer: "the other",
		Socket: p.from.qemu.Socket,
		Order:  Order{Way: ByReplug, From: "net", Count: 1, Address: theAddress}}
}

// source and destination are the hosts' sides of it.
type source struct{ *hostPair }

func (s source) Save(_ context.Context, r *Record) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.from.save(r)
	return nil
}

func (s source) Drop(_ context.Context, _ *Record, stays bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.from.record = nil; stays != s.from.lease {
		return fmt.Errorf("it stays: %v, and there is a lease: %v", stays, s.from.lease)
	}
	return nil
}

func (s source) Address(string) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.from.address, nil
}

func (s source) SetAddress(_ context.Context, _, mac string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.from.address = mac
	return nil
}

func (s source) Device(*Record) (map[string]any, error) {
	return s.device, nil
}

func (s source) Release(context.Context, string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.from.qemu.Ended() {
		return errors.New("the guest has its device open")
	}
	s.from.lease, s.from.address = false, ""
	return nil
}

func (s source) Alive(*Record) bool { return !s.from.qemu.Ended() }

type destination struct{ *hostPair }

func (d destination) Facts(context.Context, *FactsWish) (*FactsAnswer, error) {
	return &FactsAnswer{Facts: &Facts{Host: "the other"}}, nil
}

func (d destination) Record(string) (*Record, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.to.record == nil {
		return nil, nil
	}
	r := *d.to.record
	return &r, nil
}

func (d destination) Save(r *Record) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.to.save(r)
	return nil
}

func (d destination) Drop(string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.to.record = nil
	return nil
}

func (d destination) Reserve(context.Context, *Record) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.to.lease, d.to.address = true, "parked"
	return nil
}

func (d destination) Leased(string) (bool, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.to.lease, nil
}

func (d destination) Socket(*Record) string { return filepath.Join(d.dir, "to") }

func (d destination) Start(_ context.Context, r *Record) error {
	q := qmptest.Start(d.t, r.Socket, slices.Concat(d.words, d.other, d.console(1),
		[]string{"-S", "-incoming", "defer"})...)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.to.qemu = q
	return nil
}

func (d destination) End(context.Context, *Record) error {
	if q := d.there(); q != nil {
		q.Kill()
	}
	return nil
}

func (d destination) Alive(*Record) bool {
	q := d.there()
	return q != nil && !q.Ended()
}

func (d destination) Address(string) (string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.to.address, nil
}

func (d destination) SetAddress(_ context.Context, _, mac string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.to.address = mac
	return nil
}

func (d destination) Device(r *Record) (map[string]any, error) { return source(d).Device(r) }

func (d destination) Stay(context.Context, *Record) error { return nil }

func (d destination) Release(context.Context, string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.to.qemu != nil && !d.to.qemu.Ended() {
		return errors.New("the guest has its device open")
	}
	d.to.lease, d.to.address = false, ""
	return nil
}

func (p *hostPair) there() *qmptest.QEMU {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.to.qemu
}

// remote is the transport between both: a socket, with the other side's viaduct at its end.
type remote struct {
	p     *hostPair
	tell  func(Task) error
	mu    sync.Mutex
	off   bool // the other host does not answer
	open  []net.Conn
	data  []net.Conn // with a guest's memory
	last  *Server    // the last that served
	serve sync.WaitGroup
	lock  chan struct{}
	house func() *Server // who serves; nil: the destination of hostPair
}

func newRemote(p *hostPair, tell func(Task) error) *remote {
	return &remote{p: p, tell: tell, lock: make(chan struct{}, 1)}
}

func (r *remote) Connect(ctx context.Context) (*Pipe, error) {
	r.mu.Lock()
	off := r.off
	r.mu.Unlock()
	if off {
		return nil, errors.New("no route to the other host")
	}

	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		return nil, err
	}

	var ends []net.Conn
	for _, fd := range fds {
		f := os.NewFile(uintptr(fd), "pipe")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			return nil, err
		}
		ends = append(ends, c)
	}

	r.mu.Lock()
	r.open = append(r.open, ends...)
	r.mu.Unlock()
	r.serve.Go(func() {
		defer ends[1].Close()
		locked := false
		s := &Server{House: destination{r.p}, Version: "test", Tell: r.tell}
		if r.house != nil {
			s = r.house()
		}
		s.Lock = func(context.Context, string) error {
			r.lock <- struct{}{}
			locked = true
			return nil
		}
		r.mu.Lock()
		r.last = s
		r.mu.Unlock()
		_ = s.Serve(context.Background(), ends[1], ends[1])
		if locked {
			<-r.lock
		}
	})

	return Converse(ctx, ends[0], "test")
}

func (r *remote) Data(ctx context.Context, id string) (Stream, error) {
	rec, err := destination{r.p}.Record("web")
	if err != nil {
		return nil, err
	}
	socket, err := DataSocket(rec, id)
	if err != nil {
		return nil, err
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.data = append(r.data, c)
	return c, nil
}

// silence has the other host answer no more, or again.
func (r *remote) silence(off bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.off = off
}

// cutData breaks the pipes with a guest's memory.
func (r *remote) cutData() { r.close(&r.data) }

// cut breaks all others.
func (r *remote) cut() { r.close(&r.open) }

func (r *remote) close(pipes *[]net.Conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range *pipes {
		_ = c.Close()
	}
	*pipes = nil
}

// runs reports what a QEMU does, asked beside those who are connected: by its memory it cannot be told, so by asking
// over the connection that is there. A QEMU that has ended does not run.
func running(t *testing.T, q *qmptest.QEMU) bool {
	t.Helper()
	if q == nil || q.Ended() {
		return false
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	c, err := qmp.Dial(ctx, q.Socket)
	if err != nil {
		if q.Ended() {
			return false
		}
		t.Fatal(err)
	}
	defer c.Close()
	var s struct{ Status string }
	if err := c.Do(ctx, "query-status", nil, &s); err != nil {
		t.Fatal(err)
	}
	return s.Status == "running"
}

// plugged reports whether a QEMU's guest has its device.
func plugged(t *testing.T, q *qmptest.QEMU) bool {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	c, err := qmp.Dial(ctx, q.Socket)
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{c}
	defer m.Close()
	there, err := m.has(vmm.PrimaryID)
	if err != nil {
		t.Fatal(err)
	}
	return there
}

// here checks that the guest is where it was, with all it had, and nothing of it is on the other host.
func (p *hostPair) here(t *testing.T) {
	t.Helper()
	if !running(t, p.from.qemu) || !plugged(t, p.from.qemu) || !p.from.lease || p.from.address != theAddress ||
		p.from.record != nil {
		t.Errorf("the guest is not as it was: %+v", p.from)
	}
	if p.to.lease || p.to.qemu != nil && !p.to.qemu.Ended() {
		t.Errorf("something of it is on the other host: %+v", p.to)
	}
}

// moved checks that the guest is on the other host, with all it had, and nothing of it is here.
func (p *hostPair) moved(t *testing.T) {
	t.Helper()
	if !running(t, p.to.qemu) || !plugged(t, p.to.qemu) || !p.to.lease || p.to.address != theAddress ||
		p.to.record != nil {
		t.Errorf("the guest has not come as it was: %+v", p.to)
	}
	if p.from.lease || !p.from.qemu.Ended() || p.from.record != nil {
		t.Errorf("something of it is here: %+v", p.from)
	}
}

func (p *hostPair) driver(r *remote, record *Record, tell func(Action) error) *Driver {
	return &Driver{Home: source{p}, Remote: r, Record: record, Tell: tell, Limits: Limits{Unplug: 5 * time.Second,
		Whole: time.Minute}}
}

// A guest moves, and what that took is told.
func TestMove(t *testing.T) {
	p := newPair(t)
	r := newRemote(p, nil)
	var steps []Action
	d := p.driver(r, p.record(), func(a Action) error {
		steps = append(steps, a)
		return nil
	})
	if err := d.Run(t.Context(), Forward); err != nil {
		t.Fatalf("%v, after %q", err, steps)
	}
	r.serve.Wait()
	p.moved(t)
	o := d.Outcome
	if !o.Moved || o.Downtime == nil || o.Memory == 0 || o.Stopped.IsZero() || o.Resumed.Before(o.Stopped) ||
		!o.Clock.Known ||
		o.Unplug.IsZero() || o.Plugged.Before(o.Resumed) {
		t.Errorf("%+v", o)
	}
	t.Logf("%q", steps)
}

// A guest whose move was taken back moves the next time: what QEMU remembers of the first is not taken for the second.
func TestMoveAgain(t *testing.T) {
	p := newPair(t)
	r := newRemote(p, nil)
	ctx, cancel := context.WithCancel(t.Context())
	first := p.driver(r, p.record(), func(a Action) error {
		if a == Send {
			cancel()
		}
		return nil
	})
	if err := first.Run(ctx, Forward); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	r.serve.Wait()
	p.here(t)
	p.to = place{}
	r = newRemote(p, nil)
	if err := p.driver(r, p.record(), nil).Run(t.Context(), Forward); err != nil {
		t.Fatal(err)
	}
	r.serve.Wait()
	p.moved(t)
}

// A guest that the destination's QEMU cannot load, as its machine is another one, stays here and goes on, and the error
// says what QEMU there said.
func TestCannotLoad(t *testing.T) {
	p := newPair(t)
	p.other = []string{"-m", "64M"}
	r := newRemote(p, nil)
	err := p.driver(r, p.record(), nil).Run(t.Context(), Forward)
	if err == nil || !strings.Contains(err.Error(), "could not load the guest") {
		t.Errorf("%v", err)
	}
	r.serve.Wait()
	p.here(t)
}

// A destination that does not answer any more, after the guest was told to be its, leaves the guest to nobody: neither is
// it resumed, nor taken back, until the user gives his word.
func TestInDoubt(t *testing.T) {
	p := newPair(t)
	r := newRemote(p, func(t Task) error {
		if t == NoteMine {
			return errKilled
		}
		return nil
	})

	record := p.record()
	p.from.save(record)
	d := p.driver(r, record, func(a Action) error {
		if a == AskTake {
			r.silence(true)
		}
		return nil
	})

	if err := d.Run(t.Context(), Forward); !errors.Is(err, ErrInDoubt) {
		t.Errorf("%v", err)
	}

	r.cut()
	r.serve.Wait()
	for _, want := range []Wants{Forward, Back} {
		again := *p.from.record
		if err := p.driver(r, &again, nil).Run(t.Context(), want); !errors.Is(err, ErrInDoubt) ||
			running(t, p.from.qemu) {
			t.Errorf("%s: %v", want, err)
		}
	}

	p.there().Kill() // who fences it
	again := *p.from.record
	if err := p.driver(r, &again, nil).Run(t.Context(), TakeBack); err != nil || !running(t, p.from.qemu) {
		t.Errorf("taken back: %v", err)
	}
	if !plugged(t, p.from.qemu) || p.from.address != theAddress || p.from.record != nil {
		t.Errorf("it is not as it was: %+v", p.from)
	}
}

// stuck is a QEMU that was told to give a copy up, and waits for the other side, as 11.1.3 does about once in a hundred
// times.
type stuck struct {
	runner

	sends net.Conn
}

func (*stuck) cancel() error { return nil }

func (s *stuck) settled(context.Context, func(progress)) (p progress, err error) {
	_ = s.sends.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err = s.sends.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
		return p, fmt.Errorf("it stands still: %w", err)
	}
	return p, nil
}

// silent is a way to a host that takes what is sent to it and says nothing.
type silent struct{ Remote }

func (silent) Data(context.Context, string) (Stream, error) {
	here, there := net.Pipe()
	go func() { _, _ = io.Copy(io.Discard, there) }()
	return here, nil
}

// A copy that is given up has its way closed: whatever QEMU waits for there, it ends.
func TestCancelled(t *testing.T) {
	record := &Record{ID: NewID(), Socket: filepath.Join(t.TempDir(), "q")}
	relay, err := newRelay(silent{}, record)
	if err != nil {
		t.Fatal(err)
	}
	sends, err := net.Dial("unix", relay.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer sends.Close()
	d := &Driver{Record: record, vm: &stuck{sends: sends}, relay: relay}
	if _, err := d.act(t.Context(), Cancel); err != nil {
		t.Error(err)
	}
}
