package dra

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	resource "k8s.io/api/resource/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/dynamic-resource-allocation/kubeletplugin"

	"viaduct/cmd/lease"
	"viaduct/cmd/viaduct-kube/internal/node"
	"viaduct/internal/host/hosttest"
	"viaduct/internal/journal"
	"viaduct/iommu"
)

const (
	pf  = "0000:01:00.0"
	vf0 = "0000:01:10.0"
	vf1 = "0000:01:10.2"
	n0  = "0000-01-10-0"
	n1  = "0000-01-10-2"
)

// newKernel is a host whose PF has two VFs, which are declared as a pool.
func newKernel(t testing.TB) *hosttest.Kernel {
	t.Helper()
	k := hosttest.NewSmallLab(t, "0000:00:05.0", pf)
	k.ResetVFs = true
	for _, w := range [][2]string{{"sriov_drivers_autoprobe", "0"}, {"sriov_numvfs", "2"}} {
		if err := k.Write("sys/bus/pci/devices/"+pf+"/"+w[0], w[1]); err != nil {
			t.Fatal(err)
		}
	}
	declare(t, k, "pfs:\n  - select: "+pf+"\n    count: 2\n    vfs:\n      - {driver: none, pool: net}\n")
	return k
}

func declare(t testing.TB, k *hosttest.Kernel, text string) {
	t.Helper()
	put(t, k, "etc/viaduct/host.yaml", text)
}

func put(t testing.TB, k *hosttest.Kernel, name, text string) {
	t.Helper()
	file := filepath.Join(k.Dir(), name)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// newDriver is a driver as it is after its start: it knows nothing of what was before.
func newDriver(t testing.TB, k *hosttest.Kernel, cdi string, s *node.Settings) *Driver {
	t.Helper()
	return New(Options{
		Host: &iommu.Host{Host: k.Host()}, Name: "viaduct.dev", Node: "n1", CDIDir: cdi, Settings: s,
		Tell: func(c kubeletplugin.NamespacedObject, _ bool, reason, text string) {
			t.Logf("%s %s: %s", c, reason, text)
		},
		Count: func(string, string, time.Duration) {}, Changed: func() {}, Fatal: func(err error) { t.Error(err) },
	})
}

func prepare(d *Driver, c *resource.ResourceClaim) (kubeletplugin.PrepareResult, error) {
	all, err := d.PrepareResourceClaims(context.Background(), []*resource.ResourceClaim{c})
	return all[c.UID], errors.Join(err, all[c.UID].Err)
}

func unprepare(d *Driver, uid string) error {
	c := kubeletplugin.NamespacedObject{NamespacedName: types.NamespacedName{Namespace: "default", Name: "nic"},
		UID: types.UID(uid)}
	all, err := d.UnprepareResourceClaims(context.Background(), []kubeletplugin.NamespacedObject{c})
	return errors.Join(err, all[c.UID])
}

// world is all that a claim changes: drivers with their overrides, leases, and what containers are given.
func world(t testing.TB, k *hosttest.Kernel, cdi string) string {
	t.Helper()
	h := &iommu.Host{Host: k.Host()}
	var out []string
	for _, vf := range []string{vf0, vf1} {
		d, err := iommu.ReadDevice(h, at(t, vf))
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, fmt.Sprintf("%s on %q, override %q", vf, d.Driver, d.DriverOverride))
	}

	b, err := lease.OpenToRelease(h, lease.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	all, err := b.Leases()
	if err != nil {
		t.Fatal(err)
	}

	for _, l := range all {
		out = append(out, "lease "+l.Guest)
	}

	files, err := os.ReadDir(cdi)
	if err != nil {
		t.Fatal(err)
	}

	for _, f := range files {
		out = append(out, f.Name())
	}

	return strings.Join(out, "\n")
}

func spec(t *testing.T, cdi, uid string) node.Spec {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(cdi, "viaduct.dev-claim-"+uid+".json"))
	if err != nil {
		t.Fatal(err)
	}
	var s node.Spec
	if err := json.Unmarshal(text, &s); err != nil {
		t.Fatal(err)
	}
	return s
}

