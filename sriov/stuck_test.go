package sriov

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"viaduct/internal/host/hosttest"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// A write that does not return is told of as such, and its record stays: nothing is undone beside it, by this command or
// another one, until it has returned; then the next command brings the host to where it was or was to be.
func TestStuck(t *testing.T) {
	vectors := func(ctx context.Context, s *Handle) error {
		_, err := s.SetVF(ctx, parse("0000:01:10.2"), Settings{MSIX: "4", VLAN: "7"})
		return err
	}
	for name, c := range map[string]struct {
		command
		file string // that the write is of
	}{
		"count":          {command{run: makeVFs(alike(1, UseNone))}, "sriov_numvfs"},
		"autoprobe":      {command{run: makeVFs(alike(1, UseNone))}, "sriov_drivers_autoprobe"},
		"driver of a VF": {command{run: makeVFs(alike(1, UseVFIO))}, "drivers_probe"},
		"vectors of new": {command{host: switching, run: makeVFs(everything)}, "sriov_vf_msix_count"},
		"recovery": {command{setup: killed(1, isWrite, makeVFs(alike(1, UseNone))), run: recoverAll},
			"sriov_drivers_autoprobe"},
		"vectors": {command{
			host: switching, setup: func(t *testing.T, k *hosttest.Kernel) { quiet(t, k, makeVFs(everything)) },
			run: vectors,
		}, "sriov_vf_msix_count"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			k := c.prepare(t)
			before := look(t, k)
			let, returned := make(chan struct{}), make(chan struct{})
			waits := func(name string) bool { return strings.HasSuffix(name, c.file) }
			k.Before = func(name, _ string) {
				if waits(name) {
					<-let
				}
			}
			k.After = func(name, _ string) {
				if waits(name) {
					select {
					case <-returned:
					default:
						close(returned)
					}
				}
			}

			s := openWith(t, k, bind.Options{Timeout: 200 * time.Millisecond})
			err := c.run(t.Context(), s)
			if !bind.IsStuck(err) {
				t.Fatalf("told %v", err)
			}
			if keys, err := s.journal.Keys("change-"); len(keys) == 0 || err != nil {
				t.Errorf("while it waits %q are recorded, %v", keys, err)
			}
			if _, err := s.Make(t.Context(), parse(pf), Wish{}, holder.Process); err == nil {
				t.Error("the same command goes on beside it")
			}
			other := openWith(t, k, bind.Options{Timeout: 200 * time.Millisecond})
			if _, err := other.Make(t.Context(), parse(pf), Wish{}); err == nil {
				t.Error("another command goes on beside it")
			}
			other.Close()

			close(let)
			<-returned
			s.Close()
			next := open(t, k)
			if all, err := next.RecoverPatiently(t.Context()); err != nil ||
				slices.ContainsFunc(all, func(r bind.Recovered) bool { return r.Err != nil }) {
				t.Errorf("afterwards: %v, %v", all, err)
			}
			next.Close()
			if now := look(t, k); len(now.changes) > 0 {
				t.Errorf("left %s\nwas %s", now, before)
			}
		})
	}
}
