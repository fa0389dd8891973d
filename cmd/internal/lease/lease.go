// Package lease assigns devices to guests and gets them back clean: it draws VFs from pools, configures and takes them,
// keeps the books, and scrubs what a guest leaves before anybody else gets it.
package lease

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"viaduct/cmd/internal/declared"
	"viaduct/cmd/internal/hostfile"
	"viaduct/cmd/internal/vmm"
	"viaduct/internal/journal"
	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// Lease is devices that are assigned to a guest. It is written down before the first of them is touched, and is there
// until the last is scrubbed.
type Lease struct {
	holder.LeaseHead
	Sources []Source      `json:"sources"`
	Devices []Device      `json:"devices"`
	Made    time.Time     `json:"made"`
	From    string        `json:"from,omitempty"`  // in records of before there were several: the one source
	Count   int           `json:"count,omitempty"` // and how many of it
	Boot    string        `json:"boot,omitempty"`  // the boot that it was made in
	Since   time.Duration `json:"since,omitempty"` // and when, by the boot's own clock
	TTL     time.Duration `json:"ttl"`             // how long it waits for a holder; 0: for good

	// What keeps it alive, whoever is seen having its devices open: it ends when all of these have ended that it has.
	Runner  *Holder      `json:"runner,omitempty"` // the command that viaduct run has started
	Owner   *holder.Proc `json:"owner,omitempty"`  // a process
	Unit    string       `json:"unit,omitempty"`   // a systemd unit
	Persist bool         `json:"persist"`          // it outlives all that, and the boot

	Moving    State        `json:"moving,omitempty"` // incoming or leaving: what its guest does; "" if it stays
	VM        *vmm.Machine `json:"vm,omitempty"`     // what is known of it; nil of leases made before it was kept
	NodeOwner string       `json:"node_owner,omitempty"`
	Drawn     bool         `json:"drawn,omitempty"` // by libvirt, from a network: it ends with the domain

	NoReset   bool `json:"no_reset,omitempty"` // what nothing can reset goes to the next as it is
	OwnDriver bool `json:"foreign,omitempty"`  // its VMM takes it to a driver of its own, as Xen's

	force bool         // a reset that fails is no reason to keep it
	save  func() error // writes it down, as it is part of something else; nil: the books do

	Ready   bool        `json:"ready"`            // its devices are configured and taken
	Ending  bool        `json:"ending,omitempty"` // its release has begun
	Unmade  bool        `json:"unmade,omitempty"` // and it had not been ready: no guest was told of its devices
	Maker   holder.Proc `json:"maker"`            // who last was at work on it
	Holders []Holder    `json:"holders"`          // who was seen last having its devices open
}

// Source is what some of a lease's devices were drawn from.
type Source struct {
	From     string          `json:"from"`  // a pool, or a selector
	Count    int             `json:"count"` // of what is drawn: VFs, or groups of devices
	Settings hostfile.Values `json:"settings,omitempty"`

	exactly []iommu.Address // these, whoever drew them
}

// DrawnFrom names what a lease's devices were drawn from.
func (l *Lease) DrawnFrom() string {
	var out []string
	for _, s := range l.Sources {
		out = append(out, s.From)
	}
	return strings.Join(out, ", ")
}

// Device is one device of a lease.
type Device struct {
	holder.LeaseDevice
	Nowhere  bool            `json:"nowhere,omitempty"` // after a boot: it was not found again so far
	ID       iommu.ID        `json:"id"`
	PF       *iommu.Identity `json:"pf,omitempty"` // of a VF, whose address is its PF's and its index's
	Index    int             `json:"vf_index"`
	Identity *iommu.Identity `json:"identity,omitempty"` // of a device that is not a VF
	Home     bool            `json:"home"`               // it goes back to what it had: it was not on a vfio driver
	Wanted   sriov.Settings  `json:"wanted,omitempty"`   // what the guest is to have
	Before   sriov.Settings  `json:"before,omitempty"`   // what it had, and gets back; known before the first change
	Now      sriov.Settings  `json:"now,omitempty"`      // what it has had since it was ready
	Clean    bool            `json:"clean,omitempty"`    // its release came as far as to reset it, together with others
}

// Holder is a process that has a lease's device open.
type Holder struct {
	holder.Proc
	Name string `json:"name"`           // as in "process 12 (qemu-system-x86), guest \"web\""
	Runs bool   `json:"runs,omitempty"` // it is the runner, in records of before there was one
}

// upgrade makes a lease of viaduct before this one of today: who ran it stood among those who were seen, and it had one
// source.
func (l *Lease) upgrade() {
	if l.Sources == nil {
		s := Source{From: l.From, Count: l.Count}
		if i := slices.IndexFunc(l.Devices, func(d Device) bool { return d.PF != nil }); i >= 0 {
			s.Settings = hostfile.Plain(l.Devices[i].Wanted)
		}
		l.Sources, l.From, l.Count = []Source{s}, "", 0
	}
	if i := slices.IndexFunc(l.Holders, func(h Holder) bool { return h.Runs }); i >= 0 && l.Runner == nil {
		l.Runner = &Holder{Proc: l.Holders[i].Proc, Name: l.Holders[i].Name}
	}
	for i := range l.Holders {
		l.Holders[i].Runs = false
	}
}

// began notes that it is made now.
func (l *Lease) began(h *iommu.Host) {
	l.Made = time.Now()
	// What does not know its boot goes by the clock of the day, too.
	l.Boot, l.Since, _ = h.Boot()
}

