package declared

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"viaduct/cmd/internal/hostfile"
	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// writeFile writes a file of a kernel's host behind its back.
func writeFile(t *testing.T, k *hosttest.Kernel, name, content string) {
	t.Helper()
	full := filepath.Join(k.Dir(), name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(full), 0o755),
		os.WriteFile(full, []byte(content), 0o600)); err != nil {
		t.Fatal(err)
	}
}

// What carries the host, or is named by its own files, is written down, and a boot takes none of it; what was down when
// it was looked at again stays, until that is accepted.
func TestProtect(t *testing.T) {
	noted := func(k *hosttest.Kernel, o Options) map[string]string {
		t.Helper()
		m := newManager(t, k, o)
		defer m.handle.Close()
		if err := m.Protect(); err != nil {
			t.Fatal(err)
		}
		var all []protected
		if _, err := m.state.Get(protectedKey, &all); err != nil {
			t.Fatal(err)
		}
		out := map[string]string{}
		for _, p := range all {
			out[p.Address.String()] = p.Why
		}
		return out
	}
	k := sweptHost(t)
	if got := noted(k, Options{}); len(got) > 0 {
		t.Errorf("of a host that nothing carries: %v", got)
	}
	writeFile(t, k, "proc/cmdline", "root=/dev/vda ip=::::host:ens1:dhcp\n")
	if got := noted(k, Options{}); len(got) != 1 || !strings.Contains(got[nic], "ip=") {
		t.Errorf("by its command line: %v", got)
	}
	k.ChangeNet(func(n *hosttest.Network) { n.Routes = []hosttest.Route{{To: "default", Over: []string{"enp1s0"}}} })
	writeFile(t, k, "proc/cmdline", "root=/dev/vda\n")
	if got := noted(k, Options{}); len(got) != 2 || !strings.Contains(got[pf], "default route") {
		t.Errorf("by a route, and by what was there before: %v", got)
	}
	boot := newManager(t, k, Options{Boot: true})
	for _, name := range []string{nic, pf} {
		i := plan(t, boot, "devices:\n  - select: "+name+"\n")[0]
		if i.State != Refused || !errors.Is(i.Err, holder.ErrRefused) ||
			!strings.Contains(i.Err.Error(), "the host was using it") {
			t.Errorf("a boot takes %s: %s, %v", name, i.State, i.Err)
		}
	}
	if i := plan(t, newManager(t, k, Options{}), "devices:\n  - select: "+nic+"\n")[0]; i.State != Differs {
		t.Errorf("an apply is refused %s by what was: %s, %v", nic, i.State, i.Err)
	}
	if got := noted(k, Options{Accept: true}); len(got) != 1 || got[pf] == "" {
		t.Errorf("accepted: %v", got)
	}

	// A look that fails writes down nothing less.
	for n := 0; ; n += 5 {
		m := newManager(t, k, Options{})
		failed := k.FailNth(n, failures[n%3])
		err := m.Protect()
		k.Revive()
		m.handle.Close()
		if failed() == "" {
			break
		}
		var all []protected
		known, getErr := m.state.Get(protectedKey, &all)
		whole := func(p protected) bool { return p.Address.String() == pf && p.Identity.Path != "" }
		if !known || getErr != nil || !slices.ContainsFunc(all, whole) {
			t.Errorf("%s fails: %v, written %+v, %v", failed(), err, all, getErr)
		}
	}
}

