package declared

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"viaduct/cmd/internal/hostfile"
	"viaduct/internal/host/hosttest"
)

// twoCards is a host with two PFs of i40e, with these files.
func twoCards(files hosttest.Tree) hosttest.Tree {
	card := func(bus, port, name, mac string, group int) []hosttest.PCI {
		return []hosttest.PCI{
			{At: "0000:00:" + port + ".0", ID: "8086:3420", Class: "060400", Driver: "pcieport", Group: group},
			{
				At: "0000:00:" + port + ".0/0000:" + bus + ":00.0", ID: "8086:1572", Class: "020000", Driver: "i40e",
				Group: group + 1, Files: hosttest.Tree{
					"sriov_totalvfs": "64\n", "sriov_numvfs": "0\n", "sriov_drivers_autoprobe": "1\n",
					"sriov_offset": "16\n", "sriov_stride": "1\n", "sriov_vf_device": "154c\n",
					"net/" + name + "/address": mac + "\n", "net/" + name + "/device": "-> ../..",
				},
			},
		}
	}
	all := slices.Concat(card("01", "01", "enp1s0f0", "3c:fd:fe:00:00:01", 10),
		card("02", "02", "enp2s0f0", "3c:fd:fe:00:00:02", 12))
	tree := hosttest.Made(all...)
	for _, name := range []string{"enp1s0f0", "enp2s0f0"} {
		bus := name[3:4]
		tree["sys/class/net/"+name] = "-> ../../devices/pci0000:00/0000:00:0" + bus + ".0/0000:0" + bus +
			":00.0/net/" + name
	}
	return tree.With(files)
}

