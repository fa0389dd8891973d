package iommu

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"viaduct/internal/host"
	"viaduct/internal/journal"
)

// What a snapshot holds. These are lists of what is wanted, never of what is not: some files of sysfs block, wake the
// device, or act when they are touched, and a snapshot is handed to other people.
var (
	hostFiles = []string{
		"proc/cmdline",
		"proc/sys/kernel/osrelease",
		"sys/firmware/acpi/tables/IVRS",
		"sys/firmware/acpi/tables/DMAR",
		"sys/firmware/acpi/tables/IORT",
		"sys/firmware/acpi/tables/VIOT",
		"sys/firmware/acpi/tables/IVRS1",
		"sys/firmware/acpi/tables/DMAR1",
		"sys/firmware/acpi/tables/IORT1",
		"sys/firmware/acpi/tables/VIOT1",
		"proc/sys/kernel/arch",
		"etc/viaduct/host.yaml",

		"proc/iomem",
		"proc/xen/capabilities",
		"run/systemd/container",
		"sys/class/dmi/id/product_name",
		"sys/class/dmi/id/sys_vendor",
		"sys/devices/system/node/online",
		"sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c",
		"sys/hypervisor/type",
		"sys/kernel/security/lockdown",
	}
	deviceFiles = []string{
		"modalias", "vendor", "device", "subsystem_vendor", "subsystem_device", "class", "revision", "numa_node",
		"driver_override",
		"power_state", "reset_method", "boot_vga", "boot_display", "resource", "enable", "config",
		"subordinate_bus_number", "current_link_speed", "max_link_speed", "current_link_width", "max_link_width",
		"sriov_totalvfs", "sriov_offset", "sriov_stride", "sriov_vf_device", "sriov_drivers_autoprobe",
		"sriov_vf_total_msix",
	}
	deviceLinks = []string{"driver", "iommu", "iommu_group", "physfn", "subsystem"}
	classFiles  = []string{
		"address",
		"operstate",
		"flags",
		"mtu",
		"carrier",
		"speed",
		"phys_port_name",
		"phys_switch_id",
		"addr_assign_type",
		"dev",
		"size",
		"serial",
		"node_guid",
		"dev_port",
		"ports/1/link_layer",
		"ports/2/link_layer",
	}
	usbFiles   = []string{"idVendor", "idProduct", "manufacturer", "product"}
	groupFiles = []string{"name", "type", "reserved_regions"}
	unitFiles  = []string{
		"amd-iommu/cap", "amd-iommu/features", "intel-iommu/address", "intel-iommu/cap", "intel-iommu/ecap",
		"intel-iommu/version",
		"intel-iommu/domains_supported", "intel-iommu/domains_used",
	}
)

// Capture writes a snapshot of the host: what every command that only looks reads, and the names of the devices it has.
// [Open] reads it back. It holds MAC addresses, serial numbers and the names of guests; w stays the caller's to close.
// Facts are what it has beside the host's files, as settings of VFs and who uses devices.
func Capture(h *Host, w io.Writer, facts ...Fact) error { return captureTo(h, w, false, facts) }

// CaptureRedacted is Capture for who is not to learn which host it is: MAC addresses, GUIDs and serial numbers are
// masked, each always in the same way, and of the kernel's command line only what is about devices is kept.
func CaptureRedacted(h *Host, w io.Writer, facts ...Fact) error { return captureTo(h, w, true, facts) }