// Age is how long ago it was made; of a captured host, when it was captured. What is of another boot, or of a viaduct
// that kept no such time, has the clock of the day.
func (l *Lease) Age(h *iommu.Host) time.Duration {
	if boot, now, err := h.Boot(); err == nil && l.Since != 0 && l.Boot == boot {
		return now - l.Since
	}
	now, _ := h.Now()
	return now.Time.Sub(l.Made)
}

// Book is where leases are written down. Those that outlive a boot are in State too, and so is what is quarantined.
type Book struct {
	Run   *journal.Journal
	State *journal.Journal

	host *iommu.Host
}

// BookOf is where a host's leases are written down. Those of a captured host can be read alone: see [Book.Known].
func BookOf(h *iommu.Host) *Book {
	return &Book{Run: journal.In(h.Host, journal.Dir), State: journal.In(h.Host, declared.StateDir), host: h}
}

const (
	quarantined = "quarantine-" // and the device's place
	scrubbed    = "scrubbed-"   // and its address: the certificate of its last scrub
)

// CheckGuest refuses what is no name of a guest: it stands in command lines, file names and tables. What libvirt takes
// for a domain is one, blanks and letters of all scripts included.
func CheckGuest(name string) error {
	bad := func(r rune) bool {
		return r == '/' || r != ' ' && unicode.IsSpace(r) || unicode.IsControl(r) ||
			unicode.In(r, unicode.Cf, unicode.Zl, unicode.Zp, unicode.Co)
	}
	if name == "" || len(name) > 120 || !utf8.ValidString(name) || name[0] == '-' || strings.TrimSpace(name) != name ||
		strings.ContainsFunc(name, bad) {
		return fmt.Errorf("invalid guest name %q: want up to 120 bytes of letters, digits, signs and blanks "+
			"between them, no slash, and no dash at the beginning", name)
	}
	return nil
}

func key(guest string) string { return holder.LeasePrefix + url.PathEscape(guest) }

// Get is a guest's lease; nil if it has none.
func (b *Book) Get(guest string) (*Lease, error) {
	var l Lease
	known, err := b.Run.Get(key(guest), &l)
	if err != nil || known {
		l.upgrade()
		return &l, err
	}
	if known, err = b.State.Get(key(guest), &l); err != nil || !known {
		return nil, err
	}
	l.rebooted()
	return &l, nil
}

// rebooted is for a lease of an earlier boot: what it has is still to be made.
func (l *Lease) rebooted() {
	l.Ready, l.Ending, l.Maker, l.Runner, l.Holders = false, false, holder.Proc{}, nil, nil
	l.used()
}

// used is for a lease whose devices somebody has had since they were reset.
func (l *Lease) used() {
	for i := range l.Devices {
		l.Devices[i].Clean = false
	}
}

// All are all leases, by guest, those of earlier boots that are still to be made included.
func (b *Book) All() ([]*Lease, error) {
	var out []*Lease
	seen := map[string]bool{}
	for _, j := range []*journal.Journal{b.Run, b.State} {
		keys, err := j.Keys(holder.LeasePrefix)
		if err != nil {
			return nil, err
		}
		for _, k := range keys {
			if seen[k] {
				continue
			}
			l := &Lease{}
			if known, err := j.Get(k, l); err != nil {
				return nil, err
			} else if !known {
				// It has just ended.
				continue
			}
			l.upgrade()
			if j == b.State {
				l.rebooted()
			}
			seen[k] = true
			out = append(out, l)
		}
	}
	return out, nil
}

// Guests are what the devices of leases are to have, by address. Where a lease cannot be read, none is known: it may be
// any device's.
func (b *Book) Guests() (map[iommu.Address]declared.Guest, error) {
	all, err := b.All()
	if err != nil {
		return nil, err
	}
	out := map[iommu.Address]declared.Guest{}
	for _, l := range all {
		for _, d := range l.Devices {
			if l.Ready && (d.PF != nil || l.OwnDriver) {
				out[d.Address] = declared.Guest{Settings: d.Wanted, OwnDriver: l.OwnDriver}
			}
		}
	}
	return out, nil
}

// put writes a lease down, when nobody looks at all of them to choose a device.
func (b *Book) put(l *Lease) error {
	return b.alone(func() error { return b.putLocked(l) })
}

// alone does something with the books locked.
func (b *Book) alone(do func() error) error {
	// What is written down then has happened already, and must not be lost for many who look.
	held, err := b.lockAll(context.Background(), 10*bind.DefaultTimeout)
	if err != nil {
		return err
	}
	defer held.Close()
	return do()
}

func (b *Book) putLocked(l *Lease) error {
	if l.Persist {
		if err := b.State.Put(key(l.Guest), l); err != nil {
			return err
		}
	}
	return b.Run.Put(key(l.Guest), l)
}

// drop ends a lease. What outlives a boot goes first: power may be cut in between.
func (b *Book) drop(l *Lease) error {
	return b.alone(func() error {
		if err := errors.Join(b.State.Delete(key(l.Guest)), b.Run.Delete(wordsKey(l.Guest))); err != nil {
			return err
		}
		return b.Run.Delete(key(l.Guest))
	})
}

// Has reports whether a lease has the device at an address.
func (l *Lease) Has(a iommu.Address) bool {
	return slices.ContainsFunc(l.Devices, func(d Device) bool { return !d.Nowhere && d.Address == a })
}
