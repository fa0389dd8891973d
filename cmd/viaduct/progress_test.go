package main

import (
	"errors"
	"testing"

	"viaduct/cmd/internal/terminal"
	"viaduct/vfio/bind"
)

// A PF's progress is one part of the line, from its first event to its last; what is changed by itself is counted.
func TestProgressText(t *testing.T) {
	p := &progress{line: terminal.NewProgress(terminal.Screen{}), pfs: map[string]*pfProgress{}}
	const pf, vf = "0000:01:00.0", "0000:01:10.0"
	for _, c := range []struct {
		event bind.Event
		want  string
	}{
		{bind.Event{Device: pf, Label: "ens1f0", Subject: bind.VFs, From: "0", To: "16", Begins: true},
			"ens1f0 0/16 VFs"},
		{bind.Event{Device: vf, PF: pf, Subject: bind.Settings, Part: true}, "ens1f0 16/16 VFs, 1/16 set"},
		{bind.Event{Device: pf, Subject: bind.VFs, To: "16", Part: true}, "ens1f0 16/16 VFs, 1/16 set"},
		{bind.Event{Device: vf, PF: pf, Subject: bind.Driver, Part: true}, "ens1f0 16/16 VFs, 1/16 set, 1/16 taken"},
		{bind.Event{Device: "0000:02:00.0", Subject: bind.Driver},
			"ens1f0 16/16 VFs, 1/16 set, 1/16 taken; 1 device done"},
		{bind.Event{Device: "0000:02:00.1", Subject: bind.Driver, Err: errors.New("x")},
			"ens1f0 16/16 VFs, 1/16 set, 1/16 taken; 1 device done"},
		{bind.Event{Device: pf, Subject: bind.VFs, To: "16"}, "1 device done"},
	} {
		if p.see(c.event); p.text() != c.want {
			t.Errorf("%+v: %q, want %q", c.event, p.text(), c.want)
		}
	}
}
