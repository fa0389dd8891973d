package lease

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"viaduct/internal/host"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// The results.
const (
	Clean        Result = "clean"      // and free for the next
	InQuarantine Result = "quarantine" // nobody gets it
	Missing      Result = "lost"       // it is gone
	Unreset      Result = "not-reset"  // and free for the next, who finds what the guest has left, as its lease allowed
)

// ErrNoLease is matched by errors that say that a guest has no lease.
const ErrNoLease = host.Error("it has no lease")

// NoLeaseError says that a guest has no lease. It matches ErrNoLease.
type NoLeaseError struct {
	Guest string
	Have  []string
}

// Is makes it an ErrNoLease.
func (e *NoLeaseError) Is(target error) bool { return target == ErrNoLease }

func (e *NoLeaseError) Error() string {
	if len(e.Have) == 0 {
		return fmt.Sprintf("%s has no lease, and there are no others", e.Guest)
	}
	return fmt.Sprintf("%s has no lease; these guests have one: %s", e.Guest, strings.Join(e.Have, ", "))
}

// Release ends a guest's lease: it waits, at most for the given time, until nobody has its devices open, and scrubs
// them. One that cannot be scrubbed goes into quarantine, and the error says why.
func (m *Manager) Release(ctx context.Context, guest string, wait time.Duration) ([]Certificate, error) {
	return m.alone(ctx, guest, wait, unlessMoving("release", m.end))
}

// Rest ends what a guest has of a lease that outlives it, and leaves the lease for the guest's next start; any other it
// releases.
func (m *Manager) Rest(ctx context.Context, guest string, wait time.Duration) ([]Certificate, error) {
	l, err := m.Book.Get(guest)
	if err != nil {
		return nil, err
	}
	if l == nil || !l.Persist {
		return m.Release(ctx, guest, wait)
	}
	return m.alone(ctx, guest, wait, unlessMoving("release", m.rest))
}

// alone does something with a guest's lease, and locks it and its devices for that once nobody has them open. Who still
// has one is waited for, at most for the given time, until which do may wait, too.
func (m *Manager) alone(ctx context.Context, guest string, wait time.Duration, do ending) ([]Certificate, error) {
	mine, err := m.Book.lockGuest(ctx, guest, m.handle.Timeout())
	if err != nil {
		return nil, err
	}
	defer mine.Close()
	l, err := m.known(guest)
	if err != nil {
		return nil, err
	}
	if m.host.Live() {
		// Beside the look at who has them.
		m.handle.Start()
	}

	devices := m.present(l)
	until := time.Now().Add(wait)
	if err := m.awaitGone(ctx, l, devices, wait); err != nil {
		return nil, err
	}
	if err := m.lock(ctx, m.touched(devices, true)); err != nil {
		return nil, err
	}
	return do(ctx, l, until)
}

// rest scrubs what a lease has, whose devices are locked, and leaves it it is restored after the boot.
func (m *Manager) rest(ctx context.Context, l *Lease, until time.Time) ([]Certificate, error) {
	certificates, unwritten, err := m.scrub(ctx, l, until)
	if !bind.IsStuck(err) {
		err = errors.Join(err, m.giveBackCompanions(ctx, m.present(l)))
	}
	if certificates == nil {
		return nil, err
	}
	l.rebooted()
	return certificates, errors.Join(err, unwritten, m.Book.put(l))
}

// end scrubs what a lease has, whose devices are locked, and ends it. Who still has a device is waited for until then.
func (m *Manager) end(ctx context.Context, l *Lease, until time.Time) ([]Certificate, error) {
	was := *l
	l.Unmade = l.Unmade || !l.Ready && !l.Ending && !l.Persist
	l.Ready, l.Ending, l.Maker = false, true, m.self()
	if err := m.Book.put(l); err != nil {
		return nil, err
	}
	certificates, unwritten, err := m.scrub(ctx, l, until)
	if certificates == nil && err != nil {
		// It was not proved that nobody has them, and they are as they were.
		if errors.Is(err, holder.ErrRefused) && !bind.IsStuck(err) {
			err = errors.Join(err, m.Book.put(&was))
		}
		return nil, err
	}
	if !bind.IsStuck(err) {
		err = errors.Join(err, m.giveBackCompanions(ctx, m.present(l)))
	}
	if unwritten != nil || ctx.Err() != nil && err != nil {
		// The lease stays, interrupted.
		return certificates, errors.Join(err, unwritten)
	}
	return certificates, errors.Join(err, m.Book.drop(l))
}
