package sriov

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
	"viaduct/vfio/bind"
)

// capturedHost is what a host's snapshot with these facts opens as.
func capturedHost(t *testing.T, h *iommu.Host, facts ...iommu.Fact) *Handle {
	t.Helper()
	var b bytes.Buffer
	file := filepath.Join(t.TempDir(), "host.vsnap")
	if err := errors.Join(iommu.Capture(h, &b, facts...), os.WriteFile(file, b.Bytes(), 0o600)); err != nil {
		t.Fatal(err)
	}
	snapshot, err := iommu.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	s, err := Open(snapshot, bind.Options{DryRun: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close(); snapshot.Close() })
	return s
}

// What drivers report of VFs, and e-switches, are in a snapshot as on the host, and plans go by them; of a snapshot
// without them they are not known, which nothing is taken for.
func TestCapturedPorts(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	k.Net.Eswitch = map[string][3]int{pf: {1, 0, 1}}
	quiet(t, k, makeVFs(alike(2, UseNone)))
	if _, err := setVF(t, k, Settings{VLAN: "7", MAC: "52:54:00:00:00:0a"}); err != nil {
		t.Fatal(err)
	}
	h := &iommu.Host{Host: k.Host()}
	topology, err := iommu.Scan(h)
	if err != nil {
		t.Fatal(err)
	}
	d, err := topology.Find(parse(pf))
	if err != nil {
		t.Fatal(err)
	}
	facts, err := Capture(h, topology)
	if err != nil {
		t.Fatal(err)
	}
	live, err1 := ReadPort(h, d)
	eswitch, err2 := ReadEswitch(h, d.Address)
	if err := errors.Join(err1, err2); err != nil || eswitch.Mode != switchdev {
		t.Fatal(eswitch, err)
	}

	snapshot, old := capturedHost(t, h, facts...), capturedHost(t, h)
	port, err := ReadPort(snapshot.Host(), d)
	if err != nil || !port.Known || port.Name != live.Name || port.SwitchID != live.SwitchID ||
		!reflect.DeepEqual(port.VFs, live.VFs) {
		t.Errorf("%+v, %v, want %+v", port, err, live)
	}
	if e, err := ReadEswitch(snapshot.Host(), d.Address); err != nil || !reflect.DeepEqual(e, eswitch) {
		t.Errorf("%+v, %v", e, err)
	}
	asked, err := snapshot.LastRequested(d)
	if err != nil || asked[0][VLAN] != "7" {
		t.Errorf("last requested: %v, %v", asked, err)
	}

	plan := func(s *Handle, wish Wish) (string, error) {
		t.Helper()
		topology, err := s.Topology()
		if err != nil {
			t.Fatal(err)
		}
		d, err := topology.Find(parse(pf))
		if err != nil {
			t.Fatal(err)
		}
		count, err := s.PlanCount(d, wish)
		if err != nil {
			return "", err
		}
		sets, err := s.PlanSets(d, topology.VFs(d), wish.VFs)
		out := fmt.Sprint(count.Eswitch.Mode, count.Unknown)
		for _, set := range sets {
			out += fmt.Sprint(" ", set.VF.VFIndex, set.Steps())
		}
		return out, err
	}
	as := Wish{VFs: []VFWish{{UseNone, Settings{VLAN: "7"}}, {UseNone, Settings{Trust: off}}},
		Eswitch: Eswitch{Mode: switchdev}}
	other := Wish{VFs: []VFWish{{UseNone, Settings{VLAN: "8"}}, {}}, Eswitch: Eswitch{Mode: legacy}}
	for want, wish := range map[string]Wish{
		"[]": as, "legacy[] 0 [ip link set enp1s0 vf 0 vlan 8 qos 0 proto 802.1q]": other,
	} {
		if got, err := plan(snapshot, wish); err != nil || got != want {
			t.Errorf("%q, %v, want %q", got, err, want)
		}
	}

	if port, err := ReadPort(old.Host(), d); err != nil || port.Known || len(port.VFs) > 0 {
		t.Errorf("without facts: %+v, %v", port, err)
	}
	if got, err := plan(old, as); !errors.Is(err, ErrNotCaptured) || got != "[its e-switch]" {
		t.Errorf("without facts: %q, %v", got, err)
	}
	if got, err := plan(old, Wish{VFs: Repeat(2, VFWish{})}); err != nil || got != "[]" {
		t.Errorf("without facts, and nothing to compare: %q, %v", got, err)
	}
	if got, err := plan(old, Wish{VFs: Repeat(2, VFWish{}), Offload: on}); err != nil || got != "[hw-tc-offload]" {
		t.Errorf("without facts: %q, %v", got, err)
	}
}

// What a driver does not report is not known to a snapshot either, and an e-switch that is not there is known not to be.
func TestCapturedUnreported(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	k.Net.Unreported = map[int]bool{9: true}
	quiet(t, k, makeVFs(alike(1, UseNone)))
	h := &iommu.Host{Host: k.Host()}
	topology, err := iommu.Scan(h)
	if err != nil {
		t.Fatal(err)
	}
	facts, err := Capture(h, topology)
	if err != nil {
		t.Fatal(err)
	}
	snapshot := capturedHost(t, h, facts...)
	d, err := topology.Find(parse(pf))
	if err != nil {
		t.Fatal(err)
	}
	port, err := ReadPort(snapshot.Host(), d)
	vf, known := port.Of(0)
	if _, told := vf.Settings[Trust]; err != nil || !known || told || vf.Settings[VLAN] != "0" {
		t.Errorf("%+v, %v", vf, err)
	}
	if _, err := snapshot.PlanCount(d, Wish{VFs: Repeat(1, VFWish{}), Eswitch: Eswitch{Mode: switchdev}}); err == nil {
		t.Error("an e-switch that is not there is planned")
	}
}

func FuzzCaptured(f *testing.F) {
	f.Add([]byte(`{"port":{"name":"eth0","vfs":[{"index":0,"settings":{"vlan":"7","later":"x"}}]},"eswitch":[{"mode":"legacy"}]}`))
	f.Add([]byte(`{"port":null,"eswitch":null,"offload":{"eth0":true}}`))
	f.Add([]byte(`{"port":{"vfs":[{"index":-1}]}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := decodeCaptured(b)
		if err != nil || c.Port == nil {
			return
		}
		seen := map[int]bool{}
		for _, vf := range c.Port.VFs {
			if vf.Index < 0 || vf.Index >= 1<<16 || seen[vf.Index] || vf.Settings == nil {
				t.Errorf("%+v", vf)
			}
			seen[vf.Index] = true
			for k := range vf.Settings {
				if k.row() == nil {
					t.Errorf("%+v", vf)
				}
			}
		}
	})
}
