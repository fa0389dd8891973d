package declared

import (
	"errors"
	"path/filepath"
	"strings"

	"viaduct/cmd/internal/hostfile"
	"viaduct/iommu"
	"viaduct/vfio/bind"
)

// dropIn is the file that declares one device by its place, as bind --save writes it.
func dropIn(match hostfile.Match) string {
	place := strings.TrimPrefix(match.String(), "path=")
	return filepath.Join("/", hostfile.Dir, "50-bind-"+strings.ReplaceAll(place, "/", "_")+".yaml")
}

// Save declares a device that was taken, in a drop-in of its own, unless it is declared already, and writes down what
// it is, so that no other card in its place is taken for it. It returns where it is declared.
func (m *Manager) Save(d *iommu.Device, driver, owner string) (file string, err error) {
	match, err := at(m.host, d)
	if err != nil {
		return "", err
	}
	if declared, err := hostfile.Load(m.host); err == nil {
		// One that is wrong is apply's matter.
		for _, other := range declared.Devices {
			if found, err := m.find(other.Select); err == nil && found.Name == d.Name &&
				other.At.File != dropIn(match) {
				return other.At.String(), nil
			}
		}
	}

	dev := hostfile.Device{Select: match, Driver: driver, Owner: owner}
	if driver == bind.Auto {
		dev.Driver = ""
	}
	names := iommu.OpenNames(m.host)
	defer names.Close()
	one := hostfile.Host{Devices: []hostfile.Device{dev}}
	text, err := one.YAML(map[string]string{match.String(): comment(names, d)})
	if err != nil {
		return "", err
	}

	file = dropIn(match)
	head := "# Written by viaduct bind --save; viaduct unbind --save removes it.\n"
	if err := m.host.Replace(file[1:], append([]byte(head), text...)); err != nil {
		return "", err
	}
	if err := m.host.Own(file[1:], -1, -1, 0o644); err != nil {
		return "", err
	}

	i := &Item{Name: match.String(), Device: d, State: OK, unit: []*iommu.Device{d}}
	if units, err := bind.Units(m.topology, []*iommu.Device{d}); err == nil && len(units) > 0 {
		i.unit = units[0]
	}
	return file, m.Remember([]*Item{i})
}

// Saved is the drop-in that declares a device, "" if there is none.
func (m *Manager) Saved(d *iommu.Device) (string, error) {
	match, err := at(m.host, d)
	if err != nil {
		return "", err
	}
	file := dropIn(match)
	if !m.host.Exists(file[1:]) {
		return "", nil
	}
	return file, nil
}

// Forget removes the drop-in that declares a device.
func (m *Manager) Forget(d *iommu.Device) error {
	match, err := at(m.host, d)
	if err != nil {
		return err
	}
	return errors.Join(m.host.Remove(dropIn(match)[1:]), m.state.Delete(knownKey(match.String())))
}
