package holder

import (
	"errors"
	"path"
	"slices"
	"strings"

	"viaduct/internal/host"
	"viaduct/iommu"
)

// ErrRefused is matched by every error that says that a safety check refused and nothing was touched.
const ErrRefused = host.Error("refused")

// RefusedError says what was refused and why. It matches ErrRefused.
type RefusedError struct {
	What    string // what was to be done
	Reasons []string
	Cure    string   // what the user can do; "" if nothing
	Holders []Holder // those that are among the reasons
	Causes  []error  // the errors that are
}

func (e *RefusedError) Error() string {
	s := "refused to " + e.What + ": " + strings.Join(e.Reasons, "; ")
	if e.Cure != "" {
		s += " (" + e.Cure + ")"
	}
	return s
}

// Unwrap are the errors that are reasons.
func (e *RefusedError) Unwrap() []error { return e.Causes }

// Is makes it an ErrRefused.
func (e *RefusedError) Is(target error) bool { return target == ErrRefused }

// ErrBlind is matched by errors that say that not all holders could be seen. What could be seen is returned beside it.
const ErrBlind = host.Error(
	"who has the device open cannot be seen (that takes root with CAP_SYS_PTRACE, in the host's pid namespace)",
)

// ErrTooMany is matched by errors that say that there are too many open files to look at each, as ErrBlind is.
const ErrTooMany = tooMany("there are more open files than can be looked at")

type tooMany string

func (e tooMany) Error() string { return string(e) }

// Is makes it an ErrBlind.
func (tooMany) Is(target error) bool { return target == ErrBlind }

// Holder is one user of a device.
type Holder struct {
	Device string // the device's name
	Kind   Kind
	What   string // as in "(enp1s0) carries the default route"
	PID    int    // of a process, else 0
	Guest  string // whose the device is, or which a process runs, where that is known
	Root   bool   // the host's root file system is on it
}

func (h Holder) String() string { return h.Device + " " + h.What }

// Find says who uses the devices in a way that must not be cut off. It looks at a running host only: a captured one has
// no users. With an error that matches ErrBlind it returns those that it could see.
func Find(h *iommu.Host, devices []*iommu.Device) ([]Holder, error) {
	if !h.Live() {
		return nil, nil
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

// Refuse returns a *RefusedError naming the holders that force does not override, or nil.
func Refuse(what string, holders []Holder, force []Kind, cure string) error {
	e := &RefusedError{What: what, Cure: cure}
	for _, h := range holders {
		if reason := h.Against(force); reason != "" {
			e.Reasons, e.Holders = append(e.Reasons, reason), append(e.Holders, h)
		}
	}
	if len(e.Reasons) == 0 {
		return nil
	}
	return e
}

// Against says why the holder is a reason to refuse, with how it can be overridden; "" if force overrides it.
func (h Holder) Against(force []Kind) string {
	switch {
	case h.Root && h.Kind.row().keepsRoot:
		return h.String() + ", which cannot be forced"
	case slices.Contains(force, h.Kind):
		return ""
	}
	return h.String() + " [--force=" + string(h.Kind) + "]"
}

func devicePath(a iommu.Address) string { return path.Join("sys/bus/pci/devices", a.String()) }
