// Command gentree makes a /sys with a given number of PCI devices, laid out and formatted as the kernel's, for
// benchmarks:
//
//	gentree [-ids PCI.IDS] [-vfs] DIR COUNT
//
// 256 devices are one root complex: a root bus with a host bridge, in the first one an IOMMU, and 15 root ports, and 15
// buses of 16 functions.
// Every fourth of these is one PF with 15 VFs; with -vfs, each is. 16 root complexes are a PCI domain.
package main

import (
	"encoding/binary"
	"flag"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"viaduct/internal/host/hosttest"
)

// kind is a model of a device.
type kind struct {
	vendor, device uint16
	class          uint32
	driver         string
	net            bool
	vfs            *kind
}

var (
	hostBridge = kind{vendor: 0x1022, device: 0x14a4, class: 0x060000}
	unit       = kind{vendor: 0x1022, device: 0x1481, class: 0x080600}
	rootPort   = kind{vendor: 0x1022, device: 0x14a5, class: 0x060400, driver: "pcieport"}
	plain      = []kind{
		{vendor: 0x144d, device: 0xa80a, class: 0x010802, driver: "nvme"},
		{vendor: 0x8086, device: 0x1563, class: 0x020000, driver: "ixgbe", net: true},
		{vendor: 0x10de, device: 0x20b5, class: 0x030200, driver: "vfio-pci"},
		{vendor: 0x1022, device: 0x149c, class: 0x0c0330, driver: "xhci_hcd"},
		{vendor: 0x10de, device: 0x228b, class: 0x040300},
		{vendor: 0x1000, device: 0x00e6, class: 0x010400, driver: "megaraid_sas"},
		{vendor: 0x15b3, device: 0x101d, class: 0x020000, driver: "mlx5_core", net: true},
		{vendor: 0x1022, device: 0x1485, class: 0x130000},
	}
	physical = []kind{
		{vendor: 0x8086, device: 0x1592, class: 0x020000, driver: "ice", net: true,
			vfs: &kind{vendor: 0x8086, device: 0x1889, class: 0x020000, driver: "vfio-pci"}},
		{vendor: 0x144d, device: 0xa824, class: 0x010802, driver: "nvme",
			vfs: &kind{vendor: 0x144d, device: 0xa824, class: 0x010802, driver: "vfio-pci"}},
		{vendor: 0x8086, device: 0x1592, class: 0x020000, driver: "ice", net: true,
			vfs: &kind{vendor: 0x8086, device: 0x1889, class: 0x020000, driver: "iavf", net: true}},
		{vendor: 0x15b3, device: 0x101d, class: 0x020000, driver: "mlx5_core", net: true,
			vfs: &kind{vendor: 0x15b3, device: 0x101e, class: 0x020000, driver: "mlx5_vfio_pci"}},
	}
)

type function struct {
	kind
	domain, bus, devfn int
	path               []string // below sys/devices
	pf                 string   // a VF's PF
	group              int
}

func address(domain, bus, devfn int) string {
	return fmt.Sprintf("%04x:%02x:%02x.%x", domain, bus, devfn>>3, devfn&7)
}

// tree writes files below a root; the first error ends the program.
type tree struct {
	root   string
	left   int // devices still to be made
	group  int
	inside int // members of the last group
	irq    int
	vfio   int // devices on a vfio driver so far
	vfs    map[string]int
	dense  bool // every bus is a PF and its VFs
}

func (t *tree) dir(name string) {
	if err := os.MkdirAll(filepath.Join(t.root, name), 0o755); err != nil {
		log.Fatal(err)
	}
}

func (t *tree) file(name, content string) {
	if err := os.WriteFile(filepath.Join(t.root, name), []byte(content), 0o644); err != nil {
		log.Fatal(err)
	}
}

// link makes the link name to target, both below the root, relative as sysfs has it.
func (t *tree) link(name, target string) {
	relative, err := filepath.Rel(filepath.Dir(name), target)
	if err == nil {
		err = os.Symlink(relative, filepath.Join(t.root, name))
	}
	if err != nil {
		log.Fatal(err)
	}
}

// nextGroup begins a group. The numbers have gaps, as after a hot unplug.
func (t *tree) nextGroup() int {
	if t.group++; t.group%61 == 0 {
		t.group += 5
	}
	t.inside = 0
	return t.group
}

