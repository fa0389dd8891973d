package config

import "testing"

// What is no configuration of this version and kind is refused.
func TestParse(t *testing.T) {
	for _, kind := range []string{`{}`, `{"apiVersion":"v2","kind":"DeviceConfig"}`,
		`{"apiVersion":"viaduct.dev/v1","kind":"X"}`, `[]`} {
		if c, err := Parse([]byte(kind)); err == nil {
			t.Errorf("%s: %+v", kind, c)
		}
	}
}

// A configuration may be anything.
func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"apiVersion":"viaduct.dev/v1","kind":"DeviceConfig","vlan":1,"mac":"stable","settings":{"trust":"on"}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, err := Parse(b); err == nil && c.APIVersion != Version {
			t.Errorf("%q: %+v", b, c)
		}
	})
}