// A device is declared by its place, once, and no more when that is taken back.
func TestSave(t *testing.T) {
	k := sweptHost(t)
	m := newManager(t, k, Options{})
	d, err := m.topology.Find(mustParse(t, nic))
	if err != nil {
		t.Fatal(err)
	}
	if file, err := m.Saved(d); file != "" || err != nil {
		t.Errorf("before: %q, %v", file, err)
	}
	file, err := m.Save(d, bind.Auto, "1000")
	if err != nil || !strings.HasPrefix(file, "/"+hostfile.Dir+"/50-bind-") {
		t.Fatal(file, err)
	}
	if o, err := m.host.Owner(file[1:]); err != nil || o.Mode != 0o644 {
		t.Errorf("%+v, %v", o, err)
	}
	s, err := hostfile.Load(m.host)
	if err != nil || len(s.Devices) != 1 || s.Devices[0].Owner != "1000" || s.Devices[0].Driver != "" {
		t.Fatalf("%+v, %v", s, err)
	}
	if found, err := m.find(s.Devices[0].Select); err != nil || found != d {
		t.Errorf("declared is %v, %v", found, err)
	}
	if was, err := m.remembered(s.Devices[0].Select); err != nil || was == nil || was.Address != d.Address ||
		len(was.Group) != 2 {
		t.Errorf("remembered as %+v, %v", was, err)
	}
	if saved, err := m.Saved(d); saved != file || err != nil {
		t.Errorf("saved as %q, %v", saved, err)
	}
	if again, err := m.Save(d, "vfio-pci", ""); again != file || err != nil {
		t.Errorf("again: %q, %v", again, err)
	}
	if s, err = hostfile.Load(m.host); err != nil || len(s.Devices) != 1 || s.Devices[0].Driver != "vfio-pci" {
		t.Errorf("again: %+v, %v", s, err)
	}
	if err := m.Forget(d); err != nil || m.host.Exists(file[1:]) {
		t.Errorf("forgotten: %v", err)
	}
	if was, err := m.remembered(s.Devices[0].Select); err != nil || was != nil {
		t.Errorf("remembered still: %+v, %v", was, err)
	}

	// What the user has declared elsewhere is left as it is.
	writeFile(t, k, hostfile.File, "devices:\n  - select: "+nic+"\n")
	if at, err := m.Save(d, bind.Auto, ""); err != nil || !strings.HasPrefix(at, "/"+hostfile.File) ||
		m.host.Exists(file[1:]) {
		t.Errorf("declared already: %q, %v", at, err)
	}
	// What fails is told, and a repetition does it.
	if err := os.Remove(filepath.Join(k.Dir(), hostfile.File)); err != nil {
		t.Fatal(err)
	}
	for n := 0; ; n += 2 {
		failed := k.FailNth(n, failures[n%3])
		got, err := m.Save(d, bind.Auto, "")
		k.Revive()
		if failed() == "" {
			break
		}
		if err == nil && (got != file || !m.host.Exists(file[1:])) {
			t.Errorf("%s fails, and it is saved as %q", failed(), got)
		}
		if _, err := m.Save(d, bind.Auto, ""); err != nil {
			t.Errorf("%s fails, and again: %v", failed(), err)
		}
		if err := m.Forget(d); err != nil {
			t.Error(err)
		}
	}
}

// A pool is what ranges name, over all PFs that are there; of one that is not, the error says why.
func TestPool(t *testing.T) {
	const two = "pfs:\n  - select: " + pf +
		"\n    count: 3\n    vfs:\n      - {range: 0-1, driver: none, pool: net}\n" +
		"      - {range: 2, driver: none, pool: fast}\n  - select: 0000:99:00.0\n    count: 1\n    vfs: [{pool: net}, {range: 0, pool: far}]\n"
	k := sweptHost(t)
	s := parse(t, strings.Replace(two, "{pool: net}, {range: 0, pool: far}", "{range: 0, pool: far}", 1))
	if got := Pools(s); !slices.Equal(got, []string{"net", "fast", "far"}) {
		t.Errorf("pools %q", got)
	}
	m := newManager(t, k, Options{})
	if _, err := m.Pool(s, "net"); err == nil || !strings.Contains(err.Error(), "viaduct apply") {
		t.Errorf("before its VFs are made: %v", err)
	}
	if err := apply(t, m, "pfs:\n  - select: "+pf+
		"\n    count: 3\n    vfs: [{range: 0-2, driver: none}]\n"); err != nil {
		t.Fatal(err)
	}
	m = again(t, m)
	for pool, want := range map[string][]int{"net": {0, 1}, "fast": {2}} {
		vfs, err := m.Pool(s, pool)
		var got []int
		for _, vf := range vfs {
			got = append(got, vf.VFIndex)
		}
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("pool %s has %v, %v", pool, got, err)
		}
	}
	if vfs, err := m.Pool(s, "far"); err == nil || !errors.Is(err, iommu.ErrNotFound) || len(vfs) > 0 {
		t.Errorf("of a PF that is not there: %v, %v", vfs, err)
	}
	if err := m.Protected(parse(t, "pfs: []\nprotect: ["+pf+"]\n"), []*iommu.Device{found(t, m)}); !errors.Is(err,
		holder.ErrRefused) {
		t.Errorf("protected: %v", err)
	}
	if err := m.Protected(parse(t, "pfs: []\nprotect: ["+nic+"]\n"), []*iommu.Device{found(t, m)}); err != nil {
		t.Errorf("not protected: %v", err)
	}

	// What nothing declares, and is as if something did, is told of.
	if all := m.Unmanaged(plan(t, m, "devices:\n  - select: "+nic+"\n")); len(all) != 1 || all[0].Name != pf {
		t.Errorf("unmanaged: %v", all)
	}
	if all := m.Unmanaged(plan(t, m, few)); len(all) != 0 {
		t.Errorf("unmanaged beside what is declared: %v", all)
	}
	for _, c := range []struct {
		item  Item
		wrong bool
	}{{Item{State: OK}, false}, {Item{State: Differs}, true}, {Item{State: Missing}, true},
		{Item{State: Missing, Optional: true}, false}} {
		if c.item.Wrong() != c.wrong {
			t.Errorf("%+v is wrong: %v", c.item, !c.wrong)
		}
	}
}

