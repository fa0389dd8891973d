package lease

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"viaduct/cmd/internal/hostfile"
	"viaduct/internal/host/hosttest"
	"viaduct/internal/journal"
	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// The sweep lets each operation of what is done with leases fail in turn, and holds what is told against what is: see
// sriov's.

// thisPackage is of whose calls each sweep lets each fail.
const thisPackage = "viaduct/cmd/internal/lease"

// site is a host that leases are made on.
type site struct {
	name    string
	host    func(t *testing.T) (*hosttest.Kernel, *hosttest.VFIO)
	devices []string // what the guest gets, and what is kept with it
	from    Source
}

// sites are a VF with settings, and two functions that are reset together and go back to the host.
var sites = []site{
	{name: "VF", host: poolHost, devices: []string{vf1, vf0},
		from: Source{From: "net", Count: 1, Settings: hostfile.Plain(tagged)}},
	{
		name: "pair", devices: []string{"0000:07:01.0", "0000:07:02.0"}, from: Source{From: "0000:07:01.0", Count: 1},
		host: func(t *testing.T) (*hosttest.Kernel, *hosttest.VFIO) {
			k, v, _, _ := pairHost(t)
			return k, v
		},
	},
}

const (
	vf0 = "0000:01:10.0"
	vf1 = "0000:01:10.2"
)

// poolHost has a PF with two VFs, which are a pool.
func poolHost(t *testing.T) (*hosttest.Kernel, *hosttest.VFIO) {
	t.Helper()
	k := hosttest.NewSmallLab(t, "0000:00:05.0", pf)
	dir := "sys/bus/pci/devices/" + pf
	for _, w := range [][2]string{{"sriov_drivers_autoprobe", "0"}, {"sriov_numvfs", "2"}} {
		if err := k.Write(dir+"/"+w[0], w[1]); err != nil {
			t.Fatal(err)
		}
	}
	for _, vf := range []string{vf0, vf1} {
		canReset(t, k, vf)
	}
	return k, nil
}

const poolOfTwo = "pfs:\n  - select: " + pf +
	"\n    count: 2\n    vfs:\n      - {range: 0-1, driver: none, pool: net}\n"

// on does something with a Manager of its own, as a command does.
func on(k *hosttest.Kernel, do func(context.Context, *Manager) error) error {
	return within(context.Background(), k, do)
}

// within is on for a command that may be interrupted.
func within(ctx context.Context, k *hosttest.Kernel, do func(context.Context, *Manager) error) error {
	h := &iommu.Host{Host: k.Host()}
	handle, err := sriov.Open(h, HandleOptions(h))
	if err != nil {
		return err
	}
	defer handle.Close()
	lock := func(ctx context.Context, devices []*iommu.Device) error {
		return Lock(ctx, handle, devices, func([]bind.Recovered) {})
	}
	d, err := hostfile.Parse("host.yaml", []byte(poolOfTwo))
	if err != nil {
		return err
	}
	m, err := New(handle, Options{Declaration: d, Lock: lock})
	if err != nil {
		return err
	}
	return do(ctx, m)
}

const keeperOfLease = 4711

func (s *site) assign(ctx context.Context, k *hosttest.Kernel) error {
	return within(ctx, k, func(ctx context.Context, m *Manager) error {
		r := &Request{Guest: "a", Sources: []Source{s.from}, OwnerPID: keeperOfLease, NodeOwner: "1000"}
		_, _, _, err := m.Assign(ctx, r)
		return err
	})
}

func release(k *hosttest.Kernel) error { return releaseIn(context.Background(), k) }

func releaseIn(ctx context.Context, k *hosttest.Kernel) error {
	return within(ctx, k, func(ctx context.Context, m *Manager) error {
		out, err := m.Release(ctx, "a", 0)
		return errors.Join(err, notClean(out, err))
	})
}

func reclaim(k *hosttest.Kernel) error { return reclaimIn(context.Background(), k) }

func reclaimIn(ctx context.Context, k *hosttest.Kernel) error {
	return within(ctx, k, func(ctx context.Context, m *Manager) error {
		out, err := m.Reclaim(ctx)
		return errors.Join(err, notClean(out, err))
	})
}

// lift frees all that is in quarantine.
func lift(k *hosttest.Kernel) error {
	return on(k, func(ctx context.Context, m *Manager) error {
		all, err := m.Book.Quarantined()
		if err != nil {
			return err
		}
		out, err := m.Lift(ctx, slices.Collect(maps.Values(all)), false)
		return errors.Join(err, notClean(out, err))
	})
}

