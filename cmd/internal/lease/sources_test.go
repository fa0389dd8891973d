package lease

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"viaduct/cmd/internal/hostfile"
	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/holder"
)

// TestSources: a guest draws from several, each with its own count and settings, and nothing twice; asked again in
// another way, it is something else.
func TestSources(t *testing.T) {
	k := newKernel(t, 7)
	m := newManager(t, k)
	named := find(t, m.Topology, pf)
	vfs := m.Topology.VFs(named)
	request := func() *Request {
		return &Request{
			Guest: "web", TTL: time.Minute, Sources: []Source{
				{From: "net", Count: 2, Settings: hostfile.Plain(sriov.Settings{sriov.VLAN: "100"})},
				{From: pf, Count: 1, Settings: hostfile.Plain(sriov.Settings{sriov.VLAN: "200"})},
				{From: vfs[5].Name, Count: 1},
			},
		}
	}
	steps, err := previewed(m, request())
	if err != nil {
		t.Fatal(err)
	}
	vlans := map[string]int{}
	for _, s := range steps {
		for _, vlan := range []string{"vlan 100", "vlan 200"} {
			if strings.Contains(s.String(), vlan) {
				vlans[vlan]++
			}
		}
	}
	if vlans["vlan 100"] != 2 || vlans["vlan 200"] != 1 {
		t.Errorf("previewed: %v", vlans)
	}

	l, fresh, _, err := m.Assign(t.Context(), request())
	if err != nil || !fresh || len(l.Devices) != 4 || l.DrawnFrom() != "net, "+pf+", "+vfs[5].Name {
		t.Fatalf("%+v, %v", l, err)
	}
	var got []string
	seen := map[iommu.Address]bool{}
	for _, d := range l.Devices {
		got = append(got, d.Now[sriov.VLAN])
		if seen[d.Address] {
			t.Errorf("%s is drawn twice", d.Address)
		}
		seen[d.Address] = true
	}
	if want := []string{"100", "100", "200", "0"}; !slices.Equal(got, want) || !seen[vfs[5].Address] {
		t.Errorf("VLANs %v, want %v; devices %v", got, want, seen)
	}

	for what, change := range map[string]func(*Request){
		"fewer sources":     func(r *Request) { r.Sources = r.Sources[:2] },
		"another source":    func(r *Request) { r.Sources[2].From = vfs[6].Name },
		"another count":     func(r *Request) { r.Sources[0].Count = 1 },
		"another setting":   func(r *Request) { r.Sources[1].Settings = hostfile.Plain(sriov.Settings{sriov.VLAN: "201"}) },
		"settings for none": func(r *Request) { r.Sources[2].Settings = hostfile.Plain(sriov.Settings{sriov.VLAN: "1"}) },
	} {
		r := request()
		change(r)
		if _, _, _, err := m.Assign(t.Context(), r); !errors.Is(err, holder.ErrRefused) {
			t.Errorf("asked again with %s: %v", what, err)
		}
	}
	if _, fresh, _, err := m.Assign(t.Context(), request()); err != nil || fresh {
		t.Errorf("asked again: %v, %v", fresh, err)
	}
}

// TestUpgradeSources: a lease of viaduct before the first with several sources has one.
func TestUpgradeSources(t *testing.T) {
	wanted := sriov.Settings{sriov.VLAN: "7"}
	l := &Lease{From: "net", Count: 2, Devices: []Device{{PF: &iommu.Identity{}, Wanted: wanted}}}
	l.upgrade()
	r := &Request{Sources: []Source{{From: "net", Count: 2, Settings: hostfile.Plain(wanted)}}}
	if why := l.differs(r); why != "" || l.From != "" {
		t.Errorf("%q, %+v", why, l)
	}
}
