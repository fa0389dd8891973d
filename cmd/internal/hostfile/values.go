package hostfile

import (
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
