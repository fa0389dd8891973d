package iommu

import (
	"errors"
	"path"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"

	"viaduct/internal/host"
)

// ClassDevices names what the drivers made of a device, by class: see [Details].
func ClassDevices(h *Host, a Address) (map[string][]string, error) {
	dir, err := h.Open(path.Join(pciDevices, a.String()))
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	classes, err := classDevices(dir)
	for _, paths := range classes {
		for i, p := range paths {
			paths[i] = path.Base(p)
		}
		slices.Sort(paths)
	}
	return classes, err
}

// DeviceFile is a device file that a driver made of a device or of something below it, by its number.
type DeviceFile struct {
	Block  bool
	Number string // major:minor, as the kernel's dev attributes have it
}

// DeviceFiles returns all device files that drivers made of a PCI device and of what is below it, whatever their class
// or bus: disks, render nodes, verbs, the USB devices below a controller, VFIO's own. Groups are the IOMMU groups of
// what has one and is no PCI device, as a mediated device.
func DeviceFiles(h *Host, a Address) (files []DeviceFile, groups []int, err error) {
	dir, err := h.Open(path.Join(pciDevices, a.String()))
	if err != nil {
		return nil, nil, err
	}
	defer dir.Close()

	err = walkBelow(dir, func(at, subsystem string, names []string) error {
		if slices.Contains(names, "dev") {
			number, err := dir.Steady(path.Join(at, "dev"))
			if err != nil && !host.Absent(err) && !errors.Is(err, unix.EISDIR) {
				return err
			}
			if err == nil {
				files = append(files, DeviceFile{path.Base(subsystem) == "block", number})
			}
		}
		if at == "." || !slices.Contains(names, "iommu_group") {
			return nil
		}
		target, link, err := linkOf(dir, path.Join(at, "iommu_group"))
		if id, wrong := strconv.Atoi(path.Base(target)); link && wrong == nil {
			groups = append(groups, id)
		}
		return err
	})
	return files, groups, err
}

// linkOf is where a link leads; false for what is no link, or not there.
func linkOf(dir *host.Dir, name string) (target string, link bool, err error) {
	target, err = dir.Link(name)
	if host.Absent(err) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOTDIR) {
		return "", false, nil
	}
	return target, err == nil, err
}

// classDevices finds what the device's drivers made of it: every directory below it whose subsystem is a class, by
// class, as paths below dir.
func classDevices(dir *host.Dir) (map[string][]string, error) {
	found := map[string][]string{}
	err := walkBelow(dir, func(at, subsystem string, _ []string) error {
		if class := path.Base(subsystem); path.Base(path.Dir(subsystem)) == "class" && class != "wakeup" &&
			class != "bdi" {
			found[class] = append(found[class], at)
		}
		return nil
	})
	return found, err
}

// walkBelow visits a device's directory and all below it, each with where its subsystem link leads and what is in it.
// It descends neither into other PCI devices nor along links.
func walkBelow(dir *host.Dir, visit func(at, subsystem string, names []string) error) error {
	// A disk behind a SAS expander is eight deep, and each further one adds three.
	const depth = 64
	var walk func(at, subsystem string, left int) error
	walk = func(at, subsystem string, left int) error {
		names, err := dir.Names(at)
		if host.Absent(err) || errors.Is(err, unix.ENOTDIR) || left == 0 {
			return nil
		}
		if err != nil {
			return err
		}
		if err := visit(at, subsystem, names); err != nil {
			return err
		}

		for _, n := range names {
			below := path.Join(at, n)
			if _, err := ParseAddress(n); err == nil || n == "power" || n == "msi_irqs" {
				continue
			}
			_, link, err := linkOf(dir, below)
			if err != nil {
				return err
			}
			if link {
				continue
			}

			subsystem, err := dir.Link(path.Join(below, "subsystem"))
			if errors.Is(err, unix.ENOTDIR) {
				// It is a file.
				continue
			}
			if err != nil && !host.Absent(err) && !errors.Is(err, unix.EINVAL) {
				return err
			}
			if err := walk(below, subsystem, left-1); err != nil {
				return err
			}
		}
		return nil
	}
	return walk(".", "", depth)
}
