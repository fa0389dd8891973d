package declared

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/bind"
)

// NoDriverError says which VFs are for the host, and that none of its drivers is for them. They stay as they are: that
// the host lacks a driver is no reason to take the others back.
type NoDriverError struct{ VFs []string }

func (e *NoDriverError) Error() string {
	return fmt.Sprintf("no driver of this host is for %s, declared with driver: home (install the module for it, or "+
		"declare driver: none)", strings.Join(e.VFs, ", "))
}

// homes are the indexes of the VFs that the host is to have.
func homes(wish []sriov.VFWish) []int {
	var out []int
	for n, vf := range wish {
		if vf.Use == sriov.UseHome {
			out = append(out, n)
		}
	}
	return out
}

// homeless reports whether a change that leads a VF home leads it to no driver, as the host has none.
func homeless(vf *iommu.Device, c *bind.Change) bool {
	return vf.Driver == "" && vf.DriverOverride == "" && c.To == "" && c.Module == ""
}

// bringHome gives the host's VFs that have no driver its own, whose module udev may not have loaded yet where they were
// just made: a *NoDriverError for those that have none then.
func (m *Manager) bringHome(ctx context.Context, i *Item) error {
	if len(i.homes) == 0 {
		return nil
	}
	t, err := m.handle.Scan()
	if err != nil {
		return err
	}
	pf, err := t.Find(i.Device.Address)
	if err != nil {
		return err
	}
	without := slices.DeleteFunc(t.VFs(pf), func(vf *iommu.Device) bool {
		return vf.Driver != "" || !slices.Contains(i.homes, vf.VFIndex)
	})
	if len(without) == 0 {
		return nil
	}

	fresh := slices.DeleteFunc(slices.Clone(without), func(vf *iommu.Device) bool {
		return slices.ContainsFunc(i.home, func(tried *iommu.Device) bool { return tried.Address == vf.Address })
	})
	if err := m.handle.Lock(ctx, fresh); err != nil {
		return err
	}
	units := bind.Singly(fresh)
	verdicts, err := m.handle.Check(units, fresh, bind.Home(), m.options.Force)
	if err = errors.Join(err, bind.Refusals(verdicts)); err != nil {
		return err
	}
	var errs []error
	for _, r := range m.handle.Do(ctx, units, bind.Home()) {
		errs = append(errs, r.Err)
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	none := &NoDriverError{}
	for _, vf := range without {
		driver, err := iommu.ReadDriver(m.host, vf.Address)
		if err != nil {
			return err
		}
		if driver == "" {
			none.VFs = append(none.VFs, vf.Name)
		}
	}
	if len(none.VFs) > 0 {
		return none
	}
	return nil
}
