package bind

import (
	"fmt"
	"strings"
	"time"

	"viaduct/internal/host"
	"viaduct/internal/shell"
)

// Step is one write to a file of the host, or one module to load.
type Step struct {
	Module string // load this module; the other fields are empty then
	Path   string // relative to the host's root
	Value  string
	// Extra is how much longer than others this write may take where nobody has said how long one may.
	Extra time.Duration `json:",omitempty"`
}

// String is the step as a shell command.
func (s Step) String() string {
	if s.Module != "" {
		words := []string{shell.Quote(host.ModprobePath)}
		for _, word := range host.ModprobeArgs(s.Module) {
			// "--" is what a program needs and a person does not.
			if word != "--" {
				words = append(words, shell.Quote(word))
			}
		}
		return strings.Join(words, " ")
	}
	if v := strings.TrimSuffix(s.Value, "\n"); v != "" {
		return fmt.Sprintf("echo %s > %s", shell.Quote(v), shell.Quote("/"+s.Path))
	}
	return "echo > " + shell.Quote("/"+s.Path)
}

// Action is one step of a plan as it is shown: a Step, or what is no write to a file, as a shell command.
type Action struct {
	Step
	Command string
}

// String is the action as a shell command.
func (a Action) String() string {
	if a.Command != "" {
		return a.Command
	}
	return a.Step.String()
}

// Actions are steps as they are shown.
func Actions(steps []Step) []Action {
	var out []Action
	for _, s := range steps {
		out = append(out, Action{Step: s})
	}
	return out
}

// Commands are actions as shell commands.
func Commands(actions []Action) []string {
	out := make([]string, 0, len(actions))
	for _, a := range actions {
		out = append(out, a.String())
	}
	return out
}
