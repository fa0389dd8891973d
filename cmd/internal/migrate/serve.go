package migrate

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"viaduct/cmd/internal/vmm"
	"viaduct/vfio/holder"
)

// Guesthouse is what a move does on the destination beside QEMU: to leases, devices and what is written down.
type Guesthouse interface {
	// Facts are the host's, and which of the files that are asked for are there.
	Facts(ctx context.Context, w *FactsWish) (*FactsAnswer, error)
	// Record is what is written down of a guest's move; nil if nothing is.
	Record(guest string) (*Record, error)
	// Save writes a record down, durably.
	Save(r *Record) error
	// Drop forgets a record.
	Drop(guest string) error
	// Reserve keeps a device for the guest, without the guest's address. Asked again, it finishes what is there.
	Reserve(ctx context.Context, r *Record) error
	// Leased reports whether a device is kept for the guest.
	Leased(guest string) (bool, error)
	// Socket is where the guest's QEMU is going to speak its machine protocol.
	Socket(r *Record) string
	// Start starts the guest's QEMU, to wait for its memory, in a scope of its own, and returns when its socket is
	// there.
	// It fills in which process it is.
	Start(ctx context.Context, r *Record) error
	// End ends the guest's QEMU, however it is, and waits until it has gone.
	End(ctx context.Context, r *Record) error
	// Alive reports whether the guest's QEMU lives.
	Alive(r *Record) bool
	// Address, SetAddress and Device are as Home's.
	Address(guest string) (string, error)
	SetAddress(ctx context.Context, guest, mac string) error
	Device(r *Record) (map[string]any, error)
	// Stay makes the lease of a guest that has arrived one as any other.
	Stay(ctx context.Context, r *Record) error
	// Release gets the device back clean, and ends the lease; no error if there is none.
	Release(ctx context.Context, guest string) error
}

// Server is the destination's side of one conversation. The guest's lease is locked by who serves: no other
// conversation about the guest is held meanwhile.
type Server struct {
	House   Guesthouse
	Version string
	// Lock keeps other conversations from a guest; it is called once, with the first question about one.
	Lock func(ctx context.Context, guest string) error
	// Tell is told of each task before it is done; an error keeps it from being done, and ends the conversation. Nil
	// tells nobody.
	Tell func(Task) error

	guest string
	move  string
	vm    runner
	why   string // QEMU could not load what came
	times Times
	// libvirt is the one here; "" is the system's.
	libvirt libvirt
}

// errStop ends a conversation.
var errStop = errors.New("the conversation ends here")

// Serve holds a conversation until the source ends it, and then lets go of what nobody waits for.
func (s *Server) Serve(ctx context.Context, r io.Reader, w io.Writer) error {
	defer s.close()
	l := newLine(r, w)
	if err := l.greet(s.Version); err != nil {
		return err
	}
	for {
		var q Question
		err := l.read(&q)
		if errors.Is(err, io.EOF) {
			return s.abandoned(ctx)
		}
		if err != nil {
			return errors.Join(err, s.abandoned(ctx))
		}
		a, err := s.answer(ctx, &q)
		if err != nil {
			return err
		}
		if err := l.write(a); err != nil {
			return errors.Join(err, s.abandoned(ctx))
		}
	}
}

func (s *Server) close() {
	if s.vm != nil {
		_ = s.vm.Close()
	}
}

// answer answers a question; an error ends the conversation.
func (s *Server) answer(ctx context.Context, q *Question) (*Answer, error) {
	a := &Answer{Number: q.Number}
	body, err := s.do(ctx, q, a)
	if errors.Is(err, errStop) {
		return nil, err
	}
	if err != nil {
		a.Error = strings.ToValidUTF8(err.Error(), "?")
		a.Refused = errors.Is(err, holder.ErrRefused)
	}
	if body != nil {
		if a.Body, err = json.Marshal(body); err != nil {
			return nil, err
		}
	}
	return a, nil
}

func (s *Server) do(ctx context.Context, q *Question, a *Answer) (body any, err error) {
	if err := q.check(); err != nil {
		return nil, err
	}
	switch q.Do {
	case askClock:
		return &Times{Now: time.Now()}, nil
	case askFacts:
		var w FactsWish
		if err := json.Unmarshal(q.Body, &w); err != nil {
			return nil, fmt.Errorf("the question: %w", err)
		}
		return s.House.Facts(ctx, &w)
	}

	if err := s.own(ctx, q); err != nil {
		return nil, err
	}
	r, v, err := s.look(ctx, q)
	if err != nil {
		return nil, err
	}
	if q.Do == askLook {
		a.Peer, a.Why = v.Peer(), s.why
		return nil, nil
	}
	ask, known := actionOf(q.Do)
	if !known {
		return nil, fmt.Errorf("this viaduct does not know the question %q", q.Do)
	}
	tasks, err := v.Tasks(ask)
	if err != nil {
		return nil, err
	}
	if ask == AskReserve {
		if err := json.Unmarshal(q.Body, &r.Order); err != nil {
			return nil, fmt.Errorf("the order: %w", err)
		}
		if err := r.Order.check(); err != nil {
			return nil, err
		}
	}
	if err := s.work(ctx, r, tasks); err != nil {
		return nil, err
	}
	s.times.Now = time.Now()
	return &s.times, nil
}

