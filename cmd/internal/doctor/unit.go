package doctor

import (
	"errors"
	"io/fs"
	"path"
	"slices"
	"strings"

	"viaduct/iommu"
	"viaduct/iommu/acpi"
)

const tablesDir = "sys/firmware/acpi/tables"

// table checks that the firmware's table about IOMMUs is there, sound, and about this host.
func table(f *Facts) Check {
	c := Check{Name: "table", Title: "firmware's table"}
	var sound, hidden []string
	for i := range f.Tables {
		t := &f.Tables[i]
		file := path.Join(tablesDir, t.Signature)
		switch {
		case errors.Is(t.Err, acpi.ErrTable):
			c.set(Failed, "the firmware's %s table: %v", t.Signature, t.Err)
			if f.works() {
				c.set(Warned, "the firmware's %s table: %v; the kernel takes it all the same", t.Signature, t.Err)
			}
			c.Hint = "update the firmware, or tell its maker"
			c.see(file, t.Err.Error())
			return c
		case errors.Is(t.Err, fs.ErrPermission):
			hidden = append(hidden, t.Signature)
		case t.Err != nil:
			c.set(Unknown, "the firmware's %s table could not be read: %v", t.Signature, t.Err)
			c.see(file, t.Err.Error())
			return c
		default:
			sound = append(sound, t.Signature)
		}
	}

	if len(f.Faults) > 0 {
		first := f.Faults[0]
		c.set(Failed, "%s", first)
		if f.works() {
			c.Status = Warned
		}
		c.Hint = "update the firmware, or tell its maker"
		for _, fault := range f.Faults {
			c.see(path.Join(tablesDir, fault.Signature), fault.Text)
		}
		return c
	}
	if line := f.complaint(); line != "" {
		c.set(Warned, "the kernel finds fault with the firmware's table: %s", line)
		if !f.present() {
			c.Status = Failed
		}
		c.Hint = "update the firmware, or tell its maker"
		c.see("dev/kmsg", line)
		return c
	}

	switch {
	case len(hidden) > 0:
		c.set(Unknown, "there is %s, and reading it takes root", strings.Join(hidden, " and "))
		c.see(path.Join(tablesDir, hidden[0]), "permission denied")
		c.Hint = "run this as root"
	case len(sound) > 0:
		c.set(Passed, "%s %s there and sound", strings.Join(sound, " and "), verb(len(sound)))
		for _, s := range sound {
			c.see(path.Join(tablesDir, s), "there")
		}
	case f.has(iommu.KindAMDVi) || f.has(iommu.KindVTd):
		// The drivers of these find their units by the table alone.
		c.set(Unknown, "not known: the table by which the kernel found the IOMMU is not shown here")
		c.see(tablesDir, "")
	case f.present():
		c.set(Passed, "there is no table; the IOMMU was found without one (e.g. by a device tree)")
	default:
		c.set(Failed, "there is no table of %s: %s", strings.Join(acpi.Signatures, ", "), f.Off.Why)
		c.see(tablesDir, "")
		c.Hint = f.Off.Hint
	}
	return c
}

// has reports whether there is an active IOMMU of that kind.
func (f *Facts) has(kind iommu.UnitKind) bool {
	return slices.ContainsFunc(f.Topology.Units, func(u iommu.Unit) bool { return u.Kind == kind })
}

// works reports whether devices are in groups of an active IOMMU.
func (f *Facts) works() bool { return len(f.Topology.Units) > 0 && len(f.Topology.Groups) > 0 }

// complaint is the line of the kernel's that calls a table wrong, or found no IOMMU where one describes it; "" if there
// is none.
func (f *Facts) complaint() string {
	tables := []string{"DMAR", "AMD-Vi", "IVRS", "IORT", "VIOT"}
	wrong := []string{"BIOS is broken", "Firmware Bug", "No supported address widths", "Can't validate DRHD"}
	for _, line := range f.Log {
		in := func(words []string) bool {
			return slices.ContainsFunc(words, func(w string) bool { return strings.Contains(line, w) })
		}
		if in(tables) && in(wrong) {
			return line
		}
	}
	return ""
}