// What other tools' files declare is read as those read it, what has no equal is noted, and nothing of it is refused by
// its own plan.
func TestImportedPlans(t *testing.T) {
	const (
		first, second = `"mac=3c:fd:fe:00:00:01"`, `"mac=3c:fd:fe:00:00:02"`
		network       = "etc/systemd/network/"
	)

	for name, c := range map[string]struct {
		files  hosttest.Tree
		source string
		has    []string
		lacks  []string
		notes  []string
		not    []string // what is not noted
	}{
		"netplan is merged key by key": {
			files: hosttest.Tree{
				"lib/netplan/10-a.yaml": "network: {ethernets: {enp1s0f0: {match: {macaddress: 3C:FD:FE:00:00:01}, mtu: 9000}}}\n",
				"etc/netplan/20-b.yaml": "network: {ethernets: {enp1s0f0: {virtual-function-count: 4}}}\n",
				"run/netplan/30-c.yaml": "network: {ethernets: {enp1s0f0: {virtual-function-count: 6}}}\n",
			},
			source: "netplan", has: []string{first, "mtu: 9000", "count: 6"},
		},
		"netplan's globs": {
			files: hosttest.Tree{"etc/netplan/a.yaml": "network:\n  ethernets:\n" +
				"    glob: {match: {name: \"enp2s*\"}, virtual-function-count: 2}\n" +
				"    both: {match: {driver: [i40e]}, virtual-function-count: 2}\n" +
				"    none: {match: {driver: mlx5_core}, virtual-function-count: 2}\n" +
				"    vf: {link: glob, macaddress: \"02:00:00:00:00:07\"}\n"},
			source: "netplan", has: []string{second, "count: 2"}, lacks: []string{first},
			notes: []string{"both: it matches enp1s0f0 and enp2s0f0", "none: no PF has driver mlx5_core",
				"macaddress of vf"},
		},
		"a PF by two names": {
			files: hosttest.Tree{"etc/netplan/a.yaml": "network:\n  ethernets:\n" +
				"    enp1s0f0: {virtual-function-count: 3}\n    x: {match: {name: enp1*}, virtual-function-count: 2}\n"},
			source: "netplan", has: []string{first, "count: 3"}, lacks: []string{"count: 2"},
			notes: []string{"is declared by netplan: enp1s0f0 already"},
		},
		"systemd's drop-ins": {
			files: hosttest.Tree{
				network + "10-a.link": "[Match]\nPath=pci-0000:01:00.0*\nType=ether\n[Link]\nName=lan0\n" +
					"SR-IOVVirtualFunctions=4\nMTUBytes=9000\n[SR-IOV]\nVirtualFunction=0\nVLANId=15\n",
				network + "10-a.link.d/o.conf": "[Link]\nSR-IOVVirtualFunctions=6\n[SR-IOV]\nVirtualFunction=0\nTrust=no\n",
				network + "50-a.network":       "[Match]\nName=lan0\n[SR-IOV]\nVirtualFunction=2\nVLANId=7\n",
			},
			source: "systemd",
			has:    []string{first, "count: 6", "mtu: 9000", "vlan: 15", "trust: off", "vlan: 7", "range: 3-5"},
		},
		"systemd's first match": {
			files: hosttest.Tree{
				network + "10-a.link": "[Match]\nMACAddress=3c:fd:fe:00:00:02\nMACAddress=3c:fd:fe:00:00:03\n[Link]\n" +
					"SR-IOVVirtualFunctions=2\n",
				network + "20-b.link": "[Match]\nDriver=!e1000 ixgbe\nVirtualization=no\n[Link]\nSR-IOVVirtualFunctions=8\n",
				network + "30-c.link": "[Match]\nDriver=ice\n[Link]\nSR-IOVVirtualFunctions=8\n",
				network + "40-d.link": "[Match]\nPermanentMACAddress=02:00:00:00:00:09\n[Link]\nSR-IOVVirtualFunctions=1\n",
			},
			source: "systemd", has: []string{second, "count: 2", first, "count: 8", "mac=02:00:00:00:00:09"},
			notes: []string{"20-b.link: viaduct does not check Virtualization=",
				"30-c.link: its [Match] does not name one device"},
		},
		"ids of vfio-pci": {
			files: hosttest.Tree{
				"proc/cmdline":             "quiet vfio-pci.ids=8086:1572,1234:5678 vfio_iommu_type1.allow_unsafe_interrupts=1\n",
				"etc/modprobe.d/vfio.conf": "options vfio-pci ids=8086:1572:ffffffff:ffffffff disable_vga=1\nsoftdep i40e pre: vfio-pci\n",
			},
			source: "modprobe", has: []string{first, second, `"1234:5678"`},
			notes: []string{"disable_vga=1", "allow_unsafe_interrupts", "softdep i40e", "no device has ids 1234:5678"},
		},
		"VFs by drivers": {
			files:  hosttest.Tree{"etc/modprobe.d/i40e.conf": "options i40e max_vfs=0,5\n"},
			source: "modprobe", has: []string{second, "count: 5"}, lacks: []string{first},
		},
		"modprobe's mistakes": {
			files: hosttest.Tree{"etc/modprobe.d/a.conf": "options\nblacklist i40e\noptions vfio-pci ids=8086,zz:1,8086:*\n" +
				"options vfio_pci \\\n  ids=8086:3420\noptions ixgbe max_vfs=4\noptions e1000 max_vfs=-1\noptions ice num_vfs=x\n" +
				"softdep i40e pre: other\n"},
			source: "modprobe", lacks: []string{first, second, "count"}, notes: []string{
				"a.conf: invalid ids=8086: want", "a.conf: invalid ids=zz:1: want", "a.conf: invalid ids=8086:*: want",
				"a guest cannot have 0000:00:01.0", "max_vfs of ixgbe: no PF has this driver now",
				"max_vfs of e1000: invalid number \"-1\" of VFs", "num_vfs of ice: invalid number \"x\" of VFs",
			},
			not: []string{"softdep", "blacklist"},
		},
		"ids that ask for more": {
			files: hosttest.Tree{"etc/modprobe.d/a.conf": "options vfio-pci ids=8086:1572:ffffffff:ffffffff:030000:ff0000\n" +
				"options vfio-pci ids=8086:1572:8086:1\n"},
			source: "modprobe", lacks: []string{"select"}, notes: []string{
				"ids=8086:1572:ffffffff:ffffffff:030000:ff0000: host.yaml cannot select this",
				"ids=8086:1572:8086:1: host.yaml cannot",
			},
		},
		"ids twice": {
			files:  hosttest.Tree{"etc/modprobe.d/a.conf": "options vfio-pci ids=1234:5678,1234:5678\n"},
			source: "modprobe", has: []string{`"1234:5678"`},
			notes: []string{"1234:5678 is declared by /etc/modprobe.d/a.conf already"},
		},
		"fewer numbers than PFs": {
			files:  hosttest.Tree{"etc/modprobe.d/i40e.conf": "options i40e max_vfs=3,0\noptions i40e max_vfs=7\n"},
			source: "modprobe", has: []string{first, "count: 3", second, "count: 7"},
			notes: []string{"0000:01:00.0 is declared by /etc/modprobe.d/i40e.conf: max_vfs of i40e already"},
		},
		"systemd's mistakes": {
			files: hosttest.Tree{
				network + "10-a.link": "[Match]\nOriginalName=enp1s0f0\nPermanentMACAddress=3c:fd:fe:00:00:02\nPermanentMACAddress=\n[Link]\n" +
					"SR-IOVVirtualFunctions=many\nMTUBytes=9K\n[SR-IOV]\nVirtualFunction=first\nVLANId=15\n" +
					"[SR-IOV]\nVirtualFunction=-1\n[SR-IOV]\nVirtualFunction=1\nLinkState=yes\nMACSpoofCheck=0\nPromiscuous=yes\n",
				network + "20-b.link": "[Match]\nOriginalName=enp1s0f0\n[Link]\nSR-IOVVirtualFunctions=8\n",
				network + "30-c.link": "[Match]\nOriginalName=eth7 eth8\n[Link]\nSR-IOVVirtualFunctions=8\n",
				network + "40-d.link": "[Match]\nPath=pci-0000:77:00.0*\n[Link]\nSR-IOVVirtualFunctions=1\n[SR-IOV]\nVirtualFunction=0\n",
			},
			source: "systemd", has: []string{first, "count: 2", "link: enable", "spoofchk: off", "range: 0",
				`"0000:77:00.0"`},
			lacks: []string{second, "count: 8", "mtu"}, notes: []string{
				"invalid SR-IOVVirtualFunctions=many", "MTUBytes=9K is not imported", "invalid VirtualFunction=first",
				"invalid VirtualFunction=-1", "Promiscuous= of VF 1 has no equal here",
				"20-b.link: another file applies to 0000:01:00.0", "30-c.link: its [Match] does not name one device",
			},
		},
		"netplan's absent ones": {
			files: hosttest.Tree{"etc/netplan/a.yaml": "network:\n  ethernets:\n" +
				"    a: {match: {name: ens9}, virtual-function-count: 1}\n    b: {set-name: ens8, virtual-function-count: 1}\n" +
				"    c: {match: {name: \"ens7*\"}, virtual-function-count: 1}\n    d: {match: {macaddress: \"02:00:00:00:00:0A\"}, virtual-function-count: 0}\n" +
				"    e: {set-name: enp2s0f0, match: {macaddress: \"3c:fd:fe:00:00:02\"}, embedded-switch-mode: legacy, delay-virtual-functions-rebind: false}\n" +
				"    plain: {mtu: 1400}\n    vf: {link: plain, mtu: 1300}\n  vlans:\n    v7: {id: 7, link: e, renderer: sriov}\n    v8: {id: 8, link: e}\n"},
			source: "netplan", has: []string{"ens9", "ens8", `"mac=02:00:00:00:00:0a"`, second, "eswitch: legacy",
				"select: plain"},
			notes: []string{"c: no PF matches \"ens7*\"", "mtu of vf", "VLAN v7"}, not: []string{"v8", "macaddress"},
		},
		"driverctl's others": {
			files: hosttest.Tree{
				"etc/driverctl.d/pci-0000:01:00.0": "i40e\n", "etc/driverctl.d/vmbus-1": "vfio-pci\n",
				"etc/driverctl.d/pci-0000:00:01.0": "vfio-pci\n", "etc/driverctl.d/pci-0000:77:00.0": "vfio-pci\n",
			},
			source: "driverctl", has: []string{`"0000:77:00.0"`}, lacks: []string{first},
			notes: []string{"driver \"i40e\" of pci-0000:01:00.0", "of vmbus-1", "a guest cannot have 0000:00:01.0"},
		},
		"driverctl's functions of one group": {
			files: hosttest.Tree{
				"etc/driverctl.d/pci-0000:01:00.0": "vfio-pci\n", "etc/driverctl.d/pci-0000:01:00.1": "vfio-pci\n",
			},
			source: "driverctl", has: []string{first, `"0000:01:00.1"`},
		},
	} {
		m := newManager(t, hosttest.NewKernel(t, twoCards(c.files)), Options{})
		text, notes := planImported(t, m, name, c.source)
		for _, want := range c.has {
			if !strings.Contains(text, want) {
				t.Errorf("%s: %s is missing:\n%s", name, want, text)
			}
		}
		for _, not := range c.lacks {
			if strings.Contains(text, not) {
				t.Errorf("%s: %s is there:\n%s", name, not, text)
			}
		}
		for _, want := range c.notes {
			if !strings.Contains(notes, want) {
				t.Errorf("%s: %q is not noted:\n%s", name, want, notes)
			}
		}
		for _, none := range c.not {
			if strings.Contains(notes, none) {
				t.Errorf("%s: %q is noted:\n%s", name, none, notes)
			}
		}
	}
}

