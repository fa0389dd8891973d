package migrate

import (
	"errors"
	"fmt"
)

// SourceView is all that decides what the source does next.
type SourceView struct {
	Way         Way
	Libvirt     bool // libvirt runs the guest, and lets it go on there when all of it has come
	Phase       Phase
	Guest       Runs
	Copy        Copy
	Plugged     bool // the guest has its device, as far as QEMU knows
	UnplugAsked bool // the guest may have been asked to let go of it, and not have answered
	Address     bool // the device carries the guest's address
	Peer        Peer
}

// Action is what the source does next.
type Action string

// The actions. To record is to write a phase down, durably.
const (
	RecordUnplugging Action = "record unplugging"
	RecordCopying    Action = "record copying"
	RecordCommitted  Action = "record committed"
	RecordQuitting   Action = "record quitting"
	RecordReturning  Action = "record returning"

	AskReserve Action = "ask the destination to reserve a device"
	AskStart   Action = "ask the destination to start QEMU"
	AskLoad    Action = "ask the destination to load"
	AskTake    Action = "tell the destination that the guest is its"
	AskArrive  Action = "ask the destination to plug the device"
	AskRefuse  Action = "tell the destination to let go"
	AskGiveUp  Action = "tell the destination to let go of the guest that has ended there"
	AskForget  Action = "tell the destination to forget the move"

	Unplug Action = "unplug the device"
	Park   Action = "take the guest's address off the device"
	Send   Action = "send the guest's memory"
	Await  Action = "wait for the copy"
	Cancel Action = "cancel the copy"
	Resume Action = "let the guest go on"
	Unpark Action = "give the device the guest's address"
	Plug   Action = "plug the device"
	Quit   Action = "end QEMU"
	End    Action = "release the device"   // and the lease
	Keep   Action = "keep the guest"       // the lease is as before, and the move is over
	Lose   Action = "leave the dead guest" // as Keep: its QEMU has ended by itself
	Done   Action = ""
)

// ErrInDoubt says that the guest may run on the destination, which does not answer, or has forgotten it.
var ErrInDoubt = errors.New("whether the guest runs on the destination is not known")

// ErrGoesOn says that a move cannot go back.
var ErrGoesOn = errors.New("the guest is the destination's by now")

// Next is what the source does next, of what it sees, until it is Done. It is asked again after each action, and after
// a crash, with what is seen then.
func (v *SourceView) Next(want Wants) (Action, error) {
	if a, err := v.byLibvirt(want); a != Done || err != nil {
		return a, err
	}
	switch {
	case v.Phase == Quitting:
		return v.quitting(want)
	case v.Phase == Committed:
		return v.committed(want)
	case v.Phase == Returning:
		return v.returning()
	case v.Phase == Copying && v.Guest == Gone && v.Peer == PeerLoaded:
		// Nobody but the destination has the guest, and it cannot run here any more.
		return RecordCommitted, nil
	case v.Phase == Copying && v.Guest == Gone && v.Peer == PeerUnreachable && want == Forward:
		return Done, fmt.Errorf("the guest's QEMU has ended, and the destination does not answer: %w", ErrInDoubt)
	case want != Forward, v.Guest == Gone:
		return RecordReturning, nil
	}

	switch v.Phase {
	case Checked:
		return v.checked()
	case Unplugging:
		return v.unplugging()
	case Copying:
		return v.copying()
	}
	return Done, fmt.Errorf("a move cannot be in phase %q", v.Phase)
}

// byLibvirt is what libvirt has decided while the guest was on its way: once all of it has come, it runs there,
// whoever wants it back. Where libvirt has left it standing here, or does not have it any more, and the destination
// does not say that it has it, libvirt does not know either.
func (v *SourceView) byLibvirt(want Wants) (Action, error) {
	switch onItsWay := v.Libvirt && (v.Phase == Copying || v.Phase == Returning); {
	case !onItsWay:
	case v.Peer == PeerLoaded:
		return RecordCommitted, nil
	case v.Copy == Underway || want == TakeBack:
	case v.Guest == Paused, v.Guest == Gone && v.Peer == PeerUnreachable:
		return Done, fmt.Errorf("the guest does not run here: %w (it is %s)", ErrInDoubt, v.Peer)
	}
	return Done, nil
}

