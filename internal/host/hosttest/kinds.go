package hosttest

import (
	"maps"
	"path"
)

// nic is a card below the port at 0000:00:01.0, with what its interfaces show, by name, and their links.
func nic(f PCI, interfaces map[string]Tree) (PCI, Tree) {
	links := Tree{}
	files := maps.Clone(f.Files)
	f.At = "0000:00:01.0/" + f.At
	for name, more := range interfaces {
		for file, content := range (Tree{
			"addr_assign_type": "0\n", "device": "-> ../..", "subsystem": "-> ../../../../../../class/net",
			"flags": "0x1003\n", "mtu": "1500\n",
		}).With(more) {
			files[path.Join("net", name, file)] = content
		}
		links[path.Join(sysNet, name)] = arrow + "../../devices/pci0000:00/" + f.At + "/net/" + name
	}
	f.Files = files
	return f, links
}

var (
	bridge  = PCI{At: "0000:00:01.0", ID: "1022:14a5", Class: "060400", Driver: "pcieport", Group: 1}
	resets  = Tree{"reset": "\n", "reset_method": "flr bus\n"}
	fourVFs = resets.With(Tree{
		"sriov_totalvfs": "4\n", "sriov_offset": "1\n", "sriov_stride": "1\n", "sriov_drivers_autoprobe": "1\n",
	})
)

// Representors is a host with a PF of two VFs, whose representors' names come before its own interface's.
func Representors() Tree {
	pf, links := nic(PCI{
		At: "0000:01:00.0", ID: "15b3:1017", Class: "020000", Driver: "mlx5_core", Group: 2,
		Files: fourVFs.With(Tree{
			"sriov_vf_device": "1018\n", "virtfn0": "-> ../0000:01:00.1", "virtfn1": "-> ../0000:01:00.2",
		}),
	}, map[string]Tree{
		"a-rep0": {"address": "ca:00:00:00:00:00\n", "phys_port_name": "pf0vf0\n", "ifindex": "2\n"},
		"a-rep1": {"address": "ca:00:00:00:00:01\n", "phys_port_name": "pf0vf1\n", "ifindex": "3\n"},
		"uplink": {"address": "52:54:00:00:00:01\n", "phys_port_name": "p0\n", "ifindex": "4\n"},
	})
	vf := func(at string, group int) PCI {
		return PCI{
			At: "0000:00:01.0/" + at, ID: "15b3:1018", Class: "020000", Driver: "vfio-pci", Group: group,
			Files: resets.With(Tree{"physfn": "-> ../0000:01:00.0", "driver_override": "vfio-pci\n"}),
		}
	}
	return Made(bridge, pf, vf("0000:01:00.1", 3), vf("0000:01:00.2", 4)).With(links)
}

// OnlyRepresentors is [Representors] with the PF's own interface in another network namespace.
func OnlyRepresentors() Tree {
	t := Representors()
	for _, gone := range []string{"uplink", "a-rep1"} {
		t = t.With(Tree{
			path.Join(sysNet, gone): Gone, "sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0/net/" + gone: Gone,
		})
	}
	return t
}

// TwoPorts is a host with a PF that has two ports on one function, of which the second one's name comes first.
func TwoPorts() Tree {
	pf, links := nic(PCI{
		At: "0000:01:00.0", ID: "15b3:1003", Class: "020000", Driver: "mlx4_core", Group: 2,
		Files: fourVFs.With(Tree{"sriov_vf_device": "1004\n"}),
	}, map[string]Tree{
		"ens2": {"address": "52:54:00:00:00:01\n", "dev_port": "0\n", "ifindex": "2\n"},
		"ens1": {"address": "52:54:00:00:00:02\n", "dev_port": "1\n", "ifindex": "3\n"},
	})
	return Made(bridge, pf).With(links)
}

// RoCE is a host with a PF that has RDMA over Ethernet, and no network interface here.
func RoCE() Tree {
	pf, links := nic(PCI{
		At: "0000:01:00.0", ID: "15b3:101d", Class: "020000", Driver: "mlx5_core", Group: 2,
		Files: fourVFs.With(Tree{
			"sriov_vf_device": "101e\n", "infiniband/mlx5_0/node_guid": "0c42:a103:0000:0001\n",
			"infiniband/mlx5_0/ports/1/link_layer": "Ethernet\n",
			"infiniband/mlx5_0/subsystem":          arrow + "../../../../../../class/infiniband",
		}),
	}, nil)
	links[sysNet+"/"] = ""
	links["sys/class/infiniband/mlx5_0"] = arrow + "../../devices/pci0000:00/" + pf.At + "/infiniband/mlx5_0"
	return Made(bridge, pf).With(links)
}

// OwnIDs is a host with a PF and three VFs that have its ids, as those of graphics cards.
func OwnIDs() Tree {
	function := func(at, driver string, group int, files Tree) PCI {
		return PCI{At: at, ID: "8086:56c0", Class: "038000", Driver: driver, Group: group, Files: resets.With(files)}
	}
	vf := Tree{"physfn": "-> ../0000:00:02.0", "driver_override": "vfio-pci\n"}
	return Made(
		function("0000:00:02.0", "i915", 2, fourVFs.With(Tree{
			"sriov_vf_device": "56c0\n", "virtfn0": "-> ../0000:00:02.1", "virtfn1": "-> ../0000:00:02.2",
			"virtfn2": "-> ../0000:00:02.3",
		})),
		function("0000:00:02.1", "vfio-pci", 3, vf), function("0000:00:02.2", "vfio-pci", 4, vf),
		function("0000:00:02.3", "vfio-pci", 5, vf),
	)
}

