package hostfile

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"viaduct/iommu"
	"viaduct/sriov"
)

// scalar is a type that is written as one word.
type scalar interface {
	parse(text string) error
	String() string
}

// Match names a device by one or more selectors, which must all hold.
type Match struct{ Selectors []iommu.Selector }

func (m *Match) parse(text string) error {
	for word := range strings.FieldsSeq(text) {
		s, err := iommu.ParseSelector(word)
		if err != nil {
			return reason(err)
		}
		switch s.Form() {
		case iommu.ByGroup:
			return errors.New("a group has another number after a boot; select the device")
		case iommu.BySlot:
			return errors.New("a slot is all of its functions; name each device, as " + word + ".0")
		case iommu.ByVF:
			return errors.New("declare a VF below its PF, in pfs")
		}
		m.Selectors = append(m.Selectors, s)
	}
	if len(m.Selectors) == 0 {
		return errors.New("want a selector, e.g. mac=52:54:00:12:34:56 or path=0000:00:01.0/00.0")
	}
	return nil
}

func (m *Match) String() string {
	var words []string
	for _, s := range m.Selectors {
		words = append(words, s.String())
	}
	return strings.Join(words, " ")
}

// Has reports whether one of the selectors is of a form.
func (m *Match) Has(forms ...iommu.Form) bool {
	return slices.ContainsFunc(m.Selectors, func(s iommu.Selector) bool { return slices.Contains(forms, s.Form()) })
}

// Range is a set of VF indexes; the zero value is all.
type Range struct{ spans [][2]int }

// Span is the range of all indexes from first to last.
func Span(first, last int) Range { return Range{[][2]int{{first, last}}} }

// To is the range with all indexes up to last.
func (r Range) To(last int) Range { return Span(r.spans[0][0], last) }

const (
	maxIndex  = 65534
	mostSpans = 1024
)

func (r *Range) parse(text string) error {
	want := errors.New("want VF indexes, e.g. 3, 0-3 or 0-3,6")
	for part := range strings.SplitSeq(text, ",") {
		first, last, isSpan := strings.Cut(strings.TrimSpace(part), "-")
		if !isSpan {
			last = first
		}
		a, err1 := index(first)
		b, err2 := index(last)
		if err1 != nil || err2 != nil {
			return want
		}
		if a > b {
			return fmt.Errorf("%d-%d ends before it begins", a, b)
		}

		for _, s := range r.spans {
			if a <= s[1] && s[0] <= b {
				return fmt.Errorf("%d-%d and %d-%d overlap", s[0], s[1], a, b)
			}
		}

		if r.spans = append(r.spans, [2]int{a, b}); len(r.spans) > mostSpans {
			return fmt.Errorf("more than %d parts", mostSpans)
		}
	}
	return nil
}

func index(s string) (int, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err == nil && n > maxIndex {
		err = strconv.ErrRange
	}
	return int(n), err
}

func (r *Range) String() string {
	var parts []string
	for _, s := range r.spans {
		if s[0] == s[1] {
			parts = append(parts, strconv.Itoa(s[0]))
		} else {
			parts = append(parts, fmt.Sprintf("%d-%d", s[0], s[1]))
		}
	}
	return strings.Join(parts, ",")
}

// Indexes are those of the range that n VFs have.
func (r *Range) Indexes(n int) []int {
	spans := r.spans
	if spans == nil {
		spans = [][2]int{{0, n - 1}}
	}
	var out []int
	for _, s := range spans {
		for i := s[0]; i <= s[1] && i < n; i++ {
			out = append(out, i)
		}
	}
	return out
}

// last is the greatest index, -1 if the range is all.
func (r *Range) last() int {
	last := -1
	for _, s := range r.spans {
		last = max(last, s[1])
	}
	return last
}

// Valued is the value of a setting: a word, or a number or GUID to which the VF's index is added.
type Valued struct {
	word string // a GUID that the index is added to as well
	base int
	plus bool
}

const plusIndex = "+index"

// Value is a setting's value that is the same for all.
func Value(word string) Valued { return Valued{word: word} }

// parseValued reads the value of a key, and returns it as sriov spells it.
func parseValued(key Key, text string) (Valued, error) {
	if base, plus := strings.CutSuffix(text, plusIndex); plus {
		if key == sriov.MAC {
			return Valued{}, fmt.Errorf("only numbers and GUIDs can have %s added", plusIndex)
		}
		s, err := sriov.ParseSettings([]string{string(key) + "=" + strings.TrimSpace(base)})
		if err != nil {
			return Valued{}, reason(err)
		}
		if _, guid := iommu.ParseGUID(s[key]); guid {
			return Valued{word: s[key], plus: true}, nil
		}
		n, err := strconv.Atoi(s[key])
		if err != nil {
			return Valued{}, fmt.Errorf("only numbers and GUIDs can have %s added", plusIndex)
		}
		return Valued{base: n, plus: true}, nil
	}
	s, err := sriov.ParseSettings([]string{string(key) + "=" + text})
	if err != nil {
		return Valued{}, reason(err)
	}
	return Value(s[key]), nil
}

// reason is what follows the word in an error that begins with it: the word is told with its place.
func reason(err error) error {
	if _, why, ok := strings.Cut(err.Error(), ": "); ok {
		return errors.New(why)
	}
	return err
}

// Of is the value for a VF.
func (v Valued) Of(index int) string {
	if guid, ok := iommu.ParseGUID(v.word); v.plus && ok {
		binary.BigEndian.PutUint64(guid, binary.BigEndian.Uint64(guid)+uint64(index))
		return guid.String()
	}
	if v.plus {
		return strconv.Itoa(v.base + index)
	}
	return v.word
}

func (v Valued) String() string {
	if v.plus && v.word == "" {
		return strconv.Itoa(v.base) + plusIndex
	}
	if v.plus {
		return v.word + plusIndex
	}
	return v.word
}
