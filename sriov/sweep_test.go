package sriov

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// A sweep lets each operation of a command fail in turn, or the command be killed at it, and holds what is reported
// against what is. A test run takes a sample of them; with VIADUCT_SWEEP=all it takes all.

const (
	e1000 = "0000:07:01.0" // shares its group with a device without a driver
	edu   = "0000:07:02.0"
)

// small is the lab's host with only the devices of the commands, and the bridges that these are behind.
func small(t *testing.T) *hosttest.Kernel {
	t.Helper()
	return hosttest.NewSmallLab(t, "0000:00:05.0", pf, "0000:00:08.0", e1000, edu)
}

// command is what a sweep runs: a state of the host before it, and what it is to be afterwards.
type command struct {
	name  string
	host  func(t *testing.T) *hosttest.Kernel // nil: small
	setup func(t *testing.T, k *hosttest.Kernel)
	run   func(ctx context.Context, s *Handle) error
	// used makes somebody use what the command changes, so that it must refuse; nil if nothing refuses it.
	used func(t *testing.T, k *hosttest.Kernel)
	// lossy says that a failure may leave no VFs, where the error says so.
	lossy bool
}

func parse(address string) iommu.Address {
	a, _ := iommu.ParseAddress(address)
	return a
}

// move brings a device where it is to go.
func move(ctx context.Context, s *Handle, address string, g bind.Goal) error {
	_, err := s.Move(ctx, g, parse(address))
	return err
}

// quiet runs a command that must succeed.
func quiet(t *testing.T, k *hosttest.Kernel, run func(context.Context, *Handle) error) {
	t.Helper()
	s := open(t, k)
	defer s.Close()
	if err := run(context.Background(), s); err != nil {
		t.Fatal(err)
	}
}

func makeVFs(wish Wish) func(context.Context, *Handle) error {
	return func(ctx context.Context, s *Handle) error {
		_, err := s.Make(ctx, parse(pf), wish)
		return err
	}
}

var wished = Wish{VFs: []VFWish{
	{UseVFIO, Settings{MAC: "52:54:00:aa:00:01", VLAN: "100", Trust: on}}, {Use: UseHome}, {Use: UseNone},
}}

// usesNode has a process have the VFIO node of a device open.
func usesNode(t *testing.T, k *hosttest.Kernel, address string) {
	t.Helper()
	entries, err := os.ReadDir(k.Dir() + "/sys/bus/pci/devices/" + address + "/vfio-dev")
	if err != nil || len(entries) == 0 {
		t.Fatal(entries, err)
	}
	k.Process(4711, "qemu", "/dev/vfio/devices/"+entries[0].Name())
}

// everything is all that a wish can have.
var everything = Wish{
	VFs: []VFWish{
		{UseVFIO, Settings{MAC: StableMAC, VLAN: "100", MSIX: "2", Trust: on, LinkState: "enable"}}, {Use: UseNone},
	},
	Eswitch: Eswitch{Mode: switchdev}, Offload: on, MTU: 9000,
}

