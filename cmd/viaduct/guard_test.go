package main

import (
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"viaduct/cmd/internal/declared"
	"viaduct/cmd/internal/hostfile"
	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

// An apply that waits to be confirmed begins once the guard stands where no login takes it along; where it cannot, the
// apply is refused before its first write, and nothing is left of it.
func TestApplyConfirmGuarded(t *testing.T) {
	const procs = "sys/fs/cgroup/cgroup.procs"
	prepare := func() *hosttest.Kernel {
		k := hosttest.NewSmallLab(t, "0000:00:05.0", "0000:00:08.0", sweptNIC, sweptEDU)
		put(t, k, hostfile.File, "devices:\n  - select: "+sweptNIC+"\n")
		put(t, k, "proc/sys/kernel/random/boot_id", "this\n")
		put(t, k, procs, "")
		return k
	}
	k := prepare()
	a := mustOnKernel(t, k, "apply", "--confirm", "60s")
	if !strings.Contains(a.stderr, "undoes this in 1m0s unless") || boundTo(k, sweptNIC) != "vfio-pci" {
		t.Errorf("%+v, on %s", a, boundTo(k, sweptNIC))
	}
	first := func(line string) bool { return strings.HasPrefix(line, procs+"=") }
	if len(k.Log) == 0 || !first(k.Log[0]) || slices.ContainsFunc(k.Log[1:], first) {
		t.Errorf("written: %q", k.Log)
	}
	mustOnKernel(t, k, "apply", "--confirmed")

	k = prepare()
	k.Fail[procs] = unix.EBUSY
	a = onKernel(k, "apply", "--confirm", "60s")
	if a.status != exitFailed || !strings.Contains(a.stderr, "would end with this login") ||
		boundTo(k, sweptNIC) != "e1000" {
		t.Errorf("%+v, on %s", a, boundTo(k, sweptNIC))
	}
	if _, err := declared.Of(&iommu.Host{Host: k.Host()}).Confirm(); err == nil {
		t.Error("there is something to confirm")
	}
}
