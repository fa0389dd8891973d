package lease

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"viaduct/cmd/internal/hostfile"
	"viaduct/internal/host/hosttest"
	"viaduct/internal/journal"
	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

const (
	pf   = "0000:01:00.0"
	nvme = "0000:09:00.0" // which is in protect
)

func newKernel(tb testing.TB, vfs int) *hosttest.Kernel {
	tb.Helper()
	k := hosttest.NewLab(tb, nil)
	dir := "sys/bus/pci/devices/" + pf
	for _, w := range [][2]string{{"sriov_drivers_autoprobe", "0"}, {"sriov_numvfs", fmt.Sprint(vfs)}} {
		if err := k.Write(dir+"/"+w[0], w[1]); err != nil {
			tb.Fatal(err)
		}
	}
	return k
}

const declaration = `pfs:
  - select: path=0000:00:02.0/00.0
    count: 7
    vfs:
      - range: 0-2
        driver: vfio
        pool: net
protect:
  - 0000:09:00.0
`

// newManager looks at the host as it is now.
func newManager(tb testing.TB, k *hosttest.Kernel) *Manager {
	tb.Helper()
	return managerOf(tb, k, declaration)
}

// managerOf is newManager of a host of which this is declared.
func managerOf(tb testing.TB, k *hosttest.Kernel, declaration string) *Manager {
	tb.Helper()
	handle, err := sriov.Open(&iommu.Host{Host: k.Host()}, bind.Options{Recoverers: Recoverers()})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { handle.Close() })
	topology, err := handle.Topology()
	if err != nil {
		tb.Fatal(err)
	}
	place, err := iommu.PathOf(handle.Host(), find(tb, topology, pf))
	if err != nil {
		tb.Fatal(err)
	}
	d, err := hostfile.Parse("host.yaml",
		[]byte(strings.Replace(declaration, "path=0000:00:02.0/00.0", "path="+place, 1)))
	if err != nil {
		tb.Fatal(err)
	}
	m, err := New(handle, Options{Declaration: d})
	if err != nil {
		tb.Fatal(err)
	}
	return m
}

// reboot loses what dies with a boot.
func reboot(tb testing.TB, k *hosttest.Kernel) {
	tb.Helper()
	if err := os.RemoveAll(filepath.Join(k.Dir(), journal.Dir)); err != nil {
		tb.Fatal(err)
	}
}

func find(tb testing.TB, t *iommu.Topology, address string) *iommu.Device {
	tb.Helper()
	a, err := iommu.ParseAddress(address)
	if err != nil {
		tb.Fatal(err)
	}
	d, err := t.Find(a)
	if err != nil {
		tb.Fatal(err)
	}
	return d
}

func assign(t *testing.T, k *hosttest.Kernel, guest, from string) (*Lease, error) {
	t.Helper()
	m := newManager(t, k)
	defer m.handle.Close() // as a command does at its end
	l, _, _, err := m.Assign(context.Background(), &Request{Guest: guest, Sources: []Source{{From: from, Count: 1}},
		TTL: time.Minute})
	return l, err
}

// TestAssign: each guest gets another VF, on vfio, until there is none; asked again, the same.
func TestAssign(t *testing.T) {
	k := newKernel(t, 7)
	book := newManager(t, k).Book
	var got []iommu.Address
	for _, guest := range []string{"a", "b", "c"} {
		l, err := assign(t, k, guest, "net")
		if err != nil {
			t.Fatal(err)
		}
		a := l.Devices[0].Address
		if driver, _ := iommu.ReadDriver(&iommu.Host{Host: k.Host()}, a); driver != "vfio-pci" ||
			slices.Contains(got, a) ||
			!l.Ready {
			t.Errorf("%s got %s, on %q: %+v", guest, a, driver, l)
		}
		if written, err := book.Get(guest); err != nil || !written.Ready {
			t.Errorf("the books have %+v, %v", written, err)
		}
		got = append(got, a)
	}

	if again, err := assign(t, k, "b", "net"); err != nil || again.Devices[0].Address != got[1] {
		t.Errorf("asked again, b has %+v, %v", again, err)
	}

	_, err := assign(t, k, "d", "net")
	if e, ok := errors.AsType[*ExhaustedError](err); !ok || e.Of != 3 || e.Leased != 3 {
		t.Errorf("of an exhausted pool: %v", err)
	}
	if _, err := assign(t, k, "b", pf); !errors.Is(err, holder.ErrRefused) {
		t.Errorf("from elsewhere, for one that has a lease: %v", err)
	}
	if l, err := assign(t, k, "d", pf); err != nil || slices.Contains(got, l.Devices[0].Address) {
		t.Errorf("from the PF itself: %+v, %v", l, err)
	}

	for _, from := range []string{"nopool", pf + "/vf9", nvme} {
		if l, err := assign(t, k, "e", from); err == nil {
			t.Errorf("from %s: %+v", from, l)
		}
	}

	if l, err := book.Get("e"); l != nil || err != nil {
		t.Errorf("what was refused is in the books: %+v, %v", l, err)
	}
}

