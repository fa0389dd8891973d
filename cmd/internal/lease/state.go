package lease

import (
	"context"
	"fmt"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"viaduct/internal/host"
	"viaduct/iommu"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// State is where a lease is in its life.
type State string

// The states. What is dead may be reclaimed; what is lost may come back.
const (
	Making   State = "making"   // a viaduct is at work on it
	Reserved State = "reserved" // nobody has opened its devices yet
	Active   State = "active"   // a process has them open
	Dead     State = "dead"     // its holder, or what it was to end with, is gone
	Lost     State = "lost"     // a device of it is gone
)

// Look is a lease, as it is.
type Look struct {
	*Lease
	State State
	Why   string // "" of what is reserved or active
	Now   []holder.Holder
}

// Look looks at all leases. Holders that it sees are written down: when they are gone, the lease is dead. For who
// cannot see holders, those are used that were seen last.
func (m *Manager) Look() ([]Look, error) {
	out, blind, err := m.look()
	for _, look := range out {
		if !blind && len(look.Now) > 0 {
			m.saw(look.Lease, look.Now)
		}
	}
	return out, err
}

// look is Look that writes nothing down, and says whether not all holders could be seen.
func (m *Manager) look() (out []Look, blind bool, err error) {
	all, err := m.all()
	if err != nil {
		return nil, false, err
	}
	var devices []*iommu.Device
	for _, l := range all {
		for _, d := range l.Devices {
			if found, err := m.Topology.Find(d.Address); err == nil {
				devices = append(devices, found)
			}
		}
	}

	holders, err := holder.Processes(m.host, devices)
	blind = err != nil
	for _, l := range all {
		look := Look{Lease: l}
		for _, h := range holders {
			if slices.ContainsFunc(l.Devices, func(d Device) bool { return d.Address.String() == h.Device }) {
				look.Now = append(look.Now, h)
			}
		}
		look.State, look.Why = m.state(l, look.Now, l.Age(m.host))
		out = append(out, look)
	}
	return out, blind, nil
}

// seen names the processes that have devices open, each once.
func (m *Manager) seen(now []holder.Holder) []Holder {
	var out []Holder
	for _, h := range now {
		p := holder.NameProcess(m.host, h.PID)
		if !slices.ContainsFunc(out, func(old Holder) bool { return old.Proc == p }) {
			out = append(out, Holder{Proc: p, Name: strings.TrimPrefix(h.What, "is open in ")})
		}
	}
	return out
}

// saw writes down who holds a lease's devices.
func (m *Manager) saw(l *Lease, now []holder.Holder) {
	holders := m.seen(now)
	if slices.Equal(holders, l.Holders) {
		return
	}
	mine, err := m.Book.tryGuest(l.Guest)
	if mine == nil || err != nil {
		// Somebody else is at work on it, or looks; or who looks may write nothing.
		return
	}
	defer mine.Close()
	if now, err := m.Book.Get(l.Guest); err == nil && now != nil && now.Ready {
		now.Holders = holders
		if m.Book.put(now) == nil {
			l.Holders = holders
		}
	}
}

// state says where a lease is in its life, with all who hold its devices now, as far as they can be seen, and its age.
func (m *Manager) state(l *Lease, now []holder.Holder, age time.Duration) (State, string) {
	for _, d := range l.Devices {
		found, err := m.Topology.Find(d.Address)
		if err != nil || found.ID != d.ID || d.Nowhere {
			return Lost, fmt.Sprintf("%s is gone", d.Address)
		}
	}

	if !m.host.Live() {
		return m.capturedState(l)
	}
	switch {
	case l.Moving == Incoming:
		return Incoming, "its guest is to come from another host"
	case l.Moving == Leaving:
		return Leaving, "its guest is on its way to another host"
	case len(now) > 0:
		return Active, ""
	}
	alive := slices.ContainsFunc(l.known(), func(h Holder) bool { return h.Alive(m.host) })
	made := l.Maker.PID != 0 && l.Maker.Alive(m.host)
	switch {
	case !l.Ready && made:
		return Making, fmt.Sprintf("process %d is working on it", l.Maker.PID)
	case alive:
		return Active, ""
	case l.Ending:
		return Dead, "its release was interrupted"
	case l.Persist && !l.Ready:
		return Reserved, "it is restored after the boot"
	case !l.Ready:
		return Dead, "its assignment was interrupted"
	}

	kept, why := m.keptAlive(l)
	switch {
	case kept:
		return Reserved, ""
	case why != "":
		return Dead, why
	case len(l.Holders) > 0:
		return Dead, fmt.Sprintf("%s is gone", l.Holders[0].Name)
	case l.TTL > 0 && age > l.TTL:
		return Dead, fmt.Sprintf("no process opened its devices within %s", l.TTL)
	}
	return Reserved, ""
}

// keptAlive reports whether something that keeps a lease alive does; if all that was to has ended, why says so.
func (m *Manager) keptAlive(l *Lease) (kept bool, why string) {
	if l.Persist {
		return true, ""
	}
	if l.Runner != nil {
		kept, why = kept || l.Runner.Alive(m.host), l.Runner.Name+" is gone"
	}
	if l.Owner != nil {
		kept = kept || l.Owner.Alive(m.host)
		why = fmt.Sprintf("process %d, with which it ends, is gone", l.Owner.PID)
	}
	if l.Unit != "" {
		runs, err := UnitRuns(m.host, l.Unit)
		// What cannot be looked at may run.
		kept = kept || runs || err != nil
		why = fmt.Sprintf("unit %s, with which it ends, does not run", l.Unit)
	}
	return kept, why
}

// known are the processes that are known to have a lease's devices, or to be about to open them.
func (l *Lease) known() []Holder {
	if l.Runner == nil {
		return l.Holders
	}
	return append([]Holder{*l.Runner}, l.Holders...)
}

// unitProcesses is where a system unit's processes are listed: its control group has its name; "" if there is none.
func unitProcesses(h *iommu.Host, unit string) (string, error) {
	for _, root := range []string{"sys/fs/cgroup", "sys/fs/cgroup/systemd"} {
		for dirs, depth := []string{root}, 0; len(dirs) > 0 && depth < 6; depth++ {
			var next []string
			for _, dir := range dirs {
				names, err := h.Names(dir)
				if err != nil && !host.Absent(err) {
					return "", err
				}
				for _, n := range names {
					switch below := path.Join(dir, n); {
					case n == unit:
						return path.Join(below, "cgroup.procs"), nil
					case strings.HasSuffix(n, ".slice"):
						// Users' own units are in user@UID.service: anybody may name them as he likes.
						next = append(next, below)
					}
				}
			}
			dirs = next
		}
	}
	return "", nil
}

// UnitPIDs are the processes of a system unit; none of one that does not run.
func UnitPIDs(h *iommu.Host, unit string) ([]int, error) {
	if unit == "" {
		return nil, nil
	}
	file, err := unitProcesses(h, unit)
	if file == "" || err != nil {
		return nil, err
	}
	return pidsIn(h, file)
}

// pidsIn are the processes that a file of a control group lists; none of one that has just gone.
func pidsIn(h *iommu.Host, file string) ([]int, error) {
	var out []int
	text, err := h.String(file)
	for line := range strings.FieldsSeq(text) {
		if pid, err := strconv.Atoi(line); err == nil {
			out = append(out, pid)
		}
	}
	if host.Absent(err) {
		err = nil
	}
	return out, err
}

// UnitRuns reports whether a unit, or what it has put into groups below its own, has processes.
func UnitRuns(h *iommu.Host, unit string) (bool, error) {
	file, err := unitProcesses(h, unit)
	if file == "" || err != nil {
		return false, err
	}
	text, err := h.String(path.Join(path.Dir(file), "cgroup.events"))
	if !host.Absent(err) {
		return strings.Contains(text, "populated 1"), err
	}
	// Groups of the first version have no such file.
	pids, err := pidsIn(h, file)
	return len(pids) > 0, err
}

// Started writes down who is going to hold a lease's devices: the VMM that was started with them. It fails if the lease
// is no longer this process's.
func (b *Book) Started(ctx context.Context, l *Lease, pid int, name string) error {
	mine, err := b.lockGuest(ctx, l.Guest, bind.DefaultTimeout)
	if err != nil {
		return err
	}
	defer mine.Close()

	now, err := b.Get(l.Guest)
	if err != nil {
		return err
	}
	if self := holder.NameProcess(b.host, os.Getpid()); now == nil || !now.Ready || now.Owner == nil ||
		*now.Owner != self {
		return fmt.Errorf("%s: its lease was ended meanwhile", l.Guest)
	}
	now.Runner = &Holder{Proc: holder.NameProcess(b.host, pid), Name: fmt.Sprintf("process %d (%s)", pid, name)}
	// Which the VMM outlives.
	now.Owner = nil
	return b.put(now)
}

// LookAt is one lease, as it is.
func (m *Manager) LookAt(l *Lease) Look {
	look := Look{Lease: l}
	// Who cannot see all is told what was seen last.
	look.Now, _ = holder.Processes(m.host, m.present(l))
	look.State, look.Why = m.state(l, look.Now, l.Age(m.host))
	return look
}
