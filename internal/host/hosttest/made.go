package hosttest

import (
	"encoding/binary"
	"fmt"
	"path"
	"strconv"
	"strings"
	"testing"
)

// PCI is a function of a host that a test makes of a few words.
type PCI struct {
	// At is where it is: the addresses from the root bus down to its own, as "0000:00:01.0/0000:03:00.0".
	At string
	// ID and Class are as in "10de:2684" and "030000".
	ID, Class string
	// Driver is "" if it has none.
	Driver string
	// Group is its IOMMU group; a negative one is none.
	Group int
	// Files are more of its attributes, and folders of its class devices, by name below its own folder.
	Files Tree
}

// Made is a host with these functions, and an AMD IOMMU in front of them. vfio-pci is loaded.
func Made(functions ...PCI) Tree {
	t := Tree{
		"sys/bus/pci/drivers/vfio-pci/": "",
		"sys/class/net/":                "",
		"sys/class/iommu/ivhd0":         arrow + "../../devices/pci0000:00/0000:00:00.2/iommu/ivhd0",
		"sys/kernel/":                   "",
		"proc/sys/kernel/osrelease":     "6.12.0\n",
		"dev/":                          "",
		"etc/":                          "",
		"sys/devices/pci0000:00/0000:00:00.2/iommu/ivhd0/amd-iommu/features": "0\n",
	}
	for _, f := range functions {
		f.add(t)
	}
	return t
}

// dir is the function's folder of sysfs. A bus in another domain than the one above it has a root of its own there.
func (f *PCI) dir() string {
	dir, domain := "sys/devices", ""
	for address := range strings.SplitSeq(f.At, "/") {
		if now, _, _ := strings.Cut(address, ":"); now != domain {
			domain = now
			dir = path.Join(dir, "pci"+address[:len(address)-len(":00.0")])
		}
		dir = path.Join(dir, address)
	}
	return dir
}

func (f *PCI) add(t Tree) {
	dir, address := f.dir(), path.Base(f.At)
	up := strings.Repeat("../", strings.Count(dir, "/")) // to sys, from a link in dir
	vendor, device, _ := strings.Cut(f.ID, ":")
	put := func(name, content string) { t[path.Join(dir, name)] = content }

	t[path.Join(sysDevices, address)] = arrow + "../../../" + strings.TrimPrefix(dir, "sys/")
	put("vendor", "0x"+vendor+"\n")
	put("device", "0x"+device+"\n")
	put("subsystem_vendor", "0x1af4\n")
	put("subsystem_device", "0x1100\n")
	put("class", "0x"+f.Class+"\n")
	put("revision", "0x01\n")
	put("modalias", modalias(vendor, device, f.Class))
	put("numa_node", "-1\n")
	put("driver_override", "(null)\n")
	put("resource", strings.Repeat("0x0000000000000000 0x0000000000000000 0x0000000000000000\n", 13))
	put("config", configOf(vendor, device, f.Class))
	put("subsystem", arrow+up+"bus/pci")
	if f.Driver != "" {
		put("driver", arrow+up+path.Join("bus/pci/drivers", f.Driver))
		t[path.Join(sysDrivers, f.Driver, address)] = arrow + "../../../../" + strings.TrimPrefix(dir, "sys/")
	}

	if f.Group >= 0 {
		group := path.Join("kernel/iommu_groups", strconv.Itoa(f.Group))
		put("iommu_group", arrow+up+group)
		t[path.Join("sys", group, "type")] = "DMA-FQ\n"
		t[path.Join("sys", group, "reserved_regions")] = "0x00000000fee00000 0x00000000feefffff msi\n"
		t[path.Join("sys", group, "devices", address)] = arrow + "../../../../" + strings.TrimPrefix(dir, "sys/")
	}
	for name, content := range f.Files {
		t[path.Join(dir, name)] = content
	}
}

// configOf is the config space of a function, as far as it tells what the function is.
func configOf(vendor, device, class string) string {
	number := func(s string) uint32 {
		n, _ := strconv.ParseUint(strings.TrimPrefix(s, "0x"), 16, 32)
		return uint32(n)
	}
	b := make([]byte, 64)
	binary.LittleEndian.PutUint32(b[0:], number(device)<<16|number(vendor))
	binary.LittleEndian.PutUint32(b[8:], number(class)<<8)
	return string(b)
}

func modalias(vendor, device, class string) string {
	up := strings.ToUpper
	return fmt.Sprintf("pci:v0000%sd0000%ssv00001AF4sd00001100bc%ssc%si%s\n", up(vendor), up(device), up(class[:2]),
		up(class[2:4]), up(class[4:]))
}

// board has a graphics card that shares its IOMMU group with the host's own machinery.
func board() Tree {
	const card = "0000:00:02.1/0000:03:00."
	reset := Tree{"reset": "\n", "reset_method": "flr bus\n"}
	return Made(
		PCI{At: "0000:00:02.1", ID: "1022:43c6", Class: "060400", Driver: "pcieport", Group: 12},
		PCI{
			At: "0000:00:14.0", ID: "1022:790b", Class: "0c0500", Driver: "piix4_smbus", Group: 12,
			Files: Tree{"i2c-0/i2c-dev/i2c-0/dev": "89:0\n"},
		},
		PCI{At: "0000:00:14.3", ID: "1022:790e", Class: "060100", Group: 12},
		PCI{At: card + "0", ID: "10de:1c03", Class: "030000", Driver: "nouveau", Group: 12, Files: reset},
		PCI{At: card + "1", ID: "10de:10f1", Class: "040300", Driver: "snd_hda_intel", Group: 12, Files: reset},
	).With(Tree{"dev/i2c-0": "c 89:0\n"})
}