// VendorVFIO is a host with a PF of two VFs on its maker's driver, which makes VFIO devices of VFs.
func VendorVFIO() Tree {
	vf := func(at, vfio string, group int) PCI {
		return PCI{
			At: "0000:00:01.0/" + at, ID: "10de:2335", Class: "030200", Driver: "nvidia", Group: group,
			Files: resets.With(Tree{
				"physfn": "-> ../0000:17:00.0", "vfio-dev/" + vfio + "/dev": "511:" + vfio[4:] + "\n",
			}),
		}
	}
	return Made(
		bridge,
		PCI{
			At: "0000:00:01.0/0000:17:00.0", ID: "10de:2335", Class: "030200", Driver: "nvidia", Group: 2,
			Files: fourVFs.With(Tree{
				"sriov_vf_device": "2335\n", "virtfn0": "-> ../0000:17:00.1", "virtfn1": "-> ../0000:17:00.2",
			}),
		},
		vf("0000:17:00.1", "vfio0", 20), vf("0000:17:00.2", "vfio1", 21),
	).With(Tree{
		"sys/class/vfio/20/dev": "243:0\n", "sys/class/vfio/21/dev": "243:1\n",
		"dev/vfio/20": "c 243:0\n", "dev/vfio/21": "c 243:1\n",
		"dev/vfio/devices/vfio0": "c 511:0\n", "dev/vfio/devices/vfio1": "c 511:1\n",
	})
}

// Screen is a host whose firmware put its framebuffer on the memory of a device that is no VGA, on vfio-pci since the
// boot.
func Screen() Tree {
	return Made(PCI{
		At: "0000:c3:00.0", ID: "1002:1586", Class: "038000", Driver: "vfio-pci", Group: 30,
		Files: resets.With(Tree{
			"resource": "0x0000002800000000 0x0000002fffffffff 0x000000000014220c\n", "driver_override": "vfio-pci\n",
		}),
	}).With(Tree{"proc/iomem": "2800000000-2fffffffff : 0000:c3:00.0\n  2800000000-2801fa3fff : BOOTFB\n"})
}

// TakenDisks is a host with two equal disks, on vfio-pci since the boot, so that nobody can tell their serial numbers.
func TakenDisks() Tree {
	disk := func(root, at string, group int) PCI {
		return PCI{
			At: root + "/" + at, ID: "2646:5024", Class: "010802", Driver: "vfio-pci", Group: group,
			Files: resets.With(Tree{"driver_override": "vfio-pci\n"}),
		}
	}
	return Made(disk("0000:00:02.0", "0000:02:00.0", 12), disk("0000:00:03.0", "0000:03:00.0", 13))
}

// Platform is a host of ARM's with a group of a PCI device and one that is none, and a group of none alone.
func Platform() Tree {
	const at = "sys/devices/platform/"
	up := arrow + "../../../../devices/platform/"
	return Made(
		PCI{At: "0000:00:01.0", ID: "8086:10d3", Class: "020000", Driver: "e1000e", Group: 5, Files: resets},
	).With(Tree{
		at + "fe000000.dma/driver": arrow + "../../../bus/platform/drivers/pl330", at + "fe100000.gpu/uevent": "\n",
		"sys/bus/platform/drivers/pl330/":                "",
		"sys/kernel/iommu_groups/5/devices/fe000000.dma": up + "fe000000.dma",
		"sys/kernel/iommu_groups/9/devices/fe100000.gpu": up + "fe100000.gpu",
		"sys/kernel/iommu_groups/9/type":                 "DMA\n",
	})
}

// NoIOMMU is a host without an IOMMU, and with a device that is on vfio-pci in VFIO's noiommu mode.
func NoIOMMU() Tree {
	return Made(
		PCI{At: "0000:00:01.0", ID: "8086:10d3", Class: "020000", Driver: "vfio-pci", Group: 0, Files: resets},
	).With(Tree{
		"sys/class/iommu/ivhd0": Gone, "sys/kernel/iommu_groups/0/type": Gone,
		"sys/class/vfio/noiommu-0":               arrow + "../../devices/virtual/vfio/noiommu-0",
		"sys/devices/virtual/vfio/noiommu-0/dev": "243:0\n",
	})
}

// Kinds are hosts of each kind that is made here.
func Kinds() map[string]Tree {
	return map[string]Tree{
		"board": board(), "vmd": VMD(), "smmu": SMMU(), "infiniband": InfiniBand(), "kept": Kept(),
		"representors": Representors(), "only representors": OnlyRepresentors(), "two ports": TwoPorts(),
		"own ids": OwnIDs(), "vendor vfio": VendorVFIO(), "screen": Screen(), "taken disks": TakenDisks(),
		"platform": Platform(), "noiommu": NoIOMMU(), "roce": RoCE(),
	}
}
