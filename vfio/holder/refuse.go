package holder

import (
	"errors"
	"slices"
	"strings"

	"viaduct/internal/host"
)

// ErrRefused is matched by every error that says that a safety check refused and nothing was touched.
const ErrRefused = host.Error("refused")

// RefusedError says what was refused and why. It matches [ErrRefused], and the errors that are among its reasons.
type RefusedError struct {
	What    string // what was to be done
	Reasons []Reason
	Hint    string // what the user can do about all of it; "" if nothing
}

// Reason is one reason of a refusal.
type Reason struct {
	Kind   ReasonKind
	Device string  // the device's name; "" if it is about none
	Text   string  // the reason as a sentence
	Force  Kind    // the kind of holder that has to be forced to go on all the same; "" if nothing goes on
	Hint   string  // what the user can do about this one; "" if nothing
	Holder *Holder // whose use of the device it is; nil if nobody's who is known
	Err    error   // the error that it is; nil if it is none
}

// ReasonKind is the kind of a reason: that of a holder, or one of those below.
type ReasonKind string

// The kinds of reasons that are no holders.
const (
	Declaration ReasonKind = "declaration" // what is declared cannot be had
	Group       ReasonKind = "group"       // something else in the device's IOMMU group
	Guest       ReasonKind = "guest"       // the guest, or its lease, is not as this takes it to be
	IOMMU       ReasonKind = "iommu"       // no IOMMU is in front of the device
	Memlock     ReasonKind = "memlock"     // the VMM may not lock the guest's memory
	Memory      ReasonKind = "memory"      // the IOMMU cannot map the guest's memory
	Program     ReasonKind = "program"     // the program itself could be replaced by others
	Protected   ReasonKind = "protected"   // it is declared in protect, or the host may need it
	Quarantined ReasonKind = "quarantine"  // it could not be scrubbed after its last guest
	Reset       ReasonKind = "reset"       // nothing resets it
	Stuck       ReasonKind = "stuck"       // an earlier change of it has not ended
	Unsuitable  ReasonKind = "unsuitable"  // no guest can have such a device
	Unseen      ReasonKind = "unseen"      // who uses it cannot be seen
	VFs         ReasonKind = "vfs"         // the PF has VFs, or none
)

// Because is a refusal for one reason.
func Because(what string, r Reason, hint string) *RefusedError {
	return &RefusedError{What: what, Reasons: []Reason{r}, Hint: hint}
}

func (e *RefusedError) Error() string {
	var reasons []string
	for _, r := range e.Reasons {
		text := r.Text
		if r.Hint != "" {
			text += " (" + r.Hint + ")"
		}
		reasons = append(reasons, text)
	}
	s := "refused to " + e.What + ": " + strings.Join(reasons, "; ")
	if e.Hint != "" {
		s += " (" + e.Hint + ")"
	}
	return s
}

// Unwrap are the errors that are reasons.
func (e *RefusedError) Unwrap() []error {
	var out []error
	for _, r := range e.Reasons {
		if r.Err != nil {
			out = append(out, r.Err)
		}
	}
	return out
}

// Is makes it an ErrRefused.
func (e *RefusedError) Is(target error) bool { return target == ErrRefused }

// Holders are the holders that are among the reasons.
func (e *RefusedError) Holders() []Holder {
	var out []Holder
	for _, r := range e.Reasons {
		if r.Holder != nil {
			out = append(out, *r.Holder)
		}
	}
	return out
}

// Refuse returns a *RefusedError naming the holders that force does not override, or nil.
func Refuse(what string, holders []Holder, force []Kind, hint string) error {
	e := &RefusedError{What: what, Hint: hint}
	for _, h := range holders {
		if r := h.Against(force); r != nil {
			e.Reasons = append(e.Reasons, *r)
		}
	}
	if len(e.Reasons) == 0 {
		return nil
	}
	return e
}

// Against is the reason that a holder is to refuse, nil if force overrides it.
func (h Holder) Against(force []Kind) *Reason {
	r := h.Reason()
	switch {
	case h.Root && h.Kind.row().keepsRoot:
		r.Text += " (cannot be forced)"
	case slices.Contains(force, h.Kind):
		return nil
	default:
		r.Text, r.Force = r.Text+" [--force="+string(h.Kind)+"]", h.Kind
	}
	return r
}

// Reason is a holder as a reason that nothing overrides.
func (h Holder) Reason() *Reason {
	return &Reason{Kind: ReasonKind(h.Kind), Device: h.Device, Text: h.String(), Holder: &h}
}

// Reasons are the reasons of all refusals in an error's tree, each with what the user can do about it. What could not
// be looked at ([ErrBlind]) is a reason, too.
func Reasons(err error) []Reason {
	switch e := err.(type) { //nolint:errorlint // it walks the tree itself
	case nil:
		return nil
	case *RefusedError:
		return e.reasons()
	case interface{ Unwrap() []error }:
		var out []Reason
		for _, err := range e.Unwrap() {
			out = append(out, Reasons(err)...)
		}
		if len(out) > 0 {
			return out
		}
	case interface{ Unwrap() error }:
		if out := Reasons(e.Unwrap()); len(out) > 0 && out[0].Kind != Unseen {
			return out
		}
	}
	if errors.Is(err, ErrBlind) {
		hint := "run viaduct as root, in the host's pid namespace"
		return []Reason{{Kind: Unseen, Text: err.Error(), Hint: hint, Err: err}}
	}
	return nil
}

// reasons are those of a refusal, where one that is a refusal itself is what that says.
func (e *RefusedError) reasons() []Reason {
	var out []Reason
	for _, r := range e.Reasons {
		inner := Reasons(r.Err)
		if len(inner) == 0 || r.Kind == Stuck {
			inner = []Reason{r}
		}
		for _, r := range inner {
			if r.Hint == "" {
				r.Hint = e.Hint
			}
			out = append(out, r)
		}
	}
	return out
}
