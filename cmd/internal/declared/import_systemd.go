package declared

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"

	"viaduct/cmd/internal/hostfile"
	"viaduct/iommu"
	"viaduct/sriov"
)

// systemdDirs are where systemd.link(5) and systemd.network(5) are, those first that hide others.
var systemdDirs = [...]string{
	"etc/systemd/network", "run/systemd/network", "usr/local/lib/systemd/network", "usr/lib/systemd/network",
}

// netFile is a .link or .network file with its drop-ins.
type netFile struct {
	name    string // without the leading slash
	match   map[string][]string
	link    map[string]string         // of [Link]
	vfs     map[int]map[string]string // of the [SR-IOV] sections, by VirtualFunction=
	wrong   []string                  // sections of VFs that have no index
	matched bool
}

// systemd: [SR-IOV] sections of systemd.link(5) and systemd.network(5), and SR-IOVVirtualFunctions= of the former. Of
// each kind the first file that matches an interface counts for it.
func (i *importer) systemd() error {
	links, err := i.netFiles(".link")
	if err != nil {
		return err
	}
	networks, err := i.netFiles(".network")
	if err != nil {
		return err
	}
	ports, err := i.ports()
	if err != nil {
		return err
	}

	for n := range ports {
		p := &ports[n]
		var of []*netFile
		for _, files := range [][]*netFile{links, networks} {
			at := slices.IndexFunc(files, func(f *netFile) bool { return f.matches(p) })
			if at < 0 {
				continue
			}
			f := files[at]
			f.matched = true
			if of = append(of, f); f.link["Name"] != "" {
				// What it is called when the .network files are looked at.
				p.name = f.link["Name"]
			}
		}
		if err := i.systemdPF(of, p.pf, nil); err != nil {
			return err
		}
	}

	return i.absent(append(links, networks...))
}

// netFiles are the files with a suffix, each with its drop-ins, by name.
func (i *importer) netFiles(suffix string) ([]*netFile, error) {
	names, content, err := i.files(suffix, systemdDirs[:]...)
	if err != nil {
		return nil, err
	}
	var out []*netFile
	for _, n := range names {
		f := &netFile{
			name: n, match: map[string][]string{}, link: map[string]string{}, vfs: map[int]map[string]string{},
		}
		f.read(content[n])
		var dirs []string
		for _, dir := range systemdDirs {
			dirs = append(dirs, path.Join(dir, path.Base(n)+".d"))
		}
		more, inside, err := i.files(".conf", dirs...)
		if err != nil {
			return nil, err
		}
		for _, d := range more {
			f.read(inside[d])
		}
		for _, index := range f.wrong {
			i.note("/%s: invalid VirtualFunction=%s: want an index", n, index)
		}
		out = append(out, f)
	}
	return out, nil
}

// read adds what a file, or a drop-in, says.
func (f *netFile) read(text string) {
	for _, s := range parseINI(text) {
		switch s.name {
		case "Match":
			for key, value := range s.keys {
				f.match[key] = append(f.match[key], strings.Fields(value)...)
				if value == "" {
					// Which takes back what was said before.
					f.match[key] = nil
				}
			}
		case "Link":
			maps.Copy(f.link, s.keys)
		case "SR-IOV":
			index, err := strconv.Atoi(s.keys["VirtualFunction"])
			if err != nil || index < 0 {
				f.wrong = append(f.wrong, s.keys["VirtualFunction"])
				continue
			}
			if f.vfs[index] == nil {
				f.vfs[index] = map[string]string{}
			}
			maps.Copy(f.vfs[index], s.keys)
		}
	}
}

// declaresVFs reports whether a file is one for PFs.
func (f *netFile) declaresVFs() bool { return len(f.vfs) > 0 || f.link["SR-IOVVirtualFunctions"] != "" }

