package hosttest

import (
	"fmt"
	"strconv"
	"testing"
)

// pciIDs names the devices of the hosts in this file.
const pciIDs = "# pci.ids\n1002  Advanced Micro Devices, Inc. [AMD/ATI]\n\t164e  Raphael\n" +
	"1022  Advanced Micro Devices, Inc. [AMD]\n\t14db  Raphael PCIe GPP Bridge\n\t43f7  600 Series Chipset USB 3.2 " +
	"Controller\n\t790b  FCH SMBus Controller\n\t790e  FCH LPC Bridge\n" +
	"10de  NVIDIA Corporation\n\t22ba  AD102 High Definition Audio Controller\n\t2684  AD102 [GeForce RTX 4090]\n" +
	"144d  Samsung Electronics Co Ltd\n\ta80c  NVMe SSD Controller S4LV008[Pascal]\n" +
	"8086  Intel Corporation\n\t125c  Ethernet Controller I226-V\n\t154c  Ethernet Virtual Function 700 Series\n" +
	"\t1572  Ethernet Controller X710 for 10GbE SFP+\n"

// rootDisk is an NVMe disk with the host's root file system.
func rootDisk(port, address string, group int) (PCI, Tree) {
	at := port + "/" + address
	const disk = "nvme/nvme0/nvme0n1"
	return PCI{
			At: at, ID: "144d:a80c", Class: "010802", Driver: "nvme", Group: group,
			Files: resets.With(Tree{
				"nvme/nvme0/subsystem": "-> ../../../../../../class/nvme",
				disk + "/dev":          "259:0\n", disk + "/subsystem": "-> ../../../../../../../class/block",
			}),
		}, Tree{
			"sys/class/block/nvme0n1": arrow + "../../devices/pci0000:00/" + at + "/" + disk,
			"dev/nvme0n1":             "b 259:0\n",
			"proc/1/mountinfo":        "22 1 259:0 / / rw - ext4 /dev/nvme0n1 rw\n",
		}
}

// onInterface is the file of an interface of a card.
func onInterface(card, name, mac, index string) (files, links Tree) {
	return Tree{
			"net/" + name + "/address": mac + "\n", "net/" + name + "/addr_assign_type": "0\n",
			"net/" + name + "/device": "-> ../..", "net/" + name + "/subsystem": "-> ../../../../../../class/net",
			"net/" + name + "/flags": "0x1003\n", "net/" + name + "/mtu": "1500\n",
			"net/" + name + "/ifindex": index + "\n",
		}, Tree{
			sysNet + "/" + name: arrow + "../../devices/pci0000:00/" + card + "/net/" + name,
		}
}

