package hostfile

import (
	"encoding/json"
	"fmt"
	"strings"

	"viaduct/iommu"
)

// A Host is kept in records as JSON of its structs, and comes back as it was: the users' language of files is not
// between, whose words have other meanings for values (null, true, 1e3) and may become stricter.

// UnmarshalJSON reads a host. What no file can declare is refused: a record may be a snapshot's, which anybody may have
// written.
func (h *Host) UnmarshalJSON(b []byte) error {
	type plain Host
	if err := json.Unmarshal(b, (*plain)(h)); err != nil {
		return err
	}
	for _, pf := range h.PFs {
		if pf.Count < 0 || pf.Count > maxIndex+1 {
			return fmt.Errorf("invalid number of VFs %d", pf.Count)
		}
	}
	return nil
}

// MarshalText is the selectors.
func (m Match) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText reads selectors.
func (m *Match) UnmarshalText(text []byte) error {
	m.Selectors = nil
	for word := range strings.FieldsSeq(string(text)) {
		s, err := iommu.ParseSelector(word)
		if err != nil {
			return err
		}
		m.Selectors = append(m.Selectors, s)
	}
	return nil
}

// MarshalJSON is the spans of indexes; null is all.
func (r Range) MarshalJSON() ([]byte, error) { return json.Marshal(r.spans) }

// UnmarshalJSON reads spans of indexes.
func (r *Range) UnmarshalJSON(b []byte) error {
	if err := json.Unmarshal(b, &r.spans); err != nil {
		return err
	}
	if len(r.spans) > mostSpans {
		return fmt.Errorf("%d spans of indexes are too many", len(r.spans))
	}
	for _, s := range r.spans {
		if s[0] < 0 || s[0] > s[1] || s[1] > maxIndex {
			return fmt.Errorf("invalid indexes of VFs %d-%d", s[0], s[1])
		}
	}
	return nil
}

// valued is a Valued in records.
type valued struct {
	Word string `json:"word,omitempty"`
	Base int    `json:"base,omitempty"`
	Plus bool   `json:"plus,omitempty"`
}

// MarshalJSON is what the value is made of.
func (v Valued) MarshalJSON() ([]byte, error) { return json.Marshal(valued{v.word, v.base, v.plus}) }

// UnmarshalJSON reads what a value is made of.
func (v *Valued) UnmarshalJSON(b []byte) error {
	var x valued
	err := json.Unmarshal(b, &x)
	*v = Valued{x.Word, x.Base, x.Plus}
	return err
}
