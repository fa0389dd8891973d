package migrate

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"sync/atomic"
	"testing"
)

// The points of a move at which something may go wrong: before an action of the source, or a task of the destination.
var (
	actions = []Action{
		AskReserve, AskStart, RecordUnplugging, Unplug, Park, RecordCopying, AskLoad, Send, Await, RecordCommitted,
		AskTake,
		AskArrive, RecordQuitting, Quit, AskForget, End,
	}
	back = []Action{RecordReturning, AskRefuse, Unpark, Plug, AskForget, Keep}
	work = []Task{
		NoteReserved, Reserve, NoteWaiting, Start, NoteLoading, Load, NoteMine, Go, GiveAddress, PlugHere,
		NoteArrived, Forget,
	}
	backWork = []Task{NoteRefused, EndQEMU, Release, Forget}

	// turns are where the user may turn round, each with what is done then alone.
	turns = map[Action][]Action{Park: nil, Await: {Cancel}, RecordCommitted: {Resume}}
)

// wrong is something that goes wrong at a point of a move.
type wrong struct {
	// kill, serve: the viaduct here, the one there; cut: the pipe; data: the pipe with the guest's memory; turn: the user;
	// here, there: a QEMU
	what   string
	action Action
	task   Task
	after  Action // the point is on the way back from here
	want   Wants  // with which the user mends it
}

func (w *wrong) String() string {
	return fmt.Sprintf("%s before %s%s, back from %q, then %s", w.what, w.action, w.task, w.after, w.want)
}

func faults() (out []wrong) {
	victims := []string{"kill", "serve", "cut", "here", "there"}
	for _, want := range []Wants{Forward, Back} {
		for _, what := range append(victims, "turn") {
			for _, a := range actions {
				out = append(out, wrong{what: what, action: a, want: want})
			}
			for _, t := range work {
				out = append(out, wrong{what: what, task: t, want: want})
			}
		}
		out = append(out, wrong{what: "data", action: Await, want: want})
		for _, what := range victims {
			for _, after := range slices.Sorted(maps.Keys(turns)) {
				for _, a := range append(turns[after], back...) {
					out = append(out, wrong{what: what, action: a, after: after, want: want})
				}
				for _, t := range backWork {
					out = append(out, wrong{what: what, task: t, after: after, want: want})
				}
			}
		}
	}
	return out
}

var errKilled = errors.New("killed")

// trial is a move at which something goes wrong once.
type trial struct {
	t    *testing.T
	p    *hostPair
	w    wrong
	r    *remote
	d    *Driver
	done bool // it went wrong
	ends bool // a QEMU was ended
	back bool // the user has turned round
	turn context.CancelFunc

	dead   atomic.Bool // the viaduct here was killed
	served atomic.Bool // the viaduct there was killed
}

// happens does what goes wrong, while the source waits for its destination or, with idle, before it asks it.
func (x *trial) happens(idle bool) error {
	x.done = true
	switch x.w.what {
	case "kill":
		if idle {
			return errKilled
		}
		x.dead.Store(true)
		x.r.silence(true)
		x.r.cut()
	case "serve":
		if !idle {
			return errKilled
		}
		x.served.Store(true)
		x.r.cut()
		x.r.serve.Wait()
		x.served.Store(false)
	case "cut":
		x.r.cut()
	case "data":
		x.r.cutData()
	case "turn":
		x.turn()
	case "here":
		x.ends = true
		x.p.from.qemu.Kill()
	case "there":
		if q := x.p.there(); q != nil {
			x.ends = true
			q.Kill()
		}
	}
	return nil
}

func (x *trial) action(a Action) error {
	if x.dead.Load() {
		return errKilled
	}
	x.neverTwice(string(a), a == Resume)
	if x.w.after == a && !x.back {
		// Which is done still: the user turns round.
		x.back = true
		x.turn()
	}
	if !x.done && x.w.task == "" && x.w.action == a && (x.w.after == "" || x.back) {
		return x.happens(true)
	}
	return nil
}

func (x *trial) task(t Task) error {
	if x.served.Load() {
		return errKilled
	}
	if t == Go && x.d.vm != nil && x.d.vm.Ended() == nil {
		if status, _, err := x.d.vm.look(); err == nil && status == "running" {
			x.t.Errorf("%s: the guest is let go on there, and runs here", &x.w)
		}
	}
	if !x.done && x.w.task == t {
		return x.happens(false)
	}
	return nil
}

