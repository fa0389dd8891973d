package vfio

import (
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"viaduct/internal/host"
	"viaduct/internal/journal"
	"viaduct/iommu"
)

// Owners finds the devices that another tool has in its books. Two tools that act on one device undo each other's work.
func Owners(h *iommu.Host, devices []*iommu.Device) ([]Holder, error) {
	var out []Holder
	reserved, _ := h.Read("run/qemu-server/pci-id-reservations") // Proxmox VE: ADDRESS VMID [time|pid]:N a line
	domains := libvirtDomains(h)
	const driverctl, operator = "etc/driverctl.d", "etc/sriov-operator/pci"
	overridden, _ := h.Names(driverctl)
	managed, _ := h.Names(operator)
	for _, d := range devices {
		add := func(format string, a ...any) {
			out = append(out, Holder{Device: d.Name, Kind: Owner, What: fmt.Sprintf(format, a...)})
		}
		if slices.Contains(overridden, "pci-"+d.Name) {
			driver, err := h.String(path.Join(driverctl, "pci-"+d.Name))
			if err == nil && iommu.IsVFIODriver(driver) == iommu.IsVFIODriver(d.Driver) {
				add("is set to driver %s by driverctl", strings.TrimSpace(driver))
			}
		}
		if slices.Contains(managed, d.Name) {
			add("is managed by the SR-IOV network operator")
		}
		for line := range strings.Lines(string(reserved)) {
			if f := strings.Fields(line); len(f) > 1 && f[0] == d.Name {
				add("is reserved for Proxmox guest %s", f[1])
			}
		}
		for name, xml := range domains {
			if hasDevice(xml, d.Address) {
				add("is given to libvirt domain %s", name)
			}
		}
	}
	return out, nil
}

// Leases begin the keys of the journal's records of devices that are assigned to guests. What LeaseHolders reads of one is its
// guest, and its devices with their addresses.
const Leases = "lease-"

// LeaseHolders finds the guests that devices are assigned to, whether they run or not.
func LeaseHolders(h *iommu.Host, devices []*iommu.Device) ([]Holder, error) {
	dir := strings.TrimPrefix(journal.Dir, "/")
	names, err := h.Names(dir)
	if err != nil && !host.Absent(err) {
		return nil, err
	}
	var out []Holder
	for _, n := range names {
		if !strings.HasPrefix(n, Leases) {
			continue
		}
		text, err := h.Read(path.Join(dir, n))
		if host.Absent(err) {
			continue // it has just ended
		}
		var l struct {
			Guest   string
			Devices []struct{ Address iommu.Address }
		}
		if err = errors.Join(err, json.Unmarshal(text, &l)); err != nil {
			return nil, fmt.Errorf("%s: %w", n, err)
		}
		for _, of := range l.Devices {
			if i := slices.IndexFunc(devices, func(d *iommu.Device) bool { return d.PCI && d.Address == of.Address }); i >= 0 {
				out = append(out, Holder{Device: devices[i].Name, Kind: Lease, Guest: l.Guest, What: fmt.Sprintf("is assigned to guest %q", l.Guest)})
			}
		}
	}
	return out, nil
}

// libvirtDomains are the status files of the running domains, by name.
func libvirtDomains(h *iommu.Host) map[string]string {
	const dir = "run/libvirt/qemu"
	out := map[string]string{}
	names, err := h.Names(dir)
	if err != nil {
		return out
	}
	for _, n := range names {
		if domain, ok := strings.CutSuffix(n, ".xml"); ok {
			if b, err := h.Read(path.Join(dir, n)); err == nil {
				out[domain] = string(b)
			}
		}
	}
	return out
}

// hasDevice reports whether a domain has a device of the host: as a hostdev or as an interface of that type, whose sources
// are addresses of the host. A guest's own addresses stand in no source.
func hasDevice(domain string, a iommu.Address) bool {
	address := fmt.Sprintf("domain='0x%04x' bus='0x%02x' slot='0x%02x' function='0x%x'", a.Domain, a.Bus, a.Device, a.Function)
	for {
		_, rest, found := strings.Cut(domain, "<source")
		if !found {
			return false
		}
		source, after, _ := strings.Cut(rest, "</source>")
		if strings.Contains(source, address) {
			return true
		}
		domain = after
	}
}

// ClaimedByID says where vfio-pci.ids= claims devices by their ids, on the kernel's command line or in modprobe's files, for
// those that are claimed: vfio-pci will have them again after the next boot, and wherever else the host's driver lets go.
func ClaimedByID(h *iommu.Host, ids ...iommu.ID) map[iommu.ID]string {
	claimed := map[iommu.ID]string{}
	claim := func(list, where string) {
		for one := range strings.SplitSeq(list, ",") {
			f := strings.Split(one, ":")
			for _, id := range ids {
				if len(f) >= 2 && claimed[id] == "" && strings.EqualFold(f[0]+":"+f[1], fmt.Sprintf("%04x:%04x", id.Vendor, id.Device)) {
					claimed[id] = where
				}
			}
		}
	}
	line, _ := h.String("proc/cmdline")
	for word := range strings.FieldsSeq(line) {
		if key, list, _ := strings.Cut(word, "="); strings.ReplaceAll(key, "-", "_") == "vfio_pci.ids" {
			claim(list, "the kernel command line")
		}
	}
	for _, dir := range []string{"etc/modprobe.d", "run/modprobe.d", "usr/lib/modprobe.d", "lib/modprobe.d"} {
		names, _ := h.Names(dir)
		for _, n := range names {
			b, err := h.Read(path.Join(dir, n))
			if err != nil {
				continue
			}
			for line := range strings.Lines(string(b)) {
				f := strings.Fields(line)
				if len(f) < 3 || f[0] != "options" || strings.ReplaceAll(f[1], "-", "_") != genericModule {
					continue
				}
				for _, option := range f[2:] {
					if list, ok := strings.CutPrefix(option, "ids="); ok {
						claim(list, "/"+path.Join(dir, n))
					}
				}
			}
		}
	}
	return claimed
}
