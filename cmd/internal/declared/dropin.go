package declared

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"viaduct/cmd/internal/spec"
	"viaduct/internal/journal"
	"viaduct/iommu"
	"viaduct/vfio"
)

// dropIn is the file that declares one device by its place, as bind --save writes it.
func dropIn(match spec.Match) string {
	place := strings.TrimPrefix(match.String(), "path=")
	return filepath.Join("/", spec.Dir, "50-bind-"+strings.ReplaceAll(place, "/", "_")+".yaml")
}

// Save declares a device that was taken, in a drop-in of its own, unless it is declared already, and writes down what it is, so
// that no other card in its place is taken for it. It returns where it is declared.
func (m *Manager) Save(d *iommu.Device, driver, owner string) (file string, err error) {
	match, err := at(m.Host, d)
	if err != nil {
		return "", err
	}
	if declared, err := spec.Load(m.Host); err == nil { // one that is wrong is apply's matter
		for _, other := range declared.Devices {
			if found, err := m.find(other.Select); err == nil && found.Name == d.Name && other.At.File != dropIn(match) {
				return other.At.String(), nil
			}
		}
	}
	dev := spec.Device{Select: match, Driver: driver, Owner: owner}
	if driver == vfio.Auto {
		dev.Driver = ""
	}
	names := iommu.OpenNames(m.Host)
	defer names.Close()
	text, err := (&spec.Host{Devices: []spec.Device{dev}}).YAML(map[string]string{match.String(): comment(names, d)})
	if err != nil {
		return "", err
	}
	file = dropIn(match)
	if err := journal.WriteFile(file, append([]byte("# Written by viaduct bind --save; viaduct unbind --save removes it.\n"), text...)); err != nil {
		return "", err
	}
	if err := os.Chmod(file, 0o644); err != nil {
		return "", err
	}
	if err := m.State.Delete(knownKey(match.String())); err != nil { // of what was there before
		return "", err
	}
	i := &Item{Name: match.String(), Device: d, State: OK, unit: []*iommu.Device{d}}
	if units, err := vfio.Units(m.Topology, i.unit); err == nil && len(units) > 0 {
		i.unit = units[0]
	}
	return file, m.Remember([]*Item{i})
}

// Saved is the drop-in that declares a device, "" if there is none.
func (m *Manager) Saved(d *iommu.Device) (string, error) {
	match, err := at(m.Host, d)
	if err != nil {
		return "", err
	}
	file := dropIn(match)
	if _, err := os.Stat(file); errors.Is(err, fs.ErrNotExist) {
		return "", nil
	} else if err != nil {
		return "", err
	}
	return file, nil
}

// Forget removes the drop-in that declares a device.
func (m *Manager) Forget(d *iommu.Device) error {
	match, err := at(m.Host, d)
	if err != nil {
		return err
	}
	return errors.Join(os.Remove(dropIn(match)), m.State.Delete(knownKey(match.String())))
}
