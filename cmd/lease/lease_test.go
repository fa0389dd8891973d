package lease_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"viaduct/cmd/lease"
	"viaduct/internal/host/hosttest"
	"viaduct/internal/journal"
	"viaduct/iommu"
	"viaduct/vfio/holder"
)

const (
	pf  = "0000:01:00.0"
	vf0 = "0000:01:10.0"
	vf1 = "0000:01:10.2"
)

// newKernel is a host whose PF has two VFs, which are declared as a pool, and a NIC that is declared to be taken.
func newKernel(t *testing.T) *hosttest.Kernel {
	t.Helper()
	k := hosttest.NewLab(t, nil)
	k.ResetVFs = true
	for _, w := range [][2]string{{"sriov_drivers_autoprobe", "0"}, {"sriov_numvfs", "2"}} {
		if err := k.Write("sys/bus/pci/devices/"+pf+"/"+w[0], w[1]); err != nil {
			t.Fatal(err)
		}
	}
	declare(t, k, "pfs:\n  - select: "+pf+"\n    count: 2\n    vfs:\n      - {driver: none, pool: net}\n"+
		"devices:\n  - select: 0000:06:00.0\nprotect:\n  - 0000:09:00.0\n")
	return k
}

func declare(t *testing.T, k *hosttest.Kernel, text string) {
	t.Helper()
	file := filepath.Join(k.Dir(), "etc/viaduct/host.yaml")
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// open opens the books as one piece of work does.
func open(t *testing.T, k *hosttest.Kernel) *lease.Books {
	t.Helper()
	b, err := lease.Open(&iommu.Host{Host: k.Host()}, lease.Options{Tell: func(note string) { t.Log(note) }})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// assign is one piece of work.
func assign(t *testing.T, k *hosttest.Kernel, r lease.Request) (lease.Lease, bool, error) {
	t.Helper()
	b := open(t, k)
	defer b.Close()
	return b.Assign(context.Background(), r)
}

func one(guest, from string) lease.Request {
	return lease.Request{Guest: guest, For: "pod default/" + guest, Sources: []lease.Source{{From: from}}, Persist: true}
}

func driver(t *testing.T, k *hosttest.Kernel, address string) string {
	t.Helper()
	a, err := iommu.ParseAddress(address)
	if err != nil {
		t.Fatal(err)
	}
	name, err := iommu.ReadDriver(&iommu.Host{Host: k.Host()}, a)
	if err != nil {
		t.Fatal(err)
	}
	return name
}

// A guest gets what it names and nobody else does, asked again it has the same, and released the device is as it was.
func TestAssignAndRelease(t *testing.T) {
	k := newKernel(t)
	l, fresh, err := assign(t, k, one("a", vf0))
	if err != nil || !fresh || len(l.Devices) != 1 || l.Devices[0].Address.String() != vf0 || driver(t, k, vf0) != "vfio-pci" {
		t.Fatalf("%+v, %v, %v, on %q", l, fresh, err, driver(t, k, vf0))
	}
	if again, fresh, err := assign(t, k, one("a", vf0)); err != nil || fresh || !again.Has(l.Devices[0].Address) {
		t.Errorf("asked again: %+v, %v, %v", again, fresh, err)
	}
	if _, _, err := assign(t, k, one("a", vf1)); !errors.Is(err, holder.ErrRefused) {
		t.Errorf("asked for another: %v", err)
	}
	if l, _, err := assign(t, k, one("b", vf0)); err == nil {
		t.Errorf("another guest: %+v", l)
	}

	b := open(t, k)
	all, err := b.Leases()
	if err != nil || len(all) != 1 || all[0].Guest != "a" || all[0].For != "pod default/a" || all[0].State != "reserved" ||
		!slices.Equal(all[0].From, []string{vf0}) {
		t.Errorf("leases %+v, %v", all, err)
	}
	d, err := b.Topology().Find(l.Devices[0].Address)
	if err != nil {
		t.Fatal(err)
	}
	held, err := holder.Leases(&iommu.Host{Host: k.Host()}, []*iommu.Device{d})
	if err != nil || len(held) != 1 || !strings.Contains(held[0].What, `guest "a" (pod default/a)`) {
		t.Errorf("who holds it: %+v, %v", held, err)
	}
	done, err := b.Release(context.Background(), "a", 0)
	b.Close()
	if err != nil || len(done) != 1 || !done[0].Clean || done[0].Address.String() != vf0 || driver(t, k, vf0) != "" {
		t.Errorf("released: %+v, %v, on %q", done, err, driver(t, k, vf0))
	}
	b = open(t, k)
	defer b.Close()
	if _, err := b.Release(context.Background(), "a", 0); !errors.Is(err, lease.ErrNoLease) {
		t.Errorf("released again: %v", err)
	}
}

// What fails leaves the devices as they were, also those of the same request that had worked, and no lease.
func TestAssignAllOrNothing(t *testing.T) {
	k := newKernel(t)
	k.Probe[vf1] = errors.New("no")
	r := one("a", vf0)
	r.Sources = append(r.Sources, lease.Source{From: vf1})
	if l, _, err := assign(t, k, r); err == nil {
		t.Fatalf("assigned %+v", l)
	}
	b := open(t, k)
	defer b.Close()
	if all, err := b.Leases(); err != nil || len(all) > 0 || driver(t, k, vf0) != "" || driver(t, k, vf1) != "" {
		t.Errorf("afterwards: %+v, %v, on %q and %q", all, err, driver(t, k, vf0), driver(t, k, vf1))
	}
}

// A lease that outlives the boot is made again when its guest asks again.
func TestAssignAfterBoot(t *testing.T) {
	k := newKernel(t)
	if _, _, err := assign(t, k, one("a", vf0)); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(k.Dir(), journal.Dir)); err != nil {
		t.Fatal(err)
	}
	b := open(t, k)
	all, err := b.Leases()
	b.Close()
	if err != nil || len(all) != 1 || len(all[0].Devices) != 1 {
		t.Fatalf("after the boot: %+v, %v", all, err)
	}
	if l, fresh, err := assign(t, k, one("a", vf0)); err != nil || fresh || len(l.Devices) != 1 {
		t.Errorf("asked again: %+v, %v, %v", l, fresh, err)
	}
}

// Pools are those of the declaration, and what is declared to be taken is in none.
func TestPools(t *testing.T) {
	k := newKernel(t)
	b := open(t, k)
	defer b.Close()
	var got []string
	for _, p := range b.Pools() {
		for _, d := range p.Devices {
			got = append(got, p.Name+" "+d.Name)
		}
	}
	if want := []string{"net " + vf0, "net " + vf1, " 0000:06:00.0"}; !slices.Equal(got, want) {
		t.Errorf("pools %q, want %q", got, want)
	}
	for address, refused := range map[string]bool{"0000:09:00.0": true, vf0: false} {
		a, _ := iommu.ParseAddress(address)
		d, err := b.Topology().Find(a)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Protected(d); (err != nil) != refused {
			t.Errorf("%s is protected: %v", address, err)
		}
	}
}

// A declaration that cannot be read stops what makes leases, and not what ends them.
func TestBrokenDeclaration(t *testing.T) {
	k := newKernel(t)
	if _, _, err := assign(t, k, one("a", vf0)); err != nil {
		t.Fatal(err)
	}
	declare(t, k, "pfs: 3\n")
	h := &iommu.Host{Host: k.Host()}
	if b, err := lease.Open(h, lease.Options{}); err == nil {
		b.Close()
		t.Error("opened")
	}
	b, err := lease.OpenToRelease(h, lease.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if done, err := b.Release(context.Background(), "a", 0); err != nil || len(done) != 1 || !done[0].Clean {
		t.Errorf("released: %+v, %v", done, err)
	}
}
