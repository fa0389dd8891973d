package bind

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
	"viaduct/vfio/holder"
)

const (
	gpu, audio  = "0000:03:00.0", "0000:03:00.1"
	smbus, isa  = "0000:00:14.0", "0000:00:14.3"
	vmd, vmdSSD = "0000:00:0e.0", "10000:e1:00.0"
)

func drivers(t *testing.T, b *Handle, addresses ...string) (out [][2]string) {
	t.Helper()
	for _, a := range addresses {
		out = append(out, bound(t, b, a))
	}
	return out
}

// Companions are kept off the host's drivers and get no VFIO driver, and all go back to what they had.
func TestCompanions(t *testing.T) {
	k := hosttest.NewBoard(t)
	b := open(t, k, Options{})
	ctx := context.Background()
	all := []string{gpu, audio, smbus, isa}
	home := drivers(t, b, all...)
	if _, err := b.Move(ctx, Take(Auto), read(t, b, gpu).Address); err != nil {
		t.Fatal(err)
	}
	v, n := [2]string{"vfio-pci", "vfio-pci"}, [2]string{"", "none"}
	if got := drivers(t, b, all...); !slices.Equal(got, [][2]string{v, v, n, n}) {
		t.Errorf("taken: %q", got)
	}
	if r, err := b.Move(ctx, Take(Auto), read(t, b, gpu).Address); err != nil ||
		slices.ContainsFunc(r, func(r Result) bool { return len(r.Steps) > 0 }) {
		t.Errorf("again: %+v, %v", r, err)
	}
	if _, err := b.Move(ctx, GiveBack(), read(t, b, gpu).Address); err != nil {
		t.Error(err)
	}
	if got := drivers(t, b, all...); !slices.Equal(got, home) {
		t.Errorf("given back: %q, had %q", got, home)
	}

	// One that is named itself is handed over.
	if _, err := b.Move(ctx, Take(Auto), read(t, b, smbus).Address); err != nil {
		t.Fatal(err)
	}
	if got := drivers(t, b, smbus, isa); !slices.Equal(got, [][2]string{v, n}) {
		t.Errorf("named itself: %q", got)
	}
}

// A take that is killed at any write is put back, companions too.
func TestCompanionsKilled(t *testing.T) {
	for n := 0; ; n++ {
		k := hosttest.NewBoard(t)
		b := open(t, k, Options{})
		all := []string{gpu, audio, smbus, isa}
		home := drivers(t, b, all...)
		k.KillAt(n, isWrite)
		_, _ = b.Move(context.Background(), Take(Auto), read(t, b, gpu).Address)
		b.Close()
		if !k.Revive() {
			return
		}
		next := open(t, k, Options{})
		recovered, err := next.RecoverPatiently(context.Background())
		if got := drivers(t, next, all...); err != nil || !slices.Equal(got, home) {
			t.Errorf("killed before write %d: %q, had %q: %v, %v", n, got, home, recovered, err)
		}
		next.Close()
	}
}

// A group that is given back is home or taken as a whole after a command was killed, wherever that was.
func TestGroupKilled(t *testing.T) {
	changes := func(op, _ string) bool { return slices.Contains([]string{"write", "replace", "remove"}, op) }
	for _, take := range []bool{true, false} {
		for n := 0; ; n++ {
			k := hosttest.NewBoard(t)
			all := []string{gpu, audio, smbus, isa}
			first := open(t, k, Options{})
			home := drivers(t, first, all...)
			taken := [][2]string{{"vfio-pci", "vfio-pci"}, {"vfio-pci", "vfio-pci"}, {"", "none"}, {"", "none"}}
			goal := Take(Auto)
			if !take {
				if _, err := first.Move(t.Context(), goal, read(t, first, gpu).Address); err != nil {
					t.Fatal(err)
				}
				goal = GiveBack()
			}
			first.Close()

			b := open(t, k, Options{})
			k.KillAt(n, changes)
			_, _ = b.Move(t.Context(), goal, read(t, b, gpu).Address)
			b.Close()
			if !k.Revive() {
				break
			}
			next := open(t, k, Options{})
			recovered, err := next.RecoverPatiently(t.Context())
			got := drivers(t, next, all...)
			if keys, _ := next.journal.Keys("change-"); err != nil || len(keys) > 0 || !slices.Equal(got, home) &&
				!slices.Equal(got, taken) {
				t.Errorf("take %v, killed before change %d: %q, records %q: %v, %v", take, n, got, keys, recovered, err)
			}
			next.Close()
		}
	}
}

