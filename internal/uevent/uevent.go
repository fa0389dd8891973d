// Package uevent hears what the kernel tells of devices and links that come, go and change.
package uevent

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/internal/host"
)

// Events is a subscription. Its owner closes it.
type Events struct{ devices, links int }

// Open subscribes to what the kernel tells udev (NETLINK_KOBJECT_UEVENT, group 1) and what udev tells when it is done
// with it (group 2), and to changes of network interfaces (RTNLGRP_LINK). Who opens before a first look misses nothing.
func Open(h *host.Host) (*Events, error) {
	e := &Events{-1, -1}
	for _, s := range []struct {
		family int
		groups uint32
		fd     *int
	}{{unix.NETLINK_KOBJECT_UEVENT, 1 | 2, &e.devices}, {unix.NETLINK_ROUTE, unix.RTMGRP_LINK, &e.links}} {
		fd, err := h.Socket(s.family, s.groups)
		if err == nil {
			*s.fd = fd
			err = unix.SetNonblock(fd, true)
		}
		if err != nil {
			e.Close()
			return nil, fmt.Errorf("listen for new devices: %w", err)
		}
	}
	return e, nil
}

// Close ends the subscription.
func (e *Events) Close() {
	for _, fd := range []int{e.devices, e.links} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// Await returns true when something happened, and false after a time, of which no more than a second passes after the
// context has ended. Not all that matters comes with an event, so who waits for a state looks again each time.
func (e *Events) Await(ctx context.Context, most time.Duration) bool {
	if deadline, ok := ctx.Deadline(); ok {
		most = min(most, time.Until(deadline))
	}
	heard := []unix.PollFd{{Fd: int32(e.devices), Events: unix.POLLIN}, {Fd: int32(e.links), Events: unix.POLLIN}}
	n, _ := unix.Poll(heard, int(max(min(most, time.Second), 0).Milliseconds())+1)
	for _, s := range heard {
		var event [8192]byte
		for s.Revents != 0 {
			if _, err := unix.Read(int(s.Fd), event[:]); err != nil {
				// All are read, or too much was to be told, which is something too.
				break
			}
		}
	}
	return n > 0
}