// notClean is what certificates tell against an end that is told to have gone well.
func notClean(out []Certificate, err error) error {
	var told []error
	for _, c := range out {
		switch {
		case err == nil && c.Result != Clean:
			told = append(told, fmt.Errorf("told as done well: %+v", c))
		case strings.Contains(c.Note, keptMAC):
			told = append(told, errors.New(c.Note))
		}
	}
	return errors.Join(told...)
}

// keptMAC is in the note of a VF whose driver refuses to take an address away, as it may.
const keptMAC = "does not remove the guest's"

// deed is what the sweep runs, on a host where the lease was made before, unless it is made.
type deed struct {
	name string
	made bool
	dead bool
	do   func(context.Context, *site, *hosttest.Kernel) error
}

var deeds = []deed{
	{name: "assign", do: func(ctx context.Context, s *site, k *hosttest.Kernel) error { return s.assign(ctx, k) }},
	{name: "release", made: true, do: func(ctx context.Context, _ *site, k *hosttest.Kernel) error {
		return releaseIn(ctx, k)
	}},
	{name: "reclaim", made: true, dead: true, do: func(ctx context.Context, _ *site, k *hosttest.Kernel) error {
		return reclaimIn(ctx, k)
	}},
}

// world is all that leases change.
type world struct {
	devices     string // their drivers, overrides and settings
	lease       *Lease // the guest's
	quarantined []string
	changes     []string // that are under way
	resets      map[string]int
}

func (w *world) String() string {
	l := "none"
	if w.lease != nil {
		l = fmt.Sprintf("ready %v, ending %v, unmade %v, with %v", w.lease.Ready, w.lease.Ending, w.lease.Unmade, w.has())
	}
	return fmt.Sprintf("%s\nlease: %s; quarantine %q, changes %q, resets %v", w.devices, l, w.quarantined, w.changes,
		w.resets)
}

// has is what the lease says that each VF has.
func (w *world) has() (out []string) {
	if w.lease != nil {
		for _, d := range w.lease.Devices {
			out = append(out, d.Address.String()+" "+d.Now.Text())
		}
	}
	return out
}

// free reports whether nobody has anything any more, and all is as it was.
func (w *world) free(before *world) bool {
	return w.devices == before.devices && w.lease == nil && len(w.changes) == 0 && len(w.quarantined) == 0
}

func (s *site) look(t *testing.T, k *hosttest.Kernel, v *hosttest.VFIO) *world {
	t.Helper()
	h := &iommu.Host{Host: k.Host()}
	w := &world{resets: map[string]int{}}
	w.devices = strings.Join(driversOf(t, k, s.devices...), " ")
	if s.from.From == "net" {
		topology, err := iommu.Scan(h)
		if err != nil {
			t.Fatal(err)
		}
		port, err := sriov.ReadPort(h, find(t, topology, pf))
		if err != nil {
			t.Fatal(err)
		}
		for _, vf := range port.VFs {
			w.devices += ", " + vf.Settings.Text()
		}
	}

	book := BookOf(h)
	var err1, err2, err3 error
	w.lease, err1 = book.Get("a")
	w.changes, err2 = book.Run.Keys(journal.Changing)
	all, err3 := book.Quarantined()
	if err := errors.Join(err1, err2, err3); err != nil {
		t.Fatal(err)
	}
	for _, q := range all {
		w.quarantined = append(w.quarantined, q.Address.String())
	}
	for _, d := range s.devices {
		for _, line := range k.Log {
			if line == "sys/bus/pci/devices/"+d+"/reset=1" && k.Fail["sys/bus/pci/devices/"+d+"/reset"] == nil {
				w.resets[d]++
			}
		}
		if v != nil {
			w.resets[d] += v.Devices[d].Resets
		}
	}
	return w
}

// prepare is a new host as a deed meets it, and what it was before anybody had anything.
func (d *deed) prepare(t *testing.T, s *site) (*hosttest.Kernel, *hosttest.VFIO, *world) {
	t.Helper()
	k, v := s.host(t)
	k.Process(keeperOfLease, "keeper")
	before := s.look(t, k, v)
	if d.made {
		if err := s.assign(t.Context(), k); err != nil {
			t.Fatal(err)
		}
	}
	if d.dead {
		k.End(keeperOfLease)
	}
	return k, v, before
}

