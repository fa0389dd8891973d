package lease

import (
	"context"
	"errors"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/internal/host"
	"viaduct/internal/host/hosttest"
	"viaduct/internal/journal"
	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

const plain = "0000:09:00.0" // a controller in a group of its own

// vfioHost is a host with one controller, which stays on vfio-pci or goes back to its own driver.
func vfioHost(t *testing.T, stays bool) (*hosttest.Kernel, *iommu.Host) {
	t.Helper()
	k := hosttest.NewSmallLab(t, "0000:00:05.0", "0000:01:00.0", "0000:00:0a.0", plain)
	k.ServeVFIO().Devices[plain] = &hosttest.VFIODevice{}
	dir := filepath.Join(k.Dir(), "sys/bus/pci/devices", plain)
	err := errors.Join(os.WriteFile(filepath.Join(dir, "reset"), nil, 0o600),
		os.RemoveAll(filepath.Join(dir, "sriov_totalvfs")))
	if err != nil {
		t.Fatal(err)
	}
	if stays {
		for _, w := range [][2]string{
			{"devices/" + plain + "/driver_override", "vfio-pci"}, {"drivers/nvme/unbind", plain},
			{"drivers_probe", plain},
		} {
			if err := k.Write("sys/bus/pci/"+w[0], w[1]); err != nil {
				t.Fatal(err)
			}
		}
	}
	return k, &iommu.Host{Host: k.Host()}
}

// writeTime is how long a write may take. Where one is to be stuck it is short.
var writeTime = bind.DefaultTimeout

// stuckSoon has a test not wait for long for what is stuck.
func stuckSoon(t *testing.T) {
	writeTime = 300 * time.Millisecond
	t.Cleanup(func() { writeTime = bind.DefaultTimeout })
}

// work does something with a Manager of its own, as a command does.
func work(t *testing.T, h *iommu.Host, do func(*Manager) error) error {
	t.Helper()
	handle, err := sriov.Open(h, bind.Options{Recoverers: Recoverers(), Timeout: writeTime})
	if err != nil {
		t.Fatal(err)
	}
	defer handle.Close()
	lock := func(ctx context.Context, devices []*iommu.Device) error {
		if err := handle.Lock(ctx, devices); err != nil {
			return err
		}
		_, err := handle.RecoverPatiently(ctx)
		return errors.Join(err, handle.StuckIn(bind.AddressesOf(devices)...))
	}
	m, err := New(handle, Options{Lock: lock})
	if err != nil {
		t.Fatal(err)
	}
	return do(m)
}

func lend(t *testing.T, h *iommu.Host, r Request) error {
	t.Helper()
	r.TTL = time.Minute
	for i := range r.Sources {
		r.Sources[i].Count = 1
	}
	return work(t, h, func(m *Manager) error {
		_, _, _, err := m.Assign(t.Context(), &r)
		return err
	})
}

func giveBack(t *testing.T, h *iommu.Host, guest string, wait time.Duration) (out []Certificate, err error) {
	t.Helper()
	err = work(t, h, func(m *Manager) error {
		out, err = m.Release(t.Context(), guest, wait)
		return err
	})
	return out, err
}

// killed has it that the command which was stuck was killed, and the write's process with it.
func killed(t *testing.T, h *iommu.Host) {
	t.Helper()
	records := journal.In(h.Host, journal.Dir)
	var r map[string]any
	known, err := records.Get(journal.Changing+plain, &r)
	if !known || err != nil {
		t.Fatalf("no record of what is stuck: %v", err)
	}
	for _, who := range []string{"command", "writer"} {
		r[who].(map[string]any)["pid"] = 1 << 30
	}
	if err := records.Put(journal.Changing+plain, r); err != nil {
		t.Fatal(err)
	}
}

// controller is the device that these tests assign, as it is now.
func controller(t *testing.T, h *iommu.Host) *iommu.Device {
	t.Helper()
	a, err := iommu.ParseAddress(plain)
	if err != nil {
		t.Fatal(err)
	}
	d, err := iommu.ReadDevice(h, a)
	if err != nil {
		t.Fatal(err)
	}
	return &d
}

// nodesOf are the nodes of the controller: its group's and its own.
func nodesOf(t *testing.T, h *iommu.Host) (group, own string) {
	t.Helper()
	files, err := vfio.Nodes(h, controller(t, h))
	if err != nil || len(files) != 2 {
		t.Fatalf("%q, %v", files, err)
	}
	return strings.TrimPrefix(files[0], "/"), strings.TrimPrefix(files[1], "/")
}

// private fails if anybody but root may open the controller's nodes.
func private(t *testing.T, h *iommu.Host) {
	t.Helper()
	group, own := nodesOf(t, h)
	for _, n := range []string{group, own} {
		if o, err := h.Owner(n); err != nil || !o.Private() {
			t.Errorf("%s belongs to %+v, %v", n, o, err)
		}
	}
}

// hide has somebody open a device whom /proc does not show.
func hide(t *testing.T, h *iommu.Host, how string) (end func() error) {
	t.Helper()
	if way, is := strings.CutPrefix(how, "device by "); is {
		space, err := vfio.NewContext(h, vfio.Options{Way: vfio.Way(way)})
		if err == nil {
			_, err = space.Open(plain)
		}
		if err != nil {
			t.Fatal(err)
		}
		return space.Close
	}
	node, own := nodesOf(t, h)
	if how == "own node" {
		node = own
	}
	fd, err := h.OpenNode(node, unix.O_RDWR)
	if err != nil {
		t.Fatal(err)
	}
	return func() error { return unix.Close(fd) }
}

// A device that somebody has whom no look at processes shows is not given back, and what its guest was let into is
// root's alone; when he is gone it goes on.
func TestHiddenHolder(t *testing.T) {
	for _, stays := range []bool{true, false} {
		for _, how := range []string{"group", "own node", "device by iommufd", "device by container"} {
			t.Run(how+" "+strconv.FormatBool(stays), func(t *testing.T) {
				k, h := vfioHost(t, stays)
				if how == "own node" {
					stuckSoon(t)
				}
				if err := lend(t, h, Request{Guest: "a", Sources: []Source{{From: plain}},
					NodeOwner: "1000:36"}); err != nil {
					t.Fatal(err)
				}
				group, own := nodesOf(t, h)
				if o, _ := h.Owner(own); o != (host.Owner{UID: 1000, GID: 36, Mode: 0o660}) {
					t.Errorf("the guest's node belongs to %+v", o)
				}
				k.Owners[path.Join("vfio", path.Base(group))] = host.Owner{UID: 1000, GID: 36, Mode: 0o660, ACL: true}

				end := hide(t, h, how)
				_, err := giveBack(t, h, "a", 0)
				if !errors.Is(err, holder.ErrRefused) || !strings.Contains(err.Error(), "/proc does not show") {
					t.Errorf("released while somebody has it: %v", err)
				}
				if how != "own node" {
					private(t, h)
				}
				if err := lend(t, h, Request{Guest: "b", Sources: []Source{{From: plain}}}); err == nil {
					t.Error("lent to another meanwhile")
				}

				if err := end(); err != nil {
					t.Fatal(err)
				}
				if how == "own node" {
					killed(t, h)
				}
				certificates, err := giveBack(t, h, "a", time.Minute)
				if err != nil || len(certificates) != 1 || certificates[0].Result != Clean {
					t.Fatalf("%+v, %v", certificates, err)
				}
				want := map[bool]string{true: "vfio-pci/vfio-pci", false: "nvme/(null)"}[stays]
				if now := driversOf(t, k, plain)[0]; strings.TrimSuffix(now, "/") != strings.TrimSuffix(want,
					"/(null)") {
					t.Errorf("it is on %s", now)
				}
				if stays {
					private(t, h)
				}
			})
		}
	}
}

// One who lets go in time is waited for.
func TestHiddenHolderThatGoes(t *testing.T) {
	k, h := vfioHost(t, true)
	if err := lend(t, h, Request{Guest: "a", Sources: []Source{{From: plain}}}); err != nil {
		t.Fatal(err)
	}
	end := hide(t, h, "group")
	tried := make(chan bool, 1)
	k.SetFault(func(op, name string) error {
		if op == "open" && strings.HasPrefix(name, "dev/vfio/") {
			select {
			case tried <- true:
			default:
			}
		}
		return nil
	})
	ended := make(chan error, 1)
	go func() {
		<-tried
		ended <- end()
	}()
	certificates, err := giveBack(t, h, "a", time.Minute)
	if err := errors.Join(err, <-ended); err != nil || len(certificates) != 1 || certificates[0].Result != Clean {
		t.Errorf("%+v, %v", certificates, err)
	}
}

// Whose the nodes are by rules of the host's own, udev is asked when a guest names nobody, and when they are nobody's
// again.
func TestNodesAreSettled(t *testing.T) {
	k, h := vfioHost(t, true)
	numbers := func() (out []string) {
		files, err := vfio.Numbers(h, controller(t, h))
		for _, n := range files {
			if h.Exists(n) {
				out = append(out, path.Join(path.Dir(n), "uevent"))
			}
		}
		if err != nil || len(out) != 2 {
			t.Fatalf("%q, %v", files, err)
		}
		return out
	}
	made := func() {
		for _, file := range numbers() {
			write(t, k, file, "")
		}
	}
	k.After = func(name, _ string) {
		if name == "sys/bus/pci/drivers/vfio-pci/bind" {
			made()
		}
	}
	asked := func(when string) {
		t.Helper()
		for _, file := range numbers() {
			if !slices.Contains(k.Log, file+"=change") {
				t.Errorf("%s: udev is not asked of %s: %q", when, file, k.Log)
			}
		}
		k.Log = nil
	}

	made()
	group, own := nodesOf(t, h)
	k.Owners[path.Join("vfio", path.Base(group))] = host.Owner{UID: 1000, Mode: 0o600}
	k.Owners[path.Join("devices", path.Base(own))] = host.Owner{UID: 1000, Mode: 0o600}
	if err := lend(t, h, Request{Guest: "a", Sources: []Source{{From: plain}}}); err != nil {
		t.Fatal(err)
	}
	asked("assigned to who names nobody")
	if _, err := giveBack(t, h, "a", 0); err != nil {
		t.Fatal(err)
	}
	asked("released")
}

// What somebody has is not lent either; and what is left of an owner before is not the next one's.
func TestLeftOver(t *testing.T) {
	stuckSoon(t)
	for _, how := range []string{"group", "own node", "device by iommufd"} {
		k, h := vfioHost(t, true)
		group, own := nodesOf(t, h)
		k.Owners[path.Join("vfio", path.Base(group))] = host.Owner{UID: 1000, Mode: 0o600}
		k.Owners[path.Join("devices", path.Base(own))] = host.Owner{UID: 1000, Mode: 0o600}
		end := hide(t, h, how)
		err := lend(t, h, Request{Guest: "a", Sources: []Source{{From: plain}}})
		if !errors.Is(err, holder.ErrRefused) || !strings.Contains(err.Error(), "/proc does not show") {
			t.Errorf("%s: lent: %v", how, err)
		}
		if how != "own node" {
			private(t, h)
		}
		if err := end(); err != nil {
			t.Fatal(err)
		}
		if how == "own node" {
			killed(t, h)
		}
		if err := lend(t, h, Request{Guest: "a", Sources: []Source{{From: plain}}}); err != nil {
			t.Errorf("%s: when it is free: %v", how, err)
		}
		private(t, h)
	}
}

// A device that does not answer any more since its reset is nobody's, and what its guest was let into is not left to
// it.
func TestDead(t *testing.T) {
	for _, how := range []string{"dead", "no reset"} {
		k, h := vfioHost(t, true)
		if err := lend(t, h, Request{Guest: "a", Sources: []Source{{From: plain}}, NodeOwner: "1000"}); err != nil {
			t.Fatal(err)
		}
		dir := "sys/bus/pci/devices/" + plain
		config := filepath.Join(k.Dir(), dir, "config")
		k.After = func(name, _ string) {
			if how == "dead" && name == dir+"/reset" {
				if err := os.WriteFile(config, []byte(strings.Repeat("\xff", 64)), 0o600); err != nil {
					t.Error(err)
				}
			}
		}
		if how == "no reset" {
			k.Fail[dir+"/reset"] = unix.EIO
		}
		certificates, err := giveBack(t, h, "a", 0)
		if err == nil || len(certificates) != 1 || certificates[0].Result != InQuarantine ||
			how == "dead" && !strings.Contains(certificates[0].Why, "has not answered") {
			t.Errorf("%s: %+v, %v", how, certificates, err)
		}
		private(t, h)
	}
}

// An assign and a release that were killed at any change leave what a release, or its repetition, brings to its end: of
// one device, of two that are reset together, and of one whose group has companions.
func TestLeaseKilled(t *testing.T) {
	changes := func(op, _ string) bool { return op == "write" || op == "own" || op == "remove" || op == "replace" }
	for name, host := range map[string]func() (*hosttest.Kernel, []string){
		"on VFIO": func() (*hosttest.Kernel, []string) {
			k, _ := vfioHost(t, true)
			return k, []string{plain}
		},
		"at home": func() (*hosttest.Kernel, []string) {
			k, _ := vfioHost(t, false)
			return k, []string{plain}
		},
		"pair": func() (*hosttest.Kernel, []string) {
			k, _, one, two := pairHost(t)
			return k, []string{one, two}
		},
		"companions": func() (*hosttest.Kernel, []string) {
			return hosttest.NewBoard(t), []string{"0000:03:00.0", "0000:03:00.1", "0000:00:14.0", "0000:00:14.3"}
		},
	} {
		for _, op := range []string{"assign", "release"} {
			t.Run(name+" "+op, func(t *testing.T) {
				step := 1
				if os.Getenv("VIADUCT_SWEEP") == "short" {
					step = 4
				}
				for n := 0; killLease(t, host, op, n, changes); n += step {
				}
			})
		}
	}
}

// killLease kills one of the two at a change, and reports whether it had so many.
func killLease(t *testing.T, host func() (*hosttest.Kernel, []string), op string, n int,
	changes func(op, name string) bool) bool {
	t.Helper()
	k, devices := host()
	h := &iommu.Host{Host: k.Host()}
	home := driversOf(t, k, devices...)
	request := Request{Guest: "a", Sources: []Source{{From: devices[0]}}, NodeOwner: "1000"}
	do := func() error { return lend(t, h, request) }
	if op == "release" {
		if err := do(); err != nil {
			t.Fatal(err)
		}
		do = func() error {
			_, err := giveBack(t, h, "a", 0)
			return err
		}
	}
	k.KillAt(n, changes)
	err := do()
	killed := k.Revive()
	if !killed && (err != nil || n < 3) {
		t.Errorf("not killed at change %d: %v", n, err)
	}

	_, err = giveBack(t, h, "a", 0)
	if none, _ := errors.AsType[*NoLeaseError](err); err != nil && none == nil {
		t.Errorf("killed at change %d, and released: %v", n, err)
	}
	if now := driversOf(t, k, devices...); !slices.Equal(now, home) {
		t.Errorf("killed at change %d: it is on %q, and was on %q", n, now, home)
	}
	if left, err := BookOf(h).Quarantined(); err != nil || len(left) > 0 {
		t.Errorf("killed at change %d: in quarantine %v, %v", n, left, err)
	}
	return killed
}

// failWrites has the next writes to a file fail, so many times.
func failWrites(k *hosttest.Kernel, times int, file string) {
	var left atomic.Int64
	left.Store(int64(times))
	k.SetFault(func(op, name string) error {
		if op == "write" && name == file && left.Add(-1) >= 0 {
			return unix.EIO
		}
		return nil
	})
}

// A device that cannot be given back to its VFIO driver stays so for the next release, and is not taken for clean.
func TestLetGoFails(t *testing.T) {
	for _, fails := range []int{1, 2} {
		k, _, one, two := pairHost(t)
		h := &iommu.Host{Host: k.Host()}
		home := driversOf(t, k, one, two)
		if err := lend(t, h, Request{Guest: "a", Sources: []Source{{From: one}}}); err != nil {
			t.Fatal(err)
		}
		failWrites(k, fails, "sys/bus/pci/drivers/vfio-pci/bind")
		if out, err := giveBack(t, h, "a", 0); err == nil || len(out) > 0 {
			t.Errorf("%d times: %+v, %v", fails, out, err)
		}
		out, err := giveBack(t, h, "a", 0)
		if now := driversOf(t, k, one, two); err != nil || len(out) != 2 || !slices.Equal(now, home) {
			t.Errorf("%d times, and then: %+v, %v, on %q", fails, out, err, now)
		}
	}
}

// A kernel before Linux 6.1 has no node of a device's own: such a one has nothing to let go of beside its group.
func TestProofWithGroupNodeAlone(t *testing.T) {
	for _, own := range []bool{true, false} {
		k, h := vfioHost(t, true)
		if err := lend(t, h, Request{Guest: "a", Sources: []Source{{From: plain}}, NodeOwner: "1000"}); err != nil {
			t.Fatal(err)
		}
		if !own {
			withoutOwnNode(t, k, plain)
		}
		before := len(k.Log)
		if _, err := giveBack(t, h, "a", 0); err != nil {
			t.Errorf("own node %v: %v", own, err)
		}
		cut := slices.ContainsFunc(k.Log[before:], func(w string) bool { return strings.Contains(w, "vfio-pci/unbind") })
		if cut != own {
			t.Errorf("own node %v, and its driver let go of it: %v: %q", own, cut, k.Log[before:])
		}
	}
}

// withoutOwnNode takes a device's own node away, as if the kernel were one that makes none.
func withoutOwnNode(t *testing.T, k *hosttest.Kernel, address string) {
	t.Helper()
	if err := os.RemoveAll(filepath.Join(k.Dir(), "sys/bus/pci/devices", address, "vfio-dev")); err != nil {
		t.Fatal(err)
	}
}

// What is left of a reset that was interrupted stays, and is told, until its record can be removed.
func TestRecordOfResetStays(t *testing.T) {
	k, h := vfioHost(t, true)
	err := work(t, h, func(m *Manager) error {
		d := find(t, m.Topology, plain)
		if err := m.lock(t.Context(), []*iommu.Device{d}); err != nil {
			return err
		}
		return m.handle.Begin(opReset, d, []*iommu.Device{d}, nil)
	})
	if err != nil {
		t.Fatal(err)
	}
	record := journal.Dir + "/" + journal.Changing + plain
	k.SetFault(func(op, name string) error {
		if op == "remove" && strings.HasPrefix(name, record) {
			return unix.EROFS
		}
		return nil
	})
	recovered := func() error {
		handle, err := sriov.Open(h, bind.Options{Recoverers: Recoverers()})
		if err != nil {
			t.Fatal(err)
		}
		defer handle.Close()
		all, err := handle.RecoverPatiently(t.Context())
		if err != nil || len(all) != 1 {
			t.Fatalf("%+v, %v", all, err)
		}
		return all[0].Err
	}
	if err := recovered(); err == nil {
		t.Error("the record could not be removed, and nothing is told")
	}
	k.SetFault(func(string, string) error { return nil })
	if err := recovered(); err != nil {
		t.Error(err)
	}
}
