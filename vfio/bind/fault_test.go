package bind

import (
	"context"
	"errors"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/internal/filelock"
	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
	"viaduct/vfio/holder"
)

func TestMain(m *testing.M) {
	if ServeWrites() {
		return
	}
	os.Exit(m.Run())
}

// A deadline is for one write: many that are each in time are not stuck, however long they take together.
func TestDeadlineOfOneWrite(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	o := others("test")
	o.Timeout = time.Second
	b := open(t, k, o)
	d := read(t, b, igb)
	if err := errors.Join(b.Lock(context.Background(), []*iommu.Device{d}), b.Begin("test", d, nil, 1)); err != nil {
		t.Fatal(err)
	}
	k.Before = func(string, string) { time.Sleep(150 * time.Millisecond) } // as a driver is that resets its device
	steps := make([]Step, 10)
	for i := range steps {
		steps[i] = Step{Path: overrideOf(d.Address), Value: "none"}
	}
	if err := b.Write(d.Address, steps); err != nil {
		t.Error(err)
	}
	if n := len(k.Log); n != len(steps) {
		t.Errorf("%d writes of %d were made", n, len(steps))
	}
}

// A write that makes more may take longer, unless somebody has said how long one may.
func TestTimeOfWrite(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	for given, want := range map[time.Duration]time.Duration{
		0: DefaultTimeout + time.Minute, time.Second: time.Second,
	} {
		if got := open(t, k, Options{Timeout: given}).timeoutOf(Step{Extra: time.Minute}); got != want {
			t.Errorf("%s is given: %s, want %s", given, got, want)
		}
	}
}

// A write that does not return is told of with whom it waits for, or with that nobody can know; nothing is undone
// meanwhile, and the next command finishes the rest.
func TestStuckWrite(t *testing.T) {
	for _, known := range []bool{true, false} {
		k := hosttest.NewLab(t, nil)
		first := open(t, k, Options{})
		if _, err := first.Move(context.Background(), Take(Auto), read(t, first, igb).Address); err != nil {
			t.Fatal(err)
		}
		first.Close()
		b := open(t, k, Options{Timeout: time.Second})
		nodes, err := holder.Nodes(b.host, read(t, b, igb))
		if err != nil || len(nodes) == 0 {
			t.Fatal(nodes, err)
		}
		let := make(chan struct{})
		returned := make(chan struct{})
		k.Before = func(name, _ string) {
			if strings.HasSuffix(name, "vfio-pci/unbind") {
				if known {
					k.Process(4711, "qemu", "/dev/vfio/devices/vfio0")
				}
				<-let
			}
		}
		k.After = func(name, _ string) {
			if strings.HasSuffix(name, "vfio-pci/unbind") {
				close(returned)
			}
		}

		_, err = giveBack(b, read(t, b, igb))
		stuck, ok := errors.AsType[*StuckError](err)
		if !ok || !IsStuck(err) || len(stuck.Holders) > 0 != known {
			t.Fatalf("known %v: %v", known, err)
		}
		if says := "cannot tell what it waits for"; strings.Contains(err.Error(), says) == known ||
			strings.Contains(err.Error(), "4711") != known {
			t.Errorf("known %v: %v", known, err)
		}
		if got := bound(t, b, igb); got[0] != "vfio-pci" {
			t.Errorf("while it is stuck: %q", got)
		}

		k.End(4711)
		close(let)
		<-returned
		b.Close()
		next := open(t, k, Options{})
		recovered, err := next.RecoverPatiently(context.Background())
		if err != nil || len(recovered) != 1 || recovered[0].Err != nil {
			t.Errorf("afterwards: %v, %v", recovered, err)
		}
		if got := bound(t, next, igb); got != [2]string{"igb", ""} {
			t.Errorf("afterwards: %q", got)
		}
	}
}

