package iommu_test

import (
	"errors"
	"slices"
	"testing"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

// A representor is no interface of the PF's own, also where it is the only one that is here.
func TestOnlyRepresentors(t *testing.T) {
	for kind, h := range hosttest.OnlyRepresentors().Hosts(t) {
		host := &iommu.Host{Host: h}
		topology, err := iommu.Scan(host)
		if err != nil {
			t.Fatal(err)
		}
		pf, err := topology.Find(iommu.Address{Bus: 1})
		if err != nil || len(pf.Netdevs) > 0 || !slices.Equal(pf.Ports, []string{"a-rep0"}) {
			t.Errorf("%s: %+v, %v", kind, pf, err)
		}
		again := *pf
		if err := iommu.ReadNetdevs(host, &again); err != nil || len(again.Netdevs) > 0 {
			t.Errorf("%s: read again: %v, %v", kind, again.Netdevs, err)
		}
	}
}

// A PF with several ports is named by the one that the settings of its VFs go over, or that is said.
func TestOtherPort(t *testing.T) {
	for kind, h := range hosttest.TwoPorts().Hosts(t) {
		host := &iommu.Host{Host: h}
		topology, err := iommu.Scan(host)
		if err != nil {
			t.Fatal(err)
		}
		for text, right := range map[string]bool{
			"ens2": true, "mac=52:54:00:00:00:01": true, "01:00.0": true, "15b3:1003": true,
			"ens1": false, "mac=52:54:00:00:00:02": false,
		} {
			sel, err := iommu.ParseSelector(text)
			if err != nil {
				t.Fatal(err)
			}
			d, err := sel.PF(host, topology)
			_, other := errors.AsType[*iommu.OtherPortError](err)
			if right && (err != nil || d.Netdevs[0] != "ens2") || !right && !other {
				t.Errorf("%s: %s: %+v, %v", kind, text, d, err)
			}
			if d, err := sel.One(host, topology); err != nil || d.Name != "0000:01:00.0" {
				t.Errorf("%s: %s, as a device: %+v, %v", kind, text, d, err)
			}
		}
	}
}