// Files that cannot be read as what they are end an import, and name the file.
func TestImportFails(t *testing.T) {
	for _, c := range []struct{ source, file, text, says string }{
		{"netplan", "etc/netplan/a.yaml", "network: [", "/etc/netplan/a.yaml: "},
		{"netplan", "etc/netplan/a.yaml", "network: {ethernets: {a: {mtu: x}}}\n", "netplan: "},
		{"systemd", "etc/systemd/network/a.link",
			"[Match]\nOriginalName=enp1s0f0\n[SR-IOV]\nVirtualFunction=0\nVLANId=x\n", "a.link: VF 0: "},
		{"systemd", "etc/systemd/network/a.link",
			"[Match]\nOriginalName=notthere\n[SR-IOV]\nVirtualFunction=0\nVLANId=x\n", "a.link: VF 0: "},
		{"driverctl", "etc/driverctl.d/pci-nowhere=", "vfio-pci\n", "/etc/driverctl.d/pci-nowhere=: "},
		{"nobody", "etc/hosts", "", "unknown tool \"nobody\": want one of driverctl"},
	} {
		m := newManager(t, hosttest.NewKernel(t, twoCards(hosttest.Tree{c.file: c.text})), Options{})
		if _, _, err := m.Import(c.source); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s, %q: %v", c.source, c.text, err)
		}
	}
}