// NewDesktop is a PC as people give its graphics card to a guest: an AMD board whose own graphics has the screen, a
// graphics card with its audio function, a disk with the root file system, and a NIC with the default route.
func NewDesktop(tb testing.TB) *Kernel {
	const nic = "0000:00:02.1/0000:05:00.0"
	files, links := onInterface(nic, "enp5s0", "52:54:00:00:05:01", "2")
	disk, more := rootDisk("0000:00:01.2", "0000:02:00.0", 15)
	bridge := func(at string, group int) PCI {
		return PCI{At: at, ID: "1022:14db", Class: "060400", Driver: "pcieport", Group: group}
	}

	k := NewKernel(tb, Made(
		bridge("0000:00:01.1", 10), bridge("0000:00:01.2", 11), bridge("0000:00:02.1", 12), bridge("0000:00:08.1", 13),
		PCI{At: "0000:00:14.0", ID: "1022:790b", Class: "0c0500", Driver: "piix4_smbus", Group: 8},
		PCI{At: "0000:00:14.3", ID: "1022:790e", Class: "060100", Group: 8},
		PCI{
			At: "0000:00:01.1/0000:01:00.0", ID: "10de:2684", Class: "030000", Driver: "nouveau", Group: 14,
			Files: resets.With(Tree{"boot_vga": "0\n"}),
		},
		PCI{
			At: "0000:00:01.1/0000:01:00.1", ID: "10de:22ba", Class: "040300", Driver: "snd_hda_intel", Group: 14,
			Files: resets,
		},
		disk,
		PCI{At: nic, ID: "8086:125c", Class: "020000", Driver: "igc", Group: 17, Files: resets.With(files)},
		PCI{
			At: "0000:00:08.1/0000:0e:00.0", ID: "1002:164e", Class: "030000", Driver: "amdgpu", Group: 18,
			Files: resets.With(Tree{"boot_vga": "1\n"}),
		},
		PCI{At: "0000:00:08.1/0000:0e:00.3", ID: "1022:43f7", Class: "0c0330", Driver: "xhci_hcd", Group: 19,
			Files: resets},
	).With(links).With(more).With(Tree{"usr/share/misc/pci.ids": pciIDs, "proc/cmdline": "root=/dev/nvme0n1 quiet\n"}))

	for driver, id := range map[string]string{
		"nouveau": "10de:2684", "snd_hda_intel": "10de:22ba", "igc": "8086:125c", "amdgpu": "1002:164e",
		"nvme": "144d:a80c", "xhci_hcd": "1022:43f7",
	} {
		k.IDs[driver] = []string{id}
	}

	k.Net.Addresses = []Address{{Interface: "enp5s0", CIDR: "192.0.2.10/24"}}
	k.Net.Routes = []Route{{To: "default", Over: []string{"enp5s0"}}}
	return k
}

// NewServer is a host with two NICs of two ports for guests, each of which can have 32 VFs, and one of its own with the
// default route.
func NewServer(tb testing.TB) *Kernel {
	const nic = "0000:00:01.3/0000:c1:00.0"
	files, links := onInterface(nic, "eno1", "52:54:00:00:c1:01", "2")
	disk, more := rootDisk("0000:00:01.2", "0000:02:00.0", 15)
	bridge := func(at string, group int) PCI {
		return PCI{At: at, ID: "1022:14db", Class: "060400", Driver: "pcieport", Group: group}
	}

	functions := []PCI{
		bridge("0000:00:01.2", 11), bridge("0000:00:01.3", 12), bridge("0000:00:03.1", 13), bridge("0000:00:03.2", 14),
		disk, {At: nic, ID: "8086:125c", Class: "020000", Driver: "igc", Group: 17, Files: resets.With(files)},
	}

	for i, at := range []string{
		"0000:00:03.1/0000:41:00.0", "0000:00:03.1/0000:41:00.1", "0000:00:03.2/0000:42:00.0",
		"0000:00:03.2/0000:42:00.1",
	} {
		name := fmt.Sprintf("ens%df%d", i/2+1, i%2)
		files, link := onInterface(at, name, fmt.Sprintf("52:54:00:00:4%d:0%d", i/2+1, i%2), strconv.Itoa(i+3))
		links = links.With(link)
		functions = append(functions, PCI{
			At: at, ID: "8086:1572", Class: "020000", Driver: "i40e", Group: 21 + i,
			Files: resets.With(files).With(Tree{
				"sriov_totalvfs": "32\n", "sriov_offset": strconv.Itoa(16+31*(i%2)) + "\n", "sriov_stride": "1\n",
				"sriov_vf_device": "154c\n", "sriov_drivers_autoprobe": "1\n",
			}),
		})
	}

	k := NewKernel(tb, Made(functions...).With(links).With(more).With(Tree{
		"usr/share/misc/pci.ids": pciIDs, "proc/cmdline": "root=/dev/nvme0n1 quiet\n", "sys/bus/pci/drivers/iavf/": "",
	}))

	for driver, id := range map[string]string{
		"iavf": "8086:154c", "i40e": "8086:1572", "igc": "8086:125c", "nvme": "144d:a80c",
	} {
		k.IDs[driver] = []string{id}
	}

	k.Net.Addresses = []Address{{Interface: "eno1", CIDR: "192.0.2.20/24"}}
	k.Net.Routes = []Route{{To: "default", Over: []string{"eno1"}}}
	k.ResetVFs = true
	return k
}
