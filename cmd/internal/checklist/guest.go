package checklist

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"viaduct/cmd/internal/declared"
	"viaduct/cmd/internal/guest"
	"viaduct/cmd/internal/lease"
	"viaduct/internal/journal"
	"viaduct/internal/shell"
	"viaduct/iommu"
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

// processes are those that run the guest, as far as that is known: else those that have its devices open.
func (c *list) processes() []int {
	out := c.own()
	for _, h := range c.look.Now {
		if h.PID != 0 && !slices.Contains(out, h.PID) && c.mine(h) {
			out = append(out, h.PID)
		}
	}
	return out
}

// mine reports whether a user of a device is the guest, or may be.
func (c *list) mine(h holder.Holder) bool {
	if h.PID == 0 || h.Guest != "" {
		return h.Guest == c.lease.Guest
	}
	own := c.own()
	return len(own) == 0 || slices.Contains(own, h.PID)
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
			l.Cure = fmt.Sprintf("viaduct why guest=%s --memory SIZE", quote(c.lease.Guest))
		case limit < memory:
			l.Answer = No
			l.Text = fmt.Sprintf("process %d may lock %d MiB, and the guest has %d MiB", pid, limit>>20, memory>>20)
			l.Cure = fmt.Sprintf("prlimit --pid %d --memlock=unlimited", pid)
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
		l.Answer, l.Cure = No, release(c.lease.Guest)
	}
	if !c.host.Live() {
		l.Answer, l.Text, l.Cure = Unknown, "a captured host has no processes, by which a lease lives", ""
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
	if !c.host.Live() {
		l.Answer, l.Text, l.Evidence = Unknown, "a captured host does not show quarantine", nil
	}
	for _, d := range c.devices {
		if why := all.Why(c.host, d); why != "" {
			l.Answer, l.Device, l.Text = No, d.Name, "it is in quarantine: "+why
			l.Cure = "viaduct release --quarantined " + d.Name
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
				l.Evidence, l.Cure = []Evidence{{journal.Dir + "/" + key + ".json", "there"}}, "viaduct recover"
			}
		}
	}
	c.add(l)
	return nil
}

// holders is who uses the devices beside the guest.
func (c *list) holders() error {
	l := Line{Name: "holders", Answer: OK, Text: "nobody has its devices open"}
	if !c.host.Live() {
		l.Answer, l.Text = Unknown, "a captured host has no processes"
		c.add(l)
		return nil
	}
	all, err := holder.Find(c.host, c.devices)
	if err != nil && !errors.Is(err, holder.ErrBlind) {
		return err
	}
	for _, h := range all {
		if c.mine(h) {
			if h.PID != 0 {
				l.Text = "the guest has its devices open"
				l.Evidence = append(l.Evidence, Evidence{fmt.Sprintf("proc/%d/fd", h.PID), h.String()})
			}
			continue
		}
		l.Answer, l.Text, l.Device = No, "another uses it: "+h.What, h.Device
		l.Evidence, l.Cure = nil, "viaduct bind --dry-run "+h.Device
		if h.PID != 0 {
			l.Evidence, l.Cure = []Evidence{{fmt.Sprintf("proc/%d/fd", h.PID), h.What}}, fmt.Sprintf("kill %d", h.PID)
		}
		if h.Guest != "" {
			l.Cure = release(h.Guest)
		}
		c.add(l)
		return nil
	}
	if err != nil {
		l.Answer, l.Text, l.Cure = Unknown, "not all processes can be seen", "run it as root"
	}
	c.add(l)
	return nil
}

// troubles are words of what the kernel says when something is wrong with a device.
var troubles = []string{
	"fail", "error", "fault", "denied", "refus", "not support", "timed out", "timeout", "event logged", "unable",
	"cannot",
}

// kernel is what the kernel has said of the devices.
func (c *list) kernel() error {
	lines := iommu.KernelLines(c.host)
	for _, d := range c.devices {
		l := Line{Name: "kernel", Device: d.Name, Answer: OK, Text: "the kernel reports no trouble with it"}
		if len(lines) == 0 {
			l.Answer, l.Text, l.Evidence = Unknown, "the kernel's log cannot be read", []Evidence{{"dev/kmsg", ""}}
			c.add(l)
			continue
		}
		// Intel's driver leaves the domain out.
		short := "[" + strings.TrimPrefix(d.Name, "0000:") + "]"
		for _, line := range slices.Backward(lines) {
			if !strings.Contains(line, d.Name) && !strings.Contains(line, short) {
				continue
			}
			lower := strings.ToLower(line)
			bad := slices.ContainsFunc(troubles, func(word string) bool { return strings.Contains(lower, word) })
			if len(l.Evidence) == 0 || bad {
				l.Evidence = []Evidence{{"dev/kmsg", line}}
			}
			if bad {
				l.Answer, l.Text, l.Cure = No, "the kernel reports trouble with it", "viaduct doctor "+d.Name
				break
			}
		}
		if len(l.Evidence) == 0 {
			l.Evidence = []Evidence{{"dev/kmsg", "nothing of it"}}
		}
		c.add(l)
	}
	return nil
}

// last is what changed last.
func (c *list) last() error {
	l := Line{
		Name: "last_change", Answer: OK, Text: "the lease was made " + c.lease.Made.Format(time.DateTime),
		Evidence: []Evidence{{c.record(), c.lease.Made.Format(time.RFC3339)}},
	}
	if c.host.Live() {
		at := journal.In(c.host.Host, journal.Dir).Changed()
		if !at.IsZero() {
			l.Text += ", and viaduct changed a record last " + at.Format(time.DateTime)
			l.Evidence = append(l.Evidence, Evidence{journal.Dir, at.Format(time.RFC3339)})
		}
	}
	c.add(l)
	return nil
}
