package lease

import (
	"fmt"
	"runtime"
	"strings"

	"viaduct/cmd/internal/guest"
	"viaduct/iommu"
	"viaduct/vfio"
	"viaduct/vfio/holder"
)

// overlaps says which ranges a guest's memory would have that it cannot have. Ranges that the kernel may give up
// (direct-relaxable), and that of interrupts, which lies in every guest's hole, do not count.
func overlaps(memory uint64, moves bool, regions []iommu.Region) []string {
	if memory == 0 {
		return nil
	}
	var out []string
	for _, r := range regions {
		if r.Type != "direct" && r.Type != "reserved" {
			continue
		}
		for _, s := range guest.Layout(runtime.GOARCH, memory, moves) {
			if s.Overlaps(vfio.Range{First: r.Start, Last: r.End}) {
				out = append(out, fmt.Sprintf("%#x-%#x (%s)", r.Start, r.End, r.Type))
				break
			}
		}
	}
	return out
}

// fits checks whether a guest's memory can be mapped for its devices, and locked by its VMM.
func (m *Manager) fits(l *Lease, devices []*iommu.Device, r *Request) (notes []string, err error) {
	if r.Memory == 0 {
		return nil, nil
	}
	seen := map[int]bool{}
	for _, d := range devices {
		if d.Group == nil || seen[*d.Group] {
			continue
		}
		group := *d.Group
		seen[group] = true
		regions, err := iommu.ReservedRegions(m.host, group)
		if err != nil {
			return nil, err
		}
		if bad := overlaps(r.Memory, r.AvoidsReservedRange, regions); len(bad) > 0 {
			hint := "give it less memory"
			if !r.AvoidsReservedRange && len(overlaps(r.Memory, true, regions)) == 0 {
				hint = "give it less than 1010G of memory, or use QEMU with an AMD CPU model, which places memory " +
					"elsewhere"
			}
			why := holder.Reason{
				Kind: holder.Memory, Device: d.Name,
				Text: fmt.Sprintf("the guest's memory would lie where IOMMU group %d cannot have any: %s", group,
					strings.Join(bad, ", ")),
			}
			return nil, holder.Because("assign "+d.Name+" to "+l.Guest, why, hint)
		}
	}

	pids, err := UnitPIDs(m.host, r.Unit)
	if err != nil {
		return nil, err
	}
	if r.OwnerPID != 0 {
		pids = append(pids, r.OwnerPID)
	}
	for _, pid := range pids {
		limit, may := guest.LockLimit(m.host, pid)
		if !may && limit < r.Memory {
			why := holder.Reason{
				Kind: holder.Memlock,
				Text: fmt.Sprintf("process %d may lock %d MiB of memory, and VFIO locks all %d MiB of the guest's",
					pid, limit>>20, r.Memory>>20),
			}
			return nil, holder.Because("assign to "+l.Guest, why,
				"raise LimitMEMLOCK= of the unit, or ulimit -l, to infinity")
		}
	}

	if len(pids) == 0 && r.NodeOwner != "" {
		notes = append(notes, fmt.Sprintf("the VMM of %s must be allowed to lock all of the guest's memory, %d MiB "+
			"and some more (ulimit -l, LimitMEMLOCK=)", r.NodeOwner, r.Memory>>20))
	}
	return notes, nil
}
