package lease

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/bind"
)

// without is a Manager of a host of which nothing is declared.
func without(t *testing.T, k *hosttest.Kernel) *Manager {
	t.Helper()
	handle, err := sriov.Open(&iommu.Host{Host: k.Host()}, bind.Options{Recoverers: Recoverers()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { handle.Close() })
	m, err := New(handle, Options{})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func driversOf(t *testing.T, k *hosttest.Kernel, addresses ...string) (out []string) {
	t.Helper()
	for _, text := range addresses {
		a, err := iommu.ParseAddress(text)
		if err != nil {
			t.Fatal(err)
		}
		d, err := iommu.ReadDevice(&iommu.Host{Host: k.Host()}, a)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, d.Driver+"/"+d.DriverOverride)
	}
	return out
}

// What is only kept off the host's drivers is no part of a lease: it is neither printed nor scrubbed, and goes back with
// the rest of its group.
func TestCompanionsOfLease(t *testing.T) {
	const gpu, audio, smbus, isa = "0000:03:00.0", "0000:03:00.1", "0000:00:14.0", "0000:00:14.3"
	for _, from := range []string{gpu, audio} {
		k := hosttest.NewBoard(t)
		home := driversOf(t, k, gpu, audio, smbus, isa)
		m := without(t, k)
		preview, err := previewed(m, &Request{Guest: "a", Sources: []Source{{From: from, Count: 1}}})
		if err != nil || !slices.Contains(bind.Commands(preview),
			"# "+smbus+" is only kept off the host's drivers; the guest does not get it") {
			t.Errorf("%s: %q, %v", from, preview, err)
		}
		l, _, _, err := m.Assign(t.Context(), &Request{Guest: "a", Sources: []Source{{From: from, Count: 1}},
			TTL: time.Minute})
		if err != nil {
			t.Fatalf("%s: %v", from, err)
		}
		m.handle.Close()
		var got []string
		for _, d := range l.Devices {
			got = append(got, d.Address.String())
		}
		if !slices.Equal(got, []string{gpu, audio}) {
			t.Errorf("%s: leased %q", from, got)
		}
		if now := driversOf(t, k, gpu, audio, smbus, isa); !slices.Equal(now,
			[]string{"vfio-pci/vfio-pci", "vfio-pci/vfio-pci", "/none", "/none"}) {
			t.Errorf("%s: on %q", from, now)
		}

		m = without(t, k)
		certificates, err := m.Release(t.Context(), "a", 0)
		m.handle.Close()
		if err != nil || len(certificates) != 2 {
			t.Errorf("%s: released %+v, %v", from, certificates, err)
		}
		if now := driversOf(t, k, gpu, audio, smbus, isa); !slices.Equal(now, home) {
			t.Errorf("%s: given back %q, had %q", from, now, home)
		}
		for _, w := range k.Log {
			if strings.HasSuffix(w, "/reset=1") && !strings.Contains(w, "0000:03:00.") {
				t.Errorf("%s: %s", from, w)
			}
		}
	}
}

// A VF that shares its group with what the host keeps is nobody's free VF.
func TestKeptVFs(t *testing.T) {
	k := hosttest.NewKernel(t, hosttest.Kept())
	m := without(t, k)
	units, err := m.source("0000:01:00.0")
	if err != nil || len(units) != 1 || units[0][0].Name != "0000:01:10.2" {
		t.Errorf("%v, %v", units, err)
	}
	vf := find(t, m.Topology, "0000:01:10.0")
	if with := m.Topology.KeptWith(vf); with == nil || with.Name != "0000:01:00.0" {
		t.Errorf("%s is kept with %v", vf.Name, with)
	}
	_, _, _, err = m.Assign(t.Context(), &Request{Guest: "a", Sources: []Source{{From: vf.Name, Count: 1}},
		TTL: time.Minute})
	if err == nil || !strings.Contains(err.Error(), "ACS") || strings.Contains(err.Error(), "vf destroy") ||
		len(k.Log) > 0 {
		t.Errorf("%v, writes %q", err, k.Log)
	}
}

// What is only kept off the host's drivers goes back also if the first try fails, as no lease has it.
func TestCompanionOnceMore(t *testing.T) {
	const gpu, smbus = "0000:03:00.0", "0000:00:14.0"
	for _, fails := range []int{1, 99} {
		k := hosttest.NewBoard(t)
		h := &iommu.Host{Host: k.Host()}
		home := driversOf(t, k, smbus)
		if err := lend(t, h, Request{Guest: "a", Sources: []Source{{From: gpu}}}); err != nil {
			t.Fatal(err)
		}
		failWrites(k, fails, "sys/bus/pci/devices/"+smbus+"/driver_override")
		once := fails == 1
		_, err := giveBack(t, h, "a", 0)
		if now := driversOf(t, k, smbus); (err == nil) != once || slices.Equal(now, home) != once {
			t.Errorf("%q, was %q: %v", now, home, err)
		}
	}
}

// A companion on a bus that is reset only as a whole is on VFIO while a guest has the rest, for the reset; but it is not
// the guest's, and goes back with it.
func TestCompanionOnBus(t *testing.T) {
	const port, nic, companion = "0000:00:08.0", "0000:07:01.0", "0000:07:02.0"
	k := hosttest.NewKernel(t, hosttest.Made(
		hosttest.PCI{At: port, ID: "1b36:000e", Class: "060400", Driver: "pcieport", Group: 14},
		hosttest.PCI{At: port + "/" + nic, ID: "8086:100e", Class: "020000", Driver: "e1000", Group: 14},
		hosttest.PCI{At: port + "/" + companion, ID: "8086:2930", Class: "088000", Driver: "other", Group: 14},
	))
	k.Register("vfio-pci")
	v := k.ServeVFIO()
	for _, a := range []string{nic, companion} {
		v.Devices[a] = &hosttest.VFIODevice{NoReset: true, Together: []string{nic, companion}}
	}
	h := &iommu.Host{Host: k.Host()}
	home := driversOf(t, k, nic, companion)
	for round := 1; round <= 2; round++ {
		if err := lend(t, h, Request{Guest: "a", Sources: []Source{{From: nic}}, NodeOwner: "1000"}); err != nil {
			t.Fatal(err)
		}
		if now := driversOf(t, k, companion)[0]; !strings.HasPrefix(now, "vfio-pci/") {
			t.Errorf("for the reset it has to be on VFIO, and is on %s", now)
		}
		own, err := h.Names("sys/bus/pci/devices/" + companion + "/vfio-dev")
		if err != nil || len(own) != 1 {
			t.Fatalf("%q, %v", own, err)
		}
		if o, err := h.Owner("dev/vfio/devices/" + own[0]); err != nil || !o.Private() {
			t.Errorf("its own node is the guest's: %+v, %v", o, err)
		}
		l, err := BookOf(h).Get("a")
		if err != nil || len(l.Devices) != 1 {
			t.Errorf("lent are %+v, %v", l, err)
		}

		out, err := giveBack(t, h, "a", 0)
		if now := driversOf(t, k, nic, companion); err != nil || len(out) != 1 || out[0].Result != Clean ||
			!slices.Equal(now, home) {
			t.Errorf("%+v, %v, on %q", out, err, now)
		}
		for _, a := range []string{nic, companion} {
			if v.Devices[a].Resets != round {
				t.Errorf("%s was reset %d times in %d rounds", a, v.Devices[a].Resets, round)
			}
		}
	}
}

// groups is a host with two groups: of two functions and a companion, and of one function and a companion.
func groups(t *testing.T) *hosttest.Kernel {
	t.Helper()
	k := hosttest.NewKernel(t, hosttest.Made(
		hosttest.PCI{At: "0000:00:08.0", ID: "1b36:000e", Class: "060400", Driver: "pcieport", Group: 14},
		hosttest.PCI{At: "0000:00:08.0/0000:07:01.0", ID: "8086:100e", Class: "020000", Driver: "e1000", Group: 14},
		hosttest.PCI{At: "0000:00:08.0/0000:07:01.1", ID: "8086:100e", Class: "020000", Driver: "e1000", Group: 14},
		hosttest.PCI{At: "0000:00:08.0/0000:07:02.0", ID: "8086:2930", Class: "088000", Driver: "other", Group: 14},
		hosttest.PCI{At: "0000:00:09.0", ID: "1b36:000e", Class: "060400", Driver: "pcieport", Group: 15},
		hosttest.PCI{At: "0000:00:09.0/0000:08:01.0", ID: "8086:100e", Class: "020000", Driver: "e1000", Group: 15},
		hosttest.PCI{At: "0000:00:09.0/0000:08:02.0", ID: "8086:2930", Class: "088000", Driver: "other", Group: 15},
	))
	k.Register("vfio-pci")
	v := k.ServeVFIO()
	for _, a := range []string{"0000:07:01.0", "0000:07:01.1", "0000:08:01.0"} {
		v.Devices[a] = &hosttest.VFIODevice{}
		reset := filepath.Join(k.Dir(), "sys/bus/pci/devices", a, "reset")
		if err := os.WriteFile(reset, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return k
}

// The companions of each group are kept off the host's drivers, and go back, however many of a group a guest has.
func TestCompanionsOfSeveralGroups(t *testing.T) {
	all := []string{"0000:07:01.0", "0000:07:01.1", "0000:07:02.0", "0000:08:01.0", "0000:08:02.0"}
	k := groups(t)
	h := &iommu.Host{Host: k.Host()}
	home := driversOf(t, k, all...)
	if err := lend(t, h, Request{Guest: "a", Sources: []Source{{From: all[0]}, {From: all[3]}}}); err != nil {
		t.Fatal(err)
	}
	now := driversOf(t, k, all...)
	if now[2] == home[2] || now[4] == home[4] {
		t.Errorf("while a guest has the rest, they are on %q", now)
	}
	if _, err := giveBack(t, h, "a", 0); err != nil {
		t.Error(err)
	}
	if now := driversOf(t, k, all...); !slices.Equal(now, home) {
		t.Errorf("given back %q, had %q", now, home)
	}
}

// A companion stays off the host's drivers while something of its group is on VFIO, which a kernel without nodes of
// devices tells by the driver alone.
func TestCompanionOfWhatStays(t *testing.T) {
	const nic, companion = "0000:08:01.0", "0000:08:02.0"
	k := groups(t)
	h := &iommu.Host{Host: k.Host()}
	err := work(t, h, func(m *Manager) error {
		_, err := m.handle.Move(t.Context(), bind.Take(bind.Auto), at(t, nic))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	before := driversOf(t, k, nic, companion)
	if err := lend(t, h, Request{Guest: "a", Sources: []Source{{From: nic}}}); err != nil {
		t.Fatal(err)
	}
	withoutOwnNode(t, k, nic)
	_, err = giveBack(t, h, "a", 0)
	if now := driversOf(t, k, nic, companion); err != nil || !slices.Equal(now, before) {
		t.Errorf("on %q, before %q, %v", now, before, err)
	}
}
