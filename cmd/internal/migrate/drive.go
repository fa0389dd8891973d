package migrate

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"viaduct/cmd/internal/lease"
	"viaduct/cmd/internal/vmm"
)

// Home is what a move does on the source beside QEMU: to leases, devices and what is written down.
type Home interface {
	// Save writes a record down, durably; the lease says from then on that its guest leaves.
	Save(ctx context.Context, r *Record) error
	// Drop forgets the record of a move that is over; with stays the lease is as it was before.
	Drop(ctx context.Context, r *Record, stays bool) error
	// Address is the MAC address that the guest's device has.
	Address(guest string) (string, error)
	// SetAddress gives the device the guest's address, or with "" one that is no guest's. What the bridge has to know
	// of it, it is told.
	SetAddress(ctx context.Context, guest, mac string) error
	// Device are QEMU's words for the guest's device, as device_add takes them.
	Device(r *Record) (map[string]any, error)
	// Release gets the device back clean, and ends the lease; no error if there is none.
	Release(ctx context.Context, guest string) error
	// Alive reports whether the process that has the guest lives, as far as it is known.
	Alive(r *Record) bool
}

// Limits are what a move may take.
type Limits struct {
	Downtime  time.Duration // QEMU's own aim; 0: what QEMU has
	Bandwidth uint64        // bytes a second; 0: none
	Unplug    time.Duration // how long the guest may take to let go of its device
	Whole     time.Duration // how long the copy may take; 0: for ever
}

// Driver drives a move from the source.
type Driver struct {
	Home   Home
	Remote Remote
	Record *Record
	Limits Limits
	// Tell is told of each action before it is done; an error keeps it from being done. Nil tells nobody.
	Tell func(Action) error
	// Progress is told how much memory is still to be sent.
	Progress func(done, total uint64)
	Outcome  Outcome

	vm    runner
	pipe  *Pipe
	relay *relay
	sent  *sending // libvirt's way of sending a guest
	// libvirt is the one here; "" is the system's.
	libvirt libvirt
	copied  progress
	// loading is why the destination's QEMU could not load what came.
	loading string
}

// Outcome is what a move took, as far as this run saw it. What is not known is zero.
type Outcome struct {
	Moved    bool      `json:"moved"`
	Unplug   time.Time `json:"unplugged,omitzero"` // by the source's clock
	Stopped  time.Time `json:"stopped,omitzero"`   // by the source's clock
	Resumed  time.Time `json:"resumed,omitzero"`   // by the destination's clock
	Plugged  time.Time `json:"plugged,omitzero"`   // by the destination's clock
	Clock    Clock     `json:"clock"`
	Downtime *int      `json:"qemu_downtime_ms"` // as QEMU tells it
	Memory   uint64    `json:"bytes_sent"`
	Device   uint64    `json:"device_bytes"` // of that, the state of devices
	Probed   *Probed   `json:"probed"`       // by who asked the guest meanwhile; nil: nobody
}

// Clock is by how much the destination's clock is ahead of the source's, and by how much that may be wrong.
type Clock struct {
	Ahead time.Duration `json:"ahead"`
	Error time.Duration `json:"error"`
	Known bool          `json:"known"`
}

// NewID is the id of a new move, which nobody can guess: who knows it may send the guest's memory.
func NewID() string {
	b := make([]byte, 16)
	// It never fails (crypto/rand).
	_, _ = rand.Read(b)
	return hex.EncodeToString(b)
}

// Run does what is wanted of the move, step by step, until it is over. When a step fails on the way forward, it goes
// back; the error says why. What could not be mended stays written down, for another run.
func (d *Driver) Run(ctx context.Context, want Wants) error {
	defer d.close()
	var failed []error
	turn := func(why error) {
		failed = append(failed, why)
		if want == Forward {
			want = Back
		}
	}

	backs := 0
	for {
		if ctx.Err() != nil {
			// A first signal turns it round; what goes back is not given up.
			turn(fmt.Errorf("interrupted: %w", context.Cause(ctx)))
			ctx = context.WithoutCancel(ctx)
		}
		v, err := d.look(ctx)
		if err != nil {
			return errors.Join(append(failed, err)...)
		}
		a, err := v.Next(want)
		if err != nil {
			return errors.Join(append(failed, err)...)
		}
		if a == RecordReturning && len(failed) == 0 && want == Forward {
			failed = append(failed, d.why(v))
		}
		if d.Tell != nil {
			if err := d.Tell(a); err != nil {
				return errors.Join(append(failed, err)...)
			}
		}
		over, err := d.act(ctx, a)
		if over && err == nil {
			return errors.Join(failed...)
		}
		if err != nil {
			if back := want != Forward || d.Record.Phase == Returning || d.Record.Phase == Quitting; back {
				backs++
			}
			turn(fmt.Errorf("%s: %w", a, err))
			if backs > 1 {
				return errors.Join(failed...)
			}
		}
	}
}

