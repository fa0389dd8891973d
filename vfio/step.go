// Package vfio takes devices from the host's drivers and gives them back, and finds out who uses a device.
//
// A change is planned first, as the list of writes it consists of, and then carried out: what --dry-run prints is what is
// done. After every change the kernel's own files are read to see whether it took.
package vfio

import (
	"fmt"
	"strings"
)

// Step is one write to a file of the host, or one module to load.
type Step struct {
	Module string // load this module; the other fields are empty then
	Path   string // relative to the host's root
	Value  string
}

// String is the step as a shell command.
func (s Step) String() string {
	if isAlias(s.Module) {
		return modprobePath + " -b " + s.Module
	}
	if s.Module != "" {
		return modprobePath + " " + s.Module
	}
	if v := strings.TrimSuffix(s.Value, "\n"); v != "" {
		return fmt.Sprintf("echo %s > /%s", v, s.Path)
	}
	return fmt.Sprintf("echo > /%s", s.Path)
}
