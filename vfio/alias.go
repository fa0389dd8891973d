package vfio

import (
	"bytes"
	"fmt"
	"path"
	"strings"

	"viaduct/iommu"
)

// The driver that passes any device through, and its module.
const (
	generic       = "vfio-pci"
	genericModule = "vfio_pci"
)

// matchModules returns the modules of a modules.alias file whose alias matches, the most specific first: the one with the
// fewest wildcards. A module's several matches count once, as its best.
func matchModules(aliases []byte, modalias string) []string {
	prefix, _, _ := strings.Cut(modalias, ":")
	key := []byte("alias " + prefix + ":")
	type match struct {
		module    string
		wildcards int
	}
	var found []match
	for line := range bytes.Lines(aliases) {
		if !bytes.HasPrefix(line, key) {
			continue
		}
		f := strings.Fields(string(line))
		if len(f) != 3 || !glob(f[1], modalias) {
			continue
		}
		found = append(found, match{f[2], strings.Count(f[1], "*")})
	}
	var modules []string
	for len(found) > 0 {
		best := 0
		for i := range found {
			if found[i].wildcards < found[best].wildcards {
				best = i
			}
		}
		m := found[best].module
		modules = append(modules, m)
		kept := found[:0]
		for _, f := range found {
			if f.module != m {
				kept = append(kept, f)
			}
		}
		found = kept
	}
	return modules
}

// glob matches the patterns of modules.alias: * and ?, and [a-z] sets as few USB aliases have.
func glob(pattern, s string) bool {
	if ok, err := path.Match(pattern, s); err == nil && !strings.ContainsAny(s, "/") {
		return ok
	}
	return false
}

// readAliases are the aliases of the running kernel's modules, those that are built in included, as modules.alias has them;
// empty if there are no such files.
func readAliases(h *iommu.Host) ([]byte, error) {
	release, err := h.String("proc/sys/kernel/osrelease")
	if err != nil {
		return nil, err
	}
	for _, dir := range []string{"lib/modules", "usr/lib/modules"} {
		loadable, err := h.Read(path.Join(dir, release, "modules.alias"))
		if err == nil {
			builtin, _ := h.Read(path.Join(dir, release, "modules.builtin.modinfo"))
			return append(builtinAliases(builtin), loadable...), nil
		}
	}
	return nil, nil
}

// builtinAliases makes lines of modules.alias out of modules.builtin.modinfo, which holds MODULE.KEY=VALUE, each ended by a
// zero byte.
func builtinAliases(modinfo []byte) []byte {
	var out []byte
	for entry := range bytes.SplitSeq(modinfo, []byte{0}) {
		key, pattern, _ := bytes.Cut(entry, []byte{'='})
		if module, ok := bytes.CutSuffix(key, []byte(".alias")); ok {
			out = fmt.Appendf(out, "alias %s %s\n", pattern, module)
		}
	}
	return out
}

// driverOf is the name of the PCI driver that a loaded module registered, "" if it is not loaded or has none. The two names
// differ: module vfio_pci has driver vfio-pci.
func driverOf(h *iommu.Host, module string) string {
	names, err := h.Names(path.Join("sys/module", module, "drivers"))
	if err != nil {
		return ""
	}
	for _, n := range names {
		if d, ok := strings.CutPrefix(n, "pci:"); ok {
			return d
		}
	}
	return ""
}

func registered(h *iommu.Host, driver string) bool {
	return h.Exists(path.Join("sys/bus/pci/drivers", driver))
}

// candidates are the modules for a device: with vfio, those that pass it through, with vfio_pci as the last resort, without,
// those that drive it. The vfio_pci: aliases are of drivers/vfio/pci, as include/linux/mod_devicetable.h has them.
func (b *Binder) candidates(d *iommu.Device, vfio bool) ([]string, error) {
	alias := d.Modalias()
	if vfio {
		alias = "vfio_" + alias
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if modules, known := b.modules[alias]; known { // a hundred VFs have one alias, and the file a hundred thousand lines
		return modules, nil
	}
	if b.modules == nil {
		b.modules = map[string][]string{}
		var err error
		if b.aliases, err = readAliases(b.Host); err != nil {
			return nil, err
		}
	}
	b.modules[alias] = matchModules(b.aliases, alias)
	return b.modules[alias], nil
}

func devicePath(a iommu.Address) string { return path.Join("sys/bus/pci/devices", a.String()) }

// chooseVFIO finds the best vfio driver for a device. With a module, that has to be loaded first, and the driver's name is
// a guess until it is.
func (b *Binder) chooseVFIO(d *iommu.Device, wish string) (driver, module string, err error) {
	if wish == None {
		return None, "", nil
	}
	if wish != Auto {
		if registered(b.Host, wish) {
			return wish, "", nil
		}
		return wish, strings.ReplaceAll(wish, "-", "_"), nil
	}
	modules, err := b.candidates(d, true)
	if err != nil {
		return "", "", err
	}
	for _, m := range modules {
		if m == genericModule {
			break
		}
		if driver, module := b.choose(m); !b.useless(module) {
			return driver, module, nil
		}
	}
	return b.chooseVFIO(d, generic) // also where the variant does not load
}

// choose is a module's driver, and the module if it has to be loaded first.
func (b *Binder) choose(name string) (driver, module string) {
	if driver := driverOf(b.Host, name); driver != "" {
		return driver, ""
	}
	return name, name
}

// chooseHome finds the driver that the host would use for a device: one that is there, else what modprobe loads for it, as udev
// has it do, less what is blacklisted; "" leaves the choice to the kernel.
func (b *Binder) chooseHome(d *iommu.Device) (driver, module string, err error) {
	modules, err := b.candidates(d, false)
	if err != nil {
		return "", "", err
	}
	for _, m := range modules {
		if driver := driverOf(b.Host, m); driver != "" {
			return driver, "", nil
		}
	}
	if len(modules) == 0 || b.useless(d.Modalias()) {
		return "", "", nil
	}
	return "", d.Modalias(), nil
}
