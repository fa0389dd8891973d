package declared

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"viaduct/cmd/internal/hostfile"
	"viaduct/internal/journal"
	"viaduct/iommu"
	"viaduct/vfio/bind"
)

// unmanagedKey begins the mark of a VF whose interface NetworkManager and systemd-networkd are to leave alone. A rule
// of udev's, which install writes, looks for the mark when the interface comes: see [UnmanagedRule].
const unmanagedKey = "unmanaged-"

// UnmanagedRule is the line of a file of udev's rules by which NetworkManager (NetworkManager(8)) and systemd-networkd
// (systemd.network(5), Unmanaged=, and since 256 by the property alone) leave marked interfaces alone, and
// UnmanagedNetwork the file of the latter.
const (
	UnmanagedRule = `SUBSYSTEM=="net", SUBSYSTEMS=="pci", TEST=="/run/viaduct/` + unmanagedKey + `%b.json", ` +
		`ENV{NM_UNMANAGED}="1", ENV{ID_NET_MANAGED_BY}="viaduct"` + "\n"
	UnmanagedNetwork = "[Match]\nProperty=ID_NET_MANAGED_BY=viaduct\n\n[Link]\nUnmanaged=yes\n"
)

// rulesFiles are where install puts that rule.
var rulesFiles = [...]string{"etc/udev/rules.d", "usr/lib/udev/rules.d", "lib/udev/rules.d"}

// planUnmanaged plans which marks a PF's VFs lack, and which are there no more for a reason.
func (m *Manager) planUnmanaged(i *Item) error {
	marked, err := m.run.Keys(unmanagedKey)
	if err != nil {
		return err
	}

	each := i.pf.Each()
	if len(marked) == 0 && !slices.ContainsFunc(each, func(vf hostfile.VF) bool { return vf.Unmanaged }) {
		return nil
	}

	places, err := iommu.VFAddresses(m.host, i.Device.Address)
	if err != nil {
		return err
	}

	for n, a := range places {
		want := n < len(each) && each[n].Unmanaged
		if has := slices.Contains(marked, unmanagedKey+a.String()); has == want {
			continue
		}
		i.marks = append(i.marks, mark{vf: a, unmanaged: want})
		file := path.Join("/", journal.Dir, unmanagedKey+a.String()+".json")
		command := "rm " + file
		if want {
			command = "echo {} > " + file
		}
		i.Steps = append(i.Steps, bind.Action{Command: command})
	}

	if len(i.marks) > 0 && m.host.Live() && !m.hasRule() {
		i.Notes = append(i.Notes, "network: unmanaged goes by a rule of udev's that viaduct install writes: it is not "+
			"there")
	}

	return nil
}

// mark says of a VF whether its interface is left alone.
type mark struct {
	vf        iommu.Address
	unmanaged bool
}

func (m *Manager) hasRule() bool {
	return slices.ContainsFunc(rulesFiles[:], func(dir string) bool {
		text, err := m.host.String(path.Join(dir, "72-viaduct.rules"))
		return err == nil && strings.Contains(text, unmanagedKey)
	})
}

// setMarks makes and takes away marks, before the interfaces come, and has udev look again at those that are there.
func (m *Manager) setMarks(i *Item) error {
	var errs []error
	for _, mark := range i.marks {
		key := unmanagedKey + mark.vf.String()
		if mark.unmanaged {
			errs = append(errs, m.run.Put(key, struct{}{}))
		} else {
			errs = append(errs, m.run.Delete(key))
		}
		vf, err := m.topology.Find(mark.vf)
		if err != nil {
			continue
		}
		for _, name := range vf.Netdevs {
			if err := m.host.Write(path.Join("sys/class/net", name, "uevent"), "change"); err != nil {
				errs = append(errs, fmt.Errorf("have udev look at %s again: %w", name, err))
			}
		}
	}
	return errors.Join(errs...)
}
