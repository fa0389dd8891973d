package lease

import (
	"errors"
	"strings"
	"testing"
	"time"

	"viaduct/cmd/internal/declared"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// TestOwnDriver: what a VMM takes to a driver of its own, as Xen does, is led to no VFIO driver: not by its preview, not
// by the lease, and not by a plan of what is declared. Asked for again for another VMM, it is something else.
func TestOwnDriver(t *testing.T) {
	k := newKernel(t, 7)
	m := newManager(t, k)
	r := &Request{Guest: "dom", Sources: []Source{{From: "net", Count: 1}}, OwnDriver: true, TTL: time.Minute}
	steps, err := previewed(m, r)
	text := strings.Join(bind.Commands(steps), "\n")
	if err != nil || strings.Contains(text, "vfio") || !strings.Contains(text, "is left on no driver") {
		t.Errorf("previewed as %q, %v", text, err)
	}

	l, _, _, err := m.Assign(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	vf := find(t, m.Topology, l.Devices[0].Address.String())
	if driver, _ := k.Host().LinkBase("sys/bus/pci/devices/" + vf.Name + "/driver"); driver != "" {
		t.Errorf("it is on %s", driver)
	}
	m.handle.Close()

	m = newManager(t, k)
	dm, err := declared.New(m.handle, declared.Options{Leased: m.Book.Guests})
	if err != nil {
		t.Fatal(err)
	}
	items, err := dm.Plan(m.declaration)
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range items {
		if text := strings.Join(bind.Commands(i.Steps), "\n"); strings.Contains(text, vf.Name) {
			t.Errorf("planned: %s", text)
		}
	}

	vfio := *r
	vfio.OwnDriver = false
	if _, _, _, err := m.Assign(t.Context(), &vfio); !errors.Is(err, holder.ErrRefused) {
		t.Errorf("asked again for another VMM: %v", err)
	}
	if _, err := previewed(m, &vfio); !errors.Is(err, holder.ErrRefused) {
		t.Errorf("a preview for another VMM: %v", err)
	}
	if _, fresh, _, err := m.Assign(t.Context(), r); err != nil || fresh {
		t.Errorf("asked again: %v, %v", fresh, err)
	}
}
