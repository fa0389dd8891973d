package lease

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

// pairHost is a host with two functions that only a reset of their bus resets.
func pairHost(t *testing.T) (k *hosttest.Kernel, v *hosttest.VFIO, one, two string) {
	t.Helper()
	one, two = "0000:07:01.0", "0000:07:02.0"
	k = hosttest.NewSmallLab(t, "0000:00:08.0", one, two)
	v = k.ServeVFIO()
	for _, a := range []string{one, two} {
		v.Devices[a] = &hosttest.VFIODevice{NoReset: true, Together: []string{one, two}}
	}
	// The first one is said to be reset by its bus.
	reset := "sys/bus/pci/devices/" + one + "/reset"
	if err := os.WriteFile(filepath.Join(k.Dir(), reset), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	k.Fail[reset] = syscall.ENOTTY
	if err := os.RemoveAll(filepath.Join(k.Dir(), "sys/bus/pci/devices", two, "reset")); err != nil {
		t.Fatal(err)
	}
	return k, v, one, two
}

// TestResetTogether: two functions that only a reset of their bus resets are lent again and again: they are reset
// together, while both are held, before the first goes back.
func TestResetTogether(t *testing.T) {
	k, v, one, two := pairHost(t)
	home := driversOf(t, k, one, two)
	for round := 1; round <= 3; round++ {
		m := without(t, k)
		l, _, notes, err := m.Assign(t.Context(), &Request{Guest: "a", Sources: []Source{{From: one, Count: 1}},
			TTL: time.Minute})
		if err != nil || len(l.Devices) != 2 {
			t.Fatalf("%+v, %v", l, err)
		}
		for _, n := range notes {
			if strings.Contains(n, "reset") {
				t.Errorf("told beforehand: %s", n)
			}
		}
		m.handle.Close()

		m = without(t, k)
		certificates, err := m.Release(t.Context(), "a", 0)
		m.handle.Close()
		if err != nil || len(certificates) != 2 {
			t.Fatalf("round %d: %+v, %v", round, certificates, err)
		}
		for _, c := range certificates {
			if c.Result != Clean || c.Reset != "bus, together: "+one+" "+two ||
				v.Devices[c.Address.String()].Resets != round {
				t.Errorf("round %d: %+v, %d resets", round, c, v.Devices[c.Address.String()].Resets)
			}
		}
		if now := driversOf(t, k, one, two); now[0] != home[0] || now[1] != home[1] {
			t.Errorf("round %d: given back %q, had %q", round, now, home)
		}
	}
}

// TestResetWithOthers: what would take along what the guest has not is told beforehand, and is not reset.
func TestResetWithOthers(t *testing.T) {
	const one, other = "0000:09:00.0", "0000:01:00.0"
	k := hosttest.NewSmallLab(t, "0000:00:05.0", one, "0000:00:0a.0", other)
	v := k.ServeVFIO()
	v.Devices[one] = &hosttest.VFIODevice{NoReset: true, Together: []string{one, other}}
	v.Devices[other] = &hosttest.VFIODevice{}
	if err := os.RemoveAll(filepath.Join(k.Dir(), "sys/bus/pci/devices", one, "reset")); err != nil {
		t.Fatal(err)
	}
	for _, w := range [][2]string{
		{"devices/" + one + "/driver_override", "vfio-pci"}, {"drivers/nvme/unbind", one}, {"drivers_probe", one},
	} {
		if err := k.Write("sys/bus/pci/"+w[0], w[1]); err != nil {
			t.Fatal(err)
		}
	}
	m := without(t, k)
	if _, _, _, err := m.Assign(t.Context(), &Request{Guest: "a", Sources: []Source{{From: one, Count: 1}},
		TTL: time.Minute}); err != nil {
		t.Fatal(err)
	}
	m.handle.Close()
	m = without(t, k)
	certificates, err := m.Release(t.Context(), "a", 0)
	if err == nil || len(certificates) != 1 || certificates[0].Result != InQuarantine ||
		!strings.Contains(certificates[0].Why, "only together with "+other) || v.Devices[other].Resets != 0 {
		t.Errorf("%+v, %v", certificates, err)
	}
}

// TestSharedFate: when one of a group cannot be scrubbed, none of it goes home, and all of it is lifted together.
func TestSharedFate(t *testing.T) {
	k, v, one, two := pairHost(t)
	h := &iommu.Host{Host: k.Host()}
	home := driversOf(t, k, one, two)
	if err := lend(t, h, Request{Guest: "a", Sources: []Source{{From: one}}}); err != nil {
		t.Fatal(err)
	}
	reset := "sys/bus/pci/devices/" + one + "/reset"
	k.Fail[reset] = syscall.EIO
	if out, err := giveBack(t, h, "a", 0); err == nil || len(out) != 2 || out[0].Result != InQuarantine ||
		out[1].Result != InQuarantine {
		t.Errorf("%+v, %v", out, err)
	}
	k.Fail[reset] = syscall.ENOTTY
	v.Devices[one].Resets, v.Devices[two].Resets = 0, 0
	err := work(t, h, func(m *Manager) error {
		both := []Quarantine{inQuarantine(t, m, two), inQuarantine(t, m, one)}
		out, err := m.Lift(t.Context(), both, false)
		if len(out) != 2 || out[0].Result != Clean || out[1].Result != Clean {
			t.Errorf("%+v", out)
		}
		return err
	})
	left, _ := BookOf(h).Quarantined()
	if now := driversOf(t, k, one, two); err != nil || !slices.Equal(now, home) || len(left) > 0 ||
		v.Devices[one].Resets != 1 || v.Devices[two].Resets != 1 {
		t.Errorf("lifted: on %q, left %v, %v", now, left, err)
	}
}

// TestResetThatFails: of a device that only its bus resets, whichever request to the kernel fails, none is clean that
// was not reset, and the next try resets it.
func TestResetThatFails(t *testing.T) {
	for n := 0; ; n++ {
		k := hosttest.NewSmallLab(t, "0000:00:05.0", "0000:01:00.0", "0000:00:0a.0", plain)
		v := k.ServeVFIO()
		v.Devices[plain] = &hosttest.VFIODevice{NoReset: true, Together: []string{plain}}
		h := &iommu.Host{Host: k.Host()}
		dir := filepath.Join(k.Dir(), "sys/bus/pci/devices", plain)
		err := errors.Join(os.RemoveAll(filepath.Join(dir, "reset")),
			os.RemoveAll(filepath.Join(dir, "sriov_totalvfs")))
		if err != nil {
			t.Fatal(err)
		}
		if err := lend(t, h, Request{Guest: "a", Sources: []Source{{From: plain}}}); err != nil {
			t.Fatal(err)
		}

		left, failed := n, uintptr(0)
		v.Fail = func(request uintptr) error {
			if left--; left != -1 {
				return nil
			}
			failed = request
			return unix.EIO
		}
		out, err := giveBack(t, h, "a", 0)
		v.Fail = nil
		resets := v.Devices[plain].Resets
		if failed == 0 {
			if err != nil || resets == 0 {
				t.Errorf("%+v, %v, reset %d times", out, err, resets)
			}
			return
		}
		if err == nil && resets == 0 || len(out) == 1 && out[0].Result == Clean && resets == 0 {
			t.Errorf("request %#x fails, and without a reset it is %+v, %v", failed, out, err)
		}
		if err != nil {
			_, again := giveBack(t, h, "a", 0)
			if none, _ := errors.AsType[*NoLeaseError](again); none != nil {
				again = lift(k)
			}
			if again != nil || v.Devices[plain].Resets == 0 {
				t.Errorf("request %#x fails (%v), and again: %v, reset %d times", failed, err, again,
					v.Devices[plain].Resets)
			}
		}
	}
}

// Of two that are reset only together, one is gone and the other cannot be reset.
func TestOneGoneOneDirty(t *testing.T) {
	k, v, one, two := pairHost(t)
	h := &iommu.Host{Host: k.Host()}
	if err := lend(t, h, Request{Guest: "a", Sources: []Source{{From: one}}}); err != nil {
		t.Fatal(err)
	}
	links, err := filepath.Glob(filepath.Join(k.Dir(), "sys/kernel/iommu_groups/*/devices", two))
	for _, link := range append(links, filepath.Join(k.Dir(), "sys/bus/pci/devices", two)) {
		err = errors.Join(err, os.Remove(link))
	}
	if err != nil {
		t.Fatal(err)
	}
	v.Devices[one].Together = []string{one}
	k.Fail["sys/bus/pci/devices/"+one+"/reset"] = unix.EIO
	certificates, err := giveBack(t, h, "a", 0)
	if err == nil || len(certificates) != 2 {
		t.Fatalf("%+v, %v", certificates, err)
	}
	for _, c := range certificates {
		want := map[string]Result{one: InQuarantine, two: Missing}[c.Address.String()]
		if c.Result != want {
			t.Errorf("%s: %s, want %s", c.Address, c.Result, want)
		}
	}
}
