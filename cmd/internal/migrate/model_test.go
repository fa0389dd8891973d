package migrate

import (
	"errors"
	"fmt"
	"testing"
)

// world is both hosts, and the viaducts at work on them. All that can happen to it is tried from each state that can be
// reached.
type world struct {
	way     Way
	libvirt bool

	// The source: what is written down, its QEMU, the device.
	phase                   Phase
	guest                   Runs
	copy                    Copy
	plugged, asked, address bool
	unplug                  bool // QEMU has asked the guest, which has not answered so far
	lease                   bool
	record                  bool
	want                    Wants
	driver                  bool   // a viaduct drives the move
	waits                   Action // for this, of its own QEMU
	there                   end
	kills, deaths, breaks   int  // that happened so far
	fenced, forced          bool // the other host is off for good; the user has said so
}

// end is the destination.
type end struct {
	phase            Phase
	guest            Runs
	loaded           bool
	address, plugged bool
	lease            bool
	took             bool    // its QEMU has let the guest go on, at some time
	tasks            [4]Task // that are still to be done of what it was asked
	open             bool    // the pipe is open
}

func (e *end) busy() bool { return e.tasks[0] != "" }

func (w *world) view() *SourceView {
	v := &SourceView{Way: w.way, Libvirt: w.libvirt, Phase: w.phase, Guest: w.guest, Copy: w.copy, Plugged: w.plugged,
		UnplugAsked: w.asked,
		Address:     w.address, Peer: PeerUnreachable}
	if w.there.open && !w.fenced && !w.there.busy() {
		v.Peer = w.viewThere().Peer()
	}
	return v
}

func (w *world) viewThere() *DestinationView {
	e := &w.there
	v := &DestinationView{Way: w.way, Libvirt: w.libvirt, Phase: e.phase, Leased: e.lease, Guest: e.guest,
		Loaded:  e.loaded,
		Address: e.address, Plugged: e.plugged}
	if comes := e.phase == Waiting || e.phase == Loading; w.libvirt && comes {
		// As Server.viewDomain has it.
		v.Guest, v.Loaded = Awaits, e.guest == Running
		if v.Loaded {
			v.Guest = Paused
		}
	}
	return v
}

// work does the next thing of the destination's tasks.
func (w *world) work() {
	e := &w.there
	task := e.tasks[0]
	copy(e.tasks[:], e.tasks[1:])
	e.tasks[len(e.tasks)-1] = ""
	switch task {
	case NoteReserved, NoteWaiting, NoteLoading, NoteMine, NoteArrived, NoteRefused:
		e.phase = Phase(task[len("note "):])
	case Forget:
		e.phase = ""
	case Reserve:
		e.lease = true
	case Start:
		if e.guest == Gone && !w.libvirt {
			e.guest = Awaits
		}
	case Load:
	case Go:
		if e.guest == Gone {
			// It fails, and nothing more is done.
			e.tasks = [4]Task{}
		}
		if e.guest == Paused {
			e.guest, e.took = Running, true
		}
	case GiveAddress:
		e.address = true
	case PlugHere:
		e.plugged = e.guest != Gone
	case EndQEMU:
		w.endThere()
	case Release:
		e.lease, e.address = false, false
	}
}

// endThere ends the destination's QEMU, and a copy to it.
func (w *world) endThere() {
	w.there.guest, w.there.plugged, w.there.loaded = Gone, false, false
	if w.copy == Underway {
		w.copy = Failed
	}
}

// act does what the source decided.
func (w *world) act(a Action) error {
	switch a {
	case RecordUnplugging:
		w.phase, w.asked = Unplugging, w.way != ByVFIO
	case RecordCopying:
		w.phase, w.asked = Copying, false
	case RecordCommitted:
		w.phase = Committed
	case RecordQuitting:
		w.phase = Quitting
	case RecordReturning:
		w.phase = Returning
	case AskReserve, AskStart, AskLoad, AskTake, AskArrive, AskRefuse, AskGiveUp, AskForget:
		tasks, err := w.viewThere().Tasks(a)
		if err != nil {
			return err
		}
		copy(w.there.tasks[:], tasks)
	case Unplug:
		w.unplug, w.waits = true, a
	case Park:
		w.address = false
	case Unpark:
		w.address = true
	case Send:
		w.copy = Underway
	case Await, Cancel:
		w.waits = a
	case Resume:
		w.guest, w.copy = Running, NoCopy
	case Plug:
		w.plugged, w.asked = true, false
	case Quit:
		w.guest = Gone
	case End:
		if w.lease {
			w.lease, w.address = false, false
			return nil
		}
		w.record, w.driver = false, false
	case Keep, Lose:
		w.record, w.driver = false, false
	}

	return nil
}