// switching is small, where the PF is down, and has an e-switch, interrupt vectors to share and a NIC that offloads.
func switching(t *testing.T) *hosttest.Kernel {
	k := small(t)
	k.Net.Eswitch = map[string][3]int{pf: {}}
	k.OnIoctl = (&nic{}).ioctl
	for name, text := range map[string]string{
		pfDir + "/sriov_vf_total_msix": "10\n", pfDir + "/net/enp1s0/flags": "0x1002\n",
	} {
		if err := os.WriteFile(k.Dir()+"/"+name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return k
}

// sharing is a host with an NVMe PF, which shares queues and interrupts out.
func sharing(t *testing.T) *hosttest.Kernel {
	k := hosttest.NewSmallLab(t, "0000:00:0a.0", nvmePFAddress, "0000:00:05.0", pf)
	if err := errors.Join(os.MkdirAll(k.Dir()+"/dev", 0o755),
		os.WriteFile(k.Dir()+"/dev/nvme0", []byte("c 250:0\n"), 0o600)); err != nil {
		t.Fatal(err)
	}
	k.OnIoctl = (&controller{q: pool{400, 2, 16, 1}, v: pool{200, 1, 16, 1}, all: controllers(130, 0, 0)}).ioctl
	return k
}

var commands = []command{
	{
		name: "bind",
		run:  func(ctx context.Context, s *Handle) error { return move(ctx, s, e1000, bind.Take(bind.Auto)) },
		used: func(t *testing.T, k *hosttest.Kernel) {
			k.Net.Routes = []hosttest.Route{{To: "default", Over: []string{nicOf(t, k, e1000)}}}
		},
	},
	{
		name: "unbind",
		setup: func(t *testing.T, k *hosttest.Kernel) {
			quiet(t, k, func(ctx context.Context, s *Handle) error { return move(ctx, s, pf, bind.Take(bind.Auto)) })
		},
		run:  func(ctx context.Context, s *Handle) error { return move(ctx, s, pf, bind.GiveBack()) },
		used: func(t *testing.T, k *hosttest.Kernel) { usesNode(t, k, pf) },
	},
	{name: "vf create", run: makeVFs(wished)},
	{
		name:  "vf create again",
		setup: func(t *testing.T, k *hosttest.Kernel) { quiet(t, k, makeVFs(alike(2, UseVFIO))) },
		run:   makeVFs(wished), lossy: true,
		used: func(t *testing.T, k *hosttest.Kernel) { usesNode(t, k, "0000:01:10.2") },
	},
	{
		name:  "vf set",
		setup: func(t *testing.T, k *hosttest.Kernel) { quiet(t, k, makeVFs(wished)) },
		run: func(ctx context.Context, s *Handle) error {
			unverified, err := s.SetVF(ctx, parse("0000:01:10.0"),
				Settings{MAC: "52:54:00:aa:00:02", VLAN: "7", SpoofChk: off})
			if len(unverified) > 0 {
				err = errors.Join(err, fmt.Errorf("not verified: %v", unverified))
			}
			return err
		},
	},
	{
		name:  "vf destroy",
		setup: func(t *testing.T, k *hosttest.Kernel) { quiet(t, k, makeVFs(wished)) },
		run:   makeVFs(Wish{}),
		lossy: true,
		used:  func(t *testing.T, k *hosttest.Kernel) { usesNode(t, k, "0000:01:10.0") },
	},
	{name: "vf create everything", host: switching, run: makeVFs(everything)},
	{
		name: "vf create nvme",
		host: sharing,
		run: func(ctx context.Context, s *Handle) error {
			_, err := s.Make(ctx, parse(nvmePFAddress), alike(2, UseNone))
			return err
		},
	},
	{
		name: "bind for an owner",
		host: modular,
		run:  func(ctx context.Context, s *Handle) error { return move(ctx, s, e1000, ownedBy("0:0")) },
	},
	{
		name: "bind for another owner",
		setup: func(t *testing.T, k *hosttest.Kernel) {
			quiet(t, k, func(ctx context.Context, s *Handle) error { return move(ctx, s, e1000, ownedBy("0:0")) })
		},
		run: func(ctx context.Context, s *Handle) error { return move(ctx, s, e1000, ownedBy(":0")) },
	},
	{
		name: "unbind what nothing is known of",
		host: modular,
		setup: func(t *testing.T, k *hosttest.Kernel) {
			if err := errors.Join(k.Modprobe(t.Context(), "vfio_pci"),
				k.Write("sys/bus/pci/devices/"+pf+"/driver_override", "vfio-pci"),
				k.Write("sys/bus/pci/drivers/igb/unbind", pf), k.Write("sys/bus/pci/drivers_probe", pf)); err != nil {
				t.Fatal(err)
			}
		},
		run: func(ctx context.Context, s *Handle) error { return move(ctx, s, pf, bind.GiveBack()) },
	},
	{name: "recover", setup: killed(4, isWrite, makeVFs(wished)), run: recoverAll},
	{name: "recover everything", host: switching, setup: killed(4, isWrite, makeVFs(everything)), run: recoverAll},
	{
		name: "recover settings",
		setup: func(t *testing.T, k *hosttest.Kernel) {
			quiet(t, k, makeVFs(wished))
			killed(2, setsLink, func(ctx context.Context, s *Handle) error {
				_, err := s.SetVF(ctx, parse(vf0), Settings{MAC: "52:54:00:aa:00:02", VLAN: "7", SpoofChk: off})
				return err
			})(t, k)
		},
		run: recoverAll,
	},
}

func ownedBy(owner string) bind.Goal {
	o, err := bind.ParseNodeOwner(owner)
	if err != nil {
		panic(err)
	}
	return bind.Take(bind.Auto).OwnedBy(o)
}

// modular is small, where the VFIO drivers are modules that are not loaded.
func modular(t *testing.T) *hosttest.Kernel {
	k := small(t)
	aliases := k.Dir() + "/lib/modules/6.12.0/modules.alias"
	text := "alias pci:v00008086d000010C9sv*sd*bc*sc*i* igb\nalias vfio_pci:v00008086d000010D3sv*sd*bc*sc*i* e1000_vfio\n" +
		"alias vfio_pci:v*d*sv*sd*bc*sc*i* vfio_pci\n"
	if err := errors.Join(
		os.RemoveAll(k.Dir()+"/sys/bus/pci/drivers/vfio-pci"),
		os.MkdirAll(path.Dir(aliases), 0o755), os.WriteFile(aliases, []byte(text), 0o600),
	); err != nil {
		t.Fatal(err)
	}
	k.Modules = map[string]string{"vfio_pci": "vfio-pci"}
	return k
}

// setsLink tells messages that change an interface.
func setsLink(op, name string) bool { return op == "message" && name == fmt.Sprint(unix.RTM_SETLINK) }

// killed has a command killed at one of its operations.
func killed(at int, such func(op, name string) bool,
	run func(context.Context, *Handle) error) func(*testing.T, *hosttest.Kernel) {
	return func(t *testing.T, k *hosttest.Kernel) {
		s := open(t, k)
		k.KillAt(at, such)
		_ = run(context.Background(), s)
		s.Close()
		if !k.Revive() {
			t.Fatal("it was not killed")
		}
	}
}

func recoverAll(ctx context.Context, s *Handle) error {
	recovered, err := s.Recover(ctx)
	for _, r := range recovered {
		err = errors.Join(err, r.Err)
	}
	return err
}

// recovers reports whether the command only ends what another began.
func (c *command) recovers() bool { return strings.HasPrefix(c.name, "recover") }

func nicOf(t *testing.T, k *hosttest.Kernel, address string) string {
	t.Helper()
	entries, err := os.ReadDir(k.Dir() + "/sys/bus/pci/devices/" + address + "/net")
	if err != nil || len(entries) == 0 {
		t.Fatal(entries, err)
	}
	return entries[0].Name()
}

// hostState is all that the commands change: drivers, overrides, numbers of VFs, their settings, what is written down.
type hostState struct {
	devices, settings string
	changes           []string // records of changes
	taken             []string // records of devices that are taken
}

func look(t *testing.T, k *hosttest.Kernel) (out hostState) {
	t.Helper()
	s := open(t, k)
	defer s.Close()
	var text strings.Builder
	topology, err := s.Scan()
	if err != nil {
		t.Fatal(err)
	}

	topology.All(func(d *iommu.Device) bool {
		if d.PCI && (d.Name == e1000 || d.Name == edu || d.SRIOV != nil || d.PhysFn != nil) {
			fmt.Fprintf(&text, "%s %s %q", d.Name, d.Driver, d.DriverOverride)
			if d.SRIOV != nil {
				autoprobe, err := k.Host().String(autoprobe(d.Address))
				fmt.Fprintf(&text, " %d VFs, autoprobe %s %v", len(d.SRIOV.VFs), autoprobe, err)
			}
			fmt.Fprintln(&text)
		}
		return true
	})

	out.devices = text.String()
	port, err := ReadPort(s.Host(), device(t, s, pf))
	if err != nil {
		t.Fatal(err)
	}

	if port != nil {
		b, err := json.Marshal(port.VFs)
		if err != nil {
			t.Fatal(err)
		}
		k.ChangeNet(func(n *hosttest.Network) { out.settings = fmt.Sprintf("%s, e-switch %v", b, n.Eswitch[pf]) })
		for _, file := range []string{"mtu", "flags"} {
			text, err := k.Host().String("sys/class/net/" + port.Name + "/" + file)
			out.settings += fmt.Sprintf(", %s %s %v", file, text, err)
		}
	}

	if k.OnIoctl != nil {
		off, err := offloadsBut(s.Host(), device(t, s, pf), on)
		if err == nil && len(off) == 0 {
			out.settings += ", offloads"
		}
	}

	if out.changes, err = s.journal.Keys("change-"); err != nil {
		t.Fatal(err)
	}
	if out.taken, err = s.journal.Keys("taken-"); err != nil {
		t.Fatal(err)
	}

	return out
}

// same reports whether the host is the same, whatever is written down.
func (h hostState) same(other hostState) bool {
	return h.devices == other.devices && h.settings == other.settings && slices.Equal(h.taken, other.taken)
}

func (h hostState) String() string {
	return fmt.Sprintf("\n%s%s\nchanges %v, taken %v", h.devices, h.settings, h.changes, h.taken)
}

// operations are what a command asks of the host, in order.
func (c *command) operations(t *testing.T) (all []hosttest.Operation, before, after hostState) {
	t.Helper()
	k := c.prepare(t)
	before = look(t, k)
	var err error
	all = k.Operations(func() {
		s := open(t, k)
		err = c.run(context.Background(), s)
		s.Close()
	})
	if err != nil {
		t.Fatal(err)
	}
	return all, before, look(t, k)
}

// prepare is a new host as the command meets it.
func (c *command) prepare(t *testing.T) *hosttest.Kernel {
	t.Helper()
	k := small
	if c.host != nil {
		k = c.host
	}
	host := k(t)
	if c.setup != nil {
		c.setup(t, host)
	}
	return host
}

// failures are what operations fail with. The last is what one of a device says that has gone.
var failures = []error{unix.EIO, unix.EACCES, unix.ENOSPC, unix.ENOENT}

// TestFaultSweep: whatever operation fails, what is reported is what is; nothing is changed without a record of it; the
// next command brings the host to where it was or to where it was to go.
func TestFaultSweep(t *testing.T) {
	for _, c := range commands {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			all, before, after := c.operations(t)
			for _, n := range hosttest.Sample(all) {
				for i, fail := range failures {
					if os.Getenv("VIADUCT_SWEEP") == "all" || i == n%3 {
						t.Run(fmt.Sprint(n), func(t *testing.T) { c.fault(t, n, fail, before, after) })
					}
				}
			}
		})
	}
}