// If one of a unit cannot go, each of it has an error, and none was touched.
func TestMemberThatCannotGo(t *testing.T) {
	for name, fails := range map[string]func(op, name string) bool{
		"it cannot be written down": func(op, name string) bool {
			return op == "replace" && strings.HasSuffix(name, "change-"+edu+".json")
		},
		"what it had cannot be read": func(op, name string) bool {
			return op == "read" && strings.HasSuffix(name, "taken-"+edu+".json")
		},
	} {
		k, b := newKernel(t)
		unit := []*iommu.Device{read(t, b, e1000), read(t, b, edu)}
		k.FailAt(0, fails, unix.ENOSPC)
		results := b.DoUnasked(context.Background(), [][]*iommu.Device{unit}, Take(Auto))
		if !k.Revive() {
			t.Errorf("%s: nothing failed", name)
		}
		for _, r := range results {
			if r.Err == nil {
				t.Errorf("%s: %s has no error", name, r.Device)
			}
		}
		if keys, err := b.journal.Keys(""); len(k.Log) > 0 || len(keys) > 0 || err != nil {
			t.Errorf("%s: writes %q, records %q, %v", name, k.Log, keys, err)
		}
	}
}

// A driver that takes any device of some ids, as vfio-pci.ids= has it, takes it again when it is given back to the
// kernel's choice. That is told, and the device is as it was.
func TestGivenBackToVFIO(t *testing.T) {
	k := hosttest.NewLab(t, hosttest.Tree{"proc/cmdline": "quiet vfio-pci.ids=8086:10c9\n"})
	b := open(t, k, Options{})
	for _, w := range [][2]string{
		{overrideOf(read(t, b, igb).Address), "vfio-pci"}, {"sys/bus/pci/drivers/igb/unbind", igb}, {"sys/bus/pci/drivers_probe", igb},
		{overrideOf(read(t, b, igb).Address), "\n"},
	} {
		if err := k.Write(w[0], w[1]); err != nil {
			t.Fatal(err)
		}
	}
	k.IDs["vfio-pci"], k.IDs["igb"] = []string{"8086:10c9"}, nil
	d := read(t, b, igb)
	c, err := giveBack(b, d)
	if err == nil || !strings.Contains(err.Error(), "because vfio-pci.ids= in ") || bound(t, b, igb)[0] != "vfio-pci" {
		t.Errorf("%v, plan %+v", err, c)
	}
	if keys, err := b.journal.Keys(""); len(keys) > 0 || err != nil {
		t.Errorf("records %q, %v", keys, err)
	}
}

// A child that ended leaves no descriptor, whether it was told to end or died.
func TestWriterLeavesNoDescriptor(t *testing.T) {
	h, err := iommu.Open("")
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	open := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}

	c := child{host: h, locks: &locks{name: t.TempDir() + "/lock"}}
	if _, err := c.locks.open(); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Names("proc/self/ns"); err != nil { // what Go opens once for all
		t.Fatal(err)
	}

	w, err := c.get()
	if err != nil {
		t.Fatal(err)
	}

	before := open()
	for range 3 {
		p, err := os.FindProcess(w.process.PID)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = p.Release()
		<-w.ended
		if err := w.run(request{Device: iommu.Address{}}); err == nil || IsStuck(err) {
			t.Errorf("a child that died: %v", err)
		}
		if w, err = c.get(); err != nil {
			t.Fatal(err)
		}
	}

	if now := open(); now != before {
		t.Errorf("%d descriptors, before three children died %d", now, before)
	}

	c.close()
	<-w.ended
	if now := open(); now >= before {
		t.Errorf("%d descriptors without a child, with one %d", now, before)
	}
	if _, err := c.get(); err == nil {
		t.Error("a Handle that is closed has another child")
	}
}

