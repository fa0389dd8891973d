// Package gather reads what package doctor judges a host by. It changes nothing, and opens no device.
package gather

import (
	"errors"
	"path"
	"slices"
	"strconv"
	"strings"

	"viaduct/cmd/internal/doctor"
	"viaduct/internal/bootloader"
	"viaduct/internal/host"
	"viaduct/iommu"
	"viaduct/vfio/holder"
)

// Facts reads the host. Selected are the devices that are asked about; nil asks about the host alone.
func Facts(h *iommu.Host, t *iommu.Topology, selected []*iommu.Device) (*doctor.Facts, error) {
	g := gatherer{Host: h}
	f := &doctor.Facts{
		Topology: t, Selected: selected, Wanted: selected, Live: h.Live(), Whole: h.Live() ||
			h.Exists("proc/self/status"),
		Arch: g.text("proc/sys/kernel/arch"), Release: g.text("proc/sys/kernel/osrelease"),
		Words: iommu.CommandLine(h), Config: iommu.KernelConfig(h), Log: iommu.KernelLines(h),
		Loader: bootloader.Find(h.Host), Tables: iommu.ReadFirmware(h), Xen: g.text("sys/hypervisor/type") == "xen",
	}
	if selected == nil {
		t.All(func(d *iommu.Device) bool {
			if d.PCI && d.VFIO {
				f.Wanted = append(f.Wanted, d)
			}
			return true
		})
	}

	var err error
	if f.Interrupt.File, f.Interrupt.Value, err = iommu.InterruptController(h); err != nil {
		return nil, err
	}
	if f.Faults = iommu.CheckFirmware(h, t, f.Tables); len(t.Units) == 0 && len(t.Groups) == 0 {
		f.Off = iommu.WhyOff(h, t)
	}
	if on := t.InterruptRemapping; on != nil && !*on {
		f.NotRemapped = iommu.WhyNotRemapped(h, t)
	}
	if f.Units, err = iommu.ReadUnits(h, t, f.Tables); err != nil {
		return nil, err
	}
	if f.Direct, err = directRanges(h, t); err != nil {
		return nil, err
	}
	if f.PFs, err = pfs(h, t); err != nil {
		return nil, err
	}
	g.modules(f)
	g.host(f)
	return f, g.devices(f)
}

type gatherer struct{ *iommu.Host }

// text is an attribute; "" if it is not there, or not to be read.
func (g *gatherer) text(name string) string {
	s, _ := g.String(name)
	return strings.TrimSpace(s)
}

// directRanges reads the ranges of all groups that VFIO refuses devices for.
func directRanges(h *iommu.Host, t *iommu.Topology) ([]doctor.GroupRange, error) {
	var out []doctor.GroupRange
	for i := range t.Groups {
		group := &t.Groups[i]
		regions, err := iommu.ReservedRegions(h, group.ID)
		if err != nil {
			return nil, err
		}
		for _, r := range regions {
			if r.Type != "direct" {
				continue
			}
			names := []string{}
			for _, d := range group.Endpoints() {
				names = append(names, d.Name)
			}
			if len(names) > 0 {
				out = append(out, doctor.GroupRange{Group: group.ID, Region: r, Devices: names})
			}
		}
	}
	return out, nil
}

// pfs reads whether the VFs of each PF have room.
func pfs(h *iommu.Host, t *iommu.Topology) ([]doctor.PF, error) {
	parents, err := iommu.Parents(h, t)
	if err != nil {
		return nil, err
	}
	var out []doctor.PF
	t.All(func(d *iommu.Device) bool {
		if !d.PCI || d.SRIOV == nil || d.SRIOV.Total == 0 {
			return true
		}
		pf := doctor.PF{Name: d.Name, Total: d.SRIOV.Total, LastBus: int(d.Address.Bus), Port: parents[d.Name],
			Buses: -1}
		var all []iommu.Address
		if all, err = iommu.VFAddresses(h, d.Address); err != nil {
			return false
		}
		if len(all) > 0 {
			pf.LastBus = int(all[len(all)-1].Bus)
		}
		dir := "sys/bus/pci/devices"
		if n, err := h.Int(path.Join(dir, pf.Port, "subordinate_bus_number")); err == nil && pf.Port != "" {
			pf.Buses = n
		}
		resource, _ := h.String(path.Join(dir, d.Name, "resource"))
		pf.Unmapped = vfsUnmapped(resource)
		out = append(out, pf)
		return true
	})
	return out, err
}

// vfsUnmapped reports whether a PF's resources for its VFs, which follow the six BARs and the ROM, were left without
// an
// address (IORESOURCE_UNSET, include/linux/ioport.h).
func vfsUnmapped(resource string) bool {
	const first, last, unset = 7, 12, 0x20000000
	for i, line := range strings.Split(resource, "\n") {
		f := strings.Fields(line)
		if i < first || i > last || len(f) != 3 {
			continue
		}
		if flags, err := strconv.ParseUint(f[2], 0, 64); err == nil && flags&unset != 0 {
			return true
		}
	}
	return false
}

