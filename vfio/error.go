package vfio

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"golang.org/x/sys/unix"

	"viaduct/internal/host"
	"viaduct/iommu"
)

// What a caller can act on. An error of this package matches one of these where it is known to mean that; it also
// matches the errno.
const (
	// ErrUnsupported says that this kernel, driver or device has no such thing.
	ErrUnsupported = host.Error("not supported")
	// ErrInUse says that another process, or another context of this one, has it.
	ErrInUse = host.Error("in use")
	// ErrNotBound says that no VFIO driver has the device.
	ErrNotBound = host.Error("not on a VFIO driver")
	// ErrNotViable says that a driver of the host has a device of the group: see NotViableError.
	ErrNotViable = host.Error("its group is not viable")
	// ErrNotIsolated says that the device's interrupts cannot be kept apart from those of others.
	ErrNotIsolated = host.Error("its interrupts are not isolated")
	// ErrToken says that a VF needs the token of its PF's user, or must not have one.
	ErrToken = host.Error("its VF token is not accepted")
	// ErrRange says that an address is not one that the IOMMU allows, is already mapped, is not mapped, or lies
	// outside.
	ErrRange = host.Error("not a valid range")
	// ErrLimit says that the IOMMU's driver allows no more mappings.
	ErrLimit = host.Error("no more mappings are allowed")
	// ErrAlignment says that an address or a size is not a multiple of what it has to be.
	ErrAlignment = host.Error("not aligned")
	// ErrFault says that the device did not answer: its memory is off, it sleeps, or it is gone.
	ErrFault = host.Error("the device did not answer")
	// ErrNotOwned says that a reset would reset devices that the context has not opened: see NotOwnedError.
	ErrNotOwned = host.Error("other devices would be reset too")
	// ErrRefused says that the device refuses to go from its state to that one.
	ErrRefused = host.Error("refused by the device")
	// ErrNoData says that there is nothing more to read for now of the state of a device that still runs.
	ErrNoData = host.Error("no data for now")
)

// Error is what the kernel answered.
type Error struct {
	Op    string // the ioctl as in the header, or the system call
	Path  string // the file that was asked; "" for one without a name
	Err   error  // the errno
	Means error  // which of the errors above it is; nil if none
}

func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.Op)
	if e.Path != "" {
		b.WriteString(" " + e.Path)
	}
	if e.Means != nil {
		fmt.Fprintf(&b, ": %s (%s)", e.Means, e.Err)
	} else {
		fmt.Fprintf(&b, ": %s", e.Err)
	}
	return b.String()
}

// Unwrap gives the errno, and what it means.
func (e *Error) Unwrap() []error {
	if e.Means == nil {
		return []error{e.Err}
	}
	return []error{e.Err, e.Means}
}

// failure makes an Error of what an operation of the host ended with. What an errno means is told by means; beside
// that, an ioctl that nobody knows is unsupported everywhere.
func failure(op, name string, err error, means map[unix.Errno]error) error {
	if err == nil {
		return nil
	}
	if path, ok := errors.AsType[*fs.PathError](err); ok {
		err = path.Err
	}
	e := &Error{Op: op, Path: name, Err: err}
	if errno, ok := errors.AsType[unix.Errno](err); ok {
		e.Means = means[errno]
		if e.Means == nil && (errno == unix.ENOTTY || errno == unix.EOPNOTSUPP) {
			e.Means = ErrUnsupported
		}
	}
	return e
}

// NotViableError says which devices of a group are still on drivers of the host. It matches ErrNotViable.
type NotViableError struct {
	Group   int
	Members []*iommu.Device // nil if it cannot be read
}

func (e *NotViableError) Error() string {
	var members []string
	for _, d := range e.Members {
		members = append(members, d.Name+" is on "+d.Driver)
	}
	return fmt.Sprintf("group %d is not viable: %s; take the whole group from the host first (viaduct bind)",
		e.Group, cmp.Or(strings.Join(members, ", "), "a driver of the host has one of its devices"))
}

// Is matches ErrNotViable.
func (e *NotViableError) Is(target error) bool { return target == ErrNotViable }

// NotOwnedError says which devices a hot reset would reset that the context has not opened, or which another process
// has. It matches ErrNotOwned.
type NotOwnedError struct {
	Device  string
	Members []iommu.Address
}

func (e *NotOwnedError) Error() string {
	members := make([]string, len(e.Members))
	for i, a := range e.Members {
		members[i] = a.String()
	}
	return fmt.Sprintf("%s: a hot reset also resets %s, which this context has not opened: open it in the same context",
		e.Device, strings.Join(members, ", "))
}

// Is matches ErrNotOwned.
func (e *NotOwnedError) Is(target error) bool { return target == ErrNotOwned }
