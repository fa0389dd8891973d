package declared

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/cmd/internal/hostfile"
	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// Without the lock of the record of what is in force, nothing of it is changed.
func TestLocksThatFail(t *testing.T) {
	for name, do := range map[string]func(m *Manager, token string) error{
		"starts":      func(m *Manager, _ string) error { return m.Starts(false) },
		"ended":       func(m *Manager, _ string) error { return m.Ended(version(3)) },
		"undone":      func(m *Manager, _ string) error { return m.Undone() },
		"rolled back": func(m *Manager, token string) error { return m.RolledBack(token) },
		"tries":       func(m *Manager, _ string) error { _, _, err := m.Tries(version(3), time.Hour, false); return err },
		"extend":      func(m *Manager, token string) error { _, err := m.Extend(token, time.Hour); return err },
		"confirm":     func(m *Manager, _ string) error { _, err := m.Confirm(); return err },
	} {
		k := hosttest.NewSmallLab(t, "0000:00:05.0", pf)
		bootID(t, k, "this")
		m := Of(&iommu.Host{Host: k.Host()})
		token, _, err := m.Tries(version(2), time.Hour, false)
		if err != nil {
			t.Fatal(err)
		}
		lock := filepath.Join(m.run.Dir(), "lock-in-force")
		if err := errors.Join(os.RemoveAll(lock), os.MkdirAll(lock, 0o755)); err != nil {
			t.Fatal(err)
		}
		if err := do(m, token); !errors.Is(err, unix.EISDIR) {
			t.Errorf("%s: %v", name, err)
		}
		if use, err := m.InForce(version(9), nil); err != nil || versionOf(use.Host) != 2 {
			t.Errorf("%s: %+v, %v", name, use, err)
		}
	}
}

// What an interrupted apply left is not put back without the lock of its device.
func TestRecoverWithoutLock(t *testing.T) {
	k := sweptHost(t)
	m := newManager(t, k, Options{})
	if err := m.run.Put(applying+pf, before{Device: mustParse(t, pf)}); err != nil {
		t.Fatal(err)
	}
	lock := filepath.Join(m.run.Dir(), "lock")
	if err := errors.Join(os.RemoveAll(lock), os.MkdirAll(lock, 0o755)); err != nil {
		t.Fatal(err)
	}
	k.Log = nil
	if _, err := m.Recover(); !errors.Is(err, unix.EISDIR) || len(k.Log) > 0 {
		t.Errorf("%v, written %q", err, k.Log)
	}
}

// What an interrupted apply left is put back, or it is told that it is not, whatever fails.
func TestFaultOfRecover(t *testing.T) {
	prepare := func() (*hosttest.Kernel, *declaredWorld) {
		k := sweptHost(t)
		if err := applyAll(k, few); err != nil {
			t.Fatal(err)
		}
		world := lookAt(t, k)
		m := newManager(t, k, Options{})
		left := map[string]before{}
		for _, i := range plan(t, m, many) {
			was, err := m.before(i)
			if err != nil {
				t.Fatal(err)
			}
			left[applying+i.Device.Name] = was
		}
		if err := applyAll(k, many); err != nil {
			t.Fatal(err)
		}
		for key, was := range left {
			if err := m.run.Put(key, was); err != nil {
				t.Fatal(err)
			}
		}
		m.handle.Close()
		return k, world
	}
	recovers := func(k *hosttest.Kernel) error {
		return with(k, Options{}, func(context.Context, *Manager) error { return nil })
	}
	k, _ := prepare()
	var err error
	all := k.Operations(func() { err = recovers(k) })
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range hosttest.SampleOf(thisPackage, all) {
		k, world := prepare()
		failed := k.FailNth(n, failures[n%3])
		err := recovers(k)
		k.Revive()
		if now := lookAt(t, k); err == nil && (!now.same(world, world) || len(now.left) > 0) {
			t.Errorf("operation %d (%s) fails: nothing is told, and it\nis %s\nwas %s", n, failed(), now, world)
		}
	}
}

// What there was to undo is forgotten, or it is told that it is not.
func TestFaultOfClean(t *testing.T) {
	for n := 0; ; n++ {
		k := sweptHost(t)
		if err := applyAll(k, few); err != nil {
			t.Fatal(err)
		}
		m := Of(&iommu.Host{Host: k.Host()})
		failed := k.FailNth(n, failures[n%3])
		err := m.Clean()
		k.Revive()
		if _, known, bad := m.Last(); bad != nil || err == nil && known {
			t.Errorf("%s fails, and there is something to undo: %v", failed(), bad)
		}
		if failed() == "" {
			return
		}
	}
}