// A claim is prepared and unprepared, by whichever process: both do no harm when they are asked again.
func TestDriver(t *testing.T) {
	k, cdi := newKernel(t), t.TempDir()
	before := world(t, k, cdi)
	c := with(claim("uid-1", n0, n1), ofClaim, `"vlan":100,"mac":"stable"`, "a")
	for range 2 {
		got, err := prepare(newDriver(t, k, cdi, &node.Settings{}), c)
		if err != nil {
			t.Fatal(err)
		}
		s := spec(t, cdi, "uid-1")
		if len(got.Devices) != 2 || !slices.Equal(got.Devices[0].CDIDeviceIDs,
			[]string{"viaduct.dev/claim=uid-1-" + n0}) ||
			!slices.Equal(got.Devices[1].Requests, []string{"b"}) || got.Devices[1].PoolName != "n1" ||
			s.Kind != "viaduct.dev/claim" ||
			len(s.Devices) != 2 || s.Devices[1].Name != "uid-1-"+n1 ||
			s.Devices[0].Edits.Nodes[0].Path != "/dev/vfio/vfio" {
			t.Errorf("%+v, %+v", got, s)
		}
		m := got.Devices[0].Metadata
		if id := m.Attributes["resource.kubernetes.io/pciBusID"].StringValue; id == nil || *id != vf0 ||
			m.NetworkData == nil || m.NetworkData.HardwareAddress == "" {
			t.Errorf("metadata %+v", m)
		}
	}

	if _, err := prepare(newDriver(t, k, cdi, &node.Settings{}), claim("uid-2", n1)); err == nil ||
		!strings.Contains(err.Error(), `assigned to guest "uid-1" (pod default/web by claim default/nic`) {
		t.Errorf("for another claim: %v", err)
	}

	for range 2 {
		if err := unprepare(newDriver(t, k, cdi, &node.Settings{}), "uid-1"); err != nil {
			t.Fatal(err)
		}
		if now := world(t, k, cdi); now != before {
			t.Errorf("afterwards:\n%s\nbefore:\n%s", now, before)
		}
	}
}

// What cannot be prepared leaves everything as it was.
func TestPrepareFails(t *testing.T) {
	for what, c := range map[string]struct {
		settings node.Settings
		spoil    func(*hosttest.Kernel)
		cdi      string
		claim    *resource.ResourceClaim
	}{
		"the second device cannot be bound": {
			spoil: func(k *hosttest.Kernel) { k.Probe[vf1] = errors.New("no") }, claim: claim("u", n0, n1),
		},
		"there is nowhere to write for containers": {cdi: "/nowhere/at/all", claim: claim("u", n0)},
		"there is no iommufd": {
			claim: with(claim("u", n0), ofClaim, `"backend":"iommufd"`),
		},
		"it is not declared": {claim: claim("u", "0000-01-00-0")},
		"the device plugin serves it": {
			settings: node.Settings{Pools: map[string]node.Provider{"net": node.DevicePlugin}}, claim: claim("u", n0),
		},
	} {
		k, cdi := newKernel(t), t.TempDir()
		before := world(t, k, cdi)
		if c.spoil != nil {
			c.spoil(k)
		}

		to := cdi
		if c.cdi != "" {
			to = c.cdi
		}
		if got, err := prepare(newDriver(t, k, to, &c.settings), c.claim); err == nil {
			t.Errorf("%s: %+v", what, got)
		}
		if now := world(t, k, cdi); now != before {
			t.Errorf("%s: afterwards:\n%s\nbefore:\n%s", what, now, before)
		}
	}
}

// A claim may ask for iommufd, and has the function's own node then and not the group's.
func TestIOMMUFD(t *testing.T) {
	k, cdi := newKernel(t), t.TempDir()
	put(t, k, "dev/iommu", "")
	if _, err := prepare(newDriver(t, k, cdi, &node.Settings{}),
		with(claim("u", n0), ofClaim, `"backend":"iommufd"`)); err != nil {
		t.Fatal(err)
	}
	nodes := spec(t, cdi, "u").Devices[0].Edits.Nodes
	if len(nodes) != 2 || nodes[0].Path != "/dev/iommu" || !strings.HasPrefix(nodes[1].Path, "/dev/vfio/devices/vfio") {
		t.Errorf("%+v", nodes)
	}
}

