package nearest

import (
	"slices"
	"strings"
	"testing"
)

func TestTo(t *testing.T) {
	for _, c := range []struct {
		word, candidates string
		want             []string
	}{
		{"spoof", "mac vlan spoofchk trust", []string{"spoofchk"}},
		{"lsit", "list show leases", []string{"list"}},
		{"unbnd", "bind unbind undo", []string{"unbind"}},
		{"enp1s1", "enp1s0 enp2s0 eth0", []string{"enp1s0", "enp2s0"}},
		{"xyzzy", "list show", nil},
		{"", "list show", nil},
		{"0000:01:00.7", "0000:01:00.0 0000:01:00.1 0000:41:00.3",
			[]string{"0000:01:00.0", "0000:01:00.1", "0000:41:00.3"}},
		{strings.Repeat("a", 100), "list", nil},
	} {
		if got := To(c.word, strings.Fields(c.candidates)); !slices.Equal(got, c.want) {
			t.Errorf("%q: %q, want %q", c.word, got, c.want)
		}
	}
	if got := Ask("lis", []string{"list", "lisp"}); got != " (did you mean list or lisp?)" {
		t.Errorf("%q", got)
	}
}

func FuzzTo(f *testing.F) {
	f.Add("lsit", "list show")
	f.Fuzz(func(t *testing.T, word, candidates string) {
		all := strings.Fields(candidates)
		for _, name := range To(word, all) {
			if !slices.Contains(all, name) {
				t.Errorf("%q is no candidate", name)
			}
		}
		if distance(word, candidates) != distance(candidates, word) {
			t.Error("farther one way than the other")
		}
	})
}
