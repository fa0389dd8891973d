package bind

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/internal/filelock"
	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
	"viaduct/vfio/holder"
)

// hold locks a device as another process does, with a record of who it is; the returned function frees it.
func hold(t *testing.T, k *hosttest.Kernel, b *Handle, a iommu.Address, pid int) (free func()) {
	t.Helper()
	lock, err := filelock.Open(b.locks.name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { lock.Close() })
	if ok, err := lock.Try(offset(a)); !ok || err != nil {
		t.Fatal(ok, err)
	}
	if pid > 0 {
		k.Process(pid, "viaduct")
		r := changeRecord{
			Op: opTake, Unit: []iommu.Address{a}, Change: Change{Device: a}, Since: time.Now(),
			Command: holder.NameProcess(b.host, pid),
		}
		if err := b.journal.Put(changeKey(a), r); err != nil {
			t.Fatal(err)
		}
	}
	return func() { lock.Free(offset(a)) }
}

// A device that another process changes is waited for, and then told with whom; nothing is changed.
func TestBusy(t *testing.T) {
	for pid, says := range map[int]string{0: "another viaduct has been changing it for",
		4711: "another viaduct (pid 4711)"} {
		k := hosttest.NewLab(t, nil)
		b := open(t, k, Options{Timeout: 20 * time.Millisecond})
		a := read(t, b, igb).Address
		free := hold(t, k, b, a, pid)
		for what, call := range map[string]func() error{
			"lock": func() error { return b.LockAt(context.Background(), a) },
			"do":   func() error { _, err := take(context.Background(), b, read(t, b, igb)); return err },
			"move": func() error { _, err := b.Move(context.Background(), Take(Auto), a); return err },
		} {
			err := call()
			busy, ok := errors.AsType[*BusyError](err)
			if !ok || busy.Device != a || busy.PID != pid || !strings.Contains(err.Error(), says) || len(k.Log) > 0 {
				t.Errorf("%s: %v, wrote %q", what, err, k.Log)
			}
		}

		if ours, err := b.TryLock(a); ours || err != nil {
			t.Errorf("tried: %v, %v", ours, err)
		}

		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if err := b.LockAt(ctx, a); !errors.Is(err, context.Canceled) {
			t.Errorf("interrupted: %v", err)
		}

		free()
		if ours, err := b.TryLock(a); !ours || err != nil {
			t.Errorf("free: %v, %v", ours, err)
		}
	}
}

// A Handle that is closed changes nothing more.
func TestClosed(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	b := open(t, k, others("test"))
	d := read(t, b, igb)
	if err := errors.Join(b.Lock(context.Background(), []*iommu.Device{d}), b.Close(), b.Close()); err != nil {
		t.Fatal(err)
	}
	_, err1 := b.Move(context.Background(), Take(Auto), d.Address)
	_, err2 := b.Recover(context.Background())
	_, err3 := b.TryLock(d.Address)
	_, err4 := take(context.Background(), b, d)
	for i, err := range []error{err1, err2, err3, err4, b.Begin("test", d, nil, 1)} {
		if err == nil || !strings.Contains(err.Error(), "closed") {
			t.Errorf("%d: %v", i, err)
		}
	}
	if len(k.Log) > 0 {
		t.Errorf("wrote %q", k.Log)
	}
}

