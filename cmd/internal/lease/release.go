package lease

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// Certificate is what came of the scrub of a device that a guest had.
type Certificate struct {
	Guest    string         `json:"guest"`
	Address  iommu.Address  `json:"address"`
	ID       iommu.ID       `json:"id"`
	Place    string         `json:"place,omitempty"` // its physical path
	Time     time.Time      `json:"time"`
	Result   Result         `json:"result"`
	Why      string         `json:"why,omitempty"`      // it is not clean
	Reset    string         `json:"reset,omitempty"`    // the ways to reset it, the first of which the kernel took
	Found    sriov.Settings `json:"found,omitempty"`    // what it had
	Settings sriov.Settings `json:"settings,omitempty"` // what it has now, read back
	Driver   string         `json:"driver,omitempty"`   // that it is on now
	Note     string         `json:"note,omitempty"`     // what was not cleaned, or is not known
}

// nvmeClass is the base class and subclass of NVMe controllers.
const nvmeClass = 0x0108

// Result is how a scrub ended.
type Result string

// The results.
const (
	Clean   Result = "clean"      // and free for the next
	Fouled  Result = "quarantine" // nobody gets it
	Missing Result = "lost"       // it is not there any more
	Unreset Result = "not-reset"  // and free for the next, who finds what the guest has left, as its lease allowed
)

// NoLeaseError says that a guest has no lease.
type NoLeaseError struct {
	Guest string
	Have  []string
}

func (e *NoLeaseError) Error() string {
	if len(e.Have) == 0 {
		return fmt.Sprintf("%s has no lease, and nobody else has", e.Guest)
	}
	return fmt.Sprintf("%s has no lease; these have: %s", e.Guest, strings.Join(e.Have, ", "))
}

// Release ends a guest's lease: it waits, at most for the given time, until nobody has its devices open, and scrubs
// them. One that cannot be scrubbed goes into quarantine, and the error says why.
func (m *Manager) Release(ctx context.Context, guest string, wait time.Duration) ([]Certificate, error) {
	return m.alone(ctx, guest, wait, m.end)
}

// Rest ends what a guest has of a lease that outlives it, and leaves the lease for the guest's next start; any other it
// releases.
func (m *Manager) Rest(ctx context.Context, guest string, wait time.Duration) ([]Certificate, error) {
	l, err := m.Book.Get(guest)
	if err != nil {
		return nil, err
	}
	if l == nil || !l.Persist {
		return m.Release(ctx, guest, wait)
	}
	return m.alone(ctx, guest, wait, m.rest)
}

// alone does something with a guest's lease, and locks it and its devices for that once nobody has them open. Who still
// has one is waited for, at most for the given time, until which do may wait, too.
func (m *Manager) alone(ctx context.Context, guest string, wait time.Duration,
	do func(context.Context, *Lease, time.Time) ([]Certificate, error)) ([]Certificate, error) {
	mine, err := m.Book.lockGuest(ctx, guest, m.handle.Timeout())
	if err != nil {
		return nil, err
	}
	defer mine.Close()
	l, err := m.known(guest)
	if err != nil {
		return nil, err
	}
	if m.host.Live() {
		// Beside the look at who has them.
		m.handle.Start()
	}

	devices := m.present(l)
	until := time.Now().Add(wait)
	if err := m.awaitGone(ctx, l, devices, wait); err != nil {
		return nil, err
	}
	if err := m.lock(ctx, m.touched(devices, true)); err != nil {
		return nil, err
	}
	return do(ctx, l, until)
}

// rest scrubs what a lease has, whose devices are locked, and leaves it to be made again.
func (m *Manager) rest(ctx context.Context, l *Lease, until time.Time) ([]Certificate, error) {
	certificates, unwritten, err := m.scrub(ctx, l, until)
	if !bind.IsStuck(err) {
		err = errors.Join(err, m.giveBackCompanions(ctx, m.present(l)))
	}
	if certificates == nil {
		return nil, err
	}
	l.rebooted()
	return certificates, errors.Join(err, unwritten, m.Book.put(l))
}