// own keeps a conversation to one guest and one move.
func (s *Server) own(ctx context.Context, q *Question) error {
	if s.guest != "" && (s.guest != q.Guest || s.move != q.Move) {
		return fmt.Errorf("this conversation is about %s", s.guest)
	}
	if s.guest == "" && s.Lock != nil {
		if err := s.Lock(ctx, q.Guest); err != nil {
			return err
		}
	}
	s.guest, s.move = q.Guest, q.Move
	return nil
}

// look sees how everything is. The record of another move of the guest is none of this one.
func (s *Server) look(ctx context.Context, q *Question) (*Record, *DestinationView, error) {
	r, err := s.House.Record(q.Guest)
	if err != nil {
		return nil, nil, err
	}
	if r != nil && r.ID != q.Move {
		if r.Source || r.Phase != Refused && r.Phase != Arrived {
			return nil, nil, fmt.Errorf("another move of %s is not over here: viaduct migrate %s --cancel, or "+
				"--resume", q.Guest,
				q.Guest)
		}
		r = nil
	}
	if r == nil {
		r = &Record{ID: q.Move, Guest: q.Guest, Began: time.Now()}
		return r, &DestinationView{Guest: Gone}, nil
	}
	v, err := s.view(ctx, r)
	return r, v, err
}

func (s *Server) view(ctx context.Context, r *Record) (*DestinationView, error) {
	v := &DestinationView{Way: r.Order.Way, Libvirt: r.Order.libvirt(), Phase: r.Phase, Guest: Gone}
	var err error
	if v.Leased, err = s.House.Leased(r.Guest); err != nil {
		return nil, err
	}
	if v.Leased && r.Order.Address != "" {
		now, err := s.House.Address(r.Guest)
		if err != nil {
			return nil, err
		}
		v.Address = now == r.Order.Address
	}
	if v.Libvirt {
		return v, s.viewDomain(ctx, r, v)
	}
	if r.Socket == "" {
		return v, nil
	}

	if s.vm == nil || s.vm.Ended() != nil {
		s.vm = nil
		m, err := reach(ctx, r.Socket, func() bool { return s.House.Alive(r) })
		if err != nil || m == nil {
			return v, err
		}
		s.vm = m
	}
	status, p, err := s.vm.look()
	if err != nil {
		return nil, err
	}
	v.Guest, v.Loaded = runsAs(status), copied(p.Status) == Completed
	if copied(p.Status) == Failed {
		// It has nothing of the guest, and never will.
		v.Guest, s.why = Gone, p.Why
	}
	v.Plugged, err = s.vm.has(vmm.PrimaryID)
	return v, err
}

// viewDomain is view of a guest of libvirt's, which begins to be here when it comes.
func (s *Server) viewDomain(ctx context.Context, r *Record, v *DestinationView) error {
	m := &domain{libvirt: cmp.Or(s.libvirt, libvirtHere), name: r.Guest}
	if v.Leased {
		args, err := s.House.Device(r)
		if err != nil {
			return err
		}
		m.host, _ = args["host"].(string)
	}
	s.vm = m
	status, _, err := m.look()
	comes := v.Phase == Waiting || v.Phase == Loading
	switch {
	case err != nil:
		return err
	case status == "running" && comes:
		v.Guest, v.Loaded = Paused, true
	case status == "running":
		v.Guest = Running
	case comes:
		v.Guest = Awaits
	case status != "":
		v.Guest = Paused
	}
	v.Plugged, err = m.has(vmm.PrimaryID)
	return err
}

// work does tasks in their order.
func (s *Server) work(ctx context.Context, r *Record, tasks []Task) error {
	for _, t := range tasks {
		if s.Tell != nil {
			if err := s.Tell(t); err != nil {
				return errors.Join(errStop, err)
			}
		}
		if err := s.task(ctx, r, t); err != nil {
			return fmt.Errorf("%s: %w", t, err)
		}
	}
	return nil
}

