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
const ErrNotWhole = host.Error("the captured tree is not whole (viaduct snapshot makes one that is)")

// checkCaptured refuses a captured tree whose devices cannot be read as the kernel shows them.
func checkCaptured(h *Host, devices []string) error {
	if h.Live() {
		return nil
	}
	inGroups := false
	for _, n := range devices {
		at := path.Join(pciDevices, n)
		if err := isLink(h, at); err != nil {
			return err
		}
		if !h.Exists(path.Join(at, "modalias")) {
			target, _ := h.Link(at)
			return fmt.Errorf("%w: /%s leads to %s, of which it has no modalias", ErrNotWhole, at, target)
		}
		for _, link := range []string{"driver", "iommu_group", "physfn"} {
			if err := isLink(h, path.Join(at, link)); err != nil {
				return err
			}
		}
		_, err := h.Link(path.Join(at, "iommu_group"))
		inGroups = inGroups || err == nil
	}

	if inGroups && !h.Exists(groupsDir) {
		return fmt.Errorf("%w: its devices are in groups, and it has no /%s", ErrNotWhole, groupsDir)
	}
	interfaces, err := h.Names(netClass)
	if err != nil && !host.Absent(err) {
		return err
	}
	for _, n := range interfaces {
		// There are files among them, as bonding_masters.
		if at := path.Join(netClass, n); h.Exists(path.Join(at, "address")) {
			if err := isLink(h, at); err != nil {
				return err
			}
		}
	}
	return nil
}

// isLink refuses a folder where the kernel has a link: whoever copied the tree followed it.
func isLink(h *Host, name string) error {
	_, err := h.Link(name)
	if errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("%w: /%s is a folder, and the kernel has a link there", ErrNotWhole, name)
	}
	if host.Absent(err) {
		return nil
	}
	return err
}