func captureTo(h *Host, w io.Writer, redacted bool, facts []Fact) error {
	t, err := Scan(h)
	if err != nil {
		return err
	}
	out, err := host.NewSnapshot(w)
	if err != nil {
		return err
	}
	c := capture{h: h, w: out}
	if redacted {
		c.redact = newRedactor(h, t)
	}
	// Scan takes its absence for an unmounted sysfs.
	c.dir("sys/kernel")
	c.dir(pciDevices)
	c.files("", hostFiles)
	const dropIns = "etc/viaduct/host.d"
	if names, err := h.Names(dropIns); err == nil {
		c.files(dropIns, names)
	}

	// What bonds and viaduct itself remember of devices that do not show it now.
	const bonds = "proc/net/bonding"
	if names, err := h.Names(bonds); err == nil {
		c.files(bonds, names)
	}
	if names, err := h.Names(journal.Dir); err == nil {
		c.files(journal.Dir, slices.DeleteFunc(names, func(n string) bool {
			return !strings.HasPrefix(n, journal.Taken) && !strings.HasPrefix(n, journal.Lease)
		}))
	}

	const state = "var/lib/viaduct"
	if names, err := h.Names(state); err == nil {
		others := func(n string) bool { return !strings.HasPrefix(n, "known-") && n != "log.jsonl" }
		c.files(state, slices.DeleteFunc(names, others))
	}

	c.records()
	c.facts(facts)
	c.system()
	c.interrupts()
	for _, u := range t.Units {
		real := c.linked(path.Join(unitsDir, u.Name))
		c.files(real, unitFiles)
		c.linked(path.Join(real, "device"))
		c.links(path.Join(real, "devices"))
	}

	for _, g := range t.Groups {
		at := fmt.Sprintf("%s/%d", groupsDir, g.ID)
		c.files(at, groupFiles)
		c.dir(path.Join(at, "devices"))
		c.links(path.Join(at, "devices"))
	}

	c.dir(netClass)
	c.links(netClass)
	c.links("sys/class/infiniband")
	// Which tell the groups of its noiommu mode.
	c.links("sys/class/vfio")
	others, err := alternativeNames(h)
	if err := c.told(alternatives, others, err); err != nil {
		return err
	}
	made, err := permanentAddresses(h, t)
	if err := c.told(permanents, made, err); err != nil {
		return err
	}
	if names, err := h.Names(pciDrivers); err == nil {
		for _, n := range names {
			c.dir(path.Join(pciDrivers, n))
		}
	}

	t.All(func(d *Device) bool {
		c.device(d)
		return c.err == nil
	})
	c.migration()
	names := OpenNames(h)
	defer names.Close()
	c.add(idFiles[0], excerpt(names, t))
	if c.err != nil {
		return c.err
	}
	return out.Close()
}

type capture struct {
	h      *Host
	w      *host.SnapshotWriter
	redact *redactor // nil: all is as it is
	err    error
}

func (c *capture) keep(err error) {
	if c.err == nil {
		c.err = err
	}
}

func (c *capture) add(name string, data []byte) {
	if data != nil && c.redact != nil {
		name, data = c.redact.text(name), c.redact.file(name, data)
	}
	if data != nil {
		c.keep(c.w.File(name, data))
	}
}

// untold is what a snapshot has in place of what the kernel, which has no file for it, refused to tell.
const untold = "?\n"

// told adds what the kernel tells of, or that it does not.
func (c *capture) told(name string, data []byte, err error) error {
	if isRefusal(err) {
		data, err = []byte(untold), nil
	}
	c.add(name, data)
	return err
}

// readTold reads what a snapshot has of what the kernel has no file for; "" if there is none.
func readTold(h *Host, name, what string) (string, error) {
	text, err := h.Read(name)
	if err != nil {
		return "", unlessAbsent(err)
	}
	if string(text) == untold {
		return "", fmt.Errorf("%s of interfaces are not known: the kernel did not tell them when the snapshot was "+
			"taken", what)
	}
	return string(text), nil
}

func (c *capture) dir(name string) {
	if _, err := c.h.Names(name); err == nil {
		c.keep(c.w.Dir(name))
	}
}

// files adds those of the named files that are there and readable: what a plain user may not read (config space past 64
// bytes, ACPI tables) is left out for him.
func (c *capture) files(dir string, names []string) {
	for _, n := range names {
		b, err := c.h.Read(path.Join(dir, n))
		switch {
		case err == nil:
			c.add(path.Join(dir, n), b)
		case !host.Absent(err) && !isRefusal(err):
			c.keep(err)
		}
	}
}