// active checks that an IOMMU is in use.
func active(f *Facts) Check {
	c := Check{Name: "iommu", Title: "IOMMU"}
	if !f.present() {
		c.set(Failed, "no IOMMU is active: %s", f.Off.Why)
		c.Hint = f.Off.Hint
		if f.Off.File != "" {
			c.see(f.Off.File, f.Off.Value)
		}
		c.see("sys/class/iommu", "")
		return c
	}
	var names []string
	for _, u := range f.Topology.Units {
		names = append(names, u.Name)
	}
	c.see("sys/class/iommu", strings.Join(names, " "))
	c.set(Passed, "active: %s", some(names))
	if len(names) == 0 {
		c.set(Passed, "active: there are groups")
	}
	return c
}

// coverage checks that a unit covers the devices.
func coverage(f *Facts) Check {
	c := Check{Name: "coverage", Title: "coverage"}
	if !f.present() {
		return c.without()
	}

	var bare []*iommu.Device
	f.each(func(d *iommu.Device) {
		// The host's own machinery needs none; where groups come late, a device without a driver has none yet.
		meant := d.Role() == iommu.RoleGuest || f.Selected != nil && d.Role() != iommu.RolePort
		if meant && d.PCI && d.Group == nil && (d.Driver != "" || !f.Topology.LateGroups()) {
			bare = append(bare, d)
		}
	})

	if len(bare) == 0 {
		if c.set(Passed, "an IOMMU covers each device"); f.Selected != nil {
			c.set(Passed, "an IOMMU covers what was asked about")
		}
		return c
	}

	c.Devices = namesOf(bare)
	c.set(Warned, "no IOMMU covers %s", some(c.Devices))
	if f.Selected != nil {
		c.Status = Failed
	}

	for _, d := range bare[:1] {
		c.see("sys/bus/pci/devices/"+d.Name+"/iommu_group", "")
	}

	c.Hint = "put the device into another slot, or update the firmware"
	if signature := f.leftOut(c.Devices); signature != "" {
		c.set(Failed, "the firmware's %s table leaves out %s, so no IOMMU covers it", signature, some(c.Devices))
		c.see(path.Join(tablesDir, signature), "without it")
		c.Hint = "update the firmware, or tell its maker; another slot may help"
	}

	if value, word := iommu.LastOf(f.Words, "intel_iommu", "igfx_off"); value != "" {
		c.Hint = f.Loader.RemoveValue(word, value)
		f.seeLine(&c)
	}

	return c
}

// leftOut is the signature of the table that describes the active units, and puts none of these devices behind one; ""
// if that is not so.
func (f *Facts) leftOut(devices []string) string {
	signature := ""
	for _, u := range f.Units {
		if !u.Active || u.Described == nil {
			continue
		}
		signature = u.Table
		if slices.ContainsFunc(devices, func(d string) bool { return slices.Contains(u.Described, d) }) {
			return ""
		}
	}
	return signature
}

// each calls do for the devices that a check is about: those that were asked about, or all.
func (f *Facts) each(do func(d *iommu.Device)) {
	if f.Selected != nil {
		for _, d := range f.Selected {
			do(d)
		}
		return
	}
	f.Topology.All(func(d *iommu.Device) bool {
		do(d)
		return true
	})
}

// groups checks that no group is one of VFIO's noiommu mode.
func groups(f *Facts) Check {
	c := Check{Name: "groups", Title: "groups"}
	if !f.present() && len(f.Topology.Groups) == 0 {
		return c.without()
	}
	var unreal []string
	for i := range f.Topology.Groups {
		g := &f.Topology.Groups[i]
		if g.NoIOMMU {
			for j := range g.Devices {
				unreal = append(unreal, g.Devices[j].Name)
			}
			c.see("sys/class/vfio", "noiommu-"+itoa(g.ID))
		}
	}
	if len(unreal) > 0 {
		c.Devices = unreal
		c.set(Failed, "no IOMMU is in front of %s: VFIO made the groups in its noiommu mode", some(unreal))
		c.Hint = "viaduct unbind them; `echo N > /sys/module/vfio/parameters/enable_unsafe_noiommu_mode`"
		return c
	}
	c.set(Passed, "%d, each made by an IOMMU", len(f.Topology.Groups))
	c.see("sys/kernel/iommu_groups", itoa(len(f.Topology.Groups)))
	return c
}

