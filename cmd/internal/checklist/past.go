package checklist

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"viaduct/cmd/internal/changelog"
	"viaduct/iommu"
)

// moment is how a time is written.
const moment = "2006-01-02 15:04:05 -0700"

// troubles are words of what the kernel says when something is wrong with a device.
var troubles = []string{
	"fail", "error", "fault", "denied", "refus", "not support", "timed out", "timeout", "event logged", "unable",
	"cannot",
}

func isTrouble(line string) bool {
	lower := strings.ToLower(line)
	return slices.ContainsFunc(troubles, func(word string) bool { return strings.Contains(lower, word) })
}

// kernel is what the kernel has said of the devices.
func (c *list) kernel() error {
	lines := iommu.KernelLog(c.host)
	for _, d := range c.devices {
		if len(lines) == 0 {
			c.add(Line{
				Name: "kernel", Device: d.Name, Answer: Unknown, Text: "the kernel's log cannot be read",
				Evidence: []Evidence{{"dev/kmsg", "cannot be read"}},
			})
			continue
		}
		c.add(c.said(d, lines))
	}
	return nil
}

// said judges the newest line of trouble since the lease was made. What is older, as that a BAR found no room when the
// host booted, did not keep the device from being assigned.
func (c *list) said(d *iommu.Device, lines []iommu.LogLine) Line {
	l := Line{
		Name: "kernel", Device: d.Name, Answer: OK,
		Text: "the kernel has reported no trouble with it since the lease was made",
	}
	// Intel's driver leaves the domain out.
	short := "[" + strings.TrimPrefix(d.Name, "0000:") + "]"
	var last, trouble *iommu.LogLine
	for i := range lines {
		line := &lines[i]
		if !strings.Contains(line.Text, d.Name) && !strings.Contains(line.Text, short) {
			continue
		}
		last = line
		if isTrouble(line.Text) {
			trouble = line
		}
	}
	switch {
	case last == nil:
		l.Evidence = []Evidence{{"dev/kmsg", "nothing of it"}}
		return l
	case trouble == nil:
		l.Evidence = []Evidence{{"dev/kmsg", c.dated(last)}}
		return l
	}

	l.Evidence = []Evidence{{"dev/kmsg", c.dated(trouble)}}
	switch began, known := c.began(); {
	case trouble.At < 0 || !known:
		l.Answer, l.Text = Unknown, "the kernel has reported trouble with it, and when it did is not known"
	case trouble.At < began:
		l.Text += "; what it reported before is old"
	default:
		l.Answer, l.Text = No, "the kernel has reported trouble with it since the lease was made"
		l.Hint = "look at what came before (dmesg --ctime | grep " + d.Name + "), and start the guest again"
	}
	return l
}

// began is when the lease was made, counted from the boot as the kernel's log does; 0 or less of one from before it.
func (c *list) began() (at time.Duration, known bool) {
	_, now, err := c.host.Boot()
	return now - c.lease.Age(c.host), err == nil && now > 0
}

// dated is a line with when it was said, by the clock of the day.
func (c *list) dated(l *iommu.LogLine) string {
	now, known := c.host.Now()
	if l.At < 0 || !known {
		return l.Text
	}
	return now.Time.Add(l.At-now.Since).Local().Format(moment) + ": " + l.Text
}

// last is what changed last of the devices, or of those that they are VFs of, and what was last done for the guest.
func (c *list) last() error {
	l := Line{
		Name: "last_change", Answer: OK, Text: "the lease was made " + c.lease.Made.Local().Format(moment),
		Evidence: []Evidence{{c.record(), c.lease.Made.Format(time.RFC3339)}},
	}

	all, err := changelog.Read(c.host)
	if err != nil && !errors.Is(err, fs.ErrPermission) {
		return err
	}

	for _, e := range slices.Backward(all) {
		if !c.about(&e) {
			continue
		}
		what := e.Text()
		if e.Device != nil {
			what = *e.Device + ": " + what + " (" + e.Command + ")"
		}
		switch e.Result {
		case changelog.Failed:
			what += ", which failed"
		case changelog.Refused:
			what += ", which was refused"
		}
		l.Text += fmt.Sprintf("; viaduct last did this, for %s, at %s: %s", e.User, e.Time.Local().Format(moment), what)
		l.Evidence = append(l.Evidence, Evidence{changelog.File, e.Time.Format(time.RFC3339)})
		break
	}

	if err != nil {
		l.Text += "; what was changed since takes root to read"
	}

	c.add(l)
	return nil
}

// about reports whether an entry is about the guest or its devices.
func (c *list) about(e *changelog.Entry) bool {
	if e.Device == nil {
		return slices.Contains(strings.Fields(e.Command), c.lease.Guest)
	}
	of := func(d *iommu.Device) bool { return d.PhysFn != nil && d.PhysFn.String() == *e.Device }
	if slices.ContainsFunc(c.devices, of) {
		return true
	}
	for i := range c.lease.Devices {
		if c.lease.Devices[i].Address.String() == *e.Device {
			return true
		}
	}
	return false
}
