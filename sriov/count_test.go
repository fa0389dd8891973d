package sriov

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

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
	"viaduct/vfio/bind"
)

const pf = "0000:01:00.0"

const pfDir = "sys/bus/pci/devices/" + pf

// open opens a handle of a kernel's host, which is closed with the test.
func open(t *testing.T, k *hosttest.Kernel) *Handle {
	t.Helper()
	return openWith(t, k, bind.Options{})
}

func openWith(t *testing.T, k *hosttest.Kernel, o bind.Options) *Handle {
	t.Helper()
	s, err := Open(&iommu.Host{Host: k.Host()}, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// device is a device of a handle's host as it is now.
func device(t *testing.T, s *Handle, address string) *iommu.Device {
	t.Helper()
	a, err := iommu.ParseAddress(address)
	if err != nil {
		t.Fatal(err)
	}
	topology, err := s.Scan()
	if err != nil {
		t.Fatal(err)
	}
	d, err := topology.Find(a)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// setCount gives the lab's PF VFs as a command does.
func setCount(t *testing.T, ctx context.Context, k *hosttest.Kernel, wish Wish) (*Plan, error) {
	t.Helper()
	s := open(t, k)
	defer s.Close()
	a, _ := iommu.ParseAddress(pf)
	plan, err := s.Make(ctx, a, wish)
	if keys, _ := s.journal.Keys("change-"); len(keys) > 0 {
		t.Errorf("records are left: %q", keys)
	}
	return plan, err
}

// alike are n VFs of one use.
func alike(n int, use Use) Wish { return Wish{VFs: Repeat(n, VFWish{Use: use})} }

// state is how many VFs there are, on which drivers and overrides, and autoprobe.
func state(t *testing.T, k *hosttest.Kernel) string {
	t.Helper()
	var out []string
	s := open(t, k)
	defer s.Close()
	for _, vf := range device(t, s, pf).SRIOV.VFs {
		d, err := iommu.ReadDevice(s.Host(), vf.Address)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, d.Driver+"/"+d.DriverOverride)
	}
	autoprobe, err := k.Host().String(pfDir + "/sriov_drivers_autoprobe")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(append(out, autoprobe), " ")
}

func TestCreate(t *testing.T) {
	for use, want := range map[Use]string{
		UseNone: "/none /none 1",
		UseVFIO: "vfio-pci/vfio-pci vfio-pci/vfio-pci 1",
		UseHome: "igbvf/ igbvf/ 1",
	} {
		k := hosttest.NewLab(t, nil)
		if _, err := setCount(t, context.Background(), k, alike(2, use)); err != nil {
			t.Fatalf("%s: %v", use, err)
		}
		if got := state(t, k); got != want {
			t.Errorf("%s: %s, want %s", use, got, want)
		}
		if use != UseHome {
			for _, w := range k.Log {
				if strings.HasSuffix(w, "=igbvf") {
					t.Errorf("%s: a VF met the host's driver: %s", use, w)
				}
			}
		}
	}
}

func TestOrder(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	if _, err := setCount(t, context.Background(), k, alike(2, UseNone)); err != nil {
		t.Fatal(err)
	}
	k.Log = nil
	if _, err := setCount(t, context.Background(), k, alike(1, UseNone)); err != nil {
		t.Fatal(err)
	}
	want := []string{
		pfDir + "/sriov_numvfs=0",
		pfDir + "/sriov_drivers_autoprobe=0",
		pfDir + "/sriov_numvfs=1",
		pfDir + "/virtfn0/driver_override=none",
		pfDir + "/sriov_drivers_autoprobe=1",
	}
	if !slices.Equal(k.Log, want) {
		t.Errorf("writes\n%s\nwant\n%s", strings.Join(k.Log, "\n"), strings.Join(want, "\n"))
	}
	k.Log = nil
	if _, err := setCount(t, context.Background(), k, alike(1, UseNone)); err != nil || len(k.Log) != 0 {
		t.Errorf("the count is right already: %v, writes %v", err, k.Log)
	}
	if _, err := setCount(t, context.Background(), k, alike(0, UseNone)); err != nil || state(t, k) != "1" {
		t.Errorf("destroy: %v, left %q", err, state(t, k))
	}
}

// A change of the number of VFs has the more time the more VFs are made or removed, where nobody says how long it may
// take.
func TestTimeOfCount(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	for _, n := range []int{2, 7, 1} {
		plan, err := setCount(t, context.Background(), k, alike(n, UseNone))
		if err != nil {
			t.Fatal(err)
		}
		counts := 0
		for _, step := range append(plan.Clear, plan.Before...) {
			if !strings.HasSuffix(step.Path, "sriov_numvfs") {
				continue
			}
			counts++
			many := plan.Want
			if step.Value == "0" {
				many = plan.Have
			}
			if step.Extra < time.Duration(many)*time.Second {
				t.Errorf("from %d to %d: %s has %s more", plan.Have, plan.Want, step, step.Extra)
			}
		}
		if (counts == 2) != (plan.Have > 0) || counts == 0 {
			t.Errorf("from %d to %d: %d counts", plan.Have, plan.Want, counts)
		}
	}
}

// Autoprobe that was off stays off.
func TestAutoprobeOff(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	if err := k.Host().Write(pfDir+"/sriov_drivers_autoprobe", "0"); err != nil {
		t.Fatal(err)
	}
	if _, err := setCount(t, context.Background(), k, alike(2, UseVFIO)); err != nil {
		t.Fatal(err)
	}
	if got := state(t, k); got != "vfio-pci/vfio-pci vfio-pci/vfio-pci 0" {
		t.Error(got)
	}
}

func TestFailure(t *testing.T) {
	for name, c := range map[string]struct {
		break_ func(*hosttest.Kernel)
		says   string
	}{
		"no room": {func(k *hosttest.Kernel) { k.Fail[pfDir+"/sriov_numvfs"] = unix.ENOMEM },
			"pci=realloc"},
		"fewer than asked": {func(k *hosttest.Kernel) { k.Partial = 1 },
			"its driver igb made 1 VFs instead of 3, without an error"},
		"override refused": {func(k *hosttest.Kernel) {
			k.Fail[pfDir+
				"/virtfn1/driver_override"] = unix.EACCES
		}, "virtfn1/driver_override"},
		"autoprobe refused": {func(k *hosttest.Kernel) {
			k.Fail[pfDir+
				"/sriov_drivers_autoprobe"] = unix.EACCES
		}, "sriov_drivers_autoprobe"},
		"a VF cannot be taken": {func(k *hosttest.Kernel) { k.Probe["vfio-pci"] = unix.EINVAL },
			"did not bind it to vfio-pci"},
		"somebody takes a VF first": {func(k *hosttest.Kernel) { k.After = thief(k) }, "must have no driver"},
	} {
		t.Run(name, func(t *testing.T) {
			k := hosttest.NewLab(t, nil)
			use := UseNone
			if strings.Contains(name, "taken") {
				use = UseVFIO
			}
			c.break_(k)
			_, err := setCount(t, context.Background(), k, alike(3, use))
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("error %v, want one that says %q", err, c.says)
			}
			if got := state(t, k); got != "1" {
				t.Errorf("left: %s", got)
			}
		})
	}
}

// thief binds a new VF to the host's driver as soon as it can be.
func thief(k *hosttest.Kernel) func(string, string) {
	return func(name, value string) {
		if strings.HasSuffix(name, "sriov_numvfs") && value != "0" {
			k.After = nil
			_ = k.Write(pfDir+"/virtfn0/driver_override", "igbvf")
			_ = k.Write("sys/bus/pci/drivers_probe", "0000:01:10.0")
		}
	}
}

func TestInterrupted(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	ctx, cancel := context.WithCancel(context.Background())
	k.After = func(name, value string) {
		if strings.HasSuffix(name, "sriov_numvfs") {
			cancel()
		}
	}
	if _, err := setCount(t, ctx, k, alike(3, UseNone)); err == nil || !strings.Contains(err.Error(), "interrupted") {
		t.Errorf("error %v", err)
	}
	if got := state(t, k); got != "1" {
		t.Errorf("left: %s", got)
	}
}

func TestPlanRefuses(t *testing.T) {
	s := open(t, hosttest.NewLab(t, nil))
	d := device(t, s, pf)
	if _, err := s.PlanCount(d, alike(8, UseNone)); !isA[*RangeError](err) {
		t.Errorf("8 VFs: %v", err)
	}
	vf := iommu.Device{Name: "0000:02:10.0", PhysFn: &d.Address}
	if _, err := s.PlanCount(&vf, alike(1, UseNone)); !isA[*NotPFError](err) || !strings.Contains(err.Error(), pf) {
		t.Errorf("VFs of a VF: %v", err)
	}
	d.Driver = ""
	if _, err := s.PlanCount(d, alike(1, UseNone)); err == nil || !strings.Contains(err.Error(), "no driver") {
		t.Errorf("a PF without a driver: %v", err)
	}
}

// isA reports whether an error wraps one of a type.
func isA[E error](err error) bool {
	_, ok := errors.AsType[E](err)
	return ok
}

// isWrite tells writes to the kernel.
func isWrite(op, name string) bool { return op == "write" && strings.HasPrefix(name, "sys/") }

// A run that was killed at any write is finished or undone by the next one, and autoprobe is as it was.
func TestRecover(t *testing.T) {
	a, _ := iommu.ParseAddress(pf)
	for _, use := range []Use{UseNone, UseVFIO, UseHome} {
		for _, from := range []int{0, 3} {
			for n := 0; ; n++ {
				k := hosttest.NewLab(t, nil)
				if from > 0 {
					if _, err := setCount(t, context.Background(), k, alike(from, UseNone)); err != nil {
						t.Fatal(err)
					}
				}
				s := open(t, k)
				k.KillAt(n, isWrite)
				_, _ = s.Make(context.Background(), a, alike(2, use))
				s.Close()
				if !k.Revive() {
					break // it has fewer writes
				}

				where := fmt.Sprintf("%s from %d, killed before write %d", use, from, n+1)
				next := open(t, k)
				recovered, err := next.Recover(context.Background())
				if err != nil {
					t.Fatal(err)
				}
				for _, r := range recovered {
					if r.Err != nil {
						t.Errorf("%s: %v", where, r.Err)
					}
				}
				next.Close()

				got := strings.Fields(state(t, k))
				autoprobe, vfs := got[len(got)-1], got[:len(got)-1]
				if autoprobe != "1" || len(vfs) != 0 && len(vfs) != 2 && len(vfs) != from {
					t.Errorf("%s: %v", where, got)
				}
				for _, vf := range vfs {
					if use != UseHome && strings.HasPrefix(vf, "igbvf") || vf == "/" {
						t.Errorf("%s: %v", where, got)
					}
				}
			}
		}
	}
}

// What the kernel is going to refuse is known before it is asked.
func TestForecast(t *testing.T) {
	for name, c := range map[string]struct {
		files map[string]string
		says  string
	}{
		"room": {nil, ""},
		"no memory": {map[string]string{"resource": strings.Repeat("0x0 0x0 0x0\n", 7) + "0x0 0x3fff 0x14220c\n"},
			"no memory range for its VFs' BAR 0"},
		"no buses":   {map[string]string{"sriov_offset": "384\n"}, "the last VF would be on bus 02"},
		"far enough": {map[string]string{"sriov_offset": "128\n"}, ""},
		"a wide step": {map[string]string{"sriov_offset": "128\n", "sriov_stride": "256\n"},
			"the last VF would be on bus 03"},
	} {
		k := hosttest.NewLab(t, nil)
		for file, text := range c.files {
			if err := os.WriteFile(filepath.Join(k.Dir(), pfDir, file), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}

		port, err := filepath.EvalSymlinks(filepath.Join(k.Dir(), pfDir))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(port, "../subordinate_bus_number"), []byte("1\n"), 0o600); err != nil {
			t.Fatal(err)
		}

		s := open(t, k)
		err = forecast(s.Host(), device(t, s, pf), 3)
		if c.says == "" && err != nil || c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)) {
			t.Errorf("%s: %v, want %q", name, err, c.says)
		}
	}
}

