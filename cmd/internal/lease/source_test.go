package lease

import (
	"context"
	"errors"
	"strings"
	"testing"

	"viaduct/cmd/internal/hostfile"
	"viaduct/internal/host/hosttest"
	"viaduct/sriov"
	"viaduct/vfio/holder"
)

// What nothing can be drawn from is told with what to do about it.
func TestSourceSays(t *testing.T) {
	host := func(numvfs, autoprobe string) *hosttest.Kernel {
		k := hosttest.NewLab(t, nil)
		dir := "sys/bus/pci/devices/" + pf
		if err := errors.Join(k.Write(dir+"/sriov_drivers_autoprobe", autoprobe), k.Write(dir+"/sriov_numvfs", numvfs)); err != nil {
			t.Fatal(err)
		}
		return k
	}
	settings := sriov.Settings{sriov.VLAN: "7"}
	for name, c := range map[string]struct {
		host    *hosttest.Kernel
		from    Source
		says    string
		refused bool
	}{
		"no such word":     {host("0", "1"), Source{From: "x y"}, "the pools are net", false},
		"no such device":   {host("0", "1"), Source{From: "0000:77:00.0"}, "the pools are net", false},
		"a bridge":         {host("0", "1"), Source{From: "0000:00:08.0"}, "bridge", true},
		"no VFs":           {host("0", "1"), Source{From: pf}, "is a PF without VFs", true},
		"VFs of the host":  {host("2", "1"), Source{From: pf}, "all VFs of " + pf + " are on drivers of the host", false},
		"VFs of nobody":    {host("2", "0"), Source{From: pf}, "", false},
		"a VF of the host": {host("2", "1"), Source{From: "0000:01:10.0"}, "", false},
		"several":          {host("0", "1"), Source{From: "1af4:1001"}, "everything that 1af4:1001 names are on drivers of the host", false},
		"more than are":    {host("2", "0"), Source{From: pf, Count: 3}, "3 are wanted", false},
		"not a VF":         {host("0", "1"), Source{From: "0000:07:01.0", Settings: hostfile.Plain(settings)}, "it is not a VF", true},
	} {
		c.from.Count = max(c.from.Count, 1)
		err := on(c.host, func(_ context.Context, m *Manager) error {
			_, err := m.Preview(&Request{Guest: "a", Sources: []Source{c.from}, NoReset: true})
			return err
		})
		if (err == nil) != (c.says == "") || err != nil && !strings.Contains(err.Error(), c.says) || errors.Is(err, holder.ErrRefused) != c.refused {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A lease is where its record and its processes say.
func TestStateOf(t *testing.T) {
	k, _ := poolHost(t)
	if err := lasting(k); err != nil {
		t.Fatal(err)
	}
	made := leaseOf(t, k, "a")
	m := newManager(t, k)
	me := m.self()
	gone := holder.Proc{PID: 99999, Start: 1}
	for name, c := range map[string]struct {
		change func(*Lease)
		want   State
		why    string
	}{
		"ready":                {func(*Lease) {}, Reserved, ""},
		"for good":             {func(l *Lease) { l.Persist, l.TTL = true, 1 }, Reserved, ""},
		"expected":             {func(l *Lease) { l.Moving = Incoming }, Incoming, "is to come"},
		"on its way":           {func(l *Lease) { l.Moving = Leaving }, Leaving, "on its way"},
		"being made":           {func(l *Lease) { l.Ready, l.Maker = false, me }, Making, "is working on it"},
		"its maker has ended":  {func(l *Lease) { l.Ready, l.Maker, l.Persist = false, gone, false }, Dead, "its assignment was interrupted"},
		"after a boot":         {func(l *Lease) { l.Ready, l.Maker, l.Persist = false, gone, true }, Reserved, "restored after the boot"},
		"its end has begun":    {func(l *Lease) { l.Ending, l.Maker = true, gone }, Dead, "its release was interrupted"},
		"its runner runs":      {func(l *Lease) { l.Persist, l.Runner = false, &Holder{Proc: me, Name: "x"} }, Active, ""},
		"its runner has ended": {func(l *Lease) { l.Persist, l.Runner = false, &Holder{Proc: gone, Name: "x"} }, Dead, "x is gone"},
		"its owner runs":       {func(l *Lease) { l.Persist, l.Owner = false, &me }, Reserved, ""},
		"its owner has ended":  {func(l *Lease) { l.Persist, l.Owner = false, &gone }, Dead, "process 99999, with which it ends, is gone"},
		"its user has ended":   {func(l *Lease) { l.Persist, l.Holders = false, []Holder{{Proc: gone, Name: "y"}} }, Dead, "y is gone"},
		"its time is over":     {func(l *Lease) { l.Persist, l.TTL = false, 1 }, Dead, "no process opened its devices"},
		"a device is gone":     {func(l *Lease) { l.Devices[0].Nowhere = true }, Lost, "is gone"},
		"it is another device": {func(l *Lease) { l.Devices[0].ID.Vendor++ }, Lost, "is gone"},
	} {
		l := *made
		l.Devices = append([]Device{}, made.Devices...)
		l.Maker, l.Holders = holder.Proc{}, nil
		c.change(&l)
		if got, why := m.state(&l, nil, 2); got != c.want || !strings.Contains(why, c.why) || (why == "") != (c.why == "") {
			t.Errorf("%s: %s, %q", name, got, why)
		}
	}
}
