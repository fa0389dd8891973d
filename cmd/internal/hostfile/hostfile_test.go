package hostfile

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"reflect"
	"strings"
	"testing"

	"viaduct/sriov"
)

var update = flag.Bool("update", false, "write testdata/malformed anew")

const golden = "testdata/malformed"

// Each case of the golden file is a name, a file, and what is said of it.
func TestMalformed(t *testing.T) {
	all, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}

	var out []string
	cases := strings.Split(strings.TrimPrefix(string(all), "== "), "\n== ")
	if len(cases) < 40 {
		t.Fatalf("%d cases", len(cases))
	}

	for _, c := range cases {
		name, rest, _ := strings.Cut(c, "\n")
		content, want, ok := strings.Cut(rest, "=>\n")
		if !ok {
			t.Fatalf("%s: no =>", name)
		}
		_, err := Parse("host.yaml", []byte(strings.ReplaceAll(content, `\x01`, "\x01")))
		if err == nil {
			t.Errorf("%s: it was taken", name)
			continue
		}
		got := err.Error()
		if !*update && got != strings.TrimSpace(want) {
			t.Errorf("%s:\n%s\nwant\n%s", name, got, want)
		}
		for line := range strings.SplitSeq(got, "\n") {
			var l, k int
			if n, err := fmt.Sscanf(line, "host.yaml:%d:%d: ", &l, &k); n != 2 {
				t.Errorf("%s: %q does not say where: %v", name, line, err)
			}
		}
		out = append(out, "== "+name+"\n"+content+"=>\n"+got+"\n")
	}

	if *update {
		if err := os.WriteFile(golden, []byte(strings.Join(out, "\n")), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

const example = `protect:
  - "path=0000:00:02.0"
  - class=0108
pfs:
  - select: "mac=52:54:00:12:34:56"
    count: 6
    mtu: 9000
    vfs:
      - range: 0-3
        driver: vfio
        pool: fast
        mac: stable
        vlan: 100+index
        trust: on
      - range: 4
        driver: home
        max_tx_rate: 1000
  - select: "8086:10c9 path=0000:00:01.0/00.1"
    optional: true
    count: 0
devices:
  - select: "0000:03:00.0"
    driver: vfio
    node_owner: "qemu:kvm"
`

func TestParse(t *testing.T) {
	h, err := Parse("host.yaml", []byte(example))
	if err != nil {
		t.Fatal(err)
	}
	vfs := h.PFs[0].Each()
	if want := (sriov.Settings{sriov.MAC: "stable", sriov.VLAN: "102", sriov.Trust: "on"}); !reflect.DeepEqual(
		vfs[2].Settings,
		want,
	) ||
		vfs[2].Pool != "fast" ||
		vfs[2].Use != sriov.UseVFIO {
		t.Errorf("VF 2: %+v, want %v", vfs[2], want)
	}
	if vfs[4].Use != sriov.UseHome || vfs[4].Settings[sriov.MaxRate] != "1000" || vfs[4].Pool != "" {
		t.Errorf("VF 4: %+v", vfs[4])
	}
	if vfs[5].Use != sriov.UseNone || len(vfs[5].Settings) != 0 {
		t.Errorf("VF 5, which nothing is said of: %+v", vfs[5])
	}
	if at := h.PFs[0].VFs[1].At; at != (Pos{"host.yaml", 15, 9}) {
		t.Errorf("the second range is at %v", at)
	}
	for _, empty := range []string{"", "\n", "# nothing\n", "---\n", "{}\n", "pfs:\n"} {
		if h, err := Parse("host.yaml", []byte(empty)); err != nil || len(h.PFs)+len(h.Devices)+len(h.Protect) > 0 {
			t.Errorf("%q: %+v, %v", empty, h, err)
		}
	}
}

// What is written is what was read.
func TestYAML(t *testing.T) {
	h, err := Parse("host.yaml", []byte(example))
	if err != nil {
		t.Fatal(err)
	}
	text, err := h.YAML(map[string]string{"0000:03:00.0": "a disk"})
	if err != nil {
		t.Fatal(err)
	}
	want := strings.Replace(example, `  - select: "0000:03:00.0"`, "  - # a disk\n    select: \"0000:03:00.0\"", 1)
	if string(text) != want {
		t.Errorf("%s\nwant\n%s", text, want)
	}
	again, err := Parse("host.yaml", text)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(again.PFs[0].Each()[1].Settings, h.PFs[0].Each()[1].Settings) {
		t.Errorf("%+v, was %+v", again, h)
	}
}

// The schema has each key that Parse takes, and no other.
func TestSchema(t *testing.T) {
	text, err := json.Marshal(Schema())
	if err != nil {
		t.Fatal(err)
	}

	var s struct {
		AdditionalProperties bool
		Properties           map[string]struct {
			Items struct {
				Type       string
				Properties map[string]struct {
					Description string
					Enum        []string
					Maximum     int
				}
				Required []string
			}
		}
	}

	if err := json.Unmarshal(text, &s); err != nil {
		t.Fatal(err)
	}

	pf := s.Properties["pfs"].Items
	if s.AdditionalProperties || len(s.Properties) != 4 ||
		!reflect.DeepEqual(pf.Required, []string{"count"}) ||
		s.Properties["protect"].Items.Type != "string" {
		t.Errorf("%s", text)
	}

	if e := pf.Properties["eswitch"].Enum; !reflect.DeepEqual(e, []string{"legacy", "switchdev"}) ||
		pf.Properties["count"].Maximum != 65535 {
		t.Errorf("eswitch %v, count %+v", e, pf.Properties["count"])
	}

	for key, p := range pf.Properties {
		if p.Description == "" {
			t.Errorf("%s has no description", key)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(example))
	f.Add([]byte("a: &a [*a]\n"))
	f.Add([]byte("pfs: &p\n  - select: x\n    count: 3\n    vfs: [{range: 1, vlan: 3+index}]\ndevices: *p\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := Parse("f", b)
		for i := range h.PFs {
			if err == nil && len(h.PFs[i].Each()) != h.PFs[i].Count {
				t.Errorf("%d VFs instead of %d", len(h.PFs[i].Each()), h.PFs[i].Count)
			}
		}
		if err != nil && err.Error() == "" {
			t.Error("an error that says nothing")
		}
	})
}

func BenchmarkParse(b *testing.B) {
	var text strings.Builder
	text.WriteString("pfs:\n")
	for pf := range 100 {
		fmt.Fprintf(&text, "  - select: path=0000:00:01.0/%02x.0\n    count: 100\n    vfs:\n", pf)
		for vf := range 100 {
			fmt.Fprintf(&text,
				"      - range: %d\n        driver: vfio\n        mac: stable\n        vlan: %d\n        trust: on\n",
				vf, vf)
		}
	}
	for b.Loop() {
		if _, err := Parse("f", []byte(text.String())); err != nil {
			b.Fatal(err)
		}
	}
}
