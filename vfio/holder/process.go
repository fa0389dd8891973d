package holder

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"viaduct/internal/host"
	"viaduct/iommu"
)

// errNoLink is what readlink(2) says of what is no link.
const errNoLink = unix.EINVAL

// Proc names a process for good: its number may be another's tomorrow.
type Proc struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // in clock ticks since the boot (proc_pid_stat(5))
}

// NameProcess names a process that runs now. One that does not has a start of 0, and is not alive.
func NameProcess(h *iommu.Host, pid int) Proc {
	_, start, _ := processStat(h, processDir(pid))
	return Proc{pid, start}
}

// Alive reports whether any thread of a process still runs. One that was killed in a write lives on without its first
// thread; one that cannot be looked at is taken to live.
func (p Proc) Alive(h *iommu.Host) bool {
	if _, start, err := processStat(h, processDir(p.PID)); err != nil || start != p.Start {
		return err != nil && !gone(err)
	}

	dir := path.Join(processDir(p.PID), "task")
	threads, err := h.Names(dir)
	if err != nil {
		return !gone(err)
	}
	for _, t := range threads {
		state, _, err := processStat(h, path.Join(dir, t))
		if err == nil && state != "Z" && state != "X" || err != nil && !gone(err) {
			return true
		}
	}
	return false
}

// gone reports whether an error says that a process or thread is no more.
func gone(err error) bool { return host.Absent(err) || errors.Is(err, unix.ESRCH) }

// Ended reports whether the process has ended and only waits for its parent to be told.
func (p Proc) Ended(h *iommu.Host) bool {
	state, _, err := processStat(h, processDir(p.PID))
	return err == nil && state == "Z"
}

// processStat are the state of a process or thread and when it started, in clock ticks since the boot: fields 3 and 22
// of proc_pid_stat(5).
func processStat(h *iommu.Host, dir string) (state string, start uint64, err error) {
	stat, err := h.String(path.Join(dir, "stat"))
	if err != nil {
		return "", 0, err
	}
	// The name, which comes before, may hold anything.
	f := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(f) < 20 {
		return "", 0, fmt.Errorf("/%s/stat has %d fields after the name", dir, len(f))
	}
	start, err = strconv.ParseUint(f[19], 10, 64)
	return f[0], start, err
}

func processDir(pid int) string { return path.Join("proc", strconv.Itoa(pid)) }

// processes are the numbers of all processes.
func processes(h *iommu.Host) ([]string, error) {
	names, err := h.Names("proc")
	return slices.DeleteFunc(names, func(n string) bool { return n[0] < '0' || n[0] > '9' }), err
}

func processName(h *iommu.Host, pid string) string {
	name, _ := h.String(path.Join("proc", pid, "comm"))
	return name
}

// namespaces looks into every namespace of a type (mnt, net) that any process is in, but for this one's own, until one
// process of each let it: look returns false if its process has ended. Its error, and the ErrBlind of what may not be
// looked at, come when all others were looked at.
func namespaces(h *iommu.Host, kind string, look func(pid string) (bool, error)) error {
	pids, err := processes(h)
	if err != nil {
		return err
	}
	own, err := h.Link(path.Join("proc/self/ns", kind))
	if err != nil && !host.Absent(err) {
		return err
	}

	var blind error
	seen := map[string]bool{own: err == nil}
	for _, pid := range pids {
		dir := path.Join("proc", pid, "ns")
		id, err := h.Link(path.Join(dir, kind))
		if err != nil {
			if err = unseenOf(h, pid, dir, err); errors.Is(err, ErrBlind) {
				blind = err
			} else if err != nil {
				return err
			}
			continue
		}
		if seen[id] {
			continue
		}
		if seen[id], err = look(pid); err != nil {
			if err = unseenOf(h, pid, dir, err); errors.Is(err, ErrBlind) {
				blind = err
			} else if err != nil {
				return err
			}
		}
	}
	return blind
}

// describe is a process with what a user can find it by.
func describe(pid, name, guest string) string {
	s := fmt.Sprintf("process %s (%s)", pid, name)
	if guest != "" {
		s += fmt.Sprintf(", guest %q", guest)
	}
	return s
}

// guestName is what a QEMU calls its guest: -name NAME, or -name guest=NAME,...
func guestName(h *iommu.Host, pid, name string) string {
	if !strings.HasPrefix(name, "qemu") && name != "kvm" {
		return ""
	}
	line, err := h.Read(path.Join("proc", pid, "cmdline"))
	if err != nil {
		return ""
	}

	args := strings.Split(string(line), "\x00")
	at := slices.Index(args, "-name")
	if at < 0 || at+1 >= len(args) {
		return ""
	}
	for option := range strings.SplitSeq(args[at+1], ",") {
		if guest, ok := strings.CutPrefix(option, "guest="); ok {
			return guest
		}
	}
	guest, _, _ := strings.Cut(args[at+1], ",")
	return guest
}
