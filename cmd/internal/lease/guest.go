package lease

import (
	"fmt"
	"path"
	"strconv"
	"strings"

	"viaduct/iommu"
	"viaduct/vfio/holder"
)

// A guest's memory is where a PC has it: below the hole for devices under 4 GiB, the rest above (QEMU's
// hw/i386/pc_q35.c: 2 GiB below if it does not all fit under 0xb0000000).
const (
	gib      = 1 << 30
	lowMost  = 0xb0000000
	lowSplit = 2 * gib
	high     = 4 * gib
	moved    = 1 << 40 // where QEMU puts the upper part rather than into the range that AMD's IOMMUs reserve
	amdHole  = 0xfd00000000
)

type span struct{ from, to uint64 } // to is the last address

func layout(memory uint64, moves bool) []span {
	if memory <= lowMost {
		return []span{{0, memory - 1}}
	}
	from := uint64(high)
	if moves && from+memory-lowSplit > amdHole {
		from = moved
	}
	return []span{{0, lowSplit - 1}, {from, from + memory - lowSplit - 1}}
}

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
		for _, s := range layout(memory, moves) {
			if s.from <= r.End && r.Start <= s.to {
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
		if bad := overlaps(r.Memory, r.Moves, regions); len(bad) > 0 {
			cure := "give it less memory"
			if !r.Moves && len(overlaps(r.Memory, true, regions)) == 0 {
				cure = "give it less than 1010G of memory, or use QEMU with a CPU of AMD's, which puts memory elsewhere"
			}
			return nil, &holder.RefusedError{What: "assign " + d.Name + " to " + l.Guest, Cure: cure,
				Reasons: []string{
					"the guest's memory would lie where group " + strconv.Itoa(
						group,
					) + " cannot have any: " + strings.Join(bad, ", "),
				}}
		}
	}

	pids := UnitPIDs(m.host, r.Unit)
	if r.OwnerPID != 0 {
		pids = append(pids, r.OwnerPID)
	}
	for _, pid := range pids {
		limit, may := memlock(m.host, pid)
		if !may && limit < r.Memory {
			return nil, &holder.RefusedError{
				What: "assign to " + l.Guest,
				Cure: "raise LimitMEMLOCK= of the unit, or ulimit -l, to infinity",
				Reasons: []string{
					fmt.Sprintf(
						"process %d may lock %d MiB of memory, and the guest has %d MiB, all of which VFIO locks",
						pid,
						limit>>20,
						r.Memory>>20,
					),
				},
			}
		}
	}

	if len(pids) == 0 && r.NodeOwner != "" {
		notes = append(
			notes,
			fmt.Sprintf(
				"the VMM of %s has to be allowed to lock all of the guest's memory, %d MiB and some more (ulimit -l, "+
					"LimitMEMLOCK=)",
				r.NodeOwner,
				r.Memory>>20,
			),
		)
	}
	return notes, nil
}

// memlock is how much memory a process, and what it starts, may lock; may is true if there is no limit for it.
func memlock(h *iommu.Host, pid int) (limit uint64, may bool) {
	dir := path.Join("proc", strconv.Itoa(pid))
	status, _ := h.String(path.Join(dir, "status"))
	for line := range strings.Lines(status) {
		if hex, ok := strings.CutPrefix(line, "CapEff:"); ok {
			caps, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
			// CAP_IPC_LOCK (include/uapi/linux/capability.h)
			const ipcLock = 14
			if err == nil && caps>>ipcLock&1 == 1 {
				return 0, true
			}
		}
	}

	limits, _ := h.String(path.Join(dir, "limits"))
	for line := range strings.Lines(limits) {
		if rest, ok := strings.CutPrefix(line, "Max locked memory"); ok {
			f := strings.Fields(rest)
			if len(f) > 0 && f[0] != "unlimited" {
				n, err := strconv.ParseUint(f[0], 10, 64)
				return n, err != nil
			}
		}
	}
	return 0, true
}
