package main

import (
	"bytes"
	"context"
	"os/signal"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"viaduct/internal/host"
	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

// Where the devices' arguments go is known before anything is touched.
func TestRunPlaceholder(t *testing.T) {
	k := hosttest.NewSmallLab(t, "0000:00:05.0", "0000:01:00.0")
	open := func(string) (*iommu.Host, error) {
		h, err := host.Fake(k.Dir(), k)
		return &iommu.Host{Host: h}, err
	}
	for line, says := range map[string]string{
		"sh wrapper {devices}":                   `"sh" is not the name of a VMM`,
		"--format env sh {devices}":              "--format qemu",
		"--format kata ctr run image name":       "put {devices} into the command",
		"--format nonsense qemu-system-x86_64 a": "--format",
	} {
		args := []string{"viaduct", "run", "web", "--from", "0000:01:00.0"}
		words := strings.Fields(line)
		if words[0] == "--format" {
			args, words = append(args, words[:2]...), words[2:]
		}
		var stdout, stderr bytes.Buffer
		status := runOn(open, append(append(args, "--"), words...), &stdout, &stderr)
		if status != exitNotRun || !strings.Contains(stderr.String(), says) || len(k.Log) > 0 {
			t.Errorf("%s: status %d, %s, wrote %q", line, status, stderr.String(), k.Log)
		}
	}
}

// A command that has ended leaves no signal ignored, which what is started then would inherit.
func TestUntilSignal(t *testing.T) {
	_, stop := untilSignal(context.Background())
	stop()
	signal.Reset(unix.SIGPIPE)
	if signal.Ignored(unix.SIGHUP) {
		t.Error("hangups are ignored")
	}
}
