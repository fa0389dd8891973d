package lease

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"time"

	"viaduct/iommu"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// Quarantine is a device that nobody is given, as it could not be scrubbed.
type Quarantine struct {
	Address iommu.Address `json:"address"`
	Place   string        `json:"place"`
	Guest   string        `json:"guest"` // that had it last
	Since   time.Time     `json:"since"`
	Why     string        `json:"why"`
	Device  Device        `json:"device"`
	Boot    string        `json:"boot,omitempty"`     // the id of the boot that it was in
	NoReset bool          `json:"no_reset,omitempty"` // its lease allowed that nothing resets it
	Lost    bool          `json:"lost,omitempty"`     // it was not there when its lease ended
}

func quarantineKey(place string) string { return quarantined + url.PathEscape(place) }

// place names a device for the quarantine: by where it is, or by its address if that cannot be told.
func place(h *iommu.Host, d *iommu.Device) string {
	p, err := iommu.PathOf(h, d)
	if err != nil {
		return d.Name
	}
	return p
}

// Quarantined are devices in quarantine, by place.
type Quarantined map[string]Quarantine

// Why is why a device is in quarantine, or may be; "" if it is known not to be.
func (q Quarantined) Why(h *iommu.Host, d *iommu.Device) string {
	why, err := q.Of(h, d)
	if err != nil {
		return fmt.Sprintf("it may be, as viaduct cannot tell where it is: %v", err)
	}
	return why
}

// Of is why a device is in quarantine, "" if it is not, or an error where that cannot be told.
func (q Quarantined) Of(h *iommu.Host, d *iommu.Device) (string, error) {
	if len(q) == 0 {
		// Without asking where it is.
		return "", nil
	}
	where, err := iommu.PathOf(h, d)
	if err != nil {
		where = d.Name
	}
	in, is := q[where]
	if err != nil && !is && d.PCI {
		return "", err
	}
	if in.Lost && in.Device.ID != d.ID {
		// Another one was put where it had been.
		return "", nil
	}
	return in.Why, nil
}

