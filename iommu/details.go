package iommu

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"viaduct/internal/host"
)

// Details is everything that sysfs says of one PCI device beyond [Device]. None of it is read by [Scan].
type Details struct {
	Revision     uint8
	Modalias     string
	ClassDevices map[string][]string // by class, as block: [nvme0n1]; network interfaces included
	MACs         map[string]string   // by network interface; a device on a vfio driver has none
	PowerState   string              // D0, D3hot ...; "" on kernels without the file
	ResetMethods []string            // in the order the kernel tries them (Linux 5.15)
	CanReset     *bool               // whether the device can be reset by itself; nil if that is not known
	Path         string              // see [PhysicalPath]
	Parents      []Address           // from the root port down
	Unit         string              // name of the IOMMU in front of it, "" if none
	VFIODevice   string              // name of the cdev (vfioN) while a vfio driver has it, else ""
	Link         *Link               // nil if there is no PCIe link
	BARs         []BAR
	BootVGA      bool
	VFs          *VFDetails // a PF's
}

// Link is a PCIe link as it is and as the device could have it, in the kernel's words ("8.0 GT/s PCIe").
type Link struct {
	Speed, MaxSpeed string
	Width, MaxWidth int
}

// BAR is a memory or port range of the device.
type BAR struct {
	Index        int
	Size         uint64
	IO           bool // port range
	Prefetchable bool
	Wide         bool // 64-bit
}

// VFDetails is what a PF says of its VFs. The count that is in force is the number of virtfn links: see [SRIOV].
type VFDetails struct {
	Offset, Stride int
	VFDevice       uint16 // the VFs' device id
	Autoprobe      *bool  // sriov_drivers_autoprobe; nil on kernels without it
	MSIXPool       *int   // sriov_vf_total_msix; nil where the PF's driver has no such pool
}

