package migrate

import (
	"time"

	"viaduct/vfio/holder"
)

// Phase is how far a move has come on one side. It is written down before what it allows is done: after a crash the
// phase says what may have happened.
type Phase string

// The phases of the source.
const (
	Checked    Phase = "checked"    // nothing of the guest was touched
	Unplugging Phase = "unplugging" // the guest may have been asked to let go of its device
	Copying    Phase = "copying"    // the guest is without its device, and its memory may be on its way
	Committed  Phase = "committed"  // the destination may run the guest: it must not go on here
	Quitting   Phase = "quitting"   // the destination runs the guest
	Returning  Phase = "returning"  // the guest stays here
)

// The phases of the destination.
const (
	Reserved Phase = "reserved" // a VF is kept for the guest
	Waiting  Phase = "waiting"  // QEMU waits for the guest's memory
	Loading  Phase = "loading"  // and may have got some of it
	Mine     Phase = "mine"     // the source has committed: the guest runs here, or may
	Arrived  Phase = "arrived"  // and has its device
	Refused  Phase = "refused"  // it will never run here by this move
)

// Runs is what a side's QEMU does with the guest.
type Runs string

// What a QEMU does.
const (
	Gone    Runs = "gone"    // there is no QEMU
	Awaits  Runs = "awaits"  // of the destination: it waits for memory, or loads it
	Paused  Runs = "paused"  // it has the guest, which stands still
	Running Runs = "running" // the guest runs
)

// Copy is how far the source's QEMU is with the guest's memory.
type Copy string

// How far a copy is.
const (
	NoCopy    Copy = ""
	Underway  Copy = "active"
	Completed Copy = "completed" // the destination has all, and has loaded it
	Failed    Copy = "failed"    // or was cancelled
)

// Peer is what the destination answers, or that it does not.
type Peer string

// What a destination answers: one of its phases, or else.
const (
	PeerUnreachable Peer = "unreachable"
	PeerNone        Peer = "none"     // it knows nothing of this move
	PeerReserved    Peer = "reserved" // as its phases
	PeerWaiting     Peer = "waiting"
	PeerLoading     Peer = "loading"
	PeerLoaded      Peer = "loaded" // it has all of the guest, which stands still
	PeerLost        Peer = "lost"   // its QEMU has ended, and never ran the guest
	PeerMine        Peer = "mine"
	PeerArrived     Peer = "arrived"
	PeerEnded       Peer = "ended" // its QEMU has ended after it took the guest
	PeerRefused     Peer = "refused"
)

// Wants is what the user wants of a move.
type Wants string

// What a user wants.
const (
	Forward  Wants = "forward"
	Back     Wants = "back"
	TakeBack Wants = "take-back" // back, on the user's word that the destination does not run the guest
)

// Record is what one side has written down of a move, before what its phase allows is done. It outlives the boot.
type Record struct {
	ID          string      `json:"id"`
	Guest       string      `json:"guest"`
	Phase       Phase       `json:"phase"`
	Source      bool        `json:"source"`         // this side had the guest first
	Peer        string      `json:"peer,omitempty"` // of the source: how the other side is reached
	URI         string      `json:"uri,omitempty"`  // and libvirt there, by libvirt here
	Began       time.Time   `json:"began"`
	UnplugAsked bool        `json:"asked,omitempty"`  // the guest may have been asked to let go of its device
	Sent        bool        `json:"sent,omitempty"`   // QEMU may have been told to send the guest, for this move
	Socket      string      `json:"socket,omitempty"` // of the machine protocol of this side's QEMU
	Started     holder.Proc `json:"qemu"`             // which is this process, if it is known
	Order       Order       `json:"order"`
}
