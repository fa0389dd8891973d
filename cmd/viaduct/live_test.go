package main

import (
	"bytes"
	"testing"

	"viaduct/internal/host"
	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

// answer is what a command line came to.
type answer struct {
	status         int
	stdout, stderr string
}

// onKernel runs a command line on a fake kernel's host, as a process of its own would.
func onKernel(k *hosttest.Kernel, line ...string) answer {
	open := func(string) (*iommu.Host, error) {
		h, err := host.Fake(k.Dir(), k)
		return &iommu.Host{Host: h}, err
	}
	var stdout, stderr bytes.Buffer
	status := runOn(open, append([]string{"viaduct"}, line...), &stdout, &stderr)
	return answer{status, stdout.String(), stderr.String()}
}

// mustOnKernel is onKernel of what has to succeed.
func mustOnKernel(t *testing.T, k *hosttest.Kernel, line ...string) answer {
	t.Helper()
	a := onKernel(k, line...)
	if a.status != exitDone {
		t.Fatalf("%q: exit status %d: %s%s", line, a.status, a.stdout, a.stderr)
	}
	return a
}
