package sriov

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"viaduct/iommu"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// What is called in the wrong order changes nothing, and says what comes first.
func TestCallOrder(t *testing.T) {
	k := small(t)
	s := open(t, k)
	ctx := context.Background()
	plan := func() *Plan {
		p, err := s.PlanCount(device(t, s, pf), alike(3, UseNone))
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	check := func(p *Plan) *Plan {
		if err := s.CheckCount(p, nil); err != nil {
			t.Fatal(err)
		}
		return p
	}
	refused := func(what string, p *Plan, want error) {
		t.Helper()
		k.Log = nil
		if _, err := s.Apply(ctx, p); !errors.Is(err, want) || len(k.Log) > 0 {
			t.Errorf("%s: %v, wrote %q", what, err, k.Log)
		}
	}

	refused("a plan from nowhere", &Plan{}, ErrUnchecked)
	refused("not checked", plan(), ErrUnchecked)
	refused("not locked", check(plan()), ErrUnchecked)
	if err := s.LockAt(ctx, parse(pf)); err != nil {
		t.Fatal(err)
	}
	done := check(plan())
	if _, err := s.Apply(ctx, done); err != nil {
		t.Fatal(err)
	}
	refused("carried out before", done, bind.ErrRan)
	twice := *done
	refused("a copy of it", &twice, bind.ErrRan)

	fewer, err := s.PlanCount(device(t, s, pf), alike(1, UseNone))
	if err != nil || len(fewer.Victims) != 3 {
		t.Fatalf("%+v, %v", fewer, err)
	}
	refused("VFs that go are not locked", check(fewer), ErrUnchecked)

	if err := s.Lock(ctx, fewer.Victims); err != nil {
		t.Fatal(err)
	}
	other := open(t, k)
	refused("of another Handle", func() *Plan {
		p, err := other.PlanCount(device(t, other, pf), alike(1, UseNone))
		if err != nil || s.CheckCount(p, nil) == nil {
			t.Errorf("%+v, %v", p, err)
		}
		return p
	}(), ErrUnchecked)
	if err := s.CheckCount(&Plan{}, nil); err == nil {
		t.Error("a plan from nowhere was checked")
	}

	// Whatever is done with the Plan, it is carried out as it was checked, on the VFs that there were.
	victims := fewer.Victims
	fewer.Victims = nil
	check(fewer)
	fewer.Victims = victims
	refused("checked without its VFs", fewer, ErrChanged)
	check(fewer)
	if err := k.Write(pfDir+"/sriov_numvfs", "0"); err != nil {
		t.Fatal(err)
	}
	refused("its VFs have gone", fewer, ErrChanged)
	if err := k.Write(pfDir+"/sriov_numvfs", "3"); err != nil {
		t.Fatal(err)
	}

	k.Log = nil
	if _, err := s.Set(ctx, &SetPlan{}); err == nil {
		t.Error("a SetPlan from nowhere was carried out")
	}
	if err := s.Write(parse(pf), []bind.Step{count(device(t, s, pf), 0)}); !errors.Is(err, bind.ErrNotBegun) {
		t.Errorf("written without a record: %v", err)
	}
	if _, err := s.PlanSets(device(t, s, pf), fewer.Victims, nil); err == nil {
		t.Error("VFs without wishes were planned")
	}
	if len(k.Log) > 0 {
		t.Errorf("wrote %q", k.Log)
	}
}

// Settings are set as they were planned, once, on a VF that is locked, and on no dry run.
func TestCallOrderOfSet(t *testing.T) {
	k := small(t)
	quiet(t, k, makeVFs(alike(2, UseNone)))
	ctx := t.Context()
	refused := func(what string, s *Handle, p *SetPlan, want error) {
		t.Helper()
		before := look(t, k)
		if _, err := s.Set(ctx, p); !errors.Is(err, want) {
			t.Errorf("%s: %v", what, err)
		}
		if now := look(t, k); !now.same(before) || len(now.changes) > 0 {
			t.Errorf("%s: left %s", what, now)
		}
	}
	plan := func(s *Handle) *SetPlan {
		t.Helper()
		p, err := s.PlanSet(device(t, s, pf), device(t, s, vf0), Settings{VLAN: "7"})
		if err != nil {
			t.Fatal(err)
		}
		return p
	}

	dry := openWith(t, k, bind.Options{DryRun: true})
	refused("on a dry run", dry, plan(dry), bind.ErrDryRun)
	s := open(t, k)
	refused("not locked", s, plan(s), bind.ErrNotLocked)
	if err := s.LockAt(ctx, parse(pf)); err != nil {
		t.Fatal(err)
	}
	refused("only its PF is locked", s, plan(s), bind.ErrNotLocked)
	if err := s.LockAt(ctx, parse(vf0)); err != nil {
		t.Fatal(err)
	}
	done := plan(s)
	if _, err := s.Set(ctx, done); err != nil {
		t.Fatal(err)
	}
	refused("carried out before", s, done, bind.ErrRan)

	var not *NotVFError
	if _, err := s.PlanSet(device(t, s, pf), device(t, s, e1000), Settings{VLAN: "7"}); !errors.As(err, &not) {
		t.Errorf("a plan for what is not a VF of it: %v", err)
	}
	if _, err := s.SetVF(ctx, parse(e1000), Settings{VLAN: "7"}); !errors.As(err, &not) {
		t.Errorf("what is not a VF is set: %v", err)
	}
}

// VFs that something else made meanwhile stay, whether somebody uses them or not.
func TestForeignVFs(t *testing.T) {
	for _, when := range []string{"sriov_numvfs", "sriov_drivers_autoprobe"} {
		k := small(t)
		var once atomic.Bool
		k.Before = func(name, _ string) {
			if strings.HasSuffix(name, when) && once.CompareAndSwap(false, true) {
				_ = k.Write(pfDir+"/sriov_numvfs", "2")
			}
		}
		if when != "sriov_numvfs" {
			k.Fail[pfDir+"/"+when] = unix.EACCES
		}
		s := open(t, k)
		_, err := s.Make(context.Background(), parse(pf), alike(3, UseNone))
		k.Before = nil
		if n := len(device(t, s, pf).SRIOV.VFs); err == nil || n != 2 {
			t.Errorf("made before %s: %d VFs, %v", when, n, err)
		}
		if keys, err := s.journal.Keys("change-"); err != nil || len(keys) > 0 {
			t.Errorf("records are left: %q, %v", keys, err)
		}
	}
}

// A recovery that is interrupted, or short of time, takes no VFs away.
func TestInterruptedRecovery(t *testing.T) {
	k := small(t)
	s := open(t, k)
	k.KillAt(6, isWrite)
	_, _ = s.Make(context.Background(), parse(pf), alike(2, UseVFIO))
	s.Close()
	if !k.Revive() {
		t.Fatal("it was not killed")
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	next := open(t, k)
	if _, err := next.Recover(ctx); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if _, err := next.SetVF(ctx, parse(vf0), Settings{VLAN: "7"}); err == nil {
		t.Error("set although it was interrupted")
	}
	if n := len(device(t, next, pf).SRIOV.VFs); n != 2 {
		t.Errorf("%d VFs", n)
	}
	all, err := next.Recover(context.Background())
	if n := len(device(t, next, pf).SRIOV.VFs); err != nil || n != 2 || len(all) == 0 || all[0].Err != nil {
		t.Errorf("%d VFs, %v, %v", n, all, err)
	}
}

// Who uses VFs that are to go is a value, and a plan that was refused for them is not carried out.
func TestRefusedHolders(t *testing.T) {
	k := small(t)
	quiet(t, k, makeVFs(alike(2, UseVFIO)))
	usesNode(t, k, vf0)
	s := open(t, k)
	p, err := s.PlanCount(device(t, s, pf), Wish{})
	if err != nil || s.CheckCount(p, nil) == nil {
		t.Fatalf("%+v, %v", p, err)
	}
	if err := s.LockAt(context.Background(), parse(pf), parse(vf0), p.Victims[1].Address); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Apply(context.Background(), p); !errors.Is(err, ErrUnchecked) {
		t.Errorf("refused, and carried out: %v", err)
	}

	_, err = s.Make(context.Background(), parse(pf), Wish{})
	var refused *holder.RefusedError
	if !errors.As(err, &refused) || len(refused.Holders()) != 1 || refused.Holders()[0].Kind != holder.Process ||
		refused.Holders()[0].PID != 4711 {
		t.Errorf("%+v, %v", refused, err)
	}
}

// The recoverers of the package are its own.
func TestOwnRecoverers(t *testing.T) {
	h := &iommu.Host{Host: small(t).Host()}
	mine := func(context.Context, *bind.Handle, iommu.Address, json.RawMessage) (string, error) { return "", nil }
	for _, name := range []string{opCount, opSet, "take", "give"} {
		s, err := Open(h, bind.Options{Recoverers: map[string]bind.Recoverer{name: mine}})
		if err == nil {
			s.Close()
			t.Errorf("%s was replaced", name)
		}
	}
}
