package iommu

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"
)

func addr(t testing.TB, s string) Address {
	t.Helper()
	a, err := ParseAddress(s)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestAddress(t *testing.T) {
	for _, c := range []struct {
		text string
		want Address
		name string // as the kernel writes it
	}{
		{"0000:01:00.0", Address{0, 1, 0, 0}, "0000:01:00.0"},
		{"01:00.0", Address{0, 1, 0, 0}, "0000:01:00.0"},
		{"00:1f.7", Address{0, 0, 0x1f, 7}, "0000:00:1f.7"},
		{"ffff:ff:1f.7", Address{0xffff, 0xff, 0x1f, 7}, "ffff:ff:1f.7"},
		{"000A:0B:1C.1", Address{10, 11, 0x1c, 1}, "000a:0b:1c.1"},
		{"10000:e1:00.0", Address{0x10000, 0xe1, 0, 0}, "10000:e1:00.0"},
		{"00010000:e1:00.0", Address{0x10000, 0xe1, 0, 0}, "10000:e1:00.0"},
		{"ffffffff:00:00.0", Address{0xffffffff, 0, 0, 0}, "ffffffff:00:00.0"},
		{"80000000:00:00.0", Address{0x80000000, 0, 0, 0}, "80000000:00:00.0"},
		{"00000:00:00.0", Address{}, "0000:00:00.0"},
	} {
		got, err := ParseAddress(c.text)
		if err != nil || got != c.want || got.String() != c.name {
			t.Errorf("%q: %+v (%s), %v", c.text, got, got, err)
		}
	}

	for _, s := range []string{
		"", ".", ":", ":.", "0000:01:00", "0000:01:00.", "0000:01:00.8", "0000:01:20.0", "0000:1:00.0", "0000:001:00.0",
		"0000:01:0.0",
		"0000:01:000.0", "0000:01:00.00", "000:01:00.0", "123456789:01:00.0", "000000001:01:00.0", "0000:01:00.0 ",
		" 0000:01:00.0", "0000:01:00.0\n",
		"0000:0g:00.0", "+000:01:00.0", "-001:01:00.0", "0x00:01:00.0", "0_00:01:00.0", "0000-01-00.0",
		"0:0000:01:00.0", "0000:01:00.0.0",
		"0000:01:00.-", "0000::00.0", "1.0", "0000:01:00:0", "0000:00:1f.é", "0000:01:00.0:pcie001",
	} {
		if a, err := ParseAddress(s); err == nil {
			t.Errorf("%q: %+v", s, a)
		} else if a != (Address{}) || !strings.Contains(err.Error(), "PCI address") {
			t.Errorf("%q: %+v, %v", s, a, err)
		}
	}
}

func TestAddressCompare(t *testing.T) {
	order := []string{"0000:00:00.0", "0000:00:00.1", "0000:00:01.0", "0000:01:00.0", "0001:00:00.0", "10000:00:00.0"}
	for i, a := range order {
		for j, b := range order {
			want := 0
			if i < j {
				want = -1
			} else if i > j {
				want = 1
			}
			if got := addr(t, a).Compare(addr(t, b)); got != want {
				t.Errorf("%s and %s: %d", a, b, got)
			}
		}
	}
}

func TestAddressJSON(t *testing.T) {
	in := map[string]*Address{"a": {0x10000, 0xe1, 0, 1}, "b": nil}
	b, err := json.Marshal(in)
	if err != nil || string(b) != `{"a":"10000:e1:00.1","b":null}` {
		t.Fatalf("%s, %v", b, err)
	}
	var out map[string]*Address
	if err := json.Unmarshal(b, &out); err != nil || !reflect.DeepEqual(in, out) {
		t.Errorf("%v, %v", out, err)
	}
	var a Address
	if err := json.Unmarshal([]byte(`"1:2"`), &a); err == nil {
		t.Errorf("no error: %v", a)
	}
}

func FuzzAddress(f *testing.F) {
	for _, s := range []string{"0000:01:00.0", "01:00.0", "10000:e1:00.0", "ffffffff:ff:1f.7", "0000:01:00.8"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		a, err := ParseAddress(s)
		if err != nil {
			return
		}
		if a.Device > 31 || a.Function > 7 {
			t.Errorf("%q: %+v", s, a)
		}
		again, err := ParseAddress(a.String())
		if err != nil || again != a || again.String() != a.String() {
			t.Errorf("%q: %+v, then %+v, %v", s, a, again, err)
		}
		if full := strings.ToLower(s); len(full) == 12 && a.String() != full {
			t.Errorf("%q became %s", s, a)
		}
	})
}
