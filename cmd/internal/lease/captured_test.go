package lease

import (
	"testing"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/bind"
)

func FuzzStates(f *testing.F) {
	f.Add([]byte(`{"leases":{"web":{"state":"dead","why":"its holder is gone"}}}`))
	f.Add([]byte(`{"leases":{"web":{}}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		states, err := decodeStates(b)
		for guest, s := range states {
			if err != nil || s.State == "" || len(s.State) > 32 {
				t.Errorf("%q: %+v, %v", guest, s, err)
			}
		}
	})
}

// Records of a snapshot may say anything: they are refused, or looked at.
func TestHostileRecords(t *testing.T) {
	for name, text := range map[string]string{
		"no device":    `{"guest":"a","devices":[{}],"persist":true}`,
		"no identity":  `{"guest":"a","devices":[{"address":"0000:01:00.0","vf_index":-9}],"persist":true}`,
		"empty":        `{}`,
		"null":         `null`,
		"no path":      `{"guest":"a","persist":true,"devices":[{"pf":{"path":""},"vf_index":3}]}`,
		"negative":     `{"guest":"a","ready":true,"ttl":-1,"since":-1,"owner":{"pid":-1},"devices":null}`,
		"no such unit": `{"guest":"a","ready":true,"unit":"../../../etc"}`,
	} {
		tree := hosttest.Lab(t).With(hosttest.Tree{
			"run/viaduct/lease-a.json": text, "var/lib/viaduct/lease-b.json": text,
			"var/lib/viaduct/quarantine-a.json": text,
			"viaduct/leases.json":               `{"leases":null}`,
		})

		s, err := sriov.Open(&iommu.Host{Host: tree.Host(t)}, bind.Options{DryRun: true})
		if err != nil {
			t.Fatal(err)
		}

		t.Cleanup(func() { s.Close() })
		m, err := New(s, Options{})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}

		looks, err := m.Look()
		for _, l := range looks {
			if l.State != Unknown && l.State != Lost {
				t.Errorf("%s: %+v", name, l)
			}
		}

		if _, err2 := m.Book.Quarantined(); err != nil || err2 != nil {
			t.Logf("%s: %v, %v", name, err, err2)
		}
		if !m.Book.Known() {
			t.Errorf("%s: not known", name)
		}
	}
}

// How leases were that a snapshot tells otherwise than viaduct writes it is not taken for unknown: that is an error.
func TestStatesThatCannotBeRead(t *testing.T) {
	for _, text := range []string{"{", `{"leases":{"a":{}}}`} {
		tree := hosttest.Lab(t).With(hosttest.Tree{"viaduct/leases.json": text})
		s, err := sriov.Open(&iommu.Host{Host: tree.Host(t)}, bind.Options{DryRun: true})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := New(s, Options{}); err == nil {
			t.Errorf("%s is read", text)
		}
		s.Close()
	}
}
