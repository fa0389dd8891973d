package gather

import (
	"bytes"
	"path"
	"slices"
	"strings"

	"viaduct/cmd/internal/doctor"
	"viaduct/iommu"
)

// needed are the modules that passthrough may need.
var needed = []string{"vfio", "vfio_pci", "vfio_pci_core", "vfio_iommu_type1", "iommufd"}

// modules reads which modules there are, and what keeps them from being loaded.
func (g *gatherer) modules(f *doctor.Facts) {
	f.Params = map[string]string{}
	for _, p := range iommu.ModuleParameters {
		if v, err := g.String(p); err == nil {
			f.Params[p] = strings.TrimSpace(v)
		}
	}

	available, builtin, known := g.lists(f.Release)
	there := map[string]doctor.Module{}
	for _, name := range needed {
		m := doctor.Module{
			Loaded: g.Exists("sys/module/" + name), Builtin: builtin[name], Available: available[name],
		}
		there[name] = m
	}
	// What is built in has no entry of its own in sysfs without parameters; its driver has.
	if m := there["vfio_pci"]; g.Exists("sys/bus/pci/drivers/vfio-pci") && !m.There() {
		m.Builtin = true
		there["vfio_pci"] = m
	}
	// Without the lists it is not known of a module that it is missing.
	if known || there["vfio_pci"].There() && (there["vfio_iommu_type1"].There() || there["iommufd"].There()) {
		f.Modules = there
	}
	f.Rules = g.rules(f.Words)
}

// lists are the modules of a kernel that can be loaded, and those that are built in, by name.
func (g *gatherer) lists(release string) (available, builtin map[string]bool, known bool) {
	for _, dir := range []string{"lib/modules", "usr/lib/modules"} {
		dep, err := g.Read(path.Join(dir, release, "modules.dep"))
		if err != nil || release == "" {
			continue
		}
		in, _ := g.Read(path.Join(dir, release, "modules.builtin"))
		return moduleNames(dep), moduleNames(in), true
	}
	return nil, nil, false
}

// moduleNames are the names of the modules at the beginnings of lines, as kernel/drivers/vfio/pci/vfio-pci.ko.xz.
func moduleNames(list []byte) map[string]bool {
	out := map[string]bool{}
	for line := range bytes.Lines(list) {
		file, _, _ := bytes.Cut(bytes.TrimSpace(line), []byte{':'})
		name, _, ok := strings.Cut(path.Base(string(file)), ".ko")
		if ok {
			out[underscored(name)] = true
		}
	}
	return out
}

// underscored is a module's name as the kernel has it: modprobe takes dashes too.
func underscored(name string) string { return strings.ReplaceAll(name, "-", "_") }

// rules are the lines of modprobe's files, and the words of the command line, that keep a needed module from being
// loaded (modprobe.d(5); kernel/module/main.c, module_blacklist).
func (g *gatherer) rules(words []string) []doctor.ModuleRule {
	var out []doctor.ModuleRule
	for _, w := range words {
		key, value, _ := strings.Cut(w, "=")
		if key != "modprobe.blacklist" && key != "module_blacklist" {
			continue
		}
		for name := range strings.SplitSeq(value, ",") {
			if slices.Contains(needed, underscored(name)) {
				out = append(out, doctor.ModuleRule{
					Module: underscored(name), File: "proc/cmdline", Line: w, Hard: key == "module_blacklist",
				})
			}
		}
	}

	seen := map[string]bool{}
	for _, dir := range iommu.ModprobeDirs {
		names, err := g.Names(dir)
		if err != nil {
			continue
		}
		for _, n := range names {
			// A file hides those of the same name in the folders after it.
			if !strings.HasSuffix(n, ".conf") || seen[n] {
				continue
			}
			seen[n] = true
			text, err := g.Read(path.Join(dir, n))
			if err != nil {
				continue
			}
			out = append(out, modprobeRules(path.Join(dir, n), string(text))...)
		}
	}

	return out
}

// doNothing are commands that load no module.
var doNothing = []string{"/bin/false", "/bin/true", "/usr/bin/false", "/usr/bin/true", ":", "true", "false"}

// modprobeRules are the lines of one file that are about a needed module. Some hosts install VFIO's modules by a
// command of their own, of which it is not known what it does, unless it is one that does nothing.
func modprobeRules(file, text string) []doctor.ModuleRule {
	var out []doctor.ModuleRule
	for line := range strings.Lines(strings.ReplaceAll(text, "\\\n", " ")) {
		line, _, _ = strings.Cut(strings.TrimSpace(line), "#")
		f := strings.Fields(line)
		if len(f) < 2 || !slices.Contains(needed, underscored(f[1])) {
			continue
		}
		r := doctor.ModuleRule{Module: underscored(f[1]), File: file, Line: strings.Join(f, " ")}
		switch f[0] {
		case "blacklist":
			out = append(out, r)
		case "install":
			r.Hard = len(f) > 2 && slices.Contains(doNothing, f[2])
			r.Own = !r.Hard
			out = append(out, r)
		}
	}
	return out
}

// unsigned are the modules beside the kernel's own that bear no signature. One that is compressed does not tell.
func (g *gatherer) unsigned(release string) []string {
	const mark = "~Module signature appended~\n"
	var out []string
	for _, below := range []string{"updates/dkms", "updates", "extra"} {
		dir := path.Join("lib/modules", release, below)
		names, err := g.Names(dir)
		if err != nil {
			continue
		}
		for _, n := range names {
			if !strings.HasSuffix(n, ".ko") {
				continue
			}
			file, err := g.File(path.Join(dir, n))
			if err != nil {
				continue
			}
			end := make([]byte, len(mark))
			_, err = file.ReadAt(end, max(0, file.Size()-int64(len(mark))))
			file.Close()
			if err == nil && string(end) != mark {
				out = append(out, path.Join(dir, n))
			}
		}
	}
	return out
}