// A boot waits until all that it needs is there, named, and with its driver, and for what is optional not at all.
func TestWait(t *testing.T) {
	k := sweptHost(t)
	there := func(text string) bool {
		t.Helper()
		m := newManager(t, k, Options{Boot: true})
		defer m.handle.Close()
		return m.allThere(parse(t, text))
	}
	const gone = "0000:99:00.0"
	for text, want := range map[string]bool{
		few: true, "devices:\n  - select: " + nic + "\n": true, "devices:\n  - select: " + gone + "\n": false,
		"devices:\n  - {select: " + gone + ", optional: true}\n":                       true,
		"pfs:\n  - {select: " + gone + ", count: 1}\n":                                 false,
		"pfs:\n  - {select: " + gone + ", count: 1, optional: true}\n":                 true,
		"devices:\n  - select: " + nic + "\nprotect: [mac=52:54:00:99:99:99]\n":        false,
		"devices:\n  - select: " + nic + "\nprotect: [" + pf + "]\n":                   true,
		"pfs:\n  - {select: " + pf + ", count: 1}\nprotect: [mac=52:54:00:99:99:99]\n": true,
	} {
		if got := there(text); got != want {
			t.Errorf("%s is there: %v", text, got)
		}
	}
	writeFile(t, k, "run/udev/data/n0", "")
	if there(few) {
		t.Error("its interface has no name yet")
	}
	index, err := k.Host().String("sys/class/net/enp1s0/ifindex")
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, k, "run/udev/data/n"+index, "")
	if !there(few) {
		t.Error("its interface is named")
	}
	if err := k.Write("sys/bus/pci/drivers/igb/unbind", pf); err != nil {
		t.Fatal(err)
	}
	if there(few) {
		t.Error("it has no driver")
	}

	// A device without a driver has not the numbers yet that tell whether it is the one of the last time, if it had any.
	if err := k.Write("sys/bus/pci/drivers/e1000/unbind", nic); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		was  *known
		want bool
	}{
		{nil, true}, {&known{}, true}, {&known{Identity: iommu.Identity{Serial: "1"}}, false},
		{&known{Identity: iommu.Identity{MACs: map[string]string{"a": "b"}}}, false},
	} {
		if c.was != nil {
			if err := Of(&iommu.Host{Host: k.Host()}).state.Put(knownKey(nic), c.was); err != nil {
				t.Fatal(err)
			}
		}
		if got := there("devices:\n  - select: " + nic + "\n"); got != c.want {
			t.Errorf("a device without a driver that was %+v: %v", c.was, got)
		}
	}

	// It ends when that comes, or with its time.
	m := newManager(t, k, Options{Boot: true})
	ended := make(chan error, 1)
	looked := make(chan bool, 1)
	k.SetFault(func(op, name string) error {
		if name == "sys/bus/pci/devices" {
			select {
			case looked <- true:
			default:
			}
		}
		return nil
	})
	go func() { ended <- m.Wait(t.Context(), parse(t, few)) }()
	<-looked
	if err := k.Write("sys/bus/pci/drivers_probe", pf); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil || found(t, m).Driver != "igb" {
		t.Errorf("%v, on %s", err, found(t, m).Driver)
	}
	k.Revive()
	over, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := m.Wait(over, parse(t, "devices:\n  - select: "+gone+"\n")); err != nil {
		t.Errorf("its time is over: %v", err)
	}
}

// Watch looks at once, and again when something changes, until it is ended.
func TestWatch(t *testing.T) {
	k := sweptHost(t)
	ctx, cancel := context.WithCancel(t.Context())
	looks := 0
	err := Watch(ctx, &iommu.Host{Host: k.Host()}, func() bool {
		if looks++; looks == 1 {
			if err := k.Write("sys/bus/pci/drivers/e1000/unbind", nic); err != nil {
				t.Error(err)
			}
			return false
		}
		cancel()
		return true
	})
	if err != nil || looks != 2 {
		t.Errorf("%d looks, %v", looks, err)
	}
	looks = 0
	if err := Settle(t.Context(), &iommu.Host{Host: k.Host()}, func() {
		if looks++; looks == 1 {
			if err := k.Write("sys/bus/pci/drivers_probe", nic); err != nil {
				t.Error(err)
			}
		}
	}); err != nil || looks != 2 {
		t.Errorf("until nothing changes: %d looks, %v", looks, err)
	}
}