// What is left of a unit whose other devices were put back has not arrived, though it is where it was to go.
func TestHalfTaken(t *testing.T) {
	k, first := newKernel(t)
	one, two := read(t, first, e1000), read(t, first, edu)
	if _, err := first.Move(t.Context(), Take(Auto), one.Address); err != nil {
		t.Fatal(err)
	}
	half := func(a iommu.Address) changeRecord {
		return changeRecord{
			Op: opTake, Unit: []iommu.Address{one.Address, two.Address}, Command: holder.Proc{PID: 1 << 30, Start: 1},
			Change: Change{Device: a, ID: one.ID, From: "e1000", To: "vfio-pci", ToOverride: "vfio-pci"},
		}
	}
	if err := errors.Join(first.journal.Put(changeKey(one.Address), half(one.Address)),
		first.journal.Delete(takenKey(two.Address)),
		k.Write("sys/bus/pci/drivers/vfio-pci/unbind", edu),
		k.Write("sys/bus/pci/devices/"+edu+"/driver_override", "\n")); err != nil {
		t.Fatal(err)
	}
	first.Close()
	next := open(t, k, Options{})
	all, err := next.RecoverPatiently(t.Context())
	if got := drivers(t, next, e1000, edu); err != nil || !slices.Equal(got, [][2]string{{"e1000", ""}, {"", ""}}) {
		t.Errorf("%q, %+v, %v", got, all, err)
	}
}

// A companion that somebody uses is not taken off its driver.
func TestCompanionInUse(t *testing.T) {
	k := hosttest.NewBoard(t)
	b := open(t, k, Options{})
	k.Process(4711, "fancontrol", "/dev/i2c-0")
	_, err := b.Move(context.Background(), Take(Auto), read(t, b, gpu).Address)
	if !errors.Is(err, holder.ErrRefused) || !strings.Contains(err.Error(), smbus+" is open in process 4711") ||
		len(k.Log) > 0 {
		t.Errorf("%v, writes %q", err, k.Log)
	}
}

// A card whose audio is in a group of its own is taken as it was named, and that is told, and that only both are reset.
func TestSiblings(t *testing.T) {
	k := hosttest.NewKernel(t, hosttest.Made(
		hosttest.PCI{At: "0000:00:01.0/0000:c3:00.0", ID: "1002:73ff", Class: "030000", Driver: "amdgpu", Group: 2},
		hosttest.PCI{At: "0000:00:01.0/0000:c3:00.1", ID: "1002:ab28", Class: "040300", Driver: "snd_hda_intel",
			Group: 3},
	))

	b := open(t, k, Options{DryRun: true})
	topology, err := b.Topology()
	if err != nil {
		t.Fatal(err)
	}

	find := func(address string) *iommu.Device {
		d, err := topology.Find(read(t, b, address).Address)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}

	for _, asked := range [][]*iommu.Device{{find("0000:c3:00.0")}, {find("0000:c3:00.0"), find("0000:c3:00.1")}} {
		j, err := b.Prepare(context.Background(), Request{Devices: asked, Goal: Take(Auto)})
		if err != nil {
			t.Fatal(err)
		}
		var notes []string
		for _, u := range j.Units {
			notes = append(notes, u.Notes...)
		}
		if len(asked) == 2 && len(notes) > 0 || len(asked) == 1 && (len(notes) != 2 ||
			!strings.Contains(notes[1], "reset only together with 0000:c3:00.1, which stays with the host")) {
			t.Errorf("on %d devices: %q", len(asked), notes)
		}
	}
}

// What is behind a Volume Management Device goes with it: it is no device to name, and who uses it uses that.
func TestVMD(t *testing.T) {
	k := hosttest.NewKernel(t, hosttest.VMD())
	k.IDs["vmd"] = []string{"8086:467f"}
	b := open(t, k, Options{})
	ctx := context.Background()
	_, err := b.Move(ctx, Take(Auto), read(t, b, vmdSSD).Address)
	if !errors.Is(err, holder.ErrRefused) || !strings.Contains(err.Error(), "name "+vmd+" instead") || len(k.Log) > 0 {
		t.Errorf("the disk alone: %v, writes %q", err, k.Log)
	}

	k.Busy["nvme0n1"] = true
	_, err = b.Move(ctx, Take(Auto), read(t, b, vmd).Address)
	if !errors.Is(err, holder.ErrRefused) || !strings.Contains(err.Error(), vmdSSD) || len(k.Log) > 0 {
		t.Errorf("a disk in use: %v, writes %q", err, k.Log)
	}
	k.Busy["nvme0n1"] = false
	r, err := b.Move(ctx, Take(Auto), read(t, b, vmd).Address)
	if err != nil || len(r) != 1 || bound(t, b, vmd)[0] != "vfio-pci" {
		t.Errorf("%+v, %v", r, err)
	}
}
