package lease

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/iommu"
	"viaduct/vfio/holder"
)

const hookData = `<hookData>
  <network><name>net</name></network>
  <networkport>
    <uuid>5d744f21-ba4a-4d6e-bdb2-30a35ff3207d</uuid>
    <owner><name>%s</name><uuid>09a64add-c6bb-4ed6-9a12-a2b2b0a0a0a0</uuid></owner>
    <mac address='52:54:00:7b:35:93'/>
    <plug type='%s' managed='%s'><driver name='vfio'/><address domain='0x0000' bus='0x01' slot='0x%s' function='0x%s'/></plug>
  </networkport>
</hookData>`

// TestParsePort: a port of a PCI device is read, one of a bridge is none.
func TestParsePort(t *testing.T) {
	p, err := ParsePort(fmt.Appendf(nil, hookData, "web", "hostdev-pci", "no", "10", "2"))
	if err != nil || *p != (Port{Domain: "web", Device: at(t, "0000:01:10.2")}) {
		t.Errorf("%+v, %v", p, err)
	}
	if p, err := ParsePort(fmt.Appendf(nil, hookData, "web", "bridge", "no", "10", "2")); p != nil || err != nil {
		t.Errorf("of a bridge: %+v, %v", p, err)
	}
	for _, bad := range []string{"", "<hookData>", fmt.Sprintf(hookData, "web", "hostdev-pci", "no", "zz", "2")} {
		if p, err := ParsePort([]byte(bad)); err == nil {
			t.Errorf("%q: %+v", bad, p)
		}
	}
}

// FuzzParsePort: whatever a network hands over, it is read or refused.
func FuzzParsePort(f *testing.F) {
	f.Add(fmt.Appendf(nil, hookData, "web", "hostdev-pci", "yes", "10", "2"))
	f.Fuzz(func(t *testing.T, text []byte) {
		if p, err := ParsePort(text); p != nil && err != nil {
			t.Errorf("%v, %v", p, err)
		}
	})
}

// TestPlug: what a domain draws from a network, also while it runs, is in its lease before it has it, and is scrubbed
// when it gives it back, alone.
func TestPlug(t *testing.T) {
	k := withReset(t)
	pool := newManager(t, k).poolVFs(t)
	// As each hook is a process of its own.
	alone := func(do func(*Manager)) {
		m := newManager(t, k)
		defer m.handle.Close()
		do(m)
	}
	plug := func(domain string, n int, managed bool) (err error) {
		alone(func(m *Manager) {
			err = m.Plug(t.Context(), &Port{Domain: domain, Device: pool[n], Managed: managed})
		})
		return err
	}
	has := func(domain string, want ...iommu.Address) {
		t.Helper()
		l, err := newManager(t, k).Book.Get(domain)
		var got []iommu.Address
		if l != nil {
			for _, d := range l.Devices {
				got = append(got, d.Address)
			}
		}
		if err != nil || !slices.Equal(got, want) || l != nil && (!l.Drawn || len(l.Sources) != len(want) || !l.Ready) {
			t.Errorf("%s has %v, want %v: %+v, %v", domain, got, want, l, err)
		}
	}

	if err := plug("web", 0, true); !errors.Is(err, holder.ErrRefused) {
		t.Errorf("managed by libvirt: %v", err)
	}
	for _, n := range []int{0, 1, 0} {
		if err := plug("web", n, false); err != nil {
			t.Fatal(err)
		}
	}
	has("web", pool[0], pool[1])
	if err := plug("db", 1, false); !errors.Is(err, holder.ErrRefused) {
		t.Errorf("another's: %v", err)
	}
	has("db")

	// One that cannot be taken leaves the lease as it was.
	override := "sys/bus/pci/devices/" + pool[2].String() + "/driver_override"
	k.Fail[override] = unix.EACCES
	if err := plug("web", 2, false); !errors.Is(err, unix.EACCES) {
		t.Errorf("it cannot be taken: %v", err)
	}
	delete(k.Fail, override)
	has("web", pool[0], pool[1])

	alone(func(m *Manager) {
		out, err := m.Unplug(t.Context(), &Port{Domain: "web", Device: pool[0]}, 0)
		if err != nil || len(out) != 1 || out[0].Result != Clean || out[0].Address != pool[0] {
			t.Errorf("unplugged: %+v, %v", out, err)
		}
	})
	has("web", pool[1])
	for range 2 {
		alone(func(m *Manager) {
			if _, err := m.Unplug(t.Context(), &Port{Domain: "web", Device: pool[1]}, 0); err != nil {
				t.Error(err)
			}
		})
	}
	has("web")

	// What is assigned beforehand is all that a domain has.
	alone(func(m *Manager) {
		r := &Request{Guest: "own", Sources: []Source{{From: "net", Count: 1}}, TTL: time.Minute}
		if _, _, _, err := m.Assign(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	})
	if l, _ := newManager(t, k).Book.Get("own"); l == nil || l.Devices[0].Address != pool[2] {
		t.Errorf("drawn from the pool's head: %+v", l)
	}
	if err := plug("own", 0, false); !errors.Is(err, holder.ErrRefused) {
		t.Errorf("with a lease of viaduct assign: %v", err)
	}
}

// poolVFs are the VFs of the pool, in their order.
func (m *Manager) poolVFs(t *testing.T) []iommu.Address {
	t.Helper()
	vfs, err := m.declared.Pool(m.declaration, "net")
	if err != nil {
		t.Fatal(err)
	}
	var out []iommu.Address
	for _, vf := range vfs {
		out = append(out, vf.Address)
	}
	return out
}
