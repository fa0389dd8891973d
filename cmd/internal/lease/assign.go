package lease

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"viaduct/cmd/internal/vmm"
	"viaduct/internal/shell"
	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// Request is what a guest asks for.
type Request struct {
	Guest               string
	For                 string // whom it is for, in words
	Sources             []Source
	Memory              uint64 // the guest's, in bytes; 0: not known
	AvoidsReservedRange bool   // its VMM keeps guest memory off the range that AMD's IOMMUs reserve
	NUMA                *int
	NodeOwner           string
	TTL                 time.Duration
	OwnerPID            int
	Unit                string
	Persist             bool
	OwnDriver           bool         // its VMM takes the devices to a driver of its own
	NoReset             bool         // give out also what nothing can reset afterwards
	Exclusive           bool         // refuse what another process, or a VMM that runs, has already
	VM                  *vmm.Machine // what is known of its virtual machine

	moving State // the lease is made for this
}

// Assign gives a guest devices: draws them, under the lock of the books, and then configures and takes them. Asked
// again for the same guest it finishes what is there; fresh is false then. It returns what the user should know beside
// the lease.
func (m *Manager) Assign(ctx context.Context, r *Request) (l *Lease, fresh bool, notes []string, err error) {
	if err := CheckGuest(r.Guest); err != nil {
		return nil, false, nil, err
	}
	mine, err := m.Book.lockGuest(ctx, r.Guest, m.handle.Timeout())
	if err != nil {
		return nil, false, nil, err
	}
	defer mine.Close()
	units, err := m.choices(r)
	if err != nil {
		old, _ := m.Book.Get(r.Guest)
		if old == nil || !sameSources(old.Sources, r.Sources) {
			// What it was drawn from may be gone from the declaration.
			return nil, false, nil, err
		}
	}

	if err := m.mayRun(r); err != nil {
		return nil, false, nil, err
	}

	skip := map[string]bool{}
	for {
		if l, fresh, err = m.reserve(ctx, r, units, skip); err != nil {
			return nil, false, nil, err
		}
		notes, err = m.finish(ctx, l, r)
		if err == nil || !fresh {
			return l, fresh, notes, err
		}
		if undone := m.undo(ctx, l); undone != nil {
			// The lease stays, for release to end.
			return nil, false, notes, errors.Join(err,
				fmt.Errorf("%s keeps its devices until viaduct release %s: %w", r.Guest, shell.Quote(r.Guest),
					undone))
		}

		used, refused := errors.AsType[*inUseError](err)
		if !refused || ctx.Err() != nil {
			return nil, false, notes, err
		}
		for _, d := range used.devices {
			// By what keeps no books: the next one, then.
			skip[d.Name] = true
		}
		if !slices.ContainsFunc(units, func(u choice) bool { return len(u.units) > u.Count && u.exactly == nil }) {
			return nil, false, notes, used.error
		}
	}
}

// choice is a source with the units that may be drawn from it.
type choice struct {
	Source
	units [][]*iommu.Device
}

// choices are what a request may be given.
func (m *Manager) choices(r *Request) ([]choice, error) {
	var out []choice
	for _, s := range r.Sources {
		units, err := m.unitsOf(&s)
		if err != nil {
			return nil, err
		}
		out = append(out, choice{s, units})
	}
	return out, nil
}

// unitsOf are the units of a source.
func (m *Manager) unitsOf(s *Source) ([][]*iommu.Device, error) {
	if s.exactly == nil {
		return m.source(s.From)
	}
	var devices []*iommu.Device
	for _, a := range s.exactly {
		d, err := m.Topology.Find(a)
		if err != nil {
			return nil, err
		}
		devices = append(devices, d)
	}
	return bind.Units(m.Topology, devices)
}

