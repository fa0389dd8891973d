package iommu

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// kernelLines is where a snapshot has what the kernel said of IOMMUs and devices.
const kernelLines = "viaduct/kernel-lines"

// aboutDevices are words of the lines of the kernel's log that a snapshot keeps. A line that names a PCI device does
// too.
var aboutDevices = []string{
	"iommu", "amd-vi", "dmar", "ivrs", "smmu", "vfio", "remapping", "ioapic", "x2apic", "sr-iov", "lockdown",
	"secure boot", "hypervisor", "efifb", "simpledrm", "vgaarb",
}

// maxKernelLog bounds what is read of the kernel's log: its default size is a quarter of a megabyte.
const maxKernelLog = 4 << 20

// LogLine is a line of the kernel's log.
type LogLine struct {
	Text string
	At   time.Duration // since the boot began, sleep included; below 0 if that is not known
}

// String is the line as a snapshot keeps it, with its time as dmesg(1) has it.
func (l LogLine) String() string {
	if l.At < 0 {
		return l.Text
	}
	return fmt.Sprintf("[%12.6f] %s", l.At.Seconds(), l.Text)
}

// parseLogLine reads a line of a snapshot. Snapshots of before lines had times have none.
func parseLogLine(line string) LogLine {
	if rest, ok := strings.CutPrefix(line, "["); ok {
		clock, text, ok := strings.Cut(rest, "] ")
		seconds, err := strconv.ParseFloat(strings.TrimSpace(clock), 64)
		// A century; what is no number at all is above that, too.
		if ok && err == nil && seconds >= 0 && seconds < 4e9 {
			return LogLine{text, time.Duration(seconds * float64(time.Second))}
		}
	}
	return LogLine{line, -1}
}

// KernelLines are the lines of [KernelLog] without their times.
func KernelLines(h *Host) []string {
	var out []string
	for _, l := range KernelLog(h) {
		out = append(out, l.Text)
	}
	return out
}

// KernelLog are lines of the kernel's log about IOMMUs, VFIO and PCI devices, the oldest first; none where the log
// cannot be read, which takes root, and on a captured host that lacks them.
func KernelLog(h *Host) []LogLine {
	var out []LogLine
	if !h.Live() {
		b, err := h.Read(kernelLines)
		if err != nil || len(b) == 0 {
			return nil
		}
		for line := range strings.SplitSeq(strings.TrimSuffix(string(b), "\n"), "\n") {
			out = append(out, parseLogLine(line))
		}
		return out
	}
	fd, err := h.OpenNode("dev/kmsg", unix.O_RDONLY|unix.O_NONBLOCK)
	if err != nil {
		return nil
	}
	defer unix.Close(fd)

	slept := asleep()
	// A record is smaller (Documentation/ABI/testing/dev-kmsg).
	buf := make([]byte, 8192)
	for total := 0; total < maxKernelLog; {
		n, err := unix.Read(fd, buf)
		if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.EINTR) {
			// Overwritten before it was read.
			continue
		}
		if err != nil || n <= 0 {
			break
		}
		total += n
		// Priority, sequence, time, flags; text, and lines of properties after it.
		head, text, ok := strings.Cut(string(buf[:n]), ";")
		text, _, _ = strings.Cut(text, "\n")
		if ok && wanted(text) {
			out = append(out, LogLine{text, recordTime(head, slept)})
		}
	}
	return out
}

// asleep is how long the host has slept since it booted, which the log's clock leaves out. Of a line from before the
// sleep that makes too late a time, and never one too early.
func asleep() time.Duration {
	var with, without unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &with)
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &without)
	return time.Duration(with.Nano() - without.Nano())
}

// recordTime is the time of a record, by its head: the third field, in microseconds.
func recordTime(head string, slept time.Duration) time.Duration {
	f := strings.Split(head, ",")
	if len(f) < 3 {
		return -1
	}
	us, err := strconv.ParseInt(f[2], 10, 53)
	if err != nil || us < 0 {
		return -1
	}
	return time.Duration(us)*time.Microsecond + slept
}

// wanted reports whether a line of the log is about IOMMUs or devices.
func wanted(line string) bool {
	lower := strings.ToLower(line)
	for _, word := range aboutDevices {
		if strings.Contains(lower, word) {
			return true
		}
	}
	for _, word := range strings.FieldsFunc(line, func(r rune) bool { return r == ' ' || r == '[' || r == ']' }) {
		if _, is := parseAddress(strings.Trim(word, ":,")); is {
			return true
		}
	}
	return false
}
