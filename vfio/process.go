package vfio

import (
	"path"
	"strconv"
	"strings"

	"viaduct/iommu"
)

// Proc names a process for good: its number may be another's tomorrow.
type Proc struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // in clock ticks since the boot (proc_pid_stat(5))
}

// processStat are the state of a process or thread and when it started, in clock ticks since the boot: fields 3 and 22 of
// proc_pid_stat(5).
func processStat(h *iommu.Host, dir string) (state string, start uint64, ok bool) {
	stat, err := h.String(path.Join(dir, "stat"))
	if err != nil {
		return "", 0, false
	}
	f := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:]) // the name may hold anything
	if len(f) < 20 {
		return "", 0, false
	}
	start, err = strconv.ParseUint(f[19], 10, 64)
	return f[0], start, err == nil
}

func processDir(pid int) string { return path.Join("proc", strconv.Itoa(pid)) }

// NameProcess names a process that runs now.
func NameProcess(h *iommu.Host, pid int) Proc {
	_, start, _ := processStat(h, processDir(pid))
	return Proc{pid, start}
}

// Alive reports whether any thread of a process still runs. One that was killed in a write lives on without its first thread.
func (p Proc) Alive(h *iommu.Host) bool {
	if _, start, ok := processStat(h, processDir(p.PID)); !ok || start != p.Start {
		return false
	}
	dir := path.Join(processDir(p.PID), "task")
	threads, err := h.Names(dir)
	if err != nil {
		return false
	}
	for _, t := range threads {
		if state, _, ok := processStat(h, path.Join(dir, t)); ok && state != "Z" && state != "X" {
			return true
		}
	}
	return false
}
