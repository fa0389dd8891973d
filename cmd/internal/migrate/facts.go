// Package migrate moves a running guest with its devices to another host: it checks beforehand whether that will work,
// and then drives both hosts, each from its own side.
//
// What decides is pure: checks of what was read (check.go), and what is to be done next at each point of a move
// (source.go, destination.go). What asks and acts stands apart from it.
package migrate

import (
	"viaduct/cmd/internal/vmm"
	"viaduct/iommu"
	"viaduct/sriov"
)

// Facts are what a host is and has, as far as a migration is concerned: read from the host itself, from a snapshot, or
// told by the viaduct there. What is not known is nil, or empty.
type Facts struct {
	Host      string                `json:"host"`   // what the user calls it
	Arch      string                `json:"arch"`   // the kernel's name of the machine, e.g. x86_64
	Kernel    string                `json:"kernel"` // its release
	CPU       *CPU                  `json:"cpu"`
	Memory    *Memory               `json:"memory"`
	Nested    *bool                 `json:"nested"` // KVM lets guests be hosts
	Units     []Unit                `json:"iommus"`
	Remapping *bool                 `json:"interrupt_remapping"`
	Ports     []Port                `json:"pfs"`
	Bridges   []iommu.Bridge        `json:"bridges"`
	VLANs     []iommu.VLANInterface `json:"vlan_interfaces"`
	Used      []Used                `json:"addresses"` // MAC addresses that something here has
	// by MAC address, the interface that it was learned on; nil: nobody was asked
	// Heard has, by MAC address, the interface that it was learned on; nil: nobody was asked.
	Heard  map[string]string `json:"heard"`
	Guests []string          `json:"guests"` // that have leases
	QEMU   *QEMU             `json:"qemu"`
	// Libvirt is its version, where libvirt runs the guest; "" if it does not answer, or was not asked.
	Libvirt string `json:"libvirt,omitempty"`
	Live    bool   `json:"live"` // the host itself answers, and no snapshot
}

// CPU is the first CPU of a host; all others are taken to be as it.
type CPU struct {
	Vendor   string   `json:"vendor"` // as CPUID has it, e.g. AuthenticAMD
	Family   int      `json:"family"`
	Model    int      `json:"model"`
	Name     string   `json:"name"`
	Flags    []string `json:"flags"`
	VMXFlags []string `json:"vmx_flags"`
}

// Memory is a host's, in bytes.
type Memory struct {
	Total     uint64 `json:"total"`
	Available uint64 `json:"available"`
}

// Unit is an IOMMU.
type Unit struct {
	Name string         `json:"name"`
	Kind iommu.UnitKind `json:"kind"`
	Bits int            `json:"address_bits"` // it can map addresses of so many; 0: not known
}

// Port is a PF that has VFs.
type Port struct {
	Address  string   `json:"address"`
	Netdev   string   `json:"netdev"` // "" if it has none
	Master   string   `json:"master"` // the bond or bridge that the interface is in
	ID       iommu.ID `json:"id"`
	Driver   string   `json:"driver"`
	MTU      int      `json:"mtu"`
	Carrier  *bool    `json:"carrier"`
	Speed    int      `json:"speed"` // in Mbit/s; 0: not known
	Firmware string   `json:"firmware"`
	VFs      []VF     `json:"vfs"`
}

// VF is one VF of a PF.
type VF struct {
	Index   int            `json:"index"`
	Address string         `json:"address"`
	ID      iommu.ID       `json:"id"`
	Kind    string         `json:"kind,omitempty"` // of a mediated device, its type
	Driver  string         `json:"driver"`
	Pool    string         `json:"pool"`
	Free    bool           `json:"free"`
	Why     string         `json:"why"` // it is not free
	Unit    string         `json:"iommu"`
	Regions []iommu.Region `json:"reserved"`
}

// Used is a MAC address that something has.
type Used struct {
	MAC  string `json:"mac"`
	What string `json:"what"`
}

// QEMU is what a host's QEMU answered when it was tried with a guest's words.
type QEMU struct {
	Version  string   `json:"version"`
	Machines []string `json:"machines"` // their names and aliases
	Refused  string   `json:"refused"`  // why it did not take the guest's CPU and machine; "" if it did
}

// Guest is a guest that is to move, with what is known of it on its host.
type Guest struct {
	Name    string        `json:"name"`
	From    string        `json:"from"` // what its devices were drawn from
	Devices []GuestDevice `json:"devices"`
	VM      *vmm.Machine  `json:"vm"`
	State   *VMState      `json:"asked"` // nil: its QEMU was not asked
}

// GuestDevice is a device that a guest has.
type GuestDevice struct {
	Address  string         `json:"address"`
	ID       iommu.ID       `json:"id"`
	Driver   string         `json:"driver"`
	PF       string         `json:"pf"` // the PF's address; "" of what is no VF
	Settings sriov.Settings `json:"settings"`
	Kind     string         `json:"kind,omitempty"` // of a mediated device, its type
	// Migratable reports whether the device's state can be read and written (VFIO's migration
	// protocol); nil: not known.
	Migratable *bool `json:"moves"`
}

// VMState is what a guest's QEMU answered.
type VMState struct {
	Version   string   `json:"version"`
	Status    string   `json:"status"`
	Migration string   `json:"migration"` // of one that is, or was last; "" for none
	Blocked   []string `json:"blocked"`
	Machine   string   `json:"machine"`   // the versioned type
	Primary   *bool    `json:"primary"`   // of a failover pair: the guest has it; nil: there is no pair
	Pluggable bool     `json:"pluggable"` // its first device can be unplugged by the name that viaduct gives it
	Jobs      int      `json:"jobs"`
	Disks     []Disk   `json:"disks"`
}

// Disk is a file that a guest has as a disk.
type Disk struct {
	Path  string `json:"path"`
	There *bool  `json:"there"` // on the destination
}
