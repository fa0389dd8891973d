package main

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"viaduct/internal/host"
	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

// A host that cannot be opened, or not once more, is told by every command, which fails; one that fails anyway may tell
// that.
func TestHostThatCannotBeOpened(t *testing.T) {
	t.Setenv(asProgram, "1") // which run starts
	no := errors.New("it cannot be opened")
	lines := []string{
		"snapshot " + t.TempDir() + "/x", "verify " + sweptVF, "bind " + sweptNIC, "unbind " + sweptNIC,
		"vf create " + sweptPF + " 2",
		"vf set " + sweptPF + "/vf0 vlan=9", "vf sync", "vf destroy " + sweptPF, "apply", "apply --boot --wait 0s",
		"apply --confirmed", "undo", "undo --unless-confirmed", "recover", "assign new --from " + sweptVF,
		"assign web --from " + sweptVF,
		"release web", "release --dead", "release --quarantined " + sweptVF, "run new --from " + sweptVF + " -- true",
		"install", "uninstall",
		"migrate web --to exec:false", "migrate web --to exec:false --check", "migrate web --cancel",
		"migrate web --resume", "adopt --import netplan", "assign db --from " + sweptNIC + " --owner-pid 1",
		"run db --movable --from " + sweptNIC + " --format qemu -- true", "migrate --peer --data x",
		"libvirt-hook -- web prepare begin -",
	}
	for _, line := range lines {
		opensInTurn(t, line, func() *hosttest.Kernel { return sweptHost(t) }, no)
	}
	k := littered(t)
	for _, line := range looks {
		opensInTurn(t, line, func() *hosttest.Kernel { return k }, no)
	}
}

// The watch service, which else runs until it is ended, ends with an error where it cannot begin.
func TestWatchCannotBegin(t *testing.T) {
	k := sweptHost(t)
	for n := range 4 {
		line := []string{"viaduct", "watch", "--once"}[:2+n%2]
		opened := 0
		open := func(string) (*iommu.Host, error) {
			if opened++; opened > n/2 {
				return nil, errors.New("it cannot be opened")
			}
			h, err := host.Fake(k.Dir(), k)
			return &iommu.Host{Host: h}, err
		}
		var stdout, stderr bytes.Buffer
		if status := runOn(open, line, &stdout, &stderr); status != exitFailed ||
			!strings.Contains(stderr.String(), "it cannot be opened") {
			t.Errorf("%q: opened %d times: exit status %d: %s%s", line, n/2, status, stdout.String(), stderr.String())
		}
	}
}

// opensInTurn has each time that a line opens the host fail.
func opensInTurn(t *testing.T, line string, on func() *hosttest.Kernel, no error) {
	t.Helper()
	usual := onKernel(on(), strings.Fields(line)...)
	fails := usual.status != exitDone && usual.status != exitDiffers
	for n := range 12 {
		k, opened := on(), 0
		open := func(string) (*iommu.Host, error) {
			// Once only: what follows must not tell it in the place of this.
			if opened++; opened == n+1 {
				return nil, no
			}
			h, err := host.Fake(k.Dir(), k)
			return &iommu.Host{Host: h}, err
		}
		var stdout, stderr bytes.Buffer
		status := runOn(open, append([]string{"viaduct"}, strings.Fields(line)...), &stdout, &stderr)
		if opened <= n {
			return
		}
		said := stdout.String() + stderr.String()
		if strings.HasPrefix(line, "run ") && strings.Contains(said, no.Error()) {
			// Its status is the command's, if that has run.
			continue
		}
		if status == exitDone || status == exitDiffers || !fails && !strings.Contains(said, no.Error()) {
			t.Errorf("%s: opened %d times: exit status %d: %s", line, n, status, said)
		}
	}
}
