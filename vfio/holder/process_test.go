package holder

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

// Who was passed a device is named with it where the kernel says which (Linux 6.18), and else has any.
func TestPassedDescriptor(t *testing.T) {
	for name, c := range map[string]struct {
		info  string
		nodes []string
		held  bool
	}{
		"named": {"pos: 0\nvfio-device-syspath: /sys/devices/pci0000:00/0000:00:08.0/" + e1000 + "\n",
			nil, true},
		"another":         {"vfio-device-syspath: /sys/devices/pci0000:00/" + igb + "\n", nil, false},
		"not named":       {"pos: 0\n", nil, true},
		"no node of ours": {"pos: 0\n", []string{"/dev/vfio/99"}, false}, // it has those of its own group
	} {
		k, h := hostOf(t, hosttest.Tree{"dev/vfio/99": "c 244:99\n"})
		bindVFIO(k)
		k.Process(4711, "qemu", append([]string{"anon_inode:[vfio-device]"}, c.nodes...)...)
		dir := filepath.Join(k.Dir(), "proc/4711/fdinfo")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "3"), []byte(c.info), 0o600); err != nil {
			t.Fatal(err)
		}
		found, err := Processes(h, []*iommu.Device{read(t, h, e1000)})
		if err != nil || (len(found) > 0) != c.held || c.held && found[0].PID != 4711 {
			t.Errorf("%s: %+v, %v", name, found, err)
		}
	}
}

// A QEMU is told of with its guest's name; udev is in a moment gone.
func TestProcessNames(t *testing.T) {
	for _, c := range []struct{ name, line, says string }{
		{"qemu-system-x86", "qemu\x00-name\x00guest=web,debug-threads=on\x00",
			`process 4711 (qemu-system-x86), guest "web"`},
		{"kvm", "kvm\x00-name\x00web,process=x\x00", `process 4711 (kvm), guest "web"`},
		{"qemu-kvm", "qemu\x00-name\x00", "process 4711 (qemu-kvm)"},
		{"other", "other\x00-name\x00guest=web\x00", "process 4711 (other)"},
		{"(udev-worker)", "udev\x00", ""},
		{"systemd-udevd", "udev\x00", ""},
	} {
		k, h := hostOf(t, hosttest.Tree{"proc/4711/cmdline": c.line, "proc/4711/comm": c.name + "\n"})
		bindVFIO(k)
		k.Process(4711, c.name, "/dev/vfio/7")
		found, err := Processes(h, []*iommu.Device{read(t, h, e1000)})
		if err != nil || (len(found) > 0) != (c.says != "") || len(found) > 0 && found[0].What != "is open in "+c.says {
			t.Errorf("%s: %+v, %v", c.name, found, err)
		}
	}
}

// Who may not look is told so, beside what was seen.
func TestBlind(t *testing.T) {
	k, h := hostOf(t, nil)
	bindVFIO(k)
	k.Process(4711, "qemu", "/dev/vfio/7")
	k.Process(4712, "other")
	d := read(t, h, e1000)
	k.SetFault(func(_, name string) error {
		if strings.HasPrefix(name, "proc/4712/fd") {
			return unix.EACCES
		}
		return nil
	})
	defer k.Revive()
	found, err := Find(h, []*iommu.Device{d})
	if !isBlind(err) || len(found) != 1 || found[0].PID != 4711 {
		t.Errorf("%+v, %v", found, err)
	}
}

// TestCannotTell: what the kernel does not say, and a book that cannot be read, are no word of nobody.
func TestCannotTell(t *testing.T) {
	for name, c := range map[string]struct {
		device string
		tree   hosttest.Tree
		setup  func(*hosttest.Kernel)
		blind  bool
	}{
		"a NIC whose interface may be elsewhere": {e1000, hosttest.Tree{"run/netns/blue": ""},
			func(k *hosttest.Kernel) {
				for _, gone := range []string{"sys/class/net/" + nic, "sys/bus/pci/devices/" + e1000 + "/net"} {
					if err := os.RemoveAll(k.Dir() + "/" + gone); err != nil {
						panic(err)
					}
				}
				k.Net.Elsewhere = map[string][]hosttest.Elsewhere{"run/netns/blue": {{Name: "eth0"}}}
			}, true},
		"a framebuffer at an address that is hidden": {edu, hosttest.Tree{
			"proc/iomem": "00000000-00000000 : PCI Bus 0000:07\n  00000000-00000000 : BOOTFB\n",
		}, nil, true},
		"a domain of which half is written": {edu, hosttest.Tree{
			"run/libvirt/qemu/web.xml": "<domstatus><domain><devices>\n",
		}, nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := scenario{device: c.device, tree: c.tree, setup: c.setup}
			_, h := s.host(t)
			found, err := Find(h, []*iommu.Device{read(t, h, c.device)})
			if err == nil || errors.Is(err, ErrBlind) != c.blind {
				t.Errorf("%v, %v", found, err)
			}
		})
	}
}

