package holder

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"viaduct/internal/host"
	"viaduct/internal/journal"
	"viaduct/iommu"
)

// LeasePrefix begins the keys of the journal's records of devices that are assigned to guests.
const LeasePrefix = journal.Lease

// LeaseHead is the part of a lease's record that says whose it is. The whole record embeds it.
type LeaseHead struct {
	Guest string `json:"guest"`
	// For says whom the guest is for, where its name alone says little; "" if nobody said.
	For string `json:"for,omitempty"`
}

// LeaseDevice is the part of a lease's record of a device that says which it is. The whole record embeds it.
type LeaseDevice struct {
	Address iommu.Address `json:"address"`
}

// Leases finds the guests that devices are assigned to, whether they run or not. With an error that matches ErrBlind it
// returns those that may be read.
func Leases(h *iommu.Host, devices []*iommu.Device) ([]Holder, error) {
	names, err := h.Names(journal.Dir)
	if err != nil && !host.Absent(err) {
		return nil, err
	}

	var out []Holder
	var blind error
	for _, n := range names {
		if !strings.HasPrefix(n, LeasePrefix) {
			continue
		}
		text, err := h.Read(path.Join(journal.Dir, n))
		if host.Absent(err) {
			// It has just ended.
			continue
		}
		if errors.Is(err, fs.ErrPermission) {
			blind = fmt.Errorf("%w: %w", ErrBlind, err)
			continue
		}
		if err != nil {
			return nil, err
		}
		var l struct {
			LeaseHead
			Devices []LeaseDevice `json:"devices"`
		}
		if err := json.Unmarshal(text, &l); err != nil {
			return nil, fmt.Errorf("%s: %w", n, err)
		}

		for _, of := range l.Devices {
			i := slices.IndexFunc(devices, func(d *iommu.Device) bool { return d.PCI && d.Address == of.Address })
			if i < 0 {
				continue
			}
			what := fmt.Sprintf("is assigned to guest %q", l.Guest)
			if l.For != "" {
				what += " (" + l.For + ")"
			}
			out = append(out, Holder{
				Device: devices[i].Name, Kind: Lease, Guest: l.Guest, What: what, Brief: "guest " + l.Guest,
			})
		}
	}
	return out, blind
}
