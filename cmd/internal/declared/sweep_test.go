package declared

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

	"viaduct/cmd/internal/hostfile"
	"viaduct/internal/host/hosttest"
	"viaduct/internal/journal"
	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/bind"
)

// The sweep lets each operation of what is done with a declared host fail in turn, and holds what is told against what
// is: see sriov's.

// thisPackage is of whose calls each sweep lets each fail.
const thisPackage = "viaduct/cmd/internal/declared"

const (
	nic    = "0000:07:01.0" // shares its group with
	beside = "0000:07:02.0" // which has no driver
)

// sweptHost has a PF, and a NIC to be taken.
func sweptHost(t *testing.T) *hosttest.Kernel {
	t.Helper()
	k := hosttest.NewSmallLab(t, "0000:00:05.0", pf, "0000:00:08.0", nic, beside)
	bootID(t, k, "this")
	return k
}

const (
	few  = "pfs:\n  - select: " + pf + "\n    count: 2\n    vfs: [{range: 0-1, driver: none}]\n"
	many = "pfs:\n  - select: " + pf +
		"\n    count: 2\n    vfs:\n      - {range: 0, driver: vfio, vlan: 7, trust: on}\n" +
		"      - {range: 1, driver: home}\ndevices:\n  - select: " + nic + "\n    node_owner: \"1000\"\n"
)

// with does something with a Manager of its own, as a command does, once what an interrupted one left is put back.
func with(k *hosttest.Kernel, o Options, do func(context.Context, *Manager) error) error {
	ctx := context.Background()
	s, err := sriov.Open(&iommu.Host{Host: k.Host()}, bind.Options{})
	if err != nil {
		return err
	}
	defer s.Close()
	recovered, err := s.Recover(ctx)
	if err != nil {
		return err
	}
	m, err := New(s, o)
	if err != nil {
		return err
	}
	more, err := m.Recover()
	for _, r := range append(recovered, more...) {
		err = errors.Join(err, r.Err)
	}
	if err != nil {
		return err
	}
	if m.topology, err = s.Scan(); err != nil {
		return err
	}
	return do(ctx, m)
}

// applyAll applies a declaration as the command does.
func applyAll(k *hosttest.Kernel, text string) error { return applyIn(context.Background(), k, text) }

func applyIn(ctx context.Context, k *hosttest.Kernel, text string) error {
	s, err := hostfile.Parse("host.yaml", []byte(text))
	if err != nil {
		return err
	}

	return with(k, Options{}, func(_ context.Context, m *Manager) error {
		items, err := m.Plan(s)
		if err != nil {
			return err
		}
		for _, i := range items {
			if err := m.handle.Lock(ctx, i.Devices()); err != nil {
				return err
			}
		}
		m.Check(items)
		for _, i := range items {
			if i.Err != nil {
				return i.Err
			}
		}
		if err := m.Starts(false); err != nil {
			return err
		}
		err = m.Apply(ctx, items, func(*Item, error) {})
		if err = errors.Join(err, m.Remember(items)); err == nil {
			err = m.Ended(s)
		}
		return err
	})
}

// undoAll undoes what was applied last as the command does.
func undoAll(k *hosttest.Kernel) error { return undoTelling(k, func(iommu.Address, error) {}) }

func undoTelling(k *hosttest.Kernel, tell func(iommu.Address, error)) error {
	return with(k, Options{}, func(ctx context.Context, m *Manager) error {
		all, known, err := m.Last()
		if err != nil || !known {
			return err
		}
		var devices []*iommu.Device
		for _, a := range all {
			if d, err := m.topology.Find(a); err == nil {
				devices = append(append(devices, d), m.topology.VFs(d)...)
			}
		}
		if err := m.handle.Lock(ctx, devices); err != nil {
			return err
		}
		if err := m.Undone(); err != nil {
			return err
		}
		return m.Undo(tell)
	})
}

// declaredWorld is all that these change.
type declaredWorld struct {
	pf, nic string   // as they are
	left    []string // records of what is under way
	undo    bool     // there is something to undo
}

func (w *declaredWorld) String() string {
	return fmt.Sprintf("%s\n%s\nrecords %q, to undo %v", w.pf, w.nic, w.left, w.undo)
}

