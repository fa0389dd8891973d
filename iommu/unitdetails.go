package iommu

import (
	"cmp"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"viaduct/internal/host"
	"viaduct/iommu/acpi"
)

// UnitDetails is everything known of one IOMMU, from the kernel and from the firmware's tables.
type UnitDetails struct {
	Unit
	Active    bool     // the kernel uses it; of one that only a table describes the name is ""
	Table     string   // signature of the table that describes it; "" if none does, or that is not known
	Block     int      // offset of its block there
	Segment   uint32   // as the table has it
	Base      uint64   // of its registers; 0 if that is not known
	Function  *Address // its own PCI function; nil if it is none, or that is not known
	Devices   []string // those that the kernel has it translate
	Described []string // those of this host's that the table puts behind it; nil if no table is known

	EFR  *acpi.EFR // an AMD IOMMU's registers; nil if they are not known
	EFR2 *acpi.EFR2
	// Capability is the header of AMD's PCI capability.
	Capability *uint32
	Cap        *acpi.VTdCap // a VT-d unit's registers
	ECap       *acpi.VTdECap
	Features   Features

	Windows []Region // ranges that no memory of a guest's behind it can have: the union over its devices
	Ranges  []Direct // what the firmware wants left where it is
}

// Features are what an IOMMU can do, as far as that is known; nil stands for unknown.
type Features struct {
	InterruptRemapping *bool
	X2APIC             *bool
	PostedInterrupts   *bool // AMD's AVIC, Intel's posted interrupts
	DirtyTracking      *bool
	ATS, PRI           *bool
	PASIDBits          *int // 0: no PASIDs
	Nested             *bool
	HostTables         *bool // AMD's alone: page tables of the kind that track what is written
	FiveLevels         *bool
	SNP                *bool // AMD's alone
	SnoopControl       *bool // Intel's alone
	Emulated           *bool // a hypervisor's, for which each mapping is dear
	InputBits          *int  // width of the addresses that devices may use
	PhysicalBits       *int  // width of the host's addresses
}

