package declared

import (
	"errors"
	"io/fs"
	"path"
	"reflect"
	"slices"
	"strings"

	"viaduct/iommu"
	"viaduct/vfio/holder"
)

const protectedKey = "protected"

// protected is a device that carries the host.
type protected struct {
	Address  iommu.Address  `json:"address"`
	Identity iommu.Identity `json:"identity"`
	Why      string         `json:"why"`
}

// Protect writes down which devices carry the host, for boots, which cannot see that yet: those with its addresses,
// routes, mounts and swap, and those behind fstab, crypttab, and root= and ip= of the kernel's command line. A dry run
// only looks.
func (m *Manager) Protect() error {
	var all []*iommu.Device
	m.topology.All(func(d *iommu.Device) bool {
		if d.PCI && d.PhysFn == nil && d.Blocks() {
			all = append(all, d)
		}
		return true
	})
	holders, err := holder.Find(m.host, all)
	if err != nil {
		return err
	}

	needs := needed(m.host)
	out := []protected{}
	for _, d := range all {
		why := ""
		if n := slices.IndexFunc(holders, func(h holder.Holder) bool {
			return h.Device == d.Name && h.Kind.CarriesHost()
		}); n >= 0 {
			why = holders[n].What
		} else if why, err = needs.of(m.host, d); err != nil {
			return err
		}
		if why != "" {
			id, err := iommu.Identify(m.host, d)
			if err != nil {
				return err
			}
			out = append(out, protected{d.Address, id, why})
		}
	}

	var before []protected
	if _, err := m.state.Get(protectedKey, &before); err != nil {
		return err
	}
	if !m.options.Accept {
		// What carried the host once may be down just now: it stays protected as long as it is there.
		for _, old := range before {
			still, err := m.oneOf(all, &old.Identity)
			if err != nil {
				return err
			}
			again := func(p protected) bool { return reflect.DeepEqual(p.Identity, old.Identity) }
			if len(still) > 0 && !slices.ContainsFunc(out, again) {
				out = append(out, old)
			}
		}
	}

	if m.handle.DryRun() || before != nil && reflect.DeepEqual(before, out) {
		return nil
	}
	return m.state.Put(protectedKey, out)
}

// recorded adds what carried the host when it ran to what must not be taken.
func (m *Manager) recorded(g *guard) error {
	var all []protected
	found, err := m.state.Get(protectedKey, &all)
	if err != nil {
		return err
	}
	g.any = g.any || found
	var there []*iommu.Device
	m.topology.All(func(d *iommu.Device) bool {
		if d.PCI {
			there = append(there, d)
		}
		return true
	})
	for k := range all {
		same, err := m.oneOf(there, &all[k].Identity)
		if err != nil {
			return err
		}
		for _, d := range same {
			if g.names[d.Name] == "" {
				g.names[d.Name] = "the host was using it when it last ran: it " + all[k].Why
			}
		}
	}
	return nil
}

// oneOf are those of some devices that may be the one that was identified.
func (m *Manager) oneOf(devices []*iommu.Device, id *iommu.Identity) ([]*iommu.Device, error) {
	var out []*iommu.Device
	for _, d := range devices {
		same, err := m.Same(id, d)
		if err != nil {
			return nil, err
		}
		if same {
			out = append(out, d)
		}
	}
	return out, nil
}

// Same reports whether this is the device that was identified: by its own numbers where both are known, else by its
// place. The functions of a card share its serial number. It is an error if that cannot be read.
func (m *Manager) Same(id *iommu.Identity, d *iommu.Device) (bool, error) {
	why, err := id.Differs(m.host, d)
	var now iommu.Identity
	if err == nil && why == "" {
		now, err = iommu.Identify(m.host, d)
	}
	if errors.Is(err, fs.ErrNotExist) {
		// It goes away just now.
		return false, nil
	}
	if err != nil || why != "" {
		return false, err
	}

	switch {
	case len(id.MACs) > 0 && len(now.MACs) > 0:
		// And they were compared.
		return true, nil
	case now.Serial != "" && id.Serial != "":
		// The function.
		return now.Path != "" && id.Path != "" && now.Path[len(now.Path)-1] == id.Path[len(id.Path)-1], nil
	}
	return now.Path == id.Path, nil
}

// needs is what the host's own files say that it needs, mounted now or not: where that is said, by block device and
// interface.
type needs struct{ disks, links map[string]string }

// needed reads them; what is not there, or says something else, needs nothing.
func needed(h *iommu.Host) needs {
	n := needs{map[string]string{}, map[string]string{}}
	for _, table := range []struct {
		file  string
		field int
	}{{"etc/fstab", 0}, {"etc/crypttab", 1}} {
		content, _ := h.Read(table.file)
		for line := range strings.Lines(string(content)) {
			if f := strings.Fields(line); len(f) > table.field && !strings.HasPrefix(f[0], "#") {
				n.disk(h, f[table.field], "/"+table.file)
			}
		}
	}

	line, _ := h.String("proc/cmdline")
	for word := range strings.FieldsSeq(line) {
		switch key, value, _ := strings.Cut(word, "="); key {
		case "root", "resume":
			n.disk(h, value, "the kernel's command line ("+key+"=)")
		case "ip":
			// CLIENT:SERVER:GATEWAY:MASK:NAME:INTERFACE:..., or INTERFACE:...;
			// Documentation/admin-guide/nfs/nfsroot.rst, dracut.cmdline(7)
			for field := range strings.SplitSeq(value, ":") {
				n.links[field] = "the kernel's command line (ip=)"
			}
		case "BOOTIF":
			// 01-52-54-00-12-34-56.
			if len(value) > 3 {
				n.links[strings.ToLower(strings.ReplaceAll(value[3:], "-", ":"))] = "the kernel's command line " +
					"(BOOTIF=)"
			}
		}
	}
	return n
}

// disk adds what a source of a mount means: a node, a link to one, or UUID= and the like, by udev's links.
func (n *needs) disk(h *iommu.Host, source, where string) {
	name, isNode := strings.CutPrefix(source, "/dev/")
	if !isNode {
		kind, value, ok := strings.Cut(source, "=")
		if !ok {
			return
		}
		name = path.Join("disk", "by-"+strings.ToLower(kind), strings.ReplaceAll(strings.Trim(value, `"`), "/", `\x2f`))
	}
	if target, err := h.LinkBase(path.Join("dev", name)); err == nil {
		name = target
	}
	// As sysfs writes a slash.
	n.disks[strings.ReplaceAll(name, "/", "!")] = where
}

// of says what needs a device; "" if nothing does.
func (n *needs) of(h *iommu.Host, d *iommu.Device) (string, error) {
	disks, err := holder.Disks(h, d)
	if err != nil {
		return "", err
	}
	for _, b := range disks {
		if where := n.disks[b]; where != "" {
			return "(" + b + ") is named in " + where, nil
		}
	}
	macs, err := iommu.PermanentMACs(h, d)
	if err != nil {
		return "", err
	}
	for _, name := range d.Netdevs {
		for _, word := range []string{name, macs[name]} {
			if where := n.links[word]; where != "" {
				return "(" + name + ") is named in " + where, nil
			}
		}
	}
	return "", nil
}
