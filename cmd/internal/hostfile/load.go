package hostfile

import (
	"errors"
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
