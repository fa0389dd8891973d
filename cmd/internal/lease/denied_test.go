package lease

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
	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// vlan7 is the request that lasting makes.
func vlan7() *Request {
	s := Source{From: vf0, Count: 1, Settings: hostfile.Plain(sriov.Settings{sriov.VLAN: "7"})}
	return &Request{Guest: "a", Sources: []Source{s}, Persist: true}
}

// both does one after the other.
func both(all ...func(*hosttest.Kernel) error) func(*hosttest.Kernel) error {
	return func(k *hosttest.Kernel) error {
		for _, do := range all {
			if err := do(k); err != nil {
				return err
			}
		}
		return nil
	}
}

// TestLocksThatFail: who cannot lock a guest's lease, or the books, changes nothing and says so.
func TestLocksThatFail(t *testing.T) {
	port := func(vf string) *Port { return &Port{Domain: "a", Device: at(t, vf)} }
	dead := func(k *hosttest.Kernel) error {
		k.Process(keeperOfLease, "keeper")
		defer k.End(keeperOfLease)
		return sites[0].assign(t.Context(), k)
	}
	type deed struct {
		before func(*hosttest.Kernel) error
		books  bool // it locks the books only for as long as it may take
		try    bool // it leaves alone what another works on
		do     func(context.Context, *Manager) error
	}
	deeds := map[string]deed{
		"assign": {books: true, do: func(ctx context.Context, m *Manager) error {
			_, _, _, err := m.Assign(ctx, vlan7())
			return err
		}},
		"expect": {books: true, do: func(ctx context.Context, m *Manager) error {
			_, _, err := m.Expect(ctx, vlan7())
			return err
		}},
		"plug": {books: true, do: func(ctx context.Context, m *Manager) error { return m.Plug(ctx, port(vf0)) }},
		"plug more": {before: plug(t, vf0), books: true, do: func(ctx context.Context, m *Manager) error {
			return m.Plug(ctx, port(vf1))
		}},
		"unplug one": {before: both(plug(t, vf0), plug(t, vf1)), do: func(ctx context.Context, m *Manager) error {
			_, err := m.Unplug(ctx, port(vf1), 0)
			return err
		}},
		"again": {before: lasting, do: func(ctx context.Context, m *Manager) error { return m.Again(ctx, "a") }},
		"release": {before: lasting, do: func(ctx context.Context, m *Manager) error {
			_, err := m.Release(ctx, "a", 0)
			return err
		}},
		"rest": {before: lasting, do: func(ctx context.Context, m *Manager) error {
			_, err := m.Rest(ctx, "a", 0)
			return err
		}},
		"move": {before: lasting, do: func(ctx context.Context, m *Manager) error {
			return m.SetMoving(ctx, "a", Leaving)
		}},
		"lock the move": {do: func(ctx context.Context, m *Manager) error {
			f, err := m.Book.LockMove(ctx, "a", time.Minute)
			if err == nil {
				err = f.Close()
			}
			return err
		}},
		"started": {before: lasting, do: func(ctx context.Context, m *Manager) error {
			return m.Book.Started(ctx, &Lease{LeaseHead: holder.LeaseHead{Guest: "a"}}, 1, "qemu")
		}},
		"reclaim": {before: dead, try: true, do: func(ctx context.Context, m *Manager) error {
			_, err := m.Reclaim(ctx)
			return err
		}},
	}
	over, cancel := context.WithDeadline(t.Context(), time.Now())
	defer cancel()

	for name, d := range deeds {
		for _, how := range []string{"no file", "the guest's", "the books"} {
			if how == "the books" && !d.books {
				continue
			}
			k, _ := poolHost(t)
			if d.before != nil {
				if err := d.before(k); err != nil {
					t.Fatal(name, err)
				}
			}
			book := BookOf(&iommu.Host{Host: k.Host()})
			was := sites[0].look(t, k, nil).String()
			lock := filepath.Join(book.Run.Dir(), "lock-leases")
			want := context.DeadlineExceeded.Error()
			switch how {
			case "no file":
				want = unix.EISDIR.Error()
				if err := errors.Join(os.RemoveAll(lock), os.MkdirAll(lock, 0o755)); err != nil {
					t.Fatal(err)
				}
			default:
				f, err := book.lockFile()
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				for _, at := range map[string][]int64{
					"the books": {books}, "the guest's": {byteOf("a"), byteOf("move of a\x00")},
				}[how] {
					if free, err := f.Try(at); !free || err != nil {
						t.Fatal(free, err)
					}
				}
				if how == "the guest's" {
					want = "another viaduct"
				}
			}

			err := within(over, k, d.do)
			if d.try && how != "no file" {
				if err != nil {
					t.Errorf("%s, %s: %v", name, how, err)
				}
			} else if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s, %s: it says %v, and not %q", name, how, err, want)
			}
			if now := sites[0].look(t, k, nil).String(); now != was {
				t.Errorf("%s, %s: it is %s\nand was %s", name, how, now, was)
			}
		}
	}
}

