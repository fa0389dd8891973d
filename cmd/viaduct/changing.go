package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/cmd/internal/declared"
	"viaduct/cmd/internal/lease"
	"viaduct/iommu"
	"viaduct/sriov"
)

// changing is what a command works with that changes the host, or, with --dry-run or on a captured host, would.
type changing struct {
	env      *env
	handle   *sriov.Handle
	topology *iommu.Topology
}

// openHandle opens a host for a command, with the recoverers of all that viaduct changes; its owner closes the handle.
func (e *env) openHandle(h *iommu.Host, timeout time.Duration) (*sriov.Handle, error) {
	o := lease.HandleOptions(h)
	o.Tell, o.Timeout, o.DryRun = e.told(h), timeout, e.dryRun
	return sriov.Open(h, o)
}

// openLook opens and scans the host for a command that changes nothing and plans what would be; the caller calls stop
// at the end.
func (e *env) openLook() (stop func(), s *sriov.Handle, err error) {
	h, err := e.open()
	if err != nil {
		return nil, nil, err
	}
	s, err = e.openHandle(h, 0)
	if err == nil {
		_, err = s.Topology()
	}
	if err != nil {
		return nil, nil, errors.Join(err, h.Close())
	}
	return func() {
		s.Close()
		h.Close()
	}, s, nil
}

// openDeclared is openLook for what works with the declared host.
func (e *env) openDeclared(o declared.Options) (stop func(), m *declared.Manager, err error) {
	stop, s, err := e.openLook()
	if err != nil {
		return nil, nil, err
	}
	if m, err = e.declared(s, o); err != nil {
		stop()
		return nil, nil, err
	}
	return stop, m, nil
}

// beginChange opens and scans the host. The caller calls stop at the end, which closes all; until then a first signal
// only ends the context.
func (e *env) beginChange(ctx context.Context, timeout time.Duration) (context.Context, func(), *changing, error) {
	return e.begin(ctx, timeout, true)
}

// beginLook is beginChange for what may find that there is nothing to change: then the child that writes is started
// when it is needed.
func (e *env) beginLook(ctx context.Context, timeout time.Duration) (context.Context, func(), *changing, error) {
	return e.begin(ctx, timeout, false)
}

func (e *env) begin(ctx context.Context, timeout time.Duration,
	writes bool) (context.Context, func(), *changing, error) {
	if err := e.mayChange(); err != nil {
		return nil, nil, nil, err
	}
	h, err := e.open()
	if err != nil {
		return nil, nil, nil, err
	}
	s, err := e.openHandle(h, timeout)
	if err != nil {
		return nil, nil, nil, errors.Join(err, h.Close())
	}

	c := &changing{env: e, handle: s}
	signals := func() {}
	stop := func() {
		signals()
		s.Close()
		h.Close()
	}
	if c.live() {
		e.changes = true
		takePrecedence(h)
		if writes {
			s.Start()
		}
		ctx, signals = e.untilSignalTold(ctx)
	}
	if c.topology, err = s.Topology(); err != nil {
		stop()
		return nil, nil, nil, err
	}
	return ctx, stop, c, nil
}

// untilSignalTold is untilSignal, and tells whoever interrupts it what comes of that.
func (e *env) untilSignalTold(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, end := untilSignal(ctx)
	quiet := context.AfterFunc(ctx, func() {
		e.note("interrupted: what is half done is ended or undone first; a second ^C ends viaduct at once")
	})
	return ctx, func() {
		quiet()
		end()
	}
}

// takePrecedence puts this process, and the child it starts, before others. Each change wakes udev, whose rules for one
// device take longer than the kernel does for the next: side by side with them a hundred devices take twenty times as
// long, for the rules as well. Without the right to it, all stays as it is.
func takePrecedence(h *iommu.Host) { setNice(h, -20) }

// setNice is of this machine's processes: a host of the tests has none that could be told.
func setNice(h *iommu.Host, nice int) {
	if !h.Real() {
		return
	}
	threads, _ := h.Names("proc/self/task")
	for _, t := range threads {
		if id, err := strconv.Atoi(t); err == nil {
			_ = unix.Setpriority(unix.PRIO_PROCESS, id, nice)
		}
	}
}

// live reports whether the host is really going to be changed.
func (c *changing) live() bool { return c.handle.Changes() }

// lock keeps other viaducts from devices, and finishes or undoes what interrupted ones left of them. One that is stuck
// in an earlier change is refused.
func (c *changing) lock(ctx context.Context, devices []*iommu.Device) error {
	if !c.live() {
		return nil
	}
	return c.seen(lease.Lock(ctx, c.handle, devices, c.env.tellRecovered))
}

// recover finishes or undoes what interrupted runs left, and tells.
func (c *changing) recover(ctx context.Context) error {
	return c.seen(lease.Recover(ctx, c.handle, c.env.tellRecovered))
}

// seen has the host as it was seen last, which a recovery may have looked at again.
func (c *changing) seen(err error) error {
	if err == nil {
		c.topology, err = c.handle.Topology()
	}
	return err
}

// declared is what works with the declared host.
func (c *changing) declared() (*declared.Manager, error) {
	return c.env.declared(c.handle, declared.Options{})
}

// declared is what works with the declared host, and knows of the guests.
func (e *env) declared(s *sriov.Handle, o declared.Options) (*declared.Manager, error) {
	o.Leased = lease.BookOf(s.Host()).Guests
	return declared.New(s, o)
}

// lockPFs finds PFs, locks them, and looks at all again as it is now.
func (c *changing) lockPFs(ctx context.Context, selectors []iommu.Selector) ([]*iommu.Device, error) {
	find := func() (pfs []*iommu.Device, err error) {
		for _, s := range selectors {
			pf, err := s.PF(c.handle.Host(), c.topology)
			if err != nil {
				return nil, err
			}
			if slices.ContainsFunc(pfs, func(d *iommu.Device) bool { return d.Name == pf.Name }) {
				return nil, usagef("%s is named twice", pf.Name)
			}
			pfs = append(pfs, pf)
		}
		return pfs, nil
	}
	return c.lockFound(ctx, find)
}

// lockFound locks what find finds, and finds it again, as another viaduct may have been waited for.
func (c *changing) lockFound(ctx context.Context, find func() ([]*iommu.Device, error)) ([]*iommu.Device, error) {
	found, err := find()
	if err != nil || !c.live() {
		return found, err
	}
	if err := c.lock(ctx, found); err != nil || c.handle.Undisturbed() {
		return found, err
	}
	if c.topology, err = c.handle.Scan(); err != nil {
		return nil, err
	}
	if found, err = find(); err != nil {
		return nil, fmt.Errorf("it disappeared while viaduct waited for another viaduct: %w", err)
	}
	return found, nil
}

// pfOf is the PF of a device that has to be a VF.
func pfOf(t *iommu.Topology, vf *iommu.Device) (*iommu.Device, error) {
	if vf.PhysFn == nil {
		return nil, usagef("%s is not a VF; want PF/vfN or a VF's address", vf.Name)
	}
	return t.Find(*vf.PhysFn)
}

// lockVF finds a VF, and locks its PF.
func (c *changing) lockVF(ctx context.Context, sel iommu.Selector) (pf, vf *iommu.Device, err error) {
	pfs, err := c.lockFound(ctx, func() ([]*iommu.Device, error) {
		var err error
		if vf, err = sel.One(c.handle.Host(), c.topology); err != nil {
			return nil, err
		}
		pf, err := pfOf(c.topology, vf)
		return []*iommu.Device{pf}, err
	})
	if err != nil {
		return nil, nil, err
	}
	return pfs[0], vf, nil
}