// planImported imports, and plans what came of it.
func planImported(t *testing.T, m *Manager, name, source string) (text, notes string) {
	t.Helper()
	s, all, err := m.Import(source)
	if err != nil {
		t.Errorf("%s: %s: %v", name, source, err)
		return "", ""
	}
	yaml, err := s.YAML(nil)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := hostfile.Parse("imported", yaml)
	if err != nil {
		t.Errorf("%s: %s: %v\n%s", name, source, err, yaml)
		return string(yaml), strings.Join(all, "\n")
	}
	items, err := m.Plan(parsed)
	if err != nil {
		t.Errorf("%s: %s: %v\n%s", name, source, err, yaml)
	}
	for _, i := range items {
		if i.State == Refused || i.State == Changed {
			t.Errorf("%s: %s: %s: %s: %v\n%s", name, source, i.Name, i.State, i.Err, yaml)
		}
	}
	return string(yaml), strings.Join(all, "\n")
}

// So it is on the hosts of public reports, and on each kind that is made for tests.
func TestImportedCases(t *testing.T) {
	trees := hosttest.Kinds()
	files, err := filepath.Glob("../../../../shared/cases/*/*.txt")
	if err != nil {
		t.Fatal(err)
	}
	if len(files) == 0 {
		t.Log("no public reports are at hand: they are left out")
	}
	for _, f := range files {
		trees[filepath.Base(filepath.Dir(f))+"/"+filepath.Base(f)] = hosttest.Load(t, f)
	}
	for name, tree := range trees {
		m := newManager(t, hosttest.NewKernel(t, tree), Options{})
		for _, source := range Sources() {
			planImported(t, m, name, source)
		}
	}
}
