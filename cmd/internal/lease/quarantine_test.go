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

	"viaduct/cmd/internal/hostfile"
	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
	"viaduct/vfio/holder"
)

func inQuarantine(t *testing.T, m *Manager, text string) Quarantine {
	t.Helper()
	sel, err := iommu.ParseSelector(text)
	if err != nil {
		t.Fatal(err)
	}
	q, err := m.InQuarantine(sel)
	if err != nil {
		t.Fatal(err)
	}
	return q
}

// fouled is a host whose controller is in quarantine since the boot of this id, as its reset failed.
func fouled(t *testing.T, boot string) (*hosttest.Kernel, *iommu.Host) {
	t.Helper()
	k, h := vfioHost(t, true)
	k.Fail["sys/bus/pci/devices/"+plain+"/reset"] = unix.EIO
	started(t, k, boot, "")
	if err := lend(t, h, Request{Guest: "a", Sources: []Source{{From: plain}}}); err != nil {
		t.Fatal(err)
	}
	if certificates, err := giveBack(t, h, "a", 0); err == nil || len(certificates) != 1 ||
		certificates[0].Result != InQuarantine {
		t.Fatalf("%+v, %v", certificates, err)
	}
	return k, h
}

// started has a host tell which boot this is, and by what it was loaded, unless that is "".
func started(t *testing.T, k *hosttest.Kernel, boot, loader string) {
	t.Helper()
	dir := filepath.Join(k.Dir(), "proc/sys/kernel")
	err := errors.Join(os.MkdirAll(filepath.Join(dir, "random"), 0o755),
		os.WriteFile(filepath.Join(dir, "random/boot_id"), []byte(boot+"\n"), 0o600),
		os.RemoveAll(filepath.Join(dir, "bootloader_type")))
	if loader != "" {
		err = errors.Join(err, os.WriteFile(filepath.Join(dir, "bootloader_type"), []byte(loader+"\n"), 0o600))
	}
	if err != nil {
		t.Fatal(err)
	}
}

// A quarantine ends with the boot in which the slot was reset, and then for good; not by kexec, nor where that cannot be
// known.
func TestQuarantineUntilBoot(t *testing.T) {
	const grub, kexec = "114", "208"
	for _, c := range []struct {
		name, before, boot, loader string
		ends                       bool
	}{
		{"started anew", "one", "two", grub, true},
		{"the same boot", "one", "one", grub, false},
		{"kexec", "one", "two", kexec, false},
		{"no word of what has loaded it", "one", "two", "", false},
		{"of a viaduct that kept no boot", "", "two", grub, false},
	} {
		k, h := fouled(t, c.before)
		started(t, k, c.boot, c.loader)
		all, err := BookOf(h).Quarantined()
		if err != nil || (len(all) == 0) != c.ends {
			t.Errorf("%s: %v, %v", c.name, all, err)
		}
		if err := BookOf(h).forgetReset(); err != nil {
			t.Error(err)
		}
		started(t, k, "three", kexec)
		if all, err = BookOf(h).Quarantined(); err != nil || (len(all) == 0) != c.ends {
			t.Errorf("%s, and then kexec: %v, %v", c.name, all, err)
		}
	}
}

// What still cannot be reset is freed by force, with both reasons kept; not while somebody has it.
func TestQuarantineForced(t *testing.T) {
	_, h := fouled(t, "one")
	lift := func(force bool) (out []Certificate, err error) {
		err = work(t, h, func(m *Manager) error {
			out, err = m.Lift(t.Context(), []Quarantine{inQuarantine(t, m, plain)}, force)
			return err
		})
		return out, err
	}
	if out, err := lift(false); err == nil || len(out) != 1 || out[0].Result != InQuarantine {
		t.Errorf("not forced: %+v, %v", out, err)
	}
	end := hide(t, h, "group")
	if _, err := lift(true); !errors.Is(err, holder.ErrRefused) {
		t.Errorf("while somebody has it: %v", err)
	}
	if err := end(); err != nil {
		t.Fatal(err)
	}
	out, err := lift(true)
	if err != nil || len(out) != 1 || out[0].Result != Unreset || strings.Count(out[0].Why, "input/output error") != 2 {
		t.Errorf("forced: %+v, %v", out, err)
	}
	if err := lend(t, h, Request{Guest: "b", Sources: []Source{{From: plain}}}); err != nil {
		t.Errorf("freed by force, it cannot be lent: %v", err)
	}
}

