package holder

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"viaduct/iommu"
)

// ErrNotCaptured is matched by errors that say that a captured host does not tell who uses its devices, as ErrBlind is.
const ErrNotCaptured = blindness("who uses its devices was not captured")

// What a snapshot has of holders: how whole the look was that found them, a file for each device that has some, and
// what a glance showed of all.
const (
	lookFact    = "holders.json"
	holdersFact = "holders/"
	glanceFact  = "glance.json"
)

// capturedLook is that look. What no look at all was possible for is in no snapshot.
type capturedLook struct {
	Blind   string `json:"blind,omitempty"`   // why not all could be seen; "" if all could
	Holders []held `json:"holders,omitempty"` // of a glance
}

// captured is a Holder in a snapshot, and the how manyth it was that the look found.
type captured struct {
	Order int `json:"order"`
	held
}

type held struct {
	Device string `json:"device"`
	Kind   Kind   `json:"kind"`
	What   string `json:"what"`
	Brief  string `json:"brief,omitempty"`
	PID    int    `json:"pid,omitempty"`
	Guest  string `json:"guest,omitempty"`
	Root   bool   `json:"root,omitempty"`
}

// Capture looks for who uses the devices of a running host, for a snapshot, from which [Find], [Glance] and the other
// functions read it back. What cannot be seen is told there too, and by an error that matches ErrBlind, beside which
// the facts are of use.
func Capture(h *iommu.Host, t *iommu.Topology) ([]iommu.Fact, error) {
	var devices []*iommu.Device
	t.All(func(d *iommu.Device) bool {
		devices = append(devices, d)
		return true
	})
	holders, err := Find(h, devices)
	if err != nil && !errors.Is(err, ErrBlind) {
		return nil, err
	}
	seen, unseen := Glance(h, t)
	if unseen != nil && !errors.Is(unseen, ErrBlind) {
		return nil, unseen
	}

	look, glance := capturedLook{}, capturedLook{}
	if err != nil {
		look.Blind = err.Error()
	}
	if unseen != nil {
		glance.Blind = unseen.Error()
	}
	for _, h := range seen {
		glance.Holders = append(glance.Holders, held(h))
	}
	of := map[string][]captured{}
	for i, h := range holders {
		of[h.Device] = append(of[h.Device], captured{i, held(h)})
	}
	a, err1 := json.Marshal(look)
	b, err2 := json.Marshal(glance)
	failed := errors.Join(err1, err2)
	out := []iommu.Fact{{Name: lookFact, Data: a}, {Name: glanceFact, Data: b}}
	for name, all := range of {
		b, err := json.Marshal(all)
		failed = errors.Join(failed, err)
		out = append(out, iommu.Fact{Name: holdersFact + name + ".json", Data: b})
	}
	slices.SortFunc(out, func(a, b iommu.Fact) int { return cmp.Compare(a.Name, b.Name) })
	return out, cmp.Or(failed, err)
}

// readLook reads a look that a captured host tells of.
func readLook(h *iommu.Host, fact string) (look capturedLook, err error) {
	b, known, err := h.Fact(fact)
	if err != nil {
		return look, err
	}
	if !known {
		return look, ErrNotCaptured
	}
	if err := json.Unmarshal(b, &look); err != nil {
		return look, fmt.Errorf("%s of a snapshot: %w", fact, err)
	}
	return look, nil
}

// incomplete is the ErrBlind of a look that did not see all; nil if it did.
func (l *capturedLook) incomplete() error {
	if l.Blind == "" {
		return nil
	}
	return blindness("not all was seen when the host was captured: " + l.Blind)
}

// glanceCaptured is what a glance showed when a host was captured.
func glanceCaptured(h *iommu.Host) ([]Holder, error) {
	look, err := readLook(h, glanceFact)
	if err != nil {
		return nil, err
	}
	var out []Holder
	for _, one := range look.Holders {
		out = append(out, Holder(one))
	}
	return out, look.incomplete()
}

// Known reports whether a host tells who uses its devices, as far as that can be seen. A running one does.
func Known(h *iommu.Host) bool {
	if h.Live() {
		return true
	}
	_, err := readLook(h, lookFact)
	return !errors.Is(err, ErrNotCaptured)
}

// findCaptured is what a captured host tells of who used the devices, of some kinds or, without any, of all. It is an
// ErrBlind where it does not tell of all.
func findCaptured(h *iommu.Host, devices []*iommu.Device, kinds ...Kind) ([]Holder, error) {
	look, err := readLook(h, lookFact)
	if err != nil {
		return nil, err
	}

	var all []captured
	for _, d := range devices {
		// Names of devices are never above a folder, but a snapshot may say anything.
		if strings.Contains(d.Name, "/") {
			continue
		}
		b, has, err := h.Fact(holdersFact + d.Name + ".json")
		if err != nil {
			return nil, err
		}
		if !has {
			continue
		}
		found, err := decodeCaptured(b, d.Name)
		if err != nil {
			return nil, err
		}
		all = append(all, found...)
	}

	slices.SortStableFunc(all, func(a, b captured) int { return cmp.Compare(a.Order, b.Order) })
	var out []Holder
	for _, one := range all {
		if len(kinds) == 0 || slices.Contains(kinds, one.Kind) {
			out = append(out, Holder(one.held))
		}
	}
	return out, look.incomplete()
}

// decodeCaptured reads the holders of a device. One of a kind that a later viaduct knows is a holder all the same.
func decodeCaptured(b []byte, device string) ([]captured, error) {
	var all []captured
	if err := json.Unmarshal(b, &all); err != nil {
		return nil, fmt.Errorf("the holders of %s in a snapshot: %w", device, err)
	}
	for _, one := range all {
		if one.Device != device {
			return nil, fmt.Errorf("the holders of %s in a snapshot are of %q too", device, one.Device)
		}
	}
	return all, nil
}
