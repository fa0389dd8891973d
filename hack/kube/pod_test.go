//go:build lab

package kube

import "testing"

// TestPlainPod: the cluster itself. A pod without any device runs, and what it prints is seen.
func TestPlainPod(t *testing.T) {
	makePod(t, newPod("plain", "echo hello; sleep 2000000000"))
	p := awaitPod(t, "plain", "runs", running)
	awaitWords(t, p, "hello")
}