// A captured host can be planned for, and is never changed, nor is the machine that this runs on.
func TestCapturedHost(t *testing.T) {
	h := &iommu.Host{Host: hosttest.Lab(t).Host(t)}
	b, err := Open(h, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	d := read(t, b, e1000)
	results, err := b.Move(context.Background(), Take(Auto), d.Address)
	if err != nil || len(results) != 2 || len(results[0].Steps) == 0 {
		t.Errorf("the plan is %+v, %v", results, err)
	}
	_, recovered := b.Recover(context.Background())
	for what, err := range map[string]error{
		"take":    b.DoUnasked(context.Background(), [][]*iommu.Device{{d}}, Take(Auto))[0].Err,
		"give":    b.DoUnasked(context.Background(), [][]*iommu.Device{{d}}, GiveBack())[0].Err,
		"recover": recovered,
		"lock":    b.Lock(context.Background(), []*iommu.Device{d}),
		"begin":   b.Begin("x", d, nil, nil),
		"write":   b.Write(d.Address, []Step{{Path: overrideOf(d.Address), Value: "x"}}),
		"load":    b.load(context.Background(), "vfio_pci"),
	} {
		if !errors.Is(err, iommu.ErrReadOnly) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if b.Changes() {
		t.Error("it says that it changes something")
	}
}

// A program that does not serve its writes, and would be started anew as its own child, cannot open the machine.
func TestWithoutServeWrites(t *testing.T) {
	h, err := iommu.Open("")
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	served.Store(false)
	b, err := Open(h, Options{})
	served.Store(true)
	if err == nil || b != nil || !strings.Contains(err.Error(), "bind.ServeWrites") {
		t.Errorf("%v, %v", b, err)
	}
	if b, err = Open(h, Options{}); err != nil {
		t.Fatal(err)
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
}

func TestDryRun(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	b := open(t, k, Options{DryRun: true})
	d := read(t, b, e1000)
	results, err := b.Move(context.Background(), Take(Auto), d.Address)
	if err != nil || len(results) != 2 || len(results[0].Steps) != 3 || len(k.Log) > 0 {
		t.Errorf("the plan is %+v, %v, writes %q", results, err, k.Log)
	}
	for what, err := range map[string]error{
		"do": b.DoUnasked(context.Background(), [][]*iommu.Device{{d}}, Take(Auto))[0].Err, "end": b.End(d.Address), "forget": b.Forget(nil),
	} {
		if !errors.Is(err, ErrDryRun) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if r := open(t, k, Options{}).DoUnasked(context.Background(), [][]*iommu.Device{{}}, Take(Auto)); len(r) > 0 {
		t.Errorf("of nothing came %+v", r)
	}
	if _, err := Open(&iommu.Host{}, Options{}); err == nil {
		t.Error("a Handle of no host")
	}
}

// What has to be locked first is refused without, and a Recoverer is told of.
func TestWithoutLock(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	b := open(t, k, others("count"))
	d := read(t, b, igb)
	for what, err := range map[string]error{
		"begin": b.Begin("count", d, nil, nil), "end": b.End(d.Address), "disown": disown(b, d), "settle": b.Settle(d), "write": b.Write(d.Address, []Step{{Path: overrideOf(d.Address), Value: "x"}}),
	} {
		if !errors.Is(err, ErrNotLocked) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := errors.Join(b.Lock(context.Background(), []*iommu.Device{d}), b.Begin("count", d, nil, 7)); err != nil {
		t.Fatal(err)
	}
	b.Close()

	other := open(t, k, Options{})
	recovered, err := other.Recover(context.Background())
	unknown, ok := errors.AsType[*UnknownChangeError](errors.Join(append([]error{err}, errorsOf(recovered)...)...))
	if !ok || unknown.Op != "count" || unknown.Device != d.Address {
		t.Errorf("a change of another package's: %v, %v", recovered, err)
	}
	if keys, _ := other.journal.Keys("change-"); len(keys) != 1 {
		t.Errorf("records %q", keys)
	}
	results, err := other.Move(context.Background(), Take(Auto), d.Address)
	if _, told := errors.AsType[*UnknownChangeError](err); !told || !errors.Is(err, holder.ErrRefused) {
		t.Errorf("taken in the middle of it: %+v, %v", results, err)
	}
	for what, err := range map[string]error{
		"do":    other.DoUnasked(context.Background(), [][]*iommu.Device{{d}}, Take(Auto))[0].Err,
		"begin": begin(t, open(t, k, others("mine")), d, "mine"),
	} {
		if !errors.Is(err, ErrInterrupted) {
			t.Errorf("%s over an interrupted change: %v", what, err)
		}
	}
	if keys, _ := other.journal.Keys("change-"); len(keys) != 1 || len(k.Log) > 0 {
		t.Errorf("records %q, wrote %q", keys, k.Log)
	}
}

func disown(b *Handle, d *iommu.Device) error {
	_, err := b.Disown(d)
	return err
}

// begin begins a change of a device as another process would that has its lock.
func begin(t *testing.T, b *Handle, d *iommu.Device, op string) error {
	t.Helper()
	b.locks.hold(d.Address)
	return b.Begin(op, d, nil, 1)
}

// What nobody could finish or undo is not begun.
func TestNoRecoverer(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	b := open(t, k, others("mine"))
	d := read(t, b, igb)
	if err := b.Lock(context.Background(), []*iommu.Device{d}); err != nil {
		t.Fatal(err)
	}
	for _, op := range []string{opTake, opGive, "another's"} {
		if err := b.Begin(op, d, nil, 1); err == nil {
			t.Errorf("%s was begun", op)
		}
	}
	if err := b.Begin("mine", d, nil, 1); err != nil {
		t.Error(err)
	}
	for _, s := range []Step{{}, {Module: "igb"}} {
		if err := b.Write(d.Address, []Step{s}); err == nil {
			t.Errorf("%+v was written", s)
		}
	}
	if err := b.End(d.Address); err != nil {
		t.Error(err)
	}
	if err := b.End(d.Address); !errors.Is(err, ErrNotBegun) {
		t.Errorf("ended twice: %v", err)
	}
}

// What is no driver for guests takes no device.
func TestTakeWithWhat(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	b := open(t, k, Options{})
	for _, driver := range []string{"", "e1000", "../devices", "vfio/../e1000"} {
		if _, err := b.Move(context.Background(), Take(driver), read(t, b, edu).Address); err == nil || len(k.Log) > 0 {
			t.Errorf("%q: %v, wrote %q", driver, err, k.Log)
		}
	}
}

func errorsOf(all []Recovered) []error {
	var out []error
	for _, r := range all {
		out = append(out, r.Err)
	}
	return out
}

// TryLock has what nobody has, also while others ask for it, or for the device next door, all the time.
func TestTryLock(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	a, b := open(t, k, Options{}), open(t, k, Options{})
	one, two := read(t, a, igb).Address, read(t, a, e1000).Address
	if ok, err := b.TryLock(one); !ok || err != nil {
		t.Fatal(ok, err)
	}

	done := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 { // who is refused looks at the lock all the same
		other := open(t, k, Options{})
		wg.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				if ok, err := other.TryLock(one); ok || err != nil {
					t.Errorf("another's lock: %v, %v", ok, err)
					return
				}
			}
		})
	}

	for range 300 {
		if ok, err := a.TryLock(two); !ok || err != nil {
			t.Fatalf("a lock that nobody has: %v, %v", ok, err)
		}
		if !a.Holds(two) || a.Holds(one) {
			t.Fatal("who has which is not known")
		}
		a.Close()
		a = open(t, k, Options{})
	}

	close(done)
	wg.Wait()
}

// Nothing that could not be looked at is taken for nothing: each call tells that it failed.
func TestLooksThatFail(t *testing.T) {
	failing := func(k *hosttest.Kernel, op, name string) {
		k.SetFault(func(o, n string) error {
			if o == op && strings.Contains(n, name) {
				return unix.EIO
			}
			return nil
		})
	}

	for what, c := range map[string]struct {
		op, name string
		call     func(b *Handle) error
	}{
		"scan":     {"readdir", "sys/bus/pci/devices", func(b *Handle) error { _, err := b.Scan(); return err }},
		"topology": {"readdir", "sys/bus/pci/devices", func(b *Handle) error { _, err := b.Topology(); return err }},
		"records":  {"readdir", "run/viaduct", func(b *Handle) error { _, err := b.Recover(context.Background()); return err }},
		"what it had": {"read", "taken-", func(b *Handle) error {
			_, err := b.Plan(&iommu.Device{Name: igb, Address: iommu.Address{Bus: 1}, PCI: true, Driver: "vfio-pci", VFIO: true}, GiveBack())
			return err
		}},
		"what was taken": {"read", "taken-", func(b *Handle) error {
			_, err := b.Taken(&iommu.Device{Name: igb, Address: iommu.Address{Bus: 1}, PCI: true})
			return err
		}},
		"modules": {"read", "modules.alias", func(b *Handle) error {
			_, err := b.Plan(&iommu.Device{Name: igb, Address: iommu.Address{Bus: 1}, PCI: true, Driver: "igb"}, Take(Auto))
			return err
		}},
		"users": {"readdir", "proc", func(b *Handle) error {
			_, err := b.Move(context.Background(), Take(Auto), iommu.Address{Bus: 1})
			return err
		}},
		"nodes": {"readdir", "vfio-dev", func(b *Handle) error {
			_, err := b.Move(context.Background(), Take(Auto), iommu.Address{Bus: 1})
			return err
		}},
		"the driver after it": {"readlink", igb + "/driver", func(b *Handle) error {
			return (&Change{Device: iommu.Address{Bus: 1}, To: "igb"}).check(b.host)
		}},
		"the override after it": {"read", igb + "/driver_override", func(b *Handle) error {
			return (&Change{Device: iommu.Address{Bus: 1}, To: "igb"}).check(b.host)
		}},
	} {
		k, b := newKernel(t)
		failing(k, c.op, c.name)
		if err := c.call(b); !errors.Is(err, unix.EIO) {
			t.Errorf("%s: %v", what, err)
		}
		k.Revive()
		if got := bound(t, b, igb); got != [2]string{"igb", ""} {
			t.Errorf("%s: left %q", what, got)
		}
	}
}

// What cannot be written down is not done, and what cannot be struck out stays for the next command.
func TestRecordsThatFail(t *testing.T) {
	for what, c := range map[string]struct{ op, name string }{
		"change": {"replace", "change-"}, "taken": {"replace", "taken-"}, "end": {"remove", "change-"},
	} {
		k, b := newKernel(t)
		k.FailAt(0, func(op, name string) bool { return op == c.op && strings.Contains(name, c.name) }, unix.ENOSPC)
		_, err := b.Move(context.Background(), Take(Auto), read(t, b, igb).Address)
		if !k.Revive() || !errors.Is(err, unix.ENOSPC) {
			t.Errorf("%s: %v", what, err)
		}
		keys, _ := b.journal.Keys("")
		if taken := bound(t, b, igb)[0] == "vfio-pci"; taken != (what == "end") || taken != (len(keys) > 0) {
			t.Errorf("%s: taken %v, records %q", what, taken, keys)
		}
		b.Close()
		next := open(t, k, Options{})
		if _, err := next.Move(context.Background(), GiveBack(), read(t, next, igb).Address); err != nil || bound(t, next, igb) != [2]string{"igb", ""} {
			t.Errorf("%s: given back: %v, %q", what, err, bound(t, next, igb))
		}
		if keys, _ := next.journal.Keys(""); len(keys) > 0 {
			t.Errorf("%s: records %q are left", what, keys)
		}
	}
}

// A plan, and a check, of which a part cannot be looked at fails, or is the same.
func TestPlansThatFail(t *testing.T) {
	k := hosttest.NewSmallLab(t, "0000:00:05.0", igb, "0000:00:08.0", e1000, edu)
	b := open(t, k, Options{})
	if _, err := b.Move(context.Background(), Take(Auto), read(t, b, igb).Address); err != nil {
		t.Fatal(err)
	}

	taken, free := read(t, b, igb), read(t, b, e1000)
	look := func(do func(b *Handle) (any, error)) func() (any, error) {
		return func() (any, error) {
			b, err := Open(&iommu.Host{Host: k.Host()}, Options{})
			if err != nil {
				return nil, err
			}
			defer b.Close()
			return do(b)
		}
	}

	for what, do := range map[string]func() (any, error){
		"take":  look(func(b *Handle) (any, error) { return b.Plan(free, Take(Auto)) }),
		"give":  look(func(b *Handle) (any, error) { return b.Plan(taken, GiveBack()) }),
		"home":  look(func(b *Handle) (any, error) { return b.Plan(taken, Home()) }),
		"taken": look(func(b *Handle) (any, error) { return b.Taken(taken) }),
		"check": look(func(b *Handle) (any, error) {
			v, err := b.Check([][]*iommu.Device{{free}}, []*iommu.Device{free}, Take(Auto), nil)
			return len(v), errors.Join(err, Refusals(v))
		}),
		"check of what goes back": look(func(b *Handle) (any, error) {
			v, err := b.Check([][]*iommu.Device{{taken}}, []*iommu.Device{taken}, GiveBack(), nil)
			return len(v), errors.Join(err, Refusals(v))
		}),
		"refresh": look(func(b *Handle) (any, error) { d := *taken; err := b.Refresh([]*iommu.Device{&d}); return d, err }),
	} {
		hosttest.EachFailure(t, k, what, do)
	}
}

// A recovery whose own write waits keeps the lock and is told of by the next one, and does not begin a second write.
func TestStuckRecovery(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	first := open(t, k, Options{})
	a := read(t, first, igb).Address
	if _, err := first.Move(context.Background(), Take(Auto), a); err != nil {
		t.Fatal(err)
	}
	k.KillAt(1, isWrite) // the override is written, and the unbind is not
	_, _ = first.Move(context.Background(), GiveBack(), a)
	first.Close()
	if !k.Revive() {
		t.Fatal("it was not killed")
	}

	let, returned := make(chan struct{}), make(chan struct{})
	var begun atomic.Int64
	k.Before = func(name, _ string) {
		if strings.HasSuffix(name, "vfio-pci/unbind") {
			begun.Add(1)
			<-let
		}
	}
	k.After = func(name, _ string) {
		if strings.HasSuffix(name, "vfio-pci/unbind") {
			close(returned)
		}
	}
	b := open(t, k, Options{Timeout: 100 * time.Millisecond})
	for range 2 {
		recovered, err := b.Recover(context.Background())
		if err != nil || len(recovered) != 1 || !IsStuck(recovered[0].Err) {
			t.Fatalf("%v, %v", recovered, err)
		}
	}
	other := open(t, k, Options{Timeout: 100 * time.Millisecond})
	if ok, err := other.TryLock(a); ok || err != nil {
		t.Errorf("another has its lock: %v, %v", ok, err)
	}
	if n := begun.Load(); n != 1 {
		t.Errorf("%d unbinds wait", n)
	}
	close(let)
	<-returned
	b.Close()
	next := open(t, k, Options{})
	if _, err := next.RecoverPatiently(context.Background()); err != nil || bound(t, next, igb) != [2]string{"igb", ""} {
		t.Errorf("afterwards: %v, %q", err, bound(t, next, igb))
	}
}

// What is prepared is locked, and is as it is then: what another has done since it was looked at is seen.
func TestPrepare(t *testing.T) {
	k, b := newKernel(t)
	topology, err := b.Topology()
	if err != nil {
		t.Fatal(err)
	}
	d, err := topology.Find(read(t, b, igb).Address)
	if err != nil {
		t.Fatal(err)
	}
	other := open(t, k, Options{})
	if _, err := other.Move(context.Background(), Take(Auto), d.Address); err != nil {
		t.Fatal(err)
	}
	other.Close()

	j, err := b.Prepare(context.Background(), Request{Devices: []*iommu.Device{d}, Goal: Take(Auto)})
	if err != nil || j.Refused() != nil {
		t.Fatal(err, j.Refused())
	}
	if p := j.Plan(); len(p) != 1 || p[0].Err != nil || len(p[0].Steps) > 0 || d.Driver != "vfio-pci" {
		t.Errorf("what was taken meanwhile is on %s, and the plan %+v", d.Driver, p)
	}
	third := open(t, k, Options{})
	if ok, err := third.TryLock(d.Address); ok || err != nil {
		t.Errorf("another has its lock: %v, %v", ok, err)
	}
	b.Close()
	if ok, err := third.TryLock(d.Address); !ok || err != nil {
		t.Errorf("when it is over nobody has its lock: %v, %v", ok, err)
	}
}

// What an interrupted run left of a device is undone before anything else is done with it.
func TestPrepareRecovers(t *testing.T) {
	k, b := newKernel(t)
	other := open(t, k, Options{})
	k.KillAt(2, isWrite) // it is unbound, and not probed
	_, _ = take(context.Background(), other, read(t, other, igb))
	other.Close()
	if !k.Revive() {
		t.Fatal("it was not killed")
	}

	d := read(t, b, igb)
	j, err := b.Prepare(context.Background(), Request{Devices: []*iommu.Device{d}, Goal: Take(Auto)})
	if err != nil || len(j.Recovered) != 1 || j.Recovered[0].Err != nil || bound(t, b, igb) != [2]string{"igb", ""} {
		t.Errorf("%+v, %v, %q", j, err, bound(t, b, igb))
	}
}

// What a call is about has to be there, and to be a device whose driver can be changed.
func TestCallsAboutNothing(t *testing.T) {
	k, b := newKernel(t)
	ctx, gone := t.Context(), iommu.Address{Bus: 0xfe}
	lost := &iommu.Device{Name: "0000:fe:00.0", Address: gone, PCI: true, Group: new(4711)}
	other := &iommu.Device{Name: "plat.0"}
	if _, err := b.Move(ctx, Take(Auto), gone); !errors.Is(err, iommu.ErrNotFound) {
		t.Errorf("move what is not there: %v", err)
	}
	if j, err := b.Prepare(ctx, Request{Devices: []*iommu.Device{lost}, Goal: Take(Auto)}); err == nil {
		t.Errorf("prepare what is in no group: %+v", j)
	}
	for _, goal := range []Goal{Take(Auto), GiveBack(), Home()} {
		if c, err := b.Plan(other, goal); err == nil || len(c.Steps) > 0 {
			t.Errorf("plan what is no PCI device: %+v, %v", c, err)
		}
	}
	dry := open(t, k, Options{DryRun: true})
	if had, err := dry.TryLock(read(t, dry, igb).Address); had || !errors.Is(err, ErrDryRun) {
		t.Errorf("a lock on a dry run: %v, %v", had, err)
	}
	if keys, _ := b.journal.Keys(""); len(keys) > 0 || len(k.Log) > 0 {
		t.Errorf("records %q, writes %q", keys, k.Log)
	}
}

// A Job is run once: what it asked for may be another thing afterwards.
func TestJobRunsOnce(t *testing.T) {
	k, b := newKernel(t)
	d := read(t, b, igb)
	j, err := b.Prepare(context.Background(), Request{Devices: []*iommu.Device{d}, Goal: Take(Auto)})
	if err != nil || j.Refused() != nil {
		t.Fatal(err, j.Refused())
	}
	if r := j.Run(context.Background()); len(r) != 1 || r[0].Err != nil {
		t.Errorf("%+v", r)
	}
	k.Log = nil
	if r := j.Run(context.Background()); len(r) != 1 || !errors.Is(r[0].Err, ErrRan) || len(k.Log) > 0 || bound(t, b, igb)[0] != "vfio-pci" {
		t.Errorf("again: %+v, writes %q", r, k.Log)
	}
}

// What is no PCI device is never written to, whichever way its group goes.
func TestNoPCIDevice(t *testing.T) {
	k, b := newKernel(t)
	other := &iommu.Device{Name: "plat.0"}
	for _, goal := range []Goal{Take(Auto), GiveBack(), Home()} {
		results := b.DoUnasked(context.Background(), [][]*iommu.Device{{read(t, b, e1000), other}}, goal)
		for _, r := range results {
			if goal.takes() && (r.Err == nil || !strings.Contains(r.Err.Error(), "plat.0")) {
				t.Errorf("%+v", r)
			}
		}
	}
	for _, w := range k.Log {
		if strings.Contains(w, "plat") || strings.Contains(w, "0000:00:00.0") {
			t.Errorf("written: %s", w)
		}
	}
	if keys, _ := b.journal.Keys(""); len(keys) > 0 {
		t.Errorf("records %q", keys)
	}
}

// Who was killed is there for a moment yet: viaduct recover waits for that, and does the rest.
func TestKilledJustNow(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	k.Process(4711, "viaduct")
	h := &iommu.Host{Host: k.Host()}
	b := open(t, k, Options{})
	a := read(t, b, igb).Address
	killed := changeRecord{
		Op: opTake, Unit: []iommu.Address{a}, Change: from(read(t, b, igb)), Command: holder.NameProcess(h, 4711),
	}
	if err := b.journal.Put(changeKey(a), killed); err != nil {
		t.Fatal(err)
	}
	lock, err := filelock.Open(b.locks.name)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if ok, err := lock.Try(offset(a)); !ok || err != nil {
		t.Fatal(ok, err)
	}

	all, err := b.Recover(context.Background())
	if err != nil || len(all) > 0 {
		t.Fatalf("while it runs: %v, %v", all, err)
	}
	looked := make(chan bool, 100)
	k.SetFault(func(_, name string) error {
		if strings.HasPrefix(name, "proc/4711/task") {
			looked <- true
		}
		return nil
	})
	freed := make(chan bool)
	go func() {
		<-looked
		lock.Free(offset(a))
		close(freed)
	}()
	all, err = b.RecoverPatiently(context.Background())
	<-freed
	if err != nil || len(all) != 1 || all[0].Err != nil {
		t.Errorf("when it has gone: %v, %v", all, err)
	}
}