func (s *Server) task(ctx context.Context, r *Record, t Task) (err error) {
	needs := []Task{Load, Go, PlugHere}
	if slices.Contains(needs, t) && s.vm == nil {
		return errors.New("the guest's QEMU has ended")
	}

	switch t {
	case NoteReserved, NoteWaiting, NoteLoading, NoteMine, NoteArrived, NoteRefused:
		r.Phase = Phase(t[len("note "):])
		if t == NoteWaiting {
			// Before it is started: whatever happens then, it is found.
			r.Socket = s.House.Socket(r)
		}
		return s.House.Save(r)
	case Forget:
		return s.House.Drop(r.Guest)
	case Reserve:
		return s.House.Reserve(ctx, r)
	case Start:
		return s.start(ctx, r)
	case Load:
		if m, is := s.vm.(*machine); is && r.Order.Way == ByVFIO {
			if err := m.able(switchoverAck); err != nil {
				return err
			}
		}
		return s.vm.load(dataSocket(r))
	case Go:
		s.times.Resumed, err = s.vm.goOn(ctx)
		if m, is := s.vm.(*domain); is && err == nil {
			s.times.Downtime, err = m.downtime(ctx)
		}
		return err
	case GiveAddress:
		return s.House.SetAddress(ctx, r.Guest, r.Order.Address)
	case PlugHere:
		return s.plug(ctx, r)
	case EndQEMU:
		return s.end(ctx, r)
	case Release:
		return s.House.Release(ctx, r.Guest)
	}

	return fmt.Errorf("unknown task %q", t)
}

// start starts QEMU, and writes down how it is reached.
func (s *Server) start(ctx context.Context, r *Record) error {
	if !r.Order.libvirt() && r.Socket != "" && s.House.Alive(r) {
		return nil
	}
	if err := s.House.Start(ctx, r); err != nil {
		return err
	}
	return s.House.Save(r)
}

// plug gives the guest its device, and makes the lease one as any other.
func (s *Server) plug(ctx context.Context, r *Record) error {
	args, err := s.House.Device(r)
	if err != nil {
		return err
	}
	if err := s.vm.plug(ctx, vmm.PrimaryID, args); err != nil {
		return err
	}
	s.times.Plugged = time.Now()
	if err := s.vm.announce(); err != nil {
		return err
	}
	return s.House.Stay(ctx, r)
}

// end ends QEMU, by its own protocol, or else as a process.
func (s *Server) end(ctx context.Context, r *Record) error {
	if s.vm != nil {
		_ = s.vm.quit(ctx)
		s.vm = nil
	}
	return s.House.End(ctx, r)
}

// abandoned is what is done when the source is gone from the other end.
func (s *Server) abandoned(ctx context.Context) error {
	if s.guest == "" {
		return nil
	}
	ctx = context.WithoutCancel(ctx)
	r, v, err := s.look(ctx, &Question{Guest: s.guest, Move: s.move})
	if err != nil {
		return err
	}
	return s.work(ctx, r, v.Abandoned())
}

// LetGo is Abandoned for a user on the destination, who ends a move that never arrived, whatever of it is there.
func (s *Server) LetGo(ctx context.Context, r *Record) error {
	defer s.close()
	v, err := s.view(ctx, r)
	if err != nil {
		return err
	}
	if !v.MayRefuse() {
		return fmt.Errorf("%s is this host's by now: %w", r.Guest, ErrGoesOn)
	}
	return s.work(ctx, r, []Task{NoteRefused, EndQEMU, Release})
}

// Finish is for a user on the destination: it gives a guest that is its own by now its device, if the source did not
// come
// to that.
func (s *Server) Finish(ctx context.Context, r *Record) error {
	defer s.close()
	v, err := s.view(ctx, r)
	if err != nil {
		return err
	}
	switch v.Peer() {
	case PeerMine, PeerArrived:
		tasks, err := v.Tasks(AskArrive)
		if err != nil {
			return err
		}
		return s.work(ctx, r, tasks)
	}
	return fmt.Errorf("%s is %s here: the host that it comes from knows what comes next (viaduct migrate %s "+
		"--resume there)", r.Guest, v.Peer(), r.Guest)
}

// dataSocket is where QEMU waits for a guest's memory.
func dataSocket(r *Record) string { return r.Socket + "." + r.ID[:8] }

// DataSocket is where the memory of a move is to be sent, by its id; an error if no guest is waited for under it.
func DataSocket(r *Record, id string) (string, error) {
	if checkID(id) != nil || r == nil || r.ID != id || r.Source || r.Socket == "" || r.Phase != Loading {
		return "", errors.New("nothing is waited for under this id")
	}
	return dataSocket(r), nil
}