// matches reports whether a file is an interface's. What else it asks for than what an interface is (the host, the
// kernel, a property) is taken to hold: see unasked.
func (f *netFile) matches(p *port) bool {
	any := false
	for key, patterns := range f.match {
		if len(patterns) == 0 {
			continue
		}
		var ok bool
		switch key {
		case "MACAddress":
			ok = slices.ContainsFunc(patterns, func(mac string) bool { return strings.EqualFold(mac, p.mac) })
		case "PermanentMACAddress":
			ok = slices.ContainsFunc(patterns, p.hasMAC)
		case "Path":
			ok = globOrNot(patterns, p.address)
		case "Driver":
			ok = globOrNot(patterns, p.driver)
		case "Type":
			ok = globOrNot(patterns, "ether")
		case "Name", "OriginalName":
			ok = globOrNot(patterns, p.name)
		default:
			continue
		}
		if any = true; !ok {
			return false
		}
	}
	return any
}

// globOrNot is glob, where a ! before the first pattern turns it round.
func globOrNot(patterns []string, text string) bool {
	if first, not := strings.CutPrefix(patterns[0], "!"); not {
		return !glob(append([]string{first}, patterns[1:]...), text)
	}
	return glob(patterns, text)
}

// unasked are the keys of a file's [Match] that matches does not look at.
func (f *netFile) unasked() []string {
	var out []string
	for key, patterns := range f.match {
		switch key {
		case "MACAddress", "PermanentMACAddress", "Path", "Driver", "Type", "Name", "OriginalName":
		default:
			if len(patterns) > 0 {
				out = append(out, key+"=")
			}
		}
	}
	slices.Sort(out)
	return out
}

// systemdPF declares the PF that files are of: one that is there, or, if d is nil, what match names.
func (i *importer) systemdPF(files []*netFile, d *iommu.Device, match *hostfile.Match) error {
	pf := hostfile.PF{}
	var where []string
	vfs := map[int]map[string]string{}
	for _, f := range files {
		if !f.declaresVFs() {
			continue
		}
		where = append(where, "/"+f.name)
		if keys := f.unasked(); len(keys) > 0 {
			i.note("/%s: viaduct does not check %s of its [Match]", f.name, strings.Join(keys, " "))
		}
		if text := f.link["SR-IOVVirtualFunctions"]; text != "" {
			count, err := strconv.Atoi(text)
			if err != nil || count < 0 {
				i.note("/%s: invalid SR-IOVVirtualFunctions=%s: want a number", f.name, text)
			}
			pf.Count = max(pf.Count, count)
		}
		if text := f.link["MTUBytes"]; text != "" {
			mtu, err := strconv.Atoi(text)
			if err != nil {
				i.note("/%s: MTUBytes=%s is not imported: declare it as mtu", f.name, text)
			}
			pf.MTU = mtu
		}
		for index, keys := range f.vfs {
			if vfs[index] == nil {
				vfs[index] = map[string]string{}
			}
			maps.Copy(vfs[index], keys)
		}
	}
	if len(where) == 0 {
		return nil
	}

	for _, index := range slices.Sorted(maps.Keys(vfs)) {
		vf, err := i.systemdVF(strings.Join(where, ", "), index, vfs[index])
		if err != nil {
			return err
		}
		pf.Count, pf.VFs = max(pf.Count, index+1), append(pf.VFs, vf)
	}
	pf.VFs = append(pf.VFs, others(pf.Count, pf.VFs)...)
	if match != nil {
		pf.Select = *match
	}
	return i.addPF(strings.Join(where, ", "), pf, d)
}

// others are the VFs that no section is of: the host's drivers have them all the same.
func others(count int, known []hostfile.VFs) []hostfile.VFs {
	named := map[int]bool{}
	for _, r := range known {
		for _, index := range r.Range.Indexes(count) {
			named[index] = true
		}
	}
	var out []hostfile.VFs
	for first := 0; first < count; {
		last := first
		for last < count && !named[last] {
			last++
		}
		if last > first {
			out = append(out, hostfile.VFs{Range: hostfile.Span(first, last-1), Driver: sriov.UseHome})
		}
		first = last + 1
	}
	return out
}