func (c *command) fault(t *testing.T, n int, fail error, before, after hostState) {
	k := c.prepare(t)
	failed := failAt(k, n, fail)
	s := open(t, k)
	err := c.run(context.Background(), s)
	s.Close()
	k.Revive()
	where := fmt.Sprintf("operation %d (%s) fails with %v: told %v", n, failed(), fail, err)

	now := look(t, k)
	if !errors.Is(fail, unix.ENOENT) { // what has come back is another device
		switch {
		case err == nil && (!now.same(after) && !c.undone(now) || len(now.changes) > 0):
			t.Errorf("%s\nis %s\nnot %s", where, now, after)
		case err != nil && now.same(after) && strings.Contains(err.Error(),
			"was given back"): // and what it makes is not known
		case err != nil && !now.same(before) && len(now.changes) == 0 && !c.lost(err, now) && !c.recovers():
			t.Errorf("%s\nis %s\nwas %s", where, now, before)
		}
	}
	if len(now.changes) > 0 && errors.Is(fail, unix.ENOENT) && c.recovers() {
		// A VF that went in the middle of its recovery, and has come back as another: the rest is told and ended.
		quiet(t, k, recoverAll)
		if now = look(t, k); len(now.changes) > 0 {
			t.Errorf("%s\nleft %s", where, now)
		}
	} else if len(now.changes) > 0 {
		c.next(t, k, where, before, after)
	}
}

