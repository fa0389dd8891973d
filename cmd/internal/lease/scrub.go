package lease

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"viaduct/iommu"
)

// scrub proves that nobody has what a lease had, and scrubs it: see scrubAll.
func (m *Manager) scrub(ctx context.Context, l *Lease, until time.Time) (out []Certificate, unwritten, failed error) {
	devices := m.present(l)
	if err := m.handle.Refresh(devices); err != nil {
		return nil, nil, err
	}
	// The last look stands here, however long locks were waited for: a guest may have been late.
	if err := m.awaitGone(ctx, l, devices, 0); err != nil {
		return nil, nil, err
	}
	held, err := m.prove(ctx, "release "+l.Guest, devices, true, until)
	if err != nil {
		l.used()
		return nil, nil, err
	}
	defer func() { _ = held.Close() }()
	return m.scrubAll(ctx, l, held)
}

// scrubbing is the scrub of one device.
type scrubbing struct {
	dev *Device
	d   *iommu.Device
	c   Certificate
	err error
}

// scrubAll scrubs what is left of a lease's devices, and writes the certificates: all of them are reset before the
// first goes back, as some are reset only together. The second error is of what could not be written down, and must not
// be forgotten.
func (m *Manager) scrubAll(ctx context.Context, l *Lease, held *hold) (out []Certificate, unwritten, failed error) {
	all, done, err := m.clearAll(ctx, l, held)
	if err != nil {
		return nil, nil, err
	}
	shareFate(all)
	if err := m.saveClean(l, all, done); err != nil {
		return nil, err, nil
	}
	if err := held.Close(); err != nil {
		return nil, nil, err
	}

	var errs, lost []error
	for _, s := range all {
		if s.d != nil && s.err == nil {
			s.err = m.putBack(ctx, s)
		}
		if s.err != nil && ctx.Err() != nil {
			return out, errors.Join(lost...), s.err
		}
		failed, unwritten := m.certify(l, s)
		errs, lost = append(errs, failed), append(lost, unwritten)
		out = append(out, s.c)
	}
	return out, errors.Join(lost...), errors.Join(errs...)
}

// clearAll resets all of a lease's devices that are there, and then gives its VFs their settings. It ends with an error
// only where it was interrupted.
func (m *Manager) clearAll(ctx context.Context, l *Lease, held *hold) (all []*scrubbing, done resetting, err error) {
	done = resetting{}
	for i := range l.Devices {
		dev := &l.Devices[i]
		s := &scrubbing{dev: dev}
		s.c = Certificate{Guest: l.Guest, Address: dev.Address, ID: dev.ID, Time: time.Now(), Result: Clean}
		all = append(all, s)
		d, err := m.Topology.Find(dev.Address)
		if err != nil || d.ID != dev.ID || dev.Nowhere {
			s.c.Result, s.c.Why = Missing, "it is gone"
			continue
		}
		s.d, s.c.Place = d, place(m.host, d)
		if d.Class>>8 == nvmeClass {
			s.c.note("its data is not erased: viaduct does not erase media")
		}
		if s.err = m.clear(ctx, l, s, done, held); s.err != nil && ctx.Err() != nil {
			return nil, nil, s.err
		}
	}

	for _, s := range all {
		if s.d == nil || s.err != nil || s.d.PhysFn == nil {
			continue
		}
		if s.err = m.reconfigure(ctx, s.dev, s.d, l.Drawn, &s.c); s.err != nil && ctx.Err() != nil {
			return nil, nil, s.err
		}
	}
	return all, done, nil
}

