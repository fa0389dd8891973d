package main

import (
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"viaduct/cmd/internal/hostfile"
	"viaduct/internal/host/hosttest"
)

// leadsTo are the calls of this program's own that lead to an operation.
func leadsTo(calls hosttest.Operation) string {
	if len(calls) == 0 {
		return ""
	}
	var out strings.Builder
	frames := runtime.CallersFrames(calls)
	for {
		f, more := frames.Next()
		if strings.HasPrefix(f.Function, "viaduct/cmd/viaduct.") && !strings.HasSuffix(f.File, "_test.go") {
			fmt.Fprintf(&out, "%s:%d ", f.Function, f.Line)
		}
		if !more {
			return out.String()
		}
	}
}

// ownSteps are, of the operations of commands, those that this program's own steps lead to: the first that each leads to,
// and the last.
func ownSteps(all []hosttest.Operation) []int {
	first, last := map[string]int{}, map[string]int{}
	for n, calls := range all {
		by := leadsTo(calls)
		if _, known := first[by]; !known {
			first[by] = n
		}
		last[by] = n
	}
	return slices.Compact(slices.Sorted(slices.Values(slices.Concat(slices.Collect(maps.Values(first)),
		slices.Collect(maps.Values(last))))))
}

// A command that changes something ends with an error that says so, or all is done, whichever operation of those fails
// that its own steps lead to: the first that each leads to, and the last.
func TestChangesThatFail(t *testing.T) {
	t.Setenv(asProgram, "1") // which run starts
	const (
		pools = "pfs:\n  - select: " + sweptPF + "\n    count: 2\n    vfs: [{range: 0-1, driver: none, pool: net}]\n"
		nic   = "devices:\n  - select: " + sweptNIC + "\n"
	)

	for _, c := range []struct {
		file   string
		before []string
		line   string
	}{
		{"", nil, "bind " + sweptNIC},
		{"", nil, "bind --node-owner 1000 --json " + sweptNIC},
		{"", []string{"bind " + sweptNIC}, "unbind " + sweptNIC},
		{nic, []string{"apply"}, "unbind --save " + sweptNIC},
		{"", nil, "vf create " + sweptPF + " 2 vlan=7"},
		{"", []string{"vf create " + sweptPF + " 2"}, "vf create --driver vfio --json " + sweptPF + " 1"},
		{"", []string{"vf create " + sweptPF + " 2"}, "vf set " + sweptPF + "/vf1 vlan=7 trust=on"},
		{pools, []string{"apply", "vf set " + sweptPF + "/vf1 vlan=7"}, "vf sync"},
		{"", []string{"vf create " + sweptPF + " 2"}, "vf destroy " + sweptPF},
		{pools, []string{"apply"}, "assign web --from net --vlan 7 --memory 1G"},
		{pools, []string{"apply"}, "assign web --from net --persist --format json"},
		{pools, nil, "apply --json"},
		{nic, []string{"apply"}, "undo"},
		{nic, []string{"apply", "unbind " + sweptNIC}, "apply --boot --wait 0s"},
		{pools, []string{"apply", "assign web --from net"}, "release web"},
		{nic, []string{"bind " + sweptNIC}, "recover"},
		{pools, []string{"apply"}, "run web --from net --movable --format qemu -- true"},
		{"", []string{"vf create " + sweptPF + " 2"}, "bind " + sweptPF + "/vf1"},
		{nic, nil, "install"},
		{nic, []string{"install"}, "uninstall"},
		{nic, nil, "bind --save " + sweptEDU},
	} {
		prepare := func() *hosttest.Kernel {
			k := hosttest.NewSmallLab(t, "0000:00:05.0", sweptPF, "0000:00:08.0", sweptNIC, sweptEDU)
			put(t, k, "proc/sys/kernel/random/boot_id", "this\n")
			if c.file != "" {
				put(t, k, hostfile.File, c.file)
			}
			for _, line := range c.before {
				mustOnKernel(t, k, strings.Fields(line)...)
			}
			for _, vf := range []string{sweptVF, "0000:01:10.2"} {
				if k.Host().Exists("sys/bus/pci/devices/" + vf) {
					put(t, k, "sys/bus/pci/devices/"+vf+"/reset", "")
				}
			}
			return k
		}
		k := prepare()
		var usual answer
		all := k.Operations(func() { usual = onKernel(k, strings.Fields(c.line)...) })
		if usual.status != exitDone {
			t.Errorf("%s: %+v", c.line, usual)
			continue
		}
		want := sweptState(t, k)
		for _, n := range ownSteps(all) {
			k := prepare()
			failed := k.FailNth(n, []error{unix.EIO, unix.EACCES, unix.ENOSPC}[n%3])
			a := onKernel(k, strings.Fields(c.line)...)
			k.Revive()
			now := sweptState(t, k)
			if strings.HasPrefix(c.line, "run ") && a.status == exitDone && a.stderr != usual.stderr {
				// The command has run, and what became of its devices is told beside its status.
				continue
			}
			if a.status == exitDone && (now != want || saysNothing(a.stdout) != saysNothing(usual.stdout)) ||
				a.status != exitDone && a.stderr == "" && !strings.Contains(a.stdout, "error") {
				t.Errorf("%s: operation %d (%s) fails: %+v\nis %s\nto be %s", c.line, n, failed(), a, now, want)
			}
		}
	}
}

func saysNothing(text string) bool { return strings.TrimSpace(text) == "" }
