package declared

import (
	"context"
	"time"

	"viaduct/cmd/internal/spec"
	"viaduct/internal/uevent"
	"viaduct/iommu"
)

// Wait waits, by the kernel's events, until all that is declared as needed is there: found, with its driver, and a NIC with its
// interface. When the context ends, what is missing is left to the plan to tell.
func (m *Manager) Wait(ctx context.Context, s *spec.Host) error {
	events, err := uevent.Open() // before the first look
	if err != nil {
		return err
	}
	defer events.Close()
	for {
		if m.Topology, err = iommu.Scan(m.Host); err != nil {
			return err
		}
		m.index = nil
		if m.allThere(s) || ctx.Err() != nil {
			return nil
		}
		events.Await(ctx, time.Second)
	}
}

func (m *Manager) allThere(s *spec.Host) bool {
	for _, pf := range s.PFs {
		if d, err := m.find(pf.Select); !pf.Optional && (err != nil || d.Driver == "" || d.Class>>16 == 0x02 && len(d.Netdevs) == 0) {
			return false
		}
	}
	for _, dev := range s.Devices {
		if _, err := m.find(dev.Select); !dev.Optional && err != nil {
			return false
		}
	}
	return true
}