func (v *SourceView) checked() (Action, error) {
	switch v.Peer {
	case PeerNone:
		return AskReserve, nil
	case PeerReserved:
		return AskStart, nil
	case PeerWaiting:
		return RecordUnplugging, nil
	}
	return RecordReturning, nil
}

func (v *SourceView) unplugging() (Action, error) {
	switch {
	case v.Peer != PeerWaiting:
		return RecordReturning, nil
	case v.Way != ByVFIO && v.Plugged:
		return Unplug, nil
	case v.Way != ByVFIO && v.Address:
		return Park, nil
	}
	return RecordCopying, nil
}

func (v *SourceView) copying() (Action, error) {
	switch {
	case v.Copy == Underway, v.Copy == Completed && v.Peer == PeerLoading:
		return Await, nil
	case v.Copy == Completed && v.Guest == Paused && v.Peer == PeerLoaded:
		return RecordCommitted, nil
	case v.Copy == NoCopy && v.Peer == PeerWaiting:
		return AskLoad, nil
	case v.Copy == NoCopy && v.Peer == PeerLoading:
		return Send, nil
	}
	return RecordReturning, nil
}

// committed is where the guest may run on the destination: nothing but its answer says that it never will.
func (v *SourceView) committed(want Wants) (Action, error) {
	switch v.Peer {
	case PeerRefused:
		return RecordReturning, nil
	case PeerMine:
		if want == Forward {
			return AskArrive, nil
		}
		return Done, ErrGoesOn
	case PeerArrived:
		return RecordQuitting, nil
	case PeerLoaded:
		if want == Forward || v.Guest == Gone || v.Libvirt {
			return AskTake, nil
		}
		return AskRefuse, nil
	case PeerLost:
		return AskRefuse, nil
	}
	switch {
	case want == TakeBack && v.Peer == PeerEnded:
		return AskGiveUp, nil
	case want == TakeBack:
		return RecordReturning, nil
	}
	return Done, fmt.Errorf("%w (it is %s)", ErrInDoubt, v.Peer)
}

// quitting is after the destination had the guest in full: it is not asked again.
func (v *SourceView) quitting(want Wants) (Action, error) {
	switch {
	case want != Forward:
		return Done, ErrGoesOn
	case v.Guest != Gone:
		return Quit, nil
	case v.Peer != PeerUnreachable && v.Peer != PeerNone:
		return AskForget, nil
	}
	return End, nil
}

// returning is where the guest stays: the destination never was told that it is its own, or has said that it never will
// run it, or the user has said so.
func (v *SourceView) returning() (Action, error) {
	refuses := v.Peer == PeerRefused || v.Peer == PeerNone || v.Peer == PeerUnreachable
	switch {
	case v.Guest != Gone && v.Copy == Underway:
		return Cancel, nil
	case v.Guest == Paused:
		return Resume, nil
	case !refuses && v.Peer != PeerMine && v.Peer != PeerArrived && v.Peer != PeerEnded:
		return AskRefuse, nil
	case v.Guest == Gone:
		if v.Peer == PeerRefused {
			return AskForget, nil
		}
		return Lose, nil
	case v.Way != ByVFIO && v.Plugged && v.UnplugAsked:
		// It cannot be taken back, and could be answered at any time.
		return Unplug, nil
	case v.Way != ByVFIO && !v.Address:
		return Unpark, nil
	case v.Way != ByVFIO && !v.Plugged:
		return Plug, nil
	case v.Peer == PeerRefused:
		return AskForget, nil
	}
	return Keep, nil
}
