package lease

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"viaduct/internal/host/hosttest"
	"viaduct/vfio/holder"
)

// What can happen to a lease that was made: its VMM opens its devices, closes them, is started anew by what keeps the
// lease, or ends; that ends; somebody looks; its time is over. Where it is dead, it is reclaimed.
var happenings = []string{"open", "close", "restart", "end", "die", "look", "late"}

// life is a lease, who lives, and what is known of it by what has happened, and not by its record.
type life struct {
	l      Lease
	alive  []int // processes, by their numbers
	vmm    int   // the one that runs, or ran last
	opened bool  // it has the devices open
	looked []int // who was seen with them when somebody looked last and saw anybody
	late   bool
}

const keeper = 4700

func (x *life) lives(pid int) bool { return slices.Contains(x.alive, pid) }

func (x *life) end(pid int) {
	x.alive = slices.DeleteFunc(slices.Clone(x.alive), func(p int) bool { return p == pid })
}

func (x *life) start() {
	x.vmm++
	x.alive, x.opened = append(slices.Clip(x.alive), x.vmm), true
}

// happens reports false for what cannot be now.
func (x *life) happens(what string, kept bool) bool {
	switch what {
	case "open":
		if x.lives(x.vmm) {
			x.opened = true
		} else {
			x.start()
		}
	case "close":
		x.opened = false
	case "restart":
		if !kept || !x.lives(keeper) || !x.lives(x.vmm) {
			return false
		}
		x.end(x.vmm)
		x.start()
	case "end":
		if !x.lives(x.vmm) {
			return false
		}
		x.end(x.vmm)
		x.opened = false
	case "die":
		if !kept || !x.lives(keeper) {
			return false
		}
		x.end(keeper)
	case "look":
		if x.opened {
			x.looked = []int{x.vmm}
		}
	case "late":
		x.late = true
	}

	return true
}

// dead says whether the lease is to be reclaimed.
func (x *life) dead(kind string) bool {
	kept := kind == "run" || kind == "owner"
	switch {
	case x.opened, kind == "persist", kept && x.lives(keeper), slices.ContainsFunc(x.looked, x.lives):
		return false
	case kept, len(x.looked) > 0:
		return true
	}
	return x.late
}

// Every order of up to five happenings leaves a lease alive or dead as it is to be, whatever keeps it alive.
func TestLife(t *testing.T) {
	k := newKernel(t, 1)
	made, err := assign(t, k, "a", pf)
	if err != nil {
		t.Fatal(err)
	}
	m := newManager(t, k)
	var there []int
	walked, wrong := 0, 0
	for _, kind := range []string{"time", "run", "owner", "persist"} {
		x := life{l: *made, vmm: keeper}
		x.l.Maker, x.l.Holders = holder.Proc{}, nil
		if kept := kind == "run" || kind == "owner"; kept {
			x.alive = []int{keeper}
			become(t, k, &there, x.alive)
			proc := holder.NameProcess(m.host, keeper)
			if kind == "run" {
				x.l.Runner = &Holder{Proc: proc, Name: "process 4700"}
			} else {
				x.l.Owner = &proc
			}
		}
		x.l.Persist = kind == "persist"

		var walk func(x life, past []string)
		walk = func(x life, past []string) {
			walked++
			become(t, k, &there, x.alive)
			var now []holder.Holder
			if x.opened {
				now = []holder.Holder{{Device: x.l.Devices[0].Address.String(), Kind: holder.Process, PID: x.vmm,
					What: "is open in x"}}
			}
			if len(past) > 0 && past[len(past)-1] == "look" && x.opened {
				x.l.Holders = m.seen(now)
			}
			age := time.Second
			if x.late {
				age = time.Hour
			}
			state, why := m.state(&x.l, now, age)
			if (state == Dead) != x.dead(kind) || state == Lost || state == Making || (state == Active) && why != "" {
				if wrong++; wrong < 10 {
					t.Errorf("%s, after %q: %s (%s), dead is wanted: %v", kind, past, state, why, x.dead(kind))
				}
			}
			if state == Dead || len(past) == 5 {
				return
			}
			for _, what := range happenings {
				next := x
				if next.happens(what, kind == "run" || kind == "owner") {
					walk(next, append(slices.Clip(past), what))
				}
			}
		}
		walk(x, nil)
	}
	if walked < 10_000 {
		t.Errorf("%d orders were tried", walked)
	}
}

// become has just these processes live.
func become(t *testing.T, k *hosttest.Kernel, there *[]int, want []int) {
	t.Helper()
	for _, pid := range *there {
		if !slices.Contains(want, pid) {
			if err := os.Rename(procOf(k, pid), procOf(k, pid)+".ended"); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, pid := range want {
		if slices.Contains(*there, pid) {
			continue
		}
		if err := os.Rename(procOf(k, pid)+".ended", procOf(k, pid)); err != nil {
			k.Process(pid, "x")
		}
	}
	*there = slices.Clone(want)
}

func procOf(k *hosttest.Kernel, pid int) string {
	return filepath.Join(k.Dir(), "proc", strconv.Itoa(pid))
}

// Who asks again for a lease has its time begin anew.
func TestAskedAgain(t *testing.T) {
	k := newKernel(t, 1)
	l, err := assign(t, k, "a", pf)
	if err != nil {
		t.Fatal(err)
	}
	m := newManager(t, k)
	l.Since -= time.Hour
	l.Made = l.Made.Add(-time.Hour)
	if err := m.Book.put(l); err != nil {
		t.Fatal(err)
	}
	m.handle.Close()
	if age := l.Age(m.host); age < time.Hour {
		t.Fatalf("it is %s old", age)
	}
	again, err := assign(t, k, "a", pf)
	if err != nil || again.Age(m.host) > time.Minute {
		t.Errorf("asked again it is %s old, %v", again.Age(m.host), err)
	}
}
