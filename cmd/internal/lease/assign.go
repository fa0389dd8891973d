package lease

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"time"

	"viaduct/cmd/internal/declared"
	"viaduct/cmd/internal/hostfile"
	"viaduct/internal/shell"
	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// Options are what leases are worked on with, beside the host.
type Options struct {
	// Declaration is for its pools, and what it protects; nil: nothing is declared.
	Declaration *hostfile.Host
	// Lock locks devices for as long as the Handle is open; nil: the Handle's.
	Lock func(context.Context, []*iommu.Device) error
}

// Manager is what leases are worked on with.
type Manager struct {
	Topology *iommu.Topology // the host as the Handle last saw it
	Book     *Book

	handle      *sriov.Handle
	host        *iommu.Host
	declaration *hostfile.Host
	lock        func(context.Context, []*iommu.Device) error
	declared    *declared.Manager
}

// New makes a Manager, which works on the host as the Handle last saw it.
func New(s *sriov.Handle, o Options) (*Manager, error) {
	t, err := s.Topology()
	if err != nil {
		return nil, err
	}
	d, err := declared.New(s, declared.Options{})
	if err != nil {
		return nil, err
	}
	m := &Manager{
		Topology: t, Book: BookOf(s.Host()), handle: s, host: s.Host(), declaration: o.Declaration, lock: o.Lock,
		declared: d,
	}
	if m.declaration == nil {
		m.declaration = &hostfile.Host{}
	}
	if m.lock == nil {
		m.lock = s.Lock
	}
	return m, nil
}

// Host is the host whose leases these are.
func (m *Manager) Host() *iommu.Host { return m.host }

// Request is what a guest asks for.
type Request struct {
	Guest, From string
	Count       int
	Settings    sriov.Settings
	Memory      uint64 // the guest's, in bytes; 0: not known
	Moves       bool   // its VMM keeps guest memory off the range that AMD's IOMMUs reserve
	NUMA        *int
	NodeOwner   string
	TTL         time.Duration
	OwnerPID    int
	Unit        string
	Persist     bool
	Foreign     bool            // its VMM takes the devices to a driver of its own
	NoReset     bool            // give out also what nothing can reset afterwards
	Alone       bool            // refuse what another process, or a VMM that runs, has already
	exactly     []iommu.Address // these, whoever drew them
}

