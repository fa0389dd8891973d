package hostfile

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"viaduct/sriov"
)

// Values are settings of VFs, to whose values the VF's index may be added.
type Values map[sriov.Key]Valued

// ParseValues reads KEY=VALUE words, as vlan=100+index. Its errors name the word and what is wanted.
func ParseValues(words []string) (Values, error) {
	out := Values{}
	for _, w := range words {
		name, text, plus := strings.Cut(w, "=")
		if !plus || !strings.HasSuffix(text, plusIndex) {
			s, err := sriov.ParseSettings([]string{w})
			if err != nil {
				return nil, err
			}
			for key, value := range s {
				if _, twice := out[key]; twice {
					return nil, fmt.Errorf("%s is given twice", key)
				}
				out[key] = Value(value)
			}
			continue
		}

		key := sriov.Key(name)
		if !slices.Contains(sriov.Keys(), key) {
			_, err := sriov.ParseSettings([]string{w})
			return nil, err
		}
		value, err := parseValued(key, text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", w, err)
		}
		if _, twice := out[key]; twice {
			return nil, fmt.Errorf("%s is given twice", key)
		}
		out[key] = value
	}
	return out, nil
}

// Of are the settings of the VF with an index. Its error says which of them is none for that VF.
func (v Values) Of(index int) (sriov.Settings, error) {
	out := sriov.Settings{}
	for _, key := range slices.Sorted(maps.Keys(v)) {
		value := v[key]
		out[key] = value.Of(index)
		if !value.plus {
			continue
		}
		if _, err := sriov.ParseSettings([]string{string(key) + "=" + out[key]}); err != nil {
			return nil, fmt.Errorf("vf%d: %w", index, err)
		}
	}
	return out, nil
}

// Plain are settings that are the same for all VFs.
func Plain(s sriov.Settings) Values {
	out := Values{}
	for key, value := range s {
		out[key] = Value(value)
	}
	return out
}

// Text is the settings as ParseValues reads them.
func (v Values) Text() string { return v.words().Text() }

// words are the settings with their values as they are typed, which are not yet those of any VF.
func (v Values) words() sriov.Settings {
	out := sriov.Settings{}
	for key, value := range v {
		out[key] = value.String()
	}
	return out
}

// MarshalJSON is an object of the values as they are typed.
func (v Values) MarshalJSON() ([]byte, error) { return json.Marshal(v.words()) }

// UnmarshalJSON reads what MarshalJSON has written. It checks nothing: Of does, for the VF.
func (v *Values) UnmarshalJSON(b []byte) error {
	var words sriov.Settings
	if err := json.Unmarshal(b, &words); err != nil {
		return err
	}
	*v = Plain(words)
	for key, text := range words {
		if value, err := parseValued(key, text); err == nil && value.plus {
			(*v)[key] = value
		}
	}
	return nil
}