// What VFIO would not take is refused with every reason, and so is what the host would lose by giving back.
func TestReasons(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	b := open(t, k, Options{})
	topology, err := b.Topology()
	if err != nil {
		t.Fatal(err)
	}
	group := 99
	card, err := topology.Find(read(t, b, igb).Address)
	if err != nil {
		t.Fatal(err)
	}
	withVFs := *card
	withVFs.SRIOV = &iommu.SRIOV{Total: 7, VFs: []iommu.VF{{Index: 0}}}
	onVFIO := withVFs
	onVFIO.Driver, onVFIO.VFIO = "vfio-pci", true
	alone := *card
	alone.Group = nil
	for says, c := range map[string]struct {
		unit []*iommu.Device
		goal Goal
	}{
		"platform0 shares the group and is not a PCI device": {[]*iommu.Device{card,
			{Name: "platform0", Group: &group}}, Take(Auto)},
		"is in no IOMMU group: the IOMMU does not cover it":          {[]*iommu.Device{&alone}, Take(Auto)},
		"is a PF with 1 VFs, and VFIO does not accept a PF with VFs": {[]*iommu.Device{&withVFs}, Take(Auto)},
		"has 1 VFs, which its driver would remove":                   {[]*iommu.Device{&onVFIO}, GiveBack()},
	} {
		verdicts, err := b.Check([][]*iommu.Device{c.unit}, c.unit, c.goal, nil)
		if err != nil {
			t.Fatal(err)
		}
		refused, ok := errors.AsType[*holder.RefusedError](verdicts[0].Refused)
		if !ok || len(refused.Reasons) != 1 || !strings.Contains(refused.Reasons[0].Text, says) {
			t.Errorf("%v, want %q", verdicts[0].Refused, says)
		}
	}

	k.Process(4711, "qemu")
	k.ChangeNet(func(n *hosttest.Network) {
		n.Routes = []hosttest.Route{{To: "default", Over: []string{"enp1s0"}}}
	})
	verdicts, err := b.Check([][]*iommu.Device{{card}}, []*iommu.Device{card}, Take(Auto), nil)
	if err != nil {
		t.Fatal(err)
	}
	refused, ok := errors.AsType[*holder.RefusedError](verdicts[0].Refused)
	if !ok || len(refused.Holders()) != 1 || refused.Holders()[0].Kind != holder.Route {
		t.Errorf("%+v", refused)
	}
	verdicts, err = b.Check([][]*iommu.Device{{card}}, []*iommu.Device{card}, Take(Auto), []holder.Kind{holder.Route})
	if err != nil || verdicts[0].Refused != nil || len(verdicts[0].Overridden) != 1 {
		t.Errorf("overridden: %+v, %v", verdicts, err)
	}
}

// Without an IOMMU nothing can be taken, and the cure is said.
func TestNoIOMMU(t *testing.T) {
	tree := hosttest.Tree{}
	for name, content := range hosttest.Lab(t) {
		if !strings.Contains(name, "iommu") {
			tree[name] = content
		}
	}
	k := hosttest.NewKernel(t, tree)
	b := open(t, k, Options{})
	_, err := b.Move(context.Background(), Take(Auto), read(t, b, igb).Address)
	if !errors.Is(err, holder.ErrRefused) || !strings.Contains(err.Error(), "no IOMMU is active") || len(k.Log) > 0 {
		t.Errorf("%v, wrote %q", err, k.Log)
	}
}

// Nodes that cannot be handed to their owner, or are not made, undo the take.
func TestNodesThatFail(t *testing.T) {
	o, err := ParseNodeOwner("0:0")
	if err != nil {
		t.Fatal(err)
	}

	for what, break_ := range map[string]func(k *hosttest.Kernel){
		"own": func(k *hosttest.Kernel) {
			k.SetFault(func(op, _ string) error {
				if op == "own" {
					return unix.EPERM
				}
				return nil
			})
		},
		"rule": func(k *hosttest.Kernel) {
			k.SetFault(func(op, name string) error {
				if op == "replace" && strings.HasPrefix(name, rules) {
					return unix.ENOSPC
				}
				return nil
			})
		},
		"no node": func(k *hosttest.Kernel) {
			k.After = func(name, _ string) {
				if strings.HasSuffix(name, "drivers_probe") {
					for _, dir := range []string{"sys/class/vfio", "sys/bus/pci/devices/" + igb + "/vfio-dev"} {
						_ = os.RemoveAll(k.Dir() + "/" + dir)
					}
				}
			}
		},
	} {
		k := hosttest.NewLab(t, hosttest.Tree{"run/udev/": ""})
		b := open(t, k, Options{Timeout: time.Second})
		break_(k)
		_, err := b.Move(context.Background(), Take(Auto).OwnedBy(o), read(t, b, igb).Address)
		k.Revive()
		k.After = nil
		if got := bound(t, b, igb); err == nil || got != [2]string{"igb", ""} || hasRules(b, read(t, b, igb).Address) {
			t.Errorf("%s: %v, left %q", what, err, got)
		}
		if keys, err := b.journal.Keys(""); err != nil || len(keys) > 0 {
			t.Errorf("%s: records are left: %q, %v", what, keys, err)
		}
	}
}

