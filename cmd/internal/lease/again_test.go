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

	"golang.org/x/sys/unix"

	"viaduct/cmd/internal/hostfile"
	"viaduct/internal/host/hosttest"
	"viaduct/internal/journal"
	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/bind"
)

// plug gives a domain a VF, and unplug takes it away, as libvirt's networks do.
func plug(t *testing.T, vf string) func(*hosttest.Kernel) error {
	return func(k *hosttest.Kernel) error {
		return on(k, func(ctx context.Context, m *Manager) error {
			return m.Plug(ctx, &Port{Domain: "a", Device: at(t, vf)})
		})
	}
}

func unplug(t *testing.T, vf string) func(*hosttest.Kernel) error {
	return func(k *hosttest.Kernel) error {
		return on(k, func(ctx context.Context, m *Manager) error {
			_, err := m.Unplug(ctx, &Port{Domain: "a", Device: at(t, vf)}, 0)
			return err
		})
	}
}

// lasting gives a guest a VF for good, and restore makes that again after a boot.
func lasting(k *hosttest.Kernel) error {
	return on(k, func(ctx context.Context, m *Manager) error {
		s := Source{From: vf0, Count: 1, Settings: hostfile.Plain(sriov.Settings{sriov.VLAN: "7"})}
		_, _, _, err := m.Assign(ctx, &Request{Guest: "a", Sources: []Source{s}, Persist: true})
		return err
	})
}

func restore(k *hosttest.Kernel) error {
	return on(k, func(ctx context.Context, m *Manager) error {
		if _, err := m.LiftReturned(ctx); err != nil {
			return err
		}
		_, err := m.Restore(ctx)
		return err
	})
}

// expect reserves a VF for a guest that is to come.
func expect(k *hosttest.Kernel) error {
	return on(k, func(ctx context.Context, m *Manager) error {
		s := Source{From: vf0, Count: 1, Settings: hostfile.Plain(sriov.Settings{sriov.VLAN: "7"})}
		_, _, err := m.Expect(ctx, &Request{Guest: "a", Sources: []Source{s}})
		return err
	})
}