// settled reports whether what the driver waits for has come.
func (w *world) settled() bool {
	switch w.waits {
	case Unplug:
		return !w.plugged || w.guest == Gone
	case Await, Cancel:
		return w.copy != Underway
	}
	return true
}

// alone are the worlds that this one may become by what the QEMUs do by themselves.
func (w world) alone() (out []world) {
	if w.unplug && w.guest == Running {
		n := w
		n.unplug, n.plugged = false, false
		out = append(out, n)
	}
	if w.libvirt {
		return append(out, w.byLibvirt()...)
	}
	if w.copy == Underway && w.there.guest == Awaits && w.guest == Running {
		n := w
		n.copy, n.guest, n.there.guest, n.there.loaded = Completed, Paused, Paused, true
		out = append(out, n)
	}
	if w.copy == Underway && (w.waits == Cancel || w.there.guest != Awaits) {
		n := w
		n.copy = Failed
		if n.there.guest == Awaits {
			n.there.guest = Gone // whose stream broke off
		}
		out = append(out, n)
	}
	return out
}

// byLibvirt is how a copy of libvirt's may end: the guest runs there, and is gone here or, where that was not heard,
// stands still; it goes on here, which a viaduct that was started later does not know the reason of; or nobody heard of
// the end, and it runs nowhere.
func (w world) byLibvirt() (out []world) {
	if w.copy != Underway {
		return nil
	}
	add := func(here, there Runs, c Copy) {
		n := w
		n.guest, n.copy, n.there.guest = here, c, there
		n.there.took = n.there.took || there == Running
		out = append(out, n)
	}
	if w.guest == Running && !w.fenced && w.there.lease {
		add(Gone, Running, NoCopy)
		add(Paused, Running, NoCopy)
	}
	add(w.guest, w.there.guest, Failed)
	add(w.guest, w.there.guest, NoCopy)
	if w.guest == Running {
		add(Paused, w.there.guest, NoCopy)
	}
	return out
}

// step is one step of who works; false if nobody can.
func (w world) step() (out world, ok bool, err error) {
	switch {
	case w.there.busy():
		w.work()
	case !w.driver || !w.record:
		return w, false, nil
	case !w.settled():
		return w, false, nil
	default:
		w.waits = ""
		a, err := w.view().Next(w.want)
		w.forced = w.forced || w.want == TakeBack
		if err != nil || a == Done {
			w.driver = false
			return w, true, err
		}
		if err := w.act(a); err != nil {
			return w, true, fmt.Errorf("%s: %w", a, err)
		}
	}
	return w, true, nil
}

// faults are what may go wrong, a little of each in one life.
func (w world) faults() (out []world) {
	add := func(change func(*world)) {
		n := w
		change(&n)
		out = append(out, n)
	}

	if w.driver && w.kills < 2 {
		// The viaduct here is killed; the one there does what it was asked, or not; and what it does when it is alone.
		add(func(n *world) { n.kills++; n.driver, n.waits, n.there.open = false, "", false })
		if w.there.busy() {
			add(func(n *world) {
				n.kills++
				n.driver, n.waits, n.there.open, n.there.tasks = false, "", false, [4]Task{}
			})
		}
		if !w.there.busy() {
			add(func(n *world) {
				n.kills++
				n.driver, n.waits, n.there.open = false, "", false
				copy(n.there.tasks[:], n.viewThere().Abandoned())
			})
		}
		// The one there is killed, or the pipe breaks.
		add(func(n *world) { n.kills++; n.there.open, n.there.tasks = false, [4]Task{} })
		// The user turns round.
		add(func(n *world) { n.kills++; n.want = Back })
	}

	if w.deaths < 1 && w.guest != Gone {
		add(func(n *world) {
			n.deaths++
			n.guest, n.plugged, n.unplug = Gone, false, false
			if n.copy == Underway {
				n.copy = Failed
				if n.there.guest == Awaits {
					n.there.guest = Gone
				}
			}
		})
	}

	if w.deaths < 1 && w.there.guest != Gone {
		add(func(n *world) { n.deaths++; n.endThere() })
	}

	if !w.fenced && w.breaks < 1 {
		// The other host is off for good.
		add(func(n *world) {
			n.breaks++
			n.fenced = true
			n.endThere()
			n.there.tasks = [4]Task{}
		})
	}

	if !w.driver && w.record {
		for _, want := range []Wants{Forward, Back} {
			add(func(n *world) { n.driver, n.want, n.there.open = true, want, true })
		}
		if w.fenced {
			add(func(n *world) { n.driver, n.want = true, TakeBack })
		}
	}

	return out
}

