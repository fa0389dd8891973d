package declared

import (
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// The devices of a group are taken together: what their entries say must agree, and what one leaves open another says.
func TestDevicesOfGroup(t *testing.T) {
	for name, c := range map[string]struct {
		text  string
		state []State
		says  []string // of each, in its error, notes or words
	}{
		"alone": {"[{select: " + nic + "}]", []State{Differs}, []string{"taken for guests, from e1000"}},
		"both": {"[{select: " + nic + "}, {select: " + beside + "}]", []State{Differs, Differs},
			[]string{"", "goes with " + nic}},
		"twice": {"[{select: " + nic + "}, {select: path=0000:00:08.0/01.0}]", []State{Differs, Refused},
			[]string{"", "already declared at"}},
		"one driver": {"[{select: " + nic + "}, {select: " + beside + ", driver: vfio-pci}]",
			[]State{Differs, Differs}, []string{"on vfio-pci", ""}},
		"two drivers": {"[{select: " + nic + ", driver: vfio-pci}, {select: " + beside + ", driver: mlx5_vfio_pci}]",
			[]State{Differs, Refused}, []string{"", "they need the same driver"}},
		"same driver": {"[{select: " + nic + ", driver: vfio-pci}, {select: " + beside + ", driver: vfio-pci}]",
			[]State{Differs, Differs}, []string{"", "both are in"}},
		"one owner": {"[{select: " + nic + "}, {select: " + beside + ", node_owner: \"7\"}]",
			[]State{Differs, Differs}, []string{"nodes owned by 7", ""}},
		"two owners": {"[{select: " + nic + ", node_owner: \"8\"}, {select: " + beside + ", node_owner: \"7\"}]",
			[]State{Differs, Refused}, []string{"", "they need the same node_owner"}},
		"same owner": {"[{select: " + nic + ", node_owner: \"7\"}, {select: " + beside + ", node_owner: \"7\"}]",
			[]State{Differs, Differs}, []string{"", "goes with"}},
		"no owner": {"[{select: " + nic + ", node_owner: nobody-at-all}]", []State{Refused},
			[]string{"node_owner: "}},
		"a bridge": {"[{select: \"0000:00:08.0\"}]", []State{Refused}, []string{"bridge"}},
	} {
		m := newManager(t, sweptHost(t), Options{})
		items := plan(t, m, "devices: "+c.text+"\n")
		for n, i := range items {
			said := strings.Join(append(i.Notes, i.Words()...), "; ")
			if i.Err != nil {
				said += i.Err.Error()
			}
			if i.State != c.state[n] || !strings.Contains(said, c.says[n]) {
				t.Errorf("%s: item %d: %s: %s", name, n, i.State, said)
			}
		}
	}
}

// What joined a device's group since it was declared is not taken along, unless that is accepted; who owns its nodes is
// compared while it stays where it is.
func TestDeviceLater(t *testing.T) {
	const text = "devices:\n  - {select: " + nic + ", node_owner: \"1000\"}\n"
	k := sweptHost(t)
	writeFile(t, k, "run/udev/control", "")
	if err := applyAll(k, text); err != nil {
		t.Fatal(err)
	}
	m := newManager(t, k, Options{})
	if i := plan(t, m, text)[0]; i.State != OK {
		t.Errorf("%s, %v, %q", i.State, i.Err, i.Steps)
	}
	i := plan(t, m, strings.ReplaceAll(text, "1000", "1001"))[0]
	steps := strings.Join(bind.Commands(i.Steps), "; ")
	if i.State != Differs || !strings.HasPrefix(steps, "chown 1001 /dev/vfio/") ||
		strings.Join(i.Words(), "") != "stays on vfio-pci, nodes owned by 1001also takes: other" {
		t.Errorf("another owner: %s, %v, %q, %q", i.State, i.Err, steps, i.Words())
	}

	if err := undoAll(k); err != nil {
		t.Fatal(err)
	}
	was := known{}
	if ok, err := m.state.Get(knownKey(nic), &was); !ok || err != nil || len(was.Group) != 2 {
		t.Fatal(was, err)
	}
	was.Group = was.Group[1:]
	if slices.Contains(was.Group, "0000:00:08.0/01.0") {
		t.Fatal(was.Group)
	}
	if err := m.state.Put(knownKey(nic), was); err != nil {
		t.Fatal(err)
	}
	if i := plan(t, newManager(t, k, Options{}), text)[0]; i.State != Changed ||
		!strings.Contains(i.Err.Error(), "its group now includes devices that the host uses: "+nic) ||
		len(i.Steps) > 0 {
		t.Errorf("more in its group: %s, %v, %q", i.State, i.Err, i.Steps)
	}
	if i := plan(t, newManager(t, k, Options{Accept: true}), text)[0]; i.State != Differs {
		t.Errorf("accepted: %s, %v", i.State, i.Err)
	}
}

// What a VMM has on a driver of its own is left as it is.
func TestOwnDriverIsLeft(t *testing.T) {
	k := sweptHost(t)
	o := Options{Leased: func() (map[iommu.Address]Guest, error) {
		return map[iommu.Address]Guest{mustParse(t, nic): {OwnDriver: true}}, nil
	}}
	for _, name := range []string{nic, beside} {
		if i := plan(t, newManager(t, k, o), "devices: [{select: "+name+"}]\n")[0]; i.State != OK || len(i.Steps) > 0 {
			t.Errorf("%s: %s, %v, %q", name, i.State, i.Err, i.Steps)
		}
	}
}

// While an apply waits to be confirmed, what later ones change goes back to what it was before the first of them, and
// nothing of that is forgotten.
func TestUndoOfTrials(t *testing.T) {
	k := sweptHost(t)
	before := lookAt(t, k)
	for _, text := range []string{few, many} {
		err := with(k, Options{}, func(ctx context.Context, m *Manager) error {
			if _, _, err := m.Tries(parse(t, text), time.Hour, false); err != nil {
				return err
			}
			return apply(t, m, text)
		})
		if err = errors.Join(err, Of(&iommu.Host{Host: k.Host()}).Clean()); err != nil {
			t.Fatal(err)
		}
	}
	all, known, err := Of(&iommu.Host{Host: k.Host()}).Last()
	if want := []iommu.Address{mustParse(t, pf), mustParse(t, nic), mustParse(t, nic), mustParse(t, beside)}; !known ||
		err != nil || !slices.Equal(all, want) {
		t.Errorf("it has changed %v, %v, %v", all, known, err)
	}
	if err := undoAll(k); err != nil {
		t.Fatal(err)
	}
	if now := lookAt(t, k); !now.same(before, before) || now.undo {
		t.Errorf("undone, it is %s\nwas %s", now, before)
	}
}

// What a killed apply left is put back once, unless another viaduct is at work on it; a record that cannot be read is
// told, one that has ended is not.
func TestRecoverRecords(t *testing.T) {
	k := sweptHost(t)
	put := func(text string) { writeFile(t, k, "run/viaduct/"+applying+nic+".json", text) }
	m := newManager(t, k, Options{})
	put("{")
	if r, err := m.Recover(); err != nil || len(r) != 1 || r[0].Err == nil ||
		!strings.Contains(r[0].What, "cannot be read") {
		t.Errorf("%+v, %v", r, err)
	}

	put(`{"device":"` + nic + `","release":["` + nic + `"]}`)
	if interrupted, err := m.Interrupted(); !interrupted || err != nil {
		t.Errorf("%v, %v", interrupted, err)
	}

	other := newManager(t, k, Options{})
	d, err := other.topology.Find(mustParse(t, nic))
	if err := errors.Join(err, other.handle.Lock(t.Context(), []*iommu.Device{d})); err != nil {
		t.Fatal(err)
	}
	if r, err := m.Recover(); err != nil || len(r) > 0 {
		t.Errorf("while another viaduct has it: %+v, %v", r, err)
	}

	other.handle.Close()
	if r, err := m.Recover(); err != nil || len(r) != 1 || r[0].Err != nil || r[0].Device.String() != nic {
		t.Errorf("%+v, %v", r, err)
	}
	if r, err := m.Recover(); err != nil || len(r) > 0 {
		t.Errorf("again: %+v, %v", r, err)
	}
	if interrupted, err := m.Interrupted(); interrupted || err != nil {
		t.Errorf("%v, %v", interrupted, err)
	}
	if _, err := os.Stat(filepath.Join(k.Dir(), "run/viaduct", applying+nic+".json")); err == nil {
		t.Error("its record is left")
	}
}

// Each thing that changes of a PF is a line, and several devices are counted by what people call them.
func TestWordsOfEach(t *testing.T) {
	for want, p := range map[string]*sriov.Plan{
		"":                                {Have: 2, Want: 2},
		"removes its 2 VFs":               {Have: 2},
		"removes its 1 VF":                {Have: 1},
		"makes 1 VF":                      {Want: 1},
		"removes its 2 VFs and makes 3":   {Have: 2, Want: 3},
		"brings eth0 up":                  {Up: []sriov.Link{{Name: "eth0"}}},
		"raises the MTU of e from 1 to 2": {Raise: []sriov.MTU{{Name: "e", From: 1, To: 2}}},
		"turns hw-tc-offload of a on|turns hw-tc-offload of b off": {Offload: []sriov.Offload{{Name: "a", On: true},
			{Name: "b"}}},
		"sets the e-switch's mode to switchdev|sets the e-switch's inline-mode to link|sets the e-switch's encap to none": {
			Eswitch: sriov.Eswitch{Mode: "switchdev", Inline: "link", Encap: "none"},
		},
	} {
		if got := strings.Join(countWords(p), "|"); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}

	of := func(classes ...uint32) []*iommu.Device {
		var out []*iommu.Device
		for _, c := range classes {
			out = append(out, &iommu.Device{PCI: true, ID: iommu.ID{Class: c}})
		}
		return out
	}

	for want, devices := range map[string][]*iommu.Device{
		"NIC": of(0x020000), "2 NICs, GPU": of(0x020000, 0x030000, 0x020000), "2 GPUs": of(0x030000, 0x030200),
		"2 NVMes, USB, SMBus": of(0x010802, 0x010802, 0x0c0330, 0x0c0500), "2 SATA": of(0x010601, 0x010601),
		"audio": of(0x040300), "x": {{Name: "x"}},
	} {
		if got := nouns(devices); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// A boot takes no disk or NIC that may be one that protect names and that is not known by that yet, nor any NIC before it
// is known which of them the host needs; nothing but a boot is so careful.
func TestBootIsCareful(t *testing.T) {
	const unseen = "\"mac=52:54:00:99:99:99\""
	for name, c := range map[string]struct {
		boot     bool
		protect  string
		driver   bool
		class    uint32
		vfio     bool
		refused  string // "" if it is taken
		recorded bool   // something was written down of what carries the host
	}{
		"not a boot":               {false, unseen, false, 0x020000, false, "", false},
		"may be the one":           {true, pf + ", " + unseen, false, 0x020000, false, "it may be this one", false},
		"may be the disk":          {true, pf + ", " + unseen, false, 0x010802, false, "it may be this one", false},
		"has a driver":             {true, pf + ", " + unseen, true, 0x020000, false, "", false},
		"is something else":        {true, pf + ", " + unseen, false, 0x030000, false, "", false},
		"all are seen":             {true, pf, false, 0x020000, false, "", false},
		"nothing is known":         {true, "", true, 0x020000, false, "does not know which NICs", false},
		"it was looked":            {true, "", true, 0x020000, false, "", true},
		"nothing is known of GPUs": {true, "", true, 0x030000, false, "", false},
		"taken already":            {true, "", true, 0x020000, true, "", false},
	} {
		m := newManager(t, sweptHost(t), Options{Boot: c.boot})
		if c.recorded {
			if err := m.state.Put(protectedKey, []protected{}); err != nil {
				t.Fatal(err)
			}
		}

		g, err := m.guard(parse(t, "pfs: []\nprotect: ["+c.protect+"]\n"))
		if err != nil {
			t.Fatal(err)
		}

		d := &iommu.Device{Name: nic, ID: iommu.ID{Class: c.class}, PCI: true, VFIO: c.vfio}
		if c.driver {
			d.Driver = "e1000"
		}
		if err := g.take([]*iommu.Device{d}); (err == nil) != (c.refused == "") || err != nil &&
			!strings.Contains(err.Error(), c.refused) {
			t.Errorf("%s: %v", name, err)
		}

		vf := *d
		vf.PhysFn = &iommu.Address{}
		if err := g.take([]*iommu.Device{&vf}); name == "nothing is known" && err != nil {
			t.Errorf("%s: a VF: %v", name, err)
		}
	}
}

// What was recorded is known again by its own numbers wherever it is, and else by its place; a function of a card by the
// card's number and its own.
func TestSame(t *testing.T) {
	k := sweptHost(t)
	m := newManager(t, k, Options{})
	d := found(t, m)
	now := identify(t, m, d)
	if len(now.MACs) == 0 || now.Path == "" {
		t.Fatal(now)
	}

	other := map[string]string{"x": "02:00:00:00:ff:ff"}
	for name, c := range map[string]struct {
		change func(*iommu.Identity)
		want   bool
	}{
		"as it was":            {func(*iommu.Identity) {}, true},
		"elsewhere":            {func(id *iommu.Identity) { id.Path = "0000:00:1f.0/00.0" }, true},
		"other ids":            {func(id *iommu.Identity) { id.ID.Device++ }, false},
		"another address":      {func(id *iommu.Identity) { id.MACs = other }, false},
		"no address then":      {func(id *iommu.Identity) { id.MACs = nil }, true},
		"none then, elsewhere": {func(id *iommu.Identity) { id.MACs, id.Path = nil, "0000:00:1f.0/00.0" }, false},
		"another number":       {func(id *iommu.Identity) { id.Serial = "00-00" }, now.Serial == ""},
		"function of the card": {func(id *iommu.Identity) { id.MACs, id.Path = nil, "0000:00:1f.0/00.0" },
			now.Serial != ""},
		"other function of a card": {func(id *iommu.Identity) { id.MACs, id.Path = nil, "0000:00:1f.0/00.1" }, false},
	} {
		id := now
		id.MACs = maps.Clone(now.MACs)
		c.change(&id)
		if got, err := m.Same(&id, d); got != c.want || err != nil {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

// What the change of an item would take from somebody refuses the item before anything is changed, and is a note where it
// is forced.
func TestCheckRefuses(t *testing.T) {
	const vf = "0000:01:10.0"
	pfs := func(first, more string) string {
		return "pfs:\n  - select: " + pf + "\n    count: 2\n    vfs: [{range: 0, " + first +
			"}, {range: 1, driver: none}]\n" + more
	}

	usual := pfs("driver: vfio, vlan: 7", "")
	open := holder.Process
	for name, c := range map[string]struct {
		text  string
		force []holder.Kind
		state State
		says  string
	}{
		"nothing changes": {usual, nil, OK, ""},
		"a NIC with a route": {usual + "devices:\n  - select: " + nic + "\n", nil, Refused,
			"carries the default route"},
		"forced": {usual + "devices:\n  - select: " + nic + "\n", []holder.Kind{holder.Route},
			Differs, ""},
		"settings": {pfs("driver: vfio, vlan: 8", ""), nil, Refused, vf + " is open in process 4711"},
		"settings, forced": {pfs("driver: vfio, vlan: 8", ""), []holder.Kind{open}, Differs,
			"its settings would change while " + vf},
		"settings of another": {strings.Replace(usual, "driver: none", "driver: none, vlan: 9", 1), nil, Differs, ""},
		"home":                {pfs("driver: home, vlan: 7", ""), nil, Refused, vf + " is open in process 4711"},
		"fewer": {strings.Replace(strings.Replace(usual, "count: 2", "count: 1", 1),
			", {range: 1, driver: none}", "", 1), nil, Refused, vf + " is open in process 4711"},
	} {
		k := sweptHost(t)
		if err := applyAll(k, usual); err != nil {
			t.Fatal(err)
		}
		k.ChangeNet(func(n *hosttest.Network) { n.Routes = []hosttest.Route{{To: "default", Over: []string{"ens1"}}} })
		k.Process(4711, "qemu", "/dev/vfio/devices/vfio0")
		m := newManager(t, k, Options{Force: c.force})
		items := plan(t, m, c.text)
		k.Log = nil
		m.Check(items)
		i := items[len(items)-1]
		said := strings.Join(i.Notes, "; ")
		if i.Err != nil {
			said += i.Err.Error()
		}
		if i.State != c.state || !strings.Contains(said, c.says) ||
			(i.State == Refused) != errors.Is(i.Err, holder.ErrRefused) || len(k.Log) > 0 {
			t.Errorf("%s: %s: %s; written %q", name, i.State, said, k.Log)
		}
	}
}
