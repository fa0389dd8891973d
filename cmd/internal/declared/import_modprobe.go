package declared

import (
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"viaduct/cmd/internal/hostfile"
	"viaduct/iommu"
	"viaduct/sriov"
)

// modprobeDirs are where modprobe.d(5) is, those first that hide others.
var modprobeDirs = [...]string{
	"etc/modprobe.d", "run/modprobe.d", "usr/local/lib/modprobe.d", "usr/lib/modprobe.d", "lib/modprobe.d",
}

// vfOptions are the options of drivers that make VFs when they are loaded, each of all PFs of its driver.
var vfOptions = [...]string{"max_vfs", "num_vfs"}

// moduleOption is one option of a module, and where it is set.
type moduleOption struct{ module, name, value, where string }

// modprobe: ids that vfio-pci takes when it is loaded, and VFs that drivers make then, by modprobe.d(5) and by the
// kernel's command line.
func (i *importer) modprobe() error {
	options, err := i.moduleOptions()
	if err != nil {
		return err
	}
	for _, o := range options {
		switch {
		case o.module == "vfio_pci" && o.name == "ids":
			for one := range strings.SplitSeq(o.value, ",") {
				if err := i.claimed(o.where, one); err != nil {
					return err
				}
			}
		case slices.Contains(vfOptions[:], o.name):
			if err := i.madeByDriver(&o); err != nil {
				return err
			}
		case strings.HasPrefix(o.module, "vfio"):
			i.note("%s: %s=%s of %s is an option, not a device: it is not imported", o.where, o.name, o.value, o.module)
		}
	}
	return nil
}

// moduleOptions are the options of modules that matter here.
func (i *importer) moduleOptions() ([]moduleOption, error) {
	var out []moduleOption
	names, content, err := i.files(".conf", modprobeDirs[:]...)
	if err != nil {
		return nil, err
	}
	for _, n := range names {
		for line := range strings.Lines(strings.ReplaceAll(content[n], "\\\n", " ")) {
			f := strings.Fields(line)
			if len(f) < 2 {
				continue
			}
			module := strings.ReplaceAll(f[1], "-", "_")
			if f[0] == "softdep" && slices.ContainsFunc(f[2:], iommu.IsVFIODriver) {
				i.note("/%s: softdep %s loads vfio-pci first; the declared host does not need that", n, f[1])
			}
			if f[0] != "options" {
				continue
			}
			for _, option := range f[2:] {
				name, value, _ := strings.Cut(option, "=")
				out = append(out, moduleOption{module, name, strings.Trim(value, `"`), "/" + n})
			}
		}
	}

	line, err := i.m.host.String("proc/cmdline")
	if err != nil {
		i.note("the kernel's command line could not be read: %v", err)
		return out, nil
	}
	for word := range strings.FieldsSeq(line) {
		key, value, _ := strings.Cut(word, "=")
		if module, name, ok := strings.Cut(key, "."); ok {
			module = strings.ReplaceAll(module, "-", "_")
			out = append(out, moduleOption{module, name, value, "the kernel's command line"})
		}
	}
	return out, nil
}

// claimed declares the devices that vfio-pci takes by ids: VENDOR:DEVICE[:SUBVENDOR[:SUBDEVICE[:CLASS[:MASK]]]].
func (i *importer) claimed(where, ids string) error {
	f := strings.Split(strings.TrimSpace(ids), ":")
	if len(f) < 2 {
		i.note("%s: invalid ids=%s: want VENDOR:DEVICE", where, ids)
		return nil
	}
	var n [6]uint64
	n[2], n[3] = 0xffffffff, 0xffffffff
	for k := range min(len(f), len(n)) {
		value, err := strconv.ParseUint(f[k], 16, 32)
		if err != nil {
			i.note("%s: invalid ids=%s: want VENDOR:DEVICE", where, ids)
			return nil
		}
		n[k] = value
	}

	var found []*iommu.Device
	i.m.topology.All(func(d *iommu.Device) bool {
		any16 := func(want uint64, is uint16) bool { return want == 0xffffffff || want == uint64(is) }
		if d.PCI && d.PhysFn == nil && any16(n[0], d.Vendor) && any16(n[1], d.Device) &&
			any16(n[2], d.Subvendor) && any16(n[3], d.Subdevice) && (uint64(d.Class)^n[4])&n[5] == 0 {
			found = append(found, d)
		}
		return true
	})
	if len(found) == 0 {
		match, _, err := i.match(strings.ToLower(f[0] + ":" + f[1]))
		if err != nil || len(f) > 2 {
			// By its two first numbers it would be another device.
			i.note("%s: ids=%s: host.yaml cannot select this", where, ids)
			return nil //nolint:nilerr // it is noted
		}
		i.note("%s: no device has ids %s: declared nevertheless", where, ids)
		return i.addDevice(where, hostfile.Device{Select: match}, nil)
	}
	for _, d := range found {
		if err := i.addDevice(fmt.Sprintf("%s: ids=%s", where, ids), hostfile.Device{}, d); err != nil {
			return err
		}
	}
	return nil
}

// madeByDriver declares the PFs of a driver that makes VFs: one number is for all of them, several are in the order of
// their addresses.
func (i *importer) madeByDriver(o *moduleOption) error {
	where := path.Join(o.where) + ": " + o.name + " of " + o.module
	var counts []int
	for one := range strings.SplitSeq(o.value, ",") {
		count, err := strconv.Atoi(one)
		if err != nil || count < 0 {
			i.note("%s: invalid number %q of VFs", where, o.value)
			return nil
		}
		counts = append(counts, count)
	}
	var pfs []*iommu.Device
	i.m.topology.All(func(d *iommu.Device) bool {
		if d.SRIOV != nil && strings.ReplaceAll(d.Driver, "-", "_") == o.module {
			pfs = append(pfs, d)
		}
		return true
	})
	if len(pfs) == 0 {
		i.note("%s: no PF has this driver now", where)
		return nil
	}

	slices.SortFunc(pfs, func(a, b *iommu.Device) int { return a.Address.Compare(b.Address) })
	for k, d := range pfs {
		count := counts[0]
		if len(counts) > 1 {
			if k >= len(counts) {
				break
			}
			count = counts[k]
		}
		if count == 0 {
			continue
		}
		pf := hostfile.PF{Count: count, VFs: []hostfile.VFs{{Driver: sriov.UseHome}}}
		if err := i.addPF(where, pf, d); err != nil {
			return err
		}
	}
	return nil
}
