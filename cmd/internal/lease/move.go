package lease

import (
	"viaduct/internal/journal"
	"viaduct/vfio/holder"
)

// Recorded are all leases that are written down, also on a captured host, whose processes nobody can look at.
func (b *Book) Recorded() ([]*Lease, error) {
	var out []*Lease
	seen := map[string]bool{}
	for _, j := range []*journal.Journal{b.Run, b.State} {
		keys, err := j.Keys(holder.LeasePrefix)
		if err != nil {
			return nil, err
		}
		for _, k := range keys {
			l := &Lease{}
			known, err := j.Get(k, l)
			if err != nil {
				return nil, err
			}
			if known && !seen[k] {
				seen[k] = true
				out = append(out, l)
			}
		}
	}
	return out, nil
}
