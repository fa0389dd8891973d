package declared

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"viaduct/internal/host/hosttest"
	"viaduct/vfio/bind"
)

// VFs of the host's that are not to be configured have a mark before their driver makes their interface, and udev looks
// again at those that are there; at rest, nothing is to be done.
func TestUnmanaged(t *testing.T) {
	const (
		all  = "pfs:\n  - {select: " + pf + ", count: 2, vfs: [{range: 0-1, driver: home, network: unmanaged}]}\n"
		some = "pfs:\n  - {select: " + pf +
			", count: 2, vfs: [{range: 0, driver: home}, {range: 1, driver: home, network: unmanaged}]}\n"
	)
	k := hosttest.NewLab(t, nil)
	m := newManager(t, k, Options{})
	first := plan(t, m, all)[0]
	if !strings.Contains(strings.Join(first.Notes, " "), "viaduct install") {
		t.Errorf("without the rule, notes %q", first.Notes)
	}
	if err := apply(t, m, all); err != nil {
		t.Fatal(err)
	}
	marked := func() []string {
		names, err := filepath.Glob(filepath.Join(k.Dir(), "run/viaduct/unmanaged-*"))
		if err != nil {
			t.Fatal(err)
		}
		return names
	}
	if got := marked(); len(got) != 2 {
		t.Errorf("marked: %q", got)
	}
	m = again(t, m)
	if i := plan(t, m, all)[0]; i.State != OK {
		t.Errorf("at rest: %s, %q", i.State, bind.Commands(i.Steps))
	}

	const name = "enp1s0v0" // that its driver makes
	net := filepath.Join(k.Dir(), "sys/bus/pci/devices/0000:01:10.0/net", name)
	link := filepath.Join(k.Dir(), "sys/class/net", name)
	err := errors.Join(os.MkdirAll(net, 0o755), os.WriteFile(filepath.Join(net, "uevent"), nil, 0o600),
		os.Symlink(net, link))
	if err != nil {
		t.Fatal(err)
	}
	if err := apply(t, again(t, m), some); err != nil {
		t.Fatal(err)
	}
	if got := marked(); len(got) != 1 || !slices.Contains(k.Log, "sys/class/net/"+name+"/uevent=change") {
		t.Errorf("one is managed again: marked %q, log %q", got, k.Log)
	}
	if i := plan(t, again(t, m), some)[0]; i.State != OK {
		t.Errorf("at rest: %s, %q", i.State, bind.Commands(i.Steps))
	}

	const none = "pfs:\n  - {select: " + pf + ", count: 2, vfs: [{range: 0-1, driver: home}]}\n"
	i := plan(t, again(t, m), none)[0]
	if text := strings.Join(bind.Commands(i.Steps), "; "); i.State != Differs ||
		text != "rm /run/viaduct/unmanaged-0000:01:10.2.json" {
		t.Errorf("all are managed again: %s, %q", i.State, text)
	}
	if err := apply(t, again(t, m), none); err != nil || len(marked()) != 0 {
		t.Errorf("all are managed again: %v, marked %q", err, marked())
	}
}