// wrong is what must never be.
func (w *world) wrong() string {
	e := &w.there
	switch {
	case w.guest == Running && e.guest == Running:
		return "the guest runs twice"
	case w.guest == Running && e.took && !w.forced && w.want != TakeBack:
		return "the guest goes on here after it has run there"
	case w.address && e.address && !w.fenced:
		return "both devices carry the guest's address"
	case w.guest != Gone && !w.lease:
		return "the guest is here without a lease"
	case e.guest != Gone && !e.lease && !e.busy():
		return "the guest is there without a lease"
	case e.lease && e.phase == "" && !e.took && !e.busy():
		return "the device there is reserved, and nobody knows for what"
	case w.lease && !w.record && w.guest == Running && (!w.address || !w.plugged):
		return "the guest is kept here without its device"
	}
	return ""
}

// mended follows a world in which nothing more goes wrong, with what a user does: go on, or back, or on the word that
// the other host is off; and says how it ends.
func mended(w world) error {
	var tried []error
	for _, want := range []Wants{Forward, Back, TakeBack} {
		if !w.record {
			break
		}
		if want == TakeBack && !w.fenced {
			ended := w.there.phase == Mine || w.there.phase == Arrived || w.libvirt && w.guest != Running
			if w.there.guest != Gone || !ended {
				break
			}
			// It ended there after it took the guest, or libvirt does not know: only a user can say what is to be done.
		}
		w.driver, w.want, w.there.open, w.waits = true, want, true, ""
		for n := 0; w.driver; n++ {
			next, ok, err := w.step()
			if err != nil {
				tried = append(tried, err)
			}
			if !ok {
				// It waits for what the QEMUs do.
				all := w.alone()
				if len(all) == 0 {
					return fmt.Errorf("it waits for %s for ever", w.waits)
				}
				next = all[0]
			}
			if w = next; n > 100 {
				return errors.New("it never ends")
			}
			if why := w.wrong(); why != "" {
				return errors.New(why)
			}
		}
	}

	if v := w.viewThere(); !w.record && !w.fenced && v.MayRefuse() {
		// The source could not tell it: who looks at the leases there does, or its time ends.
		tasks, err := v.Tasks(AskRefuse)
		if err != nil {
			return err
		}
		copy(w.there.tasks[:], tasks)
	}

	for w.there.busy() {
		w.work()
	}

	here := w.guest == Running && w.lease && w.address && w.plugged
	there := w.there.guest == Running && w.there.lease && w.there.address && w.there.plugged
	if w.way == ByVFIO {
		here, there = w.guest == Running && w.lease, w.there.guest == Running && w.there.lease
	}

	// The lease of a guest that has ended there, which is released as any other.
	dead := w.there.guest == Gone && (w.there.phase == Mine || w.there.phase == Arrived)
	switch {
	case w.record:
		return fmt.Errorf("nobody can mend it: %w", errors.Join(tried...))
	case here == there && w.deaths == 0 && !w.fenced:
		return errors.New("it runs nowhere")
	case here && !w.fenced && (w.there.lease && !dead || w.there.guest != Gone):
		return errors.New("something of it is left there")
	case there && (w.lease || w.guest != Gone):
		return errors.New("something of it is left here")
	}

	return nil
}

// Every order of steps, kills, turns and ends of both QEMUs: never is the guest there twice, or nowhere where nobody
// could mend it, and no device is lost.
func TestModel(t *testing.T) {
	for _, kind := range []world{{way: ByFailover}, {way: ByReplug}, {way: ByVFIO}, {way: ByFailover, libvirt: true}} {
		name := fmt.Sprintf("%s, of libvirt: %v", kind.way, kind.libvirt)
		first := world{way: kind.way, libvirt: kind.libvirt, phase: Checked, guest: Running, plugged: true,
			address: true,
			lease:   true, record: true, want: Forward, driver: true, there: end{guest: Gone, open: true}}
		seen := map[world]world{first: {}}
		for todo := []world{first}; len(todo) > 0; {
			w := todo[0]
			todo = todo[1:]
			if why := w.wrong(); why != "" {
				tell(t, seen, w)
				t.Fatalf("%s: %s", name, why)
			}
			if err := mended(w); err != nil {
				tell(t, seen, w)
				t.Fatalf("%s: %v", name, err)
			}
			next := append(w.alone(), w.faults()...)
			if n, ok, _ := w.step(); ok {
				next = append(next, n)
			}
			for _, n := range next {
				if _, known := seen[n]; !known {
					seen[n] = w
					todo = append(todo, n)
				}
			}
		}

		t.Logf("%s: %d states", name, len(seen))
		if len(seen) < 500 {
			t.Errorf("%s: only %d states", name, len(seen))
		}
	}
}

// tell logs how a world came to be.
func tell(t *testing.T, seen map[world]world, w world) {
	t.Helper()
	for n := 0; w.record || n == 0; n++ {
		t.Logf("%+v", w)
		var known bool
		if w, known = seen[w]; !known {
			return
		}
	}
}
