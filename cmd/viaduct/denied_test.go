package main

import (
	"errors"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"viaduct/cmd/internal/changelog"
	"viaduct/cmd/internal/hostfile"
	"viaduct/internal/host/hosttest"
)

// A command that cannot lock what it changes says so and changes nothing.
func TestLocksThatFail(t *testing.T) {
	confirming := func(t *testing.T) *hosttest.Kernel {
		k := strayed(t)
		put(t, k, hostfile.File, sweptFile+"protect: []\n")
		return k
	}
	returned := func(t *testing.T) *hosttest.Kernel {
		k := sweptHost(t)
		mustOnKernel(t, k, "unbind", sweptNIC)
		return k
	}
	applied := func(t *testing.T) *hosttest.Kernel {
		k := strayed(t)
		mustOnKernel(t, k, "apply")
		return k
	}
	for _, c := range []struct {
		lock string
		host func(*testing.T) *hosttest.Kernel
		line string
	}{
		{"lock", returned, "bind " + sweptNIC}, {"lock", sweptHost, "unbind " + sweptNIC},
		{"lock", returned, "bind --save " + sweptNIC}, {"lock", sweptHost, "verify " + sweptNIC},
		{"lock", sweptHost, "vf create " + sweptPF + " 3"}, {"lock", sweptHost, "vf destroy " + sweptPF},
		{"lock", sweptHost, "vf set " + sweptPF + "/vf1 vlan=5"}, {"lock", sweptHost, "vf sync"},
		{"lock", strayed, "apply"}, {"lock", strayed, "apply --boot --wait 0s"}, {"lock", applied, "undo"},
		{"lock", returned, "assign db --from " + sweptNIC}, {"lock", sweptHost, "release web"},
		{"lock", returned, "run db --from " + sweptNIC + " -- true"},
		{"lock-in-force", strayed, "apply"},
		{"lock-in-force", confirming, "apply --confirm 60s"}, {"lock-in-force", applied, "apply --confirmed"},
		{"lock-leases", returned, "assign db --from " + sweptNIC}, {"lock-leases", sweptHost, "release web"},
		{"lock-leases", returned, "run db --from " + sweptNIC + " -- true"},
		{"lock-leases", sweptHost, "migrate web --to exec:false"},
		{"lock-leases", sweptHost, "migrate web --cancel"}, {"lock-leases", sweptHost, "migrate web --resume"},
	} {
		k := c.host(t)
		file := filepath.Join(k.Dir(), "run/viaduct", c.lock)
		if err := errors.Join(os.RemoveAll(file), os.MkdirAll(file, 0o755)); err != nil {
			t.Fatal(err)
		}
		before := maps.Clone(allOf(t, k))
		k.Log = nil
		a := onKernel(k, strings.Fields(c.line)...)
		if a.status == exitDone || !strings.Contains(a.stdout+a.stderr, unix.EISDIR.Error()) {
			t.Errorf("%s without %s: %+v", c.line, c.lock, a)
		}
		after := allOf(t, k)
		for name := range after {
			// What is told is written down.
			if before[name] != after[name] && name != changelog.File {
				t.Errorf("%s without %s: /%s was %q, is %q", c.line, c.lock, name, before[name], after[name])
			}
		}
		if len(k.Log) > 0 {
			t.Errorf("%s without %s: written %q", c.line, c.lock, k.Log)
		}
	}
}
