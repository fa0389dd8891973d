package lease

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"viaduct/cmd/internal/hostfile"
	"viaduct/internal/host/hosttest"
	"viaduct/sriov"
	"viaduct/vfio/holder"
)

func fromNet(settings sriov.Settings) []Source {
	return []Source{{From: "net", Count: 1, Settings: hostfile.Plain(settings)}}
}

const guestMAC = "52:54:00:aa:00:01"

// movable is a host whose VFs can be reset.
func movable(t *testing.T) *hosttest.Kernel {
	t.Helper()
	k := newKernel(t, 3)
	for _, vf := range []string{"0000:01:10.0", "0000:01:10.2", "0000:01:10.4"} {
		if err := os.WriteFile(filepath.Join(k.Dir(), "sys/bus/pci/devices", vf, "reset"), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return k
}

// A lease for a guest that is to come has a VF without the guest's address; nobody but its move ends it, and when that
// is over it is as any other.
func TestExpect(t *testing.T) {
	k := movable(t)
	m := newManager(t, k)
	ctx := t.Context()
	l, _, err := m.Expect(ctx, &Request{Guest: "web", Sources: fromNet(sriov.Settings{sriov.VLAN: "7"})})
	if err != nil || !l.Ready || l.Moving != Incoming {
		t.Fatalf("%+v, %v", l, err)
	}
	if again, _, err := m.Expect(ctx, &Request{Guest: "web",
		Sources: fromNet(sriov.Settings{sriov.VLAN: "7"})}); err != nil ||
		again.Devices[0].Address != l.Devices[0].Address {
		t.Errorf("again: %+v, %v", again, err)
	}
	if mac, err := m.Address("web"); err != nil || mac == guestMAC {
		t.Errorf("its VF has %q, %v", mac, err)
	}
	if look := m.LookAt(l); look.State != Incoming {
		t.Errorf("it is %s: %s", look.State, look.Why)
	}
	if _, err := m.Release(ctx, "web", 0); !errors.Is(err, holder.ErrRefused) {
		t.Errorf("release: %v", err)
	}
	if _, _, _, err := m.Assign(ctx, &Request{Guest: "web", Sources: fromNet(nil)}); !errors.Is(err,
		holder.ErrRefused) {
		t.Errorf("assign: %v", err)
	}
	if gone, err := m.Reclaim(ctx); len(gone) > 0 || err != nil {
		t.Errorf("reclaim: %+v, %v", gone, err)
	}

	if err := m.SetAddress(ctx, "web", guestMAC); err != nil {
		t.Fatal(err)
	}
	if mac, err := m.Address("web"); err != nil || mac != guestMAC {
		t.Errorf("its VF has %q, %v", mac, err)
	}
	if err := m.SetMoving(ctx, "web", ""); err != nil {
		t.Fatal(err)
	}
	now, err := m.Book.Get("web")
	if err != nil || now.Moving != "" || now.Devices[0].Wanted[sriov.MAC] != guestMAC ||
		now.Devices[0].Now[sriov.VLAN] != "7" {
		t.Errorf("%+v, %v", now, err)
	}
	out, err := m.Release(ctx, "web", 0)
	if err != nil || len(out) != 1 || out[0].Result != Clean || out[0].Settings[sriov.MAC] == guestMAC {
		t.Errorf("release: %+v, %v", out, err)
	}
}

// A guest that leaves: its VF loses the address, which nothing else gives it back, and gets it again when it stays.
func TestLeaving(t *testing.T) {
	k := movable(t)
	m := newManager(t, k)
	ctx := t.Context()
	if _, _, _, err := m.Assign(ctx, &Request{Guest: "web", Persist: true,
		Sources: fromNet(sriov.Settings{sriov.MAC: guestMAC})}); err != nil {
		t.Fatal(err)
	}
	if err := m.SetMoving(ctx, "web", Leaving); err != nil {
		t.Fatal(err)
	}
	if err := m.SetAddress(ctx, "web", ""); err != nil {
		t.Fatal(err)
	}
	if mac, err := m.Address("web"); err != nil || mac == guestMAC {
		t.Errorf("its VF has %q, %v", mac, err)
	}
	all, err := m.Book.Guests()
	if err != nil {
		t.Fatal(err)
	}
	for a, s := range all {
		if s.Settings[sriov.MAC] == guestMAC {
			t.Errorf("what brings VFs' settings back would give %s the guest's address", a)
		}
	}
	if _, _, err := m.Expect(ctx, &Request{Guest: "web", Sources: fromNet(nil)}); !errors.Is(err, holder.ErrRefused) {
		t.Errorf("a guest that is here is expected: %v", err)
	}
	if err := m.Again(ctx, "web"); !errors.Is(err, holder.ErrRefused) {
		t.Errorf("it is started here: %v", err)
	}
	reboot(t, k)
	if done, err := newManager(t, k).Restore(ctx); len(done) > 0 || err != nil {
		t.Errorf("after a boot it is made again: %v, %v", done, err)
	}

	m = newManager(t, k)
	if _, err := m.EndMoved(ctx, "web", time.Second); err != nil {
		t.Error(err)
	}
	if l, err := m.Book.Get("web"); l != nil || err != nil {
		t.Errorf("it has a lease still: %+v, %v", l, err)
	}
}

// Who gets the VF of a guest that has moved gets it after its release, however late that is, and keeps what it was given.
func TestNextOfMoved(t *testing.T) {
	const nextMAC = "52:54:00:00:00:07"
	k, _ := poolHost(t)
	take := func(guest, mac string) error {
		return on(k, func(ctx context.Context, m *Manager) error {
			_, _, _, err := m.Assign(ctx, &Request{Guest: guest, Sources: fromNet(sriov.Settings{sriov.MAC: mac})})
			return err
		})
	}
	for guest, mac := range map[string]string{"web": guestMAC, "db": "52:54:00:00:00:08"} {
		if err := take(guest, mac); err != nil {
			t.Fatal(err)
		}
	}
	if err := on(k, func(ctx context.Context, m *Manager) error {
		return m.SetMoving(ctx, "web",
			Leaving)
	}); err != nil {
		t.Fatal(err)
	}

	var wg sync.WaitGroup
	wg.Go(func() {
		err := on(k, func(ctx context.Context, m *Manager) error {
			_, err := m.EndMoved(ctx, "web", time.Second)
			return err
		})
		if err != nil {
			t.Error(err)
		}
	})
	err := take("next", nextMAC)
	for ; err != nil; err = take("next", nextMAC) {
		if _, none := errors.AsType[*ExhaustedError](err); !none {
			t.Fatal(err)
		}
	}
	wg.Wait()

	err = on(k, func(_ context.Context, m *Manager) error {
		mac, err := m.Address("next")
		if mac != nextMAC {
			t.Errorf("the next guest's VF has %q", mac)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}
