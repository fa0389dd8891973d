package lease

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"time"

	"viaduct/cmd/internal/hostfile"
	"viaduct/internal/filelock"
	"viaduct/internal/journal"
	"viaduct/internal/shell"
	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/holder"
)

// The states of a lease whose guest moves between hosts. None of them is dead: only the move ends it, or is ended
// (viaduct migrate).
const (
	Incoming State = "incoming" // its guest is to come from another host
	Leaving  State = "leaving"  // its guest is on its way to another host
)

// Recorded are all leases that are written down, also on a captured host, whose processes nobody can look at.
func (b *Book) Recorded() ([]*Lease, error) {
	var out []*Lease
	seen := map[string]bool{}
	for _, j := range []*journal.Journal{b.Run, b.State} {
		keys, err := j.Keys(holder.LeasePrefix)
		if err != nil {
			return nil, err
		}
		for _, k := range keys {
			l := &Lease{}
			known, err := j.Get(k, l)
			if err != nil {
				return nil, err
			}
			if known && !seen[k] {
				l.upgrade()
				seen[k] = true
				out = append(out, l)
			}
		}
	}
	return out, nil
}

// commands begins the keys of the records of the words that guests' VMMs were started with.
const commands = "command-"

func wordsKey(guest string) string { return commands + url.PathEscape(guest) }

// KeepWords writes down the words that a guest's VMM is started with, with {devices} where those of viaduct stand,
// until
// its lease ends. They may hold secrets, as its process shows them: no snapshot has them.
func (b *Book) KeepWords(guest string, words []string) error {
	return b.Run.Put(wordsKey(guest), words)
}

// Words are what KeepWords has written down; none of a guest that viaduct did not run.
func (b *Book) Words(guest string) ([]string, error) {
	var out []string
	_, err := b.Run.Get(wordsKey(guest), &out)
	return out, err
}

// LockMove keeps others from a guest's move, and from ending what it has here; the caller closes the file.
func (b *Book) LockMove(ctx context.Context, guest string, wait time.Duration) (*filelock.File, error) {
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	f, err := b.lock(ctx, byteOf("move of "+guest+"\x00"))
	if errors.Is(err, context.DeadlineExceeded) {
		return nil, fmt.Errorf("%s: another viaduct has been at work on its move for %s", guest, wait)
	}
	return f, err
}

// moves refuses what a guest's move forbids: to do something else with its lease.
func (l *Lease) moves(what string) error {
	if l.Moving == "" {
		return nil
	}
	text := "its guest is on its way to another host"
	if l.Moving == Incoming {
		text = "it is kept for a guest that is to come from another host"
	}
	guest := shell.Quote(l.Guest)
	return holder.Because(what+" "+l.Guest, holder.Reason{Kind: holder.Guest, Text: text},
		"viaduct migrate "+guest+" --cancel, or --resume")
}

// unlessMoving is what is done with a lease unless its guest moves.
func unlessMoving(what string, do ending) ending {
	return func(ctx context.Context, l *Lease, until time.Time) ([]Certificate, error) {
		if err := l.moves(what); err != nil {
			return nil, err
		}
		return do(ctx, l, until)
	}
}

// ending is what is done with a lease whose devices nobody has open any more.
type ending func(context.Context, *Lease, time.Time) ([]Certificate, error)

// change changes what is written down of a guest's lease.
func (m *Manager) change(ctx context.Context, guest string, do func(*Lease) error) error {
	mine, err := m.Book.lockGuest(ctx, guest, m.handle.Timeout())
	if err != nil {
		return err
	}
	defer mine.Close()
	l, err := m.known(guest)
	if err != nil {
		return err
	}
	if err := do(l); err != nil {
		return err
	}
	return m.Book.put(l)
}

// SetMoving notes that a guest's move has begun, or, with "", that it is over and the lease is as any other.
func (m *Manager) SetMoving(ctx context.Context, guest string, moving State) error {
	return m.change(ctx, guest, func(l *Lease) error {
		if l.Moving == Incoming && moving == "" && len(l.Sources) > 0 && len(l.Devices) > 0 {
			// As if it had been asked for here, with the address that it has by now.
			l.Sources[0].Settings = hostfile.Plain(l.Devices[0].Wanted)
		}
		l.Moving = moving
		return nil
	})
}