// absent declares what files name that is not there.
func (i *importer) absent(files []*netFile) error {
	byWord := map[string][]*netFile{}
	var words []string
	for _, f := range files {
		if !f.declaresVFs() || f.matched {
			continue
		}
		word := f.matchWord()
		if byWord[word] == nil {
			words = append(words, word)
		}
		byWord[word] = append(byWord[word], f)
	}

	for _, word := range words {
		if _, err := iommu.ParseSelector(word); err != nil {
			i.unnamed(byWord[word])
			continue
		}
		match, d, err := i.match(word)
		if err != nil {
			return err
		}
		if d == nil {
			if err := i.systemdPF(byWord[word], nil, &match); err != nil {
				return err
			}
			continue
		}
		for _, f := range byWord[word] {
			i.note("/%s: another file applies to %s", f.name, d.Name)
		}
	}

	return nil
}

// unnamed notes files that name no one device.
func (i *importer) unnamed(files []*netFile) {
	for _, f := range files {
		i.note("/%s: its [Match] does not name one device", f.name)
	}
}

// matchWord is the one word of a [Match] that names a device, "" if there is none.
func (f *netFile) matchWord() string {
	for _, key := range []string{"PermanentMACAddress", "MACAddress", "Path", "OriginalName", "Name"} {
		patterns := f.match[key]
		if len(patterns) == 0 {
			continue
		}
		word := patterns[0]
		if key == "Path" {
			word = strings.TrimPrefix(strings.TrimSuffix(word, "*"), "pci-")
		}
		switch {
		case len(patterns) > 1 || strings.ContainsAny(word, "*?[!"):
			return ""
		case strings.HasSuffix(key, "MACAddress"):
			return "mac=" + strings.ToLower(word)
		}
		return word
	}
	return ""
}

// systemdVF is one [SR-IOV] section.
func (i *importer) systemdVF(where string, index int, keys map[string]string) (hostfile.VFs, error) {
	names := map[string]hostfile.Key{
		"VLANId": sriov.VLAN, "QualityOfService": sriov.QoS, "VLANProtocol": sriov.Proto,
		"MACSpoofCheck":           sriov.SpoofChk,
		"QueryReceiveSideScaling": sriov.RSSQuery, "Trust": sriov.Trust, "LinkState": sriov.LinkState,
		"MACAddress": sriov.MAC,
	}
	var words []string
	for name, value := range keys {
		key, known := names[name]
		switch {
		case name == "VirtualFunction" || value == "":
			continue
		case !known:
			i.note("%s: %s= of VF %d has no equal here", where, name, index)
			continue
		}

		switch strings.ToLower(value) {
		// Systemd's words for a switch.
		case "1", "yes", "y", "true", "t":
			value = "on"
		case "0", "no", "n", "false", "f":
			value = "off"
		}
		if key == sriov.LinkState {
			value = map[string]string{"on": "enable", "off": "disable"}[value]
			if value == "" {
				value = "auto"
			}
		}
		words = append(words, string(key)+"="+value)
	}

	vf := hostfile.VFs{
		Range:    hostfile.Span(index, index),
		Driver:   sriov.UseHome,
		Settings: map[hostfile.Key]hostfile.Valued{},
	}
	if len(words) == 0 {
		return vf, nil
	}
	settings, err := sriov.ParseSettings(words)
	if err != nil {
		return hostfile.VFs{}, fmt.Errorf("%s: VF %d: %w", where, index, err)
	}
	for k, v := range settings {
		vf.Settings[k] = hostfile.Value(v)
	}
	return vf, nil
}

type section struct {
	name string
	keys map[string]string
}

// parseINI reads systemd.syntax(7) as far as it matters here: of a key that is given twice the last counts, but for
// lists, which are joined.
func parseINI(text string) []section {
	var out []section
	text = strings.ReplaceAll(text, "\\\n", " ")
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' || line[0] == ';' {
			continue
		}
		if name, ok := strings.CutPrefix(line, "["); ok {
			out = append(out, section{strings.TrimSuffix(name, "]"), map[string]string{}})
		} else if key, value, ok := strings.Cut(line, "="); ok && len(out) > 0 {
			key, value = strings.TrimSpace(key), strings.Trim(strings.TrimSpace(value), `"`)
			keys := out[len(out)-1].keys
			if out[len(out)-1].name == "Match" && value != "" && keys[key] != "" {
				value = keys[key] + " " + value
			}
			keys[key] = value
		}
	}
	return out
}
