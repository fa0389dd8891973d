package declared

import (
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v4"

	"viaduct/cmd/internal/hostfile"
	"viaduct/internal/host"
	"viaduct/iommu"
	"viaduct/sriov"
)

// Sources are what Import reads.
var Sources = []string{"driverctl", "netplan", "systemd"}

// importer collects what another tool's files declare.
type importer struct {
	m     *Manager
	out   *hostfile.Host
	notes []string // what could not be taken over, each with its place
}

// Import declares what another tool's files do, and notes what they say that has no equal here.
func (m *Manager) Import(source string) (*hostfile.Host, []string, error) {
	i := &importer{m: m, out: &hostfile.Host{}}
	err := map[string]func() error{"driverctl": i.driverctl, "netplan": i.netplan, "systemd": i.systemd}[source]()
	return i.out, i.notes, err
}

func (i *importer) note(format string, a ...any) {
	i.notes = append(i.notes, fmt.Sprintf(format, a...))
}

// files are the files of directories, by name; one in an earlier directory hides its namesakes.
func (i *importer) files(suffix string, dirs ...string) (names []string, content map[string]string, err error) {
	content = map[string]string{}
	seen := map[string]bool{}
	for _, dir := range dirs {
		all, err := i.m.host.Names(dir)
		if err != nil && !host.Absent(err) {
			return nil, nil, err
		}
		for _, n := range all {
			if !strings.HasSuffix(n, suffix) || seen[n] {
				continue
			}
			seen[n] = true
			b, err := i.m.host.Read(path.Join(dir, n))
			if err != nil {
				return nil, nil, err
			}
			file := path.Join(dir, n)
			names, content[file] = append(names, file), string(b)
		}
	}

	slices.SortFunc(names, func(a, b string) int { return strings.Compare(path.Base(a), path.Base(b)) })
	return names, content, nil
}

// match is the best match of the device that words name now, or what the words say of one that is not there.
func (i *importer) match(text string) (hostfile.Match, error) {
	sel, err := iommu.ParseSelector(text)
	if err != nil {
		return hostfile.Match{}, err
	}
	match := hostfile.Match{Selectors: []iommu.Selector{sel}}
	if d, err := i.m.find(match); err == nil {
		return i.m.stable(d)
	}
	return match, nil
}

// driverctl: a file for each device, named BUS-ADDRESS, with the driver in it.
func (i *importer) driverctl() error {
	names, content, err := i.files("", "etc/driverctl.d")
	for _, n := range names {
		driver := strings.TrimSpace(content[n])
		address, isPCI := strings.CutPrefix(path.Base(n), "pci-")
		if !isPCI || !iommu.IsVFIODriver(driver) {
			i.note("/%s: driver %q of %s: only vfio drivers of PCI devices are declared", n, driver, path.Base(n))
			continue
		}
		match, err := i.match(address)
		if err != nil {
			return fmt.Errorf("/%s: %w", n, err)
		}
		i.out.Devices = append(i.out.Devices, hostfile.Device{Select: match, Driver: driver})
	}
	return err
}

// netplan: https://netplan.readthedocs.io/en/stable/netplan-yaml/ (virtual-function-count and what goes with it).
func (i *importer) netplan() error {
	names, content, err := i.files(".yaml", "run/netplan", "etc/netplan", "lib/netplan")
	if err != nil {
		return err
	}
	type ethernet struct {
		Match struct {
			MAC  string `yaml:"macaddress"`
			Name string `yaml:"name"`
		} `yaml:"match"`
		SetName string `yaml:"set-name"`
		Link    string `yaml:"link"`
		Count   *int   `yaml:"virtual-function-count"`
		Eswitch string `yaml:"embedded-switch-mode"`
		Delay   bool   `yaml:"delay-virtual-functions-rebind"`
		MTU     int    `yaml:"mtu"`
	}

	type vlan struct {
		Link     string `yaml:"link"`
		Renderer string `yaml:"renderer"`
	}
	all, linked := map[string]ethernet{}, map[string]int{}
	var order []string
	for _, n := range names {
		var file struct {
			Network struct {
				Ethernets map[string]ethernet `yaml:"ethernets"`
				VLANs     map[string]vlan     `yaml:"vlans"`
			} `yaml:"network"`
		}
		if err := yaml.Unmarshal([]byte(content[n]), &file); err != nil {
			return fmt.Errorf("/%s: %w", n, err)
		}
		for id, e := range file.Network.Ethernets {
			if _, known := all[id]; !known {
				order = append(order, id)
			}
			all[id] = e
			linked[e.Link]++
		}

		for id, v := range file.Network.VLANs {
			if v.Renderer == "sriov" {
				i.note("/%s: VLAN %s: netplan gives VFs their numbers when it runs; declare it at the VF that is meant",
					n, id)
			}
		}
	}

	slices.Sort(order)
	for _, id := range order {
		e := all[id]
		pf := hostfile.PF{
			MTU:      e.MTU,
			Eswitch:  e.Eswitch,
			AfterLAG: e.Delay && e.Eswitch == "switchdev",
			Count:    linked[id],
		}
		if e.Count != nil {
			pf.Count = *e.Count
		}
		if e.Count == nil && linked[id] == 0 && e.Eswitch == "" {
			// No PF.
			continue
		}
		words := id
		switch {
		case e.Match.MAC != "":
			words = "mac=" + e.Match.MAC
		case e.SetName != "":
			words = e.SetName
		case e.Match.Name != "":
			words = e.Match.Name
		}

		if pf.Select, err = i.match(words); err != nil {
			i.note("%s: %v", id, err)
			continue
		}

		pf.VFs = append(pf.VFs, hostfile.VFs{Driver: sriov.UseHome})
		if pf.Count == 0 {
			pf.VFs = nil
		}
		i.out.PFs = append(i.out.PFs, pf)
	}
	return nil
}