// A device that is gone is known by its address, and forgotten by force alone.
func TestQuarantineOfGone(t *testing.T) {
	_, h := fouled(t, "one")
	book := BookOf(h)
	all, err := book.Quarantined()
	if err != nil {
		t.Fatal(err)
	}
	for _, q := range all {
		err := book.State.Delete(quarantineKey(q.Place))
		q.Place = "0000:00:1f.0/00.0"
		if err := errors.Join(err, book.State.Put(quarantineKey(q.Place), q)); err != nil {
			t.Fatal(err)
		}
	}
	for _, force := range []bool{false, true} {
		err := work(t, h, func(m *Manager) error {
			out, err := m.Lift(t.Context(), []Quarantine{inQuarantine(t, m, plain)}, force)
			if force && (len(out) != 1 || out[0].Result != Missing ||
				!strings.Contains(out[0].Why, "input/output error")) {
				t.Errorf("%+v", out)
			}
			return err
		})
		left, _ := book.Quarantined()
		if (err == nil) != force || (len(left) == 0) != force {
			t.Errorf("forced %v: %v, left %v", force, err, left)
		}
	}
}

// What nothing resets is lent only to who says that he knows, and told of when it comes back.
func TestNoReset(t *testing.T) {
	const device = "0000:00:03.0"
	k := hosttest.NewKernel(t, hosttest.Made(
		hosttest.PCI{At: device, ID: "8086:10d3", Class: "020000", Driver: "e1000e", Group: 3},
	))
	k.Register("vfio-pci")
	h := &iommu.Host{Host: k.Host()}
	err := lend(t, h, Request{Guest: "a", Sources: []Source{{From: device}}})
	if !errors.Is(err, holder.ErrRefused) || !strings.Contains(err.Error(), "nothing can reset it") ||
		!strings.Contains(err.Error(), "--no-reset") {
		t.Errorf("lent: %v", err)
	}
	if now := driversOf(t, k, device)[0]; !strings.HasPrefix(now, "e1000e/") {
		t.Errorf("refused, it is on %s", now)
	}
	for range 2 {
		if err := lend(t, h, Request{Guest: "a", Sources: []Source{{From: device}}, NoReset: true}); err != nil {
			t.Fatal(err)
		}
		out, err := giveBack(t, h, "a", time.Second)
		if err != nil || len(out) != 1 || out[0].Result != Unreset || out[0].Why == "" || out[0].Driver != "e1000e" {
			t.Errorf("%+v, %v", out, err)
		}
	}

	// In quarantine for another reason, it is still what nothing has to reset.
	if err := lend(t, h, Request{Guest: "a", Sources: []Source{{From: device}}, NoReset: true}); err != nil {
		t.Fatal(err)
	}
	k.Probe["e1000e"] = unix.EIO
	if out, err := giveBack(t, h, "a", 0); err == nil || len(out) != 1 || out[0].Result != InQuarantine {
		t.Errorf("%+v, %v", out, err)
	}
	delete(k.Probe, "e1000e")
	err = work(t, h, func(m *Manager) error {
		_, err := m.Lift(t.Context(), []Quarantine{inQuarantine(t, m, device)}, false)
		return err
	})
	if now := driversOf(t, k, device)[0]; err != nil || !strings.HasPrefix(now, "e1000e/") {
		t.Errorf("lifted, it is on %s: %v", now, err)
	}
}

// That a controller's data stays is told with each certificate.
func TestNoteOfMedia(t *testing.T) {
	_, h := vfioHost(t, true)
	if err := lend(t, h, Request{Guest: "a", Sources: []Source{{From: plain}}}); err != nil {
		t.Fatal(err)
	}
	out, err := giveBack(t, h, "a", 0)
	if err != nil || len(out) != 1 || !strings.Contains(out[0].Note, "not erased") {
		t.Errorf("%+v, %v", out, err)
	}
}

