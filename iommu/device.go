package iommu

import (
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"viaduct/internal/host"
)

// Paths of the kernel's files, relative to a host's root.
const (
	pciDevices = "sys/bus/pci/devices"
	pciDrivers = "sys/bus/pci/drivers"
	groupsDir  = "sys/kernel/iommu_groups"
	unitsDir   = "sys/class/iommu"
	netClass   = "sys/class/net"
)

// ErrNotFound is wrapped by errors that say that a device or group is not on this host.
const ErrNotFound = host.Error("not on this host")

// Device is what `list` knows of a device: what one pass with a few system calls a device gives. A Device is what was
// read at one moment; nothing keeps it up to date.
type Device struct {
	// Name is the kernel's; a PCI device's is its address.
	Name string
	// Address and ID are those of a PCI device. PCI is false of a platform, mdev or other device that is in a group.
	Address Address
	PCI     bool
	ID
	// Driver and DriverOverride are "" if there is none. VFIO reports whether the driver makes a VFIO device of it.
	Driver         string
	DriverOverride string
	VFIO           bool
	// NUMANode is nil if it is not known, Group if the device is in no IOMMU group.
	NUMANode *int
	Group    *int
	// Netdevs are the function's own network interfaces. Ports are the others that are made of it: the representors of
	// its VFs, its subfunctions' interfaces, and those of USB devices below a controller.
	Netdevs, Ports []string
	// PhysFn is a VF's PF, and VFIndex the VF's index there. PhysFn is nil if this is not a VF.
	PhysFn  *Address
	VFIndex int
	// SRIOV is nil if this is no PF.
	SRIOV *SRIOV
	// Parent is the device whose driver made this device's bus, as a Volume Management Device's does; nil of all
	// others.
	Parent *Address
	// As is the role that somebody has given the device instead of its class's; see [Device.Role].
	As Role
}

// InGroup reports whether the device is in the IOMMU group with this number.
func (d *Device) InGroup(id int) bool { return d.Group != nil && *d.Group == id }

// Together reports whether two devices are in one IOMMU group.
func (d *Device) Together(other *Device) bool { return other.Group != nil && d.InGroup(*other.Group) }

// Sibling reports whether two devices are functions of one card; a VF is none.
func (d *Device) Sibling(other *Device) bool {
	one, two := d.Address, other.Address
	one.Function, two.Function = 0, 0
	return d.PCI && other.PCI && one == two && d.Address != other.Address && d.PhysFn == nil && other.PhysFn == nil
}

// ID is what a PCI function says it is, as the kernel puts it into its modalias.
type ID struct {
	Vendor    uint16 `json:"vendor"`
	Device    uint16 `json:"device"`
	Subvendor uint16 `json:"subvendor"`
	Subdevice uint16 `json:"subdevice"`
	Class     uint32 `json:"class"` // 24 bits: base class, subclass, programming interface
}

// SRIOV is a PF's count of VFs.
type SRIOV struct {
	Total int  // sriov_totalvfs
	VFs   []VF // by index; while VFs come or go, some may be missing in between
}

// index is the index of a VF, -1 if it is none of the PF's.
func (s *SRIOV) index(a Address) int {
	if s != nil {
		for _, vf := range s.VFs {
			if vf.Address == a {
				return vf.Index
			}
		}
	}
	return -1
}

// VF is one of a PF's VFs.
type VF struct {
	Index   int
	Address Address
}

// IsBridge reports whether this is a PCI-to-PCI or CardBus bridge (a header of type 1 or 2, which VFIO refuses): it is
// shared by what is below it and never taken.
func (d *Device) IsBridge() bool { return d.PCI && (d.Class>>8 == 0x0604 || d.Class>>8 == 0x0607) }

// Blocks reports whether the device keeps its group from being viable: a driver of the host does its DMA. The harmless
// ones are those that set driver_managed_dma: VFIO's, pci-stub, and pcieport of PCIe ports
// (drivers/pci/pcie/portdrv.c).
func (d *Device) Blocks() bool {
	return d.Driver != "" && d.Driver != "pci-stub" && d.Driver != "pcieport" && !d.VFIO
}

// IsVFIODriver tells VFIO drivers from all others by name. Every driver of the kernel's drivers/vfio has "vfio" in its
// name: vfio-pci, mlx5_vfio_pci, xe-vfio-pci, vfio-platform, vfio_mdev. Others may be VFIO drivers too: see
// Device.VFIO.
func IsVFIODriver(name string) bool { return strings.Contains(name, "vfio") }

// readVFIO reports whether a device's driver has made a VFIO device of it: it is there as vfio-dev/vfioN (Linux 6.1).
// On older kernels only the driver's name tells: that its group has a node proves only that some member is bound.
func readVFIO(dir *host.Dir, driver string) (bool, error) {
	switch {
	case driver == "" || driver == "pcieport":
		return false, nil
	case IsVFIODriver(driver):
		return true, nil
	}
	return dir.Has("vfio-dev")
}

// Modalias is what the kernel matches drivers by; see [ParseModalias].
func (id ID) Modalias() string {
	return fmt.Sprintf("pci:v%08Xd%08Xsv%08Xsd%08Xbc%02Xsc%02Xi%02X",
		id.Vendor, id.Device, id.Subvendor, id.Subdevice, id.Class>>16, id.Class>>8&0xff, id.Class&0xff)
}