// neverTwice checks, before the guest goes on here, that it does not run there.
func (x *trial) neverTwice(what string, goesOn bool) {
	x.r.mu.Lock()
	s := x.r.last
	x.r.mu.Unlock()
	if !goesOn || s == nil || s.vm == nil || s.vm.Ended() != nil {
		return
	}
	if status, _, err := s.vm.look(); err == nil && status == "running" {
		x.t.Errorf("%s: %s, and it runs there", &x.w, what)
	}
}

// run drives the move once.
func (x *trial) run(record *Record, want Wants) error {
	ctx, cancel := context.WithCancel(x.t.Context())
	defer cancel()
	x.turn = cancel
	x.dead.Store(false)
	x.r.silence(false)
	x.d = x.p.driver(x.r, record, x.action)
	if x.w.action == Await || x.w.after == Await {
		// The copy is not over when it is waited for.
		x.d.Limits.Bandwidth = 1 << 18
	}
	err := x.d.Run(ctx, want)
	x.r.cut()
	x.r.serve.Wait()
	return err
}

// mend does what a user does until the move is over.
func (x *trial) mend() (tried []error) {
	for _, want := range []Wants{x.w.want, Forward, Back, TakeBack} {
		if x.p.from.record == nil {
			break
		}
		if want == TakeBack && !x.ends {
			break
		}
		record := *x.p.from.record
		tried = append(tried, fmt.Errorf("%s: %w", want, cmpErr(x.run(&record, want))))
	}
	if r := x.p.to.record; r != nil && x.p.from.record == nil {
		// The source could not tell the other host: its user does.
		s := &Server{House: destination{x.p}}
		if err := s.LetGo(x.t.Context(), r); err != nil && !errors.Is(err, ErrGoesOn) {
			tried = append(tried, fmt.Errorf("let go: %w", err))
		} else if err == nil {
			x.p.to.record = nil
		}
	}
	return tried
}

// some are n of all, by a seed that is told, or with VIADUCT_SWEEP=all all of them.
func some[T any](t *testing.T, all []T, n int) []T {
	t.Helper()
	if os.Getenv("VIADUCT_SWEEP") == "all" {
		return all
	}
	seed := rand.Uint64()
	t.Logf("%d points, of which %d are tried, by seed %d", len(all), n, seed)
	rand.New(rand.NewPCG(seed, 0)).Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all[:n]
}

func cmpErr(err error) error {
	if err == nil {
		return errors.New("done")
	}
	return err
}

// TestFaults: whatever goes wrong at whatever point of a move, the guest never runs twice, and a user mends it with
// --resume or --cancel: it is on one host then, with its device and its address, and nothing of it is on the other. A few
// points are tried, by a seed that is told, or with VIADUCT_SWEEP=all each of them.
func TestFaults(t *testing.T) {
	for _, w := range some(t, faults(), 8) {
		t.Run(w.String(), func(t *testing.T) {
			x := &trial{t: t, p: newPair(t), w: w}
			x.r = newRemote(x.p, x.task)
			record := x.p.record()
			x.p.from.save(record)
			err := x.run(record, Forward)
			tried := append([]error{cmpErr(err)}, x.mend()...)
			if x.p.from.record != nil {
				t.Fatalf("nobody can mend it: %+v, %+v: %v", x.p.from, x.p.to, errors.Join(tried...))
			}
			x.ended(t)
			if !x.done {
				t.Error("the move did not come to this point")
			}
			if all := errors.Join(tried...); errors.Is(all, context.DeadlineExceeded) {
				t.Errorf("who does not answer was waited for: %v", all)
			}
			if t.Failed() {
				t.Logf("what was tried: %v", errors.Join(tried...))
			}
		})
	}
}

// ended checks how it has ended.
func (x *trial) ended(t *testing.T) {
	here, there := running(t, x.p.from.qemu), running(t, x.p.there())
	switch {
	case here && there:
		t.Error("the guest runs twice")
	case here:
		if dead := x.p.to.record != nil && x.ends; dead {
			// It has ended there after it was taken: its lease is released as any other.
			x.p.to.lease, x.p.to.record = false, nil
		}
		x.p.here(t)
	case there:
		if x.p.to.record != nil && x.p.to.record.Phase == Arrived {
			x.p.to.record = nil
		}
		x.p.moved(t)
	case !x.ends:
		t.Error("the guest runs nowhere")
	}
}