// TestDeviceOfLeaseGone: what needs a lease's device says that it is gone.
func TestDeviceOfLeaseGone(t *testing.T) {
	for name, c := range map[string]struct {
		before func(*hosttest.Kernel) error
		do     func(context.Context, *Manager) error
	}{
		"assign again": {lasting, func(ctx context.Context, m *Manager) error {
			_, _, _, err := m.Assign(ctx, vlan7())
			return err
		}},
		"preview again": {lasting, func(_ context.Context, m *Manager) error {
			_, err := m.Preview(vlan7())
			return err
		}},
		"again": {lasting, func(ctx context.Context, m *Manager) error { return m.Again(ctx, "a") }},
		"expect again": {expect, func(ctx context.Context, m *Manager) error {
			r := vlan7()
			r.Persist = false
			_, _, err := m.Expect(ctx, r)
			return err
		}},
		"address": {lasting, func(_ context.Context, m *Manager) error { _, err := m.Address("a"); return err }},
		"set address": {lasting, func(ctx context.Context, m *Manager) error {
			return m.SetAddress(ctx, "a",
				guestMAC)
		}},
		"what libvirt drew": {nil, func(_ context.Context, m *Manager) error {
			s := one("net", at(t, vf0))
			_, err := m.unitsOf(&s)
			return err
		}},
	} {
		k, _ := poolHost(t)
		if c.before != nil {
			if err := c.before(k); err != nil {
				t.Fatal(name, err)
			}
		}
		if err := k.Write("sys/bus/pci/devices/"+pf+"/sriov_numvfs", "0"); err != nil {
			t.Fatal(err)
		}
		if err := on(k, c.do); err == nil || !strings.Contains(err.Error(), vf0) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// fouledVF gives a guest a VF that is in quarantine by now.
func fouledVF(t *testing.T, k *hosttest.Kernel) error {
	t.Helper()
	if err := lasting(k); err != nil {
		return err
	}
	return on(k, func(_ context.Context, m *Manager) error {
		d, err := m.Topology.Find(at(t, vf0))
		if err != nil {
			return err
		}
		q := Quarantine{Address: d.Address, Place: place(m.host, d), Why: "it burns"}
		return m.Book.State.Put(quarantineKey(q.Place), q)
	})
}

// TestRefusedRequests: what cannot be done with a lease is refused, and nothing is left of the try.
func TestRefusedRequests(t *testing.T) {
	vf := func(m *Manager, address string) *iommu.Device { return find(t, m.Topology, address) }
	for name, c := range map[string]struct {
		before func(*hosttest.Kernel) error
		do     func(context.Context, *Manager) error
		says   string
	}{
		"an owner that nobody is": {nil, func(ctx context.Context, m *Manager) error {
			r := vlan7()
			r.NodeOwner = "nobody-has-this-name"
			_, _, _, err := m.Assign(ctx, r)
			return err
		}, "nobody-has-this-name"},
		"a VLAN that there is not": {nil, func(ctx context.Context, m *Manager) error {
			d, err := hostfile.Parse("host.yaml", []byte("pfs: [{select: "+pf+", count: 2, vfs: [{vlan: 4094+index}]}]\n"))
			if err != nil {
				return err
			}
			r := &Request{Guest: "a", Sources: []Source{{From: vf1, Count: 1, Settings: d.PFs[0].VFs[0].Settings}}}
			_, _, _, err = m.Assign(ctx, r)
			return err
		}, "4095"},
		"no name of a guest": {nil, func(ctx context.Context, m *Manager) error {
			r := vlan7()
			r.Guest = "a/b"
			_, _, _, err := m.Assign(ctx, r)
			return err
		}, "invalid guest name"},
		"a lease whose device is in quarantine": {func(k *hosttest.Kernel) error { return fouledVF(t, k) },
			func(ctx context.Context, m *Manager) error {
				return m.Again(ctx, "a")
			}, "it burns"},
		"more of another's": {lasting, func(ctx context.Context, m *Manager) error {
			_, err := m.reserveMore(ctx, &Port{Domain: "b", Device: at(t, vf0)}, "net", vf(m, vf0))
			return err
		}, `guest "a" just now`},
		"more of no lease": {nil, func(ctx context.Context, m *Manager) error {
			_, err := m.reserveMore(ctx, &Port{Domain: "b", Device: at(t, vf0)}, "net", vf(m, vf0))
			return err
		}, "b has no lease"},
		"to change no lease": {nil, func(ctx context.Context, m *Manager) error {
			return m.SetMoving(ctx, "b", Leaving)
		}, "b has no lease"},
		"the address of no lease": {nil, func(_ context.Context, m *Manager) error {
			_, err := m.Address("b")
			return err
		}, "b has no lease"},
		"to restore no lease": {nil, func(ctx context.Context, m *Manager) error {
			return m.Again(ctx, "b")
		}, "b has no lease"},
		"the address of no VF": {nil, func(_ context.Context, m *Manager) error {
			d, err := m.describe(vf(m, pf), nil)
			if err != nil {
				return err
			}
			_, _, err = m.first(&Lease{LeaseHead: holder.LeaseHead{Guest: "a"}, Devices: []Device{d}})
			return err
		}, "has no VF"},
		"a let-go that says no driver": {nil, func(ctx context.Context, m *Manager) error {
			_, err := Recoverers()[opLetGo](ctx, m.handle.Handle, at(t, vf0), []byte("{"))
			return err
		}, "JSON"},
		"a let-go that was not begun": {nil, func(ctx context.Context, m *Manager) error {
			_, err := Recoverers()[opLetGo](ctx, m.handle.Handle, at(t, vf0), []byte(`"no-driver"`))
			return err
		}, "was not started"},
	} {
		k, _ := poolHost(t)
		if c.before != nil {
			if err := c.before(k); err != nil {
				t.Fatal(name, err)
			}
		}
		was := sites[0].look(t, k, nil).String()
		if err := on(k, c.do); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: it says %v, and not %q", name, err, c.says)
		}
		if now := sites[0].look(t, k, nil).String(); now != was {
			t.Errorf("%s: it is %s\nand was %s", name, now, was)
		}
	}
}

// TestDrawnAsItIs: what a lease writes down of a device is as it is when it is drawn, not as it was looked at before.
func TestDrawnAsItIs(t *testing.T) {
	for name, draw := range map[string]func(context.Context, *Manager) error{
		"assign": func(ctx context.Context, m *Manager) error {
			_, _, _, err := m.Assign(ctx, &Request{Guest: "a", Sources: []Source{{From: vf1, Count: 1}}})
			return err
		},
		"plug": func(ctx context.Context, m *Manager) error {
			return m.Plug(ctx, &Port{Domain: "a", Device: at(t, vf1)})
		},
		"plug more": func(ctx context.Context, m *Manager) error {
			return m.Plug(ctx, &Port{Domain: "a", Device: at(t, vf1)})
		},
	} {
		k, _ := poolHost(t)
		if name == "plug more" {
			if err := plug(t, vf0)(k); err != nil {
				t.Fatal(err)
			}
		}
		err := on(k, func(ctx context.Context, m *Manager) error {
			for _, w := range [][2]string{{"devices/" + vf1 + "/driver_override", "vfio-pci"}, {"drivers_probe", vf1}} {
				if err := k.Write("sys/bus/pci/"+w[0], w[1]); err != nil {
					t.Fatal(err)
				}
			}
			return draw(ctx, m)
		})
		l, bad := BookOf(&iommu.Host{Host: k.Host()}).Get("a")
		if err != nil || bad != nil || l == nil {
			t.Errorf("%s: %+v, %v, %v", name, l, err, bad)
			continue
		}
		i := slices.IndexFunc(l.Devices, func(d Device) bool { return d.Address == at(t, vf1) })
		if i < 0 || l.Devices[i].Home {
			t.Errorf("%s: it was on vfio-pci by then, and the lease says %+v", name, l.Devices)
		}
	}
}

// TestQuarantineThatCannotBeRead: what is in quarantine is given to nobody, whichever operation fails.
func TestQuarantineThatCannotBeRead(t *testing.T) {
	prepared := func() *hosttest.Kernel {
		k, _ := poolHost(t)
		if err := fouledVF(t, k); err != nil {
			t.Fatal(err)
		}
		return k
	}
	for what, do := range map[string]func(context.Context, *Manager) error{
		"made again": func(ctx context.Context, m *Manager) error { return m.Again(ctx, "a") },
		"started": func(_ context.Context, m *Manager) error {
			_, err := m.match(&Domain{Name: "a", Devices: []DomainDevice{{Address: at(t, vf0)}}})
			return err
		},
	} {
		k := prepared()
		for _, n := range hosttest.Sample(k.Operations(func() { _ = on(k, do) }), thisPackage) {
			k := prepared()
			failed := k.FailNth(n, unix.EIO)
			if err := on(k, do); err == nil {
				t.Errorf("%s fails, and what is in quarantine is %s", failed(), what)
			}
			k.Revive()
		}
	}
}

// TestInForce: what is made needs a declaration that can be read, what is checked one that was, and what ends none.
func TestInForce(t *testing.T) {
	wrong := errors.New("host.yaml:1: broken")
	for name, c := range map[string]struct {
		record string
		wrong  error
		fails  map[Work]bool
	}{
		"nothing declared": {},
		"broken":           {wrong: wrong, fails: map[Work]bool{Makes: true, Checks: true}},
		"broken record":    {record: "{", fails: map[Work]bool{Makes: true, Checks: true}},
	} {
		k, _ := poolHost(t)
		if c.record != "" {
			file := filepath.Join(k.Dir(), "var/lib/viaduct/in-force.json")
			if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755),
				os.WriteFile(file, []byte(c.record), 0o600)); err != nil {
				t.Fatal(err)
			}
		}
		for _, does := range []Work{Makes, Checks, Ends} {
			use, note, err := InForce(&iommu.Host{Host: k.Host()}, nil, c.wrong, does)
			if (err != nil) != c.fails[does] || (note != "") != (c.fails != nil && err == nil) || use != nil {
				t.Errorf("%s, work %d: %+v, %q, %v", name, does, use, note, err)
			}
		}
	}
}