// reserve draws devices for a guest and writes that down; fresh is false if it has some already.
func (m *Manager) reserve(ctx context.Context, r *Request, choices []choice,
	skip map[string]bool) (l *Lease, fresh bool, err error) {
	held, err := m.Book.lockAll(ctx, m.handle.Timeout())
	if err != nil {
		return nil, false, err
	}
	defer held.Close()
	if err := m.Book.forgetReset(); err != nil {
		return nil, false, err
	}
	all, err := m.all()
	if err != nil {
		return nil, false, err
	}
	if i := slices.IndexFunc(all, func(l *Lease) bool { return l.Guest == r.Guest }); i >= 0 {
		l := all[i]
		if r.moving == "" {
			if err := l.moves("assign to"); err != nil {
				return nil, false, err
			}
		}
		if err := l.same(r); err != nil {
			return nil, false, err
		}
		l.renew(m, r)
		return l, false, m.Book.putLocked(l)
	}

	drawn, err := m.draw(all, r, choices, skip)
	if err != nil {
		return nil, false, err
	}
	l = &Lease{
		LeaseHead: holder.LeaseHead{Guest: r.Guest},
		Sources:   r.Sources,
		OwnDriver: r.OwnDriver,
		NoReset:   r.NoReset,
		Moving:    r.moving,
		Holders:   []Holder{},
	}
	l.renew(m, r)
	for _, c := range drawn {
		devices := handed(c.units)
		if err := m.handle.Refresh(devices); err != nil {
			// As it is since nobody else can draw it.
			return nil, false, err
		}
		l.Drawn = l.Drawn || c.exactly != nil
		for _, d := range devices {
			settings, err := c.settingsFor(d)
			if err != nil {
				return nil, false, err
			}
			dev, err := m.describe(d, settings)
			if err != nil {
				return nil, false, err
			}
			l.Devices = append(l.Devices, dev)
		}
	}
	return l, true, m.Book.putLocked(l)
}

// settingsFor are a source's settings for a device, which is refused if it cannot have them.
func (s *Source) settingsFor(d *iommu.Device) (sriov.Settings, error) {
	if len(s.Settings) == 0 {
		return nil, nil
	}
	why := holder.Reason{Kind: holder.Unsuitable, Device: d.Name}
	if d.PhysFn == nil {
		why.Text = "it is not a VF, and has no " + s.Settings.Text()
		return nil, holder.Because("assign "+d.Name, why, "")
	}
	settings, err := s.Settings.Of(d.VFIndex)
	if err != nil {
		why.Text = err.Error()
		return nil, holder.Because("assign "+d.Name, why, "")
	}
	return settings, nil
}

// renew is what asking, and asking again, sets: how long the lease lives.
func (l *Lease) renew(m *Manager, r *Request) {
	l.began(m.host)
	l.TTL, l.Maker, l.Persist = r.TTL, m.self(), l.Persist || r.Persist
	l.Unit, l.Owner, l.Ending, l.Unmade = r.Unit, nil, false, false
	l.used()
	if r.VM != nil && (l.VM == nil || r.VM.Words || !l.VM.Words) {
		// Who only asks again does not know the words of who runs it.
		l.VM = r.VM
	}
	l.For = cmp.Or(r.For, l.For)
	if r.NodeOwner != "" {
		l.NodeOwner = r.NodeOwner
	}
	if r.OwnerPID != 0 {
		owner := holder.NameProcess(m.host, r.OwnerPID)
		l.Owner = &owner
	}
	gone := func(h Holder) bool { return !h.Alive(m.host) }
	if l.Holders = slices.DeleteFunc(l.Holders, gone); l.Runner != nil && gone(*l.Runner) {
		l.Runner = nil
	}
}

// same refuses a request for something else than a lease is.
func (l *Lease) same(r *Request) error {
	why := l.differs(r)
	if why == "" {
		return nil
	}
	reason := holder.Reason{Kind: holder.Guest, Text: "it has a lease already, " + why}
	return holder.Because("assign to "+r.Guest, reason, "viaduct release "+shell.Quote(r.Guest))
}

