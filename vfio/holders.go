package vfio

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"viaduct/internal/host"
	"viaduct/iommu"
)

// ErrRefused is matched by every error that says that a safety check refused and nothing was touched.
var ErrRefused = errors.New("refused")

// RefusedError says what was refused and why. It matches ErrRefused.
type RefusedError struct {
	What    string // what was to be done
	Reasons []string
	Cure    string // what the user can do; "" if nothing
}

func (e *RefusedError) Error() string {
	s := "refused to " + e.What + ": " + strings.Join(e.Reasons, "; ")
	if e.Cure != "" {
		s += " (" + e.Cure + ")"
	}
	return s
}

// Is makes it an ErrRefused.
func (e *RefusedError) Is(target error) bool { return target == ErrRefused }

// Kind is a kind of holder; each can be overridden by itself.
type Kind string

// The kinds of holders.
const (
	Process   Kind = "process"   // has the device's node open
	Lease     Kind = "lease"     // it is a guest's, running or not
	Mount     Kind = "mount"     // a mounted file system
	Swap      Kind = "swap"      // in use as swap
	Storage   Kind = "storage"   // under device-mapper, md, LVM, ZFS
	Route     Kind = "route"     // a route leads over its network interface, or over what is stacked on it
	Addressed Kind = "address"   // its network interface, or what is stacked on it, has an address
	Stacked   Kind = "stack"     // its network interface is in a bond, bridge or team, or under a VLAN, macvlan or tunnel
	Namespace Kind = "namespace" // its network interface is in another network namespace
	SSH       Kind = "ssh"       // an ssh connection to this host goes over it
	Display   Kind = "display"   // the boot VGA, or an active framebuffer
	Owner     Kind = "owner"     // another tool has it in its books
)

// Kinds are all kinds of holders.
var Kinds = []Kind{Process, Lease, Mount, Swap, Storage, Route, Addressed, Stacked, Namespace, SSH, Display, Owner}

// Holder is one user of a device.
type Holder struct {
	Device string
	Kind   Kind
	What   string // as in "(enp1s0) carries the default route"
	PID    int    // of a process, else 0
	Guest  string // whose the device is, or which a process runs, where that is known
	Final  bool   // cannot be overridden
}

func (h Holder) String() string { return h.Device + " " + h.What }

// Holders says who uses the devices in a way that must not be cut off. It looks at the running host only: a captured one has
// no users. With an error that matches [ErrBlind] it returns those that it could see.
func Holders(h *iommu.Host, devices []*iommu.Device) ([]Holder, error) {
	if !h.Live() {
		return nil, nil
	}
	var out []Holder
	var blind error
	for _, look := range []func(*iommu.Host, []*iommu.Device) ([]Holder, error){
		netHolders, diskHolders, displayHolders, ProcessHolders, LeaseHolders, Owners,
	} {
		found, err := look(h, devices)
		if errors.Is(err, ErrBlind) {
			blind = err
		} else if err != nil {
			return nil, err
		}
		out = append(out, found...)
	}
	return out, blind
}

// Refuse is the *RefusedError that holders are reason for, nil if force overrides them all.
func Refuse(what string, holders []Holder, force []Kind, cure string) error {
	return refused(what, unforced(holders, force), cure)
}

// unforced are the holders that force does not override, as sentences.
func unforced(holders []Holder, force []Kind) []string {
	var out []string
	for _, h := range holders {
		if h.Final {
			out = append(out, h.String()+", which cannot be forced")
		} else if !slices.Contains(force, h.Kind) {
			out = append(out, h.String()+" [--force="+string(h.Kind)+"]")
		}
	}
	return out
}

// displayHolders finds the display that the firmware began with and active framebuffers.
func displayHolders(h *iommu.Host, devices []*iommu.Device) ([]Holder, error) {
	const class = "sys/class/graphics"
	var out []Holder
	var frames map[string]string
	for _, d := range devices {
		if !d.PCI || d.Class>>16 != 3 || iommu.IsVFIODriver(d.Driver) { // without a driver too: the console may be on its memory
			continue
		}
		if boot, err := h.Steady(path.Join(devicePath(d.Address), "boot_vga")); err == nil && boot == "1" {
			out = append(out, Holder{Device: d.Name, Kind: Display, What: "is the display this host started on"})
		}
		if frames == nil {
			frames = map[string]string{}
			names, err := h.Names(class)
			if err != nil && !host.Absent(err) {
				return nil, err
			}
			for _, n := range names {
				target, err := h.Link(path.Join(class, n))
				if err != nil || !strings.HasPrefix(n, "fb") {
					continue
				}
				for part := range strings.SplitSeq(target, "/") {
					frames[part] = n
				}
			}
		}
		if fb := frames[d.Name]; fb != "" {
			out = append(out, Holder{Device: d.Name, Kind: Display, What: fmt.Sprintf("has the active framebuffer %s", fb)})
		}
	}
	return out, nil
}
