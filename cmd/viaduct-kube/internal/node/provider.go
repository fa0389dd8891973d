package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"viaduct/cmd/lease"
	"viaduct/iommu"
)

// Record is which provider served each function when the node was last served, by address. It is a file in the
// driver's own folder.
type Record map[string]Provider

// ReadRecord reads a record; one that is not there is empty.
func ReadRecord(file string) (Record, error) {
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return Record{}, nil
	}
	if err != nil {
		return nil, err
	}
	out := Record{}
	if err := json.Unmarshal(text, &out); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return out, nil
}

// Write writes the record down.
func (r Record) Write(file string) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return WriteFile(file, append(text, '\n'))
}

// NewRecord is who serves each function now. A function that a pod has and that is not declared any more stays with its
// provider.
func (s *Settings) NewRecord(functions []Function, old Record) Record {
	out := Record{}
	for i := range functions {
		f := &functions[i]
		address := f.Address.String()
		switch {
		case f.Lost && old[address] != "":
			out[address] = old[address]
		case !f.Lost:
			out[address] = s.Provider(f.Pool)
		}
	}
	return out
}

// Changed refuses that a function's provider is another one than it was while a pod still has it by the former: each
// would give it to a pod. Ours tells leases of this cluster from others.
func (s *Settings) Changed(functions []Function, old Record, ours func(*lease.Lease) bool) error {
	var errs []error
	for i := range functions {
		f := &functions[i]
		was, now := old[f.Address.String()], s.Provider(f.Pool)
		if f.Lost || was == "" || was == now || f.Lease == nil || !ours(f.Lease) {
			continue
		}
		errs = append(errs, fmt.Errorf("%s is still in use by %s, which got it by %s, and %s is to serve it now: "+
			"delete the pod first, or set the pool back to %s", f.Address, f.Lease.For, was, now, was))
	}
	return errors.Join(errs...)
}

// Claim is what another provider says to the cluster that it gives out.
type Claim struct {
	Provider string // as a resource's or a driver's name
	Address  iommu.Address
}

// Share notes at functions that another provider on this node gives them out too.
func (s *Settings) Share(functions []Function, claims []Claim) {
	s.shared(functions, claims, func(f *Function, by string) {
		f.Wrong = append(f.Wrong, Problem{Shared, by + " gives out " + f.Address.String() + " too"})
	})
}

// RefuseShared refuses functions that another provider on this node gives out too.
func (s *Settings) RefuseShared(functions []Function, claims []Claim) error {
	given := map[string][]string{}
	var order []string
	s.shared(functions, claims, func(f *Function, by string) {
		if given[by] == nil {
			order = append(order, by)
		}
		given[by] = append(given[by], f.Address.String())
	})
	var errs []error
	for _, by := range order {
		errs = append(errs, fmt.Errorf("%s gives out %s too: take them from its configuration, or set their pool to "+
			"none in %s", by, strings.Join(given[by], ", "), SettingsFile))
	}
	return errors.Join(errs...)
}

// shared calls tell with each function that is served here and claimed by another provider.
func (s *Settings) shared(functions []Function, claims []Claim, tell func(f *Function, by string)) {
	mine := map[iommu.Address]*Function{}
	for i := range functions {
		if s.Provider(functions[i].Pool) != Nobody {
			mine[functions[i].Address] = &functions[i]
		}
	}
	for _, c := range claims {
		if f := mine[c.Address]; f != nil {
			tell(f, c.Provider)
		}
	}
}
