package main

import (
	"errors"
	"fmt"
	"os"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"viaduct/cmd/internal/vmm"
	"viaduct/iommu"
)

// runAs is the user that run starts the VMM as.
type runAs struct {
	name     string // as in "qemu:kvm", which the devices' nodes belong to
	uid, gid int
	groups   []uint32 // all that the user is in, but for gid
	env      []string
}

// parseRunAs reads USER[:GROUP]: the group is the user's own if none is given.
func parseRunAs(text string) (*runAs, error) {
	name, group, both := strings.Cut(text, ":")
	u, err := user.Lookup(name)
	if _, unknown := errors.AsType[user.UnknownUserError](err); unknown {
		u, err = user.LookupId(name)
	}
	if err != nil {
		return nil, fmt.Errorf("unknown user %q", name)
	}
	r := &runAs{env: []string{"HOME=" + u.HomeDir, "USER=" + u.Username, "LOGNAME=" + u.Username}}
	gid := u.Gid
	if both {
		g, err := user.LookupGroup(group)
		if err != nil {
			g, err = user.LookupGroupId(group)
		}
		if err != nil {
			return nil, fmt.Errorf("unknown group %q", group)
		}
		gid = g.Gid
	}
	r.name = u.Uid + ":" + gid
	r.uid, err = strconv.Atoi(u.Uid)
	own, err1 := strconv.Atoi(gid)
	all, err2 := u.GroupIds()
	if err := errors.Join(err, err1, err2); err != nil {
		return nil, fmt.Errorf("the groups of %s: %w", u.Username, err)
	}
	r.gid = own
	for _, text := range all {
		if n, err := strconv.ParseUint(text, 10, 32); err == nil && int(n) != r.gid {
			r.groups = append(r.groups, uint32(n))
		}
	}
	return r, nil
}

// credential is what a process of the user has, and nothing of root.
func (r *runAs) credential() *syscall.Credential {
	return &syscall.Credential{Uid: uint32(r.uid), Gid: uint32(r.gid), Groups: r.groups}
}

// environment is an environment as the user's.
func (r *runAs) environment(env []string) []string {
	env = slices.DeleteFunc(env, func(kv string) bool {
		key, _, _ := strings.Cut(kv, "=")
		return slices.ContainsFunc(r.env, func(own string) bool { return strings.HasPrefix(own, key+"=") })
	})
	return append(env, r.env...)
}

// letLock lets a process that was started as another user lock all of its memory, as VFIO does with its guest's.
func letLock(pid int) error {
	all := unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}
	if err := unix.Prlimit(pid, unix.RLIMIT_MEMLOCK, &all, nil); err != nil {
		return fmt.Errorf("raise the limit of memory that process %d may lock: %w", pid, err)
	}
	return nil
}

// needsMore says which nodes a VMM needs that is not root's, beside those of its devices, and may not open; "" if none.
func needsMore(h *iommu.Host, format *vmm.Format, owner string) string {
	if owner == "" || format == nil || !format.IOMMUFD {
		return ""
	}
	const node = "dev/iommu"
	o, err := h.Owner(node)
	if err != nil || !o.Private() {
		return ""
	}
	return "/" + node + " is root's alone, and the VMM of " + owner + " needs it: a udev rule gives it, e.g. " +
		`KERNEL=="iommu", GROUP="kvm", MODE="0660"`
}

// mayRunAs refuses to start a VMM as somebody else without being root.
func mayRunAs() error {
	if os.Geteuid() != 0 {
		return errors.New("run --user takes root, as it starts the VMM as somebody else")
	}
	return nil
}
