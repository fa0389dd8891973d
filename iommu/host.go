package iommu

import "viaduct/internal/host"

// Host is the host that all functions of this module look at and act on: the machine that the program runs on, or,
// read-only, one that was captured as a folder or as a snapshot file. It is what [Open] returns; its zero value is
// none.
//
// Its methods beside those shown here are for this module's own packages.
type Host struct{ *host.Host }

// Open opens the running host ("" or "/"), or, read-only, a folder that holds a captured tree, or a snapshot file. The
// caller closes it. An error that is fs.ErrNotExist says that there is no such folder or file.
func Open(name string) (*Host, error) {
	h, err := host.Open(name)
	if err != nil {
		return nil, err
	}
	return &Host{h}, nil
}

// Close releases the host. What was read of it stays valid.
func (h *Host) Close() error {
	if h.Host == nil {
		return nil
	}
	return h.Host.Close()
}

// Live reports whether this is a running host, the only kind that can be changed, and that has users to be asked for.
func (h *Host) Live() bool { return h.Host != nil && h.Host.Live() }

// ErrReadOnly is matched by errors that say that a captured host cannot be changed.
const ErrReadOnly = host.ErrReadOnly
