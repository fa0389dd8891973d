package lease

import (
	"errors"
	"strings"
	"testing"
	"time"

	"viaduct/cmd/internal/hostfile"
	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// What no guest can have is refused by assign and by its dry run, by its own name, on a running host and on a captured
// one.
func TestNoGuests(t *testing.T) {
	for name, c := range map[string]struct {
		tree       hosttest.Tree
		from, says string
		liveOnly   bool // a captured host has no users
	}{
		"not all PCI": {hosttest.Platform(), "0000:00:01.0",
			"fe000000.dma, in IOMMU group 5, is not a PCI", false},
		"no PCI device":    {hosttest.Platform(), "group=9", "fe100000.gpu, in IOMMU group 9, is not a PCI", false},
		"without an IOMMU": {hosttest.NoIOMMU(), "0000:00:01.0", "VFIO made it in its noiommu mode", false},
		"under the screen": {hosttest.Screen(), "0000:c3:00.0", "has the screen's framebuffer (BOOTFB)", true},
	} {
		k := hosttest.NewKernel(t, c.tree)
		m := without(t, k)
		_, _, _, err := m.Assign(t.Context(), &Request{Guest: "a", Sources: []Source{{From: c.from, Count: 1}},
			TTL: time.Minute})
		if !errors.Is(err, holder.ErrRefused) || !strings.Contains(err.Error(), c.says) || len(k.Log) > 0 {
			t.Errorf("%s: %v, writes %q", name, err, k.Log)
		}
		if c.liveOnly {
			continue
		}

		h, err := sriov.Open(&iommu.Host{Host: c.tree.Host(t)}, bind.Options{})
		if err != nil {
			t.Fatal(err)
		}

		captured, err := New(h, Options{})
		if err != nil {
			t.Fatal(err)
		}

		steps, err := previewed(captured, &Request{Guest: "a", Sources: []Source{{From: c.from, Count: 1}},
			NoReset: true})
		if !errors.Is(err, holder.ErrRefused) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: the dry run of a captured host: %v, %q", name, err, steps)
		}

		h.Close()
	}
}

// VFs are not drawn by the name of a port that their settings do not go over.
func TestOtherPort(t *testing.T) {
	m := without(t, hosttest.NewKernel(t, hosttest.TwoPorts()))
	_, err := previewed(m, &Request{Guest: "a", Sources: []Source{{From: "ens1", Count: 1}}})
	if _, other := errors.AsType[*iommu.OtherPortError](err); !other {
		t.Errorf("%v", err)
	}
}

// A guest whose VF has no MAC address is told, once it has the VF, and not if it asks for one.
func TestNoteOfAddress(t *testing.T) {
	for mac, note := range map[string]bool{"": true, "stable": false} {
		k := newKernel(t, 2)
		m := newManager(t, k)
		r := &Request{Guest: "a", Sources: []Source{{From: pf, Count: 1}}, TTL: time.Minute}
		if mac != "" {
			r.Sources[0].Settings = hostfile.Plain(sriov.Settings{sriov.MAC: mac})
		}
		_, _, notes, err := m.Assign(t.Context(), r)
		if said := strings.Contains(strings.Join(notes, " "), "has no MAC address"); err != nil || said != note {
			t.Errorf("mac %q: %q, %v", mac, notes, err)
		}
	}
}
