package bind

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"viaduct/iommu"
)

// kernelLog reads what the kernel logs from when it was opened on: why a probe failed, which no errno of drivers_probe
// says. Without access to /dev/kmsg it says nothing.
type kernelLog struct {
	fd int

	mu   sync.Mutex
	read []string // so far
}

func openKernelLog(h *iommu.Host) *kernelLog {
	fd, err := h.OpenNode("dev/kmsg", unix.O_RDONLY|unix.O_NONBLOCK)
	if err != nil {
		return &kernelLog{fd: -1}
	}
	if _, err := unix.Seek(fd, 0, unix.SEEK_END); err != nil {
		unix.Close(fd)
		return &kernelLog{fd: -1}
	}
	return &kernelLog{fd: fd}
}

// explain adds what the kernel says of a device to the error of its change, but not to that of a write that has not
// returned.
func (l *kernelLog) explain(a iommu.Address, err error) error {
	if err == nil || IsStuck(err) {
		return err
	}
	if why := l.about(a.String()); why != "" {
		return fmt.Errorf("%w; the kernel says: %s", err, why)
	}
	return err
}

// about is the last message that names a device; "" if there is none.
func (l *kernelLog) about(device string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	// A record is smaller (Documentation/ABI/testing/dev-kmsg)
	buf := make([]byte, 8192)
	for l.fd >= 0 {
		n, err := unix.Read(l.fd, buf)
		if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.EINTR) {
			// Overwritten before it was read.
			continue
		}
		if err != nil || n <= 0 {
			break
		}
		if text, ok := kernelMessage(string(buf[:n])); ok {
			l.read = append(l.read, text)
		}
	}

	for _, text := range slices.Backward(l.read) {
		if strings.Contains(text, device) {
			return text
		}
	}
	return ""
}

// kernelMessage is the text of a record: priority,sequence,time,flags;text, and lines of properties after it.
func kernelMessage(record string) (string, bool) {
	_, text, ok := strings.Cut(record, ";")
	text, _, _ = strings.Cut(text, "\n")
	return text, ok
}

func (l *kernelLog) close() {
	if l.fd >= 0 {
		unix.Close(l.fd)
	}
}
