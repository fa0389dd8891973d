package holder

import (
	"errors"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

// capturedHost is a captured host with these facts.
func capturedHost(t *testing.T, facts ...iommu.Fact) *iommu.Host {
	t.Helper()
	tree := hosttest.Tree{"sys/kernel/": ""}
	for _, f := range facts {
		tree["viaduct/"+f.Name] = string(f.Data)
	}
	return &iommu.Host{Host: tree.Host(t)}
}

// Holders of each kind are found in a snapshot as they were on the host; in one without facts nobody is taken for absent.
func TestCapturedHolders(t *testing.T) {
	for _, kind := range Kinds() {
		for i, s := range scenarios[kind] {
			_, h := s.host(t)
			other := edu
			if s.device == edu {
				other = igb
			}
			all := []*iommu.Device{read(t, h, s.device), read(t, h, other)}
			topology, err := iommu.Scan(h)
			if err != nil {
				t.Fatal(err)
			}
			facts, err := Capture(h, topology)
			if err != nil {
				t.Fatalf("%s %d: %v", kind, i, err)
			}
			want, err1 := Find(h, all)
			less, err2 := Find(h, all[1:])
			if err := errors.Join(err1, err2); err != nil {
				t.Fatal(err)
			}
			snapshot := capturedHost(t, facts...)
			got, err := Find(snapshot, all)
			if err != nil || !reflect.DeepEqual(got, want) {
				t.Errorf("%s %d: %+v, %v, want %+v", kind, i, got, err, want)
			}
			of := func(k Kind) []Holder {
				return slices.DeleteFunc(slices.Clone(want), func(h Holder) bool { return h.Kind != k })
			}
			glance, err1 := Glance(h, topology)
			then, err2 := Glance(snapshot, topology)
			if err := errors.Join(err1, err2); err != nil || !reflect.DeepEqual(glance, then) {
				t.Errorf("%s %d: at a glance %+v, %v, want %+v", kind, i, then, err, glance)
			}
			processes, err := Processes(snapshot, all)
			if err != nil || len(processes) != len(of(Process)) {
				t.Errorf("%s %d: processes %+v, %v", kind, i, processes, err)
			}
			owners, err := Owners(snapshot, all)
			if err != nil || len(owners) != len(of(Owner)) {
				t.Errorf("%s %d: owners %+v, %v", kind, i, owners, err)
			}
			if some, err := Find(snapshot, all[1:]); err != nil || !reflect.DeepEqual(some, less) {
				t.Errorf("%s %d: of another device %+v, %v, want %+v", kind, i, some, err, less)
			}
		}
	}

	_, h := hostOf(t, nil)
	snapshot := capturedHost(t)
	nic := []*iommu.Device{read(t, h, e1000)}
	if _, err := Find(snapshot, nic); !errors.Is(err, ErrNotCaptured) || !errors.Is(err, ErrBlind) {
		t.Errorf("without facts: %v", err)
	}
	if _, err := Processes(snapshot, nic); !errors.Is(err, ErrNotCaptured) {
		t.Errorf("without facts: %v", err)
	}
	if owners, err := Owners(snapshot, nic); err != nil || len(owners) > 0 {
		t.Errorf("books of a snapshot that has none: %+v, %v", owners, err)
	}
}

// Who could not be seen when a snapshot was made is not taken for absent in it.
func TestCapturedBlind(t *testing.T) {
	k, h := hostOf(t, hosttest.Tree{})
	k.Net.Routes = []hosttest.Route{{To: "default", Over: []string{nic}}}
	k.Process(1, "init")
	k.SetFault(func(op, name string) error {
		if strings.HasPrefix(name, "proc/1/") {
			return os.ErrPermission
		}
		return nil
	})
	d := []*iommu.Device{read(t, h, e1000)}
	topology, err := iommu.Scan(h)
	if err != nil {
		t.Fatal(err)
	}
	facts, err := Capture(h, topology)
	k.Revive()
	if !errors.Is(err, ErrBlind) {
		t.Fatalf("%v", err)
	}
	all, err := Find(capturedHost(t, facts...), d)
	if !errors.Is(err, ErrBlind) || errors.Is(err, ErrNotCaptured) ||
		!slices.ContainsFunc(all, func(h Holder) bool { return h.Kind == Route }) {
		t.Errorf("%+v, %v", all, err)
	}
}

func FuzzCaptured(f *testing.F) {
	f.Add([]byte(`[{"order":1,"device":"d","kind":"process","what":"is open","pid":7,"guest":"g","root":true}]`), "d")
	f.Add([]byte("[]"), "")
	f.Fuzz(func(t *testing.T, b []byte, device string) {
		all, err := decodeCaptured(b, device)
		for _, one := range all {
			if err != nil || one.Device != device {
				t.Errorf("%+v, %v", all, err)
			}
		}
	})
}