// TestAssignFails: what cannot be taken goes back to what it was, and is nobody's.
func TestAssignFails(t *testing.T) {
	k := newKernel(t, 1)
	m := newManager(t, k)
	k.Probe["vfio-pci"] = errors.New("no")
	if l, err := assign(t, k, "a", pf); err == nil {
		t.Fatalf("assigned: %+v", l)
	}
	if all, err := m.Book.All(); err != nil || len(all) != 0 {
		t.Errorf("leases %v, %v", all, err)
	}
}

// TestManyAtOnce: a pool is drawn from by many at once, and no VF is drawn twice.
func TestManyAtOnce(t *testing.T) {
	k := newKernel(t, 7)
	var mu sync.Mutex
	got := map[iommu.Address]string{}
	exhausted := 0
	var managers []*Manager
	for range 20 {
		managers = append(managers, newManager(t, k))
	}

	var wg sync.WaitGroup
	for i, m := range managers {
		wg.Go(func() {
			guest := fmt.Sprintf("g%d", i)
			l, _, _, err := m.Assign(context.Background(), &Request{Guest: guest,
				Sources: []Source{{From: pf, Count: 1}}})
			mu.Lock()
			defer mu.Unlock()
			if _, ok := errors.AsType[*ExhaustedError](err); ok {
				exhausted++
			} else if err != nil {
				t.Errorf("%s: %v", guest, err)
			} else if a := l.Devices[0].Address; got[a] != "" {
				t.Errorf("%s is %s's and %s's", a, got[a], guest)
			} else {
				got[a] = guest
			}
		})
	}

	wg.Wait()
	if len(got) != 7 || exhausted != 13 {
		t.Errorf("%d got one, %d were told that there is none", len(got), exhausted)
	}
}

