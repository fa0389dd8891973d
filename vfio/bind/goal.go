package bind

import (
	"fmt"
	"strings"

	"viaduct/iommu"
)

// Auto lets a Handle choose the driver: the variant driver that modules.alias names for the device, else vfio-pci.
const Auto = "vfio"

// oldAuto is the word for Auto in files of viaduct before it had one for all places.
const oldAuto = "auto"

// None as a driver_override matches no driver, so that the device stays without one.
const None = "none"

// stub is the kernel's driver that does nothing but have devices.
const stub = "pci-stub"

// Goal is where devices are to go: see [Take], [GiveBack] and [Home]. Its zero value is GiveBack.
type Goal struct {
	to     direction
	driver string
	owner  *NodeOwner
}

type direction int

const (
	toGiveBack direction = iota
	toTake
	toHome
)

// Take is the goal of a device that is taken from the host: a VFIO driver, by its name or Auto; or None or pci-stub,
// with which no driver of the host has it. Plans for any other driver are an error.
func Take(driver string) Goal { return Goal{to: toTake, driver: driver} }

// GiveBack is the goal of a device that is given back: what it had when it was taken, be that no driver. If that is not
// known (it was not taken by viaduct, or not since the boot), it is the driver that the host would use.
func GiveBack() Goal { return Goal{to: toGiveBack} }

// Home is the goal of a device that the host is to use, also of one that was kept without a driver: the driver it had
// when it was taken, else the one that the host would use.
func Home() Goal { return Goal{to: toHome} }

// OwnedBy is the goal with an owner for the nodes of what is taken; nil leaves them as they are.
func (g Goal) OwnedBy(o *NodeOwner) Goal {
	g.owner = o
	return g
}

// check refuses to take a device for what is no driver for guests.
func (g Goal) check() error {
	if !g.takes() {
		return nil
	}
	if _, err := ParseDriver(g.driver); err != nil {
		return fmt.Errorf("bind: driver %q: %w", g.driver, err)
	}
	return nil
}

// moduleDrivers names the VFIO driver of each module whose driver has another name (the .name of its struct pci_driver;
// most have KBUILD_MODNAME there).
var moduleDrivers = map[string]string{"vfio_pci": generic, "hisi_acc_vfio_pci": "hisi-acc-vfio-pci"}

// ParseDriver reads a word for [Take]: "vfio" for Auto, "none" for None, "pci-stub", or the name of a VFIO driver. The
// name of a module is refused with that of its driver. Errors do not name the word.
func ParseDriver(word string) (string, error) {
	switch {
	case word == oldAuto:
		return Auto, nil
	case moduleDrivers[word] != "":
		return "", fmt.Errorf("this is a module; its driver is %s", moduleDrivers[word])
	case word == Auto || word == None || word == stub || iommu.IsVFIODriver(word) && !strings.Contains(word, "/"):
		return word, nil
	}
	return "", fmt.Errorf("want %s, %s or the name of a vfio driver", Auto, None)
}

func (g Goal) takes() bool { return g.to == toTake }

// op is the goal's word in the journal.
func (g Goal) op() string {
	if g.takes() {
		return opTake
	}
	return opGive
}
