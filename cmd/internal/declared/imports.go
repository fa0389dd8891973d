package declared

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"viaduct/cmd/internal/hostfile"
	"viaduct/internal/host"
	"viaduct/iommu"
)

// source is a tool whose files Import reads.
type source struct {
	name string
	read func(*importer) error
}

func sources() []source {
	return []source{
		{"driverctl", (*importer).driverctl},
		{"modprobe", (*importer).modprobe},
		{"netplan", (*importer).netplan},
		{"systemd", (*importer).systemd},
	}
}

// Sources are the names of the tools whose files Import reads.
func Sources() []string {
	var out []string
	for _, s := range sources() {
		out = append(out, s.name)
	}
	return out
}

// importer collects what another tool's files declare.
type importer struct {
	m     *Manager
	out   *hostfile.Host
	notes []string          // what could not be taken over, each with its place
	by    map[string]string // where a device, by its name, or a group is declared
}

// Import declares what another tool's files do, and notes what they say that has no equal here.
func (m *Manager) Import(from string) (*hostfile.Host, []string, error) {
	i := &importer{m: m, out: &hostfile.Host{}, by: map[string]string{}}
	for _, s := range sources() {
		if s.name == from {
			err := s.read(i)
			return i.out, i.notes, err
		}
	}
	return nil, nil, fmt.Errorf("unknown tool %q: want one of %s", from,
		strings.Join(Sources(), ", "))
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

// match is the best match of the device that words name now, which it returns too, or what the words say of one that is
// not there.
func (i *importer) match(text string) (hostfile.Match, *iommu.Device, error) {
	sel, err := iommu.ParseSelector(text)
	if err != nil {
		return hostfile.Match{}, nil, err
	}
	match := hostfile.Match{Selectors: []iommu.Selector{sel}}
	d, err := i.m.find(match)
	if isUnclear(err) {
		// It is not there, or there is more than one: the words are kept as they are.
		return match, nil, nil
	}
	if err != nil {
		return match, nil, err
	}
	match, err = i.m.stable(d)
	return match, d, err
}

// addPF declares a PF, which is there unless d is nil. What is declared already stays as it was declared first.
func (i *importer) addPF(where string, pf hostfile.PF, d *iommu.Device) error {
	name := pf.Select.String()
	if d != nil {
		name = d.Name
	}
	if !i.isFirst(where, name) {
		return nil
	}
	if d != nil {
		match, err := i.m.stable(d)
		if err != nil {
			return err
		}
		pf.Select = match
	}
	i.out.PFs = append(i.out.PFs, pf)
	return nil
}

// isFirst reports, and notes if not, whether nothing has declared a device of that name yet.
func (i *importer) isFirst(where, name string) bool {
	first, known := i.by[name]
	if known {
		i.note("%s: %s is declared by %s already, which counts", where, name, first)
	} else {
		i.by[name] = where
	}
	return !known
}

// addDevice declares a device that is taken with all of its group, which is declared once.
func (i *importer) addDevice(where string, device hostfile.Device, d *iommu.Device) error {
	if d == nil {
		if i.isFirst(where, device.Select.String()) {
			i.out.Devices = append(i.out.Devices, device)
		}
		return nil
	}
	unit := d.Name
	if d.Group != nil {
		unit = fmt.Sprintf("group %d", *d.Group)
	}
	if first, known := i.by[unit]; known {
		i.note("%s: %s goes with %s, which is declared by %s", where, d.Name, unit, first)
		return nil
	}
	if d.Role() != iommu.RoleGuest {
		i.note("%s: a guest cannot have %s", where, d.Name)
		return nil
	}
	i.by[unit] = where
	match, err := i.m.stable(d)
	device.Select = match
	i.out.Devices = append(i.out.Devices, device)
	return err
}

// port is an interface of a PF, by what other tools' files name it.
type port struct {
	pf              *iommu.Device
	name            string
	mac, permanent  string
	driver, address string
}

// ports are the interfaces of the PFs that are there.
func (i *importer) ports() ([]port, error) {
	var out []port
	var failed error
	i.m.topology.All(func(d *iommu.Device) bool {
		if d.SRIOV == nil || len(d.Netdevs) == 0 {
			return true
		}
		permanent, err := iommu.PermanentMACs(i.m.host, d)
		if err != nil {
			failed = err
			return false
		}
		for _, name := range d.Netdevs {
			mac, err := i.m.host.String(path.Join("sys/class/net", name, "address"))
			if err != nil && !host.Absent(err) {
				failed = err
				return false
			}
			out = append(out, port{
				pf: d, name: name, mac: strings.ToLower(mac), permanent: strings.ToLower(permanent[name]),
				driver: d.Driver, address: "pci-" + d.Name,
			})
		}
		return true
	})
	return out, failed
}

// hasMAC reports whether a port has an address, of its own or at present.
func (p *port) hasMAC(mac string) bool {
	return strings.EqualFold(mac, p.mac) || strings.EqualFold(mac, p.permanent)
}

// glob reports whether one of some patterns, as those of a shell, matches a text.
func glob(patterns []string, text string) bool {
	return slices.ContainsFunc(patterns, func(pattern string) bool {
		ok, err := path.Match(pattern, text)
		return ok && err == nil
	})
}

// driverctl: a file for each device, named BUS-ADDRESS, with the driver in it.
func (i *importer) driverctl() error {
	names, content, err := i.files("", "etc/driverctl.d")
	if err != nil {
		return err
	}
	for _, n := range names {
		driver := strings.TrimSpace(content[n])
		address, isPCI := strings.CutPrefix(path.Base(n), "pci-")
		if !isPCI || !iommu.IsVFIODriver(driver) {
			i.note("/%s: driver %q of %s: host.yaml declares only vfio drivers of PCI devices", n, driver, path.Base(n))
			continue
		}
		match, d, err := i.match(address)
		if err != nil {
			return fmt.Errorf("/%s: %w", n, err)
		}
		if err := i.addDevice("/"+n, hostfile.Device{Select: match, Driver: driver}, d); err != nil {
			return fmt.Errorf("/%s: %w", n, err)
		}
	}
	return nil
}
