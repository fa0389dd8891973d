package node

import (
	"os"
	"path/filepath"
	"testing"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

// A link is lost when the PF's interface is up and has none; what cannot be told, and what the host keeps down, is no
// fault.
func TestLinkDown(t *testing.T) {
	k := hosttest.NewSmallLab(t, "0000:01:00.0")
	pf := &iommu.Device{Netdevs: []string{"eth0"}}
	dir := filepath.Join(k.Dir(), "sys/class/net/eth0")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	h := &iommu.Host{Host: k.Host()}
	if down := linkDown(h, pf); down != "" {
		t.Errorf("without files: %s", down)
	}
	for _, c := range []struct{ state, flags, want string }{
		{"up", "0x1003", ""}, {"down", "0x1003", "eth0"}, {"lowerlayerdown", "0x1003", "eth0"}, {"down", "0x1002", ""},
		{"unknown", "0x1003", ""}, {"down", "none", ""},
	} {
		for name, text := range map[string]string{"operstate": c.state, "flags": c.flags} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text+"\n"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if down := linkDown(h, pf); down != c.want {
			t.Errorf("%+v: %q", c, down)
		}
	}
}

// A function's root bus is the folder that it is below.
func TestRoot(t *testing.T) {
	k := hosttest.NewLab(t, nil)
	h := &iommu.Host{Host: k.Host()}
	topology, err := iommu.Scan(h)
	if err != nil {
		t.Fatal(err)
	}
	for _, at := range []string{"0000:01:00.0", "0000:07:01.0"} {
		d, err := topology.Find(address(t, at))
		if err != nil {
			t.Fatal(err)
		}
		if root := rootOf(h, d); root != "pci0000:00" {
			t.Errorf("%s is below %q", at, root)
		}
	}
}