// ReadUnits tells of each IOMMU of the host, those that only the firmware describes last. A table that cannot be read
// leaves out what it would tell: see [ReadFirmware].
func ReadUnits(h *Host, t *Topology, tables []Firmware) ([]UnitDetails, error) {
	devices, err := places(h, t)
	if err != nil {
		return nil, err
	}
	said := decodeFirmware(tables)
	var out []UnitDetails
	used := map[int]bool{}
	for _, u := range t.Units {
		d, err := readUnit(h, t, u)
		if err != nil {
			return nil, err
		}
		i := slices.IndexFunc(said.units, func(s described) bool { return s.is(&d) })
		if i >= 0 {
			used[i] = true
			d.describe(&said.units[i], devices)
		}
		if err := d.registers(h, said.image(i)); err != nil {
			return nil, err
		}
		out = append(out, d)
	}
	for i := range said.units {
		if !used[i] {
			d := UnitDetails{Unit: Unit{Kind: said.units[i].kind}}
			d.describe(&said.units[i], devices)
			if d.Kind == KindAMDVi {
				d.amdMeaning(&said.units[i])
			}
			out = append(out, d)
		}
	}

	for i := range out {
		if err := out[i].direct(h, said.ranges, devices); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// readUnit reads what the kernel tells of a unit by itself.
func readUnit(h *Host, t *Topology, u Unit) (UnitDetails, error) {
	d := UnitDetails{Unit: u, Active: true}
	link := path.Join(unitsDir, u.Name)
	target, err := optional(h.Link(link))
	if err != nil {
		return d, err
	}
	if a, ok := lastAddress(target); ok {
		d.Function = &a
	} else if a, ok := parseAddress(u.Name); ok {
		// virtio-iommu
		d.Function = &a
	}
	_, base, _ := strings.Cut(u.Name, ".0x")
	if u.Kind == KindVTd {
		if base, err = optional(h.String(path.Join(link, "intel-iommu/address"))); err != nil {
			return d, err
		}
	}
	if d.Base, err = strconv.ParseUint(base, 16, 64); err != nil {
		d.Base = 0
	}
	d.Devices, err = h.Names(path.Join(link, "devices"))
	if err != nil && !host.Absent(err) {
		return d, err
	}
	slices.SortFunc(d.Devices, compareNames)
	return d, d.windows(h, t)
}

// compareNames orders names of devices as [CompareDevices] does.
func compareNames(a, b string) int {
	one, pci1 := parseAddress(a)
	two, pci2 := parseAddress(b)
	return CompareDevices(Device{Name: a, Address: one, PCI: pci1}, Device{Name: b, Address: two, PCI: pci2})
}

// windows reads the ranges that the kernel keeps from guests behind the unit. Those that the firmware has for single
// devices are told apart: see Ranges.
func (d *UnitDetails) windows(h *Host, t *Topology) error {
	groups := map[int]bool{}
	t.All(func(device *Device) bool {
		if _, in := slices.BinarySearchFunc(d.Devices, device.Name, compareNames); in && device.Group != nil {
			groups[*device.Group] = true
		}
		return true
	})
	seen := map[Region]bool{}
	for id := range groups {
		regions, err := ReservedRegions(h, id)
		if err != nil {
			return err
		}
		for _, r := range regions {
			if !seen[r] && (r.Type == "msi" || r.Type == "reserved") {
				seen[r] = true
				d.Windows = append(d.Windows, r)
			}
		}
	}
	slices.SortFunc(d.Windows, compareRegions)
	return nil
}

func compareRegions(a, b Region) int {
	return cmp.Or(cmp.Compare(a.Start, b.Start), cmp.Compare(a.End, b.End), cmp.Compare(a.Type, b.Type))
}

// is reports whether a table's description is of this unit.
func (s *described) is(d *UnitDetails) bool {
	switch {
	case s.kind != d.Kind:
		return false
	case s.own != nil && d.Function != nil:
		return *s.own == *d.Function
	}
	return s.base != 0 && s.base == d.Base
}

func (d *UnitDetails) describe(s *described, devices map[string]*placed) {
	d.Table, d.Block, d.Segment, d.Base = s.table, s.block.Offset, s.segment, s.base
	if d.Function == nil {
		d.Function = s.own
	}
	if s.bits > 0 {
		d.Features.PhysicalBits = &s.bits
	}
	d.Described = []string{}
	for name, p := range devices {
		if s.covers(p) {
			d.Described = append(d.Described, name)
		}
	}
	slices.SortFunc(d.Described, compareNames)
}

// image is what a table says of a unit's registers; nil if that is nothing.
func (said *decoded) image(i int) *described {
	if i < 0 {
		return nil
	}
	return &said.units[i]
}

// registers reads the unit's registers, and says what they mean.
func (d *UnitDetails) registers(h *Host, image *described) error {
	dir := path.Join(unitsDir, d.Name)
	switch d.Kind {
	case KindAMDVi:
		return d.amd(h, path.Join(dir, "amd-iommu"), image)
	case KindVTd:
		return d.intel(h, path.Join(dir, "intel-iommu"), image)
	case KindVirtio:
		// It has no other way to tell interrupts apart than the host's; the guest's memory is the host's business.
		d.Features.Emulated = new(true)
	}
	return nil
}

func (d *UnitDetails) amd(h *Host, dir string, image *described) error {
	text, err := optional(h.String(path.Join(dir, "cap")))
	if err != nil {
		return err
	}
	if n, err := strconv.ParseUint(text, 16, 32); err == nil && text != "" {
		header := uint32(n)
		d.Capability = &header
	}
	if text, err = optional(h.String(path.Join(dir, "features"))); err != nil {
		return err
	}
	release, _ := h.String("proc/sys/kernel/osrelease")
	known := acpi.EFR(0)
	if image != nil && image.efr != nil {
		known = *image.efr
	}
	if efr, efr2, ok := amdFeatures(text, known, release); ok {
		d.EFR, d.EFR2 = &efr, efr2
	}
	d.amdMeaning(image)
	return nil
}

// amdFeatures decodes the attribute "features". Linux has one word there up to 5.19, then two, first EFR2 and EFR, and
// from 6.7 on EFR and EFR2 (drivers/iommu/amd/init.c, amd_iommu_show_features). The image is the table's, 0 if there
// is
// none.
func amdFeatures(text string, image acpi.EFR, release string) (efr acpi.EFR, efr2 *acpi.EFR2, ok bool) {
	one, two, both := strings.Cut(text, ":")
	a, err := strconv.ParseUint(one, 16, 64)
	if err != nil {
		return 0, nil, false
	}
	if !both {
		return acpi.EFR(a), nil, true
	}
	b, err := strconv.ParseUint(two, 16, 64)
	if err != nil {
		return 0, nil, false
	}

	first := !olderThan(release, 6, 7)
	switch image := uint64(image); {
	case image != 0 && a == image && b != image:
		first = true
	case image != 0 && b == image && a != image:
		first = false
	case acpi.EFR(a).Plausible() && !acpi.EFR(b).Plausible():
		first = true
	case acpi.EFR(b).Plausible() && !acpi.EFR(a).Plausible():
		first = false
	}
	if !first {
		a, b = b, a
	}
	second := acpi.EFR2(b)
	return acpi.EFR(a), &second, true
}

// olderThan reports whether a kernel's release is known to be before a version.
func olderThan(release string, major, minor int) bool {
	var a, b int
	if n, _ := fmt.Sscanf(release, "%d.%d", &a, &b); n != 2 {
		return false
	}
	return a < major || a == major && b < minor
}

// amdMeaning says what an AMD IOMMU's registers mean, or where the kernel does not tell them the table's images of
// them. Interrupts can always be remapped; whether they are is the host's: see Topology.
func (d *UnitDetails) amdMeaning(image *described) {
	if image != nil && d.EFR == nil {
		d.EFR = image.efr
	}
	if image != nil && d.EFR2 == nil {
		d.EFR2 = image.efr2
	}

	f := &d.Features
	f.InterruptRemapping = new(true)
	const iotlb, npCache = 1 << 24, 1 << 26
	if image != nil {
		f.ATS = &image.iotlb
	}
	if d.Capability != nil {
		f.ATS, f.Emulated = new(*d.Capability&iotlb != 0), new(*d.Capability&npCache != 0)
	}
	if d.EFR == nil {
		return
	}

	e := *d.EFR
	// Without tables of its own the kernel has the guests' (drivers/iommu/amd/init.c, early_amd_iommu_init), which note
	// nothing that a device wrote.
	host := e.HostLevels() > 0 && (image == nil || !image.noHost)
	f.HostTables = &host
	f.X2APIC, f.PostedInterrupts = new(e.X2APIC()), new(e.AVIC())
	f.DirtyTracking = new(host && e.DirtyTracking())
	f.PRI, f.PASIDBits, f.Nested = new(e.PageRequests()), new(e.PASIDBits()), new(e.GuestTables())
	f.FiveLevels, f.SNP = new(host && e.HostLevels() >= 5 || e.GuestTables() && e.GuestLevels() == 5), new(e.SNP())
	if host {
		// Linux: the least of what the table has and of what its page tables reach.
		width := min(64, 12+9*e.HostLevels())
		if image != nil {
			width = min(width, image.input)
		}
		f.InputBits = &width
	}
}

func (d *UnitDetails) intel(h *Host, dir string, image *described) error {
	number := func(name string) (*uint64, error) {
		text, err := optional(h.String(path.Join(dir, name)))
		if err != nil || text == "" {
			return nil, err
		}
		n, err := strconv.ParseUint(text, 16, 64)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", h.Path(path.Join(dir, name)), err)
		}
		return &n, nil
	}
	cap, err := number("cap")
	if err != nil {
		return err
	}
	ecap, err := number("ecap")
	if err != nil {
		return err
	}

	f := &d.Features
	if cap != nil {
		c := acpi.VTdCap(*cap)
		d.Cap = &c
		f.PostedInterrupts, f.FiveLevels = new(c.PostedInterrupts()), new(c.FiveLevels())
		f.InputBits, f.Emulated = new(c.GuestBits()), new(c.Emulated())
	}
	if ecap != nil {
		e := acpi.VTdECap(*ecap)
		d.ECap = &e
		f.InterruptRemapping, f.DirtyTracking = new(e.InterruptRemapping()), new(e.DirtyTracking())
		// drivers/iommu/intel/irq_remapping.c, dmar_x2apic_optout
		optOut := image != nil && image.noX2APIC && !slices.Contains(CommandLine(h), "intremap=no_x2apic_optout")
		f.X2APIC = new(e.X2APIC() && !optOut)
		f.ATS, f.PRI, f.PASIDBits = new(e.DeviceTLB()), new(e.PageRequests()), new(e.PASIDBits())
		f.Nested, f.SnoopControl = new(e.Nested()), new(e.SnoopControl())
	}
	return nil
}
