package lease

import (
	"encoding/json"
	"errors"
	"fmt"

	"viaduct/iommu"
)

// Unknown is the state of a lease on a captured host that does not tell it: the lease's record says who was to keep it
// alive, and not whether they lived.
const Unknown State = "unknown"

// booksFact is where a snapshot has how leases were. That it is there says that all records of leases and quarantine
// are.
const booksFact = "leases.json"

type capturedBooks struct {
	Leases map[string]capturedState `json:"leases"` // by guest
}

type capturedState struct {
	State State  `json:"state"`
	Why   string `json:"why,omitempty"`
}

// Capture is how a running host's leases are, for a snapshot, whose other files have their records. It changes nothing.
// It fails where a record cannot be read: then nobody is to take the snapshot's for all.
func (m *Manager) Capture() (iommu.Fact, error) {
	looks, _, err1 := m.look()
	_, err2 := m.Book.Quarantined()
	if err := errors.Join(err1, err2); err != nil {
		return iommu.Fact{}, err
	}
	books := capturedBooks{Leases: map[string]capturedState{}}
	for _, l := range looks {
		books.Leases[l.Guest] = capturedState{l.State, l.Why}
	}
	b, err := json.Marshal(books)
	return iommu.Fact{Name: booksFact, Data: b}, err
}

// Known reports whether the books are whole. Those of a captured host may be missing, or be a part.
func (b *Book) Known() bool {
	if b.host.Live() {
		return true
	}
	_, known, err := b.host.Fact(booksFact)
	return known && err == nil
}

// readStates reads how the leases of a captured host were, by guest.
func readStates(h *iommu.Host) (map[string]capturedState, error) {
	b, known, err := h.Fact(booksFact)
	if err != nil || !known {
		return nil, err
	}
	states, err := decodeStates(b)
	if err != nil {
		return nil, fmt.Errorf("the leases of a snapshot: %w", err)
	}
	return states, nil
}

func decodeStates(b []byte) (map[string]capturedState, error) {
	var books capturedBooks
	if err := json.Unmarshal(b, &books); err != nil {
		return nil, err
	}
	for guest, s := range books.Leases {
		if s.State == "" || len(s.State) > 32 || len(s.Why) > 4096 {
			return nil, fmt.Errorf("that of %q has no state, or one that is too long", guest)
		}
	}
	return books.Leases, nil
}

// capturedState is how a lease of a captured host was.
func (m *Manager) capturedState(l *Lease) (State, string) {
	if s, known := m.states[l.Guest]; known {
		return s.State, s.Why
	}
	return Unknown, "who kept it alive was not captured"
}
