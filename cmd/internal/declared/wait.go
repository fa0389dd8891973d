package declared

import (
	"context"
	"errors"
	"slices"
	"time"

	"viaduct/cmd/internal/hostfile"
	"viaduct/internal/uevent"
	"viaduct/iommu"
)

// Wait waits, by the events of the kernel and of udev, until all that is declared as needed is there: found, with its
// driver, and a NIC with its interface, named. When the context ends, what is missing is left to the plan to tell.
func (m *Manager) Wait(ctx context.Context, s *hostfile.Host) error {
	// Before the first look.
	events, err := uevent.Open(m.host.Host)
	if err != nil {
		return err
	}
	defer events.Close()
	for {
		if m.topology, err = m.handle.Scan(); err != nil {
			return err
		}
		if m.allThere(s) || ctx.Err() != nil {
			return nil
		}
		events.Await(ctx, time.Second)
	}
}

func (m *Manager) allThere(s *hostfile.Host) bool {
	pfs, err := m.pfs(s)
	if err != nil {
		return false
	}
	for _, pf := range pfs {
		d, err := m.findPF(pf.Select)
		if !pf.Optional && (err != nil || d.Driver == "" || d.Class>>16 == 0x02 && len(d.Netdevs) == 0) ||
			err == nil && !m.named(d) {
			return false
		}
	}

	for _, dev := range s.Devices {
		d, err := m.find(dev.Select)
		if !dev.Optional && err != nil {
			return false
		}
		if err == nil && d.Driver == "" {
			// Which has the numbers that tell whether it is the one of the last time.
			if was, err := m.remembered(dev.Select); err == nil && was != nil &&
				(len(was.Identity.MACs) > 0 || was.Identity.Serial != "") {
				return false
			}
		}
	}

	return len(s.Devices) == 0 || !slices.ContainsFunc(s.Protect, func(p hostfile.Protect) bool {
		_, err := m.find(p.Match)
		return errors.Is(err, iommu.ErrNotFound)
	})
}

// named reports whether udev is done with a device's interfaces: one that is up it cannot name any more (before Linux
// 6.2).
func (m *Manager) named(d *iommu.Device) bool {
	return !m.host.Exists("run/udev/data") || !slices.ContainsFunc(d.Netdevs, func(n string) bool {
		index, err := m.host.String("sys/class/net/" + n + "/ifindex")
		// sd-device(3): what has an entry is initialized.
		return err == nil && !m.host.Exists("run/udev/data/n"+index)
	})
}
