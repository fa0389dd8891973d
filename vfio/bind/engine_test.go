package bind

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
	"viaduct/vfio/holder"
)

// The devices of the captured lab host.
const (
	igb   = "0000:01:00.0"
	e1000 = "0000:07:01.0"
	edu   = "0000:07:02.0" // shares e1000's group, has no driver
)

func newKernel(t *testing.T) (*hosttest.Kernel, *Handle) {
	t.Helper()
	k := hosttest.NewLab(t, nil)
	return k, open(t, k, Options{})
}

// open opens a handle of a kernel's host, which is closed with the test.
func open(t *testing.T, k *hosttest.Kernel, o Options) *Handle {
	t.Helper()
	b, err := Open(&iommu.Host{Host: k.Host()}, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

// others are Options with recoverers of another package's changes.
func others(names ...string) Options {
	o := Options{Recoverers: map[string]Recoverer{}}
	for _, n := range names {
		o.Recoverers[n] = func(context.Context, *Handle, iommu.Address, json.RawMessage) (string,
			error) {
			return "is over", nil
		}
	}
	return o
}

func read(t *testing.T, b *Handle, address string) *iommu.Device {
	t.Helper()
	a, err := iommu.ParseAddress(address)
	if err != nil {
		t.Fatal(err)
	}
	d, err := iommu.ReadDevice(b.host, a)
	if err != nil {
		t.Fatal(err)
	}
	return &d
}

func bound(t *testing.T, b *Handle, address string) [2]string {
	t.Helper()
	d := read(t, b, address)
	return [2]string{d.Driver, d.DriverOverride}
}

func take(ctx context.Context, b *Handle, d *iommu.Device) (Change, error) {
	r := b.DoUnasked(ctx, [][]*iommu.Device{{d}}, Take(Auto))[0]
	return r.Change, r.Err
}

func giveBack(b *Handle, d *iommu.Device) (Change, error) {
	r := b.DoUnasked(context.Background(), [][]*iommu.Device{{d}}, GiveBack())[0]
	return r.Change, r.Err
}

func TestTakeAndGiveBack(t *testing.T) {
	k, b := newKernel(t)
	if _, err := take(context.Background(), b, read(t, b, e1000)); err != nil {
		t.Fatal(err)
	}
	want := []string{
		"sys/bus/pci/devices/0000:07:01.0/driver_override=vfio-pci",
		"sys/bus/pci/drivers/e1000/unbind=0000:07:01.0",
		"sys/bus/pci/drivers_probe=0000:07:01.0",
	}
	if !slices.Equal(k.Log, want) {
		t.Errorf("writes\n%s\nwant\n%s", strings.Join(k.Log, "\n"), strings.Join(want, "\n"))
	}
	if got := bound(t, b, e1000); got != [2]string{"vfio-pci", "vfio-pci"} {
		t.Errorf("taken: %q", got)
	}

	k.Log = nil
	c, err := take(context.Background(), b, read(t, b, e1000))
	if err != nil || len(c.Steps) != 0 || len(k.Log) != 0 {
		t.Errorf("taken again: %v, steps %v, writes %v", err, c.Steps, k.Log)
	}

	if _, err := giveBack(b, read(t, b, e1000)); err != nil {
		t.Fatal(err)
	}
	want = []string{
		"sys/bus/pci/devices/0000:07:01.0/driver_override=e1000",
		"sys/bus/pci/drivers/vfio-pci/unbind=0000:07:01.0",
		"sys/bus/pci/drivers_probe=0000:07:01.0",
		"sys/bus/pci/devices/0000:07:01.0/driver_override=\n",
	}
	if !slices.Equal(k.Log, want) {
		t.Errorf("writes\n%s\nwant\n%s", strings.Join(k.Log, "\n"), strings.Join(want, "\n"))
	}
	if got := bound(t, b, e1000); got != [2]string{"e1000", ""} {
		t.Errorf("given back: %q", got)
	}
}

// A device that had no driver gets none back, and keeps the override it had.
func TestGiveBackToNothing(t *testing.T) {
	for _, override := range []string{"", "none"} {
		_, b := newKernel(t)
		if override != "" {
			if err := b.host.Write("sys/bus/pci/devices/"+edu+"/driver_override", override); err != nil {
				t.Fatal(err)
			}
		}
		before := bound(t, b, edu)
		if _, err := take(context.Background(), b, read(t, b, edu)); err != nil {
			t.Fatal(err)
		}
		if _, err := giveBack(b, read(t, b, edu)); err != nil {
			t.Fatal(err)
		}
		if got := bound(t, b, edu); got != before {
			t.Errorf("with override %q before: %q, want %q", override, got, before)
		}
	}
}

// A record of another device that had the address is no record.
func TestRecordOfAnotherDevice(t *testing.T) {
	_, b := newKernel(t)
	d := read(t, b, e1000)
	if err := b.journal.Put(takenKey(d.Address), takenRecord{Vendor: 0x15b3, Device: 0x1017,
		Driver: "mlx5_core"}); err != nil {
		t.Fatal(err)
	}
	d.Driver, d.VFIO = "vfio-pci", true
	c, err := b.Plan(d, GiveBack())
	if err != nil || c.To == "mlx5_core" {
		t.Errorf("planned %q, %v; the record is of other hardware", c.To, err)
	}
}

// Whatever fails in the middle, the device is as it was and the error says what happened.
func TestUndo(t *testing.T) {
	for name, c := range map[string]struct {
		break_ func(*hosttest.Kernel)
		says   string
	}{
		"override refused": {func(k *hosttest.Kernel) {
			k.Fail["sys/bus/pci/devices/"+e1000+
				"/driver_override"] = unix.EACCES
		}, "driver_override"},
		"unbind refused": {func(k *hosttest.Kernel) { k.Fail["sys/bus/pci/drivers/e1000/unbind"] = unix.EPERM },
			"e1000/unbind"},
		"probe succeeds and binds nothing": {func(k *hosttest.Kernel) { k.Probe["vfio-pci"] = unix.EINVAL },
			"did not bind it to vfio-pci"},
		"another tool is faster": {func(k *hosttest.Kernel) {
			k.After = func(name, _ string) {
				if strings.HasSuffix(name, "e1000/unbind") {
					k.After = nil
					_ = k.Write("sys/bus/pci/devices/"+e1000+"/driver_override", "pci-stub")
				}
			}
			k.Register("pci-stub")
		}, "pci-stub instead of vfio-pci"},
	} {
		t.Run(name, func(t *testing.T) {
			k, b := newKernel(t)
			before := bound(t, b, e1000)
			c.break_(k)
			_, err := take(context.Background(), b, read(t, b, e1000))
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("error %v, want one that says %q", err, c.says)
			}
			if got := bound(t, b, e1000); got != before {
				t.Errorf("left %q, was %q\nwrites: %s", got, before, strings.Join(k.Log, "\n"))
			}
			if known, err := b.journal.Get(takenKey(read(t, b, e1000).Address), &takenRecord{}); known || err != nil {
				t.Errorf("a record is left: %v, %v", known, err)
			}
		})
	}
}

// A signal between two devices of a unit puts the first back: half a group is of no use.
func TestInterrupted(t *testing.T) {
	k, b := newKernel(t)
	ctx, cancel := context.WithCancel(context.Background())
	k.After = func(name, _ string) {
		if strings.HasSuffix(name, "/unbind") {
			cancel()
		}
	}
	before := bound(t, b, e1000)
	results := b.DoUnasked(ctx, [][]*iommu.Device{{read(t, b, e1000), read(t, b, edu)}}, Take(Auto))
	for _, r := range results {
		if r.Err == nil {
			t.Errorf("%s: no error", r.Device)
		}
	}
	if err := results[1].Err; !strings.Contains(err.Error(), "interrupted") {
		t.Errorf("error %v", err)
	}
	if got := bound(t, b, e1000); got != before {
		t.Errorf("left %q, was %q", got, before)
	}
	if keys, err := b.journal.Keys(""); len(keys) > 0 || err != nil {
		t.Errorf("records are left: %q, %v", keys, err)
	}
}

// What a run that was killed left is finished or undone by the next one, wherever it was killed.
func TestRecover(t *testing.T) {
	for _, op := range []string{opTake, opGive} {
		for n := 0; ; n++ {
			k, b := newKernel(t)
			home := bound(t, b, igb)
			d := read(t, b, igb)
			if op == opGive {
				if _, err := take(context.Background(), b, d); err != nil {
					t.Fatal(err)
				}
				d = read(t, b, igb)
			}
			k.KillAt(n, isWrite)
			if op == opTake {
				_, _ = take(context.Background(), b, d)
			} else {
				_, _ = giveBack(b, d)
			}
			b.Close()
			if !k.Revive() {
				break // it has fewer writes
			}

			next := open(t, k, Options{})
			recovered, err := next.Recover(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range recovered {
				if r.Err != nil {
					t.Errorf("%s, killed before write %d: %v", op, n+1, r.Err)
				}
			}
			got := bound(t, next, igb)
			if taken := [2]string{"vfio-pci", "vfio-pci"}; got != home && (got != taken || op != opTake || n < 3) {
				t.Errorf("%s, killed before write %d: %q is neither home nor taken", op, n+1, got)
			}
			if keys, _ := next.journal.Keys("change-"); len(keys) > 0 {
				t.Errorf("%s, killed before write %d: records are left: %q", op, n+1, keys)
			}
			next.Close()
		}
	}
}

func isWrite(op, name string) bool { return op == "write" && strings.HasPrefix(name, "sys/") }

// Two commands at once: the second waits for the device, and only for that one.
func TestLock(t *testing.T) {
	k, first := newKernel(t)
	second := open(t, k, Options{Timeout: 50 * time.Millisecond})
	a, other := read(t, first, igb), read(t, first, e1000)
	if err := first.Lock(context.Background(), []*iommu.Device{a}); err != nil {
		t.Fatal(err)
	}
	if err := second.Lock(context.Background(), []*iommu.Device{other}); err != nil {
		t.Errorf("another device: %v", err)
	}
	r := second.DoUnasked(context.Background(), [][]*iommu.Device{{a}}, Take(Auto))
	if _, busy := errors.AsType[*BusyError](r[0].Err); !busy {
		t.Errorf("the same device: %v", r[0].Err)
	}
	if got := bound(t, first, igb); got != [2]string{"igb", ""} {
		t.Errorf("%q was touched", got)
	}

	third := open(t, k, Options{Timeout: time.Minute})
	got := make(chan error)
	go func() { got <- third.Lock(context.Background(), []*iommu.Device{a}) }()
	first.Close()
	if err := <-got; err != nil {
		t.Errorf("after the first has ended: %v", err)
	}
}

func TestCheckTake(t *testing.T) {
	_, b := newKernel(t)
	topology, err := b.Topology()
	if err != nil {
		t.Fatal(err)
	}

	for _, c := range []struct{ address, says string }{
		{"0000:00:08.0", "is a bridge"},
		{"0000:02:00.0", "is a PF with 3 VFs"},
		{"0000:00:04.0", "the IOMMU does not cover it"},
		{e1000, ""},
	} {
		a, _ := iommu.ParseAddress(c.address)
		d, err := topology.Find(a)
		if err != nil {
			t.Fatal(err)
		}
		asked := []*iommu.Device{d}
		units, err := Units(topology, asked)
		if err != nil {
			t.Fatal(err)
		}
		verdicts, err := b.Check(units, asked, Take(Auto), nil)
		err = errors.Join(err, Refusals(verdicts))
		if c.says == "" && err != nil ||
			c.says != "" && (!errors.Is(err, holder.ErrRefused) || !strings.Contains(err.Error(), c.says)) {
			t.Errorf("%s: %v, want %q", c.address, err, c.says)
		}
	}

	a, _ := iommu.ParseAddress(edu)
	d, _ := topology.Find(a)
	units, err := Units(topology, []*iommu.Device{d, d})
	if err != nil || len(units) != 1 || len(units[0]) != 2 || units[0][0].Name != e1000 || units[0][1].Name != edu {
		t.Errorf("the unit of %s is %v, %v", edu, units, err)
	}
}
