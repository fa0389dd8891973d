package vfio

import (
	"errors"
	"fmt"

	"viaduct/internal/journal"
	"viaduct/iommu"
)

// SavedDir is where the devices are named that are to be taken again after each boot, in a file each.
const SavedDir = "/var/lib/viaduct/saved"

// Saved is a device that is to be taken again after each boot, by what tells it from all others.
type Saved struct {
	Address   iommu.Address `json:"address"` // that it had; another boot may give it another
	Identity  Identity      `json:"identity"`
	Driver    string        `json:"driver"` // Auto, or a driver's name
	NodeOwner string        `json:"node_owner,omitempty"`
}

// Save names a device that was taken, in a journal in SavedDir.
func (b *Binder) Save(in *journal.Journal, d *iommu.Device, driver string) error {
	s := Saved{Address: d.Address, Driver: driver}
	r, known, err := b.taken(d)
	switch {
	case err != nil:
		return err
	case known:
		s.Identity, s.NodeOwner = r.Identity, r.NodeOwner
	default: // somebody else took it
		s.Identity = b.Identify(d)
	}
	if b.Owner != nil {
		s.NodeOwner = b.Owner.Text
	}
	return in.Put(d.Name, s)
}

// ReadSaved are all saved devices, by address.
func ReadSaved(from *journal.Journal) ([]Saved, error) {
	keys, err := from.Keys("")
	out := make([]Saved, len(keys))
	for i, k := range keys {
		if _, err := from.Get(k, &out[i]); err != nil {
			return nil, err
		}
	}
	return out, err
}

// SavedAs are the keys under which a device was saved: by its place, whatever its address was then.
func SavedAs(h *iommu.Host, in *journal.Journal, d *iommu.Device) ([]string, error) {
	keys, err := in.Keys("")
	if err != nil || len(keys) == 0 {
		return nil, err
	}
	place, err := iommu.PathOf(h, d)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, k := range keys {
		var s Saved
		if _, err := in.Get(k, &s); err != nil {
			return nil, err
		}
		if s.Identity.Path == place {
			out = append(out, k)
		}
	}
	return out, nil
}

// Find is where the device is now: what is in its place has to be what was saved. It fails with an error that says what is
// there instead.
func (s *Saved) Find(h *iommu.Host, t *iommu.Topology) (*iommu.Device, error) {
	var found *iommu.Device
	t.All(func(d *iommu.Device) bool {
		if p, err := iommu.PathOf(h, d); d.PCI && err == nil && p == s.Identity.Path {
			found = d
		}
		return found == nil
	})
	gone := fmt.Sprintf("%s, which was saved, is not there: at its place, path=%s, is ", s.Address, s.Identity.Path)
	if found == nil {
		return nil, errors.New(gone + "nothing")
	}
	if why := Differs(h, &s.Identity, found); why != "" {
		return nil, fmt.Errorf("%sanother device, %s: %s", gone, found.Name, why)
	}
	return found, nil
}