// TestFaultThenAgain: what libvirt, a boot or the user runs again does the rest, whichever operation failed; and what is
// told as done is done.
func TestFaultThenAgain(t *testing.T) {
	steps := func(all ...func(*hosttest.Kernel) error) func(*hosttest.Kernel) error {
		return func(k *hosttest.Kernel) error {
			for _, do := range all {
				if err := do(k); err != nil {
					return err
				}
			}
			return nil
		}
	}

	s := &sites[0]
	both := *s
	both.devices = []string{vf0, vf1}
	for name, c := range map[string]struct {
		before, do func(*hosttest.Kernel) error
	}{
		"plug":       {steps(), plug(t, vf0)},
		"plug more":  {plug(t, vf0), plug(t, vf1)},
		"unplug one": {steps(plug(t, vf0), plug(t, vf1)), unplug(t, vf1)},
		"unplug all": {plug(t, vf0), unplug(t, vf0)},
		"restore": {steps(lasting, func(k *hosttest.Kernel) error {
			return os.RemoveAll(filepath.Join(k.Dir(), journal.Dir))
		}), restore},
		"rest": {lasting, func(k *hosttest.Kernel) error {
			return on(k, func(ctx context.Context, m *Manager) error {
				_, err := m.Rest(ctx, "a", 0)
				return err
			})
		}},
		"expect": {steps(), expect},
		"get the address": {expect, func(k *hosttest.Kernel) error {
			return on(k, func(ctx context.Context, m *Manager) error { return m.SetAddress(ctx, "a", guestMAC) })
		}},
		"lose the address": {lasting, func(k *hosttest.Kernel) error {
			return on(k, func(ctx context.Context, m *Manager) error {
				return errors.Join(m.SetMoving(ctx, "a", Leaving), m.SetAddress(ctx, "a", ""))
			})
		}},
		"stay": {expect, func(k *hosttest.Kernel) error {
			return on(k, func(ctx context.Context, m *Manager) error {
				return errors.Join(m.SetMoving(ctx, "a", ""), m.RunBy(ctx, "a", 1, "qemu"),
					m.Book.KeepWords("a", []string{"qemu"}))
			})
		}},
		"leave for good": {expect, func(k *hosttest.Kernel) error {
			return on(k, func(ctx context.Context, m *Manager) error {
				if _, err := m.EndMoved(ctx, "a", 0); err != nil && !errors.As(err, new(*NoLeaseError)) {
					return err
				}
				return nil
			})
		}},
		"lift": {steps(plug(t, vf0), func(k *hosttest.Kernel) error {
			reset := "sys/bus/pci/devices/" + vf0 + "/reset"
			k.Fail[reset] = unix.EIO
			defer delete(k.Fail, reset)
			if err := unplug(t, vf0)(k); err == nil {
				return errors.New("it was reset")
			}
			return nil
		}), lift},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			prepare := func() *hosttest.Kernel {
				k, _ := poolHost(t)
				if err := c.before(k); err != nil {
					t.Fatal(err)
				}
				return k
			}
			state := func(k *hosttest.Kernel) string {
				w := both.look(t, k, nil)
				ready := "none"
				if w.lease != nil {
					ready = fmt.Sprintf("ready %v, ending %v, of", w.lease.Ready, w.lease.Ending)
					for _, d := range w.lease.Devices {
						ready += " " + d.Address.String()
					}
					if ready += " " + string(w.lease.Moving); w.lease.Runner != nil {
						ready += ", run by " + w.lease.Runner.Name
					}
				}
				words, err := BookOf(&iommu.Host{Host: k.Host()}).Words("a")
				// It is parked with one address that is no guest's or with another.
				devices := strings.ReplaceAll(w.devices, "mac=02:76:00:01:80:00", "mac="+noMAC)
				return fmt.Sprintf("%s\nlease %s\nquarantine %q, changes %q, words %q, %v", devices, ready,
					w.quarantined, w.changes, words, err)
			}
			k := prepare()
			var err error
			all := k.Operations(func() { err = c.do(k) })
			if err != nil {
				t.Fatal(err)
			}
			want := state(k)
			for _, n := range hosttest.SampleOf(thisPackage, all) {
				k := prepare()
				failed := k.FailNth(n, []error{unix.EIO, unix.EACCES, unix.ENOSPC}[n%3])
				err := c.do(k)
				k.Revive()
				first := state(k)
				if err == nil && first != want {
					t.Errorf("operation %d (%s) fails: told as done\nis %s\nto be %s", n, failed(), first, want)
				}
				if err != nil && strings.Contains(err.Error(), "quarantine") && name != "lift" {
					// That is its end, until it is lifted.
					err = lift(k)
				}
				if again := c.do(k); again != nil || state(k) != want {
					t.Errorf("operation %d (%s) fails: told %v\nis %s\nand again %v\nis %s\nto be %s", n, failed(), err,
						first, again,
						state(k), want)
				}
			}
		})
	}
}

// writes are the commands of a preview without what it says beside them, as that a way to reset is not known.
func writes(steps []bind.Action) []string {
	return slices.DeleteFunc(bind.Commands(steps), func(line string) bool { return strings.HasPrefix(line, "#") })
}