// ParseModalias decodes a PCI modalias: pci:v00008086d000010CAsv...sd...bc02sc00i00 (drivers/pci/pci-sysfs.c,
// modalias_show).
func ParseModalias(s string) (ID, error) {
	rest, ok := strings.CutPrefix(s, "pci:")
	var n [7]uint64
	for i, f := range [...]struct {
		key    string
		digits int
	}{{"v", 8}, {"d", 8}, {"sv", 8}, {"sd", 8}, {"bc", 2}, {"sc", 2}, {"i", 2}} {
		if ok {
			rest, ok = strings.CutPrefix(rest, f.key)
		}
		if !ok || len(rest) < f.digits {
			return ID{}, fmt.Errorf("invalid PCI modalias %q", s)
		}
		v, err := strconv.ParseUint(rest[:f.digits], 16, 32)
		if err != nil {
			return ID{}, fmt.Errorf("invalid PCI modalias %q", s)
		}
		n[i], rest = v, rest[f.digits:]
	}

	if rest != "" {
		return ID{}, fmt.Errorf("invalid PCI modalias %q", s)
	}
	return ID{
		Vendor: uint16(n[0]), Device: uint16(n[1]), Subvendor: uint16(n[2]), Subdevice: uint16(n[3]),
		Class: uint32(n[4]<<16 | n[5]<<8 | n[6]),
	}, nil
}

// readDevice reads a device from its directory. It fails with an error that host.Absent recognises when the device went
// away meanwhile: the one attribute that every PCI device has is read last. Without override, driver_override is left
// out.
func readDevice(dir *host.Dir, name string, override bool) (Device, error) {
	d := Device{Name: name}
	var err error
	if d.Driver, err = dir.LinkBase("driver"); host.Absent(err) {
		d.Driver = ""
	} else if err != nil {
		return d, err
	}
	if d.VFIO, err = readVFIO(dir, d.Driver); err != nil {
		return d, err
	}

	if override {
		if d.DriverOverride, err = optional(driverOverride(dir.String("driver_override"))); err != nil {
			return d, err
		}
	}
	if node, err := dir.SteadyInt("numa_node"); err == nil {
		d.NUMANode = numaNode(node)
	} else if !host.Absent(err) {
		return d, err
	}
	if d.Address, err = ParseAddress(name); err != nil {
		return d, nil
	}
	d.PCI = true
	if d.SRIOV, err = readSRIOV(dir); err != nil {
		return d, err
	}
	alias, err := dir.Steady("modalias")
	if err != nil {
		return d, err
	}
	if d.ID, err = ParseModalias(alias); err != nil {
		return d, fmt.Errorf("%s: %w", dir.Path("modalias"), err)
	}
	return d, nil
}

// nodes are the numbers of the first NUMA nodes: hosts have few, and many devices.
var nodes = func() (all [64]int) {
	for i := range all {
		all[i] = i
	}
	return all
}()

// numaNode is nil for -1, which is the kernel's word for none.
func numaNode(n int) *int {
	switch {
	case n < 0:
		return nil
	case n >= len(nodes):
		return &n
	}
	return &nodes[n]
}

// ReadDriver reads the driver that a device is on, "" if it is on none.
func ReadDriver(h *Host, a Address) (string, error) {
	dir := path.Join(pciDevices, a.String())
	driver, err := h.LinkBase(path.Join(dir, "driver"))
	if host.Absent(err) && h.Exists(dir) {
		return "", nil
	}
	return driver, err
}

// ReadDriverOverride reads the override that a device has, "" if it has none.
func ReadDriverOverride(h *Host, a Address) (string, error) {
	return driverOverride(h.String(path.Join(pciDevices, a.String(), "driver_override")))
}

// driverOverride: the kernel prints no override as C prints a null pointer.
func driverOverride(s string, err error) (string, error) {
	if s == "(null)" {
		s = ""
	}
	return s, err
}

func optional(s string, err error) (string, error) {
	if host.Absent(err) {
		return "", nil
	}
	return s, err
}

// readSRIOV reads a PF's total and its VFs, by their links: reading sriov_numvfs would wait for a write that is in
// progress. The links are listed and not counted up from virtfn0, as a removal that is stuck has taken the first ones
// away.
func readSRIOV(dir *host.Dir) (*SRIOV, error) {
	// Most devices have none, and to see that is quicker than to fail to open it.
	if pf, err := dir.Has("sriov_totalvfs"); !pf {
		return nil, err
	}
	total, err := dir.Int("sriov_totalvfs")
	if host.Absent(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if total < 0 || total > 0xffff {
		// A 16-bit register.
		return nil, fmt.Errorf("%s: %d VFs", dir.Path("sriov_totalvfs"), total)
	}

	s := &SRIOV{Total: total}
	names, err := dir.Names(".")
	if err != nil {
		return nil, err
	}
	for _, n := range names {
		number, ok := strings.CutPrefix(n, "virtfn")
		index, err := strconv.Atoi(number)
		if !ok || err != nil || index < 0 || index >= total {
			continue
		}
		link, err := dir.LinkBase(n)
		if host.Absent(err) {
			continue
		}
		if err != nil {
			return nil, err
		}

		a, err := ParseAddress(link)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", dir.Path(n), err)
		}
		s.VFs = append(s.VFs, VF{index, a})
	}

	slices.SortFunc(s.VFs, func(a, b VF) int { return a.Index - b.Index })
	return s, nil
}

// ReadDevice reads one PCI device, without its place among a PF's VFs, which takes a [Scan].
func ReadDevice(h *Host, a Address) (Device, error) {
	dir, err := h.Open(path.Join(pciDevices, a.String()))
	if host.Absent(err) {
		return Device{}, fmt.Errorf("%s: %w", a, ErrNotFound)
	}
	if err != nil {
		return Device{}, err
	}
	defer dir.Close()
	d, err := readDevice(dir, a.String(), true)
	if err != nil {
		return d, err
	}

	group, err := dir.LinkBase("iommu_group")
	if host.Absent(err) {
		return d, nil
	}
	if err == nil {
		var id int
		id, err = strconv.Atoi(group)
		d.Group = &id
	}
	return d, err
}
