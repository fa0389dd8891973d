package main

import (
	"cmp"
	"context"
	"time"

	"viaduct/cmd/internal/declared"
	"viaduct/cmd/internal/hostfile"
	"viaduct/cmd/internal/lease"
	"viaduct/iommu"
)

// work is what is done with leases, and how much of the declaration it takes.
type work int

const (
	makesLeases work = iota // what is declared has to be readable
	checksLease             // else what was confirmed last will do
	endsLeases              // and else nothing
)

// declarationFor is the declaration that is in force, for work on leases; nil if that does without.
func (e *env) declarationFor(h *iommu.Host, does work) (*hostfile.Host, error) {
	file, wrong := hostfile.Load(h)
	if wrong != nil && does == makesLeases {
		return nil, usageError{wrong}
	}
	use, err := declared.Of(h).InForce(file, wrong)
	if err != nil && does != endsLeases {
		return nil, err
	}
	if wrong = cmp.Or(err, wrong); wrong != nil {
		e.note("%v", wrong)
	}
	if use == nil {
		return nil, nil
	}
	return use.Host, nil
}

// beginLeases begins what works on leases; the caller calls stop at the end. The child that writes is started when it is needed: most of many that ask at once are told that there is nothing.
func (e *env) beginLeases(ctx context.Context, timeout time.Duration, does work) (context.Context, func(), *lease.Manager, error) {
	ctx, stop, c, err := e.beginLook(ctx, timeout)
	if err != nil {
		return nil, nil, nil, err
	}
	s, err := e.declarationFor(c.handle.Host(), does)
	if err != nil {
		stop()
		return nil, nil, nil, err
	}
	m, err := lease.New(c.handle, lease.Options{Declaration: s, Lock: c.lock})
	if err != nil {
		stop()
		return nil, nil, nil, err
	}
	return ctx, stop, m, nil
}
