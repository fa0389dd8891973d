package main

import (
	"strings"
	"testing"
)

// The five hosts that hack/test --long boots have at least thirty different shapes, and all kinds of bridges.
func TestShapes(t *testing.T) {
	shapes := map[string]bool{}
	for seed := range uint64(5) {
		for line := range strings.Lines(host("amd64", seed+1)) {
			if shape, ok := strings.CutPrefix(line, "# "); ok && !strings.HasPrefix(shape, "Made") {
				shapes[strings.TrimSpace(shape)] = true
			}
		}
		if first, again := host("amd64", seed), host("amd64", seed); first != again {
			t.Errorf("seed %d does not make one host", seed)
		}
	}
	if len(shapes) < 30 {
		t.Errorf("%d shapes", len(shapes))
	}
	all := ""
	for s := range shapes {
		all += s + "\n"
	}
	for _, part := range []string{"switch(", "one-slot-switch(", "switch(switch(", "bridge(bridge(", "open-port(",
		"half-open-port(", "igb", "+port(", "{edu+"} {
		if !strings.Contains(all, part) {
			t.Errorf("no %s in\n%s", part, all)
		}
	}
}