// TestRelease: a device is reset, and free again; one that cannot be reset is nobody's, until it can.
func TestRelease(t *testing.T) {
	k := newKernel(t, 1)
	l, err := assign(t, k, "a", pf)
	if err != nil {
		t.Fatal(err)
	}
	m := newManager(t, k)
	vf := l.Devices[0].Address
	certificates, err := m.Release(context.Background(), "a", 0)
	if err == nil || len(certificates) != 1 || certificates[0].Result != InQuarantine ||
		!strings.Contains(certificates[0].Why, "no way to reset") {
		t.Fatalf("without a reset: %+v, %v", certificates, err)
	}
	if _, err := assign(t, k, "b", pf); err == nil || !strings.Contains(err.Error(), "1 in quarantine") {
		t.Errorf("of what is in quarantine: %v", err)
	}
	reset := filepath.Join(k.Dir(), "sys/bus/pci/devices", vf.String(), "reset")
	if err := os.WriteFile(reset, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	fail := "sys/bus/pci/devices/" + vf.String() + "/reset"
	k.Fail[fail] = errors.New("stuck in reset")
	m.handle.Close()
	m = newManager(t, k)
	if _, err := m.Lift(context.Background(), []Quarantine{inQuarantine(t, m, vf.String())}, false); err == nil {
		t.Error("lifted, although it cannot be reset")
	}
	delete(k.Fail, fail)
}

// TestStates: what makes a lease dead, and what does not.
func TestStates(t *testing.T) {
	k := newKernel(t, 1)
	m := newManager(t, k)
	l, err := assign(t, k, "a", pf)
	if err != nil {
		t.Fatal(err)
	}

	gone := holder.Proc{PID: 1 << 30, Start: 1}
	here := Holder{Proc: m.self(), Name: "this"}
	for _, c := range []struct {
		name   string
		change func(*Lease)
		after  time.Duration
		want   State
	}{
		{"new", func(*Lease) {}, 0, Reserved},
		{"nobody came", func(*Lease) {}, time.Hour, Dead},
		{"nobody has to come", func(l *Lease) { l.TTL = 0 }, time.Hour, Reserved},
		{"it outlives all", func(l *Lease) { l.Persist, l.Holders = true, []Holder{{Proc: gone, Name: "x"}} },
			time.Hour, Reserved},
		{"its holder is gone", func(l *Lease) { l.Holders = []Holder{{Proc: gone, Name: "x"}} }, 0, Dead},
		{"its runner lives, and who had it open is gone", func(l *Lease) {
			l.Runner, l.Holders = &here,
				[]Holder{{Proc: gone}}
		}, time.Hour, Active},
		{"its owner lives, and who had it open is gone", func(l *Lease) {
			l.Owner, l.Holders = &here.Proc,
				[]Holder{{Proc: gone}}
		}, time.Hour, Reserved},
		{"its runner is gone", func(l *Lease) { l.Runner = &Holder{Proc: gone, Name: "x"} }, 0, Dead},
		{"it outlives its owner too", func(l *Lease) { l.Persist, l.Owner = true, &gone }, time.Hour, Reserved},
		{"and its runner", func(l *Lease) { l.Persist, l.Runner = true, &Holder{Proc: gone} }, time.Hour, Reserved},
		{"its owner is gone", func(l *Lease) { l.Owner = &gone }, 0, Dead},
		{"its unit is gone", func(l *Lease) { l.Unit = "no.service" }, 0, Dead},
		{"its assignment was interrupted", func(l *Lease) { l.Ready, l.Maker = false, gone }, 0, Dead},
		{"its device is gone", func(l *Lease) { l.Devices[0].Address.Bus = 0xee }, 0, Lost},
		{"another device is in its place", func(l *Lease) { l.Devices[0].ID.Device++ }, 0, Lost},
	} {
		x := *l
		x.Devices = slices.Clone(l.Devices)
		c.change(&x)
		if got, why := m.state(&x, nil, c.after); got != c.want {
			t.Errorf("%s: %s (%s), want %s", c.name, got, why, c.want)
		}
	}
}

// TestOutlivesBoot: a lease that persists is there after /run is gone, wherever its PF is then, and its VF is nobody
// else's before it is made again.
func TestOutlivesBoot(t *testing.T) {
	k := newKernel(t, 2)
	m := newManager(t, k)
	l, _, _, err := m.Assign(context.Background(), &Request{Guest: "a", Sources: []Source{{From: pf, Count: 1}},
		Persist: true})
	if err != nil {
		t.Fatal(err)
	}
	book := m.Book
	reboot(t, k)
	if then, err := book.Get("a"); err != nil || then.Ready || then.Devices[0].Clean {
		t.Errorf("before it is made again: %+v, %v", then, err)
	}
	other, err := assign(t, k, "b", pf)
	if err != nil || other.Devices[0].Address == l.Devices[0].Address {
		t.Fatalf("another guest got %+v, %v", other, err)
	}
	m.handle.Close()
	done, err := newManager(t, k).Restore(context.Background())
	if err != nil || !slices.Equal(done, []string{"a"}) {
		t.Fatalf("restored %v, %v", done, err)
	}
	if again, err := book.Get("a"); err != nil || !again.Ready || again.Devices[0].Address != l.Devices[0].Address {
		t.Errorf("after the boot: %+v, %v", again, err)
	}
}

// TestBootWithoutItsVF: a lease that outlives the boot waits for its VF, which nobody else gets when it comes.
func TestBootWithoutItsVF(t *testing.T) {
	k := newKernel(t, 1)
	m := newManager(t, k)
	l, _, _, err := m.Assign(context.Background(), &Request{Guest: "a", Sources: []Source{{From: pf, Count: 1}},
		Persist: true})
	if err != nil {
		t.Fatal(err)
	}

	m.handle.Close()
	numvfs := "sys/bus/pci/devices/" + pf + "/sriov_numvfs"
	if err := k.Write(numvfs, "0"); err != nil {
		t.Fatal(err)
	}

	book := m.Book
	reboot(t, k)
	if done, err := newManager(t, k).Restore(context.Background()); err == nil || len(done) > 0 {
		t.Errorf("restored %v without a VF, %v", done, err)
	}
	if looks, err := newManager(t, k).Look(); err != nil || len(looks) != 1 || looks[0].State != Lost {
		t.Errorf("without its VF: %+v, %v", looks, err)
	}
	if err := k.Write(numvfs, "1"); err != nil {
		t.Fatal(err)
	}
	if other, err := assign(t, k, "b", pf); err == nil {
		t.Errorf("another guest got %s", other.Devices[0].Address)
	}

	m = newManager(t, k)
	if done, err := m.Restore(context.Background()); err != nil || !slices.Equal(done, []string{"a"}) {
		t.Errorf("restored %v, %v", done, err)
	}
	if again, err := book.Get("a"); err != nil || !again.Ready || again.Devices[0].Address != l.Devices[0].Address {
		t.Errorf("with its VF again: %+v, %v", again, err)
	}
}

// TestInterrupted: an assign that was killed before it took a device of the host's leaves nothing that is dirty.
func TestInterrupted(t *testing.T) {
	k := newKernel(t, 1)
	m := newManager(t, k)
	vf := m.Topology.VFs(find(t, m.Topology, pf))[0]
	if err := k.Write("sys/bus/pci/devices/"+vf.Name+"/driver_override", "igbvf"); err != nil {
		t.Fatal(err)
	}
	if err := k.Write("sys/bus/pci/drivers_probe", vf.Name); err != nil {
		t.Fatal(err)
	}
	m = newManager(t, k)
	r := &Request{Guest: "a", Sources: []Source{{From: vf.Name, Count: 1}}}
	units, err := m.choices(r)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := m.reserve(context.Background(), r, units, nil); err != nil {
		t.Fatal(err)
	}
	certificates, err := m.Release(context.Background(), "a", 0)
	if err != nil || len(certificates) != 1 || certificates[0].Result != Clean || certificates[0].Driver != "igbvf" {
		t.Errorf("%+v, %v", certificates, err)
	}
}

// TestSettingsOfNoVF: what has no VLAN gets none, and the guest does not get it.
func TestSettingsOfNoVF(t *testing.T) {
	k := newKernel(t, 0)
	m := newManager(t, k)
	edu := ""
	m.Topology.All(func(d *iommu.Device) bool {
		if d.PCI && d.Group != nil && d.Vendor == 0x1234 {
			edu = d.Name
		}
		return edu == ""
	})
	r := &Request{Guest: "a", Sources: []Source{{From: edu, Count: 1,
		Settings: hostfile.Plain(sriov.Settings{sriov.VLAN: "5"})}}}
	if l, _, _, err := m.Assign(context.Background(), r); !errors.Is(err, holder.ErrRefused) {
		t.Errorf("%s with a VLAN: %+v, %v", edu, l, err)
	}
}

// TestNotTwice: what runs is not run again, and asking again for what does not gives it a new life.
func TestNotTwice(t *testing.T) {
	k := newKernel(t, 1)
	m := newManager(t, k)
	first := &Request{Guest: "a", Sources: []Source{{From: pf, Count: 1}}, OwnerPID: os.Getpid()}
	_, fresh, _, err := m.Assign(context.Background(), first)
	if err != nil || !fresh {
		t.Fatal(fresh, err)
	}
	m.handle.Close()
	m = newManager(t, k)
	again, fresh, _, err := m.Assign(context.Background(), &Request{Guest: "a", Sources: []Source{{From: pf, Count: 1}},
		TTL: time.Hour})
	if err != nil || fresh || again.Owner != nil || again.TTL != time.Hour {
		t.Errorf("asked again: %+v, %v, %v", again, fresh, err)
	}
}

// TestGuestNames: what is no name of a guest.
func TestGuestNames(t *testing.T) {
	for _, name := range []string{
		"", "a/b", " a", "a ", "-x", "--", strings.Repeat("x", 121), "a\n", "a\tb", "a\x1b[31m", "a\u202eb", "a\u200bb",
		"a\xffb", " ",
		"a\u2028b", "a\u00a0b",
	} {
		if CheckGuest(name) == nil {
			t.Errorf("%q passes", name)
		}
	}
	for _, name := range []string{"web", "web-1.example", "a:b@c", "..", "ü", "web server 1", "網", "a'b"} {
		if err := CheckGuest(name); err != nil {
			t.Error(err)
		}
	}
}