// systemd: [SR-IOV] sections of systemd.link(5) and systemd.network(5).
func (i *importer) systemd() error {
	dirs := []string{"etc/systemd/network", "run/systemd/network", "usr/lib/systemd/network"}
	// Of i.out.PFs.
	byName := map[string]int{}
	for _, suffix := range []string{".link", ".network"} {
		names, content, err := i.files(suffix, dirs...)
		if err != nil {
			return err
		}
		for _, n := range names {
			sections := parseINI(content[n])
			count, vfs := -1, []hostfile.VFs{}
			words := ""
			for _, s := range sections {
				switch s.name {
				case "Match":
					words = matchWords(s.keys)
				case "Link":
					if c, err := strconv.Atoi(s.keys["SR-IOVVirtualFunctions"]); err == nil {
						count = c
					}
				case "SR-IOV":
					vf, err := i.systemdVF(n, s.keys)
					if err != nil {
						return err
					}
					vfs = append(vfs, vf...)
				}
			}

			if count < 0 && len(vfs) == 0 {
				continue
			}
			match, err := i.match(words)
			if err != nil {
				i.note("/%s: its [Match] names no one device that can be named here", n)
				continue
			}

			at, known := byName[match.String()]
			if !known {
				at = len(i.out.PFs)
				byName[match.String()] = at
				i.out.PFs = append(i.out.PFs, hostfile.PF{Select: match})
			}

			pf := &i.out.PFs[at]
			pf.Count, pf.VFs = max(pf.Count, count), append(pf.VFs, vfs...)
			for _, r := range vfs {
				for _, index := range r.Range.Indexes(1 << 16) {
					pf.Count = max(pf.Count, index+1)
				}
			}
		}
	}
	return nil
}

func matchWords(keys map[string]string) string {
	first := func(s string) string {
		// Several words are alternatives.
		word, _, _ := strings.Cut(strings.TrimSpace(s), " ")
		return word
	}
	switch {
	case keys["PermanentMACAddress"] != "":
		return "mac=" + strings.ToLower(first(keys["PermanentMACAddress"]))
	case keys["MACAddress"] != "":
		return "mac=" + strings.ToLower(first(keys["MACAddress"]))
	case keys["Path"] != "":
		return strings.TrimPrefix(strings.TrimRight(first(keys["Path"]), "*"), "pci-")
	case keys["OriginalName"] != "":
		return first(keys["OriginalName"])
	}
	return first(keys["Name"])
}

// systemdVF is one [SR-IOV] section.
func (i *importer) systemdVF(file string, keys map[string]string) ([]hostfile.VFs, error) {
	index, err := strconv.Atoi(keys["VirtualFunction"])
	if err != nil || index < 0 {
		return nil, fmt.Errorf("/%s: VirtualFunction=%s is no index", file, keys["VirtualFunction"])
	}
	names := map[string]hostfile.Key{
		"VLANId": sriov.VLAN, "QualityOfService": sriov.QoS, "VLANProtocol": sriov.Proto,
		"MACSpoofCheck":           sriov.SpoofChk,
		"QueryReceiveSideScaling": sriov.RSSQuery, "Trust": sriov.Trust, "LinkState": sriov.LinkState,
		"MACAddress": sriov.MAC,
	}
	var words []string
	for name, value := range keys {
		key, known := names[name]
		if !known {
			if name != "VirtualFunction" {
				i.note("/%s: %s= of VF %d has no equal here", file, name, index)
			}
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

	settings, err := sriov.ParseSettings(words)
	if err != nil {
		return nil, fmt.Errorf("/%s: VF %d: %w", file, index, err)
	}
	vf := hostfile.VFs{
		Range:    hostfile.Span(index, index),
		Driver:   sriov.UseHome,
		Settings: map[hostfile.Key]hostfile.Valued{},
	}
	for k, v := range settings {
		vf.Settings[k] = hostfile.Value(v)
	}
	return []hostfile.VFs{vf}, nil
}

type section struct {
	name string
	keys map[string]string
}

// parseINI reads systemd.syntax(7) as far as it matters here: of a key that is given twice the last counts.
func parseINI(text string) []section {
	var out []section
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' || line[0] == ';' {
			continue
		}
		if name, ok := strings.CutPrefix(line, "["); ok {
			out = append(out, section{strings.TrimSuffix(name, "]"), map[string]string{}})
		} else if key, value, ok := strings.Cut(line, "="); ok && len(out) > 0 {
			out[len(out)-1].keys[strings.TrimSpace(key)] = strings.Trim(strings.TrimSpace(value), `"`)
		}
	}
	return out
}
