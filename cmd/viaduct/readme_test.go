package main

import (
	"os"
	"strings"
	"testing"

	"viaduct/sriov"
	"viaduct/vfio/holder"
)

// README's lists are those of the tables.
func TestREADME(t *testing.T) {
	b, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	for _, kind := range holder.Kinds() {
		if line := "\n- `" + string(kind) + "`: " + kind.Means() + "\n"; !strings.Contains(text, line) {
			t.Errorf("README lacks the line %q", strings.TrimSpace(line))
		}
	}
	for _, key := range sriov.Keys() {
		if !strings.Contains(text, "`"+string(key)+"`") && !strings.Contains(text, string(key)+"=") {
			t.Errorf("README does not name the setting %s", key)
		}
	}
}