// Records that cannot be read are told, and nothing is changed by them.
func TestUnreadableRecords(t *testing.T) {
	for name, c := range map[string]struct {
		file, text string
		do         func(*Manager) error
	}{
		"undo": {"run/viaduct/undo.json", "{", func(m *Manager) error { return m.Undo(func(iommu.Address, error) {}) }},
		"apply while another waits": {"run/viaduct/undo.json", "{", func(m *Manager) error {
			if _, _, err := m.Tries(version(2), time.Hour, false); err != nil {
				t.Fatal(err)
			}
			return m.Apply(t.Context(), plan(t, m, many), func(*Item, error) {})
		}},
		"recover": {"run/viaduct/" + applying + pf + ".json", `{"device": "` + pf + `", "pf": "pfs: 5"}`,
			func(m *Manager) error {
				all, err := m.Recover()
				for _, r := range all {
					err = errors.Join(err, r.Err)
				}
				return err
			}},
		"in force": {StateDir + "/" + formerTrial + ".json", `{"spec": "pfs: 5"}`, func(m *Manager) error {
			_, err := m.InForce(version(9), nil)
			return err
		}},
	} {
		k := sweptHost(t)
		m := newManager(t, k, Options{})
		writeFile(t, k, c.file, c.text)
		k.Log = nil
		if err := c.do(m); err == nil || len(k.Log) > 0 {
			t.Errorf("%s: %v, written %q", name, err, k.Log)
		}
	}
}

// While VFs of a PF come or go, it is not said how the PF differs, nor what it is.
func TestVFsThatGo(t *testing.T) {
	k := sweptHost(t)
	if err := applyAll(k, few); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(k.Dir(), "sys/bus/pci/devices/0000:01:10.0")); err != nil {
		t.Fatal(err)
	}
	m := newManager(t, k, Options{})
	if i := plan(t, m, few)[0]; i.State != Refused || !strings.Contains(i.Err.Error(), "made or removed just now") {
		t.Errorf("planned: %s, %v", i.State, i.Err)
	}
	if s, _, err := m.Adopt(); err == nil {
		t.Errorf("adopted: %+v", s)
	}
}

// Which VFs are left alone by the network's services is as declared when that is told, whatever fails.
func TestFaultOfMarks(t *testing.T) {
	text := strings.ReplaceAll(many, "driver: home", "driver: home, network: unmanaged")
	marks := func(k *hosttest.Kernel) string {
		all, err := Of(&iommu.Host{Host: k.Host()}).run.Keys(unmanagedKey)
		return fmt.Sprint(all, err)
	}
	k := sweptHost(t)
	var err error
	all := k.Operations(func() { err = applyAll(k, text) })
	if err != nil {
		t.Fatal(err)
	}
	want := marks(k)
	for _, n := range hosttest.SampleOf(thisPackage, all) {
		k := sweptHost(t)
		failed := k.FailNth(n, failures[n%3])
		err := applyAll(k, text)
		k.Revive()
		if now := marks(k); err == nil && now != want {
			t.Errorf("operation %d (%s) fails: told as done, and left alone are %s, not %s", n, failed(), now, want)
		}
	}
}

// Records of viaduct before are gone when what was made of them is told as written.
func TestFaultOfFormer(t *testing.T) {
	for n := 0; ; n++ {
		k := hosttest.NewSmallLab(t, "0000:00:05.0", pf)
		bootID(t, k, "this")
		writeFile(t, k, formerConfirmed, few)
		writeFile(t, k, "run/viaduct/"+formerHold+".json", "true")
		m := Of(&iommu.Host{Host: k.Host()})
		failed := k.FailNth(n, failures[n%3])
		err := m.Undone()
		k.Revive()
		if err == nil && (m.host.Exists(formerConfirmed) || m.host.Exists("run/viaduct/"+formerHold+".json")) {
			t.Errorf("%s fails, and the records of before are there", failed())
		}
		if failed() == "" {
			return
		}
	}
}

