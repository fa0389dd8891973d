package migrate

import "fmt"

// DestinationView is all that decides what the destination answers.
type DestinationView struct {
	Way     Way
	Libvirt bool  // libvirt runs the guest: one that has come runs, before anybody has said that it may
	Phase   Phase // "" if it knows nothing of the move
	Leased  bool  // a device is reserved
	Guest   Runs
	Loaded  bool // all of the guest has come
	Address bool // the reserved device carries the guest's address
	Plugged bool // the guest has its device
}

// Peer is what the destination is to the source.
func (v *DestinationView) Peer() Peer {
	switch v.Phase {
	case "":
		return PeerNone
	case Reserved:
		if !v.Leased {
			// It was interrupted, and is asked again.
			return PeerNone
		}
		return PeerReserved
	case Refused:
		return PeerRefused
	case Arrived:
		if v.Guest == Gone {
			return PeerEnded
		}
		return PeerArrived
	case Mine:
		if v.Guest == Gone {
			return PeerEnded
		}
		return PeerMine
	}

	switch {
	case v.Guest == Gone:
		return PeerLost
	case v.Phase == Waiting:
		return PeerWaiting
	case v.Loaded && v.Guest == Paused:
		return PeerLoaded
	}
	return PeerLoading
}

// Task is one thing that the destination does.
type Task string

// The tasks. To note is to write a phase down, durably.
const (
	NoteReserved Task = "note reserved"
	NoteWaiting  Task = "note waiting"
	NoteLoading  Task = "note loading"
	NoteMine     Task = "note mine"
	NoteArrived  Task = "note arrived"
	NoteRefused  Task = "note refused"
	Forget       Task = "forget the move"

	Reserve     Task = "reserve a device"
	Start       Task = "start QEMU"
	Load        Task = "load what comes"
	Go          Task = "let the guest go on"
	GiveAddress Task = "give the device the guest's address"
	PlugHere    Task = "plug the device"
	EndQEMU     Task = "end QEMU"
	Release     Task = "release the device"
)

// Tasks are what the destination does, in their order, for what the source asks: each may be repeated after a crash.
// What the source must not ask now is an error, and nothing is done.
func (v *DestinationView) Tasks(ask Action) ([]Task, error) {
	peer := v.Peer()
	switch {
	case ask == AskReserve && (peer == PeerNone || peer == PeerReserved):
		return []Task{NoteReserved, Reserve}, nil
	case ask == AskStart && (peer == PeerReserved || peer == PeerWaiting):
		return []Task{NoteWaiting, Start}, nil
	case ask == AskLoad && (peer == PeerWaiting || peer == PeerLoading):
		return []Task{NoteLoading, Load}, nil
	case ask == AskTake && (peer == PeerLoaded || peer == PeerMine):
		return []Task{NoteMine, Go}, nil
	case ask == AskArrive && peer == PeerMine && v.Way == ByVFIO:
		return []Task{Go, NoteArrived}, nil
	case ask == AskArrive && (peer == PeerMine || peer == PeerArrived):
		return []Task{Go, GiveAddress, PlugHere, NoteArrived}, nil
	case ask == AskRefuse && v.MayRefuse():
		return []Task{NoteRefused, EndQEMU, Release}, nil
	case ask == AskGiveUp && (peer == PeerEnded || peer == PeerRefused):
		return []Task{NoteRefused, EndQEMU, Release}, nil
	case ask == AskForget && peer == PeerRefused:
		// What was interrupted after it was noted.
		return []Task{EndQEMU, Release, Forget}, nil
	case ask == AskForget && (peer == PeerArrived || peer == PeerEnded || peer == PeerNone):
		return []Task{Forget}, nil
	}
	return nil, fmt.Errorf("the destination is %s: it cannot be asked to %s", peer, ask)
}

// MayRefuse reports whether the destination may say that it will never run the guest: it was not told that it is its.
func (v *DestinationView) MayRefuse() bool {
	return v.Phase != "" && v.Phase != Mine && v.Phase != Arrived && (!v.Libvirt || v.Peer() != PeerLoaded)
}

// Abandoned are what the destination does when the source is gone from the other end of the pipe: what has nothing of
// the guest is let go; what may have all of it waits.
func (v *DestinationView) Abandoned() []Task {
	switch v.Peer() {
	case PeerReserved, PeerWaiting, PeerLost, PeerRefused:
		return []Task{NoteRefused, EndQEMU, Release}
	}
	return nil
}
