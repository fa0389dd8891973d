package declared

import (
	"context"
	"fmt"
	"time"

	"viaduct/cmd/internal/spec"
	"viaduct/internal/uevent"
	"viaduct/iommu"
)

// How often Watch looks without an event, and how long after one nothing more must come before it looks: a driver that is loaded
// makes dozens.
const (
	atLeast = time.Minute
	quiet   = 500 * time.Millisecond
)

// Watch calls look at once, when devices or links change, and each minute, until the context ends.
func Watch(ctx context.Context, look func()) error {
	events, err := uevent.Open()
	if err != nil {
		return err
	}
	defer events.Close()
	for ctx.Err() == nil {
		look()
		for since := time.Now(); ctx.Err() == nil && time.Since(since) < atLeast; {
			if events.Await(ctx, min(time.Second, atLeast-time.Since(since))) {
				for n := 0; n < 20 && events.Await(ctx, quiet); n++ { // busy for good is no reason never to look
				}
				break
			}
		}
	}
	return nil
}

// Early are the places of the devices that the initramfs is to keep from their drivers.
func (m *Manager) Early(s *spec.Host) ([]string, error) {
	out := []string{}
	for k := range s.Devices {
		dev := &s.Devices[k]
		if !dev.Early {
			continue
		}
		d, err := m.find(dev.Select)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", dev.At, err)
		}
		place, err := iommu.PathOf(m.Host, d)
		if err != nil {
			return nil, err
		}
		out = append(out, place)
	}
	return out, nil
}
