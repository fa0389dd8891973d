package declared

import (
	"context"
	"fmt"
	"path"
	"time"

	"viaduct/cmd/internal/hostfile"
	"viaduct/internal/uevent"
	"viaduct/iommu"
)

// How often Watch looks without an event, and how long after one nothing more must come before it looks: a driver that
// is loaded makes dozens.
const (
	atLeast = time.Minute
	quiet   = 500 * time.Millisecond
)

// Watch calls look at once, when devices or links change, and each minute, until the context ends. After one that tried
// something and failed, which by itself makes events, it waits longer each time.
func Watch(ctx context.Context, h *iommu.Host, look func() (failed bool)) error {
	events, err := uevent.Open(h.Host)
	if err != nil {
		return err
	}
	defer events.Close()
	watch(ctx, events, look)
	return nil
}

// awaiter is what watching needs of events: see [uevent.Events].
type awaiter interface {
	Await(ctx context.Context, most time.Duration) bool
}

func watch(ctx context.Context, events awaiter, look func() (failed bool)) {
	pause := quiet
	for ctx.Err() == nil {
		if look() {
			pause = min(2*pause, atLeast)
			for since := time.Now(); ctx.Err() == nil && time.Since(since) < pause; {
				events.Await(ctx, pause-time.Since(since))
			}
			continue
		}
		pause = quiet
		for since := time.Now(); ctx.Err() == nil && time.Since(since) < atLeast; {
			if events.Await(ctx, min(time.Second, atLeast-time.Since(since))) {
				for n := 0; n < 20 && events.Await(ctx, quiet); n++ {
					// Busy for good is no reason never to look.
				}
				break
			}
		}
	}
}

// Settle calls look, and again as long as devices or links change meanwhile: a card brings several, one after the
// other.
func Settle(ctx context.Context, h *iommu.Host, look func()) error {
	events, err := uevent.Open(h.Host)
	if err != nil {
		return err
	}
	defer events.Close()
	settle(ctx, events, look)
	return nil
}

func settle(ctx context.Context, events awaiter, look func()) {
	for range 30 {
		// Busy for good is no reason never to end.
		look()
		more := false
		for n := 0; n < 2 && !more; n++ {
			more = events.Await(ctx, time.Second)
		}
		if !more {
			break
		}
	}
}

// Initramfs are the folders in sysfs of the devices that the initramfs is to keep from their drivers. Nothing there
// can ask what they are for: one that must not be taken, or that the host uses now, is refused, with all that would be
// taken along.
func (m *Manager) Initramfs(s *hostfile.Host) ([]string, error) {
	boot := *m
	boot.options.Boot = true
	guard, err := boot.guard(s)
	if err != nil {
		return nil, err
	}
	leased, err := m.Guests()
	if err != nil {
		return nil, err
	}
	out := []string{}
	for k := range s.Devices {
		dev := &s.Devices[k]
		if !dev.Initramfs {
			continue
		}
		i := boot.planDevice(dev, guard, leased)
		boot.Check([]*Item{i})
		if i.Err == nil {
			// Also of what is taken already.
			i.Err = guard.take(i.unit)
		}
		if i.Err != nil {
			return nil, fmt.Errorf("%s: %w", dev.At, i.Err)
		}

		link := "sys/bus/pci/devices/" + i.Device.Name
		target, err := m.host.Link(link)
		if err != nil {
			return nil, err
		}
		out = append(out, "/"+path.Join(path.Dir(link), target))
	}
	return out, nil
}