// isRefusal says that this file cannot be had although it is there: not allowed, or a driver that answers with an
// error.
func isRefusal(err error) bool {
	for _, e := range []error{
		unix.EACCES, unix.EPERM, unix.EINVAL, unix.EOPNOTSUPP, unix.EIO, unix.EAGAIN, unix.EBUSY, unix.ENOTDIR,
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// linked adds a link and returns the name of what it points to.
func (c *capture) linked(name string) string {
	target, err := c.h.Link(name)
	if err != nil {
		return name
	}
	c.keep(c.w.Link(name, target))
	return path.Join(path.Dir(name), target)
}

func (c *capture) links(dir string) {
	names, err := c.h.Names(dir)
	if err != nil {
		return
	}
	for _, n := range names {
		c.linked(path.Join(dir, n))
	}
}

// interrupts adds the chip names up to the one that tells whether interrupts are remapped.
func (c *capture) interrupts() {
	names, err := c.h.Names(irqDir)
	if err != nil {
		return
	}
	for _, n := range names {
		file := path.Join(irqDir, n, "chip_name")
		chip, err := c.h.String(file)
		if err != nil {
			continue
		}
		c.add(file, []byte(chip+"\n"))
		if _, known := remaps(chip); known {
			return
		}
	}
}

func (c *capture) device(d *Device) {
	link := path.Join(pciDevices, d.Name)
	if !d.PCI {
		link = fmt.Sprintf("%s/%d/devices/%s", groupsDir, *d.Group, d.Name)
	}
	if d.PCI && !c.h.Exists(path.Join(link, "modalias")) {
		// It has gone since.
		return
	}
	real := c.linked(link)
	c.files(real, deviceFiles)
	links := deviceLinks
	if d.SRIOV != nil {
		for _, vf := range d.SRIOV.VFs {
			links = append(slices.Clip(links), fmt.Sprintf("virtfn%d", vf.Index))
		}
	}

	for _, n := range links {
		c.linked(path.Join(real, n))
	}
	if c.h.Exists(path.Join(real, "reset")) {
		// It is only written to.
		c.add(path.Join(real, "reset"), []byte{})
	}
	if names, err := c.h.Names(path.Join(real, "vfio-dev")); err == nil {
		for _, n := range names {
			c.files(path.Join(real, "vfio-dev", n), []string{"dev"})
			c.dir(path.Join(real, "vfio-dev", n))
		}
	}

	dir, err := c.h.Open(real)
	if err != nil {
		// Gone.
		return
	}
	defer dir.Close()
	classes, err := classDevices(dir)
	c.keep(err)
	for _, paths := range classes {
		for _, p := range paths {
			c.linked(path.Join(real, p, "subsystem"))
			c.linked(path.Join(real, p, "master"))
			c.files(path.Join(real, p), classFiles)
			c.files(path.Join("proc/sys/net/ipv6/conf", path.Base(p)), []string{"addr_gen_mode"})
		}
	}
	usb, err := usbDevices(dir)
	c.keep(err)
	for _, p := range usb {
		for above := p; above != "."; above = path.Dir(above) {
			c.linked(path.Join(real, above, "subsystem"))
		}
		c.files(path.Join(real, p), usbFiles)
	}
}

// excerpt is a pci.ids of the devices that the host has.
func excerpt(n *Names, t *Topology) []byte {
	byVendor := map[uint16]map[uint16]string{}
	t.All(func(d *Device) bool {
		if !d.PCI {
			return true
		}
		if byVendor[d.Vendor] == nil {
			byVendor[d.Vendor] = map[uint16]string{}
		}
		if name := n.Device(d.Vendor, d.Device); name != "" {
			byVendor[d.Vendor][d.Device] = name
		}
		return true
	})

	var b strings.Builder
	b.WriteString("# the devices of one host\n")
	for _, v := range slices.Sorted(maps.Keys(byVendor)) {
		if name := n.Vendor(v); name != "" || len(byVendor[v]) > 0 {
			fmt.Fprintf(&b, "%04x  %s\n", v, name)
		}
		for _, d := range slices.Sorted(maps.Keys(byVendor[v])) {
			fmt.Fprintf(&b, "\t%04x  %s\n", d, byVendor[v][d])
		}
	}
	return []byte(b.String())
}
