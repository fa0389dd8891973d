package bind

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/internal/host"
	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
	"viaduct/vfio/holder"
)

func TestParseNodeOwner(t *testing.T) {
	for text, want := range map[string]*NodeOwner{
		"root": {"root", 0, -1}, "0": {"0", 0, -1}, ":0": {":0", -1, 0}, "root:root": {"root:root", 0, 0},
		"root:": {"root:", 0, -1},
		"":      nil, ":": nil, "nobody-of-this-name": nil, "root:no-such-group": nil, "4294967299": nil,
		"4294967295": nil, "-1": nil, "0x1": nil, "64055": {"64055", 64055, -1},
		"64055:64056": {"64055:64056", 64055, 64056},
	} {
		got, err := ParseNodeOwner(text)
		if (err == nil) != (want != nil) || want != nil && *got != *want {
			t.Errorf("%q: %+v, %v", text, got, err)
		}
	}
}

// The nodes of what is taken for somebody are his, in /dev and in udev's rules, and nobody's when it is given back.
func TestNodeOwner(t *testing.T) {
	k := hosttest.NewLab(t, hosttest.Tree{"run/udev/data/": ""})
	b := open(t, k, Options{})
	o := &NodeOwner{"tester:kvm", 1000, 36}
	a := read(t, b, igb).Address
	if _, err := b.Move(context.Background(), Take(Auto).OwnedBy(o), a); err != nil {
		t.Fatal(err)
	}
	for _, node := range []string{"devices/vfio0", "vfio/" + groupOf(t, b, igb)} {
		if got := k.Owners[node]; got != (host.Owner{UID: 1000, GID: 36, Mode: 0o660}) {
			t.Errorf("node %s belongs to %+v: %v", node, got, k.Owners)
		}
	}
	d := read(t, b, igb)
	if !o.Keeps(b.Host(), d) || (&NodeOwner{"", 1000, -1}).Keeps(b.Host(), d) {
		t.Error("whom udev keeps it for is not known")
	}
	rule, err := b.Host().String(o.ruleFile(a))
	if err != nil || !strings.Contains(rule,
		`KERNELS=="0000:01:00.0", TEST=="/`+o.ruleFile(a)+`", MODE="0660", OWNER="1000", GROUP="36"`) {
		t.Errorf("rule %q, %v", rule, err)
	}

	// Taken again for somebody else, it is his; and for nobody, it stays.
	other := &NodeOwner{"x", 1001, -1}
	if _, err := b.Move(context.Background(), Take(Auto).OwnedBy(other), a); err != nil ||
		k.Owners["devices/vfio0"].UID != 1001 ||
		k.Owners["devices/vfio0"].Mode != 0o600 {
		t.Errorf("%v, %v", k.Owners, err)
	}
	if _, err := b.Move(context.Background(), Take(Auto), a); err != nil || !other.Keeps(b.Host(), d) {
		t.Errorf("taken again: %v", err)
	}
	if b.Host().Exists(o.ruleFile(a)) {
		t.Error("the rule of the owner before is left")
	}
	node := k.Owners["devices/vfio0"]
	node.ACL = true
	k.Owners["devices/vfio0"] = node
	shared, err := b.Disown(d)
	if err != nil || !shared || k.Owners["devices/vfio0"] != (host.Owner{Mode: 0o600}) || hasRules(b, a) {
		t.Errorf("%v, %v", k.Owners, err)
	}
	if shared, err := b.Disown(d); err != nil || shared {
		t.Errorf("taken from its owner twice: %v, %v", shared, err)
	}
	if err := b.Settle(d); err != nil || !slices.Contains(k.Log,
		"sys/class/vfio/"+groupOf(t, b, igb)+"/uevent=change") {
		t.Errorf("udev is not asked to look again: %v, %q", err, k.Log)
	}
	if _, err := b.Move(context.Background(), Take(Auto).OwnedBy(o), a); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Move(context.Background(), GiveBack(), a); err != nil || hasRules(b, a) {
		t.Errorf("given back, the rule is left: %v", err)
	}
}