// A driver that makes as many VFs as there were before, and not those that were asked for: they are new ones all the
// same.
func TestPartialAfterOthers(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	if _, err := setCount(t, context.Background(), k, alike(2, UseNone)); err != nil {
		t.Fatal(err)
	}
	k.Partial = 2
	_, err := setCount(t, context.Background(), k, alike(4, UseNone))
	if err == nil || !strings.Contains(err.Error(), "made 2 VFs instead of 4, without an error") ||
		!strings.Contains(err.Error(), "had 2 VFs before and has 0 now") {
		t.Errorf("error %v", err)
	}
	if got := state(t, k); got != "1" {
		t.Errorf("left: %s", got)
	}
}

// VFs for the host get its driver also where autoprobe is off, and it is off again afterwards.
func TestHomeWithoutAutoprobe(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	if err := k.Host().Write("sys/bus/pci/devices/"+pf+"/sriov_drivers_autoprobe", "0"); err != nil {
		t.Fatal(err)
	}
	if _, err := setCount(t, context.Background(), k, alike(2, UseHome)); err != nil {
		t.Fatal(err)
	}
	if got := state(t, k); got != "igbvf/ igbvf/ 0" {
		t.Errorf("%s", got)
	}
}

// A count that is right already is left alone, with what it was made for; what is not so is said.
func TestRightCount(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	if _, err := setCount(t, context.Background(), k, alike(2, UseHome)); err != nil {
		t.Fatal(err)
	}
	s := open(t, k)
	p, err := s.PlanCount(device(t, s, pf), Wish{VFs: Repeat(2, VFWish{UseVFIO, Settings{VLAN: "7"}})})
	if err != nil || p.Changes() || len(p.Notes) != 2 || !strings.Contains(p.Notes[0], "keep their settings") ||
		!strings.Contains(p.Notes[1], "not all are on a vfio driver") {
		t.Errorf("%+v, %v", p, err)
	}
}