// A process that has gone while it was looked at is nobody, whatever the kernel says of it then.
func TestProcessThatGoes(t *testing.T) {
	for _, what := range []string{"ns/net", "ns/mnt", "fd"} {
		k, h := hostOf(t, withDisk(hosttest.Tree{"proc/4712/ns/net": "-> net:[4026532000]",
			"proc/4712/ns/mnt": "-> mnt:[4026532001]"}))
		k.Process(4712, "ip")
		d := read(t, h, e1000)
		if what == "ns/mnt" {
			d = read(t, h, disk)
		}
		var went atomic.Bool
		k.SetFault(func(_, name string) error {
			if strings.HasPrefix(name, "proc/4712/"+what) && went.CompareAndSwap(false, true) {
				k.End(4712)
				return unix.EACCES
			}
			return nil
		})
		if found, err := Find(h, []*iommu.Device{d}); err != nil || len(found) > 0 || !went.Load() && what != "fd" {
			t.Errorf("%s: %+v, %v, went %v", what, found, err, went.Load())
		}
		k.Revive()
	}
}

func isBlind(err error) bool { return err != nil && strings.Contains(err.Error(), ErrBlind.Error()) }

// A process is the same as long as its number and its start are; a zombie has ended.
func TestProc(t *testing.T) {
	k, h := hostOf(t, nil)
	k.Process(4711, "qemu")
	p := NameProcess(h, 4711)
	if p.PID != 4711 || p.Start == 0 || !p.Alive(h) || p.Ended(h) {
		t.Errorf("%+v lives: %v", p, p.Alive(h))
	}
	if other := (Proc{PID: 4711, Start: p.Start + 1}); other.Alive(h) {
		t.Error("another of its number is taken for it")
	}
	stat := fmt.Sprintf("4711 (a) b) Z 1 1 1 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 %d 0 0 0\n", p.Start)
	for _, file := range []string{"stat", "task/4711/stat"} {
		if err := os.WriteFile(filepath.Join(k.Dir(), "proc/4711", file), []byte(stat), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if p.Alive(h) || !p.Ended(h) {
		t.Error("a zombie lives")
	}
	k.End(4711)
	if p.Alive(h) || p.Ended(h) {
		t.Error("a process that is gone lives, or waits to be gone")
	}
}

// multipath is what an NVMe controller has whose disks hang on its subsystem, with a loop device over a partition.
func multipath() hosttest.Tree {
	block := func(name string, more hosttest.Tree) hosttest.Tree {
		out := hosttest.Tree{
			"sys/class/block/" + name:                         "-> ../../devices/virtual/block/" + name,
			"sys/devices/virtual/block/" + name + "/dev":      "259:1\n",
			"sys/devices/virtual/block/" + name + "/holders/": "",
		}
		return out.With(more)
	}
	return block("nvme0n1", hosttest.Tree{
		"sys/devices/virtual/block/nvme0n1/nvme0n1p1/partition": "1\n",
		"sys/class/block/nvme0n1p1":                             "-> ../../devices/virtual/block/nvme0n1/nvme0n1p1",
		"sys/devices/virtual/block/nvme0n1/nvme0n1p1/dev":       "259:2\n",
		"sys/devices/virtual/block/nvme0n1/nvme0n1p1/holders/":  "",
		"sys/class/nvme-subsystem/nvme-subsys0/nvme0":           "-> ../../nvme/nvme0",
		"sys/class/nvme-subsystem/nvme-subsys0/nvme0n1/x":       "\n",
		"sys/class/nvme-subsystem/nvme-subsys9/nvme9":           "-> ../../nvme/nvme9",
		"sys/class/nvme-subsystem/nvme-subsys9/nvme9n1/x":       "\n",
		"sys/class/block/loop3":                                 "-> ../../devices/virtual/block/loop3",
		"sys/devices/virtual/block/loop3/loop/backing_file":     "/dev/nvme0n1p1\n",
		"sys/devices/virtual/block/loop3/dev":                   "7:3\n",
	})
}

// The disks of a device: its own, those of a multipath NVMe's subsystem, partitions, what is stacked, loops.
func TestDisks(t *testing.T) {
	k, h := hostOf(t, multipath())
	d := read(t, h, nvmeMultipath)
	got, err := Disks(h, d)
	if err != nil || strings.Join(got, " ") != "nvme0c0n1 nvme0n1 nvme0n1p1 loop3" {
		t.Errorf("%v, %v", got, err)
	}
	k.Process(4711, "mkfs", "/dev/loop3")
	if err := os.MkdirAll(filepath.Join(k.Dir(), "dev"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(k.Dir(), "dev/loop3"), []byte("b 7:3\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	found, err := Processes(h, []*iommu.Device{d})
	if err != nil || len(found) != 1 || found[0].PID != 4711 {
		t.Errorf("who has a loop device over it open: %+v, %v", found, err)
	}
}

// The nodes of a device are all that its driver made: controllers, disks, and a namespace's character device.
func TestNodes(t *testing.T) {
	k, h := hostOf(t, withDisk(hosttest.Tree{
		"sys/class/nvme/nvme0":                            "-> ../../devices/pci0000:00/0000:00:0a.0/0000:09:00.0/nvme/nvme0",
		"sys/class/nvme-subsystem/nvme-subsys0/nvme0":     "-> ../../nvme/nvme0",
		"sys/class/nvme-subsystem/nvme-subsys0/nvme0n1/x": "\n",
		"sys/class/block/nvme0n1":                         "-> ../../devices/virtual/block/nvme0n1",
		"sys/devices/virtual/block/nvme0n1/dev":           "259:1\n",
		"sys/devices/virtual/nvme-generic/ng0n1/dev":      "237:1\n",
		"sys/class/nvme-generic/ng0n1":                    "-> ../../devices/virtual/nvme-generic/ng0n1",
	}))
	number := func(major, minor uint64) uint64 { return major<<32 | minor }
	got, err := Nodes(h, read(t, h, nvmeMultipath))
	want := []Node{{false, number(250, 0)}, {true, number(259, 1)}, {false, number(237, 1)}}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%v, %v, want %v", got, err, want)
	}
	if got, err = Nodes(h, read(t, h, disk)); err != nil || !reflect.DeepEqual(got, []Node{{true, number(254, 0)}}) {
		t.Errorf("%v, %v", got, err)
	}
	bindVFIO(k)
	if got, err = Nodes(h, read(t, h, e1000)); err != nil || len(got) != 2 || got[0].Block || got[1].Block {
		t.Errorf("%v, %v", got, err)
	}
	if got, err = Nodes(h, read(t, h, edu)); err != nil || len(got) != 0 {
		t.Errorf("a device without a driver: %v, %v", got, err)
	}
}

// nvmeMultipath is the lab's NVMe, whose disks hang on the subsystem.
const nvmeMultipath = "0000:09:00.0"

// A route that is not there, or forbids, is no connection's; another failure is told.
func TestNoWay(t *testing.T) {
	for err, want := range map[error]bool{unix.ENETUNREACH: true, unix.EACCES: true, unix.EHOSTUNREACH: true,
		unix.EIO: false, unix.ENOBUFS: false} {
		if got := noWay(fmt.Errorf("x: %w", err)); got != want {
			t.Errorf("%v: %v", err, got)
		}
	}
}

// In a pid namespace that is not the host's, most processes are not to be seen: nobody is taken for absent.
func TestOtherPIDNamespace(t *testing.T) {
	_, h := hostOf(t, hosttest.Tree{"proc/1/ns/pid": "-> pid:[4026532999]", "proc/self": "-> 1"})
	if found, err := Find(h, []*iommu.Device{read(t, h, e1000)}); !isBlind(err) {
		t.Errorf("%+v, %v", found, err)
	}
}

// A process that cannot be looked at is taken to live; one that is gone is not.
func TestAliveUnknown(t *testing.T) {
	k, h := hostOf(t, nil)
	k.Process(4711, "viaduct")
	p := NameProcess(h, 4711)
	for _, fail := range []error{unix.EIO, unix.EACCES, unix.ENOMEM} {
		for _, file := range []string{"proc/4711/stat", "proc/4711/task", "proc/4711/task/4711/stat"} {
			k.SetFault(func(_, name string) error {
				if name == file {
					return fail
				}
				return nil
			})
			if !p.Alive(h) {
				t.Errorf("%s fails with %v: it is dead", file, fail)
			}
			k.Revive()
		}
	}
}

// A look at more files than there is time for is not taken for "nobody".
func TestTooMany(t *testing.T) {
	k, h := hostOf(t, nil)
	bindVFIO(k)
	k.Process(4711, "greedy", "/dev/null")
	defer func(was time.Duration) { lookTime = was }(lookTime)
	lookTime = 0
	found, err := Processes(h, []*iommu.Device{read(t, h, e1000)})
	if !errors.Is(err, ErrTooMany) || !errors.Is(err, ErrBlind) || len(found) > 0 {
		t.Errorf("%+v, %v", found, err)
	}
}

// A kernel without network namespaces has no interface elsewhere, and is looked at all the same.
func TestNoNetworkNamespaces(t *testing.T) {
	k, h := hostOf(t, nil)
	links, err := filepath.Glob(filepath.Join(k.Dir(), "proc/*/ns/net"))
	if err != nil || len(links) == 0 {
		t.Fatalf("%q, %v", links, err)
	}
	for _, l := range links {
		// One is there by two names: /proc/self is a link.
		if err := os.Remove(l); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
	if all, err := linksElsewhere(h); err != nil || len(all) > 0 {
		t.Errorf("%v, %v", all, err)
	}
}
