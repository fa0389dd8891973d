package declared

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"viaduct/internal/host/hosttest"
	"viaduct/vfio/bind"
)

// Where only a PF can stand its ids mean it, also when VFs with the same ids are there: for plans and for pools.
func TestIDsOfPF(t *testing.T) {
	const text = "pfs:\n  - {select: \"8086:56c0\", count: 3, vfs: [{driver: vfio, pool: gpu}]}\n"
	m := newManager(t, hosttest.NewKernel(t, hosttest.OwnIDs()), Options{})
	if i := plan(t, m, text)[0]; i.State != OK || i.Device.Name != "0000:00:02.0" {
		t.Errorf("%s, %v", i.State, i.Err)
	}
	if vfs, err := m.Pool(parse(t, text), "gpu"); err != nil || len(vfs) != 3 {
		t.Errorf("the pool has %v, %v", vfs, err)
	}
}

// What is adopted names a PF by its own numbers: not by a representor's, and not by those of a port that the settings
// of its VFs do not go over.
func TestAdoptedNames(t *testing.T) {
	for name, c := range map[string]struct {
		tree     hosttest.Tree
		selector string
	}{
		"representors":            {hosttest.Representors(), "mac=52:54:00:00:00:01"},
		"nothing but one of them": {hosttest.OnlyRepresentors(), "path=0000:00:01.0/00.0"},
		"VFs of two ports": {hosttest.TwoPorts().With(hosttest.Tree{
			"sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0/net/ens1/address": "52:54:00:00:00:00\n",
		}), "mac=52:54:00:00:00:01"},
		"InfiniBand": {hosttest.InfiniBand(), "guid=0c:42:a1:03:00:00:00:02"},
	} {
		m := newManager(t, hosttest.NewKernel(t, c.tree), Options{})
		pf, err := m.topology.Find(mustParse(t, pf))
		if err != nil {
			t.Fatal(err)
		}
		match, err := m.stable(pf)
		if err != nil || match.String() != c.selector {
			t.Errorf("%s: %s, %v", name, match.String(), err)
		}
	}
}

// A disk that is on a vfio driver since the boot tells no serial number: it is found by what was recorded, and that is
// said; but not where places were numbered anew, as another one may be where it was.
func TestTakenDisks(t *testing.T) {
	const text = "devices:\n  - select: serial=S1\n"
	record := func(equal ...string) hosttest.Tree {
		return hosttest.Tree{"var/lib/viaduct/" + knownKey("serial=S1") + ".json": fmt.Sprintf(
			`{"selector":"serial=S1","address":"0000:02:00.0","identity":{"path":"0000:00:02.0/00.0","serial":"S1",`+
				`"id":{"vendor":9798,"device":20516,"subvendor":6900,"subdevice":4352,"class":67586}},`+
				`"group":["0000:00:02.0/00.0"],"equal":["%s"]}`, strings.Join(equal, `","`))}
	}
	for name, c := range map[string]struct {
		record hosttest.Tree
		state  State
		says   string
	}{
		"as they were":    {record("0000:00:02.0/00.0", "0000:00:03.0/00.0"), OK, "by the record of the last apply"},
		"numbered anew":   {record("0000:00:01.0/00.0", "0000:00:02.0/00.0"), Changed, "cannot tell which one it is"},
		"never seen here": {nil, Missing, "no device has this serial number"},
	} {
		i := plan(t, newManager(t, hosttest.NewKernel(t, hosttest.TakenDisks().With(c.record)), Options{}), text)[0]
		said := strings.Join(i.Notes, " ")
		if i.Err != nil {
			said += i.Err.Error()
		}
		if i.State != c.state || !strings.Contains(said, c.says) {
			t.Errorf("%s: %s: %s", name, i.State, said)
		}
	}
}

