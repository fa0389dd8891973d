package lease

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/iommu"
	"viaduct/vfio/holder"
)

// awaitGone waits until no process has the devices open. Without time to wait it refuses, naming who has.
func (m *Manager) awaitGone(ctx context.Context, l *Lease, devices []*iommu.Device, wait time.Duration) error {
	for end := time.Now().Add(wait); ; {
		holders, err := holder.Processes(m.host, devices)
		if err != nil && !errors.Is(err, holder.ErrTooMany) {
			return err
		}
		// Of those that could not be looked at, the kernel tells afterwards: see prove.
		if h := l.Runner; h != nil && h.Alive(m.host) &&
			!slices.ContainsFunc(holders, func(x holder.Holder) bool { return x.PID == h.PID }) {
			// It may open them yet.
			holders = append(holders,
				holder.Holder{Device: l.Guest, Kind: holder.Process, PID: h.PID, What: "is run by " + h.Name})
		}

		if len(holders) == 0 {
			return nil
		}
		left := time.Until(end)
		if left <= 0 || ctx.Err() != nil {
			hint := "end the guest first, or wait for it with --wait 60s"
			if wait > 0 {
				hint = fmt.Sprintf("end the guest first; viaduct waited %s for it", wait)
			}
			refused := &holder.RefusedError{What: "release " + l.Guest, Hint: hint}
			for _, h := range holders {
				refused.Reasons = append(refused.Reasons, *h.Reason())
			}
			return refused
		}

		// A holder may also let go of a device and live on.
		awaitEnd(ctx, holders, min(left, time.Second))
	}
}

// awaitEnd waits until one of the processes has ended.
func awaitEnd(ctx context.Context, holders []holder.Holder, most time.Duration) {
	var fds []unix.PollFd
	for _, h := range holders {
		if fd, err := unix.PidfdOpen(h.PID, 0); err == nil {
			defer unix.Close(fd)
			fds = append(fds, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
		} else if errors.Is(err, unix.ESRCH) {
			return
		}
	}
	for end := time.Now().Add(most); ctx.Err() == nil && time.Now().Before(end); {
		n, err := unix.Poll(fds, int(min(time.Until(end), 100*time.Millisecond).Milliseconds())+1)
		if n > 0 || err != nil && !errors.Is(err, unix.EINTR) {
			return
		}
	}
}
