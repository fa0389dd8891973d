package node

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"viaduct/iommu"
)

// Need is a folder that has to be the host's own.
type Need struct {
	Path   string
	Writes bool
	For    string
}

// Needs are the folders that serving a node takes.
func Needs(kubeletDir, cdiDir string) []Need {
	return []Need{
		{"/sys", true, "binding drivers and reading devices"},
		{"/dev", false, "the nodes of VFIO"},
		{"/etc/viaduct", false, "what is declared"},
		{"/run/viaduct", true, "the leases of this boot"},
		{"/var/lib/viaduct", true, "the leases that outlive a boot"},
		{kubeletDir, true, "the kubelet's sockets"},
		{cdiDir, true, "what containers are given"},
	}
}

// Preflight refuses to serve where not all can be seen: a device that somebody uses would be taken for free. In a
// container that takes the host's process namespace and these folders of the host.
func Preflight(h *iommu.Host, needs []Need) error {
	var errs []error
	// PROC_PID_INIT_INO of include/uapi/linux/nsfs.h, the kernel's first.
	const first = "pid:[4026531836]"
	if now, err := os.Readlink("/proc/self/ns/pid"); err != nil || now != first {
		errs = append(errs, fmt.Errorf("the processes of the host cannot be seen, so a device that one of them uses "+
			"would be taken for free: set hostPID: true (the process namespace is %s)", now))
	}
	mine, err1 := os.Readlink("/proc/self/ns/net")
	if theirs, err2 := os.Readlink("/proc/1/ns/net"); err1 != nil || err2 != nil || mine != theirs {
		errs = append(errs, errors.New("the interfaces of the host's PFs cannot be seen, through which VFs are "+
			"configured: set hostNetwork: true, and add the capability SYS_PTRACE"))
	}
	for _, n := range needs {
		if n.Writes {
			// Which is the host's only if process 1 sees it too.
			_ = os.MkdirAll(n.Path, 0o755)
		}
		if err := n.check(); err != nil {
			errs = append(errs, fmt.Errorf("%s, for %s: %w", n.Path, n.For, err))
		}
	}
	if !h.Live() {
		errs = append(errs, errors.New("this is a captured host, which cannot be served"))
	}
	return errors.Join(errs...)
}

// check refuses a folder that is not there, is not the host's, or cannot be written to.
func (n *Need) check() error {
	var mine unix.Stat_t
	if err := unix.Stat(n.Path, &mine); err != nil {
		return fmt.Errorf("it is not there (%w): mount the host's, or make it", err)
	}
	host, err := atHost("/proc/1/root", n.Path)
	if errors.Is(err, unix.ENOENT) {
		return errors.New("the host has none: mount the host's, or make it there")
	}
	if err != nil {
		return fmt.Errorf("it cannot be compared with the host's (%w): add the capability SYS_PTRACE", err)
	}
	// A filesystem of the kernel's own, as sysfs, is the same in each mount.
	kernels := n.Path == "/sys"
	if !kernels && (mine.Dev != host.Dev || mine.Ino != host.Ino) {
		return errors.New("it is not the host's: mount it with hostPath")
	}
	if !n.Writes {
		return nil
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(n.Path, &fs); err != nil {
		return err
	}
	if fs.Flags&unix.ST_RDONLY != 0 {
		return errors.New("it is mounted read-only: mount it so that it can be written to")
	}
	if err := unix.Access(n.Path, unix.W_OK); err != nil && !strings.HasPrefix(n.Path, "/sys") {
		return err
	}
	return nil
}

// atHost is what the process whose root this is sees at a path: what process 1 sees is the host's. A link there, as
// /var/run is one, leads to a place below that root.
func atHost(root, path string) (st unix.Stat_t, err error) {
	top, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return st, err
	}
	defer func() { _ = unix.Close(top) }()
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT}
	fd, err := unix.Openat2(top, path, &how)
	if err != nil {
		return st, err
	}
	defer func() { _ = unix.Close(fd) }()
	return st, unix.Fstat(fd, &st)
}
