package bind

import (
	"context"
	"fmt"
	"strings"
	"time"

	"viaduct/internal/uevent"
	"viaduct/iommu"
	"viaduct/vfio/holder"
)

// awaitHome waits until a device that was given back has network interfaces or disks again, if it had any when it was taken:
// some drivers make them after their probe.
func (b *Handle) awaitHome(ctx context.Context, d *iommu.Device) error {
	r, known, err := b.taken(d)
	if err != nil || !known || len(r.Identity.MACs) == 0 && !r.Block {
		return err
	}
	events, err := uevent.Open(b.host.Host) // before the first look
	if err != nil {
		return err
	}
	defer events.Close()
	ctx, cancel := context.WithTimeout(ctx, b.Timeout())
	defer cancel()

	for {
		now, err := iommu.ReadDevice(b.host, d.Address)
		if err != nil {
			return err
		}
		netdevs, err := iommu.Netdevs(b.host, d.Address)
		if err != nil {
			return err
		}
		disks, err := holder.Disks(b.host, &now)
		if err != nil {
			return err
		}

		var missing []string
		if len(netdevs) == 0 && len(r.Identity.MACs) > 0 {
			missing = append(missing, "a network interface")
		}
		if len(disks) == 0 && r.Block {
			missing = append(missing, "a disk")
		}
		if len(missing) == 0 {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("%s is on %s again, but has not made %s, which it had", d.Name, now.Driver, strings.Join(missing, " and "))
		}
		events.Await(ctx, time.Second)
	}
}
