//go:build linux && amd64

// Command killat kills a command at one of its writes to the host, for tests of what is left then:
//
//	killat N parent|child|both COMMAND...
//	killat N run=SHELLCOMMAND COMMAND...
//
// It counts, over all threads and children of the command, the writes to files below /sys and the netlink messages that
// are no queries. At the Nth, before the kernel carries it out, it kills the command, the child that writes, or both;
// with "parent" the child's write is made a little later, as by one that was slow. It says "killed" as soon as that is
// done, or "ended, N writes" when the command ended by itself. With "run=" it kills nothing: it runs something else at
// that moment, lets the command go on, and ends with the command's exit status.
package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// late is how long the write of a child that outlives its parent is held back: long enough for another command to
// begin.
const late = 300 * time.Millisecond

func main() {
	log.SetFlags(0)
	log.SetPrefix("killat: ")
	if len(os.Args) > 2 && os.Args[1] == filtered {
		log.Fatal(execFiltered(os.Args[2:]))
	}
	if len(os.Args) < 4 {
		log.Fatal("usage: killat N parent|child|both|run=SHELLCOMMAND COMMAND...")
	}
	n, err := strconv.Atoi(os.Args[1])
	if err != nil {
		log.Fatal(err)
	}

	runtime.LockOSThread() // ptrace is a matter of threads
	cmd := exec.Command("/proc/self/exe", append([]string{filtered}, os.Args[3:]...)...)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true}
	if err := cmd.Start(); err != nil {
		log.Fatal(err)
	}
	t := tracer{root: cmd.Process.Pid, want: n, whom: os.Args[2]}
	if err := t.trace(); err != nil {
		log.Fatal(err)
	}

	if t.killed == 0 {
		fmt.Printf("ended, %d writes\n", t.count)
	} else if strings.HasPrefix(t.whom, "run=") {
		os.Exit(t.status)
	}
}

// filtered is how the command is started: under a filter that stops it at the calls that may be writes, and only there.
// To stop at each call would make a command ten times as slow.
const filtered = "--filtered"

func execFiltered(command []string) error {
	program, err := exec.LookPath(command[0])
	if err != nil {
		return err
	}
	filter := []unix.SockFilter{{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}} // seccomp_data.nr
	calls := []uint32{unix.SYS_WRITE, unix.SYS_PWRITE64, unix.SYS_SENDTO}
	for i, nr := range calls {
		filter = append(filter,
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jt: uint8(len(calls) - i), K: nr})
	}
	filter = append(filter, unix.SockFilter{Code: unix.BPF_RET, K: unix.SECCOMP_RET_ALLOW},
		unix.SockFilter{Code: unix.BPF_RET, K: unix.SECCOMP_RET_TRACE})
	rules := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	runtime.LockOSThread() // which has the filter, and becomes the command
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0,
		uintptr(unsafe.Pointer(&rules))); errno != 0 {
		return os.NewSyscallError("seccomp", errno)
	}
	return unix.Exec(program, command, os.Environ())
}

type tracer struct {
	root, want   int
	whom         string
	count        int
	killed, held int // the thread at whose write it happened; it is held until the root is gone
	rootGone     bool
	status       int // the root's exit status
}

func (t *tracer) trace() error {
	var status unix.WaitStatus
	if _, err := unix.Wait4(t.root, &status, 0, nil); err != nil {
		return err
	}
	// Without its tracer the command would go on, and none of its writes would be one.
	options := unix.PTRACE_O_EXITKILL | unix.PTRACE_O_TRACESECCOMP | unix.PTRACE_O_TRACECLONE |
		unix.PTRACE_O_TRACEFORK | unix.PTRACE_O_TRACEVFORK | unix.PTRACE_O_TRACEEXEC
	if err := unix.PtraceSetOptions(t.root, options); err != nil {
		return err
	}
	if err := unix.PtraceCont(t.root, 0); err != nil {
		return err
	}

	for {
		pid, err := unix.Wait4(-1, &status, unix.WALL, nil)
		if errors.Is(err, unix.ECHILD) {
			return nil
		}
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}

		if status.Exited() || status.Signaled() {
			if pid == t.root {
				t.rootGone, t.status = true, status.ExitStatus()
			}
			if t.rootGone && t.held != 0 {
				time.Sleep(late)
				_ = unix.PtraceCont(t.held, 0)
				t.held = 0
			}
			continue
		}

		signal := 0
		switch s := status.StopSignal(); s {
		case unix.SIGTRAP: // an event
			if status.TrapCause() == unix.PTRACE_EVENT_SECCOMP && t.atWrite(pid) && t.kill(pid) {
				continue
			}
		case unix.SIGSTOP: // a thread that begins
		default:
			signal = int(s)
		}

		_ = unix.PtraceCont(pid, signal) // ESRCH: killed meanwhile
	}
}

// atWrite counts, and reports whether this is the write.
func (t *tracer) atWrite(pid int) bool {
	var info struct { // struct ptrace_syscall_info (include/uapi/linux/ptrace.h)
		op   uint8
		_    [7]uint8
		_    [2]uint64
		nr   uint64
		args [6]uint64
		_    [2]uint64
	}

	const getSyscallInfo, seccomp = 0x420e, 3
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, getSyscallInfo, uintptr(pid), unsafe.Sizeof(info),
		uintptr(unsafe.Pointer(&info)), 0, 0)
	if errno != 0 || info.op != seccomp {
		return false
	}
	switch info.nr {
	case unix.SYS_WRITE, unix.SYS_PWRITE64:
		target, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, info.args[0]))
		if !strings.HasPrefix(target, "/sys/") {
			return false
		}
	case unix.SYS_SENDTO:
		var header [16]byte
		if _, err := unix.PtracePeekData(pid, uintptr(info.args[1]), header[:]); err != nil {
			return false
		}
		if kind := binary.NativeEndian.Uint16(header[4:]); kind < 16 || kind&3 == 2 { // RTM_GET*
			return false
		}
	default:
		return false
	}

	t.count++
	return t.count == t.want
}

// kill reports whether the thread is to stay where it is.
func (t *tracer) kill(pid int) bool {
	t.killed = pid
	if other, ok := strings.CutPrefix(t.whom, "run="); ok {
		out, err := exec.Command("sh", "-c", other).CombinedOutput()
		fmt.Printf("killed\n%s", out)
		if err != nil {
			log.Fatalf("%s: %v", other, err)
		}
		return false
	}

	writer := pid
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid)); err == nil {
		for line := range strings.Lines(string(b)) {
			if id, ok := strings.CutPrefix(line, "Tgid:"); ok {
				writer, _ = strconv.Atoi(strings.TrimSpace(id))
			}
		}
	}

	if t.whom != "parent" {
		_ = unix.Kill(writer, unix.SIGKILL)
	}
	if t.whom != "child" {
		_ = unix.Kill(t.root, unix.SIGKILL)
	}
	fmt.Println("killed")
	if t.whom == "parent" && writer != t.root {
		t.held = pid
	}
	return true
}
