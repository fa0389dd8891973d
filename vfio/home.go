package vfio

import (
	"context"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/iommu"
)

// awaitHome waits until a device that was given back has network interfaces or disks again, if it had any when it was taken:
// some drivers make them after their probe.
func (b *Binder) awaitHome(ctx context.Context, d *iommu.Device) error {
	r, known, err := b.taken(d)
	if err != nil || !known || !b.Host.Live() || len(r.Identity.MACs) == 0 && !r.Block {
		return err
	}
	events, err := openUevents() // before the first look
	if err != nil {
		return err
	}
	defer unix.Close(events)
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
		awaitUevent(ctx, events)
	}
}

// openUevents hears what the kernel tells udev (NETLINK_KOBJECT_UEVENT).
func openUevents() (int, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return -1, fmt.Errorf("hear of new devices: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("hear of new devices: %w", err)
	}
	return fd, nil
}

// awaitUevent returns when something happened, or once a second, or when the context ends.
func awaitUevent(ctx context.Context, fd int) {
	deadline, _ := ctx.Deadline()
	wait := max(min(time.Until(deadline), time.Second), 0)
	_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(wait.Milliseconds())+1)
	var event [8192]byte
	for {
		if _, err := unix.Read(fd, event[:]); err != nil {
			return // all are read
		}
	}
}
