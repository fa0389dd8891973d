package checklist

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"viaduct/cmd/internal/declared"
	"viaduct/cmd/internal/guest"
	"viaduct/cmd/internal/lease"
	"viaduct/internal/journal"
	"viaduct/internal/shell"
	"viaduct/vfio/holder"
)

func quote(s string) string { return shell.Quote(s) }

// own are the processes that the lease is known to be for: its runner, its owner, its unit's.
func (c *list) own() []int {
	var out []int
	if r := c.lease.Runner; r != nil && r.Alive(c.host) {
		out = append(out, r.PID)
	}
	if o := c.lease.Owner; o != nil && o.Alive(c.host) {
		out = append(out, o.PID)
	}
	return append(out, c.unitPIDs...)
}

// processes are those that are known to run the guest.
func (c *list) processes() []int {
	out := c.own()
	for _, h := range c.look.Now {
		if h.PID != 0 && !slices.Contains(out, h.PID) && c.relation(h) == mine {
			out = append(out, h.PID)
		}
	}
	return out
}

// relation is what a user of a device is to the guest.
type relation int

const (
	unclear relation = iota // neither the lease nor the process says whose it is
	mine
	another
)

// relation goes by what is known of a process: the guest that its VMM was started for, or that it is one of those the
// lease is for. Where the lease names none, a process without a guest may be anybody's.
func (c *list) relation(h holder.Holder) relation {
	switch own := c.own(); {
	case h.PID != 0 && c.descends(h.PID, own), h.Guest != "" && h.Guest == c.lease.Guest:
		return mine
	case h.PID != 0 && h.Guest == "" && len(own) == 0:
		return unclear
	}
	return another
}

// descends reports whether a process is one of these, or was started below one: a wrapper starts the VMM itself.
func (c *list) descends(pid int, from []int) bool {
	const deepest = 64
	for range deepest {
		if slices.Contains(from, pid) {
			return true
		}
		stat, err := c.host.String(fmt.Sprintf("proc/%d/stat", pid))
		// The name, which comes before, may hold anything; the state and the parent follow (proc_pid_stat(5)).
		f := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
		if err != nil || len(f) < 2 {
			return false
		}
		if pid, err = strconv.Atoi(f[1]); err != nil || pid <= 1 {
			return false
		}
	}
	return false
}

// memory is the guest's, in bytes: what was asked for, else what one of its processes was started with; 0 if it is not
// known.
func (c *list) memory() uint64 {
	if c.options.Memory != 0 {
		return c.options.Memory
	}
	for _, pid := range c.processes() {
		text, err := c.host.Read(fmt.Sprintf("proc/%d/cmdline", pid))
		if err != nil {
			continue
		}
		if n := guest.MemoryOf(strings.Split(strings.TrimSuffix(string(text), "\x00"), "\x00")); n != 0 {
			return n
		}
	}
	return 0
}

// memlock is whether the VMM may lock the guest's memory, all of which VFIO locks.
func (c *list) memlock() error {
	l := Line{Name: "memlock", Answer: OK}
	pids := c.processes()
	if len(pids) == 0 || !c.host.Live() {
		l.Answer, l.Text = Unknown, "no process of the guest is known, whose limit could be looked at"
		c.add(l)
		return nil
	}

	memory := c.memory()
	for _, pid := range pids {
		file := fmt.Sprintf("proc/%d/limits", pid)
		limit, all := guest.LockLimit(c.host, pid)
		switch {
		case all:
			l.Evidence = append(l.Evidence, Evidence{file, "unlimited"})
			continue
		case memory == 0:
			l.Answer = Unknown
			l.Text = fmt.Sprintf("process %d may lock %d MiB, and the guest's memory is not known", pid, limit>>20)
			l.Hint = fmt.Sprintf("viaduct why guest=%s --memory SIZE", quote(c.lease.Guest))
		case limit < memory:
			l.Answer = No
			l.Text = fmt.Sprintf("process %d may lock %d MiB, and the guest has %d MiB", pid, limit>>20, memory>>20)
			l.Hint = fmt.Sprintf("prlimit --pid %d --memlock=unlimited", pid)
		default:
			l.Evidence = append(l.Evidence, Evidence{file, strconv.FormatUint(limit, 10)})
			continue
		}
		l.Evidence = []Evidence{{file, strconv.FormatUint(limit, 10)}}
		c.add(l)
		return nil
	}

	l.Text = "the guest's memory may be locked"
	c.add(l)
	return nil
}

