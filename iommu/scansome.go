package iommu

import (
	"maps"
	"path"
	"slices"

	"viaduct/internal/host"
)

// ScanSome is [Scan] for who knows which PCI devices matter: it reads these, their PFs, and all that is in a group with
// one of them. Selectors find no others in what it returns. What is not there is left out.
func ScanSome(h *Host, devices []Address) (*Topology, error) {
	names, groups := map[string]bool{}, map[string]bool{}
	var add func(name string) error
	add = func(name string) error {
		if names[name] {
			return nil
		}
		names[name] = true
		dir := path.Join(pciDevices, name)
		if pf, err := optional(h.LinkBase(path.Join(dir, "physfn"))); err != nil {
			return err
		} else if pf != "" {
			if err := add(pf); err != nil {
				return err
			}
		}
		group, err := optional(h.LinkBase(path.Join(dir, "iommu_group")))
		if err != nil || group == "" || groups[group] {
			return err
		}
		groups[group] = true
		members, err := h.Names(path.Join(groupsDir, group, "devices"))
		if err != nil && !host.Absent(err) {
			return err
		}
		for _, m := range members {
			if _, pci := parseAddress(m); pci {
				if err := add(m); err != nil {
					return err
				}
			}
		}
		return nil
	}

	for _, a := range devices {
		there, err := h.Has(path.Join(pciDevices, a.String()))
		if err == nil && there {
			err = add(a.String())
		}
		if err != nil {
			return nil, err
		}
	}
	return scan(h, slices.Sorted(maps.Keys(names)), func() ([]string, error) {
		return slices.Sorted(maps.Keys(groups)), nil
	})
}
