package iommu

import (
	"errors"
	"maps"
	"reflect"
	"strings"
	"testing"

	"viaduct/internal/host/hosttest"
)

func TestParseSelector(t *testing.T) {
	nicAddress := addr(t, "0000:01:00.0")
	for text, want := range map[string]Selector{
		"0000:01:00.0":    {kind: ByAddress, address: nicAddress},
		"01:00.0":         {kind: ByAddress, address: nicAddress},
		"10000:e1:00.0":   {kind: ByAddress, address: Address{0x10000, 0xe1, 0, 0}},
		"0000:01:00":      {kind: BySlot, address: nicAddress},
		"01:00":           {kind: BySlot, address: nicAddress},
		"enp1s0":          {kind: ByNetdev, value: "enp1s0"},
		"eth0.5@x":        {kind: ByNetdev, value: "eth0.5@x"},
		"fifteencharslon": {kind: ByNetdev, value: "fifteencharslon"},
		"enp1s0/vf3": {kind: ByVF, number: 3, pf: &Selector{text: "enp1s0", kind: ByNetdev,
			value: "enp1s0"}},
		"01:00.0/vf0":            {kind: ByVF, pf: &Selector{text: "01:00.0", kind: ByAddress, address: nicAddress}},
		"8086:10c9":              {kind: ByIDs, ids: [2]uint16{0x8086, 0x10c9}},
		"1AF4:1041":              {kind: ByIDs, ids: [2]uint16{0x1af4, 0x1041}},
		"mac=52:54:00:AB:cd:ef":  {kind: ByMAC, value: "52:54:00:ab:cd:ef"},
		"path=0000:00:01.0/00.0": {kind: ByPath, value: "0000:00:01.0/00.0"},
		"serial=01-02":           {kind: BySerial, value: "01-02"},
		"group=8":                {kind: ByGroup, value: "8", number: 8},
		"group=0":                {kind: ByGroup, value: "0"},
		"class=02":               {kind: ByClass, value: "02"},
		"class=0C03":             {kind: ByClass, value: "0c03"},
		"class=010802":           {kind: ByClass, value: "010802"},
	} {
		want.text = text
		got, err := ParseSelector(text)
		if err != nil || !reflect.DeepEqual(got, want) || got.String() != text {
			t.Errorf("%q: %+v, %v\nwant %+v", text, got, err, want)
		}
		if n, ok := got.Group(); ok != (want.kind == ByGroup) || (ok && n != want.number) {
			t.Errorf("%q: group %d, %v", text, n, ok)
		}
	}

	for _, text := range []string{
		"", ".", "..", "-x", "--dry-run", "a b", strings.Repeat("x", 128), "a\tb", "01:2", "000:01:00", "01:20",
		"0000:01:20.0", "8086:", ":10c9", "8086:10c", "8086:10c9:0",
		"808g:10c9", "8086:*", "enp1s0/", "enp1s0/vf", "enp1s0/vf-1", "enp1s0/vf+1", "enp1s0/vf65536", "enp1s0/3",
		"enp1s0/VF3", "/vf1", "8086:10c9/vf1",
		"enp1s0/vf1/vf2", "a/vf1/x", "group=8/vf1", "=", "=x", "key=value", "mac=", "mac=52:54:00:ab:cd",
		"mac=52:54:00:ab:cd:ef:01",
		"mac=52:54:00:ab:cd:e", "mac=52-54-00-ab-cd-ef", "mac=52:54:00:ab:cd:eg", "path=", "path=00.0",
		"path=eth0/00.0", "serial=", "group=", "group=x",
		"group=-1", "group=+1", "group=2147483648", "class=", "class=2", "class=020", "class=02000000",
		"class=zz", "class=+2",
	} {
		got, err := ParseSelector(text)
		if !errors.Is(err, ErrSyntax) || !reflect.DeepEqual(got, Selector{}) ||
			(len(text) > 2 && !strings.Contains(err.Error(), strings.Trim(text, "\t "))) &&
				!strings.Contains(text, "\t") {
			t.Errorf("%q: %+v, %v", text, got, err)
		}
	}
}

func FuzzSelector(f *testing.F) {
	for _, s := range []string{"0000:01:00.0", "enp1s0/vf3", "8086:10c9", "mac=52:54:00:12:34:56",
		"path=0000:00:01.0/00.0", "serial=1", "group=8", "class=0200"} {
		f.Add(s)
	}
	top, h := richTopology(f), hostOf(f, rich())
	f.Fuzz(func(t *testing.T, s string) {
		sel, err := ParseSelector(s)
		if err != nil {
			if !errors.Is(err, ErrSyntax) {
				t.Fatalf("%q: %v", s, err)
			}
			return
		}
		if sel.String() != s {
			t.Errorf("%q became %q", s, sel)
		}
		found, err := sel.Resolve(h, top)
		if (err == nil) != (len(found) > 0) {
			t.Errorf("%q: %v, %v", s, found, err)
		}
	})
}

