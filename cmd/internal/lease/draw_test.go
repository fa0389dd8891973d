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

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// write writes a file of a kernel's host behind its back.
func write(t *testing.T, k *hosttest.Kernel, name, content string) {
	t.Helper()
	full := filepath.Join(k.Dir(), name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(full), 0o755),
		os.WriteFile(full, []byte(content), 0o600)); err != nil {
		t.Fatal(err)
	}
}

// ask asks for a VF of the pool, as a dry run or not, and returns what the user is told.
func ask(k *hosttest.Kernel, r Request, dry bool) (notes []string, err error) {
	r.Guest, r.Sources = "a", []Source{{From: "net", Count: 1}}
	err = on(k, func(ctx context.Context, m *Manager) error {
		if dry {
			_, err := previewed(m, &r)
			return err
		}
		_, _, notes, err = m.Assign(ctx, &r)
		return err
	})
	return notes, err
}

// A guest whose memory cannot be mapped, or not be locked by its VMM, gets nothing, and is told why; nothing is left of
// it.
func TestMemoryOfGuest(t *testing.T) {
	const unit = "vm.service"
	limits := func(text string) string {
		return "Limit Soft Limit Hard Limit Units\nMax locked memory " + text + " bytes\n"
	}
	for name, c := range map[string]struct {
		request Request
		regions string
		limits  string
		says    string // "" if it gets it
	}{
		"no room below 4G": {Request{Memory: 3 << 30}, "0x40000000 0x4fffffff direct\n", "",
			"cannot have any: 0x40000000-0x4fffffff (direct)"},
		"room": {Request{Memory: 1 << 30}, "0x40000000 0x4fffffff direct\n", "", ""},
		"of AMD": {Request{Memory: 1013 << 30}, "0xfd00000000 0xffffffffff reserved\n", "",
			"less than 1010G"},
		"of AMD, which QEMU has": {Request{Memory: 1013 << 30, AvoidsReservedRange: true},
			"0xfd00000000 0xffffffffff reserved\n", "", ""},
		"owner may lock": {Request{Memory: 1 << 30, OwnerPID: 600}, "", limits("1073741824 1073741824"), ""},
		"owner may not lock": {Request{Memory: 2 << 30, OwnerPID: 600}, "", limits("1073741824 1073741824"),
			"process 600 may lock 1024 MiB"},
		"unit may not lock": {Request{Memory: 2 << 30, Unit: unit}, "", limits("8388608 8388608"),
			"process 600 may lock 8 MiB"},
		"not said": {Request{OwnerPID: 600}, "", limits("8388608 8388608"), ""},
	} {
		for _, dry := range []bool{true, false} {
			k, _ := poolHost(t)
			k.Process(600, "qemu")
			write(t, k, "proc/600/limits", c.limits)
			write(t, k, "sys/fs/cgroup/system.slice/"+unit+"/cgroup.procs", "600\n")
			groups, err := filepath.Glob(filepath.Join(k.Dir(), "sys/kernel/iommu_groups/*"))
			if err != nil {
				t.Fatal(err)
			}
			for _, g := range groups {
				write(t, k, strings.TrimPrefix(g, k.Dir())+"/reserved_regions", c.regions)
			}
			_, err = ask(k, c.request, dry)
			if (err == nil) != (c.says == "") || err != nil &&
				(!errors.Is(err, holder.ErrRefused) || !strings.Contains(err.Error(), c.says)) {
				t.Errorf("%s, dry %v: %v", name, dry, err)
			}
			if has := leaseOf(t, k, "a") != nil; has != (err == nil && !dry) {
				t.Errorf("%s, dry %v: it has a lease: %v", name, dry, has)
			}
		}
	}

	k, _ := poolHost(t)
	notes, err := ask(k, Request{Memory: 2 << 30, NodeOwner: "1000"}, false)
	if err != nil || !slices.ContainsFunc(notes, func(n string) bool { return strings.Contains(n, "2048 MiB") }) {
		t.Errorf("of a VMM that is not known yet: %q, %v", notes, err)
	}
}

