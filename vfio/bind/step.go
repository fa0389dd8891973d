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
