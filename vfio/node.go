package vfio

import (
	"path"
	"strconv"
	"strings"

	"viaduct/internal/host"
	"viaduct/iommu"
)

// NoIOMMUFile says whether VFIO's noiommu mode is on, in which it takes devices that no IOMMU is in front of.
const NoIOMMUFile = "sys/module/vfio/parameters/enable_unsafe_noiommu_mode"

// NoIOMMU reports whether VFIO's noiommu mode is on.
func NoIOMMU(h *iommu.Host) (bool, error) {
	text, err := h.String(NoIOMMUFile)
	if host.Absent(err) {
		return false, nil
	}
	return text == "Y", err
}

// node is a node that a device on a VFIO driver can have.
type node struct {
	file string // below /dev
	sign string // the file of sysfs that is there if the kernel makes the node; it holds the node's number
	own  bool   // the device's, not its group's
	// unsafe is a group that no IOMMU is in front of.
	unsafe bool
}

// path is the file from the host's root.
func (n *node) path() string { return strings.TrimPrefix(n.file, "/") }

// nodes are the nodes that a device on a VFIO driver can have: its group's (CONFIG_VFIO_GROUP) and its own
// (CONFIG_VFIO_DEVICE_CDEV).
func nodes(h *iommu.Host, d *iommu.Device) ([]node, error) {
	return nodesAt(h, path.Join("sys/bus/pci/devices", d.Address.String()), d.Group)
}

// nodesAt is nodes of a device by its folder in sysfs.
func nodesAt(h *iommu.Host, device string, number *int) ([]node, error) {
	var out []node
	if number != nil {
		group := strconv.Itoa(*number)
		// Without an IOMMU, in VFIO's noiommu mode, it has another name (drivers/vfio/group.c).
		for i, name := range []string{group, "noiommu-" + group} {
			sign := path.Join("sys/class/vfio", name, "dev")
			out = append(out, node{file: "/dev/vfio/" + name, sign: sign, unsafe: i == 1})
		}
	}

	dir := path.Join(device, "vfio-dev")
	names, err := h.Names(dir)
	if err != nil && !host.Absent(err) {
		return nil, err
	}
	for _, n := range names {
		out = append(out, node{file: "/dev/vfio/devices/" + n, sign: path.Join(dir, n, "dev"), own: true})
	}
	return out, nil
}

// Nodes returns the nodes that the kernel has made for a device on a VFIO driver, which a virtual machine monitor
// opens: the group's first. They may come to /dev a moment later. On a host that was captured a group is taken to have
// one.
func Nodes(h *iommu.Host, d *iommu.Device) ([]string, error) {
	all, err := nodes(h, d)
	if err != nil {
		return nil, err
	}
	var out []string
	for i, n := range all {
		made, err := h.Has(n.sign)
		if err != nil {
			return nil, err
		}
		if made || i == 0 && d.Group != nil && !h.Live() {
			out = append(out, n.file)
		}
	}
	return out, nil
}

// Numbers returns the files of the host that hold the numbers (major:minor) of the nodes which a device on a VFIO
// driver can have. Those that it has not are not there.
func Numbers(h *iommu.Host, d *iommu.Device) ([]string, error) {
	all, err := nodes(h, d)
	out := make([]string, len(all))
	for i, n := range all {
		out[i] = n.sign
	}
	return out, err
}
