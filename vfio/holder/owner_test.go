package holder

import (
	"slices"
	"strings"
	"testing"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

// The devices of the captured lab host.
const (
	igb   = "0000:01:00.0"
	nvme  = "0000:0a:00.0"
	e1000 = "0000:07:01.0"
	edu   = "0000:07:02.0" // shares e1000's group, has no driver
)

// hostOf is a running host with changes of the captured lab host.
func hostOf(t *testing.T, changes hosttest.Tree) (*hosttest.Kernel, *iommu.Host) {
	t.Helper()
	k := hosttest.NewLab(t, changes)
	return k, &iommu.Host{Host: k.Host()}
}

// read reads a device with its interfaces.
func read(t *testing.T, h *iommu.Host, address string) *iommu.Device {
	t.Helper()
	topology, err := iommu.Scan(h)
	if err != nil {
		t.Fatal(err)
	}
	a, err := iommu.ParseAddress(address)
	if err != nil {
		t.Fatal(err)
	}
	d, err := topology.Find(a)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// domain is a status file of libvirt's.
func domain(devices string) string {
	return "<domstatus state='running'><domain type='kvm'><devices>" + devices + "</devices></domain></domstatus>\n"
}

func TestOwners(t *testing.T) {
	_, h := hostOf(t, hosttest.Tree{
		"etc/driverctl.d/pci-" + e1000:        "e1000e\n",
		"etc/driverctl.d/pci-" + edu:          "vfio-pci\n", // what is wanted anyway is no reason to refuse
		"etc/sriov-operator/pci/" + igb:       "{}\n",
		"run/qemu-server/pci-id-reservations": "0000:07:01.0 104 pid:12\nrubbish\n",
		"run/libvirt/qemu/web.xml": domain(`<hostdev mode="subsystem"><source><address bus="1" slot="0x00"
			function="0x0" domain="0x0000"/></source></hostdev>`),
		"run/libvirt/qemu/vf.xml": domain("<interface type='hostdev'><source>\n<address type='pci' domain='0x0000' bus='0x07' slot='0x01' function='0x0'/></source></interface>"),
		"run/libvirt/qemu/other.xml": domain(`<hostdev><source><address bus="0" port="2"/></source><address type='pci' domain='0x0000' bus='0x07' slot='0x01' function='0x0'/></hostdev>
			<filesystem><source><address type='pci' domain='0x0000' bus='0x07' slot='0x01' function='0x0'/></source></filesystem>
			<!-- <hostdev><source><address type='pci' domain='0x0000' bus='0x07' slot='0x01' function='0x0'/></source></hostdev> -->`),
		"run/libvirt/qemu/pool.xml": domain(`<interface type="network"><source network="vfs"/><actual type="hostdev"><source>
			<address type="pci" domain="0x0000" bus="0x09" slot="0x00" function="0x0"/></source></actual></interface>`),
		"run/libvirt/qemu/disk.xml": domain(`<disk type="nvme"><source type="pci" managed="yes" namespace="1">
			<address domain="0x0000" bus="0x09" slot="0x00" function="0x0"/></source></disk>`),
		"run/libvirt/qemu/autostart/not-a-domain.txt": "",
	})

	for address, want := range map[string][]string{
		igb: {"is given to libvirt domain web", "is managed by the SR-IOV network operator"},
		e1000: {"is given to libvirt domain vf", "is reserved for Proxmox guest 104",
			"is set to driver e1000e by driverctl"},
		edu:           nil,
		nvmeMultipath: {"is given to libvirt domain disk", "is given to libvirt domain pool"},
	} {
		found, err := Owners(h, []*iommu.Device{read(t, h, address)})
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, h := range found {
			if h.Kind != Owner || h.Device != address {
				t.Errorf("%+v", h)
			}
			got = append(got, h.What)
		}
		if slices.Sort(got); !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", address, got, want)
		}
	}
}

func TestClaimedByID(t *testing.T) {
	id := iommu.ID{Vendor: 0x8086, Device: 0x10c9}
	for text, c := range map[string]struct {
		tree  hosttest.Tree
		where string
	}{
		"command line": {hosttest.Tree{"proc/cmdline": "quiet vfio-pci.ids=10de:1b80,8086:10C9 ro\n"},
			"the kernel command line"},
		"with an underscore": {hosttest.Tree{"proc/cmdline": "vfio_pci.ids=8086:10c9:8086:a03c\n"},
			"the kernel command line"},
		"another device":     {hosttest.Tree{"proc/cmdline": "vfio-pci.ids=8086:10ca\n"}, ""},
		"another option":     {hosttest.Tree{"proc/cmdline": "pci-stub.ids=8086:10c9\n"}, ""},
		"a file of modprobe": {hosttest.Tree{"etc/modprobe.d/vfio.conf": "# ids=8086:10c9\noptions vfio-pci disable_vga=1 ids=8086:10c9\n"}, "/etc/modprobe.d/vfio.conf"},
		"its only option": {hosttest.Tree{"etc/modprobe.d/a.conf": "options vfio-pci ids=8086:10c9\n"},
			"/etc/modprobe.d/a.conf"},
		"options of another":    {hosttest.Tree{"etc/modprobe.d/a.conf": "options other ids=8086:10c9\n"}, ""},
		"cut off in the middle": {hosttest.Tree{"etc/modprobe.d/a.conf": "options vfio-pci ids=8086"}, ""},
	} {
		_, h := hostOf(t, c.tree)
		if where := ClaimedByID(h, id)[id]; where != c.where {
			t.Errorf("%s: %q, want %q", text, where, c.where)
		}
	}
}

func TestParseMount(t *testing.T) {
	for line, want := range map[string][3]string{
		"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue": {"98:0", "/mnt2",
			"/dev/root"},
		"22 1 0:21 / / rw - btrfs /dev/nvme0n1p2 rw": {"0:21", "/",
			"/dev/nvme0n1p2"},
		"22 1 0:21 / /": {},
		"- - - - - -":   {},
		"":              {},
	} {
		number, where, _, source, ok := parseMount(line)
		if got := [3]string{number, where, source}; got != want || ok != (want != [3]string{}) {
			t.Errorf("%q: %q, %v", line, got, ok)
		}
	}
}

func FuzzHostText(f *testing.F) {
	f.Add("36 35 98:0 /mnt1 /mnt2 rw - ext3 /dev/root rw",
		"0: 0100007F:1F90 0200007F:A2C4 01 00000000:00000000 00:00000000 00000000 0 0 123 1")
	f.Fuzz(func(t *testing.T, mount, tcp string) {
		if _, _, _, _, ok := parseMount(mount); ok && !strings.Contains(mount, "-") {
			t.Errorf("%q", mount)
		}
		peers := map[string]connection{}
		parseTCP([]byte(tcp), peers)
		for _, c := range peers {
			if len(c.peer) != 4 && len(c.peer) != 16 || len(c.local) != 4 && len(c.local) != 16 {
				t.Errorf("%q: %v", tcp, c)
			}
		}
		parseNumber(mount)
	})
}

func TestParseTCP(t *testing.T) {
	peers := map[string]connection{}
	parseTCP([]byte("  sl  local_address rem_address   st\n"+
		"   0: 0100007F:0016 0200007F:A2C4 01 00000000:00000000 02:00000000 00000000     0        0 123 1 0\n"+
		"   1: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 124 1 0\n"+
		"   2: 0000000000000000FFFF00000100007F:0016 0000000000000000FFFF00000300007F:A2C4 01 0:0 0:0 0 0 0 125 1 0\n"),
		peers)
	if len(peers) != 2 || peers["123"].peer.String() != "127.0.0.2" || peers["125"].peer.String() != "127.0.0.3" ||
		peers["125"].local.String() != "127.0.0.1" {
		t.Errorf("%v", peers)
	}
}
