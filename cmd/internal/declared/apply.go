package declared

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"viaduct/cmd/internal/hostfile"
	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/bind"
)

// before is what it takes to bring one item back: a PF's declaration of itself, or the devices that are to be given
// back. It is written down before the item's first write, and dropped after its last.
type before struct {
	Device  iommu.Address   `json:"device"`
	Before  *hostfile.PF    `json:"before,omitempty"`
	PF      string          `json:"pf,omitempty"` // the same as YAML, of viaduct before the first that had it as JSON
	Release []iommu.Address `json:"release,omitempty"`
}

const (
	applying = "apply-" // and the device's address: what is being done to it
	lastDone = "undo"   // what the last apply did, for undo
)

// Apply does what items take, and tells each. PFs are worked on side by side, up to what the kernel does one after the
// other, then devices. One that fails is put back as it was, and the others go on. The caller has locked all their
// devices, and Check let them pass.
func (m *Manager) Apply(ctx context.Context, items []*Item, tell func(*Item, error)) error {
	var todo []*Item
	var all []before
	var failed []error
	for _, i := range items {
		if i.State == Differs && i.with == nil {
			was, err := m.before(i)
			if err != nil {
				failed = append(failed, fmt.Errorf("%s: %w", i.Name, err))
				tell(i, failed[len(failed)-1])
				continue
			}
			todo, all = append(todo, i), append(all, was)
		}
	}

	// Those that go with others are as these are in the end.
	defer follow(items)
	if len(todo) == 0 && len(failed) == 0 {
		return m.Clean()
	}
	if len(todo) == 0 {
		return errors.Join(failed...)
	}
	if err := m.record(all); err != nil {
		// Before they are touched: undo may find some as they are.
		return err
	}
	errs := make([]error, len(todo))
	var mu sync.Mutex
	one := func(n int) {
		err := m.applyOne(ctx, todo[n], all[n])
		if err != nil {
			err = fmt.Errorf("%s: %w", todo[n].Name, err)
		} else {
			todo[n].State = OK
		}
		mu.Lock()
		defer mu.Unlock()
		errs[n] = err
		tell(todo[n], err)
	}

	var wg sync.WaitGroup
	for n, i := range todo {
		if i.unit == nil {
			wg.Go(func() { one(n) })
		}
	}
	wg.Wait()
	for n, i := range todo {
		if i.unit != nil {
			one(n)
		}
	}
	return errors.Join(append(failed, errs...)...)
}

// record writes down what is about to be changed, for undo. What a boot or the watch service repairs is no apply of the
// user's, and while one waits to be confirmed, the first state of each device is what all goes back to.
func (m *Manager) record(all []before) error {
	if m.options.Boot {
		return nil
	}
	waits, err := m.waits()
	if err != nil {
		return err
	}
	if waits {
		var old []before
		if _, err := m.run.Get(lastDone, &old); err != nil {
			return err
		}
		all = slices.DeleteFunc(all, func(b before) bool {
			return slices.ContainsFunc(old, func(o before) bool { return o.Device == b.Device })
		})
		all = append(old, all...)
	}
	return m.run.Put(lastDone, all)
}

// Clean forgets what there was to undo, unless it waits to be confirmed. A boot, or the watch service, forgets nothing
// of it.
func (m *Manager) Clean() error {
	if m.options.Boot {
		return nil
	}
	if waits, err := m.waits(); err != nil || waits {
		return err
	}
	return m.run.Delete(lastDone)
}

// before declares an item's device as it is.
func (m *Manager) before(i *Item) (before, error) {
	b := before{Device: i.Device.Address}
	if i.unit != nil {
		for _, d := range i.unit {
			if !d.VFIO {
				b.Release = append(b.Release, d.Address)
			}
		}
		return b, nil
	}

	pf, err := m.describe(i.Device, true)
	if err != nil {
		return b, err
	}
	leased, err := m.Guests()
	if err != nil {
		return b, err
	}
	places, err := iommu.VFAddresses(m.host, i.Device.Address)
	if err != nil {
		return b, err
	}
	for n, place := range places {
		if _, ours := leased[place]; ours && n < len(pf.VFs) {
			// They are the guest's, and not the next one's.
			pf.VFs[n].Settings = nil
		}
	}

	b.Before = &pf
	return b, nil
}

// host declares a PF as it was.
func (b *before) host() (*hostfile.Host, error) {
	if b.Before != nil {
		return &hostfile.Host{PFs: []hostfile.PF{*b.Before}}, nil
	}
	return hostfile.Parse("record", []byte(b.PF))
}

func (m *Manager) applyOne(ctx context.Context, i *Item, was before) error {
	if ctx.Err() != nil {
		return errors.New("interrupted before it was touched")
	}
	key := applying + i.Device.Name
	if err := m.run.Put(key, was); err != nil {
		return err
	}
	err := m.do(ctx, i)
	if bind.IsStuck(err) {
		// What is left of it is the engines'.
		return errors.Join(err, m.run.Delete(key))
	}
	if none, _ := errors.AsType[*NoDriverError](err); none != nil {
		return errors.Join(err, m.run.Delete(key))
	}
	if err != nil {
		if undone := m.back(was); undone != nil {
			err = errors.Join(err, fmt.Errorf("and it could not be put back as it was: %w", undone))
		}
	}
	return errors.Join(err, m.run.Delete(key))
}

