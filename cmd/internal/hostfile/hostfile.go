// Package hostfile is the declared host: what /etc/viaduct/host.yaml and its drop-ins say that a host's PFs, VFs and
// passthrough devices are. It reads and writes files and knows nothing of the host that they are for.
package hostfile

import (
	"fmt"

	"viaduct/iommu"
	"viaduct/sriov"
)

// Host is a host as it is declared.
type Host struct {
	Protect []Protect `yaml:"protect" doc:"devices that viaduct never changes"`
	PFs     []PF      `yaml:"pfs"     doc:"SR-IOV physical functions (PFs) with their VFs"`
	Devices []Device  `yaml:"devices" doc:"devices that are taken from the host, with their IOMMU groups"`
	Roles   []Role    `yaml:"roles"   doc:"roles of devices in their IOMMU groups that differ from what their class implies"`
}

// Role is what becomes of devices when a guest gets their IOMMU group, whatever their class says.
type Role struct {
	At     Pos        `yaml:"-"`
	Select Match      `yaml:"select" required:"true" doc:"selector of the devices, e.g. class=0c05; several words must all match"`
	Role   iommu.Role `yaml:"role"   required:"true" doc:"guest (a guest gets the device) or companion (viaduct only keeps it off the host's drivers)" enum:"guest,companion"`
}

// Protect names devices that viaduct never changes, whatever else is declared.
type Protect struct {
	At    Pos   `yaml:"-"`
	Match Match `yaml:",scalar"`
}

// PF is a physical function with its VFs. What is left out is left as it is.
type PF struct {
	At        Pos     `yaml:"-"`
	Select    Match   `yaml:"select"        either:"pf" doc:"selector of the PF (e.g. mac=, path=, serial=, ids); several words must all match"`
	All       Matches `yaml:"each"         either:"pf" doc:"instead of select, all PFs that one of these selectors names: each gets VFs like these"`
	Optional  bool    `yaml:"optional"                      doc:"a missing device is not an error"`
	Count     int     `yaml:"count"         required:"true" doc:"number of VFs"                                                                                             min:"0"  max:"65535"`
	MTU       int     `yaml:"mtu"                           doc:"raise the MTU of the PF to this; viaduct never lowers it"                                  min:"68" max:"65535"`
	Eswitch   string  `yaml:"eswitch"                       doc:"mode of the e-switch"                                                                                                           enum:"legacy,switchdev"`
	Inline    string  `yaml:"inline_mode"                   doc:"inline mode of the e-switch"                                                                                                    enum:"none,link,network,transport"`
	Encap     string  `yaml:"encap"                         doc:"tunnel offload of the e-switch"                                                                                                 enum:"none,basic"`
	Offload   string  `yaml:"hw_tc_offload"                 doc:"let the NIC carry out the rules of the e-switch"                                                                               enum:"on,off"`
	AfterBond bool    `yaml:"after_bond" json:"AfterLAG"                  doc:"bind the VFs only when the PF is in a bond; for the switchdev PFs of one bond"`
	VFs       []VFs   `yaml:"vfs"                           doc:"VFs by ranges; a VF in no range has no driver and no settings"`
}

// Matches names devices: each that one of them does. One may be written without a list.
type Matches []Match

// VFs is a range of a PF's VFs.
type VFs struct {
	At       Pos            `yaml:"-"`
	Range    Range          `yaml:"range"     doc:"indexes (e.g. 0-3 or 0-3,6; default: all)"`
	Driver   sriov.Use      `yaml:"driver"    doc:"driver of the VFs: vfio, home, none or the name of a vfio driver (default: none)" word:"use"`
	Pool     string         `yaml:"pool"      doc:"name of the pool from which guests draw these VFs"`
	Network  string         `yaml:"network"   doc:"have NetworkManager and systemd-networkd leave its interface alone" enum:"unmanaged"`
	Settings map[Key]Valued `yaml:",settings"`
}

// Device is a device that is taken for passthrough, with all of its IOMMU group.
type Device struct {
	At        Pos    `yaml:"-"`
	Select    Match  `yaml:"select"     required:"true" doc:"selector of the device, as for a PF"`
	Optional  bool   `yaml:"optional"                   doc:"a missing device is not an error"`
	Driver    string `yaml:"driver"                     doc:"vfio, none or the name of a vfio driver (default: vfio, the device's variant driver, else vfio-pci)" word:"driver"`
	Owner     string `yaml:"node_owner"                 doc:"USER[:GROUP] that owns the device's nodes"`
	Initramfs bool   `yaml:"initramfs" json:"Early"                doc:"take the device in the initramfs, before the host's driver can have it"`
}

// Key is a VF setting's.
type Key = sriov.Key

// Pos is where something was written; the zero value is nowhere.
type Pos struct {
	File         string
	Line, Column int
}

func (p Pos) String() string {
	if p.Line == 0 {
		return p.File
	}
	return fmt.Sprintf("%s:%d:%d", p.File, p.Line, p.Column)
}

// Error is something wrong in a file.
type Error struct {
	At   Pos
	Text string // that is wrong, as it was written; "" where something is missing
	Why  string
}

func (e *Error) Error() string {
	if e.Text == "" {
		return e.At.String() + ": " + e.Why
	}
	return fmt.Sprintf("%s: %q: %s", e.At, e.Text, e.Why)
}

// VF is what one VF of a PF is to be.
type VF struct {
	At        Pos
	Use       sriov.Use
	Pool      string
	Unmanaged bool // its interface is left alone by what configures the host's network
	Settings  sriov.Settings
}

// Each are a PF's VFs by index, templates filled in.
func (p *PF) Each() []VF {
	out := make([]VF, p.Count)
	for i := range out {
		out[i] = VF{Use: sriov.UseNone, Settings: sriov.Settings{}}
	}
	for _, r := range p.VFs {
		use := r.Driver
		if use == "" {
			use = sriov.UseNone
		}
		for _, i := range r.Range.Indexes(p.Count) {
			vf := VF{At: r.At, Use: use, Pool: r.Pool, Unmanaged: r.Network != "", Settings: sriov.Settings{}}
			for k, v := range r.Settings {
				vf.Settings[k] = v.Of(i)
			}
			out[i] = vf
		}
	}
	return out
}