// A device that was gone when its lease ended is given to nobody when it comes back, until it has been reset.
func TestLostDeviceReturns(t *testing.T) {
	k, h := vfioHost(t, true)
	if err := lend(t, h, Request{Guest: "a", Sources: []Source{{From: plain}}}); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(k.Dir(), "sys/bus/pci/devices", plain)
	if err := os.Rename(link, filepath.Join(k.Dir(), "gone")); err != nil {
		t.Fatal(err)
	}
	err := work(t, h, func(m *Manager) error {
		out, err := m.Release(t.Context(), "a", 0)
		if len(out) != 1 || out[0].Result != Missing {
			t.Errorf("released while it is gone: %+v", out)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	returned := func() (out []Certificate) {
		t.Helper()
		err := work(t, h, func(m *Manager) (err error) {
			out, err = m.LiftReturned(t.Context())
			return err
		})
		if err != nil {
			t.Error(err)
		}
		return out
	}
	if out := returned(); len(out) > 0 {
		t.Errorf("still gone: %+v", out)
	}

	if err := os.Rename(filepath.Join(k.Dir(), "gone"), link); err != nil {
		t.Fatal(err)
	}
	err = lend(t, h, Request{Guest: "b", Sources: []Source{{From: plain}}})
	if e, ok := errors.AsType[*ExhaustedError](err); !ok || e.Quarantined != 1 {
		t.Errorf("it is back, and not reset: %v", err)
	}
	resets := func() int {
		return len(slices.DeleteFunc(slices.Clone(k.Log), func(w string) bool {
			return !strings.Contains(w,
				"/reset=")
		}))
	}
	before := resets()
	if out := returned(); len(out) != 1 || out[0].Result != Clean || resets() != before+1 {
		t.Errorf("it is back: %+v, reset %d times", out, resets()-before)
	}
	if err := lend(t, h, Request{Guest: "b", Sources: []Source{{From: plain}}}); err != nil {
		t.Errorf("reset: %v", err)
	}
}

// All that is asked for is lifted, of whatever group, unless nothing may be done to one of it; and two of a group that
// fail, each for its own reason, keep that.
func TestLiftSeveral(t *testing.T) {
	k, _ := poolHost(t)
	for _, vf := range []string{vf0, vf1} {
		if err := plug(t, vf)(k); err != nil {
			t.Fatal(err)
		}
		k.Fail["sys/bus/pci/devices/"+vf+"/reset"] = unix.EIO
	}
	if err := release(k); err == nil || strings.Count(err.Error(), "input/output error") != 2 {
		t.Errorf("released: %v", err)
	}
	if err := lift(k); err == nil || strings.Count(err.Error(), "is in quarantine") != 2 {
		t.Errorf("not reset: %v", err)
	}
	clear(k.Fail)
	if err := lift(k); err != nil {
		t.Error(err)
	}
	if left, err := BookOf(&iommu.Host{Host: k.Host()}).Quarantined(); err != nil || len(left) > 0 {
		t.Errorf("left are %v, %v", left, err)
	}

	k, _, one, two := pairHost(t)
	h := &iommu.Host{Host: k.Host()}
	if err := lend(t, h, Request{Guest: "a", Sources: []Source{{From: one}}}); err != nil {
		t.Fatal(err)
	}
	for _, device := range []string{one, two} {
		canReset(t, k, device)
		k.Fail["sys/bus/pci/devices/"+device+"/reset"] = unix.EIO
	}
	out, err := giveBack(t, h, "a", 0)
	for _, c := range out {
		if !strings.Contains(c.Why, "input/output error") || strings.Contains(c.Why, "its IOMMU group") {
			t.Errorf("%s: %s", c.Address, c.Why)
		}
	}
	if err == nil || len(out) != 2 {
		t.Errorf("%+v, %v", out, err)
	}
}

// What a driver does not tell was as it was declared, or as VFs begin; an address that is made up for each VF is none
// that one had.
func TestBeforeUntold(t *testing.T) {
	k := newKernel(t, 7)
	k.Net.Unreported = map[int]bool{unix.IFLA_VF_MAC: true, unix.IFLA_VF_VLAN: true}
	m := managerOf(t, k, strings.Replace(declaration, "pool: net",
		"pool: net\n        vlan: 9\n        mac: stable", 1))
	r := &Request{Guest: "a", Sources: []Source{{From: "net", Count: 1, Settings: hostfile.Plain(tagged)}},
		TTL: time.Minute}
	l, _, _, err := m.Assign(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	if before := l.Devices[0].Before; before["vlan"] != "9" || before["mac"] == "stable" {
		t.Errorf("it had %v", before)
	}
}

// TestNoLeaseEndsWithoutQuarantine: no lease ends whose quarantine could not be written down. It stays, says so, and is
// released when the record can be written.
func TestNoLeaseEndsWithoutQuarantine(t *testing.T) {
	type host func(*testing.T) (k *hosttest.Kernel, device, other string)
	controller := func(t *testing.T) (*hosttest.Kernel, string, string) {
		k, h := vfioHost(t, true)
		k.Process(keeperOfLease, "keeper")
		err := lend(t, h, Request{Guest: "a", Sources: []Source{{From: plain}}, OwnerPID: keeperOfLease})
		if err != nil {
			t.Fatal(err)
		}
		return k, plain, ""
	}
	drawn := func(t *testing.T) (*hosttest.Kernel, string, string) {
		k, _ := poolHost(t)
		if err := errors.Join(plug(t, vf0)(k), plug(t, vf1)(k)); err != nil {
			t.Fatal(err)
		}
		return k, vf1, vf0
	}
	broken := func(k *hosttest.Kernel, device string) (mend func() error) {
		file := "sys/bus/pci/devices/" + device + "/reset"
		k.Fail[file] = unix.EIO
		return func() error {
			delete(k.Fail, file)
			return nil
		}
	}
	gone := func(k *hosttest.Kernel, device string) (mend func() error) {
		link, away := filepath.Join(k.Dir(), "sys/bus/pci/devices", device), filepath.Join(k.Dir(), "gone")
		if err := os.Rename(link, away); err != nil {
			t.Fatal(err)
		}
		return func() error { return os.Rename(away, link) }
	}

	for name, c := range map[string]struct {
		host host
		harm func(k *hosttest.Kernel, device string) (mend func() error)
		end  func(*hosttest.Kernel) error
	}{
		"release":           {controller, broken, release},
		"release of a lost": {controller, gone, release},
		"reclaim": {controller, broken, func(k *hosttest.Kernel) error {
			k.End(keeperOfLease)
			return reclaim(k)
		}},
		"unplug": {drawn, broken, unplug(t, vf1)},
	} {
		k, device, other := c.host(t)
		mend := c.harm(k, device)
		k.SetFault(func(op, file string) error {
			if op == "replace" && strings.HasPrefix(file, "var/lib/viaduct/"+quarantined) {
				return unix.EROFS
			}
			return nil
		})
		err := c.end(k)
		k.Revive()

		if !errors.Is(err, unix.EROFS) || !strings.Contains(err.Error(), "could not be written down") ||
			strings.Contains(err.Error(), "is in quarantine") {
			t.Errorf("%s: it says %v", name, err)
		}
		book := BookOf(&iommu.Host{Host: k.Host()})
		l, bad := book.Get("a")
		if bad != nil || l == nil || !l.Has(at(t, device)) || other != "" && !l.Has(at(t, other)) {
			t.Errorf("%s: the lease is %+v, %v", name, l, bad)
		}
		err = on(k, func(ctx context.Context, m *Manager) error {
			_, _, _, err := m.Assign(ctx, &Request{Guest: "b", Sources: []Source{{From: device, Count: 1}}})
			return err
		})
		if err == nil {
			t.Errorf("%s: another guest got it", name)
		}

		if err := errors.Join(mend(), release(k)); err != nil {
			t.Errorf("%s: when the record can be written: %v", name, err)
		}
		left, err := book.Quarantined()
		if l, bad = book.Get("a"); err != nil || bad != nil || len(left) > 0 || l != nil {
			t.Errorf("%s, and in the end: %+v, quarantine %v, %v, %v", name, l, left, err, bad)
		}
	}
}
