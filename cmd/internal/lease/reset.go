package lease

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"viaduct/internal/host"
	"viaduct/iommu"
	"viaduct/vfio"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// resetting are the resets of one release: a reset of a bus is one of all functions on it.
type resetting map[iommu.Address]string // how those were reset that another one took along

// reset resets a device: by its own function level reset where it has one, or what else the kernel knows; and where
// nothing resets it alone, together with all that shares its bus.
func (m *Manager) reset(l *Lease, d *iommu.Device, c *Certificate, done resetting, held *hold) error {
	if how, along := done[d.Address]; along {
		c.Reset = how
		return nil
	}
	dir := path.Join("sys/bus/pci/devices", d.Name)
	methods, _ := m.host.String(path.Join(dir, "reset_method"))
	alone, err := m.host.Has(path.Join(dir, "reset"))
	if err != nil {
		return err
	}
	if alone {
		c.Reset = methods
		err := m.recorded(d, func() error {
			return m.handle.Write(d.Address, []bind.Step{{Path: path.Join(dir, "reset"), Value: "1"}})
		})
		if host.Absent(err) {
			err = fmt.Errorf("the kernel could not reset it: %w", err)
		}
		// The first function of a card is said to be reset by its bus, and is not when there are others.
		if !errors.Is(err, unix.ENOTTY) {
			return err
		}
	}

	how, functions, err := m.resetTogether(l, d, held)
	if err != nil {
		return err
	}
	c.Reset = how
	for _, a := range functions {
		done[a] = how
	}
	return nil
}

// errNoReset is matched by errors that say that a device stays as its guest has left it.
var errNoReset = errors.New("the kernel has no way to reset it")

// errOthers is an errNoReset of what is reset only together with what others have.
type errOthers struct{ error }

func (e errOthers) Is(target error) bool { return target == errNoReset }

// resetTogether resets all that shares a device's bus, through VFIO, if it is all the lease's or of the device's group.
// What it opens for that it leaves open in the hold.
func (m *Manager) resetTogether(l *Lease, d *iommu.Device,
	held *hold) (how string, functions []iommu.Address, err error) {
	if !d.VFIO {
		return "", nil, errNoReset
	}
	space, err := vfio.NewContext(m.host, vfio.Options{})
	if err != nil {
		return "", nil, err
	}
	held.also = append(held.also, space)
	device, err := held.open(space, d)
	if errors.Is(err, vfio.ErrInUse) {
		return "", nil, err
	}
	if err != nil {
		return "", nil, fmt.Errorf("%w by itself, nor with its bus: %w", errNoReset, err)
	}
	together, err := device.HotResetInfo()
	if errors.Is(err, vfio.ErrUnsupported) {
		return "", nil, errNoReset
	}
	if err != nil {
		return "", nil, err
	}

	var names []string
	for _, t := range together {
		functions, names = append(functions, t.Address), append(names, t.Address.String())
		if t.Address == d.Address {
			continue
		}
		other, err := m.Topology.Find(t.Address)
		if err != nil || !l.Has(t.Address) && !other.Together(d) {
			return "", nil, errOthers{fmt.Errorf("it can be reset only together with %s, which %s does not have",
				t.Address,
				l.Guest)}
		}
		if _, err := held.open(space, other); err != nil && !t.Owned {
			return "", nil, fmt.Errorf("it can be reset only together with %s: %w", t.Address, err)
		}
	}
	how = "bus, together: " + strings.Join(names, " ")
	return how, functions, m.recorded(d, func() error {
		err := device.HotReset()
		if errors.Is(err, vfio.ErrNotOwned) {
			// One of them is on no VFIO driver any more, as it has gone home since they were reset together.
			err = errOthers{err}
		}
		return err
	})
}

// resettable refuses, before a guest has them, devices that nothing could reset after it: an inUseError.
func (m *Manager) resettable(l *Lease, units [][]*iommu.Device) error {
	for _, unit := range units {
		has := func(o *iommu.Device) bool { return slices.Contains(unit, o) || l.Has(o.Address) }
		for _, d := range unit {
			if !l.Has(d.Address) || d.PhysFn != nil {
				continue
			}
			how, err := iommu.ResetOf(m.host, m.Topology, d)
			if err != nil {
				return err
			}
			if why := how.Problem(has); why != "" {
				refused := holder.Because("assign "+d.Name+" to "+l.Guest,
					holder.Reason{Kind: holder.Reset, Device: d.Name, Text: why},
					"--no-reset assigns it, and the next guest finds what this one leaves in it")
				return &inUseError{error: refused, devices: unit}
			}
		}
	}
	return nil
}
