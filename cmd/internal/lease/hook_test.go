package lease

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// hook is what libvirt calls for a domain with these devices, which it does not manage.
func hook(k *hosttest.Kernel, name, op, sub string, devices ...string) (out []Certificate, err error) {
	d := &Domain{Name: name}
	for _, text := range devices {
		text, managed := strings.CutSuffix(text, " managed")
		a, err := iommu.ParseAddress(text)
		if err != nil {
			return nil, err
		}
		d.Devices = append(d.Devices, DomainDevice{Address: a, Managed: managed})
	}
	err = on(k, func(ctx context.Context, m *Manager) (err error) {
		sub, extra, _ := strings.Cut(sub, " ")
		out, err = m.Hook(ctx, d, op, sub, extra)
		return err
	})
	return out, err
}

// leaseOf is a guest's lease, nil if it has none.
func leaseOf(t *testing.T, k *hosttest.Kernel, guest string) *Lease {
	t.Helper()
	l, err := BookOf(&iommu.Host{Host: k.Host()}).Get(guest)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// A domain that has what is assigned to it, and only that, starts, and has it scrubbed when it has stopped; the lease
// waits for its next start if it outlives the boot.
func TestHookOfAssigned(t *testing.T) {
	for _, persist := range []bool{true, false} {
		k, _ := poolHost(t)
		err := on(k, func(ctx context.Context, m *Manager) error {
			_, _, _, err := m.Assign(ctx, &Request{Guest: "web", Sources: []Source{{From: vf0, Count: 1}},
				Persist: persist})
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range []struct {
			name    string
			devices []string
		}{
			{"web", nil}, {"web", []string{vf1}}, {"web", []string{vf0 + " managed"}}, {"db", []string{vf0}},
			{"web", []string{vf0, vf1}},
		} {
			for _, op := range []string{"prepare", "start"} {
				if c.name == "web" && len(c.devices) == 2 && op == "prepare" {
					// What it draws from a network is not known then.
					continue
				}
				if _, err := hook(k, c.name, op, "begin", c.devices...); !errors.Is(err, holder.ErrRefused) {
					t.Errorf("%s of %s with %q: %v", op, c.name, c.devices, err)
				}
			}
		}

		for _, part := range []string{"prepare begin", "start begin", "started begin", "reconnect begin",
			"migrate begin"} {
			op, sub, _ := strings.Cut(part, " ")
			if out, err := hook(k, "web", op, sub, vf0); err != nil || len(out) > 0 {
				t.Errorf("%s: %+v, %v", part, out, err)
			}
		}
		if l := leaseOf(t, k, "web"); l == nil || !l.Ready || len(l.Devices) != 1 {
			t.Errorf("started, it has %+v", l)
		}
		out, err := hook(k, "web", "release", "end", vf0)
		if l := leaseOf(t, k, "web"); err != nil || len(out) != 1 || out[0].Result != Clean || (l != nil) != persist ||
			l != nil && l.Ready {
			t.Errorf("stopped: %+v, %v, has %+v", out, err, l)
		}
		if out, err := hook(k, "db", "release", "end", vf1); err != nil || len(out) > 0 {
			t.Errorf("stopped, who had nothing: %+v, %v", out, err)
		}
		if !persist {
			continue
		}
		if _, err := hook(k, "web", "prepare", "begin", vf0); err != nil {
			t.Errorf("started again: %v", err)
		}
		if l := leaseOf(t, k, "web"); l == nil || !l.Ready || driversOf(t, k, vf0)[0] != "vfio-pci/vfio-pci" {
			t.Errorf("started again, it has %+v", l)
		}
	}
}

// A domain that comes from another host starts without the device that is kept for it, which stays without the guest's
// address, and its lease is the move's to end; one with another's device does not come. The lease of a domain that was
// moved by hand ends with its scrub.
func TestHookOfMoved(t *testing.T) {
	k, _ := poolHost(t)
	err := on(k, func(ctx context.Context, m *Manager) error {
		_, _, err := m.Expect(ctx, &Request{Guest: "web", Sources: []Source{{From: vf0, Count: 1}}, Persist: true})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	steps := []string{"migrate begin", "prepare begin", "start begin", "started begin", "release end failed"}
	for _, step := range steps {
		op, sub, _ := strings.Cut(step, " ")
		if out, err := hook(k, "web", op, sub); err != nil || len(out) > 0 {
			t.Errorf("%s of one that comes: %+v, %v", step, out, err)
		}
	}
	if l := leaseOf(t, k, "web"); l == nil || l.Moving != Incoming || !l.Ready || l.Devices[0].Now["mac"] == guestMAC {
		t.Errorf("the lease of one that comes is %+v", l)
	}
	if _, err := hook(k, "db", "migrate", "begin", vf0); !errors.Is(err, holder.ErrRefused) {
		t.Errorf("one comes with what is another's: %v", err)
	}

	set := func(state State) {
		if err := on(k, func(ctx context.Context, m *Manager) error {
			return m.SetMoving(ctx, "web",
				state)
		}); err != nil {
			t.Fatal(err)
		}
	}
	set(Leaving)
	if out, err := hook(k, "web", "release", "end migrated"); err != nil || len(out) > 0 ||
		leaseOf(t, k, "web") == nil {
		t.Errorf("one that viaduct moves is scrubbed by the hook: %+v, %v", out, err)
	}
	set("")
	out, err := hook(k, "web", "release", "end migrated", vf0)
	if err != nil || len(out) != 1 || out[0].Result != Clean || leaseOf(t, k, "web") != nil {
		t.Errorf("one that moved by hand: %+v, %v, has %+v", out, err, leaseOf(t, k, "web"))
	}
}

// What a domain drew from a network that was made of a pool is in a lease from its start to its end.
func TestHookOfDrawn(t *testing.T) {
	k, _ := poolHost(t)
	if _, err := hook(k, "web", "prepare", "begin", vf0); err != nil || leaseOf(t, k, "web") != nil {
		t.Errorf("prepared: %v", err)
	}
	if _, err := hook(k, "web", "start", "begin", vf0+" managed"); !errors.Is(err, holder.ErrRefused) {
		t.Errorf("managed by libvirt: %v", err)
	}
	if _, err := hook(k, "none", "start", "begin"); err != nil || leaseOf(t, k, "none") != nil {
		t.Errorf("without devices: %v", err)
	}
	for range 2 {
		if _, err := hook(k, "web", "start", "begin", vf0); err != nil {
			t.Fatal(err)
		}
		l := leaseOf(t, k, "web")
		if l == nil || !l.Drawn || !l.Ready || len(l.Devices) != 1 || l.Devices[0].Address != at(t, vf0) {
			t.Errorf("started: %+v", l)
		}
	}
	if _, err := hook(k, "db", "start", "begin", vf0); !errors.Is(err, holder.ErrRefused) ||
		leaseOf(t, k, "db") != nil {
		t.Errorf("started with another's: %v", err)
	}
	out, err := hook(k, "web", "release", "end", vf0)
	if err != nil || len(out) != 1 || out[0].Result != Clean || leaseOf(t, k, "web") != nil {
		t.Errorf("stopped: %+v, %v", out, err)
	}

	// What is in quarantine starts nobody.
	if _, err := hook(k, "web", "start", "begin", vf0); err != nil {
		t.Fatal(err)
	}
	k.Fail["sys/bus/pci/devices/"+vf0+"/reset"] = unix.EIO
	if out, err := hook(k, "web", "release", "end", vf0); err == nil || len(out) != 1 ||
		out[0].Result != InQuarantine ||
		!strings.Contains(out[0].Note, "pool net must be made again") {
		t.Errorf("stopped, and not reset: %+v, %v", out, err)
	}
	for _, op := range []string{"prepare", "start"} {
		if _, err := hook(k, "db", op, "begin", vf0); !errors.Is(err, holder.ErrRefused) ||
			!strings.Contains(err.Error(), "quarantine") {
			t.Errorf("%s with what is in quarantine: %v", op, err)
		}
	}
}

// A record that cannot be read makes nothing free, whichever look it is.
func TestUnreadable(t *testing.T) {
	s := &sites[0]
	for _, file := range []string{"run/viaduct/lease-other.json", "var/lib/viaduct/lease-other.json",
		"var/lib/viaduct/quarantine-x.json"} {
		k, _, _ := (&deed{made: true, dead: true}).prepare(t, s)
		name := filepath.Join(k.Dir(), file)
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755),
			os.WriteFile(name, []byte("{"), 0o600)); err != nil {
			t.Fatal(err)
		}

		lease := strings.Contains(file, "lease")
		k.Log = nil
		for what, do := range map[string]func() error{
			"assign": func() error {
				return on(k, func(ctx context.Context, m *Manager) error {
					_, _, _, err := m.Assign(ctx, &Request{Guest: "b", Sources: []Source{{From: "net", Count: 1}}})
					return err
				})
			},
			"preview": func() error {
				return on(k, func(_ context.Context, m *Manager) error {
					_, err := previewed(m, &Request{Guest: "b", Sources: []Source{{From: "net", Count: 1}}})
					return err
				})
			},
			"start": func() error {
				_, err := hook(k, "b", "start", "begin", vf0)
				return err
			},
			"plug": func() error {
				return on(k, func(ctx context.Context, m *Manager) error {
					return m.Plug(ctx, &Port{Domain: "b", Device: at(t, vf0)})
				})
			},
			"reclaim": func() error {
				if !lease {
					return errors.New("it looks at no quarantine")
				}
				return reclaim(k)
			},
			"guests": func() error {
				if !lease {
					return errors.New("they look at no quarantine")
				}
				_, err := BookOf(&iommu.Host{Host: k.Host()}).Guests()
				return err
			},
			"lift": func() error { return lift(k) },
		} {
			if what == "lift" && lease {
				continue
			}
			if err := do(); err == nil {
				t.Errorf("%s with an unreadable %s", what, file)
			}
		}

		if len(k.Log) > 0 || leaseOf(t, k, "b") != nil || leaseOf(t, k, "a") == nil {
			t.Errorf("with an unreadable %s: written %q", file, k.Log)
		}
	}
}

// Dead leases of several guests are reclaimed side by side, and who lives keeps his.
func TestReclaimSeveral(t *testing.T) {
	k := withReset(t)
	k.Process(keeperOfLease, "keeper")
	k.Process(keeperOfLease+1, "other")
	for guest, owner := range map[string]int{"a": keeperOfLease, "b": keeperOfLease, "c": keeperOfLease + 1} {
		m := newManager(t, k)
		r := &Request{Guest: guest, Sources: []Source{{From: "net", Count: 1}}, OwnerPID: owner}
		if _, _, _, err := m.Assign(t.Context(), r); err != nil {
			t.Fatal(err)
		}
		m.handle.Close()
	}
	k.End(keeperOfLease)

	// Somebody is at work on one of them.
	m := newManager(t, k)
	mine, err := m.Book.lockGuest(t.Context(), "b", bind.DefaultTimeout)
	if err != nil {
		t.Fatal(err)
	}
	if f, err := m.Book.lockGuest(t.Context(), "b", time.Millisecond); err == nil ||
		!strings.Contains(err.Error(), "another viaduct has been working") {
		t.Errorf("locked twice: %v, %v", f, err)
	}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := m.Book.lockGuest(over, "b", time.Hour); !errors.Is(err, context.Canceled) {
		t.Errorf("locked by who was interrupted: %v", err)
	}
	out, err := m.Reclaim(t.Context())
	m.handle.Close()
	if err != nil || len(out) != 1 || out[0].Guest != "a" || out[0].Result != Clean {
		t.Errorf("while b is worked on: %+v, %v", out, err)
	}
	mine.Close()
	m = newManager(t, k)
	out, err = m.Reclaim(t.Context())
	m.handle.Close()
	if err != nil || len(out) != 1 || out[0].Guest != "b" {
		t.Errorf("then: %+v, %v", out, err)
	}
	all, err := m.Book.All()
	if err != nil || len(all) != 1 || all[0].Guest != "c" {
		t.Errorf("left are %+v, %v", all, err)
	}

	guests, err := m.Book.Guests()
	if _, has := guests[all[0].Devices[0].Address]; err != nil || len(guests) != 1 || !has {
		t.Errorf("guests' devices: %v, %v", guests, err)
	}
	if _, err := newManager(t, k).Release(t.Context(), "b", 0); err == nil ||
		!strings.Contains(err.Error(), "these guests have one: c") {
		t.Errorf("released again: %v", err)
	}
}

// Nobody but who has made a lease starts its VMM, and only while it is his.
func TestStarted(t *testing.T) {
	k, _ := poolHost(t)
	k.Process(5000, "qemu")
	assign := func(owner int) *Lease {
		t.Helper()
		err := on(k, func(ctx context.Context, m *Manager) error {
			_, _, _, err := m.Assign(ctx, &Request{Guest: "a", Sources: []Source{{From: "net", Count: 1}},
				OwnerPID: owner})
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return leaseOf(t, k, "a")
	}
	h := &iommu.Host{Host: k.Host()}
	started := func(l *Lease) error { return BookOf(h).Started(t.Context(), l, 5000, "qemu") }

	l := assign(5000)
	if err := started(l); err == nil {
		t.Error("by another than its owner")
	}
	l = assign(os.Getpid())
	if err := started(l); err != nil {
		t.Fatal(err)
	}
	now := leaseOf(t, k, "a")
	if now.Runner == nil || now.Runner.PID != 5000 || now.Runner.Name != "process 5000 (qemu)" || now.Owner != nil {
		t.Errorf("started: %+v", now)
	}
	if err := started(l); err == nil {
		t.Error("twice")
	}

	alone := func() error {
		return on(k, func(ctx context.Context, m *Manager) error {
			r := &Request{Guest: "a", Sources: []Source{{From: "net", Count: 1}}, OwnerPID: os.Getpid(),
				Exclusive: true}
			_, _, _, err := m.Assign(ctx, r)
			return err
		})
	}
	if err := alone(); !errors.Is(err, holder.ErrRefused) ||
		!strings.Contains(err.Error(), "it runs: process 5000 (qemu)") {
		t.Errorf("run while it runs: %v", err)
	}
	if err := release(k); !errors.Is(err, holder.ErrRefused) ||
		!strings.Contains(err.Error(), "is run by process 5000") {
		t.Errorf("released while its runner may open it: %v", err)
	}
	k.End(5000)
	if err := alone(); err != nil {
		t.Errorf("run when it has ended: %v", err)
	}
	if err := alone(); !errors.Is(err, holder.ErrRefused) || !strings.Contains(err.Error(), "has its lease") {
		t.Errorf("run while this process has it: %v", err)
	}
	if err := release(k); err != nil {
		t.Fatal(err)
	}
	if err := started(l); err == nil {
		t.Error("after its lease was ended")
	}
}

// A guest whose node somebody has open, whom no record knows, is not run again; nor is one of whom that cannot be seen.
func TestRunWhileOpen(t *testing.T) {
	k, _ := poolHost(t)
	s := &sites[0]
	k.Process(keeperOfLease, "keeper")
	if err := s.assign(t.Context(), k); err != nil {
		t.Fatal(err)
	}

	k.End(keeperOfLease)
	alone := func() error {
		return on(k, func(ctx context.Context, m *Manager) error {
			r := &Request{Guest: "a", Sources: []Source{s.from}, OwnerPID: os.Getpid(), Exclusive: true}
			_, _, _, err := m.Assign(ctx, r)
			return err
		})
	}

	nodes, err := filepath.Glob(filepath.Join(k.Dir(), "sys/bus/pci/devices", vf1, "vfio-dev/*"))
	if err != nil || len(nodes) != 1 {
		t.Fatal(nodes, err)
	}

	k.Process(5001, "qemu", "/dev/vfio/devices/"+filepath.Base(nodes[0]))
	if err := alone(); !errors.Is(err, holder.ErrRefused) || !strings.Contains(err.Error(), "5001") {
		t.Errorf("somebody has it: %v", err)
	}

	k.SetFault(func(op, name string) error {
		if strings.HasPrefix(name, "proc/5001/fd") || op == "readdir" && name == "proc" {
			return unix.EIO
		}
		return nil
	})

	if err := alone(); !errors.Is(err, unix.EIO) {
		t.Errorf("it cannot be seen whether somebody has it: %v", err)
	}

	k.Revive()
	k.End(5001)
	if err := alone(); err != nil {
		t.Errorf("nobody has it: %v", err)
	}
}

// A release waits for a guest that ends in time, and no longer.
func TestReleaseWaits(t *testing.T) {
	type end func(context.Context, *Manager, time.Duration) ([]Certificate, error)
	held := func(k *hosttest.Kernel) error { return sites[0].assign(t.Context(), k) }
	for name, c := range map[string]struct {
		before func(*hosttest.Kernel) error
		end    end
	}{
		"release": {held, func(ctx context.Context, m *Manager, wait time.Duration) ([]Certificate, error) {
			return m.Release(ctx, "a", wait)
		}},
		"rest": {held, func(ctx context.Context, m *Manager, wait time.Duration) ([]Certificate, error) {
			return m.Rest(ctx, "a", wait)
		}},
		"unplug one": {both(plug(t, vf0), plug(t, vf1)),
			func(ctx context.Context, m *Manager, wait time.Duration) ([]Certificate, error) {
				return m.Unplug(ctx, &Port{Domain: "a", Device: at(t, vf1)}, wait)
			}},
	} {
		t.Run(name, func(t *testing.T) { releaseWaits(t, c.before, c.end) })
	}
}

func releaseWaits(t *testing.T, before func(*hosttest.Kernel) error,
	end func(context.Context, *Manager, time.Duration) ([]Certificate, error)) {
	t.Helper()
	k, _ := poolHost(t)
	k.Process(keeperOfLease, "keeper")
	if err := before(k); err != nil {
		t.Fatal(err)
	}

	nodes, _ := filepath.Glob(filepath.Join(k.Dir(), "sys/bus/pci/devices", vf1, "vfio-dev/*"))
	k.Process(1<<29, "qemu", "/dev/vfio/devices/"+filepath.Base(nodes[0]))
	err := on(k, func(ctx context.Context, m *Manager) error {
		_, err := end(ctx, m, 0)
		return err
	})
	if !errors.Is(err, holder.ErrRefused) || !strings.Contains(err.Error(), "--wait 60s") {
		t.Errorf("while it is open: %v", err)
	}

	seen := make(chan bool, 1)
	k.SetFault(func(_, name string) error {
		if strings.HasPrefix(name, "proc/536870912/fd/") {
			select {
			case seen <- true:
			default:
			}
		}
		return nil
	})

	go func() {
		<-seen
		k.End(1 << 29)
	}()

	err = on(k, func(ctx context.Context, m *Manager) error {
		out, err := end(ctx, m, bind.DefaultTimeout)
		if len(out) != 1 || out[0].Result != Clean {
			t.Errorf("%+v", out)
		}
		return err
	})

	if err != nil || slices.Contains(driversOf(t, k, vf1), "vfio-pci/vfio-pci") {
		t.Errorf("%v, on %q", err, driversOf(t, k, vf1))
	}
}

// Who is asked for again may have been used since: what an interrupted release has reset is reset again.
func TestAskedAgainIsUsed(t *testing.T) {
	s := &sites[1]
	k, _ := s.host(t)
	k.Process(keeperOfLease, "keeper")
	if err := s.assign(t.Context(), k); err != nil {
		t.Fatal(err)
	}
	l := leaseOf(t, k, "a")
	for i := range l.Devices {
		l.Devices[i].Clean = true
	}
	l.Ending = true
	if err := errors.Join(BookOf(&iommu.Host{Host: k.Host()}).put(l), s.assign(t.Context(), k)); err != nil {
		t.Fatal(err)
	}
	l = leaseOf(t, k, "a")
	if l.Ending || slices.ContainsFunc(l.Devices, func(d Device) bool { return d.Clean }) {
		t.Errorf("asked for again, it is %+v", l)
	}
}