// differs says how a lease is not what is asked for.
func (l *Lease) differs(r *Request) string {
	switch {
	case !sameSources(l.Sources, r.Sources):
		return "drawn from " + l.DrawnFrom()
	case l.OwnDriver && !r.OwnDriver:
		return "for a VMM that has its own driver, e.g. Xen"
	case r.OwnDriver && !l.OwnDriver:
		return "for a VMM that has its devices by VFIO"
	}
	for i := range l.Sources {
		s := &l.Sources[i]
		switch now := &r.Sources[i]; {
		case s.Count != now.Count:
			return fmt.Sprintf("with %d of %s", s.Count, s.From)
		case !maps.Equal(s.Settings, now.Settings):
			return "with " + cmp.Or(s.Settings.Text(), "no settings")
		}
	}
	return ""
}

// sameSources reports whether two requests draw from the same, in the same order.
func sameSources(a, b []Source) bool {
	return slices.EqualFunc(a, b, func(a, b Source) bool { return a.From == b.From })
}

// finish makes what a lease says: settings, drivers, nodes. What is there already is not written again. A request is
// asked whether its guest's memory fits; nil: nobody asked.
func (m *Manager) finish(ctx context.Context, l *Lease, r *Request) (notes []string, err error) {
	devices, err := m.devices(l)
	if err != nil {
		return nil, err
	}
	if r != nil {
		if notes, err = m.fits(l, devices, r); err != nil {
			return notes, err
		}
	}
	var owner *bind.NodeOwner
	if l.NodeOwner != "" {
		if owner, err = bind.ParseNodeOwner(l.NodeOwner); err != nil {
			return notes, err
		}
	}

	units, err := m.lockUnits(ctx, l, devices)
	if err != nil {
		return notes, err
	}
	if m.host.Live() {
		told, err := m.hand(ctx, l, devices, units, owner, r != nil)
		if notes = append(notes, told...); err != nil {
			return notes, err
		}
	}
	if !l.OwnDriver {
		var errs []error
		for _, result := range m.handle.Do(ctx, units, bind.Take(bind.Auto).OwnedBy(owner)) {
			errs = append(errs, result.Err)
		}
		if err := errors.Join(errs...); err != nil {
			return notes, err
		}
	}

	if !l.Ready {
		l.Ready = true
		l.began(m.host)
	}
	return notes, m.put(l)
}

// lockUnits locks what work on a lease touches, and returns its units as they are then: none is in quarantine, none
// protected.
func (m *Manager) lockUnits(ctx context.Context, l *Lease, devices []*iommu.Device) ([][]*iommu.Device, error) {
	if err := m.clean(l, devices); err != nil {
		return nil, err
	}
	writes := l.configured() || slices.ContainsFunc(devices, func(d *iommu.Device) bool { return !d.VFIO })
	if m.host.Live() && writes {
		// Beside what is asked first.
		m.handle.Start()
	}
	if err := m.lock(ctx, m.touched(devices, l.configured())); err != nil {
		return nil, err
	}
	if err := m.handle.Refresh(m.touched(devices, false)); err != nil {
		return nil, err
	}

	return m.unprotected(devices)
}

// unprotected are the units of devices, none of which is protected.
func (m *Manager) unprotected(devices []*iommu.Device) ([][]*iommu.Device, error) {
	units, err := bind.Units(m.Topology, devices)
	if err != nil {
		return nil, err
	}
	for _, unit := range units {
		if err := m.declared.Protected(m.declaration, unit); err != nil {
			return nil, err
		}
	}
	return units, nil
}

// hand makes sure that nobody has a lease's devices, and that they can be reset if they are asked for, and gives them
// the settings that the guest is to have.
func (m *Manager) hand(ctx context.Context, l *Lease, devices []*iommu.Device, units [][]*iommu.Device,
	owner *bind.NodeOwner, asked bool) (notes []string, err error) {
	refusals, notes, err := m.ask(l, devices, units)
	if err != nil {
		return notes, err
	}
	if err := m.inUse(l, units, refusals); err != nil {
		return notes, err
	}
	if asked && !l.Ready && !l.NoReset {
		if err := m.resettable(l, units); err != nil {
			return notes, err
		}
	}

	held, err := m.proveFree(ctx, l, units)
	if err != nil {
		return notes, err
	}
	set, err := m.settings(ctx, l, devices)
	notes = append(notes, set...)
	if err := errors.Join(err, held.Close()); err != nil {
		return notes, err
	}
	return notes, m.settle(held, owner)
}
