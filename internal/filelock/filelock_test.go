package filelock

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func open(t *testing.T, name string) *File {
	t.Helper()
	l, err := Open(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func try(t *testing.T, l *File, at int64) bool {
	t.Helper()
	ok, err := l.Try(at)
	if err != nil {
		t.Fatal(err)
	}
	return ok
}

func TestTry(t *testing.T) {
	name := filepath.Join(t.TempDir(), "not", "there", "lock")
	a, b := open(t, name), open(t, name)
	for range 2 {
		if !try(t, a, 7) {
			t.Error("a free lock, or one's own, cannot be had")
		}
	}
	if try(t, b, 7) {
		t.Error("a lock is had twice")
	}
	if !try(t, b, 8) {
		t.Error("another lock cannot be had")
	}
	a.Free(7)
	if !try(t, b, 7) {
		t.Error("a lock that was freed cannot be had")
	}
}

// Who waits for a lock never has it: somebody else who only tries must get one that nobody has.
func TestTryBesideWaiters(t *testing.T) {
	name := filepath.Join(t.TempDir(), "lock")
	owner, other := open(t, name), open(t, name)
	for round := range 200 {
		if !try(t, owner, 3) {
			t.Fatalf("round %d: nobody has the lock, and it cannot be had", round)
		}

		// Waiters that give up go on waiting for a moment after that.
		ctx, cancel := context.WithCancel(context.Background())
		var waiters sync.WaitGroup
		for range 4 {
			waiters.Go(func() {
				l, err := Open(name)
				if err != nil {
					t.Error(err)
					return
				}
				defer l.Close()
				if err := l.Wait(ctx, 3); !errors.Is(err, context.Canceled) {
					t.Errorf("Wait: %v", err)
				}
			})
		}
		time.AfterFunc(time.Millisecond, cancel)
		waiters.Wait()
		owner.Free(3)
		if !try(t, other, 3) {
			t.Fatalf("round %d: nobody has the lock, and it cannot be had", round)
		}
		other.Free(3)
	}
}

func TestWait(t *testing.T) {
	name := filepath.Join(t.TempDir(), "lock")
	first := open(t, name)
	if !try(t, first, 1) {
		t.Fatal("a free lock cannot be had")
	}
	short, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if err := open(t, name).Wait(short, 1); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Wait of a lock that stays: %v", err)
	}

	var in atomic.Int32
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			l, err := Open(name)
			if err != nil {
				t.Error(err)
				return
			}
			defer l.Close()
			if err := l.Wait(context.Background(), 1); err != nil {
				t.Error(err)
			}
			if in.Add(1) != 1 {
				t.Error("two have the lock")
			}
			in.Add(-1)
		})
	}
	first.Free(1)
	all.Wait()
}

func TestKeepOnly(t *testing.T) {
	name := filepath.Join(t.TempDir(), "lock")
	a, b := open(t, name), open(t, name)
	for at := range int64(6) {
		try(t, a, at)
	}
	a.KeepOnly([]int64{4, 2})
	for at := range int64(6) {
		if got, want := try(t, b, at), at != 2 && at != 4; got != want {
			t.Errorf("lock %d can be had: %v, want %v", at, got, want)
		}
	}
}

// What cannot be locked or waited for is told: it is not free, and not somebody else's.
func TestErrors(t *testing.T) {
	name := filepath.Join(t.TempDir(), "lock")
	a, closed := open(t, name), open(t, name)
	if err := closed.Close(); err != nil {
		t.Fatal(err)
	}
	if ok, err := closed.Try(7); ok || err == nil {
		t.Errorf("a closed file: %v, %v", ok, err)
	}
	if err := closed.Wait(context.Background(), 7); err == nil {
		t.Error("a closed file was waited for")
	}

	b := open(t, name)
	if !try(t, a, 7) {
		t.Fatal("it is not free")
	}
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
	if err := b.Wait(context.Background(), 7); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that is gone: %v", err)
	}

	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(filepath.Join(file, "lock")); err == nil {
		t.Error("a lock was opened below a file")
	}
	if _, err := Open(filepath.Dir(file)); err == nil {
		t.Error("a directory was opened as a lock")
	}
}
