package vfio

import (
	"context"
	"fmt"
	"strings"
	"time"

	"viaduct/internal/uevent"
	"viaduct/iommu"
)

// awaitHome waits until a device that was given back has network interfaces or disks again, if it had any when it was taken:
// some drivers make them after their probe.
func (b *Binder) awaitHome(ctx context.Context, d *iommu.Device) error {
	r, known, err := b.taken(d)
	if err != nil || !known || !b.Host.Live() || len(r.Identity.MACs) == 0 && !r.Block {
		return err
	}
	events, err := uevent.Open() // before the first look
	if err != nil {
		return err
	}
	defer events.Close()
	ctx, cancel := context.WithTimeout(ctx, b.timeout())
	defer cancel()
	for {
		now := *d
		if now.Driver, err = iommu.ReadDriver(b.Host, d.Address); err != nil {
			return err
		}
		netdevs, err := iommu.Netdevs(b.Host, d.Address)
		if err != nil {
			return err
		}
		disks, err := blockDevices(b.Host, &now)
		if err != nil {
			return err
		}
		net, block := len(netdevs) > 0 || len(r.Identity.MACs) == 0, len(disks) > 0 || !r.Block
		if net && block {
			return nil
		}
		if ctx.Err() != nil {
			var missing []string
			if !net {
				missing = append(missing, "a network interface")
			}
			if !block {
				missing = append(missing, "a disk")
			}
			return fmt.Errorf("%s is on %s again, but has not made %s, which it had", d.Name, now.Driver, strings.Join(missing, " and "))
		}
		events.Await(ctx, time.Second)
	}
}