func (t *tree) complex(n int) {
	domain, first := n/16, n%16*16
	root := fmt.Sprintf("pci%04x:%02x", domain, first)
	t.add(function{kind: hostBridge, domain: domain, bus: first, path: []string{root}, group: t.nextGroup()})
	if n == 0 {
		t.add(function{kind: unit, domain: domain, bus: first, devfn: 2, path: []string{root}, group: t.nextGroup()})
	}
	// Ports that are functions of one device, each with ACS.
	ports := make([]string, 16)
	for i := 1; i < 16; i++ {
		t.nextGroup()
		ports[i] = address(domain, first, 8+i-1)
		t.add(
			function{
				kind:   rootPort,
				domain: domain,
				bus:    first,
				devfn:  8 + i - 1,
				path:   []string{root},
				group:  t.group,
			},
		)
	}

	for i := 1; i < 16; i++ {
		path := []string{root, ports[i]}
		if i%4 != 1 && !t.dense {
			for devfn := range 16 {
				k := plain[(devfn+i)%len(plain)]
				if devfn != 5 { // a GPU's sound function or the like: with the one before it in a group
					t.nextGroup()
				}
				t.add(function{kind: k, domain: domain, bus: first + i, devfn: devfn, path: path, group: t.group})
			}
			continue
		}

		k := physical[i/4%len(physical)]
		pf := address(domain, first+i, 0)
		t.vfs[pf] = min(15, t.left-1)
		t.add(function{kind: k, domain: domain, bus: first + i, path: path, group: t.nextGroup()})
		for devfn := 1; devfn < 16; devfn++ {
			t.add(
				function{
					kind:   *k.vfs,
					domain: domain,
					bus:    first + i,
					devfn:  devfn,
					path:   path,
					pf:     pf,
					group:  t.nextGroup(),
				},
			)
		}
	}
}

// config is config space, as far as IOMMU groups hang on it: all is PCI Express, and all but the two functions that
// share a group has ACS, which is on.
func (f *function) config() string {
	config := make([]byte, 0x1000)
	put := binary.LittleEndian
	put.PutUint16(config[0x00:], f.vendor)
	put.PutUint16(config[0x02:], f.device)
	put.PutUint32(config[0x04:], 0x00100406)
	put.PutUint32(config[0x08:], f.class<<8|1)
	config[0x34] = 0x40
	kind := uint32(0)
	switch {
	case f.class == rootPort.class:
		config[0x0e], kind = 0x81, 4
	case f.pf == "" && f.vfs == nil && f.class != hostBridge.class:
		config[0x0e] = 0x80
	}
	put.PutUint32(config[0x40:], 0x00020010|kind<<20)
	if together := f.pf == "" && f.vfs == nil && kind == 0 && (f.devfn == 4 || f.devfn == 5); !together {
		put.PutUint32(config[0x100:], 0x0001000d)
		put.PutUint32(config[0x104:], 0x001d001d)
	}
	return string(config)
}