func lookAt(t *testing.T, k *hosttest.Kernel) *declaredWorld {
	t.Helper()
	m := newManager(t, k, Options{})
	defer m.handle.Close()
	w := &declaredWorld{}
	port, err := sriov.ReadPort(m.host, found(t, m))
	if err != nil {
		t.Fatal(err)
	}

	w.pf = state(t, k)
	for _, vf := range port.VFs {
		w.pf += ", " + vf.Settings.Text()
	}

	for _, name := range []string{nic, beside} {
		d, err := iommu.ReadDevice(m.host, mustParse(t, name))
		if err != nil {
			t.Fatal(err)
		}
		w.nic += d.Driver + "/" + d.DriverOverride + " "
	}

	for _, prefix := range []string{journal.Changing, applying} {
		keys, err := m.run.Keys(prefix)
		if err != nil {
			t.Fatal(err)
		}
		w.left = append(w.left, keys...)
	}

	_, w.undo, err = m.Last()
	if err != nil {
		t.Fatal(err)
	}

	return w
}

// same reports whether PF and device are each as in one of two worlds.
func (w *declaredWorld) same(a, b *declaredWorld) bool {
	return (w.pf == a.pf || w.pf == b.pf) && (w.nic == a.nic || w.nic == b.nic)
}

var failures = []error{unix.EIO, unix.EACCES, unix.ENOSPC}

// TestFaultSweep: whichever operation fails, what is told is what is; what fails is put back as it was, now or by the
// next command; and what was changed can be undone.
func TestFaultSweep(t *testing.T) {
	for name, first := range map[string]string{"apply": "", "apply over another": few} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			prepare := func() (*hosttest.Kernel, *declaredWorld) {
				k := sweptHost(t)
				if first != "" {
					err := errors.Join(applyAll(k, first), Of(&iommu.Host{Host: k.Host()}).Clean()) // it is long ago
					if err != nil {
						t.Fatal(err)
					}
				}
				return k, lookAt(t, k)
			}
			k, _ := prepare()
			var err error
			all := k.Operations(func() { err = applyAll(k, many) })
			if err != nil {
				t.Fatal(err)
			}
			after := lookAt(t, k)
			sample := hosttest.Sample(all, thisPackage)
			if first != "" {
				sample = hosttest.EveryNth(3, sample)
			}
			for _, n := range sample {
				k, before := prepare()
				failed := k.FailNth(n, failures[n%3])
				err := applyAll(k, many)
				k.Revive()
				applyFailed(t, k, before, after, err, fmt.Sprintf("operation %d (%s) fails with %v", n, failed(),
					failures[n%3]))
			}
		})
	}
}

func applyFailed(t *testing.T, k *hosttest.Kernel, before, after *declaredWorld, err error, what string) {
	t.Helper()
	now := lookAt(t, k)
	wrong := func(why string, a ...any) {
		t.Helper()
		t.Errorf("%s: told %v\nis %s\nwas %s\nto be %s\n%s", what, err, now, before, after, fmt.Sprintf(why, a...))
	}
	switch {
	case err == nil && (!now.same(after, after) || len(now.left) > 0):
		wrong("it is not done")
	case err != nil && !now.same(before, after) && len(now.left) == 0 &&
		!strings.Contains(err.Error(), "could not be put back"):
		wrong("nobody knows of it")
	case !now.same(before, before) && !now.undo:
		wrong("it cannot be undone")
	}
	if err := undoAll(k); err != nil {
		wrong("undone afterwards: %v", err)
		return
	}
	if now = lookAt(t, k); !now.same(before, before) || len(now.left) > 0 {
		wrong("and then it is so")
	}
}

// TestFaultOfUndo: an undo of which something fails says so, and can be done again.
func TestFaultOfUndo(t *testing.T) {
	t.Parallel()
	prepare := func() (*hosttest.Kernel, *declaredWorld) {
		k := sweptHost(t)
		if err := applyAll(k, few); err != nil {
			t.Fatal(err)
		}
		before := lookAt(t, k)
		if err := applyAll(k, many); err != nil {
			t.Fatal(err)
		}
		return k, before
	}

	k, _ := prepare()
	var err error
	all := k.Operations(func() { err = undoAll(k) })
	if err != nil {
		t.Fatal(err)
	}

	for _, n := range hosttest.EveryNth(3, hosttest.Sample(all, thisPackage)) {
		k, before := prepare()
		failed := k.FailNth(n, failures[n%3])
		err := undoAll(k)
		k.Revive()
		now := lookAt(t, k)
		held, heldErr := Of(&iommu.Host{Host: k.Host()}).Held()
		if err == nil && (!now.same(before, before) || now.undo || len(now.left) > 0 || !held || heldErr != nil) ||
			err != nil && !now.undo && !now.same(before, before) {
			t.Errorf("operation %d (%s) fails: told %v\nis %s\nwas %s", n, failed(), err, now, before)
		}
		if err := undoAll(k); err != nil {
			t.Errorf("operation %d (%s) fails: undone again: %v", n, failed(), err)
		}
		if now := lookAt(t, k); !now.same(before, before) || now.undo || len(now.left) > 0 {
			t.Errorf("operation %d (%s) fails, and undone again it\nis %s\nwas %s", n, failed(), now, before)
		}
	}
}

