package lease

import (
	"cmp"
	"context"

	"viaduct/cmd/internal/declared"
	"viaduct/cmd/internal/hostfile"
	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/bind"
)

// Work is what is done with leases, and how much of the declaration it takes.
type Work int

// The kinds of work.
const (
	Makes  Work = iota // what is declared has to be readable
	Checks             // else what was confirmed last will do
	Ends               // and else nothing
)

// InForce is the declaration that is in force, for work on leases; nil if that does without. It is told what the
// host's files say, or why they cannot be read. The note says what is wrong with them; "" if nothing is.
func InForce(h *iommu.Host, file *hostfile.Host, wrong error, does Work) (use *hostfile.Host, note string, err error) {
	if wrong != nil && does == Makes {
		return nil, "", wrong
	}
	now, err := declared.Of(h).InForce(file, wrong)
	if err != nil && does != Ends {
		return nil, "", err
	}
	if wrong = cmp.Or(err, wrong); wrong != nil {
		note = wrong.Error()
	}
	if now == nil {
		return nil, note, nil
	}
	return now.Host, note, nil
}

// HandleOptions are those of a Handle that leases are worked on with: it recovers all that viaduct changes, and knows
// the roles that are declared.
func HandleOptions(h *iommu.Host) bind.Options {
	return bind.Options{
		Recoverers: Recoverers(),
		Roles:      func(t *iommu.Topology) error { return declared.Roles(h, t) },
	}
}

// Lock keeps other viaducts from devices, and finishes or undoes what interrupted ones left of them, of which it tells.
// One that is stuck in an earlier change is refused.
func Lock(ctx context.Context, s *sriov.Handle, devices []*iommu.Device, tell func([]bind.Recovered)) error {
	if err := s.Lock(ctx, devices); err != nil {
		return err
	}
	if err := Recover(ctx, s, tell); err != nil {
		return err
	}
	return s.StuckIn(bind.AddressesOf(devices)...)
}

// Recover finishes or undoes what interrupted runs left, of which it tells, and looks at the host again if that was an
// apply.
func Recover(ctx context.Context, s *sriov.Handle, tell func([]bind.Recovered)) error {
	recovered, err := s.Recover(ctx)
	tell(recovered)
	if err != nil {
		return err
	}
	if interrupted, err := declared.Of(s.Host()).Interrupted(); err != nil || !interrupted {
		return err
	}
	m, err := declared.New(s, declared.Options{})
	if err != nil {
		return err
	}
	undone, err := m.Recover()
	tell(undone)
	if err == nil {
		_, err = s.Scan()
	}
	return err
}
