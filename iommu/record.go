package iommu

import (
	"viaduct/internal/journal"
)

// Recorded is what was written down of a device when viaduct took it, while its own driver could still be asked; false
// if it was not taken, or is another one now.
func Recorded(h *Host, d *Device) (Identity, bool, error) {
	// The part of package bind's record that says what the device is.
	var r struct {
		Vendor   uint16   `json:"vendor"`
		Device   uint16   `json:"device"`
		Identity Identity `json:"identity"`
	}
	known, err := journal.In(h.Host, journal.Dir).Get(journal.Taken+d.Address.String(), &r)
	if !known || r.Vendor != d.Vendor || r.Device != d.Device {
		return Identity{}, false, err
	}
	return r.Identity, true, nil
}

// macsOf are the permanent addresses that a device is found by: those of its own interfaces or, where no driver of
// the host has it, those that were recorded. A VF is found by none: its address is what its PF gives it.
func macsOf(h *Host, d *Device) ([]string, error) {
	if d.PhysFn != nil || !d.PCI {
		return nil, nil
	}
	macs, err := PermanentMACs(h, d)
	if err != nil || len(macs) > 0 || d.Blocks() {
		return sortedMACs(macs), err
	}
	was, _, err := Recorded(h, d)
	return sortedMACs(was.MACs), err
}

// serialOf is the serial number that a device is found by: its own or, where no driver of the host has it and it tells
// none, the recorded one.
func serialOf(h *Host, d *Device) (string, error) {
	serial, err := ReadSerial(h, d.Address)
	if err != nil || serial != "" || d.Blocks() {
		return serial, err
	}
	was, _, err := Recorded(h, d)
	return was.Serial, err
}