// TestFaultOfConfirm: what is told of the declaration in force is what the next command goes by, whatever fails.
func TestFaultOfConfirm(t *testing.T) {
	for name, c := range map[string]struct {
		do   func(m *Manager, token string) error
		from int // the version in force before
		to   int
	}{
		"confirm": {func(m *Manager, _ string) error {
			_, err := m.Confirm()
			return err
		}, 2, 9},
		"rolled back": {func(m *Manager, token string) error { return m.RolledBack(token) }, 2, 1},
		"undone":      {func(m *Manager, _ string) error { return m.Undone() }, 2, 1},
		"another begins": {func(m *Manager, _ string) error {
			return m.Starts(false)
		}, 2, 9},
		"another is tried": {func(m *Manager, _ string) error {
			_, _, err := m.Tries(version(3), time.Hour, false)
			return err
		}, 2, 3},
		"extended": {func(m *Manager, token string) error {
			waits, err := m.Extend(token, time.Hour)
			if err == nil && !waits {
				err = errors.New("it does not wait")
			}
			return err
		}, 2, 2},
		"asked": {func(m *Manager, token string) error {
			use, err := m.InForce(version(9), nil)
			if err == nil && versionOf(use.Host) != 2 {
				err = fmt.Errorf("version %d", versionOf(use.Host))
			}
			if due, err := m.Due(token); due || err != nil {
				return errors.Join(err, fmt.Errorf("due %v", due))
			}
			if late, _, _, err := m.AwaitConfirmed(); late || err != nil {
				return errors.Join(err, fmt.Errorf("late %v", late))
			}
			return err
		}, 2, 2},
	} {
		prepare := func() (*hosttest.Kernel, *Manager, string) {
			k := hosttest.NewSmallLab(t, "0000:00:05.0", pf)
			bootID(t, k, "this")
			m := Of(&iommu.Host{Host: k.Host()})
			err := errors.Join(m.Starts(false), m.Ended(version(1)))
			token, _, err2 := m.Tries(version(2), time.Hour, false)
			if err := errors.Join(err, err2); err != nil {
				t.Fatal(err)
			}
			if name == "asked" {
				// So that nothing is waited for.
				if _, err := m.Confirm(); err != nil {
					t.Fatal(err)
				}
				if err := m.change(func(r *inForce, _ moment) error {
					r.Trial = &trial{Declared: version(2), Token: token, Boot: "another"}
					r.Confirmed = version(2)
					return nil
				}); err != nil {
					t.Fatal(err)
				}
			}
			return k, m, token
		}

		for n := 0; ; n++ {
			k, m, token := prepare()
			failed := k.FailNth(n, failures[n%3])
			err := c.do(m, token)
			k.Revive()
			if failed() == "" {
				if err != nil {
					t.Errorf("%s: %v", name, err)
				}
				break
			}
			use, err2 := m.InForce(version(9), nil)
			if err2 != nil {
				t.Fatal(err2)
			}
			got := versionOf(use.Host)
			if err == nil && got != c.to || got != c.from && got != c.to {
				t.Errorf("%s: %s fails: told %v, and version %d is in force", name, failed(), err, got)
			}
		}
	}
}

// bootID has a host tell which boot this is.
func bootID(t *testing.T, k *hosttest.Kernel, id string) {
	t.Helper()
	file := filepath.Join(k.Dir(), "proc/sys/kernel/random/boot_id")
	if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755),
		os.WriteFile(file, []byte(id+"\n"), 0o600)); err != nil {
		t.Fatal(err)
	}
}