// A PF that went down after its VFs were made is not as declared, and a plan brings it up and does nothing else.
func TestWentDown(t *testing.T) {
	const text = "pfs:\n  - {select: " + pf + ", count: 2, vfs: [{driver: vfio}]}\n"
	k := hosttest.NewLab(t, nil)
	m := newManager(t, k, Options{})
	if err := apply(t, m, text); err != nil {
		t.Fatal(err)
	}
	if i := plan(t, again(t, m), text)[0]; i.State != OK {
		t.Fatalf("%s, %v", i.State, i.Steps)
	}
	if err := os.WriteFile(filepath.Join(k.Dir(), pfDir, "net/enp1s0/flags"), []byte("0x1002\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	i := plan(t, again(t, m), text)[0]
	if i.State != Differs || !strings.Contains(strings.Join(bind.Commands(i.Steps), "\n"),
		"ip link set dev enp1s0 up") ||
		strings.Contains(strings.Join(bind.Commands(i.Steps), "\n"), "numvfs") {
		t.Errorf("%s, %v, %q", i.State, i.Err, i.Steps)
	}
}

// The interface of a PF that is in another network namespace is said to be there by a plan, too.
func TestElsewhere(t *testing.T) {
	k := hosttest.NewLab(t, hosttest.Tree{
		"run/netns/blue": "", "sys/class/net/enp1s0": hosttest.Gone,
		"sys/devices/pci0000:00/0000:00:05.0/0000:01:00.0/net": hosttest.Gone,
	})
	k.Net.Elsewhere = map[string][]hosttest.Elsewhere{"run/netns/blue": {{Name: "eth0", Device: pf}}}
	m := newManager(t, k, Options{})
	for text, want := range map[string]State{"count: 2": Differs, "count: 2, vfs: [{vlan: 7}]": Refused} {
		i := plan(t, m, "pfs:\n  - {select: "+pf+", "+text+"}\n")[0]
		said := strings.Join(i.Notes, " ")
		if i.Err != nil {
			said += i.Err.Error()
		}
		if i.State != want || !strings.Contains(said, "one (eth0) is in the network namespace of blue") {
			t.Errorf("%s: %s: %s", text, i.State, said)
		}
	}
}

// A guest on its maker's VFIO driver has what "driver: vfio" asks for, and is in the way of fewer VFs.
func TestVendorVFIO(t *testing.T) {
	k := hosttest.NewKernel(t, hosttest.VendorVFIO())
	k.Process(4711, "qemu", "/dev/vfio/21")
	m := newManager(t, k, Options{})
	text := func(count int) string {
		return fmt.Sprintf("pfs:\n  - {select: path=0000:00:01.0/00.0, count: %d, vfs: [{driver: vfio}]}\n", count)
	}
	if i := plan(t, m, text(2))[0]; i.State != OK {
		t.Errorf("%s, %v, %q", i.State, i.Err, i.Steps)
	}
	items := plan(t, again(t, m), text(1))
	m.Check(items)
	if i := items[0]; i.State != Refused || !strings.Contains(i.Err.Error(), "0000:17:00.2 is open in process 4711") {
		t.Errorf("fewer VFs: %s, %v", i.State, i.Err)
	}
}

// What would be refused after a boot, as no IOMMU is in front of it, is not adopted.
func TestAdoptWithoutIOMMU(t *testing.T) {
	m := newManager(t, hosttest.NewKernel(t, hosttest.NoIOMMU()), Options{})
	if s, _, err := m.Adopt(); err != nil || len(s.Devices) > 0 {
		t.Errorf("%+v, %v", s, err)
	}
}

// An entry for each of several PFs is one for each that is there, by its place; where none is, it is missing.
func TestEach(t *testing.T) {
	const text = "pfs:\n  - {each: \"8086:10c9\", count: 2, vfs: [{driver: vfio, pool: net, mac: stable, vlan: 100+index}]}\n"
	m := newManager(t, hosttest.NewLab(t, nil), Options{})
	items := plan(t, m, text)
	if len(items) != 2 || items[0].Device.Name != "0000:01:00.0" || items[1].Name != "path=0000:00:06.0/00.0" {
		t.Fatalf("%d items", len(items))
	}
	if err := apply(t, m, text); err != nil {
		t.Fatal(err)
	}
	m = again(t, m)
	for _, i := range plan(t, m, text) {
		if i.State != OK {
			t.Errorf("%s: %s, %v, %v", i.Name, i.State, i.Steps, i.Err)
		}
	}
	if vfs, err := m.Pool(parse(t, text), "net"); err != nil || len(vfs) != 4 {
		t.Errorf("the pool has %v, %v", vfs, err)
	}
	second, err := m.topology.Find(mustParse(t, "0000:02:00.0"))
	if err != nil {
		t.Fatal(err)
	}
	if s, declared := m.Settings(parse(t, text), second); !declared || s[1]["vlan"] != "101" {
		t.Errorf("settings %v, %v", s, declared)
	}

	for text, want := range map[string]State{
		"pfs:\n  - {each: [path=0000:00:05.0/00.0, path=0000:00:06.0/00.0], count: 2}\n": OK,
		"pfs:\n  - {each: \"1234:5678\", count: 2}\n":                                    Missing,
	} {
		for _, i := range plan(t, m, text) {
			if i.State != want && i.State != Differs {
				t.Errorf("%s: %s, %v", text, i.State, i.Err)
			}
		}
	}
	twice := "pfs:\n  - {each: \"8086:10c9\", count: 2}\n  - {select: \"0000:02:00.0\", count: 1}\n"
	if items := plan(t, m, twice); len(items) != 3 || items[2].State != Refused {
		t.Errorf("declared twice: %d items", len(items))
	}
}

// What is adopted says of VFs what is not as VFs begin, and nothing else; VFs that are alike are one range.
func TestAdoptedSettings(t *testing.T) {
	k := sweptHost(t)
	if err := applyAll(k, "pfs:\n  - select: "+pf+
		"\n    count: 4\n    vfs:\n      - {range: 0, driver: none, vlan: 7, qos: 0, trust: off}\n"+
		"      - {range: 1-2, driver: none}\n      - {range: 3, driver: vfio, trust: on}\n"); err != nil {
		t.Fatal(err)
	}
	s, _, err := newManager(t, k, Options{}).Adopt()
	if err != nil {
		t.Fatal(err)
	}
	yaml, err := s.YAML(nil)
	const want = "pfs:\n  - select: \"mac=52:54:00:00:00:01\"\n    count: 4\n    vfs:\n      - range: 0\n        driver: none\n        vlan: 7\n" +
		"      - range: 1-2\n        driver: none\n      - range: 3\n        driver: vfio\n        trust: on\n"
	if err != nil || string(yaml) != want {
		t.Errorf("%v\n%s", err, yaml)
	}
}
