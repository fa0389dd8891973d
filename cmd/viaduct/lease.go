package main

import (
	"context"
	"time"

	"viaduct/cmd/internal/hostfile"
	"viaduct/cmd/internal/lease"
	"viaduct/iommu"
)

// declarationFor is the declaration that is in force, for work on leases; nil if that does without.
func (e *env) declarationFor(h *iommu.Host, does lease.Work) (*hostfile.Host, error) {
	file, wrong := hostfile.Load(h)
	if wrong != nil && does == lease.Makes {
		return nil, usageError{wrong}
	}
	use, note, err := lease.InForce(h, file, wrong, does)
	if note != "" {
		e.note("%s", note)
	}
	return use, err
}

// beginLeases begins what works on leases; the caller calls stop at the end. The child that writes is started when it
// is needed: most of many that ask at once are told that there is nothing.
func (e *env) beginLeases(ctx context.Context, timeout time.Duration,
	does lease.Work) (context.Context, func(), *lease.Manager, error) {
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
