package hosttest

import (
	"fmt"
	"os"
	"path"
	"strconv"
)

// startProc gives the host a first process and this one, unless the tree has them.
func (k *Kernel) startProc() {
	k.Process(1, "init")
	k.Process(os.Getpid(), "test")
	if !k.exists("proc/self") {
		k.must(os.Symlink(strconv.Itoa(os.Getpid()), k.at("proc/self")))
	}
	if !k.exists("proc/sys/kernel/osrelease") {
		k.put("proc/sys/kernel/osrelease", "6.12.0\n")
	}
}

// Process starts a process of a name, which has files open: names of the host, or what a link of /proc/PID/fd can say
// else.
func (k *Kernel) Process(pid int, name string, open ...string) {
	dir := path.Join("proc", strconv.Itoa(pid))
	stat := fmt.Sprintf("%d (%s) S 1 1 1 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 %d 0 0 0\n", pid, name, 100+pid)
	for file, content := range map[string]string{
		"comm": name + "\n", "stat": stat, path.Join("task", strconv.Itoa(pid), "stat"): stat,
		"mountinfo": "22 1 259:9 / / rw - ext4 /dev/vdz rw\n", "cmdline": name + "\x00",
	} {
		if !k.exists(path.Join(dir, file)) {
			k.put(path.Join(dir, file), content)
		}
	}

	for kind, inode := range map[string]int{"net": 4026531840, "mnt": 4026531841, "pid": 4026531836} {
		link := path.Join(dir, "ns", kind)
		if !k.exists(link) {
			k.must(os.MkdirAll(k.at(path.Dir(link)), 0o755))
			k.must(os.Symlink(fmt.Sprintf("%s:[%d]", kind, inode), k.at(link)))
		}
	}

	k.must(os.MkdirAll(k.at(path.Join(dir, "fd")), 0o755))
	for i, target := range open {
		k.must(os.Symlink(target, k.at(path.Join(dir, "fd", strconv.Itoa(3+i)))))
	}
}

// End ends a process.
func (k *Kernel) End(pid int) { k.must(os.RemoveAll(k.at(path.Join("proc", strconv.Itoa(pid))))) }
