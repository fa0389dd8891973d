package sriov

import (
	"context"
	"encoding/json"
	"errors"
	"testing"

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
	refused("not locked", check(plan()), bind.ErrNotLocked)
	if err := s.LockAt(ctx, parse(pf)); err != nil {
		t.Fatal(err)
	}
	done := check(plan())
	if _, err := s.Apply(ctx, done); err != nil {
		t.Fatal(err)
	}
	refused("carried out before", done, ErrUnchecked)

	fewer, err := s.PlanCount(device(t, s, pf), alike(1, UseNone))
	if err != nil || len(fewer.Victims) != 3 {
		t.Fatalf("%+v, %v", fewer, err)
	}
	refused("VFs that go are not locked", check(fewer), bind.ErrNotLocked)

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
	if !errors.As(err, &refused) || len(refused.Holders) != 1 || refused.Holders[0].Kind != holder.Process ||
		refused.Holders[0].PID != 4711 {
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