// Expect reserves devices for a guest that is to come from another host. What its VF has as a MAC address stays as it
// is until SetAddress: with the guest's it would draw frames before the guest is here. Asked again, it finishes what is
// there.
func (m *Manager) Expect(ctx context.Context, r *Request) (*Lease, []string, error) {
	l, err := m.Book.Get(r.Guest)
	if err != nil {
		return nil, nil, err
	}
	if l != nil && l.Moving != Incoming {
		return nil, nil, holder.Because("expect "+r.Guest,
			holder.Reason{Kind: holder.Guest, Text: "it has a lease here already"}, "viaduct leases")
	}
	r.moving = Incoming
	l, _, notes, err := m.Assign(ctx, r)
	return l, notes, err
}

// RunBy notes which process has a guest's devices, or is to have them, and keeps the lease.
func (m *Manager) RunBy(ctx context.Context, guest string, pid int, name string) error {
	return m.change(ctx, guest, func(l *Lease) error {
		l.Runner = &Holder{Proc: holder.NameProcess(m.host, pid), Name: fmt.Sprintf("process %d (%s)", pid, name)}
		return nil
	})
}

// first is the VF of a lease that carries its guest's address.
func (m *Manager) first(l *Lease) (*Device, *iommu.Device, error) {
	devices, err := m.devices(l)
	if err != nil {
		return nil, nil, err
	}
	if len(devices) == 0 || devices[0].PhysFn == nil {
		return nil, nil, fmt.Errorf("%s has no VF", l.Guest)
	}
	return &l.Devices[0], devices[0], nil
}

// Address is the MAC address that a guest's VF has, as its PF's driver tells; "" if it does not.
func (m *Manager) Address(guest string) (string, error) {
	l, err := m.known(guest)
	if err != nil {
		return "", err
	}
	dev, vf, err := m.first(l)
	if err != nil {
		return "", err
	}
	port, err := sriov.ReadPort(m.host, m.Topology.PFOf(vf))
	if err != nil {
		return "", err
	}
	now, told := port.Of(vf.VFIndex)
	if !told || now.Settings[sriov.MAC] == "" {
		// What it was given last.
		return dev.Wanted[sriov.MAC], nil
	}
	return now.Settings[sriov.MAC], nil
}

// parking are addresses that a VF may have while its guest is not on it, the best first: what it had before it was
// assigned, none, and one that nobody has.
func (d *Device) parking(guest string) []string {
	var out []string
	if was := d.Before[sriov.MAC]; was != "" && was != guest {
		out = append(out, was)
	}
	// Of the addresses that anybody may choose himself; by the VF's place, so that no two VFs of a host have the same.
	a := d.Address
	own := fmt.Sprintf("02:76:%02x:%02x:%02x:%02x", a.Domain&0xff, a.Bus, a.Device<<3|a.Function, d.Index&0xff)
	return append(out, noMAC, own)
}

// SetAddress gives a guest's VF its MAC address, or with "" one that is no guest's, so that the NIC's switch sends
// nothing of the guest's there. The lease says so first; what the VF has then is read back.
func (m *Manager) SetAddress(ctx context.Context, guest, mac string) error {
	return m.change(ctx, guest, func(l *Lease) error {
		dev, vf, err := m.first(l)
		if err != nil {
			return err
		}
		if m.host.Live() {
			m.handle.Start()
		}
		if err := m.lock(ctx, m.touched([]*iommu.Device{vf}, true)); err != nil {
			return err
		}
		try := []string{mac}
		if mac == "" {
			try = dev.parking(dev.Now[sriov.MAC])
		}
		var errs []error
		for _, a := range try {
			if err = m.giveAddress(ctx, l, dev, vf, a); err == nil {
				return nil
			}
			errs = append(errs, err)
		}
		return errors.Join(errs...)
	})
}

func (m *Manager) giveAddress(ctx context.Context, l *Lease, dev *Device, vf *iommu.Device, mac string) error {
	if dev.Wanted == nil {
		dev.Wanted = sriov.Settings{}
	}
	if dev.Now == nil {
		dev.Now = sriov.Settings{}
	}
	dev.Wanted[sriov.MAC] = mac
	if err := m.Book.put(l); err != nil {
		return err
	}
	if _, err := m.set(ctx, vf, sriov.Settings{sriov.MAC: mac}); err != nil {
		return err
	}
	dev.Now[sriov.MAC] = mac
	return nil
}

// EndMoved ends the lease of a guest that is on another host by now, or that never came: as Release, which a move
// forbids to everybody else.
func (m *Manager) EndMoved(ctx context.Context, guest string, wait time.Duration) ([]Certificate, error) {
	return m.alone(ctx, guest, wait, m.end)
}
