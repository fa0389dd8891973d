package bind

import (
	"fmt"
	"strings"
	"time"

	"viaduct/internal/host"
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
		// "--" is what a program needs and a person does not.
		args := strings.Replace(strings.Join(host.ModprobeArgs(s.Module), " "), "-- ", "", 1)
		return host.ModprobePath + " " + args
	}
	if v := strings.TrimSuffix(s.Value, "\n"); v != "" {
		return fmt.Sprintf("echo %s > /%s", v, s.Path)
	}
	return fmt.Sprintf("echo > /%s", s.Path)
}