// remapping checks that a device cannot forge the interrupts of others.
func remapping(f *Facts) Check {
	c := Check{Name: "interrupt_remapping", Title: "interrupt remapping"}
	switch on := f.Topology.InterruptRemapping; {
	case !f.present():
		return c.without()
	case on == nil:
		c.set(Unknown, "not known: no interrupt's controller tells")
		c.see("sys/kernel/irq/*/chip_name", "")
		return c
	case *on:
		c.set(Passed, "on")
		c.see(f.Interrupt.File, f.Interrupt.Value)
		return c
	}
	c.set(Failed, "off, so VFIO refuses devices: %s", f.NotRemapped.Why)
	if f.Params[unsafeInterrupts] == "Y" || f.Params[unsafeInterruptsIOMMUFD] == "Y" {
		c.set(Failed, "off, and VFIO takes devices all the same (allow_unsafe_interrupts), which can forge others': %s",
			f.NotRemapped.Why)
	}
	c.Hint = f.NotRemapped.Hint
	c.see(f.Interrupt.File, f.Interrupt.Value)
	if f.NotRemapped.File != "" {
		c.see(f.NotRemapped.File, f.NotRemapped.Value)
	}
	return c
}

func (f *Facts) hasTable(signature string) bool {
	return slices.ContainsFunc(f.Tables, func(t iommu.Firmware) bool { return t.Signature == signature })
}

// directRanges checks that the firmware claims none of a device's address space: VFIO refuses those.
func directRanges(f *Facts) Check {
	c := Check{Name: "direct_ranges", Title: "firmware's memory ranges"}
	if !f.present() {
		return c.without()
	}

	var ranges []GroupRange
	for _, r := range f.Direct {
		asked := func(d *iommu.Device) bool { return d.InGroup(r.Group) }
		if f.Selected == nil || slices.ContainsFunc(f.Selected, asked) {
			ranges = append(ranges, r)
		}
	}

	if len(ranges) == 0 {
		c.set(Passed, "the firmware keeps no device from guests")
		c.see("sys/kernel/iommu_groups/*/reserved_regions", "no line with direct")
		return c
	}

	for _, r := range ranges {
		for _, n := range r.Devices {
			if !slices.Contains(c.Devices, n) {
				c.Devices = append(c.Devices, n)
			}
		}
		c.see("sys/kernel/iommu_groups/"+itoa(r.Group)+"/reserved_regions", hexRange(r.Region)+" direct")
	}

	c.set(Warned, "the firmware wants memory of %s left where it is (%s), and VFIO refuses such a device",
		some(c.Devices), f.rangeKind())
	if f.Selected != nil {
		c.Status = Failed
	}

	if f.older(6, 6) && f.has(iommu.KindAMDVi) {
		// The rule for all IOMMUs came after 6.1, where Intel's driver alone had one.
		c.set(Warned, "the firmware wants memory of %s left where it is (%s); Linux %s may give such a device away, "+
			"and newer kernels refuse it", some(c.Devices), f.rangeKind(), f.Release)
	}

	c.Hint = "turn off what uses it in the firmware's menu (shared memory of a management controller, USB legacy " +
		"support, " +
		"Intel graphics), or update the firmware; such a device cannot be given to a guest"

	return c
}

// rangeKind is the word of the tables for such a range.
func (f *Facts) rangeKind() string {
	switch {
	case f.hasTable("DMAR"):
		return "RMRR"
	case f.hasTable("IVRS"):
		return "IVMD"
	case f.hasTable("IORT"):
		return "RMR"
	}
	return "direct"
}