// all are all leases; those that are still to be made in this boot hold what they are going to have.
func (m *Manager) all() ([]*Lease, error) {
	all, err := m.Book.All()
	for _, l := range all {
		if l.Persist && !l.Ready {
			m.relocate(l)
		}
	}
	return all, err
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
	units, err := m.units(r)
	if err != nil {
		old, _ := m.Book.Get(r.Guest)
		if old == nil || old.From != r.From {
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
				fmt.Errorf("%s keeps what it was given, for viaduct release %s: %w", r.Guest, shell.Quote(r.Guest),
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
		if len(units) == r.Count || r.exactly != nil {
			return nil, false, notes, used.error
		}
	}
}

// units are what a request may be given.
func (m *Manager) units(r *Request) ([][]*iommu.Device, error) {
	if r.exactly == nil {
		return m.source(r.From)
	}
	var devices []*iommu.Device
	for _, a := range r.exactly {
		d, err := m.Topology.Find(a)
		if err != nil {
			return nil, err
		}
		devices = append(devices, d)
	}
	return bind.Units(m.Topology, devices)
}

// reserve draws devices for a guest and writes that down; fresh is false if it has some already.
func (m *Manager) reserve(ctx context.Context, r *Request, units [][]*iommu.Device,
	skip map[string]bool) (l *Lease, fresh bool, err error) {
	held, err := m.Book.lockAll(ctx, m.handle.Timeout())
	if err != nil {
		return nil, false, err
	}
	defer held.Close()
	all, err := m.all()
	if err != nil {
		return nil, false, err
	}
	if i := slices.IndexFunc(all, func(l *Lease) bool { return l.Guest == r.Guest }); i >= 0 {
		l := all[i]
		if why := l.differs(r); why != "" {
			return nil, false, &holder.RefusedError{
				What:    "assign to " + r.Guest,
				Reasons: []string{fmt.Sprintf("it has a lease already, %s", why)},
				Cure:    "viaduct release " + shell.Quote(r.Guest),
			}
		}
		l.renew(m, r)
		return l, false, m.Book.putLocked(l)
	}

	drawn, err := m.free(all, r, units, skip)
	if err != nil {
		return nil, false, err
	}
	devices := handed(drawn)
	if err := m.handle.Refresh(devices); err != nil {
		// As it is since nobody else can draw it.
		return nil, false, err
	}
	l = &Lease{
		LeaseHead: holder.LeaseHead{Guest: r.Guest},
		From:      r.From,
		Count:     r.Count,
		Drawn:     r.exactly != nil,
		Foreign:   r.Foreign,
		NoReset:   r.NoReset,
		Holders:   []Holder{},
	}
	l.renew(m, r)
	for _, d := range devices {
		if d.PhysFn == nil && len(r.Settings) > 0 {
			return nil, false, &holder.RefusedError{
				What:    "assign " + d.Name,
				Reasons: []string{"it is no VF, and has no " + r.Settings.Text()},
			}
		}
		l.Devices = append(l.Devices, m.describe(d, r.Settings))
	}
	return l, true, m.Book.putLocked(l)
}

// renew is what asking, and asking again, sets: how long the lease lives.
func (l *Lease) renew(m *Manager, r *Request) {
	l.began(m.host)
	l.TTL, l.Maker, l.Persist = r.TTL, m.self(), l.Persist || r.Persist
	l.Unit, l.Owner, l.Ending, l.Unmade = r.Unit, nil, false, false
	l.used()
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

// mayRun refuses to run a guest alone that runs already. It looks at processes, which may take a while: the books are
// not locked meanwhile, but the guest's lease is.
func (m *Manager) mayRun(r *Request) error {
	if !r.Alone {
		return nil
	}
	l, err := m.known(r.Guest)
	if err != nil {
		if none, _ := errors.AsType[*NoLeaseError](err); none != nil {
			return nil
		}
		return err
	}
	if why := m.busy(l); why != "" {
		return &holder.RefusedError{What: "run " + r.Guest, Reasons: []string{why}}
	}
	return nil
}

// busy says whose a lease is at this moment; "" if nobody's who lives.
func (m *Manager) busy(l *Lease) string {
	if l.Owner != nil && l.Owner.Alive(m.host) {
		return fmt.Sprintf("process %d has its lease", l.Owner.PID)
	}
	for _, h := range l.known() {
		if h.Alive(m.host) {
			return "it runs: " + h.Name
		}
	}
	if holders, err := holder.Processes(m.host, m.present(l)); err == nil && len(holders) > 0 {
		return holders[0].String()
	}
	return ""
}

func (m *Manager) self() holder.Proc { return holder.NameProcess(m.host, os.Getpid()) }

func (m *Manager) describe(d *iommu.Device, want sriov.Settings) Device {
	out := Device{LeaseDevice: holder.LeaseDevice{Address: d.Address}, ID: d.ID, Index: index(d), Home: !d.VFIO}
	if d.PhysFn == nil {
		id := iommu.Identify(m.host, d)
		out.Identity = &id
		return out
	}
	out.Wanted = maps.Clone(want)
	if pf, err := m.Topology.Find(*d.PhysFn); err == nil {
		id := iommu.Identify(m.host, pf)
		out.PF = &id
	}
	return out
}

// index is a VF's index, -1 of what is no VF.
func index(d *iommu.Device) int {
	if d.PhysFn == nil {
		return -1
	}
	return d.VFIndex
}

// differs says how a lease is not what is asked for.
func (l *Lease) differs(r *Request) string {
	switch {
	case l.From != r.From:
		return fmt.Sprintf("drawn from %s", l.From)
	case l.Count != r.Count:
		return fmt.Sprintf("with --count %d", l.Count)
	}
	for _, d := range l.Devices {
		if d.PF != nil && !maps.Equal(d.Wanted, r.Settings) {
			return "with " + cmp.Or(d.Wanted.Text(), "no settings")
		}
	}
	return ""
}

// inUseError is why a device that was drawn cannot be had: something that keeps no books uses it.
type inUseError struct {
	error
	devices []*iommu.Device
}

func (e *inUseError) Unwrap() error { return e.error }

// finish makes what a lease says: settings, drivers, nodes. What is there already is not written again.
func (m *Manager) finish(ctx context.Context, l *Lease, r *Request) (notes []string, err error) {
	devices, err := m.devices(l)
	if err != nil {
		return nil, err
	}
	if r != nil {
		fits, err := m.fits(l, devices, r)
		if notes = append(notes, fits...); err != nil {
			return notes, err
		}
	}

	var owner *bind.NodeOwner
	if l.NodeOwner != "" {
		if owner, err = bind.ParseNodeOwner(l.NodeOwner); err != nil {
			return notes, err
		}
	}

	if err := m.clean(l, devices); err != nil {
		return notes, err
	}
	if m.host.Live() &&
		(l.configured() || slices.ContainsFunc(devices, func(d *iommu.Device) bool { return !d.VFIO })) {
		// Beside what is asked first.
		m.handle.Start()
	}
	if err := m.lock(ctx, m.touched(devices, l.configured())); err != nil {
		return notes, err
	}
	if err := m.handle.Refresh(m.touched(devices, false)); err != nil {
		return notes, err
	}

	units, err := bind.Units(m.Topology, devices)
	if err != nil {
		return notes, err
	}
	for _, unit := range units {
		if err := m.declared.Protected(m.declaration, unit); err != nil {
			return notes, err
		}
	}

	if m.host.Live() {
		refusals, told, err := m.ask(l, devices, units)
		if notes = append(notes, told...); err != nil {
			return notes, err
		}
		if err := m.inUse(l, units, refusals); err != nil {
			return notes, err
		}
		if r != nil && !l.Ready && !l.NoReset {
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
		if err := m.settle(held, owner); err != nil {
			return notes, err
		}
	}

	if !l.Foreign {
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
	return notes, m.Book.put(l)
}

// settings gives a lease's VFs what the guest is to have, and writes down first what they had.
func (m *Manager) settings(ctx context.Context, l *Lease, devices []*iommu.Device) (notes []string, err error) {
	if !l.Drawn {
		if err := m.before(l); err != nil {
			return nil, err
		}
	}
	return m.configure(ctx, l, devices)
}

// proveFree proves that nobody has what a guest is to get, before the first setting: an inUseError else. A guest that
// has it already may run.
func (m *Manager) proveFree(ctx context.Context, l *Lease, units [][]*iommu.Device) (held holds, err error) {
	if l.Ready || len(l.known()) > 0 || l.Foreign {
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
			return &holder.RefusedError{
				What:    "give " + d.Name + " to " + l.Guest,
				Reasons: []string{"it is in quarantine: " + why},
				Cure:    "viaduct release --quarantined " + d.Name,
			}
		}
	}
	return nil
}

// ask asks who uses a lease's devices, before the first change, and what the user should know of them. Under Xen the
// kernel shows no IOMMU groups, and VFIO takes nothing.
func (m *Manager) ask(l *Lease, devices []*iommu.Device,
	units [][]*iommu.Device) (out []error, notes []string, err error) {
	guests := []holder.Kind{holder.Lease}
	if !l.Foreign {
		verdicts, err := m.handle.Check(units, devices, bind.Take(bind.Auto), guests)
		for _, v := range verdicts {
			out = append(out, v.Refused)
			notes = append(notes, v.Notes...)
		}
		return out, notes, err
	}
	for _, unit := range units {
		holders, err := holder.Find(m.host, unit)
		if err != nil {
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

// configured reports whether a lease's VFs get settings.
func (l *Lease) configured() bool {
	return slices.ContainsFunc(l.Devices, func(d Device) bool { return len(d.Wanted) > 0 })
}

// devices are a lease's devices as the scan found them.
func (m *Manager) devices(l *Lease) ([]*iommu.Device, error) {
	var out []*iommu.Device
	for i := range l.Devices {
		d, err := m.Topology.Find(l.Devices[i].Address)
		if err != nil || d.ID != l.Devices[i].ID || l.Devices[i].Nowhere {
			return nil, fmt.Errorf("%s of %s is lost: it is not there any more (viaduct release %s ends the lease)",
				l.Devices[i].Address, l.Guest, shell.Quote(l.Guest))
		}
		out = append(out, d)
	}
	return out, nil
}

// touched are the devices that work on a lease's devices touches: these, the companions in their groups, and, if their
// settings change, the PFs of VFs, whose lock the settings are under.
func (m *Manager) touched(devices []*iommu.Device, settings bool) []*iommu.Device {
	out := append(slices.Clone(devices), m.companions(devices)...)
	if settings {
		out = append(out, m.pfs(devices)...)
	}
	return out
}

// pfs are the PFs of VFs.
func (m *Manager) pfs(devices []*iommu.Device) []*iommu.Device {
	var out []*iommu.Device
	for _, d := range devices {
		if d.PhysFn == nil {
			continue
		}
		if pf, err := m.Topology.Find(*d.PhysFn); err == nil && !slices.Contains(out, pf) {
			out = append(out, pf)
		}
	}
	return out
}

// companions are what is only kept off the host's drivers, in the groups of devices that are handed over.
func (m *Manager) companions(devices []*iommu.Device) []*iommu.Device {
	var out []*iommu.Device
	seen := map[int]bool{}
	for _, d := range devices {
		if d.Group == nil || seen[*d.Group] {
			continue
		}
		seen[*d.Group] = true
		if g, err := m.Topology.Group(*d.Group); err == nil {
			for _, c := range g.Endpoints() {
				if c.Role() == iommu.RoleCompanion && !slices.Contains(devices, c) {
					out = append(out, c)
				}
			}
		}
	}
	return out
}

// handed are those of some units' devices that a guest gets.
func handed(units [][]*iommu.Device) []*iommu.Device {
	return slices.DeleteFunc(slices.Concat(units...), func(d *iommu.Device) bool { return d.Role() != iommu.RoleGuest })
}

// Declared is what works with the declared host, beside the leases.
func (m *Manager) Declared() *declared.Manager { return m.declared }