// hasRules reports whether udev has rules for a device's nodes.
func hasRules(b *Handle, a iommu.Address) bool {
	names, _ := b.Host().Names(rules)
	return slices.ContainsFunc(names, func(n string) bool { return strings.HasPrefix(n, rulePrefix(a)) })
}

func groupOf(t *testing.T, b *Handle, address string) string {
	t.Helper()
	link, err := b.Host().LinkBase("sys/bus/pci/devices/" + address + "/iommu_group")
	if err != nil {
		t.Fatal(err)
	}
	return link
}

// A node that comes late is waited for; one that does not come undoes the take.
func TestLateNode(t *testing.T) {
	for _, comes := range []bool{true, false} {
		k := hosttest.NewLab(t, nil)
		patience := 300 * time.Millisecond
		if comes {
			patience = DefaultTimeout
		}

		b := open(t, k, Options{Timeout: patience})
		node := filepath.Join(k.Dir(), "dev/vfio", groupOf(t, b, igb))
		made := make(chan bool, 1)
		k.After = func(name, _ string) {
			if !strings.HasSuffix(name, "drivers_probe") {
				return
			}
			if err := os.Remove(node); err == nil && comes {
				go func() {
					_ = os.WriteFile(node+".new", []byte("c 244:1\n"), 0o600)
					made <- os.Rename(node+".new", node) == nil
				}()
			}
		}

		_, err := b.Move(context.Background(), Take(Auto), read(t, b, igb).Address)
		if (err == nil) != comes || err != nil && !strings.Contains(err.Error(), "did not appear") {
			t.Errorf("comes %v: %v", comes, err)
		}

		if comes {
			<-made
		} else if got := bound(t, b, igb); got != [2]string{"igb", ""} {
			t.Errorf("without its node it is %q", got)
		}
	}
}