// phase is where the lease is in its life.
func (c *list) phase() error {
	l := Line{
		Name: "lease", Text: fmt.Sprintf("the lease is %s", c.look.State),
		Evidence: []Evidence{{c.record(), string(c.look.State)}},
	}
	if c.look.Why != "" {
		l.Text += ": " + c.look.Why
	}
	switch c.look.State {
	case lease.Reserved, lease.Active:
		l.Answer = OK
	case lease.Making:
		l.Answer = Unknown
	default:
		l.Answer, l.Hint = No, release(c.lease.Guest)
	}
	if c.look.State == lease.Lost && c.back != "" {
		l.Hint = c.back + ", or give the lease up: " + l.Hint
	}
	if !c.manager.Book.Known() {
		l.Answer, l.Text, l.Hint = Unknown, "how the lease was is not captured of this host", ""
		l.Evidence[0].Value = "there"
	}
	c.add(l)
	return nil
}

// quarantine is whether devices of it may be given to nobody.
func (c *list) quarantine() error {
	all, err := c.manager.Book.Quarantined()
	if err != nil {
		return err
	}
	l := Line{
		Name: "quarantine", Answer: OK, Text: "none of its devices is in quarantine",
		Evidence: []Evidence{{declared.StateDir, fmt.Sprintf("%d in quarantine", len(all))}},
	}
	if !c.manager.Book.Known() {
		l.Answer, l.Text, l.Evidence = Unknown, "quarantine is not captured of this host", nil
	}
	for _, d := range c.devices {
		if why := all.Why(c.host, d); why != "" {
			l.Answer, l.Device, l.Text = No, d.Name, "it is in quarantine: "+why
			l.Hint = "viaduct release --quarantined " + d.Name
			break
		}
	}
	c.add(l)
	return nil
}

// changes is whether a change of a device, or of its PF, is under way or was interrupted.
func (c *list) changes() error {
	keys, err := journal.In(c.host.Host, journal.Dir).Keys(journal.Changing)
	if err != nil {
		return err
	}
	l := Line{
		Name: "change", Answer: OK, Text: "no change of its devices is under way",
		Evidence: []Evidence{{journal.Dir, "no record of one"}},
	}
	for _, d := range c.devices {
		for _, key := range keys {
			name := strings.TrimPrefix(key, journal.Changing)
			if name == d.Name || d.PhysFn != nil && name == d.PhysFn.String() {
				l.Answer, l.Device, l.Text = No, name, "a change of it is under way, or was interrupted"
				l.Evidence, l.Hint = []Evidence{{journal.Dir + "/" + key + ".json", "there"}}, "viaduct recover"
			}
		}
	}
	c.add(l)
	return nil
}

// holders is who uses the devices beside the guest.
func (c *list) holders() error {
	l := Line{Name: "holders", Answer: OK, Text: "nobody has its devices open"}
	if !holder.Known(c.host) {
		l.Answer, l.Text = Unknown, "who has its devices open is not captured of this host"
		c.add(l)
		return nil
	}

	all, err := holder.Find(c.host, c.devices)
	if err != nil && !errors.Is(err, holder.ErrBlind) {
		return err
	}

	var strangers []holder.Holder
	for _, h := range all {
		switch c.relation(h) {
		case mine:
			if h.PID != 0 {
				l.Text = "the guest has its devices open"
				l.Evidence = append(l.Evidence, opened(h))
			}
			continue
		case unclear:
			strangers = append(strangers, h)
			continue
		}
		l.Answer, l.Text, l.Device = No, "another uses it: "+h.What, h.Device
		l.Evidence, l.Hint = nil, "viaduct bind --dry-run "+h.Device
		if h.PID != 0 {
			l.Evidence, l.Hint = []Evidence{{fmt.Sprintf("proc/%d/fd", h.PID), h.What}}, fmt.Sprintf("kill %d", h.PID)
		}
		if h.Guest != "" {
			l.Hint = release(h.Guest)
		}
		c.add(l)
		return nil
	}

	if len(strangers) > 0 {
		l.Answer, l.Evidence = Unknown, nil
		l.Text = "a process has its devices open, and whether it is the guest is not known"
		var pids []string
		for _, h := range strangers {
			l.Evidence = append(l.Evidence, opened(h))
			if pid := strconv.Itoa(h.PID); !slices.Contains(pids, pid) {
				pids = append(pids, pid)
			}
		}
		l.Hint = "ps -o pid,user,args -p " + strings.Join(pids, ",")
	}

	if err != nil {
		l.Answer, l.Text, l.Hint = Unknown, "not all processes can be seen", "run it as root"
	}

	c.add(l)
	return nil
}

func opened(h holder.Holder) Evidence { return Evidence{fmt.Sprintf("proc/%d/fd", h.PID), h.String()} }
