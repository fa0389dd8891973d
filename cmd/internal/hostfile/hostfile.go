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
	Protect []Protect `yaml:"protect" doc:"devices that are never touched"`
	PFs     []PF      `yaml:"pfs"     doc:"SR-IOV physical functions, and what their VFs are"`
	Devices []Device  `yaml:"devices" doc:"devices that are taken from the host for passthrough"`
	Roles   []Role    `yaml:"roles"   doc:"roles of devices in their IOMMU groups, where their class says something else"`
}

// Role is what becomes of devices when a guest gets their IOMMU group, whatever their class says.
type Role struct {
	At     Pos        `yaml:"-"`
	Select Match      `yaml:"select" required:"true" doc:"the devices: all that have these words, as class=0c05"`
	Role   iommu.Role `yaml:"role"   required:"true" doc:"guest: handed over; companion: only kept off the host's drivers" enum:"guest,companion"`
}

// Protect names devices that are never touched, whatever else is declared.
type Protect struct {
	At    Pos   `yaml:"-"`
	Match Match `yaml:",scalar"`
}

// PF is a physical function with its VFs. What is left out is left as it is.
type PF struct {
	At       Pos     `yaml:"-"`
	Select   Match   `yaml:"select"        either:"pf" doc:"the PF: mac=, path=, serial=, ids, an address, an interface; several words must all hold"`
	All      Matches `yaml:"each"         either:"pf" doc:"instead of select, all PFs that one of these selectors names: each gets VFs like these"`
	Optional bool    `yaml:"optional"                      doc:"its absence is no failure"`
	Count    int     `yaml:"count"         required:"true" doc:"number of VFs"                                                                                             min:"0"  max:"65535"`
	MTU      int     `yaml:"mtu"                           doc:"that VFs are to be able to have: the PF's is raised to it, never lowered"                                  min:"68" max:"65535"`
	Eswitch  string  `yaml:"eswitch"                       doc:"mode of the e-switch"                                                                                                           enum:"legacy,switchdev"`
	Inline   string  `yaml:"inline_mode"                   doc:"of the e-switch"                                                                                                                enum:"none,link,network,transport"`
	Encap    string  `yaml:"encap"                         doc:"of the e-switch"                                                                                                                enum:"none,basic"`
	Offload  string  `yaml:"hw_tc_offload"                 doc:"whether the NIC carries out the e-switch's rules"                                                                               enum:"on,off"`
	AfterLAG bool    `yaml:"after_bond"                    doc:"its VFs get their drivers only when the PF is in a bond, which others make: for switchdev PFs of one bond"`
	VFs      []VFs   `yaml:"vfs"                           doc:"what the VFs are, by ranges; those in no range have no driver and no settings"`
}

// Matches names devices: each that one of them does. One may be written without a list.
type Matches []Match

// VFs is a range of a PF's VFs.
type VFs struct {
	At       Pos            `yaml:"-"`
	Range    Range          `yaml:"range"     doc:"indexes, as 0-3 or 0-3,6; all if left out"`
	Driver   sriov.Use      `yaml:"driver"    doc:"what drives them; none if left out"        enum:"vfio,home,none"`
	Pool     string         `yaml:"pool"      doc:"name that guests draw from"`
	Network  string         `yaml:"network"   doc:"unmanaged: NetworkManager and systemd-networkd leave its interface alone" enum:"unmanaged"`
	Settings map[Key]Valued `yaml:",settings"`
}

// Device is a device that is taken for passthrough, with all of its IOMMU group.
type Device struct {
	At       Pos    `yaml:"-"`
	Select   Match  `yaml:"select"     required:"true" doc:"the device, as a PF's"`
	Optional bool   `yaml:"optional"                   doc:"its absence is no failure"`
	Driver   string `yaml:"driver"                     doc:"vfio driver; auto, the default, is the device's own variant driver, else vfio-pci"`
	Owner    string `yaml:"node_owner"                 doc:"USER[:GROUP] that the device's nodes belong to"`
	Early    bool   `yaml:"initramfs"                  doc:"taken in the initramfs already, before its own driver can have it"`
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
