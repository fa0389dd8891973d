package iommu

import (
	"errors"
	"fmt"
	"path"

	"golang.org/x/sys/unix"

	"viaduct/internal/host"
)

// ErrNotWhole is matched by errors that say that a captured tree lacks what its own files lead to, or has folders where
// the kernel has links: nothing can be told of such a host.
const ErrNotWhole = host.Error("the captured tree is incomplete (viaduct snapshot makes a complete one)")

// checkCaptured refuses a captured tree whose devices cannot be read as the kernel shows them.
func checkCaptured(h *Host, devices []string) error {
	if h.Live() {
		return nil
	}
	inGroups, err := checkDevices(h, devices)
	if err != nil {
		return err
	}
	if inGroups && !h.Exists(groupsDir) {
		return fmt.Errorf("%w: its devices are in groups, and /%s is missing", ErrNotWhole, groupsDir)
	}
	interfaces, err := h.Names(netClass)
	if err != nil && !host.Absent(err) {
		return err
	}
	for _, n := range interfaces {
		// There are files among them, as bonding_masters.
		if at := path.Join(netClass, n); h.Exists(path.Join(at, "address")) {
			if _, err := isLink(&h.Dir, at, at); err != nil {
				return err
			}
		}
	}
	return nil
}

// checkDevices checks each device's own folder, opened once, and reports whether some are in groups.
func checkDevices(h *Host, devices []string) (inGroups bool, err error) {
	if len(devices) == 0 {
		return false, nil
	}

	all, err := h.Open(pciDevices)
	if err != nil {
		return false, err
	}
	defer all.Close()
	for _, n := range devices {
		at := path.Join(pciDevices, n)
		if _, err := isLink(all, n, at); err != nil {
			return false, err
		}
		dir, err := all.Open(n)
		if host.Absent(err) || err == nil && !dir.Exists("modalias") {
			target, _ := all.Link(n)
			err = fmt.Errorf("%w: /%s leads to %s, whose modalias is missing", ErrNotWhole, at, target)
		}
		if err == nil {
			var in bool
			in, err = checkLinks(dir, at)
			inGroups = inGroups || in
		}
		if dir != nil {
			err = errors.Join(err, dir.Close())
		}
		if err != nil {
			return false, err
		}
	}

	return inGroups, nil
}

// checkLinks checks the links of a device's folder, and reports whether it is in a group.
func checkLinks(dir *host.Dir, at string) (inGroup bool, err error) {
	for _, link := range []string{"driver", "physfn", "iommu_group"} {
		if inGroup, err = isLink(dir, link, path.Join(at, link)); err != nil {
			return false, err
		}
	}
	return inGroup, nil
}

// isLink reports whether there is a link. It refuses a folder where the kernel has a link: whoever copied the tree
// followed it. The whole name is for the message.
func isLink(dir *host.Dir, name, whole string) (bool, error) {
	_, err := dir.Link(name)
	if errors.Is(err, unix.EINVAL) {
		return false, fmt.Errorf("%w: /%s is a folder, and the kernel has a link there", ErrNotWhole, whole)
	}
	if host.Absent(err) {
		return false, nil
	}
	return err == nil, err
}