// A look that fails is told, or found nothing else than it finds without.
func TestLooksThatFail(t *testing.T) {
	for name, c := range map[string]struct {
		before func(*hosttest.Kernel) error
		look   func(ctx context.Context, m *Manager) (any, error)
	}{
		"preview": {nil, func(_ context.Context, m *Manager) (any, error) {
			r := &Request{Guest: "a", Sources: []Source{{From: "net", Count: 1, Settings: hostfile.Plain(tagged)}},
				Memory: 1 << 30, OwnerPID: 1}
			steps, err := previewed(m, r)
			return writes(steps), err
		}},
		"preview of the PF's": {nil, func(_ context.Context, m *Manager) (any, error) {
			steps, err := previewed(m, &Request{Guest: "a", Sources: []Source{{From: pf, Count: 2}}})
			return writes(steps), err
		}},
		"preview again": {lasting, func(_ context.Context, m *Manager) (any, error) {
			s := Source{From: vf0, Count: 1, Settings: hostfile.Plain(sriov.Settings{sriov.VLAN: "7"})}
			steps, err := previewed(m, &Request{Guest: "a", Sources: []Source{s}})
			return writes(steps), err
		}},
		"after a boot": {func(k *hosttest.Kernel) error {
			return errors.Join(lasting(k), os.RemoveAll(filepath.Join(k.Dir(), journal.Dir)))
		}, func(_ context.Context, m *Manager) (any, error) {
			all, err := m.all()
			if err != nil {
				return nil, err
			}
			return fmt.Sprint(len(all), all[0].Devices[0].Address, all[0].Devices[0].Nowhere), nil
		}},
		"words": {func(k *hosttest.Kernel) error {
			return on(k, func(_ context.Context, m *Manager) error { return m.Book.KeepWords("a", []string{"qemu"}) })
		}, func(_ context.Context, m *Manager) (any, error) { return m.Book.Words("a") }},
		"recorded": {lasting, func(_ context.Context, m *Manager) (any, error) {
			all, err := m.Book.Recorded()
			return len(all), err
		}},
		"address": {expect, func(_ context.Context, m *Manager) (any, error) { return m.Address("a") }},
		"may run": {lasting, func(_ context.Context, m *Manager) (any, error) {
			return nil, m.mayRun(&Request{Guest: "a", Exclusive: true})
		}},
		"preview for Xen": {nil, func(_ context.Context, m *Manager) (any, error) {
			steps, err := previewed(m, &Request{Guest: "a", OwnDriver: true, Sources: []Source{{From: pf, Count: 1}}})
			return writes(steps), err
		}},
		"guests": {lasting, func(_ context.Context, m *Manager) (any, error) { return m.Book.Guests() }},
		"all": {lasting, func(_ context.Context, m *Manager) (any, error) {
			all, err := m.all()
			return len(all), err
		}},
		"get": {lasting, func(_ context.Context, m *Manager) (any, error) {
			l, err := m.Book.Get("a")
			return l != nil && l.Guest == "a", err
		}},
		"capture": {lasting, func(_ context.Context, m *Manager) (any, error) {
			f, err := m.Capture()
			return string(f.Data), err
		}},
		"in force": {nil, func(_ context.Context, m *Manager) (any, error) {
			use, note, err := InForce(m.host, m.declaration, nil, Checks)
			return fmt.Sprint(use != nil, note), err
		}},
		"preview for a unit": {func(k *hosttest.Kernel) error {
			file := filepath.Join(k.Dir(), "sys/fs/cgroup/system.slice/web.service/cgroup.procs")
			return errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte("1\n"), 0o600))
		}, func(_ context.Context, m *Manager) (any, error) {
			steps, err := previewed(m, &Request{Guest: "a", Sources: []Source{{From: vf1, Count: 1}}, Memory: 1 << 30,
				Unit: "web.service"})
			return writes(steps), err
		}},
		"known": {lasting, func(_ context.Context, m *Manager) (any, error) {
			l, err := m.known("a")
			return err == nil && l.Ready, err
		}},
		"match": {lasting, func(_ context.Context, m *Manager) (any, error) {
			l, err := m.match(&Domain{Name: "a", Devices: []DomainDevice{{Address: at(t, vf0)}}})
			return err == nil && l.Ready, err
		}},
		"busy": {lasting, func(_ context.Context, m *Manager) (any, error) {
			l, err := m.known("a")
			if err != nil {
				return nil, err
			}
			return m.busy(l)
		}},
		"quarantine": {func(k *hosttest.Kernel) error {
			k.Fail["sys/bus/pci/devices/"+vf0+"/reset"] = unix.EIO
			if err := plug(t, vf0)(k); err != nil {
				return err
			}
			_ = unplug(t, vf0)(k) // it goes into quarantine
			return nil
		}, func(_ context.Context, m *Manager) (any, error) {
			sel, err := iommu.ParseSelector(vf0)
			if err != nil {
				return nil, err
			}
			q, err := m.InQuarantine(sel)
			return q.Why, err
		}},
	} {
		k, _ := poolHost(t)
		if c.before != nil {
			if err := c.before(k); err != nil {
				t.Fatal(err)
			}
		}

		hosttest.EachFailure(t, k, name, func() (out any, err error) {
			err = on(k, func(ctx context.Context, m *Manager) (err error) {
				out, err = c.look(ctx, m)
				return err
			})
			return out, err
		})
	}
}
