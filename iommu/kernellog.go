package iommu

import (
	"errors"
	"strings"

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

// KernelLines are lines of the kernel's log about IOMMUs, VFIO and PCI devices, the oldest first, without their times;
// none where the log cannot be read, which takes root, and on a captured host that lacks them.
func KernelLines(h *Host) []string {
	if !h.Live() {
		b, err := h.Read(kernelLines)
		if err != nil || len(b) == 0 {
			return nil
		}
		return strings.Split(strings.TrimSuffix(string(b), "\n"), "\n")
	}
	fd, err := h.OpenNode("dev/kmsg", unix.O_RDONLY|unix.O_NONBLOCK)
	if err != nil {
		return nil
	}
	defer unix.Close(fd)

	var out []string
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
		_, text, ok := strings.Cut(string(buf[:n]), ";")
		text, _, _ = strings.Cut(text, "\n")
		if ok && wanted(text) {
			out = append(out, text)
		}
	}
	return out
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
