package hostfile

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"viaduct/internal/host"
	"viaduct/iommu"
)

// File and Dir are where a host is declared, below its root.
const (
	File = "etc/viaduct/host.yaml"
	Dir  = "etc/viaduct/host.d"
)

// Load reads what a host declares: File, then the files of Dir by name. A host without any declares nothing. Its errors
// are as [Parse] has them, of all files.
func Load(h *iommu.Host) (*Host, error) {
	names, err := h.Names(Dir)
	if err != nil && !host.Absent(err) {
		return nil, err
	}
	if err == nil {
		if err := trusted(h, Dir, false); err != nil {
			return nil, err
		}
	}
	slices.Sort(names)
	files := []string{File}
	for _, n := range names {
		if strings.HasSuffix(n, ".yaml") && !strings.HasPrefix(n, ".") {
			files = append(files, path.Join(Dir, n))
		}
	}

	all := &Host{}
	var errs []error
	for _, f := range files {
		err := trusted(h, f, true)
		if host.Absent(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		content, err := h.Read(f)
		if host.Absent(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		one, err := Parse("/"+f, content)
		errs = append(errs, err)
		all.Protect = append(all.Protect, one.Protect...)
		all.PFs, all.Devices = append(all.PFs, one.PFs...), append(all.Devices, one.Devices...)
		all.Roles = append(all.Roles, one.Roles...)
	}

	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return all, all.twice()
}

// trusted refuses a file or folder of a running host that somebody else than root could write, as what it says is done
// as root, and a file that is none to be read: a pipe would have a boot wait for ever.
func trusted(h *iommu.Host, name string, regular bool) error {
	if !h.Live() {
		return nil
	}
	for at := name; ; at = path.Dir(at) {
		o, err := h.Owner(at)
		switch {
		case err != nil:
			return err
		case at == name && regular && !o.Regular:
			return fmt.Errorf("/%s is not a regular file, so viaduct does not read it", name)
		case o.UID != 0 || o.Mode&0o022 != 0 || o.ACL:
			return fmt.Errorf("viaduct does not read /%s, because others than root may write /%s (owner %d, mode "+
				"%04o%s): chown root "+
				"and chmod go-w it", name, at, o.UID, o.Mode, map[bool]string{true: ", access list: setfacl -b"}[o.ACL])
		case at == path.Dir(File):
			return nil
		}
	}
}
