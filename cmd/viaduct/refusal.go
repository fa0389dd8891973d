package main

import (
	"errors"

	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// refusalView is one reason of a refusal in JSON.
type refusalView struct {
	Kind   holder.ReasonKind `json:"kind"`
	Device *string           `json:"device"`
	Who    *string           `json:"who"`
	PID    *int              `json:"pid"`
	Force  *holder.Kind      `json:"force"`
	Hint   *string           `json:"cure"`
	Reason string            `json:"reason"`
}

// viewRefusals are all reasons in an error to refuse something; none if it is not refused.
func viewRefusals(err error) []refusalView {
	out := []refusalView{}
	for _, r := range holder.Reasons(err) {
		v := refusalView{Kind: r.Kind, Device: known(r.Device), Hint: known(r.Hint), Reason: r.Text}
		if h := r.Holder; h != nil {
			if v.Who = known(h.Guest); h.Guest == "" {
				v.Who = known(h.What)
			}
			if h.PID != 0 {
				v.PID = &h.PID
			}
		}
		if r.Force != "" {
			v.Force = &r.Force
		}
		out = append(out, v)
	}
	return out
}

// failedView is what --json prints of a command that failed, or was refused, before it printed anything else.
type failedView struct {
	Error    string        `json:"error"`
	Refusals []refusalView `json:"refusals"`
}

func (e *env) tellFailed(err error) { e.printJSON(failedView{err.Error(), viewRefusals(err)}) }

// writeView is one step in JSON: a write to a file, a module to load, or what is no write, as a command.
type writeView struct {
	Path    string  `json:"path,omitempty"`
	Value   *string `json:"value,omitempty"`
	Module  string  `json:"module,omitempty"`
	Command string  `json:"command,omitempty"`
}

// viewSteps are steps as shell commands, and the same as data.
func viewSteps(steps []bind.Action) (commands []string, writes []writeView) {
	writes = []writeView{}
	for _, s := range steps {
		switch {
		case s.Module != "":
			writes = append(writes, writeView{Module: s.Module})
		case s.Path != "":
			writes = append(writes, writeView{Path: "/" + s.Path, Value: &s.Value})
		default:
			writes = append(writes, writeView{Command: s.Command})
		}
	}
	return bind.Commands(steps), writes
}

// isRefused reports whether a safety check refused a command, which has touched nothing.
func isRefused(err error) bool {
	return errors.Is(err, holder.ErrRefused) || errors.Is(err, holder.ErrBlind)
}
