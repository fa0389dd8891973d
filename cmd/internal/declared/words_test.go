package declared

import (
	"slices"
	"strings"
	"testing"

	"viaduct/internal/host/hosttest"
)

// What is the same of VFs that follow on each other is said once, and numbers that grow with the index are a range.
func TestFoldRows(t *testing.T) {
	rows := func(parts ...string) []vfRow {
		var out []vfRow
		for n, text := range parts {
			row := vfRow{n, map[string]string{}}
			for word := range strings.FieldsSeq(text) {
				key, value, _ := strings.Cut(word, "=")
				row.parts[key] = value
			}
			out = append(out, row)
		}
		return out
	}

	for name, c := range map[string]struct {
		rows []vfRow
		want []string
	}{
		"a range": {
			rows("vlan=100 mac=stable pool=net", "vlan=101 mac=stable pool=net", "vlan=102 mac=stable pool=net"),
			[]string{"vf0-2: mac stable, vlan 100-102, pool net"},
		},
		"the same":       {rows("vlan=7", "vlan=7", "vlan=7"), []string{"vf0-2: vlan 7"}},
		"same, then one": {rows("vlan=7", "vlan=7", "vlan=8"), []string{"vf0-1: vlan 7", "vf2: vlan 8"}},
		"counts, stops":  {rows("vlan=7", "vlan=8", "vlan=8"), []string{"vf0-1: vlan 7-8", "vf2: vlan 8"}},
		"another key": {rows("vlan=7", "vlan=7 trust=on", ""),
			[]string{"vf0: vlan 7", "vf1: vlan 7, trust on", "vf2: as made, without a driver"}},
		"one":  {rows("max_tx_rate=100"), []string{"vf0: max tx rate 100"}},
		"none": {nil, nil},
	} {
		if got := foldRows(c.rows); !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}

	gap := []vfRow{{0, map[string]string{"vlan": "7"}}, {2, map[string]string{"vlan": "7"}}}
	if got := foldRows(gap); len(got) != 2 {
		t.Errorf("with one left out: %q", got)
	}
}

// A plan in words says what is made, then what differs, and for a device what goes along.
func TestWords(t *testing.T) {
	const text = "pfs:\n  - {select: " + pf + ", count: 2, vfs: [{driver: vfio, vlan: 100+index, mac: stable}]}\n" +
		"devices:\n  - select: \"0000:07:02.0\"\n"
	m := newManager(t, hosttest.NewLab(t, nil), Options{})
	items := plan(t, m, text)
	got := strings.Join(items[0].Words(), "|")
	if !strings.HasPrefix(got, "makes 2 VFs|") || !strings.HasSuffix(got,
		"vf0-1: mac stable, vlan 100-101, driver vfio") {
		t.Errorf("a PF: %q", got)
	}
	if got := strings.Join(items[1].Words(), "|"); got != "taken for guests|also takes: NIC" {
		t.Errorf("a device: %q", got)
	}
	if err := apply(t, m, text); err != nil {
		t.Fatal(err)
	}
	m = again(t, m)
	for _, i := range plan(t, m, text) {
		if words := i.Words(); words != nil {
			t.Errorf("as declared: %q", words)
		}
	}
	if got := strings.Join(plan(t, m, strings.ReplaceAll(text, "100+index", "7"))[0].Words(),
		"|"); got != "vf0-1: vlan 7 (is 100-101)" {
		t.Errorf("another VLAN: %q", got)
	}
}