// why says what turned a move round that nobody turned.
func (d *Driver) why(v *SourceView) error {
	switch {
	case v.Guest == Gone:
		return errors.New("the guest's QEMU has ended")
	case d.loading != "":
		return fmt.Errorf("the destination's QEMU could not load the guest: %s", d.loading)
	case v.Copy == Failed && d.copied.Why != "":
		return fmt.Errorf("QEMU could not send the guest: %s", d.copied.Why)
	case v.Copy == Failed:
		return errors.New("QEMU could not send the guest")
	}
	return fmt.Errorf("the destination is %s", v.Peer)
}

func (d *Driver) close() {
	if d.vm != nil {
		_ = d.vm.Close()
	}
	if d.relay != nil {
		d.relay.close()
	}
	if d.sent != nil {
		d.sent.close()
	}
	if d.pipe != nil {
		d.pipe.Close()
	}
}

// look sees how everything is.
func (d *Driver) look(ctx context.Context) (*SourceView, error) {
	r := d.Record
	v := &SourceView{
		Way: r.Order.Way, Libvirt: r.Order.libvirt(), Phase: r.Phase, UnplugAsked: r.UnplugAsked, Guest: Gone,
		Peer: PeerUnreachable,
	}
	if err := d.connect(ctx); err != nil {
		return nil, err
	}

	if d.vm != nil {
		status, p, err := d.vm.look()
		if err != nil {
			return nil, err
		}
		d.copied = p
		v.Guest, v.Copy = runsAs(status), copied(p.Status)
		if stale := !r.Sent || v.Guest == Running && v.Copy == Completed; stale && v.Copy != Underway {
			// Of the move that brought it here, or of one that was taken back.
			v.Copy = NoCopy
		}
		if v.Plugged, err = d.vm.has(d.device()); err != nil {
			return nil, err
		}
	}

	if r.Order.Address != "" {
		now, err := d.Home.Address(r.Guest)
		if err != nil && v.Guest != Gone {
			return nil, err
		}
		v.Address = now == r.Order.Address
	} else {
		// It has none that could be taken off; it is as if it were always so.
		v.Address = v.Plugged || r.Phase == Returning
	}

	if a, err := d.ask(ctx, askLook, nil, nil); err == nil {
		v.Peer, d.loading = a.Peer, a.Why
	}

	return v, nil
}

// connect sees that QEMU is there, or has ended: then d.vm is nil.
func (d *Driver) connect(ctx context.Context) (err error) {
	if d.vm != nil && d.vm.Ended() == nil {
		return nil
	}
	if d.Record.Order.libvirt() {
		return d.connectDomain(ctx)
	}
	d.vm = nil
	m, err := reach(ctx, d.Record.Socket, func() bool { return d.Home.Alive(d.Record) })
	if m != nil {
		d.vm = m
	}
	return err
}

// connectDomain is connect of a guest of libvirt's.
func (d *Driver) connectDomain(ctx context.Context) error {
	m := &domain{libvirt: cmp.Or(d.libvirt, libvirtHere), name: d.Record.Guest, sent: d.sent}
	args, err := d.Home.Device(d.Record)
	if err == nil {
		m.host, _ = args["host"].(string)
	} else if _, none := errors.AsType[*lease.NoLeaseError](err); !none {
		return err
	}
	d.vm = nil
	there, err := m.there(ctx)
	if there {
		d.vm = m
	}
	return err
}

// device is the name of the guest's device that moves.
func (d *Driver) device() string { return vmm.PrimaryID }

// ask asks the destination; one that does not answer is asked over a new pipe, once.
func (d *Driver) ask(ctx context.Context, do string, body, out any) (a *Answer, err error) {
	for range 2 {
		if d.pipe == nil {
			if d.pipe, err = d.Remote.Connect(ctx); err != nil {
				return nil, err
			}
		}
		a, err = d.pipe.Ask(ctx, &Question{Do: do, Move: d.Record.ID, Guest: d.Record.Guest}, body, out)
		if err == nil || a != nil {
			return a, err
		}
		d.pipe.Close()
		d.pipe = nil
	}
	return nil, err
}

// note writes a phase down.
func (d *Driver) note(ctx context.Context, p Phase) error {
	next := *d.Record
	next.Phase = p
	switch {
	case p == Unplugging && next.Order.Way != ByVFIO:
		next.UnplugAsked = true
	case p == Copying:
		next.UnplugAsked = false
	}
	if err := d.Home.Save(ctx, &next); err != nil {
		return err
	}
	*d.Record = next
	return nil
}