// TestFaultSweep: whichever operation fails, or the command is interrupted at, what is told is what is: nothing that a guest had is free without having
// been reset, or is in quarantine; no lease is lost of what is not as before; and the next release brings all back.
func TestFaultSweep(t *testing.T) {
	for _, s := range sites {
		for _, d := range deeds {
			if d.dead && s.from.From != "net" && os.Getenv("VIADUCT_SWEEP") != "all" {
				// It ends as a release does.
				continue
			}
			t.Run(s.name+" "+d.name, func(t *testing.T) {
				t.Parallel()
				k, v, _ := d.prepare(t, &s)
				var err error
				all := k.Operations(func() { err = d.do(t.Context(), &s, k) })
				if err != nil {
					t.Fatal(err)
				}
				after := s.look(t, k, v)
				for _, n := range hosttest.EveryNth(3, hosttest.Sample(all, thisPackage)) {
					d.fault(t, &s, n, context.Canceled, after)
				}
				for _, n := range hosttest.Sample(all, thisPackage) {
					d.fault(t, &s, n, []error{unix.EIO, unix.EACCES, unix.ENOSPC}[n%3], after)
				}
			})
		}
	}
}

func (d *deed) fault(t *testing.T, s *site, n int, fail error, after *world) {
	t.Helper()
	k, v, before := d.prepare(t, s)
	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	failed := k.FailNth(n, fail)
	if errors.Is(fail, context.Canceled) {
		failed = k.InterruptNth(n, interrupt)
	}
	err := d.do(ctx, s, k)
	k.Revive()
	now := s.look(t, k, v)
	wrong := func(format string, a ...any) {
		t.Helper()
		t.Errorf("operation %d (%s) fails with %v: told %v\nis %s\nwas %s\n%s", n, failed(), fail, err, now, before,
			fmt.Sprintf(format, a...))
	}

	switch {
	case err != nil && strings.Contains(err.Error(), keptMAC):
		return
	case err == nil && d.dead && now.lease != nil && now.lease.Ready && now.devices != before.devices:
		// It could not be seen that it is dead.
	case err == nil && (now.devices != after.devices || (now.lease == nil) != (after.lease == nil) ||
		!slices.Equal(now.has(), after.has()) || now.lease != nil && !now.lease.Ready || len(now.changes) > 0 ||
		len(now.quarantined) > 0):
		wrong("it is not done")
	case now.lease == nil && now.devices != before.devices && len(now.changes) == 0 && len(now.quarantined) == 0:
		wrong("nobody knows of it")
	case err != nil && len(now.quarantined) > 0 && !strings.Contains(err.Error(), "quarantine"):
		wrong("the quarantine is not told")
	}
	for _, device := range s.devices {
		if d.made && now.lease == nil && s.hadIt(device) && now.resets[device] == 0 &&
			!slices.Contains(now.quarantined, device) {
			wrong("%s is free, and was not reset", device)
		}
	}

	switch {
	case now.lease != nil:
		if err := release(k); err != nil {
			wrong("released afterwards: %v", err)
		}
	case len(now.quarantined) > 0:
		if err := lift(k); err != nil {
			wrong("lifted afterwards: %v", err)
		}
	case len(now.changes) > 0:
		if err := errors.Join(s.assign(t.Context(), k), release(k)); err != nil {
			wrong("lent afterwards: %v", err)
		}
	}
	if now = s.look(t, k, v); !now.free(before) {
		wrong("and then it is so")
	}
}

// hadIt reports whether the guest has a device of the site.
func (s *site) hadIt(device string) bool { return device != vf0 }

// A look that failed is never "nobody": what a process has open is not reset, whichever operation fails.
func TestFaultOfLook(t *testing.T) {
	for _, s := range sites[:1] {
		for _, d := range deeds[1:] {
			t.Run(s.name+" "+d.name, func(t *testing.T) {
				t.Parallel()
				used := func() (*hosttest.Kernel, *hosttest.VFIO, *world) {
					k, v, _ := d.prepare(t, &s)
					entries, err := os.ReadDir(filepath.Join(k.Dir(), "sys/bus/pci/devices", s.devices[0], "vfio-dev"))
					if err != nil || len(entries) != 1 {
						t.Fatal(entries, err)
					}
					k.Process(4712, "qemu", "/dev/vfio/devices/"+entries[0].Name())
					return k, v, s.look(t, k, v)
				}
				k, _, _ := used()
				var err error
				all := k.Operations(func() { err = d.do(t.Context(), &s, k) })
				if d.name == "release" && !errors.Is(err, holder.ErrRefused) {
					t.Fatal(err)
				}
				for _, n := range hosttest.EveryNth(2, hosttest.Sample(all, thisPackage)) {
					k, v, before := used()
					failed := k.FailNth(n, []error{unix.EIO, unix.EACCES, unix.ENOSPC}[n%3])
					err := d.do(t.Context(), &s, k)
					k.Revive()
					now := s.look(t, k, v)
					if now.devices != before.devices || now.lease == nil || !now.lease.Ready ||
						now.resets[s.devices[0]] > 0 ||
						d.name == "release" && err == nil {
						t.Errorf("operation %d (%s) fails: told %v\nis %s\nwas %s", n, failed(), err, now, before)
					}
				}
			})
		}
	}
}