// end scrubs what a lease has, whose devices are locked, and ends it. Who still has a device is waited for until then.
func (m *Manager) end(ctx context.Context, l *Lease, until time.Time) ([]Certificate, error) {
	was := *l
	l.Unmade = l.Unmade || !l.Ready && !l.Ending && !l.Persist
	l.Ready, l.Ending, l.Maker = false, true, m.self()
	if err := m.Book.put(l); err != nil {
		return nil, err
	}
	certificates, unwritten, err := m.scrub(ctx, l, until)
	if certificates == nil && err != nil {
		// It was not proved that nobody has them, and they are as they were.
		if errors.Is(err, holder.ErrRefused) && !bind.IsStuck(err) {
			err = errors.Join(err, m.Book.put(&was))
		}
		return nil, err
	}
	if !bind.IsStuck(err) {
		err = errors.Join(err, m.giveBackCompanions(ctx, m.present(l)))
	}
	if unwritten != nil || ctx.Err() != nil && err != nil {
		// The lease stays, interrupted.
		return certificates, errors.Join(err, unwritten)
	}
	return certificates, errors.Join(err, m.Book.drop(l))
}

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

// known is a guest's lease, with the devices it has, or is going to have, in this boot.
func (m *Manager) known(guest string) (*Lease, error) {
	all, err := m.all()
	if err != nil {
		return nil, err
	}
	none := &NoLeaseError{Guest: guest}
	for _, l := range all {
		if l.Guest == guest {
			return l, nil
		}
		none.Have = append(none.Have, l.Guest)
	}
	return nil, none
}

// present are the devices of a lease that are there.
func (m *Manager) present(l *Lease) []*iommu.Device {
	var out []*iommu.Device
	for _, d := range l.Devices {
		if found, err := m.Topology.Find(d.Address); err == nil && found.ID == d.ID && !d.Nowhere {
			out = append(out, found)
		}
	}
	return out
}

// awaitGone waits until no process has the devices open. Without time to wait it refuses, naming who has.
func (m *Manager) awaitGone(ctx context.Context, l *Lease, devices []*iommu.Device, wait time.Duration) error {
	for end := time.Now().Add(wait); ; {
		holders, err := holder.Processes(m.host, devices)
		if err != nil && !errors.Is(err, holder.ErrTooMany) {
			return err
		}
		// Of those that could not be looked at, the kernel tells afterwards: see prove.
		if h := l.Runner; h != nil && h.Alive(m.host) &&
			!slices.ContainsFunc(holders, func(x holder.Holder) bool { return x.PID == h.PID }) {
			// It may open them yet.
			holders = append(holders,
				holder.Holder{Device: l.Guest, Kind: holder.Process, PID: h.PID, What: "is run by " + h.Name})
		}

		if len(holders) == 0 {
			return nil
		}
		left := time.Until(end)
		if left <= 0 || ctx.Err() != nil {
			cure := "end the guest first, or have it waited for with --wait 60s"
			if wait > 0 {
				cure = fmt.Sprintf("end the guest first; it was waited for, for %s", wait)
			}
			var reasons []string
			for _, h := range holders {
				reasons = append(reasons, h.String())
			}
			return &holder.RefusedError{What: "release " + l.Guest, Reasons: reasons, Cure: cure}
		}

		// A holder may also let go of a device and live on.
		awaitEnd(ctx, holders, min(left, time.Second))
	}
}

