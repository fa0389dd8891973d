package holder

import (
	"encoding/binary"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

const (
	disk    = "0000:00:01.0" // virtio, its disk is vda
	diskDir = "sys/devices/pci0000:00/0000:00:01.0/virtio0/block/vda"
	nic     = "ens1" // e1000's
)

// scenario is a host on which a device has a holder.
type scenario struct {
	device string
	tree   hosttest.Tree
	setup  func(*hosttest.Kernel)
	says   string
	root   bool
}

func withDisk(more hosttest.Tree) hosttest.Tree {
	return hosttest.Tree{
		"sys/class/block/vda": "-> ../../devices/pci0000:00/0000:00:01.0/virtio0/block/vda", diskDir + "/holders/": "",
		"dev/vda": "b 254:0\n",
	}.With(more)
}

// mapped is a device-mapper device of this uuid over the disk.
func mapped(uuid string) hosttest.Tree {
	const dm = "sys/devices/virtual/block/dm-0"
	return hosttest.Tree{
		diskDir + "/holders/dm-0": "-> ../../../../../../virtual/block/dm-0",
		"sys/class/block/dm-0":    "-> ../../devices/virtual/block/dm-0",
		dm + "/dm/name":           "it\n", dm + "/dm/uuid": uuid + "\n", dm + "/dev": "252:0\n",
		"dev/dm-0": "b 252:0\n",
	}
}

// put makes or replaces a file of the kernel's host.
func put(k *hosttest.Kernel, name, content string) {
	if err := os.WriteFile(k.Dir()+"/"+name, []byte(content), 0o600); err != nil {
		panic(err)
	}
}

// underneath is enp2s0 on top of e1000's interface.
var underneath = hosttest.Tree{
	"sys/devices/pci0000:00/0000:00:08.0/0000:07:01.0/net/ens1/upper_enp2s0": "-> ../../../../" +
		"0000:00:06.0/0000:02:00.0/net/enp2s0",
}

const (
	e1000Dir = "sys/devices/pci0000:00/0000:00:08.0/0000:07:01.0"
	eduDir   = "sys/devices/pci0000:00/0000:00:08.0/0000:07:02.0"
	nvmet    = "sys/kernel/config/nvmet/subsystems/nqn.it/namespaces/1"
)

// bootParams have a screen of 600 lines of 3,200 bytes at c0000000.
var bootParams = func() string {
	b := make([]byte, 0x1000)
	binary.LittleEndian.PutUint16(b[0x14:], 600)
	binary.LittleEndian.PutUint16(b[0x24:], 3200)
	binary.LittleEndian.PutUint32(b[0x18:], 0xc0000000)
	return string(b)
}()

// scenarios are those of each kind.
var scenarios = map[Kind][]scenario{
	Process: {
		{
			device: e1000,
			setup:  func(k *hosttest.Kernel) { bindVFIO(k); k.Process(4711, "qemu", "/dev/vfio/devices/vfio0") },
			says:   "is open in process 4711",
		},
		{device: e1000, setup: func(k *hosttest.Kernel) { bindVFIO(k); k.Process(4711, "qemu", "/dev/vfio/7") },
			says: "is open in process 4711"},
		// A kernel from 6.18 on names the device in a descriptor that was passed; an older one does not.
		{
			device: e1000,
			setup:  func(k *hosttest.Kernel) { bindVFIO(k); k.Process(4711, "qemu", "anon_inode:[vfio-device]") },
			says:   "process 4711",
		},
		// Whatever has a node, of whichever class or bus: a USB device below a controller, a mediated device by its group,
		// and one that sysfs does not know of.
		{
			device: e1000,
			tree: hosttest.Tree{
				e1000Dir + "/usb1/1-1/dev":       "189:1\n",
				e1000Dir + "/usb1/1-1/subsystem": "-> ../../../../../../../bus/usb",
				"dev/bus/usb/001/002":            "c 189:1\n",
			},
			setup: func(k *hosttest.Kernel) { k.Process(4711, "qemu", "/dev/bus/usb/001/002") },
			says:  "is open in process 4711",
		},
		{
			device: e1000,
			tree: hosttest.Tree{
				e1000Dir + "/a297db4a-f4c2-11e6-90f6-d3b88d6c9525/iommu_group": "-> ../../../../../kernel/iommu_groups/30",
				"sys/class/vfio/30/dev": "243:5\n", "dev/vfio/30": "c 243:5\n",
			},
			setup: func(k *hosttest.Kernel) { k.Process(4711, "qemu", "/dev/vfio/30") },
			says:  "is open in process 4711",
		},
		{
			device: e1000,
			tree: hosttest.Tree{
				"proc/driver/nvidia/gpus/" + e1000 + "/information": "Model: \t\t NVIDIA L4\nDevice Minor: \t 3\n",
				"dev/nvidia3": "c 195:3\n",
			},
			setup: func(k *hosttest.Kernel) { k.Process(4711, "python3", "/dev/nvidia3") },
			says:  "is open in process 4711",
		},
	},
	Lease: {{device: e1000, tree: hosttest.Tree{
		"run/viaduct/lease-web.json": `{"guest":"web","devices":[{"address":"` + e1000 + `"}]}`},
		says: `is assigned to guest "web"`}},
	Mount: {
		{
			device: disk,
			tree:   withDisk(hosttest.Tree{"proc/1/mountinfo": "22 1 254:0 / /srv rw - ext4 /dev/vda rw\n"}),
			says:   "is mounted on /srv",
		},
		{
			device: disk,
			tree:   withDisk(hosttest.Tree{"proc/1/mountinfo": "22 1 254:0 / / rw - ext4 /dev/vda rw\n"}),
			says:   "is mounted on /",
			root:   true,
		},
		{
			device: disk,
			tree:   withDisk(hosttest.Tree{"proc/1/mountinfo": "22 1 0:33 / /srv rw - btrfs /dev/vda rw\n"}),
			says:   "is mounted on /srv",
		},
		{
			device: disk,
			tree:   withDisk(hosttest.Tree{"sys/fs/btrfs/1-2/devices/vda/": "", "sys/fs/btrfs/features/": ""}),
			says:   "part of a mounted btrfs",
		},
		{
			device: disk,
			tree: withDisk(hosttest.Tree{
				"sys/fs/btrfs/1-2/devices/vda/": "", "sys/fs/btrfs/1-2/devices/vdb/": "",
				"proc/1/mountinfo": "22 1 0:33 / / rw - btrfs /dev/vdb rw\n",
			}),
			says: "part of a mounted btrfs",
			root: true,
		},
		{
			device: disk,
			tree: withDisk(hosttest.Tree{
				diskDir + "/vda1/partition": "1\n", diskDir + "/vda1/dev": "254:1\n", "dev/vda1": "b 254:1\n",
				"sys/class/block/vda1": "-> ../../devices/pci0000:00/0000:00:01.0/virtio0/block/vda/vda1",
				"proc/1/mountinfo":     "broken\n22 1 254:1 / /srv rw - ext4 /dev/vda1 rw\n",
			}),
			says: "(vda1) is mounted on /srv",
		},
		{
			device: disk,
			tree:   withDisk(hosttest.Tree{"proc/77/ns/mnt": "-> mnt:[4026532001]"}),
			setup: func(k *hosttest.Kernel) {
				k.Process(77, "container")
				put(k, "proc/77/mountinfo", "22 1 254:0 / / rw - ext4 /dev/vda rw\n")
			},
			says: "is mounted on / in the mount namespace of process 77",
		},
		{
			device: nvmeMultipath,
			tree: multipath().With(hosttest.Tree{
				"dev/loop3": "b 7:3\n", "dev/nvme0n1": "b 259:1\n", "dev/nvme0n1p1": "b 259:2\n",
				"dev/nvme0c0n1":    "b 259:9\n",
				"proc/1/mountinfo": "22 1 7:3 / /srv rw - ext4 /dev/loop3 rw\n",
			}),
			says: "(loop3) is mounted on /srv",
		},
	},
	Swap: {
		{
			device: disk,
			tree:   withDisk(hosttest.Tree{"proc/swaps": "Filename Type\n/dev/vda partition 1 0 -2\n"}),
			says:   "is swap",
		},
		{
			device: disk,
			tree:   withDisk(mapped("CRYPT-x").With(hosttest.Tree{"proc/swaps": "Filename Type\n/dev/mapper/it partition\n"})),
			says:   "(dm-0) is swap",
		},
	},
	Storage: {
		{
			device: disk,
			setup:  func(k *hosttest.Kernel) { k.Busy["vda"] = true },
			tree:   withDisk(nil),
			says:   "in exclusive use",
		},
		{
			device: disk,
			setup:  func(k *hosttest.Kernel) { k.Busy["vda"] = true },
			tree:   withDisk(hosttest.Tree{"proc/1/mountinfo": "22 1 0:33 / / rw - zfs rpool/root rw\n"}),
			says:   "in exclusive use",
			root:   true,
		},
		{device: disk, tree: withDisk(mapped("LVM-x")), says: "LVM it (dm-0)"},
		{device: disk, tree: withDisk(mapped("CRYPT-x")), says: "dm-crypt it (dm-0)"},
		{device: disk, tree: withDisk(mapped("mpath-x")), says: "device-mapper it (dm-0)"},
		{device: disk, tree: withDisk(hosttest.Tree{
			diskDir + "/holders/md0":                 "-> ../../../../../../virtual/block/md0",
			"sys/class/block/md0":                    "-> ../../devices/virtual/block/md0",
			"sys/devices/virtual/block/md0/md/level": "raid1\n", "sys/devices/virtual/block/md0/dev": "9:0\n",
			"dev/md0": "b 9:0\n",
		}), says: "md0"},
		{device: disk, tree: withDisk(hosttest.Tree{
			nvmet + "/enable": "1\n", nvmet + "/device_path": "/dev/vda\n",
			"sys/kernel/config/nvmet/subsystems/off/namespaces/": "",
		}), says: "is exported over NVMe as nqn.it"},
		// As a whole, with all its disks.
		{device: e1000, tree: hosttest.Tree{
			e1000Dir + "/nvme/nvme7/model": "it\n", subsystems + "/nqn.it/passthru/enable": "1\n",
			subsystems + "/nqn.it/passthru/device_path": "/dev/nvme7\n", subsystems + "/off/passthru/enable": "0\n",
		}, says: "(nvme7) is exported over NVMe as nqn.it"},
	},
	Route: {
		{
			device: e1000,
			setup:  func(k *hosttest.Kernel) { k.Net.Routes = []hosttest.Route{{To: "default", Over: []string{nic}}} },
			says:   "carries the default route",
		},
		{device: e1000, setup: func(k *hosttest.Kernel) {
			k.Net.Routes = []hosttest.Route{{To: "10.0.0.0/8", Over: []string{"enp1s0", nic}}}
		},
			says: "the route to 10.0.0.0/8"},
		{
			device: e1000,
			setup:  func(k *hosttest.Kernel) { k.Net.Routes = []hosttest.Route{{To: "default"}} },
			says:   "may carry the default route",
		},
	},
	Addressed: {{device: e1000, setup: func(k *hosttest.Kernel) {
		k.Net.Addresses = []hosttest.Address{{Interface: nic, CIDR: "192.0.2.1/24"}}
	}, says: "has address 192.0.2.1/24"}, {device: e1000, setup: func(k *hosttest.Kernel) {
		k.Net.Addresses = []hosttest.Address{{Interface: "enp2s0", CIDR: "192.0.2.1/24"}}
	}, tree: underneath, says: "has address 192.0.2.1/24 over enp2s0"}},
	Stacked: {
		{
			device: e1000,
			setup:  func(k *hosttest.Kernel) { k.Net.Over = map[string]string{"enp2s0": nic} },
			says:   "is under",
		},
		{device: e1000, tree: underneath, says: "is under"},
		{device: e1000, tree: hosttest.Tree{"run/netns/blue": ""}, setup: func(k *hosttest.Kernel) {
			k.Net.Elsewhere = map[string][]hosttest.Elsewhere{"run/netns/blue": {{Name: "macvlan0", Over: nic}}}
		}, says: "macvlan0 in the network namespace of blue"},
	},
	Namespace: {{device: e1000, setup: func(k *hosttest.Kernel) {
		k.Process(77, "ns")
		k.Net.Elsewhere = map[string][]hosttest.Elsewhere{"proc/77/ns/net": {{Name: "eth0", Device: e1000}}}
	}, tree: hosttest.Tree{"proc/77/ns/net": "-> net:[4026532000]"}, says: "is in the network namespace of process 77"},
		{device: e1000, tree: hosttest.Tree{"run/netns/blue": ""}, setup: func(k *hosttest.Kernel) {
			k.Net.Elsewhere = map[string][]hosttest.Elsewhere{"run/netns/blue": {{Name: "eth0", Device: e1000}}}
		}, says: "is in the network namespace of blue"},
		// And is nowhere to be seen here.
		{device: e1000, tree: hosttest.Tree{"run/netns/blue": ""}, setup: func(k *hosttest.Kernel) {
			for _, gone := range []string{"sys/class/net/" + nic, "sys/bus/pci/devices/" + e1000 + "/net"} {
				if err := os.RemoveAll(k.Dir() + "/" + gone); err != nil {
					panic(err)
				}
			}
			k.Net.Elsewhere = map[string][]hosttest.Elsewhere{"run/netns/blue": {{Name: "eth0", Device: e1000}}}
		}, says: "is in the network namespace of blue"},
		// That of a device that is no NIC by its class, as of InfiniBand, or of a USB controller for what is below it.
		{device: e1000, tree: hosttest.Tree{
			"run/netns/blue": "", "sys/class/net/" + nic: hosttest.Gone, e1000Dir + "/net": hosttest.Gone,
			e1000Dir + "/modalias": "pci:v00008086d0000100Esv00001AF4sd00001100bc0Csc03i30\n",
		}, setup: func(k *hosttest.Kernel) {
			k.Net.Elsewhere = map[string][]hosttest.Elsewhere{"run/netns/blue": {{Name: "eth0", Device: e1000}}}
		}, says: "is in the network namespace of blue"},
	},
	SSH: {{device: e1000, setup: func(k *hosttest.Kernel) {
		k.Net.Routes = []hosttest.Route{{To: "192.0.2.0/24", Over: []string{nic}, Protocol: unix.RTPROT_KERNEL}}
		k.Process(99, "sshd", "socket:[1234]")
	}, tree: hosttest.Tree{
		"proc/1/net/tcp": "  sl\n   0: 010200C0:0016 070200C0:A2C4 01 00000000:00000000 02:0 0     0        0 1234 1 0\n", "proc/self": "-> 1",
	}, says: "carries the ssh connection of 192.0.2.7"}, {device: e1000, setup: func(k *hosttest.Kernel) {
		k.Net.Addresses = []hosttest.Address{{Interface: nic, CIDR: "fe80::1/64"}}
		k.Process(99, "sshd-session", "socket:[1234]")
	}, tree: hosttest.Tree{
		"proc/1/net/tcp6": "  sl\n   0: 000080FE000000000000000001000000:0016 000080FE000000000000000007000000:A2C4" +
			" 01 00000000:00000000 02:0 0     0        0 1234 1 0\n",
		"proc/self": "-> 1",
	}, says: "carries the ssh connection of fe80::7"}},
	Display: {
		{device: edu, tree: hosttest.Tree{
			"sys/devices/pci0000:00/0000:00:08.0/0000:07:02.0/modalias": "pci:v00001234d000011E8sv00001AF4sd00001100bc03sc00i00\n",
			"sys/devices/pci0000:00/0000:00:08.0/0000:07:02.0/boot_vga": "1\n",
		}, says: "is the display this host started on"},
		{device: edu, tree: hosttest.Tree{
			"sys/devices/pci0000:00/0000:00:08.0/0000:07:02.0/modalias":           "pci:v00001234d000011E8sv00001AF4sd00001100bc03sc00i00\n",
			"sys/devices/pci0000:00/0000:00:08.0/0000:07:02.0/graphics/fb0/modes": "\n",
			"sys/class/graphics/fb0":                "-> ../../devices/pci0000:00/0000:00:08.0/0000:07:02.0/graphics/fb0",
			"sys/class/graphics/fbcon/cursor_blink": "1\n",
		}, says: "has the active framebuffer fb0"},
		// On the memory of what is no display by its class.
		{device: edu, tree: hosttest.Tree{
			eduDir + "/resource": "0x0000002800000000 0x0000002fffffffff 0x000000000014220c\n",
			"proc/iomem":         "2800000000-2fffffffff : PCI Bus 0000:07\n  2800000000-2801fa3fff : BOOTFB\n",
			"sys/bus/platform/devices/simple-framebuffer.0/driver": "-> ../../drivers/simple-framebuffer",
			"sys/bus/platform/drivers/simple-framebuffer/":         "",
		}, says: "echo simple-framebuffer.0 > /sys/bus/platform/drivers/simple-framebuffer/unbind"},
		{device: edu, tree: hosttest.Tree{
			eduDir + "/resource": "0x00000000c0000000 0x00000000cfffffff 0x0000000000040200\n",
			"proc/iomem":         "c0000000-cfffffff : PCI Bus 0000:07\n",
			"sys/bus/platform/devices/efi-framebuffer.0/driver": "-> ../../drivers/efi-framebuffer",
			"sys/bus/platform/drivers/efi-framebuffer/":         "",
			"sys/kernel/boot_params/data":                       bootParams,
		}, says: "has the screen's framebuffer (efi-framebuffer)"},
		// That of coreboot, and that of a display on USB, below a controller.
		{device: edu, tree: hosttest.Tree{
			eduDir + "/resource": "0x00000000c0000000 0x00000000cfffffff 0x0000000000040200\n",
			"proc/iomem":         "c0000000-cfffffff : PCI Bus 0000:07\n  c0000000-c07e8fff : Coreboot Framebuffer\n",
		}, says: "has the screen's framebuffer (Coreboot Framebuffer)"},
		{device: e1000, tree: hosttest.Tree{
			e1000Dir + "/usb1/1-1/1-1:1.0/graphics/fb1/modes": "\n",
			"sys/class/graphics/fb1": "-> ../../" +
				strings.TrimPrefix(e1000Dir, "sys/") + "/usb1/1-1/1-1:1.0/graphics/fb1",
		}, says: "has the active framebuffer fb1"},
	},
	Owner: {
		{
			device: e1000,
			tree:   hosttest.Tree{"etc/driverctl.d/pci-" + e1000: "e1000e\n"},
			says:   "is set to driver e1000e by driverctl",
		},
	},
}

// bindVFIO binds e1000 to vfio-pci.
func bindVFIO(k *hosttest.Kernel) {
	for _, w := range [][2]string{
		{"sys/bus/pci/devices/" + e1000 + "/driver_override", "vfio-pci"}, {"sys/bus/pci/drivers/e1000/unbind", e1000},
		{"sys/bus/pci/drivers_probe", e1000},
	} {
		if err := k.Write(w[0], w[1]); err != nil {
			panic(err)
		}
	}
}

func (s *scenario) host(t *testing.T) (*hosttest.Kernel, *iommu.Host) {
	t.Helper()
	k, h := hostOf(t, s.tree)
	if s.setup != nil {
		s.setup(k)
	}
	return k, h
}

// Each kind of the table is whole: it has a name and a meaning, something finds it and nothing else is called so, and
// it can be overridden by itself, unless it is the disk that the host runs on.
func TestKinds(t *testing.T) {
	seen := map[Kind]bool{}
	for _, kind := range Kinds() {
		r := kind.row()
		if seen[kind] || r.means == "" || !strings.HasPrefix(kind.Means(), r.means) || r.look == nil {
			t.Errorf("%q is there twice, or lacks a meaning or a way to look", kind)
		}
		seen[kind] = true
		if k, err := ParseKind(string(kind)); k != kind || err != nil {
			t.Errorf("%s: %s, %v", kind, k, err)
		}
		if r.carriesHost && !r.use || r.yieldsToRollback != slices.Contains(YieldToRollback(), kind) ||
			kind.CarriesHost() != r.carriesHost || kind.InUse() != r.use || kind.IsGuests() != r.guests {
			t.Errorf("%s contradicts itself: %+v", kind, r)
		}
		if len(scenarios[kind]) == 0 {
			t.Errorf("nothing shows that a holder of kind %s is found", kind)
		}
		for i, s := range scenarios[kind] {
			_, h := s.host(t)
			d := read(t, h, s.device)
			all, err := Find(h, []*iommu.Device{d})
			if err != nil {
				t.Fatalf("%s %d: %v", kind, i, err)
			}
			j := slices.IndexFunc(all,
				func(f Holder) bool { return f.Kind == kind && strings.Contains(f.What, s.says) })
			if j < 0 || all[j].Device != s.device || all[j].Root != s.root {
				t.Errorf("%s %d: %+v", kind, i, all)
				continue
			}
			why := all[j].Against(nil)
			if !strings.Contains(why.Text, s.says) || why.Kind != ReasonKind(kind) || why.Device != s.device ||
				(why.Force == "") != s.root {
				t.Errorf("%s %d: refused as %+v", kind, i, why)
			}
			if why := all[j].Against([]Kind{kind}); (why == nil) == s.root {
				t.Errorf("%s %d: overridden, it says %+v", kind, i, why)
			}
			others := slices.DeleteFunc(Kinds(), func(k Kind) bool { return k == kind })
			if err := Refuse("take it", all[j:j+1], others, ""); !errors.Is(err, ErrRefused) {
				t.Errorf("%s %d: overridden by another kind: %v", kind, i, err)
			}
		}
	}

	if _, err := ParseKind("nobody"); err == nil || !strings.Contains(err.Error(), KindNames()) {
		t.Error(err)
	}
}

// A kind that has only its constant is one that nothing looks for: each has a row.
func TestKindsHaveRows(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "kind.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	ast.Inspect(file, func(node ast.Node) bool {
		v, ok := node.(*ast.ValueSpec)
		if !ok || fmt.Sprint(v.Type) != "Kind" {
			return true
		}
		n++
		name, err := strconv.Unquote(v.Values[0].(*ast.BasicLit).Value)
		if err != nil || !slices.Contains(Kinds(), Kind(name)) {
			t.Errorf("%s has no row, %v", v.Names[0], err)
		}
		return true
	})
	if n != len(Kinds()) {
		t.Errorf("%d constants for %d kinds", n, len(Kinds()))
	}
}