// A lease that ends with a unit lives while the unit, or what it started, runs, and while that cannot be seen.
func TestLeaseOfUnit(t *testing.T) {
	const group = "sys/fs/cgroup/machine.slice/machine-lab.slice/vm.service"
	k, _ := poolHost(t)
	k.Process(600, "qemu")
	// A user's own unit of that name is another one.
	write(t, k, "sys/fs/cgroup/user.slice/user-0.slice/user@0.service/app.slice/vm.service/cgroup.procs", "600\n")
	if runs, err := UnitRuns(&iommu.Host{Host: k.Host()}, "vm.service"); runs || err != nil {
		t.Errorf("a user's unit: %v, %v", runs, err)
	}

	write(t, k, group+"/cgroup.procs", "600\n")
	if _, err := ask(k, Request{Unit: "vm.service"}, false); err != nil {
		t.Fatal(err)
	}

	state := func() (s State) {
		t.Helper()
		err := on(k, func(_ context.Context, m *Manager) error {
			looks, err := m.Look()
			if err != nil || len(looks) != 1 {
				return fmt.Errorf("%+v, %w", looks, err)
			}
			s = looks[0].State
			if again := m.LookAt(looks[0].Lease); again.State != s {
				t.Errorf("looked at alone it is %s", again.State)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}

	if got := state(); got != Reserved {
		t.Errorf("while it runs: %s", got)
	}

	write(t, k, group+"/cgroup.procs", "")
	if got := state(); got != Dead {
		t.Errorf("without a process: %s", got)
	}

	write(t, k, group+"/cgroup.events", "populated 1\nfrozen 0\n")
	if got := state(); got != Reserved {
		t.Errorf("with one in a group below its own: %s", got)
	}

	write(t, k, group+"/cgroup.events", "populated 0\nfrozen 0\n")
	if got := state(); got != Dead {
		t.Errorf("when it has ended: %s", got)
	}

	for _, fails := range []string{"sys/fs/cgroup", "sys/fs/cgroup/user.slice", group + "/cgroup.events"} {
		k.SetFault(func(_, name string) error {
			if name == fails {
				return unix.EIO
			}
			return nil
		})
		if got := state(); got != Reserved {
			t.Errorf("when /%s cannot be looked at: %s", fails, got)
		}
		k.Revive()
	}

	if err := os.RemoveAll(filepath.Join(k.Dir(), group)); err != nil {
		t.Fatal(err)
	}
	if got := state(); got != Dead {
		t.Errorf("when it is unloaded: %s", got)
	}
	if err := reclaim(k); err != nil || leaseOf(t, k, "a") != nil {
		t.Errorf("reclaimed: %v", err)
	}
}

// A guest gets devices of its NUMA node first, and of those what is on a VFIO driver already.
func TestDrawOrder(t *testing.T) {
	k := newKernel(t, 3)
	m := newManager(t, k)
	vfs := m.Topology.VFs(find(t, m.Topology, pf))
	place := func(vf *iommu.Device, node int, driver string) {
		t.Helper()
		vf.NUMANode = &node
		if driver != "" {
			vf.Driver, vf.VFIO = driver, strings.Contains(driver, "vfio")
		}
	}

	first := func(node *int) string {
		t.Helper()
		c := choice{Source{From: pf, Count: 1}, [][]*iommu.Device{{vfs[0]}, {vfs[1]}, {vfs[2]}}}
		units, err := m.free(nil, &Request{NUMA: node}, &c, nil)
		if err != nil || len(units) != 1 {
			t.Fatal(units, err)
		}
		return units[0][0].Name
	}

	one := 1
	if got := first(nil); got != vfs[0].Name {
		t.Errorf("of the same, %s is first", got)
	}

	place(vfs[1], 0, "vfio-pci")
	place(vfs[2], 1, "")
	if got := first(nil); got != vfs[1].Name {
		t.Errorf("on a VFIO driver is another than %s", got)
	}
	if got := first(&one); got != vfs[2].Name {
		t.Errorf("of the node is another than %s", got)
	}

	place(vfs[0], 1, "igbvf")
	if got := first(&one); got != vfs[2].Name {
		t.Errorf("of the node, and without a driver, is another than %s", got)
	}
}

// Who is told that there is nothing left is told where all is.
func TestExhausted(t *testing.T) {
	for want, e := range map[string]*ExhaustedError{
		`pool exhausted: "net" has 3, of which 1 are assigned (viaduct leases)`: {From: "net", Wanted: 1, Of: 3,
			Leased: 1},
		`pool exhausted: "net" has 3, of which 0 are assigned (viaduct leases), 1 in quarantine, 1 in use, and 2 are wanted`: {
			From: "net", Wanted: 2, Of: 3, Quarantined: 1, Refused: 1},
		`pool exhausted: "net" has 1, of which 0 are assigned (viaduct leases), 1 recorded by another tool`: {
			From: "net", Wanted: 1, Of: 1, Used: 1},
	} {
		if got := e.Error(); got != want {
			t.Errorf("%s\nwant %s", got, want)
		}
	}
	if got := (&NoLeaseError{Guest: "a"}).Error(); got != "a has no lease, and there are no others" {
		t.Error(got)
	}
}

// A VF that somebody uses who keeps no books is passed over, and given if nobody else's is left only when he has gone.
func TestDrawPassesOver(t *testing.T) {
	k, _ := poolHost(t)
	for _, w := range [][2]string{{"devices/" + vf1 + "/driver_override", "vfio-pci"}, {"drivers_probe", vf1}} {
		if err := k.Write("sys/bus/pci/"+w[0], w[1]); err != nil {
			t.Fatal(err)
		}
	}
	nodes, _ := filepath.Glob(filepath.Join(k.Dir(), "sys/bus/pci/devices", vf1, "vfio-dev/*"))
	k.Process(700, "qemu", "/dev/vfio/devices/"+filepath.Base(nodes[0]))
	if _, err := ask(k, Request{}, false); err != nil {
		t.Fatal(err)
	}
	if l := leaseOf(t, k, "a"); l.Devices[0].Address != at(t, vf0) {
		t.Errorf("it got %s", l.Devices[0].Address)
	}
	other := func() error {
		return on(k, func(ctx context.Context, m *Manager) error {
			_, _, _, err := m.Assign(ctx, &Request{Guest: "b", Sources: []Source{{From: "net", Count: 1}}})
			return err
		})
	}
	if err := other(); err == nil || !strings.Contains(err.Error(), "1 in use") || leaseOf(t, k, "b") != nil {
		t.Errorf("there is only one that is used: %v", err)
	}
	k.End(700)
	if err := other(); err != nil || leaseOf(t, k, "b").Devices[0].Address != at(t, vf1) {
		t.Errorf("when nobody uses it: %v", err)
	}
}

// Asked again while its guest has the devices open, whom nobody has seen yet, a lease is what it was.
func TestAskedAgainWhileOpen(t *testing.T) {
	k, _ := poolHost(t)
	if _, err := ask(k, Request{}, false); err != nil {
		t.Fatal(err)
	}
	device := leaseOf(t, k, "a").Devices[0].Address.String()
	nodes, _ := filepath.Glob(filepath.Join(k.Dir(), "sys/bus/pci/devices", device, "vfio-dev/*"))
	k.Process(700, "qemu", "/dev/vfio/devices/"+filepath.Base(nodes[0]))
	k.Log = nil
	if _, err := ask(k, Request{}, false); err != nil || len(k.Log) > 0 ||
		leaseOf(t, k, "a").Devices[0].Address.String() != device {
		t.Errorf("%v, written %q", err, k.Log)
	}
}

// previewed are the steps of a preview.
func previewed(m *Manager, r *Request) ([]bind.Action, error) {
	p, err := m.Preview(r)
	if err != nil {
		return nil, err
	}
	return p.Steps(), nil
}