// certify writes down what came of a device: its certificate, and its quarantine, which must not be lost, if it failed,
// or is not there: it may come back as its guest has left it. A VF comes back as a new one.
func (m *Manager) certify(l *Lease, s *scrubbing) (failed, unwritten error) {
	if id := s.dev.Identity; s.d == nil && !s.dev.Nowhere && s.dev.PF == nil && id != nil && id.Path != "" {
		q := Quarantine{
			Address: s.dev.Address, Place: id.Path, Guest: l.Guest, Since: s.c.Time, Device: *s.dev, Lost: true,
			Boot: bootID(m.host), NoReset: l.NoReset,
			Why: "it was not there when its lease ended, and has not been reset since",
		}
		q.Device.Home = true
		unwritten = m.Book.State.Put(quarantineKey(q.Place), q)
	}
	if s.err != nil {
		s.c.Result, s.c.Why = InQuarantine, strings.ReplaceAll(s.err.Error(), "\n", "; ")
		q := Quarantine{
			Address: s.d.Address, Place: s.c.Place, Guest: l.Guest, Since: s.c.Time, Why: s.c.Why, Device: *s.dev,
			Boot: bootID(m.host), NoReset: l.NoReset,
		}
		unwritten = m.Book.State.Put(quarantineKey(s.c.Place), q)
		failed = fmt.Errorf("%s could not be cleaned, and is in quarantine: %w", s.d.Name, s.err)
		if unwritten != nil {
			failed = fmt.Errorf("%s could not be cleaned: %w", s.d.Name, s.err)
		}
		// A note is all that hangs on it.
		if pool, _ := m.poolOf(s.d.Address); pool != "" {
			s.c.note("a libvirt network that was made of pool %s must be made again without it: viaduct pool %s "+
				"--format libvirt-network", pool, pool)
		}
	}
	switch {
	case unwritten != nil:
		unwritten = fmt.Errorf("the quarantine of %s could not be written down, so that what it is assigned to "+
			"keeps it: %w", s.dev.Address, unwritten)
	case s.d != nil:
		failed = errors.Join(failed, m.Book.Run.Put(scrubbed+s.d.Name, s.c))
	}
	return failed, unwritten
}

// shareFate keeps the rest of an IOMMU group from going home when one of it cannot: it may be reset only with them.
func shareFate(all []*scrubbing) {
	for _, s := range all {
		if s.d == nil || s.err == nil {
			continue
		}
		for _, o := range all {
			if o != s && o.d != nil && o.err == nil && o.d.VFIO && o.d.Together(s.d) {
				o.err = fmt.Errorf("%s, which is in its IOMMU group, could not be cleaned", s.d.Name)
			}
		}
	}
}

// saveClean writes down which devices were reset together, before the first of them goes home: they could not be any
// more.
func (m *Manager) saveClean(l *Lease, all []*scrubbing, done resetting) error {
	changed := false
	for _, s := range all {
		if _, together := done[s.dev.Address]; together && s.d != nil && s.err == nil && !s.dev.Clean {
			s.dev.Clean, changed = true, true
		}
	}
	if !changed {
		return nil
	}
	return m.put(l)
}

// clear resets a device.
func (m *Manager) clear(ctx context.Context, l *Lease, s *scrubbing, done resetting, held *hold) error {
	dev, d := s.dev, s.d
	if err := m.handle.Refresh([]*iommu.Device{d}); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return errors.New("interrupted before it was touched")
	}

	foreign := l.OwnDriver && d.Driver == "pciback"
	if d.Blocks() && !dev.Home && !foreign {
		return fmt.Errorf(
			"it is on driver %s of the host, so somebody took it from its guest (viaduct bind %s takes it again)",
			d.Driver,
			d.Name,
		)
	}

	if d.Blocks() && !foreign || l.Unmade && !d.VFIO {
		// It was never taken, or is back already, and its own driver has made it anew.
		return nil
	}

	err := m.reset(l, d, &s.c, done, held)
	if errors.Is(err, errNoReset) && dev.Clean {
		// It was reset before, together with what has gone home since.
		s.c.Reset, err = "before the release was interrupted", nil
	}

	if err == nil {
		err = m.answers(d)
	}

	if err != nil && (l.force || l.NoReset && errors.Is(err, errNoReset)) {
		s.c.Result, s.c.Why, s.c.Reset = Unreset, err.Error(), ""
		return nil
	}

	return err
}

// answers is an error if a device does not answer any more: one that fell off its bus is reset without an error.
func (m *Manager) answers(d *iommu.Device) error {
	answers, err := iommu.Answers(m.host, d)
	if err == nil && !answers {
		err = errors.New("it has not answered since its reset")
	}
	return err
}

// putBack gives a device that was reset, and has the settings it had, back to what it was on.
func (m *Manager) putBack(ctx context.Context, s *scrubbing) error {
	dev, d := s.dev, s.d
	if err := m.giveBack(context.WithoutCancel(ctx), dev, d); err != nil {
		return err
	}
	if !dev.Home && d.VFIO {
		if err := m.handle.Settle(d); err != nil {
			return err
		}
	}

	now, err := iommu.ReadDevice(m.host, d.Address)
	s.c.Driver = now.Driver
	return err
}