func (t *tree) add(f function) {
	if t.left <= 0 {
		return
	}
	t.left--
	name := address(f.domain, f.bus, f.devfn)
	at := filepath.Join("sys/devices", filepath.Join(f.path...), name)
	t.dir(at)
	attribute := func(file, format string, a ...any) { t.file(filepath.Join(at, file), fmt.Sprintf(format+"\n", a...)) }
	link := func(file, target string) { t.link(filepath.Join(at, file), target) }

	node := (f.domain*256 + f.bus) / 128 % 2
	attribute("vendor", "0x%04x", f.vendor)
	attribute("device", "0x%04x", f.device)
	attribute("subsystem_vendor", "0x%04x", 0x1028)
	attribute("subsystem_device", "0x%04x", 0x2100)
	attribute("class", "0x%06x", f.class)
	attribute("revision", "0x%02x", 1)
	attribute("modalias", "pci:v%08Xd%08Xsv%08Xsd%08Xbc%02Xsc%02Xi%02X", f.vendor, f.device, 0x1028, 0x2100,
		f.class>>16, f.class>>8&0xff, f.class&0xff)
	attribute("numa_node", "%d", node)
	attribute("local_cpus", "%08x,%08x", 0xffffffff*node, 0xffffffff*(1-node))
	attribute("local_cpulist", "%d-%d", 32*node, 32*node+31)
	attribute("irq", "%d", t.irq)
	attribute("enable", "1")
	attribute("power_state", "D0")
	attribute("dma_mask_bits", "64")
	attribute("consistent_dma_mask_bits", "64")
	attribute("broken_parity_status", "0")
	attribute("msi_bus", "1")
	attribute("current_link_speed", "16.0 GT/s PCIe")
	attribute("current_link_width", "8")
	attribute("max_link_speed", "16.0 GT/s PCIe")
	attribute("max_link_width", "16")
	attribute("uevent", "DRIVER=%s\nPCI_CLASS=%X\nPCI_ID=%04X:%04X\nPCI_SLOT_NAME=%s", f.driver, f.class, f.vendor,
		f.device, name)
	if f.class != rootPort.class {
		attribute("reset_method", "flr bus")
	}
	if f.pf != "" && f.driver == "vfio-pci" {
		attribute("driver_override", "vfio-pci")
	} else {
		attribute("driver_override", "(null)")
	}
	lines := make([]string, 13)
	for i := range lines {
		lines[i] = fmt.Sprintf("0x%016x 0x%016x 0x%016x", 0, 0, 0)
	}
	start := 0x200000000000 + (f.domain<<16|f.bus<<8|f.devfn)<<20
	lines[0] = fmt.Sprintf("0x%016x 0x%016x 0x%016x", start, start+0xfffff, 0x14220c)
	attribute("resource", "%s", strings.Join(lines, "\n"))
	t.file(filepath.Join(at, "config"), f.config())

	link("subsystem", "sys/bus/pci")
	t.link("sys/bus/pci/devices/"+name, at)
	if f.driver != "" {
		driver := "sys/bus/pci/drivers/" + f.driver
		t.dir(driver)
		link("driver", driver)
		t.link(filepath.Join(driver, name), at)
	}
	if f.net {
		netdev := fmt.Sprintf("p%ds%df%d", f.bus, f.devfn>>3, f.devfn&7)
		if f.domain > 0 {
			netdev = fmt.Sprintf("P%d%s", f.domain, netdev)
		}
		netdev = "en" + netdev
		t.dir(filepath.Join(at, "net", netdev))
		attribute("net/"+netdev+"/address", "02:00:%02x:%02x:%02x:00", f.domain, f.bus, f.devfn)
		t.link("sys/class/net/"+netdev, filepath.Join(at, "net", netdev))
	}
	if f.vfs != nil {
		n := t.vfs[name]
		attribute("sriov_totalvfs", "64")
		attribute("sriov_numvfs", "%d", n)
		attribute("sriov_offset", "1")
		attribute("sriov_stride", "1")
		attribute("sriov_vf_device", "%x", f.vfs.device)
		attribute("sriov_vf_total_msix", "0")
		attribute("sriov_drivers_autoprobe", "0")
		for i := range n {
			link("virtfn"+strconv.Itoa(i), filepath.Join(filepath.Dir(at), address(f.domain, f.bus, i+1)))
		}
	}
	if f.pf != "" {
		link("physfn", filepath.Join(filepath.Dir(at), f.pf))
	}

	group := "sys/kernel/iommu_groups/" + strconv.Itoa(f.group)
	if t.inside++; t.inside == 1 {
		t.dir(group + "/devices")
		t.file(group+"/type", "DMA-FQ\n")
		t.file(group+"/name", "")
		t.file(group+"/reserved_regions",
			"0x00000000fee00000 0x00000000feefffff msi\n0x000000fd00000000 0x000000ffffffffff reserved\n")
	}
	t.link(group+"/devices/"+name, at)
	link("iommu_group", group)
	link("iommu", "sys/devices/virtual/iommu/ivhd0")
	if f.driver != "" {
		t.interrupt("IR-PCI-MSIX-" + name)
	}
	if strings.Contains(f.driver, "vfio") {
		t.nodes(at, f.group)
	}
}

