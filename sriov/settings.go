package sriov

import (
	"fmt"
	"slices"
	"strings"

	"viaduct/internal/nearest"
	"viaduct/internal/shell"
	"viaduct/iommu"
	"viaduct/vfio/bind"
)

// Settings are what a PF decides for a VF, each by its key and in one spelling. A key that is missing is not reported
// by the PF's driver, or not to be changed.
type Settings map[Key]string

// Text is what [ParseSettings] reads, the keys in their order.
func (s Settings) Text() string {
	var words []string
	for _, k := range Keys() {
		if v, ok := s[k]; ok {
			words = append(words, string(k)+"="+v)
		}
	}
	return strings.Join(words, " ")
}

// ParseSettings reads KEY=VALUE words. Its errors name the word and what is wanted.
func ParseSettings(words []string) (Settings, error) {
	s := Settings{}
	for _, w := range words {
		name, value, ok := strings.Cut(w, "=")
		r := rowNamed(name)
		if !ok || r == nil {
			keys := keyNames(Keys())
			return nil, fmt.Errorf("invalid setting %q: want KEY=VALUE%s; the keys are %s", w, ask(name), keys)
		}
		if _, twice := s[r.key]; twice {
			return nil, fmt.Errorf("%s is given twice", r.key)
		}
		text, err := r.parse(value)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", w, err)
		}
		s[r.key] = text
	}
	return s, nil
}

// checked is the settings in their one spelling. Its errors name the key and what is wanted.
func (s Settings) checked() (Settings, error) {
	out := Settings{}
	for k, v := range s {
		r := rowNamed(string(k))
		if r == nil || r.key != k {
			return nil, fmt.Errorf("unknown setting %q%s; the keys are %s", k, ask(string(k)), keyNames(Keys()))
		}
		text, err := r.parse(v)
		if err != nil {
			return nil, fmt.Errorf("%s=%s: %w", k, v, err)
		}
		out[k] = text
	}
	return out, nil
}

// ask is the question which key may be meant by one that is none.
func ask(name string) string {
	var names []string
	for _, k := range Keys() {
		names = append(names, string(k))
	}
	if rowNamed(name) != nil {
		return ""
	}
	return nearest.Ask(name, names)
}

func keyNames(keys []Key) string {
	var names []string
	for _, k := range keys {
		names = append(names, string(k))
	}
	return strings.Join(names, ", ")
}

// Setting is one message, or write, that brings a VF from one set of values to another.
type Setting struct {
	Keys     []Key    // that it sets together
	From, To Settings // of these keys; From lacks what the driver does not report
}

// row is the row of the setting's first key, which knows how it is made.
func (s Setting) row() *row { return s.Keys[0].row() }

// planSettings is what it takes to get a VF's settings to what is wanted, in order: nothing for what is right already.
func planSettings(now, want Settings) []Setting {
	var out []Setting
	for _, keys := range order(want) {
		s := Setting{Keys: keys, From: Settings{}, To: Settings{}}
		differs := false
		for _, k := range keys {
			if v, known := now[k]; known {
				s.From[k], s.To[k] = v, v
			}
			if v, asked := want[k]; asked {
				differs = differs || now[k] != v
				s.To[k] = v
			}
		}
		if differs {
			out = append(out, s)
		}
	}
	return out
}

// compare says which of the wanted settings are not as they are to be, and which cannot be told.
func compare(now, want Settings) (wrong []string, unknown []Key) {
	for _, k := range Keys() {
		w, asked := want[k]
		is, known := now[k]
		switch {
		case !asked || known && is == w:
		case !known:
			unknown = append(unknown, k)
		default:
			wrong = append(wrong, fmt.Sprintf("%s was set to %s and is %s", k, w, is))
		}
	}
	return wrong, unknown
}

// command is a setting as a shell command.
func (s Setting) action(iface string, vf *iommu.Device) bind.Action {
	if r := s.row(); r.file != "" {
		return bind.Action{Step: bind.Step{Path: attribute(vf.Address, r.file), Value: s.To[r.key]}}
	}
	line := []string{fmt.Sprintf("ip link set %s vf %d", shell.Quote(iface), vf.VFIndex)}
	for _, k := range s.Keys {
		if v, ok := s.To[k]; ok {
			line = append(line, k.row().ipWord(), shell.Quote(v))
		}
	}
	return bind.Action{Command: strings.Join(line, " ")}
}

// order is the order the hardware needs, of the keys that are made together.
func order(want Settings) [][]Key {
	type group struct {
		keys []Key
		at   int
	}
	var groups []group
	for i := range table {
		r := &table[i]
		if r.with != r.key {
			continue
		}
		g := group{[]Key{r.key}, r.order(want[r.key])}
		for j := range table {
			if other := &table[j]; other.with == r.key && other != r {
				g.keys = append(g.keys, other.key)
			}
		}
		groups = append(groups, g)
	}
	slices.SortStableFunc(groups, func(a, b group) int { return a.at - b.at })

	out := make([][]Key, len(groups))
	for i, g := range groups {
		out[i] = g.keys
	}
	return out
}
