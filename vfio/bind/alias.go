package bind

import (
	"bytes"
	"errors"
	"fmt"
	"path"
	"strings"
	"sync"

	"viaduct/internal/host"
	"viaduct/iommu"
)

// The driver that passes any device through, and its module.
const (
	generic       = "vfio-pci"
	genericModule = "vfio_pci"
)

// matchModules returns the modules of a modules.alias file whose alias matches, the most specific first: the one with
// the fewest wildcards. A module's several matches count once, as its best.
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

// readAliases are the aliases of the running kernel's modules, those that are built in included, as modules.alias has
// them; empty if there are no such files.
func readAliases(h *iommu.Host) ([]byte, error) {
	release, err := h.String("proc/sys/kernel/osrelease")
	if host.Absent(err) {
		// Who captured the host did not look for it.
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for _, dir := range []string{"lib/modules", "usr/lib/modules"} {
		loadable, err := h.Read(path.Join(dir, release, "modules.alias"))
		if host.Absent(err) {
			continue
		}
		builtin, failed := h.Read(path.Join(dir, release, "modules.builtin.modinfo"))
		if err != nil || failed != nil && !host.Absent(failed) {
			return nil, errors.Join(err, failed)
		}
		return append(builtinAliases(builtin), loadable...), nil
	}
	return nil, nil
}

// builtinAliases makes lines of modules.alias out of modules.builtin.modinfo, which holds MODULE.KEY=VALUE, each ended
// by a zero byte.
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

// driverOf is the name of the PCI driver that a loaded module registered, "" if it is not loaded or has none. The two
// names differ: module vfio_pci has driver vfio-pci.
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

func registered(h *iommu.Host, driver string) (bool, error) {
	return h.Has(path.Join("sys/bus/pci/drivers", driver))
}

// modules finds the drivers and modules for devices, and remembers what it found for one command.
type modules struct {
	host    *iommu.Host
	loading sync.Mutex // held while one is loaded
	tried   sync.Map   // modules and aliases that brought no driver

	mu      sync.Mutex
	read    bool
	aliases []byte
	found   map[string][]string // by alias
}

// candidates are the modules for an alias. The vfio_pci: aliases are of drivers/vfio/pci, as
// include/linux/mod_devicetable.h has them: of modules that pass a device through, with vfio_pci as the last resort.
func (m *modules) candidates(alias string) ([]string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	// A hundred VFs have one alias, and the file a hundred thousand lines.
	if modules, known := m.found[alias]; known {
		return modules, nil
	}
	if !m.read {
		var err error
		if m.aliases, err = readAliases(m.host); err != nil {
			return nil, err
		}
		m.read, m.found = true, map[string][]string{}
	}
	m.found[alias] = matchModules(m.aliases, alias)
	return m.found[alias], nil
}

// useless reports whether a module or alias was loaded, or tried to be, and brought no driver.
func (m *modules) useless(module string) bool {
	_, tried := m.tried.Load(module)
	return tried
}

func devicePath(a iommu.Address) string { return path.Join("sys/bus/pci/devices", a.String()) }

// vfio finds the VFIO driver for a device: the one that is wished for, or with Auto the best. With a module, that has
// to be loaded first, and the driver's name is a guess until it is.
func (m *modules) vfio(d *iommu.Device, wish string) (driver, module string, err error) {
	switch wish {
	case None:
		return None, "", nil
	case Auto:
	default:
		there, err := registered(m.host, wish)
		if !there {
			module = strings.ReplaceAll(wish, "-", "_")
		}
		return wish, module, err
	}

	modules, err := m.candidates("vfio_" + d.Modalias())
	if err != nil {
		return "", "", err
	}
	for _, name := range modules {
		if name == genericModule {
			break
		}
		if driver := driverOf(m.host, name); driver != "" {
			return driver, "", nil
		}
		if !m.useless(name) {
			return name, name, nil
		}
	}
	// Also where the variant does not load.
	return m.vfio(d, generic)
}

// home finds the driver that the host would use for a device: one that is there, else what modprobe loads for it, as
// udev has it do, less what is blacklisted; "" leaves the choice to the kernel.
func (m *modules) home(d *iommu.Device) (driver, module string, err error) {
	modules, err := m.candidates(d.Modalias())
	if err != nil {
		return "", "", err
	}
	for _, name := range modules {
		if driver := driverOf(m.host, name); driver != "" {
			return driver, "", nil
		}
	}
	if len(modules) == 0 || m.useless(d.Modalias()) {
		return "", "", nil
	}
	return "", d.Modalias(), nil
}
