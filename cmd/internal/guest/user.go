package guest

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"viaduct/internal/host"
	"viaduct/iommu"
)

// User is who a process runs as, as far as opening files goes.
type User struct {
	UID  int
	gids []int // its group and those beside it
	any  bool  // it may open all files, by CAP_DAC_OVERRIDE
}

// UserOf reads who a process runs as (proc_pid_status(5)); false if that cannot be read.
func UserOf(h *iommu.Host, pid int) (u User, known bool) {
	dir := fmt.Sprintf("proc/%d", pid)
	status, err := h.String(dir + "/status")
	if err != nil {
		return u, false
	}

	uids := false
	for line := range strings.Lines(status) {
		name, value, _ := strings.Cut(line, ":")
		fields := strings.Fields(value)
		switch name {
		case "Uid", "Gid":
			// Real, effective, saved, and of the file system.
			if len(fields) < 4 {
				return u, false
			}
			id, err := strconv.Atoi(fields[3])
			if err != nil {
				return u, false
			}
			if name == "Gid" {
				u.gids = append(u.gids, id)
			} else {
				u.UID, uids = id, true
			}
		case "Groups":
			for _, f := range fields {
				if id, err := strconv.Atoi(f); err == nil {
					u.gids = append(u.gids, id)
				}
			}
		case "CapEff":
			// CAP_DAC_OVERRIDE (include/uapi/linux/capability.h)
			const override = 1
			caps, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64)
			u.any = err == nil && caps>>override&1 == 1 && inFirstNamespace(h, dir)
		}
	}

	return u, uids
}

// Opens reports whether it may open a file for reading and writing, by its owner and mode.
func (u User) Opens(o host.Owner) bool {
	const readWrite = 0o6
	switch {
	case u.any:
		return true
	case u.UID == o.UID:
		return o.Mode>>6&readWrite == readWrite
	case slices.Contains(u.gids, o.GID):
		return o.Mode>>3&readWrite == readWrite
	}
	return o.Mode&readWrite == readWrite
}