// failAt has the n-th operation fail. What fails as a device that is gone is gone from then on.
func failAt(k *hosttest.Kernel, n int, fail error) (failed func() string) {
	var at atomic.Pointer[string]
	var left atomic.Int64
	left.Store(int64(n))
	var gone atomic.Pointer[string]
	k.SetFault(func(op, name string) error {
		if left.Add(-1) == -1 {
			what := op + " " + name
			at.Store(&what)
			if device := deviceOf(name); errors.Is(fail, unix.ENOENT) && device != "" {
				gone.Store(&device)
			}
			return fail
		}
		if device := gone.Load(); device != nil && strings.HasPrefix(name, "sys/") && strings.Contains(name, *device) {
			return unix.ENOENT
		}
		return nil
	})
	return func() string {
		if what := at.Load(); what != nil {
			return *what
		}
		return ""
	}
}

// deviceOf is the address of a device of the commands in a name, the last if there are several; "" if there is none.
func deviceOf(name string) string {
	at := -1
	for _, prefix := range []string{"0000:01:", "0000:07:"} {
		at = max(at, strings.LastIndex(name, prefix))
	}
	if at < 0 || !strings.Contains(name, "sys/") || len(name) < at+len(pf) {
		return ""
	}
	return name[at : at+len(pf)]
}