// An unreadable lease may be any device's: nothing is planned, and nothing applied or put back, by what is declared.
func TestUnreadableLease(t *testing.T) {
	k := sweptHost(t)
	broken := errors.New("lease-a.json: unexpected end of JSON input")
	o := Options{Leased: func() (map[iommu.Address]Guest, error) { return nil, broken }}
	if err := applyAll(k, few); err != nil {
		t.Fatal(err)
	}
	m := newManager(t, k, o)
	k.Log = nil
	s := parse(t, many)
	if _, err := m.Plan(s); !errors.Is(err, broken) {
		t.Errorf("planned: %v", err)
	}
	s.Devices[0].Initramfs = true
	if _, err := m.Initramfs(s); !errors.Is(err, broken) {
		t.Errorf("for the initramfs: %v", err)
	}
	items := plan(t, newManager(t, k, Options{}), many)
	var told error
	_ = m.Apply(t.Context(), slices.DeleteFunc(items, func(i *Item) bool { return i.unit != nil }),
		func(_ *Item, err error) { told = err })
	if !errors.Is(told, broken) {
		t.Errorf("applied: %v", told)
	}
	if err := m.Undo(func(iommu.Address, error) {}); !errors.Is(err, broken) {
		t.Errorf("undone: %v", err)
	}
	if len(k.Log) > 0 {
		t.Errorf("written: %q", k.Log)
	}
}

// That the host has no driver for what is its own is told, whatever fails besides, and all else is done.
func TestNoDriverIsTold(t *testing.T) {
	const text = "pfs:\n  - select: " + pf +
		"\n    count: 2\n    vfs: [{range: 0, driver: vfio}, {range: 1, driver: home}]\n"
	prepare := func() *hosttest.Kernel {
		k := sweptHost(t)
		if err := os.RemoveAll(filepath.Join(k.Dir(), "sys/bus/pci/drivers/igbvf")); err != nil {
			t.Fatal(err)
		}
		return k
	}

	told := func(k *hosttest.Kernel, err error, what string) {
		t.Helper()
		none, _ := errors.AsType[*NoDriverError](err)
		if now := state(t, k); none == nil || len(none.VFs) != 1 || now != "vfio-pci/vfio-pci /" {
			t.Errorf("%s: %v; its VFs are on %s", what, err, now)
		}
	}

	k := prepare()
	var err error
	all := k.Operations(func() { err = applyAll(k, text) })
	told(k, err, "without a driver")
	told(k, applyAll(k, text), "again")
	for _, n := range hosttest.EveryNth(2, hosttest.Sample(all, thisPackage)) {
		k := prepare()
		failed := k.FailNth(n, failures[n%3])
		err := applyAll(k, text)
		k.Revive()
		if err == nil {
			t.Errorf("operation %d (%s) fails, and nothing is told; its VFs are on %s", n, failed(), state(t, k))
		}
		told(k, applyAll(k, text), failed()+" fails, and again")
	}
}

// A VF of the host's that cannot be given its driver is told, with what failed, and so is one of which that cannot be
// asked.
func TestHomeFails(t *testing.T) {
	const text = "pfs:\n  - select: " + pf + "\n    count: 2\n    vfs: [{range: 0-1, driver: home}]\n"
	k := sweptHost(t)
	if err := os.RemoveAll(filepath.Join(k.Dir(), "sys/bus/pci/drivers/igbvf")); err != nil {
		t.Fatal(err)
	}
	k.Fail["sys/bus/pci/drivers_probe"] = unix.EIO
	if err := applyAll(k, text); !errors.Is(err, unix.EIO) {
		t.Errorf("no VF can be probed: %v", err)
	}
}

// What carried the host when it ran is not forgotten because its record cannot be read: nothing is taken then.
func TestProtectedUnreadable(t *testing.T) {
	k := sweptHost(t)
	writeFile(t, k, "var/lib/viaduct/protected.json", "{")
	const text = "devices:\n  - select: " + nic + "\n"
	m := newManager(t, k, Options{Boot: true})
	items, err := m.Plan(parse(t, text))
	for _, i := range items {
		err = errors.Join(err, i.Err)
	}
	if err == nil || !strings.Contains(err.Error(), "protected.json") {
		t.Errorf("a boot plans %v, %v", items, err)
	}
	if err := m.Protected(parse(t, text), []*iommu.Device{found(t, m)}); err == nil {
		t.Error("a guest may have what may carry the host")
	}
}

// Whoever confirms too late is told so, and the trial is not confirmed.
func TestConfirmedTooLate(t *testing.T) {
	k := sweptHost(t)
	bootID(t, k, "this")
	m := newManager(t, k, Options{})
	if _, _, err := m.Tries(version(2), time.Nanosecond, false); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Confirm(); err == nil || !strings.Contains(err.Error(), "the time to confirm is over") {
		t.Errorf("%v", err)
	}
	if _, err := m.Confirm(); err == nil {
		t.Error("it is confirmed")
	}
}
