package bind

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	"viaduct/internal/host"
	"viaduct/iommu"
	"viaduct/vfio/holder"
)

// Request is what a Job is to do.
type Request struct {
	// Devices are those that are asked for. All that shares a group with one of them goes along.
	Devices []*iommu.Device
	Goal    Goal
	// Force names the kinds of holders to override.
	Force []holder.Kind
}

// Job is a change of devices that are locked, up to date and asked for: all that comes before the first write.
type Job struct {
	// Recovered is what became of devices whose change had been interrupted.
	Recovered []Recovered
	// Units are what goes together, each with whether it may.
	Units []Verdict

	handle *Handle
	goal   Goal
	ran    atomic.Bool
}

// ErrRan is matched by errors of a Job that was carried out before: what it had asked for may be another thing now.
const ErrRan = host.Error("it was executed already")

// Prepare finds the units of the devices, locks them, finishes or undoes what interrupted runs left, looks at the
// devices again if something of viaduct's has changed anything meanwhile, and asks who uses them. What is refused
// stands in the Job; an error says that it cannot be known, or that a device cannot be had. On a dry run, and on a
// captured host, nothing is locked.
func (b *Handle) Prepare(ctx context.Context, r Request) (*Job, error) {
	j := &Job{handle: b, goal: r.Goal}
	t, err := b.Topology()
	if err != nil {
		return nil, err
	}
	units, err := Units(t, r.Devices)
	if err != nil {
		return nil, err
	}

	if b.Changes() {
		all := slices.Concat(units...)
		if err := b.Lock(ctx, all); err != nil {
			return nil, err
		}
		if j.Recovered, err = b.Recover(ctx); err != nil {
			return nil, err
		}
		if !b.Undisturbed() {
			if err := b.Refresh(all); err != nil {
				return nil, err
			}
		}
	}

	j.Units, err = b.Check(units, r.Devices, r.Goal, r.Force)
	return j, err
}

// Move brings devices, and all that shares a group with them, where they are to go: [Handle.Prepare] and [Job.Run] in
// one, for who has nothing to ask in between. It says of each device what came of it. An error is one of
// [holder.ErrRefused], of what cannot be known, or those of the results. On a dry run, and on a captured host, the
// results are the plan.
func (b *Handle) Move(ctx context.Context, g Goal, devices ...iommu.Address) ([]Result, error) {
	t, err := b.Scan()
	if err != nil {
		return nil, err
	}
	r := Request{Goal: g}
	for _, a := range devices {
		d, err := t.Find(a)
		if err != nil {
			return nil, err
		}
		r.Devices = append(r.Devices, d)
	}

	j, err := b.Prepare(ctx, r)
	if err != nil {
		return nil, err
	}
	var out []Result
	if b.Changes() {
		out = j.Run(ctx)
	} else {
		out = j.Plan()
	}
	errs := []error{j.Refused()}
	for _, r := range out {
		errs = append(errs, r.Err)
	}
	return out, errors.Join(errs...)
}

// Refused joins the errors of the units that are refused; they match [holder.ErrRefused]. It is nil if none is.
func (j *Job) Refused() error { return Refusals(j.Units) }

// Plan is what Run would do: nothing to the devices of units that are refused. Nothing is changed.
func (j *Job) Plan() []Result {
	var out []Result
	for _, v := range j.Units {
		if v.Refused != nil {
			continue
		}
		for _, d := range v.Unit {
			change, err := j.handle.Plan(d, j.goal)
			out = append(out, Result{Change: change, Err: err})
		}
	}
	return out
}

// Run brings the units that are not refused where they are to go, each whole or not at all, and says of each device
// what came of it. When the context ends, what was not begun is left alone, and half a unit is put back. A
// Job is run once.
func (j *Job) Run(ctx context.Context) []Result {
	if j.handle == nil {
		return nil
	}
	if j.ran.Swap(true) {
		out := j.Plan()
		for i := range out {
			out[i].Err = fmt.Errorf("%s: %w", out[i].Device, ErrRan)
		}
		return out
	}

	var units [][]*iommu.Device
	for _, v := range j.Units {
		if v.Refused == nil {
			units = append(units, v.Unit)
		}
	}
	return j.handle.Do(ctx, units, j.goal)
}

// Refresh reads devices that are locked again, as they are now that nobody else changes them. Those that are stuck stay
// as they were: to read them would be to wait with them.
func (b *Handle) Refresh(devices []*iommu.Device) error {
	stuck := b.Stuck()
	for _, d := range devices {
		if !d.PCI || slices.ContainsFunc(stuck, func(r Recovered) bool { return r.Device == d.Address }) {
			continue
		}
		now, err := iommu.ReadDevice(b.host, d.Address)
		if err != nil {
			return err
		}
		before := d.Driver
		d.Driver, d.DriverOverride, d.VFIO, d.SRIOV = now.Driver, now.DriverOverride, now.VFIO, now.SRIOV

		// Its driver makes interfaces, and udev may just have named them.
		if d.Driver != before || d.Blocks() {
			if err := iommu.ReadNetdevs(b.host, d); err != nil {
				return err
			}
		}
	}
	return nil
}
