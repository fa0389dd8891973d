//go:build lab

package kube

import (
	"strings"
	"testing"
)

// TestPlainPod: the cluster itself. A pod without any device runs, and what it prints is seen.
func TestPlainPod(t *testing.T) {
	makePod(t, newPod("plain", "echo hello; sleep 2000000000"))
	p := awaitPod(t, "plain", "runs", running)
	if got := said(t, p); !strings.Contains(got, "hello") {
		t.Errorf("it says %q", got)
	}
}
