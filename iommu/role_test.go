package iommu_test

import (
	"testing"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

// What becomes of a device with its group goes by its class, unless somebody says otherwise.
func TestRole(t *testing.T) {
	for class, want := range map[uint32]iommu.Role{
		0x060000: iommu.RoleCompanion, 0x060100: iommu.RoleCompanion, 0x068000: iommu.RoleCompanion,
		0x060400: iommu.RolePort, 0x060700: iommu.RolePort, 0x058000: iommu.RoleCompanion,
		0x050000: iommu.RoleGuest, 0x080600: iommu.RoleCompanion, 0x088000: iommu.RoleCompanion,
		0x0c0500: iommu.RoleCompanion, 0x0c8000: iommu.RoleCompanion, 0x0c0330: iommu.RoleGuest,
		0x030000: iommu.RoleGuest, 0x040300: iommu.RoleGuest, 0x020000: iommu.RoleGuest, 0x0b4000: iommu.RoleGuest,
	} {
		d := iommu.Device{PCI: true, ID: iommu.ID{Class: class}}
		if got := d.Role(); got != want {
			t.Errorf("class %06x is %s, want %s", class, got, want)
		}
		d.As = iommu.RoleGuest
		if got := d.Role(); want == iommu.RoleCompanion && got != iommu.RoleGuest {
			t.Errorf("class %06x, called a guest's, is %s", class, got)
		}
	}
	vf := iommu.Device{PCI: true, ID: iommu.ID{Class: 0x088000}, PhysFn: &iommu.Address{}}
	if got := vf.Role(); got != iommu.RoleGuest {
		t.Errorf("a VF is %s", got)
	}
	if got := (&iommu.Device{Name: "plat.0"}).Role(); got != iommu.RoleGuest {
		t.Errorf("what is no PCI device is %s", got)
	}
}

// What is behind another device's driver is that one's child, in a domain that the driver has made.
func TestChildren(t *testing.T) {
	k := hosttest.NewKernel(t, hosttest.Made(
		hosttest.PCI{At: "0000:00:0e.0", ID: "8086:467f", Class: "010400", Driver: "vmd", Group: 6},
		hosttest.PCI{At: "0000:00:0e.0/10000:e0:06.0", ID: "8086:09ab", Class: "060400", Driver: "pcieport", Group: 6},
		hosttest.PCI{
			At: "0000:00:0e.0/10000:e0:06.0/10000:e1:00.0", ID: "144d:a808", Class: "010802", Driver: "nvme", Group: 6,
		},
		hosttest.PCI{At: "0000:00:01.0", ID: "8086:10c9", Class: "020000", Driver: "igb", Group: 7},
	))

	h := &iommu.Host{Host: k.Host()}
	topology, err := iommu.Scan(h)
	if err != nil {
		t.Fatal(err)
	}

	g, err := topology.Group(6)
	if err != nil {
		t.Fatal(err)
	}

	names := func(devices []*iommu.Device) (out []string) {
		for _, d := range devices {
			out = append(out, d.Name)
		}
		return out
	}

	if got := names(g.Endpoints()); len(got) != 1 || got[0] != "0000:00:0e.0" {
		t.Errorf("endpoints %q", got)
	}
	if got := names(g.Children()); len(got) != 1 || got[0] != "10000:e1:00.0" ||
		g.Children()[0].Parent.String() != "0000:00:0e.0" {
		t.Errorf("children %q", got)
	}

	hosttest.EachFailure(t, k, "scan", func() (any, error) {
		now, err := iommu.Scan(h)
		if err != nil {
			return nil, err
		}
		return now.Groups, nil
	})
}

// Another function of a card belongs to it, whatever its class, and goes with it; the host's own on a root bus does not.
func TestCardsOwn(t *testing.T) {
	k := hosttest.NewKernel(t, hosttest.Made(
		hosttest.PCI{At: "0000:00:01.0", ID: "8086:1901", Class: "060400", Driver: "pcieport", Group: 1},
		hosttest.PCI{At: "0000:00:01.0/0000:01:00.0", ID: "10de:1e84", Class: "030000", Driver: "nouveau", Group: 1},
		hosttest.PCI{At: "0000:00:01.0/0000:01:00.3", ID: "10de:1ad9", Class: "0c8000", Driver: "nvidia-gpu", Group: 1},
		hosttest.PCI{At: "0000:00:1f.0", ID: "8086:a305", Class: "060100", Group: 2},
		hosttest.PCI{At: "0000:00:1f.3", ID: "8086:a348", Class: "040300", Driver: "snd_hda_intel", Group: 2},
		hosttest.PCI{At: "0000:00:1f.4", ID: "8086:a323", Class: "0c0500", Driver: "i801_smbus", Group: 2},
	))
	topology, err := iommu.Scan(&iommu.Host{Host: k.Host()})
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]iommu.Role{}
	topology.All(func(d *iommu.Device) bool {
		got[d.Name] = d.Role()
		return true
	})
	for name, want := range map[string]iommu.Role{
		"0000:01:00.0": iommu.RoleGuest, "0000:01:00.3": iommu.RoleGuest, "0000:00:1f.0": iommu.RoleCompanion,
		"0000:00:1f.3": iommu.RoleGuest, "0000:00:1f.4": iommu.RoleCompanion,
	} {
		if got[name] != want {
			t.Errorf("%s is %s, want %s", name, got[name], want)
		}
	}
}
