package journal

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

type entry struct{ Driver string }

func TestJournal(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "not", "there", "yet")
	j := In(dir)
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
	if known, err := (*Journal)(nil).Get("a", &e); known || err != nil {
		t.Errorf("the journal of a captured host: %v, %v", known, err)
	}
}

func TestChanged(t *testing.T) {
	j := In(filepath.Join(t.TempDir(), "not", "there", "yet"))
	if at := j.Changed(); !at.IsZero() {
		t.Errorf("before anything was put: %v", at)
	}
	last := time.Time{}
	for _, change := range []func() error{
		func() error { return j.Put("a", entry{"igb"}) }, func() error { return j.Put("a", entry{"e1000"}) }, func() error { return j.Delete("a") },
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