// undone reports whether what was recovered was undone, as it could not be finished.
func (c *command) undone(now hostState) bool {
	return c.recovers() && strings.Contains(now.devices, " 0 VFs, autoprobe 1")
}

// lost reports whether VFs went that had to go first, which the error says.
func (c *command) lost(err error, now hostState) bool {
	return c.lossy && strings.Contains(now.devices, " 0 VFs, autoprobe 1") &&
		(err == nil || strings.Contains(err.Error(), "VFs before"))
}

// next is the next command: it leaves the host as it was or as it was to be.
func (c *command) next(t *testing.T, k *hosttest.Kernel, where string, before, after hostState) {
	t.Helper()
	s := open(t, k)
	recovered, err := s.Recover(context.Background())
	s.Close()
	for _, r := range recovered {
		err = errors.Join(err, r.Err)
	}
	now := look(t, k)
	fits := now.same(after) || c.lost(nil, now) || c.undone(now) || now.same(before) && !c.recovers()
	if err != nil || len(now.changes) > 0 || !fits {
		t.Errorf("%s\nrecovered %v, %v\nis %s\nwas %s\nor %s", where, recovered, err, now, before, after)
	}
}

// TestFaultOfLook: a look that failed is never "nobody": what somebody uses is refused, or the failure is told, and
// nothing is changed.
func TestFaultOfLook(t *testing.T) {
	for _, c := range commands {
		if c.used == nil {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			all, before, _ := c.operations(t)
			for _, n := range hosttest.Sample(all) {
				t.Run(fmt.Sprint(n), func(t *testing.T) { c.faultOfLook(t, n, before) })
			}
		})
	}
}

func (c *command) faultOfLook(t *testing.T, n int, before hostState) {
	k := c.prepare(t)
	c.used(t, k)
	fail := failures[n%3] // but for ENOENT, which says that a process is gone
	failed := failAt(k, n, fail)
	s := open(t, k)
	err := c.run(context.Background(), s)
	s.Close()
	k.Revive()
	if now := look(t, k); err == nil || !now.same(before) {
		t.Errorf("operation %d (%s) fails with %v: told %v\nis %s\nwas %s", n, failed(), fail, err, now, before)
	}
	if failed() == "" && !errors.Is(err, holder.ErrRefused) {
		t.Errorf("nothing failed: %v", err)
	}
}