// host reads what is of the whole host.
func (g *gatherer) host(f *doctor.Facts) {
	f.Lockdown = chosen(g.text("sys/kernel/security/lockdown"))
	// Four bytes of attributes stand before the value (Documentation/filesystems/efivarfs.rst).
	const efi = "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
	if b, err := g.Read(efi); err == nil && len(b) == 5 {
		f.Secure = new(b[4] == 1)
	}
	if f.Whole && !g.Exists("sys/firmware/efi") {
		// Nothing but EFI has Secure Boot.
		f.Secure = new(false)
	}
	if f.Secure != nil && *f.Secure {
		f.Unsigned = g.unsigned(f.Release)
	}

	cpu, err := g.Read("proc/cpuinfo")
	if err == nil {
		for line := range strings.Lines(string(cpu)) {
			if name, value, _ := strings.Cut(line, ":"); strings.TrimSpace(name) == "flags" {
				flags := strings.Fields(value)
				f.CPUVirt = new(slices.Contains(flags, "svm") || slices.Contains(flags, "vmx"))
				f.Guest = slices.Contains(flags, "hypervisor")
				break
			}
		}
	}
	if g.Exists("sys/class/misc") || g.Live() {
		f.KVM = new(g.Exists("sys/class/misc/kvm") || g.Live() && g.Exists("dev/kvm"))
	}
	if online := g.text("sys/devices/system/node/online"); online != "" {
		f.NUMANodes = count(online)
	} else if f.Whole && !g.Exists("sys/devices/system/node") {
		// The kernel knows of none.
		f.NUMANodes = 1
	}

	const huge = "sys/kernel/mm/hugepages"
	sizes, _ := g.Names(huge)
	for _, s := range sizes {
		kb, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimPrefix(s, "hugepages-"), "kB"), 10, 64)
		total, err1 := g.Int(path.Join(huge, s, "nr_hugepages"))
		free, err2 := g.Int(path.Join(huge, s, "free_hugepages"))
		if err == nil && err1 == nil && err2 == nil {
			f.HugePages = append(f.HugePages, doctor.HugePages{Size: kb << 10, Total: total, Free: free})
		}
	}
	f.LockLimit, f.LockKnown = g.lockLimit()
	g.nodes(f)
}

// chosen is the word in brackets of a file that lists what there is, as "none [integrity] confidentiality".
func chosen(s string) string {
	_, rest, _ := strings.Cut(s, "[")
	word, _, _ := strings.Cut(rest, "]")
	return word
}

// count is how many numbers are in a list as "0-3,8".
func count(list string) int {
	n := 0
	for part := range strings.SplitSeq(list, ",") {
		from, to, more := strings.Cut(part, "-")
		a, err := strconv.Atoi(from)
		if err != nil {
			return 0
		}
		b := a
		if more {
			if b, err = strconv.Atoi(to); err != nil || b < a {
				return 0
			}
		}
		n += b - a + 1
	}
	return n
}

// lockLimit is how much memory who runs this may lock: nil if there is no limit for him. A capture has that of who
// made
// it.
func (g *gatherer) lockLimit() (*uint64, bool) {
	status, err := g.String("proc/self/status")
	if err != nil {
		return nil, false
	}

	for line := range strings.Lines(status) {
		if hex, ok := strings.CutPrefix(line, "CapEff:"); ok {
			caps, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
			// CAP_IPC_LOCK (include/uapi/linux/capability.h)
			const ipcLock = 14
			if err == nil && caps>>ipcLock&1 == 1 {
				return nil, true
			}
		}
	}

	limits, err := g.String("proc/self/limits")
	if err != nil {
		return nil, false
	}

	for line := range strings.Lines(limits) {
		if rest, ok := strings.CutPrefix(line, "Max locked memory"); ok {
			fields := strings.Fields(rest)
			if len(fields) == 0 {
				return nil, false
			}
			n, err := strconv.ParseUint(fields[0], 10, 64)
			if err != nil {
				return nil, fields[0] == "unlimited"
			}
			return &n, true
		}
	}

	return nil, false
}

// nodes reads who may open the files of VFIO. A capture has none.
func (g *gatherer) nodes(f *doctor.Facts) {
	names := []string{"dev/vfio/vfio", "dev/iommu"}
	for _, dir := range []string{"dev/vfio", "dev/vfio/devices"} {
		below, err := g.Names(dir)
		if err != nil {
			continue
		}
		for _, n := range below {
			if at := path.Join(dir, n); n != "devices" && !slices.Contains(names, at) {
				names = append(names, at)
			}
		}
	}
	for _, n := range names {
		if !g.Exists(n) {
			continue
		}
		node := doctor.Node{Path: n}
		if o, err := g.Owner(n); err == nil {
			node.Mode = o.Mode
		}
		f.Nodes = append(f.Nodes, node)
	}
}

// devices reads what is of the devices that are wanted.
func (g *gatherer) devices(f *doctor.Facts) error {
	f.Resets, f.Power = map[string]iommu.Reset{}, map[string]string{}
	for _, d := range f.Wanted {
		if !d.PCI {
			continue
		}
		r, err := iommu.ResetOf(g.Host, f.Topology, d)
		if host.Absent(err) {
			continue
		}
		if err != nil {
			return err
		}
		f.Resets[d.Name] = r
		f.Power[d.Name] = g.text(path.Join("sys/bus/pci/devices", d.Name, "power_state"))
	}

	shown, err := holder.Displays(g.Host, f.Wanted)
	switch {
	case errors.Is(err, holder.ErrBlind):
		f.Blind = err.Error()
	case err != nil:
		return err
	}
	for _, s := range shown {
		f.Displays = append(f.Displays, doctor.Display{Device: s.Device, What: s.What, Evidence: g.seenDisplay(s)})
	}
	return nil
}

// seenDisplay is where it was seen that a device is a display.
func (g *gatherer) seenDisplay(s holder.Holder) doctor.Evidence {
	for _, name := range []string{"boot_vga", "boot_display"} {
		file := path.Join("sys/bus/pci/devices", s.Device, name)
		if v := g.text(file); v == "1" && s.Brief == "boot display" {
			return doctor.Evidence{File: file, Value: v}
		}
	}
	if s.Brief == "console" {
		return doctor.Evidence{File: "sys/class/graphics", Value: s.What}
	}
	return doctor.Evidence{File: "proc/iomem", Value: s.What}
}
