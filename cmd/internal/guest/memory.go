// Package guest knows where a guest's memory is, and what its VMM needs to lock it.
package guest

import (
	"path"
	"strconv"
	"strings"

	"viaduct/iommu"
	"viaduct/vfio"
)

// Where a PC has its memory: below the hole for devices under 4 GiB, the rest above (QEMU's hw/i386/pc_q35.c: 2 GiB
// below if it does not all fit under 0xb0000000). An Arm machine has all of it from 1 GiB on (hw/arm/virt.c).
const (
	gib      = 1 << 30
	lowMost  = 0xb0000000
	lowSplit = 2 * gib
	high     = 4 * gib
	moved    = 1 << 40 // where QEMU puts the upper part rather than into the range that AMD's IOMMUs reserve
	amdHole  = 0xfd00000000
	armBase  = gib
)

// Layout is where a guest has its memory, of a size in bytes above 0; arch is as GOARCH. avoids says that its VMM
// keeps memory off the range that AMD's IOMMUs reserve.
func Layout(arch string, memory uint64, avoids bool) []vfio.Range {
	if arch == "arm64" {
		return []vfio.Range{{First: armBase, Last: armBase + memory - 1}}
	}
	if memory <= lowMost {
		return []vfio.Range{{First: 0, Last: memory - 1}}
	}
	from := uint64(high)
	if avoids && from+memory-lowSplit > amdHole {
		from = moved
	}
	return []vfio.Range{{First: 0, Last: lowSplit - 1}, {First: from, Last: from + memory - lowSplit - 1}}
}

// LockLimit is how much memory a process, and what it starts, may lock; may is true if there is no limit for it. The
// kernel asks for CAP_IPC_LOCK in the host's own user namespace (account_locked_vm, mm/util.c); of another, as a
// container's, it does not count.
func LockLimit(h *iommu.Host, pid int) (limit uint64, may bool) {
	dir := path.Join("proc", strconv.Itoa(pid))
	status, _ := h.String(path.Join(dir, "status"))
	for line := range strings.Lines(status) {
		if hex, ok := strings.CutPrefix(line, "CapEff:"); ok {
			caps, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
			// CAP_IPC_LOCK (include/uapi/linux/capability.h)
			const ipcLock = 14
			if err == nil && caps>>ipcLock&1 == 1 && inFirstNamespace(h, dir) {
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

// inFirstNamespace reports whether a process is in the first user namespace, whose number is always the same
// (PROC_USER_INIT_INO, include/linux/proc_ns.h). Where that may not be read, it is if all users are mapped to
// themselves.
func inFirstNamespace(h *iommu.Host, dir string) bool {
	if ns, err := h.LinkBase(path.Join(dir, "ns/user")); err == nil {
		return ns == "user:[4026531837]"
	}
	users, err := h.String(path.Join(dir, "uid_map"))
	return err != nil || strings.Join(strings.Fields(users), " ") == "0 0 4294967295"
}
