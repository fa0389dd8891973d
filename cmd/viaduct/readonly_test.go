package main

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"viaduct/internal/host/hosttest"
)

// A folder that is mounted read-only is told of in one line with its cure, before anything is touched, and its dry run says so too.
func TestReadOnly(t *testing.T) {
	const nic = "0000:07:01.0"
	for line, dirs := range map[string][]string{
		"bind " + nic: {"sys", "run"}, "unbind " + nic: {"sys", "run"}, "vf create 0000:01:00.0 2": {"sys", "run"},
		"vf set 0000:02:00.0/vf0 vlan=7": {"sys", "run"}, "assign web --from " + nic: {"sys", "run"},
		"release web": {"sys", "run"}, "apply": {"sys", "run"}, "undo": {"sys", "run"}, "recover": {"sys", "run"},
		"bind --save " + nic: {"sys", "run", "etc"}, "unbind --save " + nic: {"etc"},
	} {
		for _, dir := range dirs {
			k := hosttest.NewLab(t, nil)
			k.SetFault(func(op, name string) error {
				if op == "access" && name == dir {
					return unix.EROFS
				}
				return nil
			})
			a := onKernel(k, strings.Fields(line)...)
			if a.status != exitFailed || strings.Count(a.stderr, "\n") != 1 ||
				!strings.Contains(a.stderr, "remount,rw /"+dir) ||
				a.stdout != "" || len(k.Log) > 0 {
				t.Errorf("%s with a read-only /%s: exit status %d, log %q\n%s%s", line, dir, a.status, k.Log, a.stdout,
					a.stderr)
			}
			if line == "undo" || line == "recover" || strings.HasPrefix(line, "release") {
				continue
			}
			dry := onKernel(k, append(strings.Fields(line), "--dry-run")...)
			if !strings.Contains(dry.stderr, "/"+dir+" is mounted read-only here") {
				t.Errorf("the dry run of %s with a read-only /%s says\n%s%s", line, dir, dry.stdout, dry.stderr)
			}
		}
	}
}