// ReadDetails reads one PCI device. Its link's speed and width, and a bridge's bus numbers, the kernel reads from
// config space (drivers/pci/pci-sysfs.c), but it wakes no sleeping device for that.
func ReadDetails(h *Host, a Address) (*Details, error) {
	dir, err := h.Open(path.Join(pciDevices, a.String()))
	if host.Absent(err) {
		return nil, fmt.Errorf("%s: %w", a, ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	r := reader{dir: dir}
	d := &Details{
		Modalias:     r.text("modalias"),
		Revision:     uint8(r.number("revision")),
		PowerState:   r.text("power_state"),
		ResetMethods: strings.Fields(r.text("reset_method")),
		BootVGA:      r.number("boot_vga") == 1,
		Unit:         r.link("iommu"),
	}
	d.CanReset, err = canReset(h, dir)
	r.keep(err)

	if names := r.names("vfio-dev"); len(names) > 0 {
		d.VFIODevice = names[0]
	}
	if speed := r.text("current_link_speed"); speed != "" {
		d.Link = &Link{
			Speed:    speed,
			MaxSpeed: r.text("max_link_speed"),
			Width:    r.number("current_link_width"),
			MaxWidth: r.number("max_link_width"),
		}
	}
	if dir.Exists("sriov_offset") {
		d.VFs = &VFDetails{Offset: r.number("sriov_offset"), Stride: r.number("sriov_stride")}
		if s := r.text("sriov_vf_device"); s != "" {
			id, err := strconv.ParseUint(s, 16, 16)
			r.keep(inFile(dir, "sriov_vf_device", err))
			d.VFs.VFDevice = uint16(id)
		}
		if s := r.text("sriov_drivers_autoprobe"); s != "" {
			on := s == "1"
			d.VFs.Autoprobe = &on
		}
		busy, err := changing(h)
		r.keep(err)
		if dir.Exists("sriov_vf_total_msix") && !busy[a.String()] {
			// Reading it takes the device's lock.
			pool := r.number("sriov_vf_total_msix")
			d.VFs.MSIXPool = &pool
		}
	}

	d.BARs, err = parseResources(r.text("resource"))
	r.keep(inFile(dir, "resource", err))
	d.Parents, d.Path, err = readPath(h, a)
	r.keep(err)
	classes, err := classDevices(dir)
	r.keep(err)
	d.ClassDevices, d.MACs = map[string][]string{}, map[string]string{}
	for class, paths := range classes {
		for _, p := range paths {
			d.ClassDevices[class] = append(d.ClassDevices[class], path.Base(p))
			if class == "net" {
				d.MACs[path.Base(p)] = r.text(path.Join(p, "address"))
			}
		}
		slices.Sort(d.ClassDevices[class])
	}
	return d, r.err
}

// canReset reports whether the kernel knows a way to reset a device by itself: it has the file for that, which may be
// there or not in a snapshot of an older viaduct.
func canReset(h *Host, dir *host.Dir) (*bool, error) {
	can, err := dir.Has("reset")
	if err != nil || !can && !h.Live() && dir.Exists("reset_method") {
		return nil, err
	}
	return &can, nil
}

func inFile(dir *host.Dir, name string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", dir.Path(name), err)
}

// reader reads optional attributes and keeps the first error that is not absence.
type reader struct {
	dir *host.Dir
	err error
}

func (r *reader) keep(err error) {
	if r.err == nil && err != nil && !host.Absent(err) {
		r.err = err
	}
}

func (r *reader) text(name string) string {
	s, err := r.dir.String(name)
	r.keep(err)
	return s
}

func (r *reader) number(name string) int {
	n, err := r.dir.Int(name)
	r.keep(err)
	return n
}

func (r *reader) link(name string) string {
	s, err := r.dir.LinkBase(name)
	if err != nil {
		if !errors.Is(err, unix.EINVAL) {
			// No link: "iommu" is a directory in the IOMMU's own PCI device.
			r.keep(err)
		}
		return ""
	}
	return s
}

func (r *reader) names(name string) []string {
	n, err := r.dir.Names(name)
	r.keep(err)
	return n
}

// parseResources decodes the lines "start end flags" of a device's resource file; the first six are its BARs. Flags are
// those of include/linux/ioport.h.
func parseResources(s string) ([]BAR, error) {
	const ioFlag, prefetch, mem64 = 0x100, 0x2000, 0x100000
	var bars []BAR
	for i, line := range strings.Split(s, "\n") {
		f := strings.Fields(line)
		if i == 6 || len(f) == 0 {
			break
		}
		var n [3]uint64
		for j := range n {
			var err error
			if len(f) != len(n) {
				return nil, fmt.Errorf("resource line %q: want start, end and flags", line)
			}
			if n[j], err = strconv.ParseUint(f[j], 0, 64); err != nil {
				return nil, fmt.Errorf("resource line %q: %w", line, err)
			}
		}

		if n[2] == 0 || n[1] <= n[0] {
			// Not there, or not assigned.
			continue
		}
		bars = append(bars, BAR{
			Index:        i,
			Size:         n[1] - n[0] + 1,
			IO:           n[2]&ioFlag != 0,
			Prefetchable: n[2]&prefetch != 0,
			Wide:         n[2]&mem64 != 0,
		})
	}
	return bars, nil
}

// readPath gives the PCI devices above one and its physical path.
func readPath(h *Host, a Address) ([]Address, string, error) {
	target, err := h.Link(path.Join(pciDevices, a.String()))
	if err != nil {
		return nil, "", err
	}
	chain := pathAddresses(target)
	if len(chain) == 0 {
		return nil, "", nil
	}
	pf, err := h.LinkBase(path.Join(pciDevices, a.String(), "physfn"))
	if host.Absent(err) {
		return chain[:len(chain)-1], PhysicalPath(chain), nil
	}

	if err != nil {
		return nil, "", err
	}
	// A VF's own function number depends on the PF's settings; its place is its PF's, and its index there.
	pfAddress, err := ParseAddress(pf)
	if err != nil {
		return nil, "", err
	}
	if target, err = h.Link(path.Join(pciDevices, pfAddress.String())); err != nil {
		return nil, "", err
	}

	pfDevice, err := ReadDevice(h, pfAddress)
	if err != nil {
		return nil, "", err
	}
	index := pfDevice.SRIOV.index(a)
	if index < 0 {
		// It goes away just now.
		return nil, "", fmt.Errorf("%s is not a VF of %s: %w", a, pfAddress, fs.ErrNotExist)
	}
	return chain[:len(chain)-1], PhysicalPath(pathAddresses(target)) + "/vf" + strconv.Itoa(index), nil
}

// PathOf is the physical path of a device that a [Scan] found, for which it needs one look.
func PathOf(h *Host, d *Device) (string, error) {
	a, end := d.Address, ""
	if d.PhysFn != nil {
		a, end = *d.PhysFn, "/vf"+strconv.Itoa(d.VFIndex)
	}
	target, err := h.Link(path.Join(pciDevices, a.String()))
	if err != nil {
		return "", err
	}
	return PhysicalPath(pathAddresses(target)) + end, nil
}

// pathAddresses are the PCI addresses in a sysfs path, from the root bus down.
func pathAddresses(target string) []Address {
	var chain []Address
	for e := range strings.SplitSeq(target, "/") {
		if a, err := ParseAddress(e); err == nil {
			chain = append(chain, a)
		}
	}
	return chain
}

// PhysicalPath names the place of a device by what does not change when buses are numbered anew: the address on the
// root bus, then device and function on each bus below, as "0000:00:01.0/00.0". A VF is its PF's path and "/vfN".
func PhysicalPath(chain []Address) string {
	if len(chain) == 0 {
		return ""
	}
	b := []byte(chain[0].String())
	for _, a := range chain[1:] {
		b = fmt.Appendf(b, "/%02x.%d", a.Device, a.Function)
	}
	return string(b)
}

// Region is a range of bus addresses that a guest's memory cannot have.
type Region struct {
	Start, End uint64 // End is the last address
	Type       string // direct, direct-relaxable, msi, reserved
}

// ReservedRegions reads the reserved ranges of a group: the union over its devices.
func ReservedRegions(h *Host, group int) ([]Region, error) {
	s, err := h.String(path.Join(groupsDir, strconv.Itoa(group), "reserved_regions"))
	if host.Absent(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	regions, err := parseRegions(s)
	if err != nil {
		return nil, fmt.Errorf("reserved regions of group %d: %w", group, err)
	}
	return regions, nil
}

// parseRegions decodes lines "0x%016llx 0x%016llx type" (drivers/iommu/iommu.c, iommu_group_show_resv_regions).
func parseRegions(s string) ([]Region, error) {
	var out []Region
	for line := range strings.Lines(s) {
		f := strings.Fields(line)
		if len(f) != 3 {
			return nil, fmt.Errorf("line %q: want start, end and type", strings.TrimSpace(line))
		}
		start, err1 := strconv.ParseUint(f[0], 0, 64)
		end, err2 := strconv.ParseUint(f[1], 0, 64)
		if err := errors.Join(err1, err2); err != nil || end < start {
			return nil, fmt.Errorf("line %q: no range", strings.TrimSpace(line))
		}
		out = append(out, Region{start, end, f[2]})
	}
	return out, nil
}