// A driver whose module was unloaded, or went, is loaded again for a device that goes home to it.
func TestHomeModuleGone(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	b := open(t, k, Options{})
	a := read(t, b, igb).Address
	if _, err := b.Move(context.Background(), Take(Auto), a); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(k.Dir() + "/sys/bus/pci/drivers/igb"); err != nil {
		t.Fatal(err)
	}
	d := read(t, b, igb)
	k.Modules = map[string]string{}
	if _, err := b.Move(context.Background(), GiveBack(), a); err == nil {
		t.Error("given back to a driver that is not there")
	}
	if got := bound(t, b, igb); got != [2]string{"vfio-pci", "vfio-pci"} {
		t.Errorf("left %q", got)
	}
	b.Close()
	k.Modules = map[string]string{d.Modalias(): "igb"}
	again := open(t, k, Options{})
	if _, err := again.Move(context.Background(), GiveBack(), a); err != nil {
		t.Error(err)
	}
	if got := bound(t, again, igb); got != [2]string{"igb", ""} {
		t.Errorf("given back: %q", got)
	}
}

// A record that cannot be read, one of a device that is gone, and half a unit are told or left alone, never acted on.
func TestOddRecords(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	b := open(t, k, Options{Recoverers: map[string]Recoverer{
		"other": func(context.Context, *Handle, iommu.Address, json.RawMessage) (string, error) {
			t.Error("a device that is gone was recovered")
			return "", nil
		},
	}})

	gone, err := iommu.ParseAddress("0000:0f:00.0")
	if err != nil {
		t.Fatal(err)
	}

	here := read(t, b, igb).Address
	for key, content := range map[string]any{
		changeKey(gone): changeRecord{Op: "other", Unit: []iommu.Address{gone}, Change: Change{Device: gone}},
		changeKey(here): "no record",
		"change-":       "no address",
	} {
		if err := b.journal.Put(key, content); err != nil {
			t.Fatal(err)
		}
	}

	all, err := b.Recover(context.Background())
	if err != nil || len(all) != 2 {
		t.Fatalf("%+v, %v", all, err)
	}
	if all[0].Device != here || all[0].Err == nil || all[1].Device != gone || all[1].Err != nil ||
		all[1].What != "is gone" {
		t.Errorf("%+v", all)
	}
	if len(b.Recovered()) != 2 || len(b.Stuck()) != 1 {
		t.Errorf("recovered %+v, stuck %+v", b.Recovered(), b.Stuck())
	}
	if keys, err := b.journal.Keys("change-"); err != nil || len(keys) != 2 {
		t.Errorf("left %q, %v", keys, err)
	}
}