// Quarantined are all devices that are in quarantine. One that was in it before the machine was started again is not
// any more, as its slot was reset.
func (b *Book) Quarantined() (Quarantined, error) {
	out := Quarantined{}
	err := b.eachQuarantine(func(_ string, q *Quarantine, over bool) error {
		if !over {
			out[q.Place] = *q
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// forgetReset forgets the quarantines that a boot has ended: a later one by kexec, which resets no slot, would bring
// them back.
func (b *Book) forgetReset() error {
	return b.eachQuarantine(func(key string, _ *Quarantine, over bool) error {
		if !over {
			return nil
		}
		return b.State.Delete(key)
	})
}

// eachQuarantine does something with each record of a quarantine; over says that its slot was reset since.
func (b *Book) eachQuarantine(do func(key string, q *Quarantine, over bool) error) error {
	keys, err := b.State.Keys(quarantined)
	if err != nil {
		return err
	}
	boot, _, err := b.host.Boot()
	if err != nil {
		return err
	}
	for _, k := range keys {
		var q Quarantine
		known, err := b.State.Get(k, &q)
		if err != nil {
			return err
		}
		if !known {
			// It has just ended.
			continue
		}
		if err := do(k, &q, q.Boot != "" && q.Boot != boot && startedByFirmware(b.host)); err != nil {
			return err
		}
	}
	return nil
}

// bootID is the kernel's name of this boot; "" if it tells none, and a quarantine outlives the boot.
func bootID(h *iommu.Host) string {
	id, _, _ := h.Boot()
	return id
}

// startedByFirmware reports whether it is known that this boot was no kexec. x86 tells what has loaded the kernel: 13
// is kexec, by either of its system calls (Documentation/arch/x86/boot.rst, arch/x86/kernel/kexec-bzimage64.c).
func startedByFirmware(h *iommu.Host) bool {
	const kexec = 13
	loader, err := h.Int("proc/sys/kernel/bootloader_type")
	return err == nil && loader>>4 != kexec
}

// InQuarantine finds what is in quarantine, also by the address of a device that is gone.
func (m *Manager) InQuarantine(sel iommu.Selector) (Quarantine, error) {
	all, err := m.Book.Quarantined()
	if err != nil {
		return Quarantine{}, err
	}
	d, err := sel.One(m.host, m.Topology)
	if err == nil {
		if q, in := all[place(m.host, d)]; in {
			return q, nil
		}
		err = fmt.Errorf("%s is not in quarantine (viaduct leases lists what is)", d.Name)
	}
	for _, q := range all {
		if a, bad := iommu.ParseAddress(sel.String()); bad == nil && a == q.Address && m.at(q.Place) == nil {
			return q, nil
		}
	}
	return Quarantine{}, err
}

// at is the device at a place; nil if none is there.
func (m *Manager) at(where string) (found *iommu.Device) {
	m.Topology.All(func(d *iommu.Device) bool {
		if d.PCI && place(m.host, d) == where {
			found = d
		}
		return found == nil
	})
	return found
}

// Lift scrubs devices in quarantine again, and frees those that are clean then, with the rest of their IOMMU groups, as
// some are reset only together. Forced are those that still cannot be reset, and those that are gone; who has one open
// is refused all the same.
func (m *Manager) Lift(ctx context.Context, asked []Quarantine, force bool) ([]Certificate, error) {
	all, err := m.Book.Quarantined()
	if err != nil {
		return nil, err
	}
	var out []Certificate
	var errs []error
	for _, q := range asked {
		d := m.at(q.Place)
		switch _, still := all[q.Place]; {
		case !still:
			// It was of the group of one before it.
		case d == nil && !force:
			errs = append(errs, fmt.Errorf("%s is gone, and stays in quarantine in case it comes back "+
				"(--force=quarantine forgets it)", q.Address))
		case d == nil:
			c := Certificate{Guest: q.Guest, Address: q.Address, ID: q.Device.ID, Place: q.Place, Time: time.Now(),
				Result: Missing, Why: "it was in quarantine: " + q.Why}
			out, errs = append(out, c), append(errs, m.Book.State.Delete(quarantineKey(q.Place)))
		default:
			some, err := m.lift(ctx, m.unitOf(q, d, all), force)
			if out, errs = append(out, some...), append(errs, err); some == nil && err != nil {
				return out, errors.Join(errs...)
			}
		}
	}
	return out, errors.Join(errs...)
}

// LiftReturned scrubs the devices that were not there when their leases ended, and are again.
func (m *Manager) LiftReturned(ctx context.Context) ([]Certificate, error) {
	if err := m.Book.forgetReset(); err != nil {
		return nil, err
	}
	all, err := m.Book.Quarantined()
	if err != nil {
		return nil, err
	}
	var back []Quarantine
	for _, q := range all {
		if d := m.at(q.Place); q.Lost && d != nil && d.ID == q.Device.ID {
			back = append(back, q)
		}
	}
	if len(back) == 0 {
		return nil, nil
	}
	return m.Lift(ctx, back, false)
}

// inUnit is a device in quarantine that is there.
type inUnit struct {
	Quarantine
	d *iommu.Device
}

// unitOf takes a device in quarantine, and those of its IOMMU group, out of those that are still to be lifted.
func (m *Manager) unitOf(q Quarantine, d *iommu.Device, all Quarantined) []inUnit {
	out := []inUnit{{q, d}}
	delete(all, q.Place)
	for where, o := range all {
		if other := m.at(where); other != nil && other.Together(d) {
			out = append(out, inUnit{o, other})
			delete(all, where)
		}
	}
	return out
}

func (m *Manager) lift(ctx context.Context, unit []inUnit, force bool) ([]Certificate, error) {
	l := &Lease{LeaseHead: holder.LeaseHead{Guest: unit[0].Guest}, force: force}
	var devices []*iommu.Device
	for _, q := range unit {
		q.Device.Address, q.Device.ID = q.d.Address, q.d.ID
		l.Devices, devices = append(l.Devices, q.Device), append(devices, q.d)
		l.NoReset = l.NoReset || q.NoReset
	}
	l.save = func() error {
		var errs []error
		for i, q := range unit {
			q.Device = l.Devices[i]
			errs = append(errs, m.Book.State.Put(quarantineKey(q.Place), q.Quarantine))
		}
		return errors.Join(errs...)
	}
	if err := m.awaitGone(ctx, l, devices, 0); err != nil {
		return nil, err
	}
	if err := m.lock(ctx, m.touched(devices, true)); err != nil {
		return nil, err
	}

	out, unwritten, err := m.scrub(ctx, l, time.Now())
	if !bind.IsStuck(err) {
		err = errors.Join(err, m.giveBackCompanions(ctx, devices))
	}
	errs := []error{err, unwritten}
	for i, c := range out {
		q := unit[slices.IndexFunc(unit, func(q inUnit) bool { return q.d.Address == c.Address })]
		switch c.Result {
		case Unreset:
			out[i].Why = fmt.Sprintf("it was in quarantine: %s; now: %s", q.Why, c.Why)
			errs = append(errs, m.Book.Run.Put(scrubbed+q.d.Name, out[i]), m.Book.State.Delete(quarantineKey(q.Place)))
		case Clean:
			errs = append(errs, m.Book.State.Delete(quarantineKey(q.Place)))
		}
	}
	return out, errors.Join(errs...)
}