func TestResolve(t *testing.T) {
	for kind, h := range hostsOf(t, rich()) {
		top, err := Scan(h)
		if err != nil {
			t.Fatal(err)
		}

		for text, want := range map[string]string{
			"0000:01:00.0": "0000:01:00.0", "01:10.2": "0000:01:10.2", "eth0b": "0000:01:00.0", "ens3": "0000:00:03.0",
			"eth0/vf0": "0000:01:10.0", "01:00.0/vf1": "0000:01:10.2", "8086:10ca": "0000:01:10.0 0000:01:10.2",
			"144d:a808":             "10000:e1:00.0",
			"mac=52:54:00:00:00:02": "0000:01:00.0", "mac=52:54:00:00:00:03": "0000:00:03.0",
			"path=0000:00:01.0/00.0": "0000:01:00.0", "path=0000:00:01.0/00.0/vf1": "0000:01:10.2",
			"path=0000:00:03.0":              "0000:00:03.0",
			"path=00:01.0/00.0":              "0000:01:00.0",
			"path=10000:E1:00.0":             "10000:e1:00.0",
			"serial=01-02-03-04-05-06-07-08": "0000:01:00.0",
			"group=2":                        "0000:01:10.0",
			"group=40":                       "10000:e1:00.0 83b8f4f2-509f-382f-3c1e-e6bfe0fa1001 arm-smmu-test",
			"class=02":                       "0000:01:10.0 0000:01:00.0 0000:00:03.0 0000:01:10.2",
			"class=0108":                     "10000:e1:00.0",
			"class=010802":                   "10000:e1:00.0",
		} {
			sel, err := ParseSelector(text)
			if err != nil {
				t.Fatal(err)
			}
			devices, err := sel.Resolve(h, top)
			if got := strings.Join(deviceNames(devices), " "); got != want || err != nil {
				t.Errorf("%s: %s: %q, %v; want %q", kind, text, got, err, want)
			}
			one, err := sel.One(h, top)
			if names := strings.Fields(want); len(names) > 1 {
				e := &AmbiguousError{text, names}
				if got, ok := errors.AsType[*AmbiguousError](err); !ok || !reflect.DeepEqual(got, e) || one != nil {
					t.Errorf("%s: %s: %v, %v; want %v", kind, text, one, err, e)
				}
			} else if err != nil || one != devices[0] {
				t.Errorf("%s: %s: %v, %v", kind, text, one, err)
			}
		}

		vfs := []string{"0000:01:00.0/vf0", "0000:01:00.0/vf1"}
		ids, classes := []string{
			"144d:a808",
			"1af4:1041",
			"8086:10c9",
			"8086:10ca",
			"8086:3420",
		}, []string{
			"class=0108",
			"class=0200",
			"class=0604",
		}

		for text, want := range map[string]*NotFoundError{
			"0000:09:00.0": {What: "no such device",
				Candidates: []string{"0000:00:01.0", "0000:00:03.0", "0000:01:00.0", "0000:01:10.0", "0000:01:10.2",
					"10000:e1:00.0"}},
			"eth9": {What: "no network interface of a PCI device has this name",
				Candidates: []string{"ens3", "eth0", "eth0b"}},
			"lo": {What: "no network interface of a PCI device has this name",
				Candidates: []string{"ens3", "eth0", "eth0b"}},
			"8086:ffff": {What: "no device has these ids", Candidates: ids},
			"0000:0000": {What: "no device has these ids", Candidates: ids}, // the mdev has none
			"eth0/vf2":  {What: "no such VF", Candidates: vfs},
			"eth9/vf0": {Selector: "eth9", What: "no network interface of a PCI device has this name",
				Candidates: []string{"ens3", "eth0", "eth0b"}},
			"ens3/vf0":              {What: "0000:00:03.0 is not a PF (it has no SR-IOV capability)"},
			"mac=52:54:00:00:00:09": {What: "no device has this permanent MAC address (one on a vfio driver that viaduct did not take shows none)", Candidates: []string{"mac=52:54:00:00:00:01", "mac=52:54:00:00:00:02", "mac=52:54:00:00:00:03"}},
			"path=0000:00:09.0": {What: "no device is at this place",
				Candidates: []string{"path=0000:00:01.0", "path=0000:00:01.0/00.0", "path=0000:00:01.0/00.0/vf0",
					"path=0000:00:01.0/00.0/vf1", "path=0000:00:03.0", "path=10000:e1:00.0"}},
			"serial=ff": {What: "no device has this serial number (only root can read them)",
				Candidates: []string{"serial=01-02-03-04-05-06-07-08"}},
			"class=0300": {What: "no device is of this class", Candidates: classes},
			"class=00":   {What: "no device is of this class", Candidates: classes}, // nor a class
			"group=0": {What: "no such IOMMU group",
				Candidates: []string{"group=1", "group=2", "group=11", "group=30", "group=40"}},
			"group=30": {What: "the group is empty"},
		} {
			if want.Selector == "" {
				want.Selector = text
			}
			sel, err := ParseSelector(text)
			if err != nil {
				t.Fatal(err)
			}
			_, err = sel.One(h, top)
			got, ok := errors.AsType[*NotFoundError](err)
			if ok && sel.kind == ByAddress {
				want.Like = sel.address.String()
			}
			if !ok || !reflect.DeepEqual(got, want) || !errors.Is(err, ErrNotFound) {
				t.Errorf("%s: %s: %#v, want %#v", kind, text, err, want)
			}
		}
	}
}

