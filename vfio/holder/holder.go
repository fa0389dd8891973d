package holder

import (
	"errors"
	"path"
	"slices"

	"viaduct/internal/host"
	"viaduct/iommu"
)

// ErrBlind is matched by errors that say that not all holders could be seen. What could be seen is returned beside it.
const ErrBlind = host.Error(
	"viaduct cannot see who has the device open (that needs root with CAP_SYS_PTRACE, in the host's pid namespace)",
)

// ErrTooMany is matched by errors that say that there are too many open files to look at each, as ErrBlind is.
const ErrTooMany = blindness("there are more open files than viaduct can read")

// blindness is a reason of its own why not all could be seen.
type blindness string

func (e blindness) Error() string { return string(e) }

// Is makes it an ErrBlind.
func (blindness) Is(target error) bool { return target == ErrBlind }

// Holder is one user of a device.
type Holder struct {
	Device string // the device's name
	Kind   Kind
	What   string // as in "(enp1s0) carries the default route"
	Brief  string // the same for a list, as in "default route"; [Glance] alone has it of all kinds
	PID    int    // of a process, else 0
	Guest  string // whose the device is, or which a process runs, where that is known
	Root   bool   // the host's root file system is on it
}

func (h Holder) String() string { return h.Device + " " + h.What }

// Find says who uses the devices in a way that must not be cut off. Of a captured host it says who did when that was
// captured; one that does not tell is an ErrNotCaptured. With an error that matches ErrBlind it returns those that it
// could see.
func Find(h *iommu.Host, devices []*iommu.Device) ([]Holder, error) {
	if !h.Live() {
		return findCaptured(h, devices)
	}

	var out []Holder
	var blind error
	var looked []*look
	for i := range kinds {
		l := kinds[i].look
		if slices.Contains(looked, l) {
			continue
		}
		looked = append(looked, l)
		found, err := l.find(h, devices)
		if errors.Is(err, ErrBlind) {
			blind = err
		} else if err != nil {
			return nil, err
		}
		out = append(out, found...)
	}
	return out, blind
}

func devicePath(a iommu.Address) string { return path.Join("sys/bus/pci/devices", a.String()) }
