package holder

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"viaduct/internal/host"
	"viaduct/iommu"
)

// Owners finds the devices that another tool has in its books. Two tools that act on one device undo each other's work.
// Of a captured host that does not say who used its devices it reads what books were captured with it.
func Owners(h *iommu.Host, devices []*iommu.Device) ([]Holder, error) {
	if !h.Live() {
		if all, err := findCaptured(h, devices, Owner); !errors.Is(err, ErrNotCaptured) {
			return all, err
		}
	}

	const driverctl, operator = "etc/driverctl.d", "etc/sriov-operator/pci"
	// Proxmox VE has a line ADDRESS VMID [time|pid]:N for each device.
	reserved, err1 := present(h.Read("run/qemu-server/pci-id-reservations"))
	domains, err2 := libvirtDomains(h)
	overridden, err3 := present(h.Names(driverctl))
	managed, err4 := present(h.Names(operator))
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		return nil, err
	}

	var out []Holder
	for _, d := range devices {
		add := func(brief, format string, a ...any) {
			out = append(out, Holder{Device: d.Name, Kind: Owner, What: fmt.Sprintf(format, a...), Brief: brief})
		}
		if slices.Contains(overridden, "pci-"+d.Name) {
			driver, err := present(h.String(path.Join(driverctl, "pci-"+d.Name)))
			if err != nil {
				return nil, err
			}
			if driver != "" && iommu.IsVFIODriver(driver) == d.VFIO {
				add("driverctl", "is set to driver %s by driverctl", strings.TrimSpace(driver))
			}
		}
		if slices.Contains(managed, d.Name) {
			add("SR-IOV operator", "is managed by the SR-IOV network operator")
		}
		for line := range strings.Lines(string(reserved)) {
			if f := strings.Fields(line); len(f) > 1 && f[0] == d.Name {
				add("Proxmox guest "+f[1], "is reserved for Proxmox guest %s", f[1])
			}
		}
		for name, given := range domains {
			if slices.Contains(given, d.Address) {
				add("libvirt domain "+name, "is given to libvirt domain %s", name)
			}
		}
	}
	return out, nil
}

// present is what was read, nothing where it is not there. Who may not read it is blind.
func present[T any](what T, err error) (T, error) {
	switch {
	case host.Absent(err):
		var none T
		return none, nil
	case errors.Is(err, fs.ErrPermission):
		return what, fmt.Errorf("%w: %w", ErrBlind, err)
	}
	return what, err
}

// ClaimedByID says where vfio-pci.ids= claims devices by their ids, on the kernel's command line or in modprobe's
// files, for those that are claimed: vfio-pci will have them again after the next boot, and wherever else the host's
// driver lets go.
func ClaimedByID(h *iommu.Host, ids ...iommu.ID) map[iommu.ID]string {
	claimed := map[iommu.ID]string{}
	claim := func(list, where string) {
		for one := range strings.SplitSeq(list, ",") {
			f := strings.Split(one, ":")
			for _, id := range ids {
				name := fmt.Sprintf("%04x:%04x", id.Vendor, id.Device)
				if len(f) >= 2 && claimed[id] == "" && strings.EqualFold(f[0]+":"+f[1], name) {
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
				if list, ok := moduleIDs(line); ok {
					claim(list, "/"+path.Join(dir, n))
				}
			}
		}
	}
	return claimed
}

// moduleIDs is what a line of modprobe.d(5) claims for vfio-pci: options vfio-pci ids=LIST.
func moduleIDs(line string) (list string, ok bool) {
	f := strings.Fields(line)
	if len(f) < 3 || f[0] != "options" || strings.ReplaceAll(f[1], "-", "_") != "vfio_pci" {
		return "", false
	}
	for _, option := range f[2:] {
		if list, ok := strings.CutPrefix(option, "ids="); ok {
			return list, true
		}
	}
	return "", false
}