func TestResolveWithout(t *testing.T) {
	tree := join(pci("pci0000:00/0000:00:03.0", nic, map[string]string{"sriov_totalvfs": "7\n"}))
	h := hostOf(t, tree)
	top, err := Scan(h)
	if err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]string{
		"group=1":     "group=1: this host has no IOMMU groups",
		"00:03.0/vf0": "00:03.0/vf0: no such VF; none is enabled on this host (viaduct vf create 00:03.0 N)",
	} {
		sel, err := ParseSelector(text)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := sel.Resolve(h, top); err == nil || err.Error() != want {
			t.Errorf("%v, want %s", err, want)
		}
	}
}

// A word names devices by what they are on a command line alone, and an interface of that name wins.
func TestWords(t *testing.T) {
	for name, h := range map[string]*Host{"captured": hostOf(t, rich())} {
		top, err := Scan(h)
		if err != nil {
			t.Fatal(err)
		}
		for text, want := range map[string]string{
			"nic": "0000:01:10.0 0000:01:00.0 0000:00:03.0 0000:01:10.2", "nvme": "10000:e1:00.0",
			"virtio":  "0000:00:03.0",
			"samsung": "10000:e1:00.0", "eth0b": "0000:01:00.0", "01:00": "0000:01:00.0",
		} {
			sel, err := ParseArgument(text)
			if err != nil {
				t.Fatal(err)
			}
			devices, err := sel.Resolve(h, top)
			if got := strings.Join(deviceNames(devices), " "); got != want || err != nil {
				t.Errorf("%s: %s: %q, %v; want %q", name, text, got, err, want)
			}
		}
		for text, says := range map[string]string{
			"gpu": "no device is one", "nvida": "did you mean nvidia?", "eth9": "did you mean eth0?",
		} {
			sel, err := ParseArgument(text)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := sel.Resolve(h, top); !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), says) {
				t.Errorf("%s: %v, want %q", text, err, says)
			}
		}
		if sel, err := ParseSelector("nic"); err != nil {
			t.Fatal(err)
		} else if _, err := sel.Resolve(h, top); !errors.Is(err, ErrNotFound) {
			t.Errorf("a file's nic: %v", err)
		}
	}

	tree := rich()
	maps.Copy(tree, hosttest.Tree{"sys/class/net/nic": "-> ../../devices/virtual/net/nic"})
	h := hostOf(t, tree)
	top, err := Scan(h)
	if err != nil {
		t.Fatal(err)
	}

	if sel, err := ParseArgument("nic"); err != nil {
		t.Fatal(err)
	} else if _, err := sel.Resolve(h, top); !errors.Is(err, ErrNotFound) {
		t.Errorf("a bridge called nic: %v", err)
	}
}

func TestClassName(t *testing.T) {
	for class, want := range map[uint32]string{
		0x010802: "nvme", 0x020000: "ethernet", 0x030200: "3d", 0x038000: "display", 0x060400: "bridge",
		0x0c0330: "usb", 0x160000: "1600",
	} {
		if got := ClassName(class); got != want {
			t.Errorf("%06x: %q, want %q", class, got, want)
		}
	}
}

func TestSelectorErrorTexts(t *testing.T) {
	names := strings.Fields("a b c d e f g h i j k l m n")
	for _, c := range []struct{ err, want string }{
		{(&AmbiguousError{"x", names[:2]}).Error(), "x matches 2 devices; name one of them: a, b"},
		{(&AmbiguousError{"x", names}).Error(),
			"x matches 14 devices; name one of them: a, b, c, d, e, f, g, h, i, j, k, l and 2 more"},
		{(&NotFoundError{Selector: "x", What: "no such thing", Candidates: names[:4]}).Error(),
			"x: no such thing; there is a, b, c, d"},
		{(&NotFoundError{Selector: "x", What: "no such thing", Candidates: names[:12]}).Error(),
			"x: no such thing; there are 12 others, e.g. a"},
		{(&NotFoundError{Selector: "ens1", What: "no such thing",
			Candidates: strings.Fields("a b c eth0 ens1f0")}).Error(), "ens1: no such thing; did you mean ens1f0?"},
		{(&NotFoundError{Selector: "x", What: "no such thing"}).Error(), "x: no such thing"},
	} {
		if c.err != c.want {
			t.Errorf("%q, want %q", c.err, c.want)
		}
	}
	if errors.Is(&NotFoundError{}, ErrSyntax) {
		t.Error("matches what it is not")
	}
}