// VFs of one PF may be for different uses: those for guests never meet the host's driver, which the others get last.
func TestMixedUses(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	wish := Wish{VFs: []VFWish{{Use: UseNone}, {Use: UseVFIO}, {Use: UseHome}}}
	s := open(t, k)
	p, err := s.PlanCount(device(t, s, pf), wish)
	if err != nil {
		t.Fatal(err)
	}
	notes := strings.Join(p.Notes, "; ")
	if !strings.Contains(notes, "each VF of 2 is probed") || !strings.Contains(notes, "each VF of 1 is taken") {
		t.Error(notes)
	}
	s.Close()
	if _, err := setCount(t, context.Background(), k, wish); err != nil {
		t.Fatal(err)
	}
	if got := state(t, k); got != "/none vfio-pci/vfio-pci igbvf/ 1" {
		t.Error(got)
	}
}

func TestVectors(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	if err := os.WriteFile(filepath.Join(k.Dir(), pfDir, "sriov_vf_total_msix"), []byte("10\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := open(t, k)
	for vectors, fits := range map[string]bool{"2": true, "3": false} {
		_, err := s.PlanCount(device(t, s, pf), Wish{VFs: Repeat(4, VFWish{Settings: Settings{MSIX: vectors}})})
		if isA[*ForecastError](err) == fits {
			t.Errorf("%s vectors for each of 4 VFs of 10: %v", vectors, err)
		}
	}
}