// After a boot with other group numbers a claim that is prepared again has the group's new node.
func TestPrepareAfterBoot(t *testing.T) {
	k, cdi := newKernel(t), t.TempDir()
	if _, err := prepare(newDriver(t, k, cdi, &node.Settings{}), claim("uid-1", n0)); err != nil {
		t.Fatal(err)
	}
	old := spec(t, cdi, "uid-1").Devices[0].Edits.Nodes[1].Path
	reboot(t, k, cdi)
	regroup(t, k, vf0, "107")
	if _, err := prepare(newDriver(t, k, cdi, &node.Settings{}), claim("uid-1", n0)); err != nil {
		t.Fatal(err)
	}
	if now := spec(t, cdi, "uid-1").Devices[0].Edits.Nodes[1].Path; now != "/dev/vfio/107" || old == now {
		t.Errorf("the node was %s and is %s", old, now)
	}
	if err := unprepare(newDriver(t, k, cdi, &node.Settings{}), "uid-1"); err != nil {
		t.Error(err)
	}
}

// reboot loses what dies with a boot: this boot's books and specifications, and drivers of VFs.
func reboot(t *testing.T, k *hosttest.Kernel, cdi string) {
	t.Helper()
	for _, vf := range []string{vf0, vf1} {
		if driver, err := iommu.ReadDriver(&iommu.Host{Host: k.Host()}, at(t, vf)); err == nil && driver != "" {
			if err := k.Write("sys/bus/pci/drivers/"+driver+"/unbind", vf); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := errors.Join(os.RemoveAll(filepath.Join(k.Dir(), journal.Dir)), os.RemoveAll(cdi),
		os.Mkdir(cdi, 0o755)); err != nil {
		t.Fatal(err)
	}
}

// regroup has a device be in a group of another number.
func regroup(t *testing.T, k *hosttest.Kernel, device, number string) {
	t.Helper()
	dir := filepath.Join(k.Dir(), "sys/bus/pci/devices", device)
	link := filepath.Join(dir, "iommu_group")
	old, err := os.Readlink(link)
	if err != nil {
		t.Fatal(err)
	}
	groups := filepath.Join(k.Dir(), "sys/kernel/iommu_groups")
	if err := errors.Join(
		os.Rename(filepath.Join(groups, filepath.Base(old)), filepath.Join(groups, number)), os.Remove(link),
		os.Symlink(filepath.Join(filepath.Dir(old), number), link),
	); err != nil {
		t.Fatal(err)
	}
}

// Whatever operation of the host fails, or is the last before the driver is killed, the next driver prepares the claim,
// or unprepares it and all is as it was.
func TestKilledAnywhere(t *testing.T) {
	first := newKernel(t)
	all := first.Operations(func() {
		if _, err := prepare(newDriver(t, first, t.TempDir(), &node.Settings{}),
			with(claim("u", n0), ofClaim, `"vlan":7`)); err != nil {
			t.Fatal(err)
		}
	})

	sample := hosttest.EveryNth(9, hosttest.Sample(all))
	t.Logf("%d of %d operations", len(sample), len(all))
	for _, n := range sample {
		for _, kill := range []bool{false, true} {
			k, cdi := newKernel(t), t.TempDir()
			before := world(t, k, cdi)
			if kill {
				k.KillAt(n, func(string, string) bool { return true })
			} else {
				k.FailNth(n, unix.EIO)
			}
			c := with(claim("u", n0), ofClaim, `"vlan":7`)
			_, failed := prepare(newDriver(t, k, cdi, &node.Settings{}), c)
			k.Revive()
			if now := world(t, k, cdi); failed != nil && !kill && now != before && !strings.Contains(now, "lease u") {
				t.Errorf("operation %d failed (%v) and left\n%s", n, failed, now)
			}
			if _, err := prepare(newDriver(t, k, cdi, &node.Settings{}), c); err != nil {
				t.Errorf("operation %d (kill %v): prepared again: %v", n, kill, err)
			}
			if err := unprepare(newDriver(t, k, cdi, &node.Settings{}), "u"); err != nil {
				t.Errorf("operation %d (kill %v): unprepared: %v", n, kill, err)
			}
			if now := world(t, k, cdi); now != before {
				t.Errorf("operation %d (kill %v), in the end:\n%s\nbefore:\n%s", n, kill, now, before)
			}
		}
	}
}
