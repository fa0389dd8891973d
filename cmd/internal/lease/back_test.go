package lease

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/cmd/internal/hostfile"
	"viaduct/internal/host/hosttest"
	"viaduct/sriov"
	"viaduct/vfio/holder"
)

// lendVF lends the pool's first VF with settings.
func lendVF(t *testing.T, k *hosttest.Kernel, settings sriov.Settings) {
	t.Helper()
	m := newManager(t, k)
	defer m.handle.Close()
	r := &Request{Guest: "a", Sources: []Source{{From: "net", Count: 1, Settings: hostfile.Plain(settings)}},
		TTL: time.Minute}
	if _, _, _, err := m.Assign(t.Context(), r); err != nil {
		t.Fatal(err)
	}
}

// tagged is a VLAN and an address.
var tagged = sriov.Settings{sriov.VLAN: "5", sriov.MAC: "52:54:00:aa:00:01"}

// comesBack lends the pool's first VF with a VLAN and an address, and returns it when something else may be declared.
func comesBack(t *testing.T, k *hosttest.Kernel, later string) (Certificate, error) {
	t.Helper()
	lendVF(t, k, tagged)
	m := managerOf(t, k, later)
	defer m.handle.Close()
	out, err := m.Release(t.Context(), "a", 0)
	if len(out) != 1 {
		t.Fatalf("%+v, %v", out, err)
	}
	return out[0], err
}

// withReset is a host with VFs that can be reset.
func withReset(t *testing.T) *hosttest.Kernel {
	t.Helper()
	k := newKernel(t, 7)
	m := newManager(t, k)
	for _, vf := range m.Topology.VFs(find(t, m.Topology, pf)) {
		canReset(t, k, vf.Name)
	}
	m.handle.Close()
	return k
}

func canReset(t *testing.T, k *hosttest.Kernel, device string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(k.Dir(), "sys/bus/pci/devices", device, "reset"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
}

// A VF goes back to what is declared of it now, and else to what it had.
func TestBackToDeclared(t *testing.T) {
	for later, want := range map[string]string{
		declaration: "0",
		strings.Replace(declaration, "pool: net", "pool: net\n        vlan: 9", 1): "9",
	} {
		c, err := comesBack(t, withReset(t), later)
		if err != nil || c.Result != Clean || c.Found[sriov.VLAN] != "5" || c.Settings[sriov.VLAN] != want {
			t.Errorf("VLAN %s is wanted: %+v, %v", want, c, err)
		}
	}
}

// What a driver does not tell, and an address that it takes back from nobody, are noted, and are no reason to keep the VF
// from the next guest. A setting that is told to be another is.
func TestBackAsFarAsKnown(t *testing.T) {
	for name, c := range map[string]struct {
		net  func(*hosttest.Network)
		note string
	}{
		"not told": {func(n *hosttest.Network) { n.Unreported = map[int]bool{unix.IFLA_VF_VLAN: true} },
			"does not report it"},
		"refuses no address": {func(n *hosttest.Network) { n.Refuse = map[int]syscall.Errno{unix.IFLA_VF_MAC: unix.EINVAL} }, "does not remove the guest's"},
	} {
		k := withReset(t)
		lendVF(t, k, tagged)
		c.net(&k.Net)
		m := newManager(t, k)
		out, err := m.Release(t.Context(), "a", 0)
		m.handle.Close()
		if err != nil || len(out) != 1 || out[0].Result != Clean || !strings.Contains(out[0].Note, c.note) {
			t.Errorf("%s: %+v, %v", name, out, err)
		}
	}

	k := withReset(t)
	k.Net.Ignore = map[int]bool{}
	lendVF(t, k, sriov.Settings{sriov.VLAN: "5"})
	k.Net.Ignore[unix.IFLA_VF_VLAN] = true
	m := newManager(t, k)
	if out, err := m.Release(t.Context(), "a", 0); err == nil || len(out) != 1 || out[0].Result != InQuarantine {
		t.Errorf("a VLAN that stays: %+v, %v", out, err)
	}
}

// A lease that outlives its guest is scrubbed when that ends, and is there for its next start.
func TestRest(t *testing.T) {
	k := withReset(t)
	for range 2 {
		m := newManager(t, k)
		l, _, _, err := m.Assign(t.Context(), &Request{Guest: "a", Sources: []Source{{From: "net", Count: 1}},
			Persist: true})
		if err != nil || !l.Ready {
			t.Fatalf("%+v, %v", l, err)
		}
		m.handle.Close()
		m = newManager(t, k)
		out, err := m.Rest(t.Context(), "a", 0)
		m.handle.Close()
		if err != nil || len(out) != 1 || out[0].Result != Clean {
			t.Errorf("%+v, %v", out, err)
		}
		m = newManager(t, k)
		looks, err := m.Look()
		m.handle.Close()
		if err != nil || len(looks) != 1 || looks[0].State != Reserved {
			t.Errorf("after its guest: %+v, %v", looks, err)
		}
	}
}

// Looking at a lease does not change what keeps it alive: a wrapper that starts its VMM anew keeps the lease.
func TestLookKeepsRunner(t *testing.T) {
	k := withReset(t)
	m := newManager(t, k)
	l, _, _, err := m.Assign(t.Context(), &Request{Guest: "a", Sources: []Source{{From: "net", Count: 1}},
		OwnerPID: holder.NameProcess(m.host, 1).PID})
	if err != nil {
		t.Fatal(err)
	}
	l.Owner = nil
	k.Process(4711, "wrapper")
	l.Runner = &Holder{Proc: holder.NameProcess(m.host, 4711), Name: "process 4711 (wrapper)"}
	if err := m.Book.put(l); err != nil {
		t.Fatal(err)
	}
	look := func() State {
		t.Helper()
		looks, err := m.Look()
		if err != nil || len(looks) != 1 {
			t.Fatalf("%+v, %v", looks, err)
		}
		return looks[0].State
	}

	group, err := m.host.LinkBase("sys/bus/pci/devices/" + l.Devices[0].Address.String() + "/iommu_group")
	if err != nil {
		t.Fatal(err)
	}
	k.Process(4712, "qemu", "/dev/vfio/"+group)
	if got := look(); got != Active {
		t.Errorf("while its VMM runs: %s", got)
	}
	k.End(4712)
	if got := look(); got != Active {
		t.Errorf("between two VMMs: %s", got)
	}
	m.handle.Close()
	m = newManager(t, k)
	if out, err := m.Reclaim(t.Context()); len(out) > 0 || err != nil {
		t.Errorf("reclaimed between two VMMs: %+v, %v", out, err)
	}
	k.End(4711)
	if got := look(); got != Dead {
		t.Errorf("when the wrapper is gone: %s", got)
	}
}

// Who ran a lease stood among those who were seen, in records of before.
func TestFormerRunner(t *testing.T) {
	l := &Lease{Holders: []Holder{{Proc: holder.Proc{PID: 1, Start: 2}, Name: "x", Runs: true},
		{Proc: holder.Proc{PID: 3}}}}
	l.upgrade()
	if l.Runner == nil || l.Runner.PID != 1 || l.Runner.Name != "x" || l.Holders[0].Runs || len(l.Holders) != 2 {
		t.Errorf("%+v", l)
	}
}
