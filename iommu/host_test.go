package iommu

import (
	"testing"

	"viaduct/internal/host/hosttest"
)

// hostOf opens a tree as a folder.
func hostOf(t testing.TB, tree hosttest.Tree) *Host { return &Host{tree.Host(t)} }

// hostsOf opens a tree as a folder and as a snapshot: all code must give the same answers for the two.
func hostsOf(t testing.TB, tree hosttest.Tree) map[string]*Host {
	out := map[string]*Host{}
	for kind, h := range tree.Hosts(t) {
		out[kind] = &Host{h}
	}
	return out
}
