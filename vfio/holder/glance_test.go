package holder

import (
	"errors"
	"strings"
	"testing"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

// A glance finds what a list shows, in few words, and says what it may not look at.
func TestGlance(t *testing.T) {
	mount := func(table string) hosttest.Tree { return hosttest.Tree{"proc/1/mountinfo": table} }
	for name, c := range map[string]struct {
		scenario
		brief string
	}{
		"a mount": {scenario{device: disk, tree: withDisk(mount("22 1 254:0 / /srv rw - ext4 /dev/vda rw\n"))},
			"mounted on /srv"},
		"by device-mapper": {scenario{device: disk, tree: withDisk(mapped("LVM-x")).With(hosttest.Tree{
			"proc/1/mountinfo": "22 1 252:0 / / rw - ext4 /dev/mapper/it rw\n", "dev/mapper/it": "-> ../dm-0",
			"sys/devices/virtual/block/dm-0/slaves/vda": "-> ../../../../pci0000:00/0000:00:01.0/virtio0/block/vda",
		})}, "mounted on /"},
		"btrfs": {scenario{device: disk, tree: withDisk(mount("22 1 0:33 / /srv rw - btrfs /dev/vda rw\n"))},
			"mounted on /srv"},
		"swap": {scenario{device: disk,
			tree: withDisk(hosttest.Tree{"proc/swaps": "Filename Type\n/dev/vda partition 1 0 -2\n"})}, "swap"},
		"the default route": {scenario{device: e1000, setup: func(k *hosttest.Kernel) {
			k.Net.Routes = []hosttest.Route{{To: "default", Over: []string{nic}}}
			k.Net.Addresses = []hosttest.Address{{Interface: nic, CIDR: "192.0.2.1/24"}}
		}}, "default route, 192.0.2.1/24"},
		"what is on top": {scenario{device: e1000, setup: func(k *hosttest.Kernel) {
			k.Net.Over = map[string]string{"enp2s0": nic}
			k.Net.Addresses = []hosttest.Address{{Interface: "enp2s0", CIDR: "192.0.2.1/24"}}
		}}, "192.0.2.1/24 by enp2s0"},
		"under another": {scenario{device: e1000, setup: func(k *hosttest.Kernel) {
			k.Net.Over = map[string]string{"enp2s0": nic}
		}}, "in enp2s0"},
		"a guest": {scenarios[Lease][0], "guest web"},
		"nobody":  {scenario{device: disk, tree: withDisk(nil)}, ""},
	} {
		_, h := c.host(t)
		topology, err := iommu.Scan(h)
		if err != nil {
			t.Fatal(err)
		}

		all, err := Glance(h, topology)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}

		var briefs []string
		for _, u := range all {
			if u.Device == c.device {
				briefs = append(briefs, u.Brief)
			}
			if u.Brief == "" {
				t.Errorf("%s: %+v is not brief", name, u)
			}
		}

		if got := strings.Join(briefs, ", "); got != c.brief {
			t.Errorf("%s: %q, want %q", name, got, c.brief)
		}
	}
}

// Beside a change the network is not asked, and that is told: the kernel may keep its lock for as long as that takes.
func TestGlanceBesideChange(t *testing.T) {
	s := scenario{device: e1000, tree: hosttest.Tree{"run/viaduct/change-" + e1000 + ".json": "{}"},
		setup: func(k *hosttest.Kernel) {
			k.Net.Answer = func(uint16, []byte) []byte { t.Error("it was asked"); return nil }
		}}
	_, h := s.host(t)
	topology, err := iommu.Scan(h)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Glance(h, topology); !errors.Is(err, ErrBlind) || !strings.Contains(err.Error(), "under way") {
		t.Error(err)
	}
}

// A file that cannot be read keeps nothing else from being seen.
func TestGlanceBesideBrokenFile(t *testing.T) {
	s := scenario{device: e1000, tree: hosttest.Tree{"run/libvirt/qemu/web.xml": "<broken"},
		setup: func(k *hosttest.Kernel) {
			k.Net.Routes = []hosttest.Route{{To: "default", Over: []string{nic}}}
		}}
	_, h := s.host(t)
	topology, err := iommu.Scan(h)
	if err != nil {
		t.Fatal(err)
	}
	if all, err := Glance(h, topology); err == nil || !strings.Contains(err.Error(), "web.xml") || len(all) != 1 {
		t.Errorf("%+v, %v", all, err)
	}
}