// awaitEnd waits until one of the processes has ended.
func awaitEnd(ctx context.Context, holders []holder.Holder, most time.Duration) {
	var fds []unix.PollFd
	for _, h := range holders {
		if fd, err := unix.PidfdOpen(h.PID, 0); err == nil {
			defer unix.Close(fd)
			fds = append(fds, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
		} else if errors.Is(err, unix.ESRCH) {
			return
		}
	}
	for end := time.Now().Add(most); ctx.Err() == nil && time.Now().Before(end); {
		n, err := unix.Poll(fds, int(min(time.Until(end), 100*time.Millisecond).Milliseconds())+1)
		if n > 0 || err != nil && !errors.Is(err, unix.EINTR) {
			return
		}
	}
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
func (m *Manager) scrubAll(ctx context.Context, l *Lease,
	held *hold) (out []Certificate, unwritten, failed error) {
	var all []*scrubbing
	done := resetting{}
	for i := range l.Devices {
		dev := &l.Devices[i]
		s := &scrubbing{dev: dev}
		s.c = Certificate{Guest: l.Guest, Address: dev.Address, ID: dev.ID, Time: time.Now(), Result: Clean}
		all = append(all, s)
		d, err := m.Topology.Find(dev.Address)
		if err != nil || d.ID != dev.ID || dev.Nowhere {
			s.c.Result, s.c.Why = Missing, "it is not there any more"
			continue
		}
		s.d, s.c.Place = d, place(m.host, d)
		if d.Class>>8 == nvmeClass {
			s.c.note("its data is not erased: viaduct erases no media")
		}
		if s.err = m.clear(ctx, l, s, done, held); s.err != nil && ctx.Err() != nil {
			return out, nil, s.err
		}
	}

	for _, s := range all {
		if s.d == nil || s.err != nil || s.d.PhysFn == nil {
			continue
		}
		if s.err = m.reconfigure(ctx, s.dev, s.d, l.Drawn, &s.c); s.err != nil && ctx.Err() != nil {
			return out, nil, s.err
		}
	}
	shareFate(all)
	if err := m.saveClean(l, all, done); err != nil {
		return out, err, nil
	}
	if err := held.Close(); err != nil {
		return out, nil, err
	}

	var errs, lost []error
	for _, s := range all {
		if s.d != nil && s.err == nil {
			s.err = m.putBack(ctx, s)
		}
		if s.err != nil && ctx.Err() != nil {
			return out, errors.Join(lost...), s.err
		}
		if s.err != nil {
			s.c.Result, s.c.Why = Fouled, strings.ReplaceAll(s.err.Error(), "\n", "; ")
			q := Quarantine{
				Address: s.d.Address, Place: s.c.Place, Guest: l.Guest, Since: s.c.Time, Why: s.c.Why, Device: *s.dev,
				Boot: bootID(m.host), NoReset: l.NoReset,
			}
			errs = append(errs, fmt.Errorf("%s could not be scrubbed, and is in quarantine: %w", s.d.Name, s.err))
			lost = append(lost, m.Book.State.Put(quarantineKey(s.c.Place), q))
		}
		if s.d != nil {
			errs = append(errs, m.Book.Run.Put(scrubbed+s.d.Name, s.c))
		}
		out = append(out, s.c)
	}
	return out, errors.Join(lost...), errors.Join(errs...)
}

// shareFate keeps the rest of an IOMMU group from going home when one of it cannot: it may be reset only with them.
func shareFate(all []*scrubbing) {
	for _, s := range all {
		if s.d == nil || s.err == nil {
			continue
		}
		for _, o := range all {
			if o != s && o.d != nil && o.err == nil && o.d.VFIO && o.d.Together(s.d) {
				o.err = fmt.Errorf("%s, which is in its IOMMU group, could not be scrubbed", s.d.Name)
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
	switch {
	case !changed:
		return nil
	case l.save != nil:
		return l.save()
	}
	return m.Book.put(l)
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
	foreign := l.Foreign && d.Driver == "pciback"
	if d.Blocks() && !dev.Home && !foreign {
		return fmt.Errorf(
			"it is on driver %s of the host: somebody took it from its guest (viaduct bind %s takes it back)",
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
		err = errors.New("it does not answer since its reset")
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

// reconfigure gives a VF what is declared of it now, and else what it had before, and compares all that the PF's driver
// tells. What it does not tell, or does not take back, is noted.
func (m *Manager) reconfigure(ctx context.Context, dev *Device, d *iommu.Device, drawn bool, c *Certificate) error {
	pf, err := m.Topology.Find(*d.PhysFn)
	if err != nil {
		return err
	}
	read := func() (sriov.Settings, error) {
		port, err := sriov.ReadPort(m.host, pf)
		if err != nil {
			return nil, err
		}
		now, _ := port.Of(d.VFIndex)
		return now.Settings, nil
	}

	if c.Found, err = read(); err != nil {
		return err
	}
	if dev.Before == nil && drawn && c.Found != nil {
		dev.Before = m.fresh(pf, d.VFIndex, c.Found)
	}
	if len(dev.Before) == 0 {
		// Nothing of it was changed.
		c.Settings, err = read()
		return err
	}
	want := maps.Clone(dev.Before)
	own, _ := m.declared.Settings(m.declaration, pf)
	maps.Copy(want, own[d.VFIndex])
	if want, err = m.giveSettings(ctx, d, want, c); err != nil {
		return err
	}
	if c.Settings, err = read(); err != nil {
		return err
	}

	var wrong []string
	for _, k := range sriov.Keys() {
		is, told := c.Settings[k]
		switch value, known := want[k]; {
		case !known:
		case !told:
			c.note("whether its %s is %s again is not known, as its driver does not tell", k, value)
		case is != value:
			wrong = append(wrong, fmt.Sprintf("%s is %s instead of %s", k, is, value))
		}
	}

	if len(wrong) > 0 {
		return errors.New("it does not have what it is to have: " + strings.Join(wrong, ", "))
	}
	return nil
}

// giveSettings gives a VF settings, and returns them as they are to be read back. Some drivers take no address away: a
// VF that had none keeps its guest's, then.
func (m *Manager) giveSettings(ctx context.Context, d *iommu.Device, want sriov.Settings,
	c *Certificate) (sriov.Settings, error) {
	give := func() (sriov.Settings, error) {
		plan, err := m.planSet(d, want)
		if err != nil {
			return nil, err
		}
		_, err = m.handle.Set(ctx, plan)
		return plan.Want, err
	}
	given, err := give()
	if err == nil || bind.IsStuck(err) || want[sriov.MAC] != noMAC {
		return given, err
	}
	delete(want, sriov.MAC)
	if given, again := give(); again == nil {
		c.note("it had no MAC address, and its driver does not take the guest's away: %s", err)
		return given, nil
	}
	return nil, err
}

// note adds to what a certificate tells beside its result.
func (c *Certificate) note(format string, a ...any) {
	if c.Note != "" {
		c.Note += "; "
	}
	c.Note += fmt.Sprintf(format, a...)
}

// fresh is what a VF is to have that libvirt configured before it was seen: what is declared of it, and else what VFs
// begin with. Its MAC address libvirt has put back itself.
func (m *Manager) fresh(pf *iommu.Device, index int, found sriov.Settings) sriov.Settings {
	own, _ := m.declared.Settings(m.declaration, pf)
	out := sriov.Settings{}
	for k, now := range found {
		usual, known := k.Default()
		switch value, declared := own[index][k]; {
		case k == sriov.MAC:
			out[k] = now
		case declared:
			out[k] = value
		case known:
			out[k] = usual
		}
	}
	return out
}

// Reclaim releases all leases that are dead, those of different PFs side by side: a reset takes the kernel a tenth of a
// second.
func (m *Manager) Reclaim(ctx context.Context) ([]Certificate, error) {
	looks, err := m.Look()
	if err != nil {
		return nil, err
	}
	var devices []*iommu.Device
	byPF := map[iommu.Address][]*Lease{}
	for _, look := range looks {
		if look.State != Dead {
			continue
		}
		mine := m.Book.tryGuest(look.Guest)
		if mine == nil {
			// Somebody is at work on it.
			continue
		}
		defer mine.Close()
		l, err := m.stillDead(look.Guest)
		if err != nil {
			return nil, err
		}

		if l == nil {
			continue
		}
		present := m.present(l)
		devices = append(devices, present...)
		var pf iommu.Address // that of all VFs of several PFs, and of what is none, is the same: none
		if of := m.pfs(present); len(of) == 1 {
			pf = of[0].Address
		}
		byPF[pf] = append(byPF[pf], l)
	}

	if len(devices) == 0 {
		return nil, nil
	}
	var errs []error
	if err := m.lock(ctx, m.touched(devices, true)); err != nil {
		// One that is stuck keeps no other.
		errs = append(errs, err)
		for pf, leases := range byPF {
			var some []*iommu.Device
			for _, l := range leases {
				some = append(some, m.present(l)...)
			}
			if err := m.lock(ctx, m.touched(some, true)); err != nil {
				errs = append(errs, err)
				delete(byPF, pf)
			}
		}
	}

	out, err := m.endAll(ctx, byPF)
	return out, errors.Join(append(errs, err)...)
}

// stillDead is a guest's lease, now that nobody else is at work on it, with a device of it there; nil if it is
// somebody's again.
func (m *Manager) stillDead(guest string) (*Lease, error) {
	l, err := m.Book.Get(guest)
	if l == nil || err != nil {
		return nil, err
	}
	present := m.present(l)
	holders, err := holder.Processes(m.host, present)
	if err != nil && !errors.Is(err, holder.ErrTooMany) {
		return nil, err
	}
	if state, _ := m.state(l, holders, l.age(m.host)); state != Dead || len(present) == 0 {
		return nil, nil
	}
	return l, nil
}

// endAll ends leases, those of different PFs side by side, and those that are not of one PF after them.
func (m *Manager) endAll(ctx context.Context, byPF map[iommu.Address][]*Lease) ([]Certificate, error) {
	var mu sync.Mutex
	var out []Certificate
	var errs []error
	var wg sync.WaitGroup
	work := func(leases []*Lease) {
		for _, l := range leases {
			some, err := m.end(ctx, l, time.Now())
			mu.Lock()
			out, errs = append(out, some...), append(errs, err)
			mu.Unlock()
		}
	}

	for pf, leases := range byPF {
		if pf != (iommu.Address{}) {
			wg.Go(func() { work(leases) })
		}
	}
	wg.Wait()
	work(byPF[iommu.Address{}])
	slices.SortFunc(out, func(a, b Certificate) int { return a.Address.Compare(b.Address) })
	return out, errors.Join(errs...)
}
