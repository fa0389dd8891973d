package bind

import (
	"encoding/json"
	"errors"
	"io"
	"maps"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/internal/filelock"
	"viaduct/iommu"
)

// This is the child's side of writing.

const writerEnv = "VIADUCT_WRITER"

var served atomic.Bool

// ServeWrites must be called first in main by every program that changes devices, which ends if it returns true: the
// program was started by itself to make its writes, and has made them.
func ServeWrites() bool {
	served.Store(true)
	if os.Getenv(writerEnv) == "" {
		return false
	}
	var in unix.Stat_t
	if err := unix.Fstat(4, &in); err != nil || in.Mode&unix.S_IFMT != unix.S_IFIFO {
		// Somebody else set it.
		return false
	}
	h, err := iommu.Open("")
	if err != nil {
		return true
	}
	defer h.Close()
	serve(h, filelock.Of(os.NewFile(3, "lock")), os.NewFile(4, "requests"), os.NewFile(5, "replies"))
	return true
}

// reply is what came of a request; there is one for each.
type reply struct {
	ID    int64
	Err   string
	Errno unix.Errno
	Stuck bool // the write of Step has not returned in time
	Step  int
}

// How many requests are carried out side by side. The kernel serialises part of a probe, but a driver may take a second
// for the rest. A write that takes longer than the patience lets another begin: it may wait for a guest.
const (
	parallel = 8
	patience = time.Second
)

// server is the child.
type server struct {
	host  *iommu.Host
	locks *filelock.File
	slots chan struct{}
	gone  chan struct{} // closed when the parent has no more requests or is no more

	mu      sync.Mutex
	replies *json.Encoder
	running map[iommu.Address]int
}

// serve writes until the parent has no more requests or is gone, and then ends what it is in the middle of, but no
// more.
func serve(h *iommu.Host, l *filelock.File, requests io.Reader, replies io.Writer) {
	s := server{
		host: h, locks: l, slots: make(chan struct{}, parallel), gone: make(chan struct{}),
		replies: json.NewEncoder(replies), running: map[iommu.Address]int{},
	}
	var wg sync.WaitGroup
	// By batch.
	drops := map[int64]chan struct{}{}
	for in := json.NewDecoder(requests); ; {
		var r request
		if err := in.Decode(&r); err != nil {
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
	// The others are free for the next command, which finishes or undoes them.
	var kept []int64
	for _, a := range slices.Collect(maps.Keys(s.running)) {
		kept = append(kept, offset(a))
	}
	l.KeepOnly(kept)
	s.mu.Unlock()
	wg.Wait()
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
	// Without a parent, nobody need know.
	_ = s.replies.Encode(a)
}

// do carries out a request that has a slot, which it frees when it ends or has no more patience.
func (s *server) do(r request) {
	if !s.started(r.Device) {
		return
	}

	// Each write has its own time. Once one was late and the parent knows, no further one is begun.
	var mu sync.Mutex
	step, stuck := 0, false
	late := time.AfterFunc(time.Hour, func() {
		mu.Lock()
		defer mu.Unlock()
		if !stuck && step >= 0 {
			stuck = true
			s.answer(reply{ID: r.ID, Step: step, Stuck: true})
		}
	})
	slow := time.AfterFunc(patience, func() { <-s.slots })
	err := carryOut(s.host, r.Steps, r.Change, func(i int) bool {
		mu.Lock()
		defer mu.Unlock()
		if stuck || s.over() {
			return false
		}
		step = i
		late.Reset(r.Times[i])
		return true
	})
	if slow.Stop() {
		<-s.slots
	}

	mu.Lock()
	answered := stuck
	step = -1
	late.Stop()
	mu.Unlock()
	s.ended(r.Device)
	if answered {
		return
	}
	a := reply{ID: r.ID}
	if err != nil {
		a.Err = err.Error()
		errors.As(err, &a.Errno)
	}
	s.answer(a)
}

// started notes that a device is being written to, unless nobody wants that any more.
func (s *server) started(a iommu.Address) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over() {
		return false
	}
	s.running[a]++
	return true
}

// ended notes that one of a device's writers has ended. Without a parent, the last of them frees the device.
func (s *server) ended(a iommu.Address) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.running[a]--; s.running[a] > 0 {
		return
	}
	delete(s.running, a)
	if s.over() {
		s.locks.Free(offset(a))
	}
}
