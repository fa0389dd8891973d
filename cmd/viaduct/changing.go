package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/cmd/internal/declared"
	"viaduct/cmd/internal/lease"
	"viaduct/internal/journal"
	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio"
)

// changing is what a command works with that changes the host, or, with --dry-run or on a captured host, would.
type changing struct {
	env      *env
	host     *iommu.Host
	topology *iommu.Topology
	binder   *vfio.Binder
	stuck    []vfio.Recovered // what earlier changes still wait for

	began   time.Time // before the scan
	changed time.Time // when a viaduct had last changed anything, then
}

// newBinder is the binder of a command; its owner closes it.
func newBinder(h *iommu.Host, timeout time.Duration) *vfio.Binder {
	others := maps.Clone(sriov.Recoverers)
	maps.Copy(others, lease.Recoverers)
	b := &vfio.Binder{Host: h, Timeout: timeout, Others: others}
	if h.Live() {
		b.Journal = journal.In(journal.Dir)
	}
	return b
}

// beginChange opens and scans the host. The caller calls stop at the end, which closes all; until then a first signal only
// ends the context.
func (e *env) beginChange(ctx context.Context, timeout time.Duration) (context.Context, func(), *changing, error) {
	return e.beginLook(ctx, timeout, true)
}

// beginLook is beginChange for what may find that there is nothing to change: then the child that writes is started when it is needed.
func (e *env) beginLook(ctx context.Context, timeout time.Duration, writes bool) (context.Context, func(), *changing, error) {
	if err := e.mayChange(); err != nil {
		return nil, nil, nil, err
	}
	h, err := e.open()
	if err != nil {
		return nil, nil, nil, err
	}
	c := &changing{env: e, host: h, binder: newBinder(h, timeout)}
	signals := func() {}
	stop := func() {
		signals()
		c.binder.Close()
		h.Close()
	}
	if c.live() {
		takePrecedence(h)
		if writes {
			c.binder.Start()
		}
		ctx, signals = untilSignal(ctx)
	}
	c.began = time.Now()
	if c.live() {
		c.changed = c.binder.Journal.Changed()
	}
	if c.topology, err = iommu.Scan(h); err != nil {
		stop()
		return nil, nil, nil, err
	}
	return ctx, stop, c, nil
}

// takePrecedence puts this process, and the child it starts, before others. Each change wakes udev, whose rules for one device
// take longer than the kernel does for the next: side by side with them a hundred devices take twenty times as long, for the
// rules as well. Without the right to it, all stays as it is.
func takePrecedence(h *iommu.Host) { setNice(h, -20) }

func setNice(h *iommu.Host, nice int) {
	threads, _ := h.Names("proc/self/task")
	for _, t := range threads {
		if id, err := strconv.Atoi(t); err == nil {
			_ = unix.Setpriority(unix.PRIO_PROCESS, id, nice)
		}
	}
}

// undisturbed reports whether no viaduct has changed anything since the scan: each change begins and ends with a record.
func (c *changing) undisturbed() bool {
	const tick = 50 * time.Millisecond // more than the kernel's, within which two changes are one
	return c.changed.Equal(c.binder.Journal.Changed()) && c.began.Sub(c.changed) > tick
}

// live reports whether the host is really going to be changed.
func (c *changing) live() bool { return c.host.Live() && !c.env.dryRun }

// lock keeps other viaducts from devices, and finishes or undoes what interrupted ones left of them. One that is stuck in an
// earlier change is refused.
func (c *changing) lock(ctx context.Context, devices []*iommu.Device) error {
	if !c.live() {
		return nil
	}
	if err := c.binder.Lock(ctx, devices); err != nil {
		return err
	}
	if err := c.recover(ctx); err != nil {
		return err
	}
	return c.stuckIn(devices)
}

// stuckIn refuses devices of which one waits for an earlier change.
func (c *changing) stuckIn(devices []*iommu.Device) error {
	for _, r := range c.stuck {
		if r.Err != nil && slices.ContainsFunc(devices, func(d *iommu.Device) bool { return d.Address == r.Device }) {
			return &vfio.RefusedError{What: "change " + r.Device.String(), Reasons: []string{r.Err.Error()}}
		}
	}
	return nil
}

// declared is what works with the declared host.
func (c *changing) declared() *declared.Manager {
	return (&declaredOptions{}).manager(c.host, c.topology, c.binder)
}

// recover finishes or undoes what interrupted runs left, and tells.
func (c *changing) recover(ctx context.Context) (err error) {
	c.stuck, err = c.binder.Recover(ctx, false)
	c.env.tellRecovered(c.stuck)
	m := declared.Manager{Host: c.host, Binder: c.binder}
	if err != nil || !m.Interrupted() {
		return err
	}
	undone, err := m.Recover()
	c.env.tellRecovered(undone)
	return err
}

// lockPFs finds PFs, locks them, and looks at all again as it is now.
func (c *changing) lockPFs(ctx context.Context, selectors []iommu.Selector) ([]*iommu.Device, error) {
	find := func() (pfs []*iommu.Device, err error) {
		for _, s := range selectors {
			pf, err := s.One(c.host, c.topology)
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
	if err := c.lock(ctx, found); err != nil || c.undisturbed() {
		return found, err
	}
	if c.topology, err = iommu.Scan(c.host); err != nil {
		return nil, err
	}
	if found, err = find(); err != nil {
		return nil, fmt.Errorf("it went while another viaduct was waited for: %w", err)
	}
	return found, nil
}

// pfOf is the PF of a device that has to be a VF.
func pfOf(t *iommu.Topology, vf *iommu.Device) (*iommu.Device, error) {
	if vf.PhysFn == nil {
		return nil, usagef("%s is no VF; want PF/vfN or a VF's address", vf.Name)
	}
	return t.Find(*vf.PhysFn)
}

// lockVF finds a VF, and locks its PF.
func (c *changing) lockVF(ctx context.Context, sel iommu.Selector) (pf, vf *iommu.Device, err error) {
	pfs, err := c.lockFound(ctx, func() ([]*iommu.Device, error) {
		var err error
		if vf, err = sel.One(c.host, c.topology); err != nil {
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