// NewBoard is a host whose graphics card shares its IOMMU group with the host's own machinery, with drivers that know
// their devices.
func NewBoard(tb testing.TB) *Kernel {
	k := NewKernel(tb, board())
	for driver, id := range map[string]string{
		"nouveau": "10de:1c03", "snd_hda_intel": "10de:10f1", "piix4_smbus": "1022:790b",
	} {
		k.IDs[driver] = []string{id}
	}
	return k
}

// VMD is a host with a disk behind a Volume Management Device.
func VMD() Tree {
	const port = "0000:00:0e.0/10000:e0:06.0"
	return Made(
		PCI{At: "0000:00:0e.0", ID: "8086:467f", Class: "010400", Driver: "vmd", Group: 6},
		PCI{At: port, ID: "8086:09ab", Class: "060400", Driver: "pcieport", Group: 6},
		PCI{
			At: port + "/10000:e1:00.0", ID: "144d:a808", Class: "010802", Driver: "nvme", Group: 6,
			Files: Tree{
				"nvme/nvme0/subsystem":         "-> ../../../../../../../../class/nvme",
				"nvme/nvme0/nvme0n1/dev":       "259:0\n",
				"nvme/nvme0/nvme0n1/subsystem": "-> ../../../../../../../../../class/block",
			},
		},
	).With(Tree{
		"sys/class/block/nvme0n1": arrow + "../../devices/pci0000:00/0000:00:0e.0/pci10000:e0/10000:e0:06.0/" +
			"10000:e1:00.0/nvme/nvme0/nvme0n1",
		"dev/nvme0n1": "b 259:0\n",
	})
}

// SMMU is a host of ARM's, which has put nothing into a group that never had a driver.
func SMMU() Tree {
	return Made(
		PCI{At: "0000:00:01.0", ID: "1234:11e8", Class: "00ff00", Group: -1},
		PCI{At: "0000:00:02.0", ID: "8086:10d3", Class: "020000", Driver: "e1000e", Group: 5},
	).With(Tree{
		"sys/class/iommu/ivhd0":                    Gone,
		"sys/class/iommu/smmu3.0x0000000009050000": arrow + "../../devices/platform/smmu",
		"sys/devices/platform/smmu/":               "",
	})
}

// InfiniBand is a host with a PF that has a port of InfiniBand.
func InfiniBand() Tree {
	const dev = "devices/pci0000:00/0000:00:01.0/0000:01:00.0/"
	up := arrow + "../../../../../../class/"
	return Made(
		PCI{At: "0000:00:01.0", ID: "1022:14a5", Class: "060400", Driver: "pcieport", Group: 1},
		PCI{At: "0000:00:01.0/0000:01:00.0", ID: "15b3:101b", Class: "020700", Driver: "mlx5_core", Group: 2,
			Files: Tree{
				"sriov_totalvfs": "8\n", "sriov_offset": "1\n", "sriov_stride": "1\n", "sriov_vf_device": "101c\n",
				"infiniband/mlx5_0/node_guid": "0c42:a103:0000:0001\n",
				"infiniband/mlx5_0/subsystem": up + "infiniband",
				"net/ibp1s0/address":          "00:00:10:29:fe:80:00:00:00:00:00:00:0c:42:a1:03:00:00:00:02\n",
				"net/ibp1s0/addr_assign_type": "0\n", "net/ibp1s0/subsystem": up + "net",
				"net/ibp1s0/device": "-> ../..",
				"net/ibp1s0/flags":  "0x1003\n", "net/ibp1s0/mtu": "2044\n", "net/ibp1s0/ifindex": "2\n",
			}},
	).With(Tree{
		"sys/class/infiniband/mlx5_0": arrow + "../../" + dev + "infiniband/mlx5_0",
		"sys/class/net/ibp1s0":        arrow + "../../" + dev + "net/ibp1s0",
	})
}

// Kept is a host with two VFs of the PF's own ids, of which one shares the PF's group.
func Kept() Tree {
	function := func(at, driver string, group int, files Tree) PCI {
		return PCI{At: "0000:00:01.0/" + at, ID: "8086:10c9", Class: "020000", Driver: driver, Group: group,
			Files: files}
	}
	return Made(
		function("0000:01:00.0", "igb", 2, Tree{
			"sriov_totalvfs": "7\n", "sriov_offset": "128\n", "sriov_stride": "2\n", "sriov_vf_device": "10c9\n",
			"virtfn0": "-> ../0000:01:10.0", "virtfn1": "-> ../0000:01:10.2",
		}),
		function("0000:01:10.0", "", 2, Tree{"physfn": "-> ../0000:01:00.0"}),
		function("0000:01:10.2", "", 3, Tree{"physfn": "-> ../0000:01:00.0"}),
	)
}