// What nobody uses has no holders.
func TestNobody(t *testing.T) {
	_, h := hostOf(t, withDisk(nil))
	for _, address := range []string{e1000, edu, disk, igb} {
		if all, err := Find(h, []*iommu.Device{read(t, h, address)}); err != nil || len(all) > 0 {
			t.Errorf("%s: %+v, %v", address, all, err)
		}
	}
}

// Whatever cannot be looked at, who uses a device is found, or the failure is told: nobody is taken for absent who was
// not seen.
func TestLooksThatFail(t *testing.T) {
	for _, kind := range Kinds() {
		for i, s := range scenarios[kind] {
			k, h := s.host(t)
			d := read(t, h, s.device)
			stride := 1
			if os.Getenv("VIADUCT_SWEEP") == "short" {
				stride = 7
			}
			for n, more := (len(kind)+i)%stride, true; more; n += stride {
				var failedAt atomic.Pointer[string]
				var left atomic.Int64
				left.Store(int64(n))
				fail := []error{unix.EIO, unix.EACCES, unix.ENOMEM}[n%3]
				k.SetFault(func(op, name string) error {
					if left.Add(-1) == -1 {
						at := op + " " + name
						failedAt.Store(&at)
						return fail
					}
					return nil
				})
				all, err := Find(h, []*iommu.Device{d})
				k.Revive()
				failed := ""
				if at := failedAt.Load(); at != nil {
					failed = *at
				}
				more = failed != ""
				found := slices.ContainsFunc(all,
					func(f Holder) bool { return f.Kind == kind && strings.Contains(f.What, s.says) })
				if strings.HasPrefix(failed, "message 26") && errors.Is(fail, unix.EACCES) {
					continue // a route may forbid
				}
				if err == nil && !found {
					t.Errorf("%s %d: %s fails with %v: nobody is found (%s)", kind, i, failed, fail, fmt.Sprint(all))
				}
			}
		}
	}
}
