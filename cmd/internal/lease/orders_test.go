package lease

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"viaduct/internal/host/hosttest"
	"viaduct/vfio/holder"
)

// What can happen to a device that guests can have: it is assigned, released and reclaimed; its VMM opens it, closes it,
// and is started anew; the process that keeps the lease dies; somebody looks.
var lives = []string{"assign", "open", "look", "close", "restart", "die", "release", "reclaim"}

// order is what has happened, by a model that knows nothing of records.
type order struct {
	leased bool
	keeper bool // it lives
	vmm    int  // the VMM that runs; 0: none
	opened bool
	seen   int // the VMM that somebody saw having the device when somebody looked last and saw any; 0: none
	resets int
}

// can reports whether that can happen now.
func (o *order) can(event string) bool {
	switch event {
	case "assign", "die":
		return o.keeper
	case "open":
		return o.leased && !o.opened
	case "close":
		return o.opened
	case "restart":
		return o.leased && o.vmm != 0
	}
	return true
}

// dead reports whether the lease is to be reclaimed: nobody has its device, nor has who was seen with it ended or not.
func (o *order) dead() bool {
	return o.leased && !o.opened && !o.keeper && (o.seen == 0 || o.seen != o.vmm)
}

func (o *order) ends() { o.leased, o.seen, o.resets = false, 0, o.resets+1 }

// happens is what it comes to, and how the call for it ends.
func (o *order) happens(event string, next int) (want error) {
	switch event {
	case "assign":
		o.leased = true
	case "open":
		if o.vmm == 0 {
			o.vmm = next
		}
		o.opened = true
	case "close":
		o.opened = false
	case "restart":
		o.vmm, o.opened = next, true
	case "die":
		o.keeper = false
	case "look", "reclaim":
		if o.opened {
			o.seen = o.vmm
		}
		if event == "reclaim" && o.dead() {
			o.ends()
		}
	case "release":
		switch {
		case !o.leased:
			return errNone
		case o.opened:
			return holder.ErrRefused
		}
		o.ends()
	}

	return nil
}

var errNone = errors.New("there is no lease")

// orders are all orders of so many events that none longer begins with.
func orders(most int) [][]string {
	var out [][]string
	var walk func(o order, past []string)
	walk = func(o order, past []string) {
		if len(past) == most {
			out = append(out, past)
			return
		}
		for _, event := range lives {
			if next := o; next.can(event) {
				_ = next.happens(event, len(past)+1)
				walk(next, append(slices.Clip(past), event))
			}
		}
	}
	walk(order{keeper: true}, nil)
	return out
}

// Every order of up to five of these leaves a lease, and a device that was reset as often as a guest gave it back and
// never while it was open, as the model says. Without VIADUCT_SWEEP=all it is every order of three, and some of five.
func TestOrders(t *testing.T) {
	all := orders(5)
	if len(all) < 1000 {
		t.Fatalf("%d orders", len(all))
	}
	if os.Getenv("VIADUCT_SWEEP") != "all" {
		seeded := rand.New(rand.NewPCG(5, 0))
		seeded.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		all = append(orders(3), all[:50]...)
	}
	k, _ := poolHost(t)
	s := &sites[0]
	before := s.look(t, k, nil)
	for _, events := range all {
		walked(t, k, s, before, events)
		if t.Failed() {
			return
		}
	}
	t.Logf("%d orders", len(all))
}

func walked(t *testing.T, k *hosttest.Kernel, s *site, before *world, events []string) {
	t.Helper()
	// Resets are counted by it.
	k.Log = nil
	o := order{keeper: true}
	k.Process(keeperOfLease, "keeper")
	for n, event := range events {
		next := 4800 + n
		was := o
		want := o.happens(event, next)
		var err error
		switch event {
		case "assign":
			err = s.assign(t.Context(), k)
		case "look":
			err = on(k, func(_ context.Context, m *Manager) error {
				_, err := m.Look()
				return err
			})
		case "die":
			k.End(keeperOfLease)
		case "release":
			err = release(k)
		case "reclaim":
			err = reclaim(k)
		default:
			if was.vmm != 0 {
				k.End(was.vmm)
			}
			var open []string
			if o.opened {
				open = []string{nodeOf(t, k, s.devices[0])}
			}
			k.Process(o.vmm, "qemu", open...)
		}

		now := s.look(t, k, nil)
		_, none := errors.AsType[*NoLeaseError](err)
		told := err == nil
		if want != nil {
			told = errors.Is(err, want) || errors.Is(want, errNone) && none
		}
		if !told || (now.lease != nil) != o.leased || now.resets[s.devices[0]] != o.resets || !o.leased &&
			now.devices != before.devices ||
			len(now.changes)+len(now.quarantined) > 0 {
			t.Errorf("after %s: %v (%v is wanted)\nit is %s\nwant %+v", strings.Join(events[:n+1], ", "), err,
				want, now, o)
			return
		}
	}

	for pid := range maps.Keys(map[int]bool{keeperOfLease: o.keeper, o.vmm: o.vmm != 0}) {
		if pid != 0 {
			k.End(pid)
		}
	}
	if err := release(k); o.leased && err != nil {
		t.Errorf("after %s, and all have ended: %v", strings.Join(events, ", "), err)
	}
	if now := s.look(t, k, nil); !now.free(before) {
		t.Errorf("after %s, and all have ended, it is %s", strings.Join(events, ", "), now)
	}
}

// nodeOf is the node of a device that a VMM opens.
func nodeOf(t *testing.T, k *hosttest.Kernel, device string) string {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(k.Dir(), "sys/bus/pci/devices", device, "vfio-dev"))
	if err != nil || len(entries) != 1 {
		t.Fatal(fmt.Sprint(entries), err)
	}
	return "/dev/vfio/devices/" + entries[0].Name()
}