// act does one action; over reports whether it was the last.
func (d *Driver) act(ctx context.Context, a Action) (over bool, err error) {
	r := d.Record
	switch a {
	case RecordUnplugging, RecordCopying, RecordCommitted, RecordQuitting, RecordReturning:
		return false, d.note(ctx, Phase(a[len("record "):]))
	case Unplug:
		at, err := d.vm.unplug(ctx, d.device(), d.Limits.Unplug)
		d.Outcome.Unplug = at
		return false, err
	case Park:
		if err := d.Home.SetAddress(ctx, r.Guest, ""); err != nil {
			return false, err
		}
		return false, d.vm.announce()
	case Unpark:
		return false, d.Home.SetAddress(ctx, r.Guest, r.Order.Address)
	case Plug:
		return false, d.plug(ctx)
	case Send:
		return false, d.send(ctx)
	case Await:
		return false, d.await(ctx)
	case Cancel:
		if err := d.vm.cancel(); err != nil {
			return false, err
		}
		// QEMU that had hardly begun may wait for the other side until the way to it is closed, and answers nobody
		// meanwhile.
		if d.relay != nil {
			d.relay.close()
		}
		_, err := d.vm.settled(ctx, nil)
		return false, err
	case Resume:
		_, err := d.vm.goOn(ctx)
		return false, err
	case Quit:
		return false, d.vm.quit(ctx)
	case End:
		if err := d.Home.Release(ctx, r.Guest); err != nil {
			return false, err
		}
		d.Outcome.Moved = true
		return true, d.Home.Drop(ctx, r, false)
	case Keep, Lose:
		return true, d.Home.Drop(ctx, r, true)
	}

	return false, d.request(ctx, a)
}

// plug gives the guest its device again.
func (d *Driver) plug(ctx context.Context) error {
	args, err := d.Home.Device(d.Record)
	if err != nil {
		return err
	}
	if err := d.vm.plug(ctx, d.device(), args); err != nil {
		return err
	}
	next := *d.Record
	next.UnplugAsked = false
	if err := d.Home.Save(ctx, &next); err != nil {
		return err
	}
	*d.Record = next
	return d.vm.announce()
}

// request asks the destination for a step of the move.
func (d *Driver) request(ctx context.Context, a Action) error {
	var body any
	if a == AskReserve {
		body = d.Record.Order
	}
	var t Times
	_, err := d.ask(ctx, names[a], body, &t)
	if err != nil {
		return err
	}
	if !t.Resumed.IsZero() {
		d.Outcome.Resumed = t.Resumed
	}
	if !t.Plugged.IsZero() {
		d.Outcome.Plugged = t.Plugged
	}
	if t.Downtime != nil {
		d.Outcome.Downtime = t.Downtime
	}
	return nil
}

// send begins the copy, over a second run of the transport.
func (d *Driver) send(ctx context.Context) (err error) {
	d.clock(ctx)
	limits := map[string]any{}
	if d.Limits.Downtime > 0 {
		limits["downtime-limit"] = d.Limits.Downtime.Milliseconds()
	}
	if d.Limits.Bandwidth > 0 {
		limits["max-bandwidth"] = d.Limits.Bandwidth
	}

	next := *d.Record
	next.Sent = true
	if err := d.Home.Save(ctx, &next); err != nil {
		return err
	}

	*d.Record = next
	if m, is := d.vm.(*domain); is {
		d.sent, err = m.send(ctx, next.URI, d.Limits.Bandwidth)
		return err
	}

	vm := d.vm.(*machine)
	if next.Order.Way == ByVFIO {
		if err := vm.able(switchoverAck); err != nil {
			return err
		}
	}

	relay, err := newRelay(d.Remote, d.Record)
	if err != nil {
		return err
	}

	d.relay = relay
	return vm.send(relay.socket, limits)
}

// await waits for the end of the copy, for as long as it may take.
func (d *Driver) await(ctx context.Context) error {
	if d.Limits.Whole > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, d.Limits.Whole, fmt.Errorf("it took longer than %s",
			d.Limits.Whole))
		defer cancel()
	}

	p, err := d.vm.settled(ctx, func(p progress) {
		if d.Progress != nil && p.RAM.Total > 0 {
			d.Progress(p.RAM.Total-min(p.RAM.Remaining, p.RAM.Total), p.RAM.Total)
		}
	})

	if err != nil {
		return err
	}

	d.copied = p
	d.Outcome.Downtime, d.Outcome.Memory = p.Downtime, p.RAM.Transferred
	if p.VFIO != nil {
		d.Outcome.Device = p.VFIO.Transferred
	}

	d.Outcome.Stopped = d.vm.stopped()
	switch {
	case copied(p.Status) != Completed:
		return nil
	case d.Record.Order.Way == ByVFIO && d.Outcome.Device == 0:
		return errors.New("QEMU has sent no state of the device")
	}

	// The destination sees a little later that it has all.
	until, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	for {
		a, err := d.ask(ctx, askLook, nil, nil)
		if err != nil || a.Peer != PeerLoading {
			return nil
		}
		select {
		case <-until.Done():
			return errors.New("the destination has all of the guest, and does not load it")
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// clock compares the clocks by round trips, of which the quickest is the best.
func (d *Driver) clock(ctx context.Context) {
	for range 20 {
		before := time.Now()
		var t Times
		if _, err := d.ask(ctx, askClock, nil, &t); err != nil {
			return
		}
		trip := time.Since(before)
		if wrong := trip / 2; !d.Outcome.Clock.Known || wrong < d.Outcome.Clock.Error {
			d.Outcome.Clock = Clock{Ahead: t.Now.Sub(before.Add(wrong)), Error: wrong, Known: true}
		}
	}
}