// TestRecoveryOfUsed: VFs of an interrupted change that somebody has taken to using stay, whatever look fails.
func TestRecoveryOfUsed(t *testing.T) {
	t.Parallel()
	c := command{setup: func(t *testing.T, k *hosttest.Kernel) {
		killed(2, setsLink, makeVFs(wished))(t, k)
		if err := errors.Join(k.Write("sys/bus/pci/devices/"+vf0+"/driver_override", "vfio-pci"),
			k.Write("sys/bus/pci/drivers_probe", vf0)); err != nil {
			t.Fatal(err)
		}
		usesNode(t, k, vf0)
		// So that it cannot be finished.
		k.Net.Refuse = map[int]unix.Errno{nl.IFLA_VF_TRUST: unix.EPERM}
	}}
	recovered := func(k *hosttest.Kernel) error {
		s := open(t, k)
		defer s.Close()
		return recoverAll(t.Context(), s)
	}
	var err error
	k := c.prepare(t)
	all := k.Operations(func() { err = recovered(k) })
	if now := look(t, k); err == nil || !strings.Contains(err.Error(), "its VFs stay, because") ||
		!strings.Contains(now.devices, " 3 VFs") {
		t.Errorf("told %v\nis %s", err, now)
	}

	for _, n := range hosttest.Sample(all) {
		k := c.prepare(t)
		failed := k.FailNth(n, unix.EIO)
		err := recovered(k)
		k.Revive()
		if now := look(t, k); !strings.Contains(now.devices, " 3 VFs") {
			t.Errorf("operation %d (%s) fails: told %v\nis %s", n, failed(), err, now)
		}
	}
}

// TestInterruptSweep: wherever a command is interrupted, it goes on to its end or puts back what it did, and says which.
func TestInterruptSweep(t *testing.T) {
	for _, c := range commands {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			all, before, after := c.operations(t)
			for _, n := range hosttest.Sample(all) {
				t.Run(fmt.Sprint(n), func(t *testing.T) { c.interrupt(t, n, before, after) })
			}
		})
	}
}

func (c *command) interrupt(t *testing.T, n int, before, after hostState) {
	k := c.prepare(t)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var left atomic.Int64
	left.Store(int64(n))
	k.SetFault(func(string, string) error {
		if left.Add(-1) == -1 {
			cancel()
		}
		return nil
	})
	s := open(t, k)
	err := c.run(ctx, s)
	s.Close()
	k.Revive()
	now := look(t, k)
	switch {
	case len(now.changes) > 0 && err != nil && c.recovers():
		c.next(t, k, fmt.Sprintf("interrupted at operation %d: told %v", n, err), before, after)
	case len(now.changes) > 0,
		err == nil && !now.same(after) && !c.undone(now),
		err != nil && !now.same(before) && !c.lost(err, now):
		t.Errorf("interrupted at operation %d: told %v\nis %s\nwas %s\nor %s", n, err, now, before, after)
	}
}

// TestKillSweep: wherever a command is killed, the next one leaves the host as it was or as it was to be.
func TestKillSweep(t *testing.T) {
	changes := func(op, _ string) bool {
		return slices.Contains([]string{"write", "replace", "remove", "own", "message", "modprobe"}, op)
	}
	for _, c := range commands {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			_, before, after := c.operations(t)
			stride := 4
			if os.Getenv("VIADUCT_SWEEP") == "all" {
				stride = 1
			}
			for n, killed := len(c.name)%stride, true; killed; n += stride {
				t.Run(fmt.Sprint(n), func(t *testing.T) {
					k := c.prepare(t)
					s := open(t, k)
					k.KillAt(n, changes)
					_ = c.run(context.Background(), s)
					s.Close()
					if killed = k.Revive(); killed {
						c.next(t, k, fmt.Sprintf("killed before change %d", n), before, after)
					}
				})
			}
		})
	}
}