// nodes makes what the kernel has, and udev makes, for a device on a vfio driver: a node of its group, and one of its
// own. They are plain files, as an ordinary user can make no others.
func (t *tree) nodes(at string, group int) {
	own := fmt.Sprintf("vfio%d", t.vfio)
	t.dir(filepath.Join(at, "vfio-dev", own))
	t.file(filepath.Join(at, "vfio-dev", own, "dev"), fmt.Sprintf("511:%d\n", t.vfio))
	t.link("sys/class/vfio-dev/"+own, filepath.Join(at, "vfio-dev", own))
	t.file("dev/vfio/devices/"+own, "")
	t.vfio++

	shared := "sys/devices/virtual/vfio/" + strconv.Itoa(group)
	if _, err := os.Lstat(filepath.Join(t.root, shared)); err == nil {
		return // of another device in it
	}
	t.dir(shared)
	t.file(shared+"/dev", fmt.Sprintf("236:%d\n", group))
	t.link("sys/class/vfio/"+strconv.Itoa(group), shared)
	t.file("dev/vfio/"+strconv.Itoa(group), "")
}

func (t *tree) interrupt(chip string) {
	at := "sys/kernel/irq/" + strconv.Itoa(t.irq)
	t.dir(at)
	t.file(at+"/chip_name", chip+"\n")
	t.irq++
}

// host makes what is of the whole host: its firmware's table, and what its kernel came with.
func (t *tree) host() {
	for _, d := range []string{"sys/firmware/acpi/tables", "lib/modules/6.12.0", "proc/sys/kernel", "etc/modprobe.d"} {
		t.dir(d)
	}
	// The IOMMU is at 00:00.2, and covers all.
	t.file("sys/firmware/acpi/tables/IVRS", string(hosttest.ACPITable("IVRS", 2, "43302000 0000000000000000",
		hosttest.IVRSBlock("11 30", "0200 4000 0000f0fd00000000 0000 0000 00000000 fa4a25a2ef776524 0000000000000000 "+
			"01000000"))))
	t.file("proc/cmdline", "quiet\n")
	t.file("proc/sys/kernel/osrelease", "6.12.0\n")
	t.file("lib/modules/6.12.0/modules.dep",
		"kernel/drivers/vfio/pci/vfio-pci.ko:\nkernel/drivers/vfio/vfio_iommu_type1.ko:\n")
}

const madeUpIDs = `# stands in for pci.ids, which this machine does not have
1022  Advanced Micro Devices, Inc. [AMD]
	14a4  Root Complex
	14a5  GPP Bridge
144d  Samsung Electronics Co Ltd
	a80a  NVMe SSD Controller
8086  Intel Corporation
	1563  Ethernet Controller X550
	1592  Ethernet Controller E810-C for QSFP
	1889  Ethernet Adaptive Virtual Function
`

func main() {
	log.SetFlags(0)
	log.SetPrefix("gentree: ")
	ids := flag.String("ids", "/usr/share/misc/pci.ids", "the pci.ids to put into the tree")
	dense := flag.Bool("vfs", false, "every bus is a PF with its VFs")
	flag.Parse()
	count, err := strconv.Atoi(flag.Arg(1))
	if flag.NArg() != 2 || err != nil || count < 1 || count > 1<<16 {
		log.Fatal("usage: gentree [-ids PCI.IDS] DIR COUNT")
	}
	t := &tree{root: flag.Arg(0), left: count, vfs: map[string]int{}, dense: *dense}
	for _, d := range []string{"sys/bus/pci/devices", "sys/class/net", "sys/class/iommu", "sys/devices/virtual/net/lo",
		"sys/devices/virtual/iommu/ivhd0", "sys/kernel/iommu_groups", "sys/class/vfio", "sys/class/vfio-dev",
		"usr/share/misc", "proc", "dev/vfio/devices"} {
		t.dir(d)
	}

	t.link("sys/class/net/lo", "sys/devices/virtual/net/lo")
	t.link("sys/class/iommu/ivhd0", "sys/devices/virtual/iommu/ivhd0")
	text, err := os.ReadFile(*ids)
	if err != nil {
		text = []byte(madeUpIDs)
	}
	t.file("usr/share/misc/pci.ids", string(text))
	t.file("dev/vfio/vfio", "")
	t.file("dev/iommu", "")
	for range 24 {
		t.interrupt("IR-IO-APIC")
	}
	t.host()
	for n := 0; t.left > 0; n++ {
		t.complex(n)
	}
}
