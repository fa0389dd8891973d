package lease

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"viaduct/cmd/internal/hostfile"
	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// What nothing can be drawn from is told with what to do about it.
func TestSourceSays(t *testing.T) {
	host := func(numvfs, autoprobe string) *hosttest.Kernel {
		k := hosttest.NewLab(t, nil)
		dir := "sys/bus/pci/devices/" + pf
		if err := errors.Join(k.Write(dir+"/sriov_drivers_autoprobe", autoprobe),
			k.Write(dir+"/sriov_numvfs", numvfs)); err != nil {
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
		"no such word":   {host("0", "1"), Source{From: "x y"}, "the pools are net", false},
		"no such device": {host("0", "1"), Source{From: "0000:77:00.0"}, "the pools are net", false},
		"a bridge":       {host("0", "1"), Source{From: "0000:00:08.0"}, "bridge", true},
		"no VFs":         {host("0", "1"), Source{From: pf}, "is a PF without VFs", true},
		"VFs of the host": {host("2", "1"), Source{From: pf},
			"all VFs of " + pf + " are on drivers of the host", false},
		"VFs of nobody":    {host("2", "0"), Source{From: pf}, "", false},
		"a VF of the host": {host("2", "1"), Source{From: "0000:01:10.0"}, "", false},
		"several": {host("0", "1"), Source{From: "1af4:1001"},
			"everything that 1af4:1001 names are on drivers of the host", false},
		"more than are": {host("2", "0"), Source{From: pf, Count: 3}, "3 are wanted", false},
		"no PCI device": {hosttest.NewKernel(t, hosttest.Platform()), Source{From: "0000:00:01.0"},
			"fe000000.dma, in IOMMU group 5, is not a PCI device", true},
		"not a VF": {host("0", "1"), Source{From: "0000:07:01.0", Settings: hostfile.Plain(settings)},
			"it is not a VF", true},
	} {
		c.from.Count = max(c.from.Count, 1)
		err := on(c.host, func(_ context.Context, m *Manager) error {
			_, err := previewed(m, &Request{Guest: "a", Sources: []Source{c.from}, NoReset: true})
			return err
		})
		if (err == nil) != (c.says == "") || err != nil && !strings.Contains(err.Error(), c.says) ||
			errors.Is(err, holder.ErrRefused) != c.refused {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What is declared in protect is assigned to nobody, and nothing is left of it.
func TestProtectedIsNotAssigned(t *testing.T) {
	const card = "0000:07:01.0"
	k := hosttest.NewLab(t, nil)
	m := managerOf(t, k, "pfs: []\nprotect: [\""+card+"\"]\n")
	before := driversOf(t, k, card)
	r := &Request{Guest: "a", Sources: []Source{{From: card, Count: 1}}, NoReset: true}
	if _, _, _, err := m.Assign(t.Context(), r); !errors.Is(err, holder.ErrRefused) ||
		!strings.Contains(err.Error(), "in protect") {
		t.Errorf("assigned: %v", err)
	}
	if l := leaseOf(t, k, "a"); l != nil || !slices.Equal(driversOf(t, k, card), before) {
		t.Errorf("left of it: %+v, %v", l, driversOf(t, k, card))
	}
}

// The processes of a unit are none where it has just gone, and an error where they cannot be read.
func TestUnitPIDs(t *testing.T) {
	const group = "sys/fs/cgroup/system.slice/vm.service"
	k, _ := poolHost(t)
	h := &iommu.Host{Host: k.Host()}
	pids := func(want []int, fails error, what string) {
		t.Helper()
		got, err := UnitPIDs(h, "vm.service")
		if !slices.Equal(got, want) || !errors.Is(err, fails) {
			t.Errorf("%s: %v, %v", what, got, err)
		}
	}
	pids(nil, nil, "there is none")
	if got, err := UnitPIDs(h, ""); got != nil || err != nil {
		t.Errorf("no unit: %v, %v", got, err)
	}
	write(t, k, group+"/cgroup.events", "populated 1\n")
	pids(nil, nil, "it has just gone")
	write(t, k, group+"/cgroup.procs", "600\n0\nx\n601\n")
	pids([]int{600, 0, 601}, nil, "there are two, and one of another PID namespace")
	for _, name := range []string{group + "/cgroup.procs", "sys/fs/cgroup/system.slice", "sys/fs/cgroup"} {
		k.SetFault(func(_, asked string) error {
			if asked == name {
				return unix.EIO
			}
			return nil
		})
		pids(nil, unix.EIO, name+" cannot be read")
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
		"ready":      {func(*Lease) {}, Reserved, ""},
		"for good":   {func(l *Lease) { l.Persist, l.TTL = true, 1 }, Reserved, ""},
		"expected":   {func(l *Lease) { l.Moving = Incoming }, Incoming, "is to come"},
		"on its way": {func(l *Lease) { l.Moving = Leaving }, Leaving, "on its way"},
		"being made": {func(l *Lease) { l.Ready, l.Maker = false, me }, Making, "is working on it"},
		"its maker has ended": {func(l *Lease) { l.Ready, l.Maker, l.Persist = false, gone, false }, Dead,
			"its assignment was interrupted"},
		"after a boot": {func(l *Lease) { l.Ready, l.Maker, l.Persist = false, gone, true }, Reserved,
			"restored after the boot"},
		"its end has begun": {func(l *Lease) { l.Ending, l.Maker = true, gone }, Dead,
			"its release was interrupted"},
		"its runner runs": {func(l *Lease) { l.Persist, l.Runner = false, &Holder{Proc: me, Name: "x"} },
			Active, ""},
		"its runner has ended": {func(l *Lease) { l.Persist, l.Runner = false, &Holder{Proc: gone, Name: "x"} }, Dead,
			"x is gone"},
		"its owner runs": {func(l *Lease) { l.Persist, l.Owner = false, &me }, Reserved, ""},
		"its owner has ended": {func(l *Lease) { l.Persist, l.Owner = false, &gone }, Dead,
			"process 99999, with which it ends, is gone"},
		"its user has ended": {func(l *Lease) { l.Persist, l.Holders = false, []Holder{{Proc: gone, Name: "y"}} },
			Dead, "y is gone"},
		"its time is over":     {func(l *Lease) { l.Persist, l.TTL = false, 1 }, Dead, "no process opened its devices"},
		"a device is gone":     {func(l *Lease) { l.Devices[0].Nowhere = true }, Lost, "is gone"},
		"it is another device": {func(l *Lease) { l.Devices[0].ID.Vendor++ }, Lost, "is gone"},
	} {
		l := *made
		l.Devices = append([]Device{}, made.Devices...)
		l.Maker, l.Holders = holder.Proc{}, nil
		c.change(&l)
		if got, why := m.state(&l, nil, 2); got != c.want || !strings.Contains(why, c.why) ||
			(why == "") != (c.why == "") {
			t.Errorf("%s: %s, %q", name, got, why)
		}
	}
}

// While its guest is elsewhere a VF has the address of before, or one that is no guest's.
func TestParking(t *testing.T) {
	const own = "02:76:00:01:80:01"
	d := Device{LeaseDevice: holder.LeaseDevice{Address: iommu.Address{Bus: 1, Device: 0x10}}, Index: 1}
	for was, want := range map[string][]string{
		"": {noMAC, own}, guestMAC: {noMAC, own}, "52:54:00:00:00:09": {"52:54:00:00:00:09", noMAC, own},
	} {
		d.Before = sriov.Settings{sriov.MAC: was}
		if got := d.parking(guestMAC); !slices.Equal(got, want) {
			t.Errorf("it had %q: %q, want %q", was, got, want)
		}
	}
}

// Who runs a guest is written down, or that fails and is told.
func TestStartedIsWritten(t *testing.T) {
	for n := 0; ; n++ {
		k, _ := poolHost(t)
		k.Process(os.Getpid(), "viaduct")
		book := BookOf(&iommu.Host{Host: k.Host()})
		err := on(k, func(ctx context.Context, m *Manager) error {
			_, _, _, err := m.Assign(ctx, &Request{Guest: "a", Sources: []Source{{From: "net", Count: 1}},
				OwnerPID: os.Getpid()})
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		l := leaseOf(t, k, "a")
		failed := k.FailNth(n, unix.ENOSPC)
		err = book.Started(t.Context(), l, 4711, "qemu")
		k.Revive()
		l = leaseOf(t, k, "a")
		if written := l.Runner != nil && l.Runner.PID == 4711 && l.Owner == nil; written != (err == nil) {
			t.Errorf("%s fails: %v; written %+v", failed(), err, l.Runner)
		}
		if failed() == "" {
			return
		}
	}
}

// A preview says of each device that the guest gets, and of no other, how it is reset afterwards, and refuses what nothing
// can reset.
func TestPreviewOfReset(t *testing.T) {
	const card = "0000:00:03.0" // on the root bus, without a way to reset it
	k, _ := poolHost(t)
	preview := func(k *hosttest.Kernel, r *Request) (resets []string, err error) {
		err = on(k, func(_ context.Context, m *Manager) error {
			steps, err := previewed(m, r)
			for _, line := range bind.Commands(steps) {
				if about, _, found := strings.Cut(line, " is reset afterwards "); found {
					resets = append(resets, strings.TrimPrefix(about, "# "))
				}
			}
			return err
		})
		return resets, err
	}
	got, err := preview(k, &Request{Guest: "a", Sources: []Source{{From: "net", Count: 1,
		Settings: hostfile.Plain(tagged)}}})
	if err != nil || !slices.Equal(got, []string{vf1}) {
		t.Errorf("of a VF: %q, %v", got, err)
	}

	lab := hosttest.NewKernel(t, hosttest.Made(hosttest.PCI{At: card, ID: "8086:10d3", Class: "020000",
		Driver: "e1000e", Group: 5}))
	r := &Request{Guest: "a", Sources: []Source{{From: card, Count: 1}}}
	if got, err := preview(lab, r); !errors.Is(err, holder.ErrRefused) || !strings.Contains(err.Error(), "--no-reset") {
		t.Errorf("of what nothing resets: %q, %v", got, err)
	}
	r.NoReset = true
	if got, err := preview(lab, r); err != nil || !slices.Contains(got, card) {
		t.Errorf("that goes as it is: %q, %v", got, err)
	}
}

// Of what cannot be told whether it is in quarantine, nothing is given to a guest, nor again, nor does a preview say so.
func TestQuarantineUnreadable(t *testing.T) {
	k, _ := poolHost(t)
	m := managerOf(t, k, "pfs: []\n")
	if _, _, _, err := m.Assign(t.Context(), vlan7()); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(k.Dir(), "var/lib/viaduct/quarantine-x.json")
	if err := os.WriteFile(file, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	other := vlan7()
	other.Guest, other.Sources[0].From = "b", pf+"/vf1"
	for _, r := range []*Request{vlan7(), other} {
		if _, _, _, err := m.Assign(t.Context(), r); err == nil || !strings.Contains(err.Error(), "quarantine-x.json") {
			t.Errorf("assigned to %s: %v", r.Guest, err)
		}
		if p, err := m.Preview(r); err == nil || !strings.Contains(err.Error(), "quarantine-x.json") {
			t.Errorf("to be assigned to %s: %+v, %v", r.Guest, p, err)
		}
	}
}