// do does what an item takes.
func (m *Manager) do(ctx context.Context, i *Item) error {
	if err := m.setMarks(i); err != nil {
		return err
	}
	if i.count != nil {
		notes, err := m.handle.Apply(ctx, i.count)
		i.Notes = append(i.Notes, notes...)
		if err != nil {
			return err
		}
	}

	var errs []error
	for _, s := range i.sets {
		unverified, err := m.handle.Set(ctx, s)
		if err != nil {
			return err
		}
		i.Notes = append(i.Notes, sriov.Unverified(s.VF, unverified)...)
	}

	var all []bind.Result
	for driver, vfs := range i.take {
		all = append(all, m.handle.Do(ctx, bind.Singly(vfs), bind.Take(driver))...)
	}
	for _, s := range []struct {
		units [][]*iommu.Device
		goal  bind.Goal
	}{
		{bind.Singly(i.none), bind.Take(bind.None)},
		{i.units(), bind.Take(i.driver).OwnedBy(i.owner)},
		{bind.Singly(i.home), bind.Home()},
	} {
		if len(s.units) > 0 {
			all = append(all, m.handle.Do(ctx, s.units, s.goal)...)
		}
	}

	for _, r := range all {
		errs = append(errs, r.Err)
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return m.bringHome(ctx, i)
}

// units are the group of a device; none of a PF.
func (i *Item) units() [][]*iommu.Device {
	if i.unit == nil {
		return nil
	}
	return [][]*iommu.Device{i.unit}
}

// back brings one item back to what it was. It has no context: that of the command may be over.
func (m *Manager) back(was before) error {
	ctx := context.Background()
	t, err := m.handle.Scan()
	if err != nil {
		return err
	}
	if was.Before == nil && was.PF == "" {
		var units [][]*iommu.Device
		for _, a := range was.Release {
			if d, err := t.Find(a); err == nil && (d.VFIO || d.Driver == "" && d.DriverOverride == bind.None) {
				// Else it is gone, or home already.
				units = append(units, []*iommu.Device{d})
			}
		}
		verdicts, err := m.handle.Check(units, slices.Concat(units...), bind.GiveBack(), m.options.Force)
		if err = errors.Join(err, bind.Refusals(verdicts)); err != nil {
			return err
		}
		var errs []error
		for _, r := range m.handle.Do(ctx, units, bind.GiveBack()) {
			errs = append(errs, r.Err)
		}
		return errors.Join(errs...)
	}

	s, err := was.host()
	if err != nil {
		return err
	}
	// What was written down of a boot before does not matter here, nor whether it is one.
	plain, err := New(m.handle, Options{Force: m.options.Force, Leased: m.options.Leased, Late: true})
	if err != nil {
		return err
	}
	plain.exact = true
	items, err := plain.Plan(s)
	if err != nil {
		return err
	}

	for _, i := range items {
		if i.Err != nil {
			return i.Err
		}
		if err := m.handle.Lock(ctx, i.Devices()); err != nil {
			return err
		}
	}

	plain.Check(items)
	for _, i := range items {
		if i.State == Refused {
			return i.Err
		}
		if i.State == Differs {
			if err := plain.do(ctx, i); err != nil {
				return err
			}
		}
	}
	return nil
}

// Recover puts back what an apply left that was killed in the middle, and says of what. What another viaduct is at work
// on is left alone.
func (m *Manager) Recover() ([]bind.Recovered, error) {
	keys, err := m.run.Keys(applying)
	if err != nil {
		return nil, err
	}
	var out []bind.Recovered
	for _, key := range keys {
		var was before
		unreadable := func(err error) {
			out = append(out, bind.Recovered{Device: was.Device, What: "has a record that cannot be read", Err: err})
		}
		if known, err := m.run.Get(key, &was); !known {
			if err != nil {
				unreadable(err)
			}
			continue
		}

		ours, err := m.tryLock(&was)
		if err != nil {
			return out, err
		}
		if !ours {
			continue
		}
		if known, err := m.run.Get(key, &was); !known {
			// It has ended meanwhile.
			if err != nil {
				unreadable(err)
			}
			continue
		}

		r := bind.Recovered{Device: was.Device, What: "is as it was: viaduct apply was interrupted"}
		r.Err = errors.Join(m.back(was),
			// Told once: a record that stays would be in the way for good.
			m.run.Delete(key))
		out = append(out, r)
	}
	return out, nil
}

// tryLock locks all devices of a record, and reports whether no other viaduct is at work on one of them.
func (m *Manager) tryLock(was *before) (bool, error) {
	for _, a := range append([]iommu.Address{was.Device}, was.Release...) {
		if ours, err := m.handle.TryLock(a); !ours || err != nil {
			return false, err
		}
	}
	return true, nil
}

// Interrupted reports whether an apply may have been killed in the middle.
func (m *Manager) Interrupted() (bool, error) {
	keys, err := m.run.Keys(applying)
	return len(keys) > 0, err
}

// Last is what the last apply touched, for Undo; false if nothing is known of one since the boot.
func (m *Manager) Last() ([]iommu.Address, bool, error) {
	var done []before
	known, err := m.run.Get(lastDone, &done)
	var out []iommu.Address
	for _, was := range done {
		out = append(append(out, was.Device), was.Release...)
	}
	return out, known, err
}

// Undo brings back all that the last apply touched, the last first. The caller has locked its devices.
func (m *Manager) Undo(tell func(iommu.Address, error)) error {
	var done []before
	if _, err := m.run.Get(lastDone, &done); err != nil {
		return err
	}
	var errs []error
	for _, was := range slices.Backward(done) {
		err := m.back(was)
		tell(was.Device, err)
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return m.run.Delete(lastDone)
}