// An apply that is interrupted says so of each item that it did not come to, and leaves nothing that nobody knows of.
func TestInterruptedApply(t *testing.T) {
	k := sweptHost(t)
	var err error
	all := k.Operations(func() { err = applyAll(k, many) })
	if err != nil {
		t.Fatal(err)
	}
	after := lookAt(t, k)
	for _, n := range hosttest.EveryNth(8, hosttest.Sample(all, thisPackage)) {
		k := sweptHost(t)
		before := lookAt(t, k)
		ctx, interrupt := context.WithCancel(t.Context())
		at := k.InterruptNth(n, interrupt)
		err := applyIn(ctx, k, many)
		k.Revive()
		applyFailed(t, k, before, after, err, fmt.Sprintf("interrupted at operation %d (%s)", n, at()))
	}

	k = sweptHost(t)
	m := newManager(t, k, Options{})
	items := plan(t, m, few)
	k.Log = nil
	k.SetFault(func(op, _ string) error { return map[string]error{"readlink": unix.EIO}[op] })
	if err := m.Apply(t.Context(), items, func(*Item, error) {}); !errors.Is(err, unix.EIO) || len(k.Log) > 0 {
		t.Errorf("it cannot be told how it is: %v, written %q", err, k.Log)
	}
	k.Revive()

	items = plan(t, again(t, m), many)
	over, interrupt := context.WithCancel(t.Context())
	interrupt()
	told := 0
	err = m.Apply(over, items, func(_ *Item, err error) {
		if err != nil {
			told++
		}
	})
	if told < 2 || err == nil && told == 0 || len(k.Log) > 0 {
		t.Errorf("interrupted before it began: told of %d items, %v, written %q", told, err, k.Log)
	}
}

