package hostfile

import (
	"encoding/json"
	"strings"

	"viaduct/iommu"
)

// A Host is kept in records as JSON of its structs, and comes back as it was: the users' language of files is not
// between, whose words have other meanings for values (null, true, 1e3) and may become stricter.

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
func (r *Range) UnmarshalJSON(b []byte) error { return json.Unmarshal(b, &r.spans) }

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
