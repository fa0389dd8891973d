package journal

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"viaduct/internal/host"
	"viaduct/internal/host/hosttest"
)

type entry struct{ Driver string }

func TestJournal(t *testing.T) {
	h := hosttest.NewKernel(t, hosttest.Tree{}).Host()
	j := In(h, "not/there/yet")
	dir := j.Dir()
	var e entry
	if known, err := j.Get("a", &e); known || err != nil {
		t.Errorf("before anything was put: %v, %v", known, err)
	}

	for _, driver := range []string{"igb", "e1000"} { // the second takes the first one's place
		if err := j.Put("a", entry{driver}); err != nil {
			t.Fatal(err)
		}
		if known, err := j.Get("a", &e); !known || err != nil || e.Driver != driver {
			t.Errorf("put %s: %v, %v, %v", driver, known, err, e)
		}
	}

	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("the folder has %v, %v; want the one record", left, err)
	}

	for range 2 { // deleting what is gone is no error
		if err := j.Delete("a"); err != nil {
			t.Error(err)
		}
	}

	if known, err := j.Get("a", &e); known || err != nil {
		t.Errorf("after it was deleted: %v, %v", known, err)
	}
	if err := j.Put("../out", entry{}); err == nil {
		t.Error("a key that leaves the folder was taken")
	}
	if err := os.WriteFile(filepath.Join(dir, "torn.json"), []byte(`{"Driver":`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := j.Get("torn", &e); err == nil {
		t.Error("half a record was read")
	}
}

// That of a captured host can be read, and not be written to.
func TestCaptured(t *testing.T) {
	for kind, h := range (hosttest.Tree{"run/viaduct/a.json": `{"Driver":"igb"}`}).Hosts(t) {
		j := In(h, Dir)
		var e entry
		if known, err := j.Get("a", &e); !known || err != nil || e.Driver != "igb" {
			t.Errorf("%s: %v, %v, %v", kind, known, err, e)
		}
		if keys, err := j.Keys(""); len(keys) != 1 || err != nil {
			t.Errorf("%s: %v, %v", kind, keys, err)
		}
		if err := errors.Join(j.Put("a", e)); !errors.Is(err, host.ErrReadOnly) {
			t.Errorf("%s: put: %v", kind, err)
		}
		if err := j.Delete("a"); !errors.Is(err, host.ErrReadOnly) {
			t.Errorf("%s: delete: %v", kind, err)
		}
	}
}

func TestChanged(t *testing.T) {
	j := In(hosttest.NewKernel(t, hosttest.Tree{}).Host(), "not/there/yet")
	if at := j.Changed(); !at.IsZero() {
		t.Errorf("before anything was put: %v", at)
	}
	last := time.Time{}
	for _, change := range []func() error{
		func() error { return j.Put("a", entry{"igb"}) }, func() error { return j.Put("a", entry{"e1000"}) },
		func() error { return j.Delete("a") },
	} {
		old := time.Unix(1, 0)
		if !last.IsZero() {
			if err := os.Chtimes(j.Dir(), old, old); err != nil {
				t.Fatal(err)
			}
		}
		if err := change(); err != nil {
			t.Fatal(err)
		}
		if last = j.Changed(); !last.After(old) {
			t.Errorf("a change did not show: %v", last)
		}
	}
}
