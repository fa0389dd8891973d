package bind

import (
	"errors"
	"fmt"
	"maps"
	"sync"
	"time"

	"viaduct/internal/host"
	"viaduct/internal/journal"
	"viaduct/iommu"
)

// DefaultTimeout is how long one write may take where nobody says anything else.
const DefaultTimeout = 30 * time.Second

// Options are what a Handle is opened with. The zero value is for most.
type Options struct {
	// Timeout is how long one write may take, and how long another process that changes the same device is waited for.
	// 0 is DefaultTimeout, and more for a write that takes longer the more it makes.
	Timeout time.Duration
	// DryRun plans and checks, and changes nothing: every call that would is an error. Who cannot see all who use a
	// device may still ask.
	DryRun bool
	// Roles gives devices of a look at the host other roles than their class says ([iommu.Device.As]); nil leaves them.
	Roles func(*iommu.Topology) error
	// Recoverers finish or undo the changes that other packages began with [Handle.Begin], by their names.
	Recoverers map[string]Recoverer
	// Tell is called with each change that is begun or over, side by side: it returns at once. nil: nobody is told.
	Tell func(Event)
}

// ErrDryRun is matched by errors of calls that would change the host, on a Handle that was opened for a dry run.
const ErrDryRun = host.Error("this is a dry run: nothing is changed")

// Handle takes devices of one host and gives them back. One Handle serves one command: it is closed when that is over.
// Do and Write, and Apply and Set of package sriov's Handle, may be called side by side for different devices; all
// other calls that change something are made one after the other.
type Handle struct {
	host    *iommu.Host
	options Options
	journal *journal.Journal
	locks   locks
	child   child
	modules modules
	scan    scan

	mu        sync.Mutex
	recovered []Recovered            // by the last Recover
	begun     map[iommu.Address]bool // changes that Begin has written down and End not ended
	may       map[iommu.Address]Goal // what Check let pass, and Do has not used
}

// Open opens a host for changes. The caller closes the Handle, and the host after it. On a running host the program
// must have called [ServeWrites] first in its main, or Open fails. On a captured host all plans can be made, and
// changes are [iommu.ErrReadOnly].
func Open(h *iommu.Host, o Options) (*Handle, error) {
	if h == nil || h.Host == nil {
		return nil, errors.New("bind: no host given (iommu.Open returns one)")
	}
	if h.Real() && !served.Load() {
		return nil, errors.New("bind: the program must call bind.ServeWrites first in its main")
	}
	for _, name := range []string{opTake, opGive} {
		if _, own := o.Recoverers[name]; own {
			return nil, fmt.Errorf("bind: the name %q belongs to its own Recoverer", name)
		}
	}
	o.Recoverers = maps.Clone(o.Recoverers)
	b := &Handle{host: h, options: o, journal: journal.In(h.Host, journal.Dir)}
	b.locks.name = h.Path(journal.Dir + "/lock")
	b.child.host, b.child.locks = h, &b.locks
	b.modules.host = h
	b.scan.host, b.scan.journal, b.scan.roles = h, b.journal, o.Roles
	return b, nil
}

// Close frees the locks and lets the child that writes end; one that is stuck goes on by itself. Further calls do
// nothing.
func (b *Handle) Close() error {
	b.child.close()
	return b.locks.close()
}

// Host is the host that the Handle changes.
func (b *Handle) Host() *iommu.Host { return b.host }

// DryRun reports whether the Handle was opened for a dry run.
func (b *Handle) DryRun() bool { return b.options.DryRun }

// Changes reports whether the Handle can change its host: it is a running one, and this is no dry run.
func (b *Handle) Changes() bool { return b.host.Live() && !b.options.DryRun }

// MayChange is why the Handle can change nothing: [iommu.ErrReadOnly] or [ErrDryRun]; nil if it can.
func (b *Handle) MayChange() error {
	switch {
	case !b.host.Live():
		return fmt.Errorf("%s is a captured host: %w", b.host.Path(""), iommu.ErrReadOnly)
	case b.options.DryRun:
		return ErrDryRun
	}
	return nil
}

// Timeout is how long one write may take, and another process is waited for.
func (b *Handle) Timeout() time.Duration {
	if b.options.Timeout > 0 {
		return b.options.Timeout
	}
	return DefaultTimeout
}

// timeoutOf is how long a write may take.
func (b *Handle) timeoutOf(s Step) time.Duration {
	if b.options.Timeout > 0 {
		return b.options.Timeout
	}
	return DefaultTimeout + s.Extra
}

// scan is the last look at the host.
type scan struct {
	host    *iommu.Host
	journal *journal.Journal
	roles   func(*iommu.Topology) error

	mu       sync.Mutex
	topology *iommu.Topology
	began    time.Time
	changed  time.Time // when something of viaduct's had last changed anything, then
}

// Topology is the host as it was at the last Scan, which is made now if there was none.
func (b *Handle) Topology() (*iommu.Topology, error) {
	b.scan.mu.Lock()
	defer b.scan.mu.Unlock()
	if b.scan.topology == nil {
		if err := b.scan.look(); err != nil {
			return nil, err
		}
	}
	return b.scan.topology, nil
}

// Scan looks at the host again, and returns it as it is now. Devices of an earlier look stay as they were.
func (b *Handle) Scan() (*iommu.Topology, error) {
	b.scan.mu.Lock()
	defer b.scan.mu.Unlock()
	if err := b.scan.look(); err != nil {
		return nil, err
	}
	return b.scan.topology, nil
}

func (s *scan) look() (err error) {
	s.began, s.changed = time.Now(), s.journal.Changed()
	if s.topology, err = iommu.Scan(s.host); err == nil && s.roles != nil {
		err = s.roles(s.topology)
	}
	return err
}

// Undisturbed reports whether nothing of viaduct's has changed anything since the last look at the host: each change
// begins and ends with a record.
func (b *Handle) Undisturbed() bool {
	b.scan.mu.Lock()
	defer b.scan.mu.Unlock()
	// More than the kernel's tick, within which two changes are one.
	const tick = 50 * time.Millisecond
	return b.scan.changed.Equal(b.journal.Changed()) && b.scan.began.Sub(b.scan.changed) > tick
}

// Start starts the child that writes, which takes as long as a look at the host does. Without it the child is started
// when it is needed first.
func (b *Handle) Start() {
	if b.Changes() {
		go func() { _, _ = b.child.get() }()
	}
}
