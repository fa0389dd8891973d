package declared

import (
	"errors"
	"slices"

	"viaduct/cmd/internal/hostfile"
	"viaduct/iommu"
)

// Roles gives devices the roles that are declared. What is declared of devices that are not there is left out, and so
// is all of a file that cannot be read, which the commands tell that use it.
func Roles(h *iommu.Host, t *iommu.Topology) error {
	s, err := hostfile.Load(h)
	if err != nil {
		return nil
	}
	for _, r := range s.Roles {
		all, err := resolve(h, t, r.Select)
		if errors.Is(err, iommu.ErrNotFound) {
			continue
		}
		if err != nil {
			return err
		}
		for _, d := range all {
			d.As = r.Role
		}
	}
	return nil
}

// resolve are the devices that all selectors of a match name, at least one; an ErrNotFound if there is none.
func resolve(h *iommu.Host, t *iommu.Topology, match hostfile.Match) ([]*iommu.Device, error) {
	if len(match.Selectors) == 0 {
		// Of a record in a snapshot, which may say anything.
		return nil, &iommu.NotFoundError{Selector: match.String(), What: "it has no name"}
	}
	var all []*iommu.Device
	for n, s := range match.Selectors {
		some, err := s.Resolve(h, t)
		if err != nil {
			return nil, err
		}
		if n > 0 {
			some = slices.DeleteFunc(slices.Clone(all), func(d *iommu.Device) bool { return !slices.Contains(some, d) })
		}
		if all = some; len(all) == 0 {
			return nil, &iommu.NotFoundError{Selector: match.String(), What: "no device matches all of this"}
		}
	}
	return all, nil
}
