package lease

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"viaduct/iommu"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// mayRun refuses to run a guest alone that runs already. It looks at processes, which may take a while: the books are
// not locked meanwhile, but the guest's lease is.
func (m *Manager) mayRun(r *Request) error {
	if !r.Exclusive {
		return nil
	}
	l, err := m.known(r.Guest)
	if err != nil {
		if none, _ := errors.AsType[*NoLeaseError](err); none != nil {
			return nil
		}
		return err
	}
	why, err := m.busy(l)
	if err != nil {
		return err
	}
	if why != "" {
		return holder.Because("run "+r.Guest, holder.Reason{Kind: holder.Guest, Text: why}, "")
	}
	return nil
}

// busy says whose a lease is at this moment; "" if nobody's who lives.
func (m *Manager) busy(l *Lease) (string, error) {
	if l.Owner != nil && l.Owner.Alive(m.host) {
		return fmt.Sprintf("process %d has its lease", l.Owner.PID), nil
	}
	for _, h := range l.known() {
		if h.Alive(m.host) {
			return "it runs: " + h.Name, nil
		}
	}
	holders, err := holder.Processes(m.host, m.present(l))
	if len(holders) > 0 {
		return holders[0].String(), nil
	}
	if errors.Is(err, holder.ErrTooMany) {
		// Of those that could not be looked at, the VMM is told by the kernel.
		err = nil
	}
	return "", err
}

// inUseError is why a device that was drawn cannot be had: something that keeps no books uses it.
type inUseError struct {
	error
	devices []*iommu.Device
}

func (e *inUseError) Unwrap() error { return e.error }

// proveFree proves that nobody has what a guest is to get, before the first setting: an inUseError else. A guest that
// has it already may run.
func (m *Manager) proveFree(ctx context.Context, l *Lease, units [][]*iommu.Device) (held holds, err error) {
	if l.Ready || len(l.known()) > 0 || l.OwnDriver {
		return nil, nil
	}
	for _, unit := range units {
		h, err := m.prove(ctx, "assign "+unit[0].Name, unit, false, time.Now())
		if errors.Is(err, holder.ErrRefused) {
			err = &inUseError{error: err, devices: unit}
		}
		if err != nil {
			return nil, errors.Join(err, held.Close())
		}
		held = append(held, h)
	}
	return held, nil
}

// settle leaves the nodes of what was held to whom the host's own rules give them, if the guest names nobody.
func (m *Manager) settle(held holds, owner *bind.NodeOwner) error {
	var errs []error
	for _, h := range held {
		for _, d := range h.shared {
			if owner == nil {
				errs = append(errs, m.handle.Settle(d))
			}
		}
	}
	return errors.Join(errs...)
}

// clean refuses devices in quarantine.
func (m *Manager) clean(l *Lease, devices []*iommu.Device) error {
	quarantine, err := m.Book.Quarantined()
	if err != nil {
		return err
	}
	for _, d := range devices {
		if why := quarantine.Why(m.host, d); why != "" {
			reason := holder.Reason{Kind: holder.Quarantined, Device: d.Name, Text: "it is in quarantine: " + why}
			return holder.Because("give "+d.Name+" to "+l.Guest, reason, "viaduct release --quarantined "+d.Name)
		}
	}
	return nil
}

// ask asks who uses a lease's devices, before the first change, and what the user should know of them. Under Xen the
// kernel shows no IOMMU groups, and VFIO takes nothing.
func (m *Manager) ask(l *Lease, devices []*iommu.Device,
	units [][]*iommu.Device) (out []error, notes []string, err error) {
	guests := []holder.Kind{holder.Lease}
	if !l.OwnDriver {
		verdicts, err := m.handle.Check(units, devices, bind.Take(bind.Auto), guests)
		for _, v := range verdicts {
			out = append(out, v.Refused)
			notes = append(notes, v.Notes...)
		}
		return out, notes, err
	}
	for _, unit := range units {
		holders, err := holder.Find(m.host, unit)
		if err != nil && (!m.handle.DryRun() || !errors.Is(err, holder.ErrBlind)) {
			return nil, nil, err
		}
		out = append(out, holder.Refuse("assign "+unit[0].Name, holders, guests, ""))
	}
	return out, nil, nil
}

// inUse are the refusals of units, and those that are because somebody has the device open who keeps no books.
func (m *Manager) inUse(l *Lease, units [][]*iommu.Device, refusals []error) error {
	if err := errors.Join(refusals...); err != nil {
		used := &inUseError{error: err}
		for i, unit := range units {
			if refusals[i] != nil {
				used.devices = append(used.devices, unit...)
			}
		}
		return used
	}

	if l.Ready || len(l.known()) > 0 {
		// It may run.
		return nil
	}
	// Of those on a vfio driver, which the gate lets pass.
	all := slices.Concat(units...)
	holders, err1 := holder.Processes(m.host, all)
	if errors.Is(err1, holder.ErrTooMany) && !slices.ContainsFunc(all, func(d *iommu.Device) bool { return !d.VFIO }) {
		// Of those the kernel tells: see prove.
		err1 = nil
	}
	displays, err2 := holder.Displays(m.host, all)
	holders = append(holders, displays...)
	if err := errors.Join(err1, err2); err != nil || len(holders) == 0 {
		return err
	}
	used := &inUseError{error: holder.Refuse("assign "+holders[0].Device, holders, nil, "end it first")}
	for _, unit := range units {
		for _, d := range unit {
			if slices.ContainsFunc(holders, func(h holder.Holder) bool { return h.Device == d.Name }) {
				used.devices = append(used.devices, unit...)
			}
		}
	}
	return used
}