// Nothing is moved of which nobody was asked whether it may, or that was refused, or twice by one answer.
func TestUnasked(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	b := open(t, k, Options{})
	d := read(t, b, igb)
	units, ctx := [][]*iommu.Device{{d}}, context.Background()
	refused := func(what string, g Goal) {
		t.Helper()
		k.Log = nil
		if r := b.Do(ctx, units, g); !errors.Is(r[0].Err, ErrUnasked) || len(k.Log) > 0 {
			t.Errorf("%s: %v, wrote %q", what, r[0].Err, k.Log)
		}
	}
	check := func(g Goal, force ...holder.Kind) {
		t.Helper()
		if _, err := b.Check(units, units[0], g, force); err != nil {
			t.Fatal(err)
		}
	}

	refused("not asked", Take(Auto))
	check(Take(Auto))
	refused("asked before it was locked", Take(Auto))
	if err := b.Lock(ctx, units[0]); err != nil {
		t.Fatal(err)
	}
	check(Take(Auto))
	refused("asked about something else", Take(None))
	k.ChangeNet(func(n *hosttest.Network) {
		n.Routes = []hosttest.Route{{To: "default", Over: []string{"enp1s0"}}}
	})
	check(Take(Auto))
	refused("in use", Take(Auto))
	j, err := b.Prepare(ctx, Request{Devices: units[0], Goal: Take(Auto)})
	if err != nil || j.Units[0].Refused == nil {
		t.Fatal(j, err)
	}
	j.Units[0].Refused = nil
	if r := j.Run(ctx); !errors.Is(r[0].Err, ErrUnasked) || len(k.Log) > 0 {
		t.Errorf("a refusal that was taken away: %v, wrote %q", r[0].Err, k.Log)
	}
	check(Take(Auto), holder.Route)
	if r := b.Do(ctx, units, Take(Auto)); r[0].Err != nil {
		t.Error(r[0].Err)
	}
	units[0] = []*iommu.Device{read(t, b, igb)}
	refused("by the same answer", Take(Auto))
}

// The zero values of what an importer can make do nothing, and do not panic.
func TestZeroValues(t *testing.T) {
	if r := (&Job{}).Run(context.Background()); r != nil {
		t.Errorf("a zero Job did %+v", r)
	}
	var h iommu.Host
	if err := h.Close(); err != nil || h.Live() {
		t.Errorf("a zero Host: %v, live %v", err, h.Live())
	}
	if _, err := Open(&h, Options{}); err == nil {
		t.Error("a Handle of a zero Host")
	}
	_, b := newKernel(t)
	if verdicts, err := b.Check([][]*iommu.Device{{}}, nil, Take(Auto), nil); err != nil || verdicts[0].Refused != nil {
		t.Errorf("%+v, %v", verdicts, err)
	}
}

// Who cannot see all users may plan, and changes nothing.
func TestBlind(t *testing.T) {
	for _, dry := range []bool{true, false} {
		k := hosttest.NewLab(t, nil)
		k.Process(4712, "other")
		b := open(t, k, Options{DryRun: dry})
		a := read(t, b, igb).Address
		if dry {
			other := open(t, k, Options{})
			if _, err := other.Move(context.Background(), Take(Auto), a); err != nil {
				t.Fatal(err)
			}
			other.Close()
			k.Log = nil
		}

		k.SetFault(func(_, name string) error {
			if strings.HasPrefix(name, "proc/4712") || strings.HasPrefix(name, "proc/self/ns/pid") {
				return unix.EACCES
			}
			return nil
		})

		goal := Take(Auto)
		if dry {
			goal = GiveBack()
		}

		results, err := b.Move(context.Background(), goal, a)
		k.Revive()
		if (err == nil) != dry || !dry && len(results) > 0 || len(k.Log) > 0 {
			t.Errorf("dry run %v: %+v, %v, wrote %q", dry, results, err, k.Log)
		}
	}
}

// A device whose record cannot be read is left alone.
func TestUnreadableRecord(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	b := open(t, k, Options{Timeout: time.Second})
	a := read(t, b, igb).Address
	free := hold(t, k, b, a, 4711)
	k.End(4711)
	free()
	var reads int
	k.SetFault(func(op, name string) error {
		if op == "read" && strings.HasSuffix(name, "change-"+a.String()+".json") {
			if reads++; reads == 1 {
				return unix.EIO
			}
		}
		return nil
	})
	all, err := b.Recover(context.Background())
	k.Revive()
	if err == nil && len(all) == 0 {
		t.Error("nothing was told of it")
	}
	if len(k.Log) > 0 {
		t.Errorf("wrote %q", k.Log)
	}
}