// TestRecoverAfterApply: what an interrupted apply left is put back before a lease is made, or that is told.
func TestRecoverAfterApply(t *testing.T) {
	prepared := func() *hosttest.Kernel {
		k, _ := poolHost(t)
		file := filepath.Join(k.Dir(), "run/viaduct/apply-"+pf+".json")
		was := `{"device": "` + pf + `", "pf": "pfs: [{select: \"` + pf + `\", count: 1}]"}`
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(was), 0o600)); err != nil {
			t.Fatal(err)
		}
		return k
	}
	recovers := func(k *hosttest.Kernel) (told error) {
		return on(k, func(ctx context.Context, m *Manager) error {
			err := Recover(ctx, m.handle, func(all []bind.Recovered) {
				for _, r := range all {
					told = errors.Join(told, r.Err)
				}
			})
			return errors.Join(told, err)
		})
	}
	vfs := func(k *hosttest.Kernel) string {
		text, err := k.Host().String("sys/bus/pci/devices/" + pf + "/sriov_numvfs")
		return fmt.Sprint(text, err)
	}
	k := prepared()
	var err error
	all := k.Operations(func() { err = recovers(k) })
	want := vfs(k)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range hosttest.SampleOf(thisPackage, all) {
		k := prepared()
		failed := k.FailNth(n, unix.EIO)
		err := recovers(k)
		k.Revive()
		if now := vfs(k); err == nil && now != want {
			t.Errorf("%s fails, nothing is told, and it has %s VFs instead of %s", failed(), now, want)
		}
	}
}
