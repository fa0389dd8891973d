package sriov

import (
	"fmt"

	"viaduct/vfio/bind"
)

// Use is what new VFs are for: the driver they get. It is one of the constants, or the name of a VFIO driver.
type Use string

// The uses of new VFs. All but UseHome keep the host's own driver from ever seeing them.
const (
	UseNone Use = bind.None // no driver until one is asked for: for guests
	UseVFIO Use = bind.Auto // the best VFIO driver at once: for guests
	UseHome Use = "home"    // the host's own driver
)

// ParseUse reads a use. The name of a module is refused with that of its driver. Errors do not name the word.
func ParseUse(word string) (Use, error) {
	if Use(word) == UseHome {
		return UseHome, nil
	}
	driver, err := bind.ParseDriver(word)
	if err != nil {
		return "", fmt.Errorf("%w, or %s", err, UseHome)
	}
	// bind.Auto is UseVFIO, and bind.None UseNone.
	return Use(driver), nil
}

// Driver is the driver to take a VF with, as [bind.Take] wants it; "" if it is not taken.
func (u Use) Driver() string {
	if u == "" || u == UseNone || u == UseHome {
		return ""
	}
	return string(u)
}