// What the kernel says of a device is told with the error of its change.
func TestKernelLog(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	log := filepath.Join(k.Dir(), "dev/kmsg")
	err := os.MkdirAll(filepath.Dir(log), 0o755)
	if err == nil {
		err = os.WriteFile(log, []byte("6,1,1,-;vfio-pci "+igb+": before\n"), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	k.Probe["vfio-pci"] = unix.EINVAL
	k.After = func(name, _ string) {
		if strings.HasSuffix(name, "drivers_probe") {
			f, err := os.OpenFile(log, os.O_APPEND|os.O_WRONLY, 0)
			if err == nil {
				_, err = f.WriteString("6,2,2,-;vfio-pci " + igb + ": no way\n SUBSYSTEM=pci\n")
				err = errors.Join(err, f.Close())
			}
			if err != nil {
				t.Error(err)
			}
		}
	}
	b := open(t, k, Options{})
	_, err = b.Move(context.Background(), Take(Auto), read(t, b, igb).Address)
	if err == nil || !strings.Contains(err.Error(), "the kernel says: vfio-pci "+igb+": no way") ||
		strings.Contains(err.Error(), "before") {
		t.Error(err)
	}
}

// A child that still writes for a command that was killed has its device, which is told with whom it waits for.
func TestStillStuck(t *testing.T) {
	k := hosttest.NewLab(t, hosttest.Tree{"dev/vfio/devices/vfio0": "c 511:0\n"})
	k.Process(4711, "qemu", "/dev/vfio/devices/vfio0")
	first := open(t, k, others("x"))
	d := read(t, first, igb)
	if err := errors.Join(first.Lock(context.Background(), []*iommu.Device{d}),
		first.Begin("x", d, nil, 1)); err != nil {
		t.Fatal(err)
	}
	r, _, err := first.change(d.Address)
	if err != nil {
		t.Fatal(err)
	}
	r.Command, r.Stuck, r.Change = holder.Proc{PID: 1 << 30, Start: 1}, "echo x > y",
		Change{Device: d.Address, ID: d.ID}
	r.Nodes = []holder.Node{{Number: 511 << 32}}
	if err := first.journal.Put(changeKey(d.Address), r); err != nil {
		t.Fatal(err)
	}

	other := open(t, k, Options{Timeout: time.Second})
	recovered, err := other.Recover(context.Background())
	if err != nil || len(recovered) != 1 || !IsStuck(recovered[0].Err) ||
		!strings.Contains(recovered[0].Err.Error(), "echo x > y") ||
		!strings.Contains(recovered[0].Err.Error(), "open in process 4711") {
		t.Fatalf("%v, %v", recovered, err)
	}
	if len(other.Stuck()) != 1 {
		t.Errorf("stuck are %v", other.Stuck())
	}
	_, err = other.Move(context.Background(), Take(Auto), d.Address)
	if err == nil {
		t.Error("it was taken meanwhile")
	}

	// While its command lives, it is that one's matter.
	r.Command = first.child.self
	if err := first.journal.Put(changeKey(d.Address), r); err != nil {
		t.Fatal(err)
	}
	if recovered, err = other.Recover(context.Background()); err != nil || len(recovered) > 0 {
		t.Errorf("of a command that lives: %v, %v", recovered, err)
	}
}

// Which driver a device gets: by name, by the modules that are for it, with what has to be loaded first.
func TestDrivers(t *testing.T) {
	const release = "6.12.107-lab"
	aliases := "lib/modules/" + release + "/modules.alias"
	k := hosttest.NewKernel(t, hosttest.Lab(t).With(hosttest.Tree{
		"proc/sys/kernel/osrelease": release + "\n",
		aliases: "alias pci:v00008086d000010C9sv*sd*bc*sc*i* igb\nalias vfio_pci:v00008086d000010C9sv*sd*bc*sc*i* igb_vfio_pci\n" +
			"alias vfio_pci:v*d*sv*sd*bc*sc*i* vfio_pci\n",
	}))
	k.Modules = map[string]string{"igb_vfio_pci": "igb-vfio-pci", "vfio_pci": "vfio-pci", "igb": "igb"}
	b := open(t, k, Options{})
	c, err := b.Plan(read(t, b, igb), Take(Auto))
	if err != nil || c.Module != "igb_vfio_pci" {
		t.Fatalf("%+v, %v", c, err)
	}
	if _, err := b.Move(context.Background(), Take(Auto), read(t, b, igb).Address); err != nil ||
		bound(t, b, igb)[0] != "igb-vfio-pci" {
		t.Errorf("the variant driver: %v, on %q", err, bound(t, b, igb))
	}
	if _, err := b.Move(context.Background(), Take("vfio-pci"), read(t, b, igb).Address); err != nil ||
		bound(t, b, igb)[0] != "vfio-pci" {
		t.Errorf("by its name: %v, on %q", err, bound(t, b, igb))
	}
	if _, err := b.Move(context.Background(), GiveBack(), read(t, b, igb).Address); err != nil ||
		bound(t, b, igb) != [2]string{"igb", ""} {
		t.Errorf("given back: %v, on %q", err, bound(t, b, igb))
	}

	// A variant that does not load leaves the generic driver.
	delete(k.Modules, "igb_vfio_pci")
	k2 := hosttest.NewKernel(t, hosttest.Lab(t).With(hosttest.Tree{
		"proc/sys/kernel/osrelease": release + "\n",
		aliases:                     "alias vfio_pci:v00008086d000010C9sv*sd*bc*sc*i* igb_vfio_pci\n",
	}))
	k2.Modules = map[string]string{"vfio_pci": "vfio-pci"}
	b2 := open(t, k2, Options{})
	if _, err := b2.Move(context.Background(), Take(Auto), read(t, b2, igb).Address); err != nil ||
		bound(t, b2, igb)[0] != "vfio-pci" {
		t.Errorf("without its variant: %v, on %q", err, bound(t, b2, igb))
	}
	if _, err := b2.Move(context.Background(), Take("no-such-vfio"), read(t, b2, e1000).Address); err == nil ||
		!strings.Contains(err.Error(), "no_such_vfio") || bound(t, b2, e1000)[0] != "e1000" {
		t.Errorf("a driver that is not there: %v, on %q", err, bound(t, b2, e1000))
	}
}

// A module that hangs as it is loaded is given up, and the device left as it was.
func TestModuleThatHangs(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	k.Hang = map[string]bool{"other_vfio": true}
	b := open(t, k, Options{Timeout: 50 * time.Millisecond})
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	_, err := b.Move(ctx, Take("other-vfio"), read(t, b, igb).Address)
	if !errors.Is(err, context.DeadlineExceeded) || ctx.Err() != nil || bound(t, b, igb) != [2]string{"igb", ""} {
		t.Errorf("%v, the command's own time is over: %v, %q", err, ctx.Err(), bound(t, b, igb))
	}
}

// A device that nothing is written down of goes to the driver that the host would use.
func TestHome(t *testing.T) {
	k, b := newKernel(t)
	aliases := filepath.Join(k.Dir(), "lib/modules/6.12.0/modules.alias")
	if err := errors.Join(os.MkdirAll(filepath.Dir(aliases), 0o755),
		os.WriteFile(aliases, []byte("alias pci:v00008086d000010C9sv*sd*bc*sc*i* igb\n"), 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, w := range [][2]string{{overrideOf(read(t, b, igb).Address), "none"},
		{"sys/bus/pci/drivers/igb/unbind", igb}} {
		if err := k.Write(w[0], w[1]); err != nil {
			t.Fatal(err)
		}
	}
	a := read(t, b, igb).Address
	if r, err := b.Move(context.Background(), GiveBack(), a); err != nil || len(r[0].Steps) > 0 ||
		bound(t, b, igb) != [2]string{"", "none"} {
		t.Errorf("kept without a driver on purpose: %+v, %v", r, err)
	}
	if _, err := b.Move(context.Background(), Home(), a); err != nil || bound(t, b, igb) != [2]string{"igb", ""} {
		t.Errorf("for the host: %v, %q", err, bound(t, b, igb))
	}
	if r, err := b.Move(context.Background(), Home(), a); err != nil || len(r[0].Steps) > 0 {
		t.Errorf("again: %+v, %v", r, err)
	}
	if r, err := b.Move(context.Background(), Take(None), a); err != nil || bound(t, b, igb) != [2]string{"", "none"} {
		t.Errorf("to no driver: %+v, %v, %q", r, err, bound(t, b, igb))
	}
	id, err := b.Taken(read(t, b, igb))
	if err != nil || len(id.MACs) != 1 {
		t.Errorf("what was written down: %+v, %v", id, err)
	}
}

// A device whose driver makes its interface late is waited for; who is interrupted, or has waited for long enough, is told so.
func TestAwaitHome(t *testing.T) {
	for what, says := range map[string]string{"late": "", "never": "has not made a network interface",
		"interrupted": "did not wait for"} {
		k := hosttest.NewLab(t, nil)
		patience := DefaultTimeout
		if what == "never" {
			patience = time.Second
		}

		b := open(t, k, Options{Timeout: patience})
		a := read(t, b, igb).Address
		if _, err := b.Move(context.Background(), Take(Auto), a); err != nil {
			t.Fatal(err)
		}

		ctx, cancel := context.WithCancel(context.Background())
		link, away := filepath.Join(k.Dir(), "sys/class/net/enp1s0"), filepath.Join(k.Dir(), "enp1s0")
		made := make(chan error, 1)
		k.After = func(name, value string) {
			if !strings.HasSuffix(name, "drivers_probe") {
				return
			}
			err := os.Rename(link, away)
			switch what {
			case "late":
				go func() { made <- errors.Join(err, os.Rename(away, link)) }()
			case "interrupted":
				cancel()
			}
		}

		_, err := b.Move(ctx, GiveBack(), a)
		if (err == nil) != (says == "") || err != nil && !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", what, err)
		}

		if what == "late" {
			if err := <-made; err != nil {
				t.Error(err)
			}
		}

		if got := bound(t, b, igb); got != [2]string{"igb", ""} {
			t.Errorf("%s: %q", what, got)
		}

		cancel()
	}
}
