package lease_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/cmd/lease"
	"viaduct/internal/host/hosttest"
	"viaduct/internal/journal"
	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

const (
	pf  = "0000:01:00.0"
	vf0 = "0000:01:10.0"
	vf1 = "0000:01:10.2"
)

// newKernel is a host whose PF has two VFs, which are declared as a pool, and a NIC that is declared to be taken.
func newKernel(t *testing.T) *hosttest.Kernel {
	t.Helper()
	k := hosttest.NewLab(t, nil)
	k.ResetVFs = true
	for _, w := range [][2]string{{"sriov_drivers_autoprobe", "0"}, {"sriov_numvfs", "2"}} {
		if err := k.Write("sys/bus/pci/devices/"+pf+"/"+w[0], w[1]); err != nil {
			t.Fatal(err)
		}
	}
	declare(t, k, "pfs:\n  - select: "+pf+"\n    count: 2\n    vfs:\n      - {driver: none, pool: net}\n"+
		"devices:\n  - select: 0000:06:00.0\nprotect:\n  - 0000:09:00.0\n")
	return k
}

func declare(t *testing.T, k *hosttest.Kernel, text string) {
	t.Helper()
	file := filepath.Join(k.Dir(), "etc/viaduct/host.yaml")
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// open opens the books as one piece of work does.
func open(t *testing.T, k *hosttest.Kernel) *lease.Books {
	t.Helper()
	b, err := lease.Open(&iommu.Host{Host: k.Host()}, lease.Options{Tell: func(note string) { t.Log(note) }})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// assign is one piece of work.
func assign(t *testing.T, k *hosttest.Kernel, r lease.Request) (lease.Lease, bool, error) {
	t.Helper()
	b := open(t, k)
	defer b.Close()
	return b.Assign(context.Background(), r)
}

func one(guest, from string) lease.Request {
	return lease.Request{Guest: guest, For: "pod default/" + guest, Sources: []lease.Source{{From: from}},
		Persist: true}
}

func driver(t *testing.T, k *hosttest.Kernel, address string) string {
	t.Helper()
	a, err := iommu.ParseAddress(address)
	if err != nil {
		t.Fatal(err)
	}
	name, err := iommu.ReadDriver(&iommu.Host{Host: k.Host()}, a)
	if err != nil {
		t.Fatal(err)
	}
	return name
}

// A guest gets what it names and nobody else does, asked again it has the same, and released the device is as it was.
func TestAssignAndRelease(t *testing.T) {
	k := newKernel(t)
	l, fresh, err := assign(t, k, one("a", vf0))
	if err != nil || !fresh || len(l.Devices) != 1 || l.Devices[0].Address.String() != vf0 ||
		driver(t, k, vf0) != "vfio-pci" {
		t.Fatalf("%+v, %v, %v, on %q", l, fresh, err, driver(t, k, vf0))
	}
	if again, fresh, err := assign(t, k, one("a", vf0)); err != nil || fresh || !again.Has(l.Devices[0].Address) {
		t.Errorf("asked again: %+v, %v, %v", again, fresh, err)
	}
	if _, _, err := assign(t, k, one("a", vf1)); !errors.Is(err, holder.ErrRefused) {
		t.Errorf("asked for another: %v", err)
	}
	if l, _, err := assign(t, k, one("b", vf0)); err == nil {
		t.Errorf("another guest: %+v", l)
	}

	b := open(t, k)
	all, err := b.Leases()
	if err != nil || len(all) != 1 || all[0].Guest != "a" || all[0].For != "pod default/a" ||
		all[0].State != "reserved" ||
		!slices.Equal(all[0].From, []string{vf0}) {
		t.Errorf("leases %+v, %v", all, err)
	}
	d, err := b.Topology().Find(l.Devices[0].Address)
	if err != nil {
		t.Fatal(err)
	}
	held, err := holder.Leases(&iommu.Host{Host: k.Host()}, []*iommu.Device{d})
	if err != nil || len(held) != 1 || !strings.Contains(held[0].What, `guest "a" (pod default/a)`) {
		t.Errorf("who holds it: %+v, %v", held, err)
	}
	done, err := b.Release(context.Background(), "a", 0)
	b.Close()
	if err != nil || len(done) != 1 || !done[0].Clean || done[0].Address.String() != vf0 || driver(t, k, vf0) != "" {
		t.Errorf("released: %+v, %v, on %q", done, err, driver(t, k, vf0))
	}
	b = open(t, k)
	defer b.Close()
	if _, err := b.Release(context.Background(), "a", 0); !errors.Is(err, lease.ErrNoLease) {
		t.Errorf("released again: %v", err)
	}
}

// What fails leaves the devices as they were, also those of the same request that had worked, and no lease.
func TestAssignAllOrNothing(t *testing.T) {
	k := newKernel(t)
	k.Probe[vf1] = errors.New("no")
	r := one("a", vf0)
	r.Sources = append(r.Sources, lease.Source{From: vf1})
	if l, _, err := assign(t, k, r); err == nil {
		t.Fatalf("assigned %+v", l)
	}
	b := open(t, k)
	defer b.Close()
	if all, err := b.Leases(); err != nil || len(all) > 0 || driver(t, k, vf0) != "" || driver(t, k, vf1) != "" {
		t.Errorf("afterwards: %+v, %v, on %q and %q", all, err, driver(t, k, vf0), driver(t, k, vf1))
	}
}

// A lease that outlives the boot is made again when its guest asks again.
func TestAssignAfterBoot(t *testing.T) {
	k := newKernel(t)
	if _, _, err := assign(t, k, one("a", vf0)); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(k.Dir(), journal.Dir)); err != nil {
		t.Fatal(err)
	}
	b := open(t, k)
	all, err := b.Leases()
	b.Close()
	if err != nil || len(all) != 1 || len(all[0].Devices) != 1 {
		t.Fatalf("after the boot: %+v, %v", all, err)
	}
	if l, fresh, err := assign(t, k, one("a", vf0)); err != nil || fresh || len(l.Devices) != 1 {
		t.Errorf("asked again: %+v, %v, %v", l, fresh, err)
	}
}

// Pools are those of the declaration, and what is declared to be taken is in none.
func TestPools(t *testing.T) {
	k := newKernel(t)
	b := open(t, k)
	defer b.Close()
	var got []string
	for _, p := range b.Pools() {
		for _, d := range p.Devices {
			got = append(got, p.Name+" "+d.Name)
		}
	}
	if want := []string{"net " + vf0, "net " + vf1, " 0000:06:00.0"}; !slices.Equal(got, want) {
		t.Errorf("pools %q, want %q", got, want)
	}
	for address, refused := range map[string]bool{"0000:09:00.0": true, vf0: false} {
		a, _ := iommu.ParseAddress(address)
		d, err := b.Topology().Find(a)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Protected(d); (err != nil) != refused {
			t.Errorf("%s is protected: %v", address, err)
		}
	}
}

// A declaration that cannot be read stops what makes leases, and not what ends them.
func TestBrokenDeclaration(t *testing.T) {
	k := newKernel(t)
	if _, _, err := assign(t, k, one("a", vf0)); err != nil {
		t.Fatal(err)
	}
	declare(t, k, "pfs: 3\n")
	h := &iommu.Host{Host: k.Host()}
	if b, err := lease.Open(h, lease.Options{}); err == nil {
		b.Close()
		t.Error("opened")
	}
	b, err := lease.OpenToRelease(h, lease.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if done, err := b.Release(context.Background(), "a", 0); err != nil || len(done) != 1 || !done[0].Clean {
		t.Errorf("released: %+v, %v", done, err)
	}
}

// What is told while work is done are sentences for the user: what was left undone before, and what is in force.
func TestTells(t *testing.T) {
	k := newKernel(t)
	var told []string
	with := func(open func(*iommu.Host, lease.Options) (*lease.Books, error), do func(*lease.Books) error) error {
		told = nil
		b, err := open(&iommu.Host{Host: k.Host()},
			lease.Options{Tell: func(note string) { told = append(told, note) }})
		if err != nil {
			return err
		}
		defer b.Close()
		return do(b)
	}
	ask := func(b *lease.Books) error {
		_, _, err := b.Assign(context.Background(), one("a", vf0))
		return err
	}
	says := func(what string) {
		t.Helper()
		if text := strings.Join(told, "\n"); !strings.Contains(text, what) || slices.Contains(told, "") {
			t.Errorf("%q is not told: %q", what, told)
		}
	}

	if err := with(lease.Open, ask); err != nil || len(told) != 1 {
		t.Errorf("of a new lease: %v, told %q", err, told)
	}
	says("no MAC address")
	declare(t, k, "pfs: 3\n")
	if err := with(lease.OpenToRelease, func(b *lease.Books) error {
		ended, err := b.Ended("a")
		if ended {
			t.Error("it has ended")
		}
		_, err2 := b.Release(context.Background(), "a", 0)
		return errors.Join(err, err2)
	}); err != nil {
		t.Error(err)
	}
	says("host.yaml")

	// What a killed one left is finished or undone by the next, which tells so.
	k = newKernel(t)
	k.KillAt(1, func(op, _ string) bool { return op == "write" })
	_ = with(lease.Open, ask)
	if !k.Revive() {
		t.Fatal("it was not killed")
	}
	if err := with(lease.Open, ask); err != nil {
		t.Error(err)
	}
	if !slices.ContainsFunc(told, func(s string) bool {
		return strings.HasPrefix(s, vf0+" ") &&
			!strings.Contains(s, "MAC")
	}) {
		t.Errorf("what was left is not told: %q", told)
	}
	if err := with(lease.OpenToRelease, func(b *lease.Books) error {
		_, err := b.Release(context.Background(), "a", 0)
		ended, err2 := b.Ended("a")
		if !ended {
			t.Error("it has not ended")
		}
		return errors.Join(err, err2)
	}); err != nil {
		t.Error(err)
	}
}

// What cannot be cleaned is in quarantine: the certificate, the error and the books say so, and nobody gets it.
func TestIntoQuarantine(t *testing.T) {
	k := newKernel(t)
	if _, _, err := assign(t, k, one("a", vf0)); err != nil {
		t.Fatal(err)
	}
	k.Fail["sys/bus/pci/devices/"+vf0+"/reset"] = errors.New("no")
	b := open(t, k)
	done, err := b.Release(context.Background(), "a", 0)
	b.Close()
	if err == nil || len(done) != 1 || done[0].Clean || !done[0].Quarantine || done[0].Why == "" {
		t.Fatalf("%+v, %v", done, err)
	}
	b = open(t, k)
	defer b.Close()
	d, err := b.Topology().Find(done[0].Address)
	if err != nil || b.Quarantined(d) == "" {
		t.Errorf("it is not in quarantine: %v", err)
	}
	if ended, err := b.Ended("a"); err != nil || !ended {
		t.Errorf("its lease has ended: %v, %v", ended, err)
	}
	if l, _, err := b.Assign(context.Background(), one("b", vf0)); err == nil {
		t.Errorf("given to the next: %+v", l)
	}
}

// Whichever operation fails, what is asked for ends with an error, or is as it is otherwise.
func TestFaultSweep(t *testing.T) {
	type seen struct {
		leases, pools string
		clean, ended  bool
	}
	for name, do := range map[string]func(*lease.Books, *seen) error{
		"look": func(b *lease.Books, s *seen) error {
			all, err := b.Leases()
			s.leases = fmt.Sprintf("%+v", all)
			for _, p := range b.Pools() {
				s.pools += p.Name
				for _, d := range p.Devices {
					s.pools += " " + d.Name
				}
				err = errors.Join(err, p.Err)
			}
			return err
		},
		"assign": func(b *lease.Books, s *seen) error {
			l, _, err := b.Assign(context.Background(), one("a", vf0))
			s.leases = fmt.Sprintf("%+v", l)
			return err
		},
		"release": func(b *lease.Books, s *seen) error {
			done, err := b.Release(context.Background(), "a", 0)
			s.clean = len(done) == 1 && done[0].Clean
			return err
		},
		"ended": func(b *lease.Books, s *seen) (err error) {
			s.ended, err = b.Ended("a")
			return err
		},
	} {
		prepare := func() *hosttest.Kernel {
			k := newKernel(t)
			if _, _, err := assign(t, k, one("a", vf0)); err != nil {
				t.Fatal(err)
			}
			return k
		}
		run := func(k *hosttest.Kernel) (s seen, err error) {
			b, err := lease.Open(&iommu.Host{Host: k.Host()}, lease.Options{})
			if err != nil {
				return s, err
			}
			defer b.Close()
			return s, do(b, &s)
		}
		k := prepare()
		var want seen
		var err error
		all := k.Operations(func() { want, err = run(k) })
		if err != nil {
			t.Fatal(name, err)
		}
		for _, n := range hosttest.EveryNth(2, hosttest.Sample(all)) {
			k := prepare()
			failed := k.FailNth(n, unix.EIO)
			got, err := run(k)
			k.Revive()
			if err == nil && got != want {
				t.Errorf("%s: operation %d (%s) fails, and it came to %+v, not %+v", name, n, failed(), got, want)
			}
		}
	}
}

// What another program works on is waited for, for a time, and then not given.
func TestLocked(t *testing.T) {
	k := newKernel(t)
	other, err := sriov.Open(&iommu.Host{Host: k.Host()}, bind.Options{})
	if err != nil {
		t.Fatal(err)
	}
	b, err := lease.Open(&iommu.Host{Host: k.Host()}, lease.Options{Timeout: 20 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	a, err := iommu.ParseAddress(vf0)
	if err != nil {
		t.Fatal(err)
	}
	d, err := b.Topology().Find(a)
	if err == nil {
		err = other.Lock(context.Background(), []*iommu.Device{d})
	}
	if err != nil {
		t.Fatal(err)
	}
	if l, _, err := b.Assign(context.Background(), one("a", vf0)); err == nil {
		t.Errorf("while it is locked: %+v", l)
	}
	other.Close()
	if _, _, err := assign(t, k, one("a", vf0)); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// What cannot be locked at all is not assigned, and that is said.
func TestNoLocks(t *testing.T) {
	for _, lock := range []string{"lock", "lock-leases"} {
		k := newKernel(t)
		file := filepath.Join(k.Dir(), "run/viaduct", lock)
		if err := errors.Join(os.RemoveAll(file), os.MkdirAll(file, 0o755)); err != nil {
			t.Fatal(err)
		}
		k.Log = nil
		if l, _, err := assign(t, k, one("a", vf0)); !errors.Is(err, unix.EISDIR) || len(k.Log) > 0 {
			t.Errorf("without %s: %+v, %v, written %q", lock, l, err, k.Log)
		}
	}
}
