package vmm

import (
	"encoding/json"
	"encoding/xml"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"viaduct/internal/shell"
	"viaduct/iommu"
)

var update = flag.Bool("update", false, "write the golden files anew")

func address(t *testing.T, s string) iommu.Address {
	t.Helper()
	a, err := iommu.ParseAddress(s)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// web is a guest with a VF of a NIC on a VLAN and a disk's, whose name and bridge need care everywhere.
func web(t *testing.T) *Guest {
	return &Guest{Name: "web&1", Devices: []Device{
		{
			Address: address(t, "0000:01:10.2"),
			Group:   24,
			Nodes:   []string{"/dev/vfio/24", "/dev/vfio/devices/vfio3"},
			VF:      true,
			NIC:     true,
			MAC:     "52:54:00:aa:00:01",
			VLAN:    "100",
		},
		{Address: address(t, "10000:e1:00.0"), Group: 31, Nodes: []string{"/dev/vfio/31", "/dev/vfio/devices/vfio4"}},
	}}
}

// TestFormats: what each VMM is told, word for word.
func TestFormats(t *testing.T) {
	for i := range Formats {
		f := &Formats[i]
		for _, kind := range []string{"", "-failover", "-movable", "-incoming"} {
			if kind != "" && !f.Standby || f.Text != nil && (kind == "-movable" || kind == "-incoming") {
				continue
			}
			name := f.Name + kind
			g := web(t)
			switch kind {
			case "-failover":
				g.Standby = "br,0"
			case "-movable":
				g.Movable, g.Socket = true, "/run/viaduct/qmp-web.sock"
			case "-incoming":
				g.Standby, g.Socket, g.Absent = "br,0", "/run/viaduct/qmp-web.sock", true
			}
			got, err := f.Print(g)
			if err != nil {
				t.Fatal(err)
			}
			file := filepath.Join("testdata", name+".golden")
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil || string(want) != got {
				t.Errorf("%s (%v):\n%s\nwant\n%s", file, err, got, want)
			}
		}
	}
}

// TestWellFormed: XML and JSON are some, whatever a guest is called.
func TestWellFormed(t *testing.T) {
	g := web(t)
	g.Name, g.Standby = `a'b"<c>`, `<b>&`
	text, err := libvirt(g)
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range []string{"<devices>" + text + "</devices>", LibvirtNetwork(g.Name,
		[]iommu.Address{g.Devices[0].Address})} {
		for d := xml.NewDecoder(strings.NewReader(x)); ; {
			if _, err := d.Token(); err != nil {
				if err.Error() != "EOF" {
					t.Errorf("%v:\n%s", err, x)
				}
				break
			}
		}
	}
	if text, err = cdi(g); err != nil || !json.Valid([]byte(text)) {
		t.Errorf("CDI: %v\n%s", err, text)
	}
	if got := shell.Quote("it's"); got != `'it'\''s'` {
		t.Errorf("quoted: %s", got)
	}
}