// A declaration that is saved or forgotten is so, or it is told that it is not; and then it can be done again.
func TestFaultOfSave(t *testing.T) {
	device := func(m *Manager) *iommu.Device {
		d, err := m.topology.Find(mustParse(t, nic))
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	save := func(m *Manager) error { _, err := m.Save(device(m), bind.Auto, "1000"); return err }
	forget := func(m *Manager) error { return m.Forget(device(m)) }
	state := func(m *Manager) string {
		d := device(m)
		file, err := m.Saved(d)
		if err != nil {
			t.Fatal(err)
		}
		if file == "" {
			return "nothing"
		}
		owner, err1 := m.host.Owner(file[1:])
		s, err2 := hostfile.Load(m.host)
		if err := errors.Join(err1, err2); err != nil {
			t.Fatal(err)
		}
		was, err := m.remembered(s.Devices[0].Select)
		return fmt.Sprint(len(s.Devices), owner.Mode, was != nil, err)
	}
	for name, c := range map[string]struct{ before, do func(*Manager) error }{
		"save":   {func(*Manager) error { return nil }, save},
		"forget": {save, forget},
	} {
		prepare := func() (*hosttest.Kernel, *Manager) {
			k := sweptHost(t)
			m := newManager(t, k, Options{})
			if err := c.before(m); err != nil {
				t.Fatal(err)
			}
			return k, m
		}
		k, m := prepare()
		var err error
		all := k.Operations(func() { err = c.do(m) })
		want := state(m)
		if err != nil {
			t.Fatal(err)
		}
		for n := range all {
			k, m := prepare()
			failed := k.FailNth(n, failures[n%3])
			err := c.do(m)
			k.Revive()
			if now := state(m); err == nil && now != want {
				t.Errorf("%s: operation %d (%s) fails: it is %s, to be %s", name, n, failed(), now, want)
			}
			if err := c.do(m); err != nil || state(m) != want {
				t.Errorf("%s: operation %d (%s) fails, and again: %v, it is %s, to be %s", name, n, failed(), err, state(m), want)
			}
		}
	}
}

// What is protected is written down whole, or it is told that it is not.
func TestFaultOfProtect(t *testing.T) {
	k := sweptHost(t)
	k.ChangeNet(func(n *hosttest.Network) { n.Routes = []hosttest.Route{{To: "default", Over: []string{"enp1s0"}}} })
	writeFile(t, k, "etc/fstab", "/dev/vda / ext4 defaults 0 1\n")
	var before []protected
	protect := func(n int) (now []protected, failed string, err error) {
		m := newManager(t, k, Options{})
		defer m.handle.Close()
		if err := m.state.Put(protectedKey, before); err != nil {
			t.Fatal(err)
		}
		name := func() string { return "" }
		if n >= 0 {
			name = k.FailNth(n, failures[n%3])
		}
		err = m.Protect()
		k.Revive()
		if _, bad := m.state.Get(protectedKey, &now); bad != nil {
			t.Fatal(bad)
		}
		return now, name(), err
	}

	for range 2 {
		want, _, err := protect(-1)
		if err != nil || len(want) == 0 {
			t.Fatal(want, err)
		}
		for n := 0; ; n++ {
			now, failed, err := protect(n)
			if failed == "" {
				break
			}
			if err == nil && !reflect.DeepEqual(now, want) {
				t.Errorf("%s fails, and protected are without an error %+v, not %+v", failed, now, want)
			}
		}
		// What carried the host once may be down the next time, and stays protected beside what carries it then.
		before = want
		k.ChangeNet(func(n *hosttest.Network) { n.Routes[0].Over = []string{"ens1"} })
	}
}

// No two change the record of what is in force at the same time.
func TestOneChangesTheRecord(t *testing.T) {
	k := hosttest.NewSmallLab(t, "0000:00:05.0", pf)
	bootID(t, k, "this")
	var inside, met atomic.Int64
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			err := Of(&iommu.Host{Host: k.Host()}).change(func(*inForce, moment) error {
				if inside.Add(1) > 1 {
					met.Add(1)
				}
				for range 1000 {
					runtime.Gosched()
				}
				inside.Add(-1)
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if met.Load() > 0 {
		t.Errorf("%d were at it while another was", met.Load())
	}
}

// What a match names as the other port of a PF is not that PF.
func TestOtherPort(t *testing.T) {
	k := hosttest.NewKernel(t, hosttest.TwoPorts())
	items, err := newManager(t, k, Options{}).Plan(parse(t, "pfs:\n  - {select: ens1, count: 1}\n"))
	if err != nil || len(items) != 1 {
		t.Fatal(items, err)
	}
	if _, other := errors.AsType[*iommu.OtherPortError](items[0].Err); !other {
		t.Errorf("%v", items[0].Err)
	}
}

// Who cannot hear of new devices does not wait for them, and says so.
func TestNoEvents(t *testing.T) {
	k := sweptHost(t)
	h := &iommu.Host{Host: k.Host()}
	for name, do := range map[string]func(context.Context, *Manager) error{
		"wait":   func(ctx context.Context, m *Manager) error { return m.Wait(ctx, parse(t, few)) },
		"watch":  func(ctx context.Context, _ *Manager) error { return Watch(ctx, h, func() bool { return false }) },
		"settle": func(ctx context.Context, _ *Manager) error { return Settle(ctx, h, func() {}) },
	} {
		m := newManager(t, k, Options{})
		k.SetFault(func(op, _ string) error {
			if op == "socket" {
				return unix.EPROTONOSUPPORT
			}
			return nil
		})
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := do(ctx, m); !errors.Is(err, unix.EPROTONOSUPPORT) {
			t.Errorf("%s: %v", name, err)
		}
		k.Revive()
	}

	m := newManager(t, k, Options{})
	k.SetFault(func(op, name string) error {
		if op == "readdir" && strings.HasPrefix(name, "sys/") {
			return unix.EIO
		}
		return nil
	})
	if err := m.Wait(t.Context(), parse(t, few)); !errors.Is(err, unix.EIO) {
		t.Errorf("it cannot look: %v", err)
	}
}

// What names nothing is known to name nothing.
func TestResolve(t *testing.T) {
	k := sweptHost(t)
	h := &iommu.Host{Host: k.Host()}
	topology, err := iommu.Scan(h)
	if err != nil {
		t.Fatal(err)
	}
	both := hostfile.Match{}
	for _, text := range []string{pf, nic} {
		s, err := iommu.ParseSelector(text)
		if err != nil {
			t.Fatal(err)
		}
		both.Selectors = append(both.Selectors, s)
	}
	for name, match := range map[string]hostfile.Match{"no name": {}, "of two devices": both} {
		if all, err := resolve(h, topology, match); !errors.Is(err, iommu.ErrNotFound) || len(all) > 0 {
			t.Errorf("%s: %v, %v", name, all, err)
		}
	}
}

// A role that is declared by a number is not left out where that number cannot be read.
func TestRolesThatCannotBeTold(t *testing.T) {
	k := sweptHost(t)
	writeFile(t, k, hostfile.File, "roles:\n  - {select: \"mac=52:54:00:00:00:01\", role: companion}\n")
	h := &iommu.Host{Host: k.Host()}
	for n := 0; ; n++ {
		topology, err := iommu.Scan(h)
		if err != nil {
			t.Fatal(err)
		}
		d, err := topology.Find(mustParse(t, pf))
		if err != nil {
			t.Fatal(err)
		}
		failed := k.FailNth(n, failures[n%3])
		err = Roles(h, topology)
		k.Revive()
		if failed() == "" {
			break
		}
		// A file that cannot be read is told of by the commands that use it.
		if err == nil && d.As != iommu.RoleCompanion && !strings.Contains(failed(), "etc/viaduct") {
			t.Errorf("%s fails, and its role is %q", failed(), d.As)
		}
	}
}

// protection is what Protected says of a device, or why that is not known.
func protection(m *Manager, s *hostfile.Host, d *iommu.Device) (any, error) {
	err := m.Protected(s, []*iommu.Device{d})
	if errors.Is(err, holder.ErrRefused) {
		return "protected", nil
	}
	return "free", err
}
