package install

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"viaduct/internal/host"
)

// DefaultUnits is where packages have their units.
const DefaultUnits = "/usr/lib/systemd/system"

const packageRules = "/usr/lib/udev/rules.d"

// packaged stands in files of a package instead of the marker: an install does not write them, nor does it remove them.
const packaged = "Part of the viaduct package."

// Packaged are the files of a package, for a program: all units, of which none is enabled, the udev rule, and what has
// systemd-networkd leave VFs alone.
func Packaged(program, unitFolder string) []File {
	var all []File
	for i := range allUnits {
		all = append(all, allUnits[i].file(unitFolder, program))
	}
	all = append(all, File{Path: filepath.Join(packageRules, ruleName), Content: rule, Mode: 0o644},
		File{Path: "/usr/lib/systemd/network/" + networkName, Content: networkd, Mode: 0o644})
	for i := range all {
		all[i].Content = strings.ReplaceAll(all[i].Content, marker, packaged)
	}
	return all
}

// PackageFits is an error if something below the root of a package stands where one of its files is to be.
func PackageFits(root string, files []File) error {
	for _, f := range files {
		name := filepath.Join(root, f.Path)
		st, err := os.Lstat(name)
		if err == nil && st.IsDir() {
			return fmt.Errorf("%s is a folder, and not a file of a package: move it away first", name)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// WritePackage writes files below the root of a package, which nobody else writes to, and returns their names there.
func WritePackage(root string, files []File) ([]string, error) {
	var names []string
	if err := PackageFits(root, files); err != nil {
		return nil, err
	}
	for _, f := range files {
		name := filepath.Join(root, f.Path)
		if err := host.WriteFile(name, []byte(f.Content)); err != nil {
			return names, err
		}
		if err := os.Chmod(name, f.Mode); err != nil {
			return names, err
		}
		names = append(names, name)
	}
	return names, nil
}

// PackageUnits is the folder below root of the units that a package has brought for this program; "" if none has.
func PackageUnits(root, program string) string {
	if !there(filepath.Join(root, packageRules, ruleName)) {
		return ""
	}
	start := "\nExecStart=" + inUnit(program) + " "
	for _, folder := range []string{DefaultUnits, "/lib/systemd/system"} {
		text, err := os.ReadFile(filepath.Join(root, folder, allUnits[0].name))
		if err == nil && strings.Contains(string(text), packaged) && strings.Contains(string(text), start) {
			return folder
		}
	}
	return ""
}
