package main

import (
	"errors"

	"viaduct/cmd/internal/lease"
	"viaduct/iommu"
	"viaduct/sriov"
	"viaduct/vfio/holder"
)

// snapshotFacts is what a snapshot of a running host holds beside its files: what drivers say of VFs, who uses devices,
// and how leases are. What cannot be had is left out, which people are told. Redacted, nobody is told who uses devices,
// which has addresses and names of the host.
func (e *env) snapshotFacts(h *iommu.Host, redacted bool) ([]iommu.Fact, error) {
	if !h.Live() {
		return nil, nil
	}
	t, err := look(h)
	if err != nil {
		return nil, err
	}

	var holders []iommu.Fact
	var err2 error
	if !redacted {
		holders, err2 = holder.Capture(h, t)
	}
	ports, err1 := sriov.Capture(h, t)
	books, err3 := e.booksOf(h)
	for _, part := range []struct {
		what string
		err  error
	}{
		{"everything that drivers report of VFs", err1}, {"all users of devices", err2},
		{"leases and quarantine", err3},
	} {
		if part.err != nil {
			e.note("the snapshot does not have %s: %v", part.what, part.err)
		}
	}

	facts := append(ports, holders...)
	if err3 == nil {
		facts = append(facts, books)
	}
	return facts, nil
}

// booksOf is how the host's leases are.
func (e *env) booksOf(h *iommu.Host) (fact iommu.Fact, err error) {
	s, err := e.openHandle(h, 0)
	if err != nil {
		return fact, err
	}
	defer s.Close()
	m, err := lease.New(s, lease.Options{})
	if err != nil {
		return fact, err
	}
	return m.Capture()
}

// errNoSettings is why a captured host shows no settings of VFs.
var errNoSettings = errors.New("what its VFs are set to was not captured of this host (a snapshot that root makes " +
	"with this version has it)")

// tellUnknownBooks tells people that a captured host does not say who has its devices.
func (e *env) tellUnknownBooks(b *lease.Book) {
	if !b.Known() {
		e.note("leases and quarantine were not captured of this host, and are not known")
	}
}
