package bind

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"viaduct/internal/uevent"
	"viaduct/iommu"
	"viaduct/vfio/holder"
)

// awaitHome waits until a device that was given back has network interfaces or disks again, if it had any when it was
// taken: some drivers make them after their probe.
func (b *Handle) awaitHome(ctx context.Context, d *iommu.Device) error {
	unknown := func(err error) error {
		return fmt.Errorf("%s was given back, but viaduct cannot tell whether its driver has made what it had: %w",
			d.Name, err)
	}
	r, known, err := b.taken(d)
	if err != nil {
		return unknown(err)
	}
	if !known || len(r.Identity.MACs) == 0 && !r.Block {
		return nil
	}
	// Before the first look.
	events, err := uevent.Open(b.host.Host)
	if err != nil {
		return unknown(err)
	}
	defer events.Close()
	asked := ctx
	ctx, cancel := context.WithTimeout(ctx, b.Timeout())
	defer cancel()

	for {
		driver, missing, err := b.missing(d, r)
		if err != nil {
			return unknown(err)
		}
		if len(missing) == 0 {
			return nil
		}
		if asked.Err() != nil {
			return fmt.Errorf("%s is on %s again; viaduct did not wait for %s, which it had", d.Name, driver,
				strings.Join(missing, " and "))
		}
		if ctx.Err() != nil {
			return fmt.Errorf("%s is on %s again, but has not made %s, which it had", d.Name, driver,
				strings.Join(missing, " and "))
		}
		events.Await(ctx, time.Second)
	}
}

// missing is what a device that was given back had when it was taken and has not made again, on the driver that it has
// now.
func (b *Handle) missing(d *iommu.Device, had takenRecord) (driver string, missing []string, err error) {
	now, err := iommu.ReadDevice(b.host, d.Address)
	if err != nil {
		return "", nil, err
	}
	err1 := iommu.ReadNetdevs(b.host, &now)
	disks, err2 := holder.Disks(b.host, &now)
	if err := errors.Join(err1, err2); err != nil {
		return "", nil, err
	}

	if len(now.Netdevs) == 0 && len(had.Identity.MACs) > 0 {
		missing = append(missing, "a network interface")
	}
	if len(disks) == 0 && had.Block {
		missing = append(missing, "a disk")
	}
	return now.Driver, missing, nil
}
