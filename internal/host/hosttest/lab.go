package hosttest

import (
	_ "embed"
	"testing"
)

//go:embed testdata/amd-vi.txt
var labHost []byte

// Lab is a captured host of the lab, as a Tree: QEMU's AMD-Vi with an igb that has VFs, and more.
func Lab(tb testing.TB) Tree {
	tb.Helper()
	t, err := Parse(labHost)
	if err != nil {
		tb.Fatal(err)
	}
	return t
}

// NewLab is a Kernel of the lab's host with changes, as [Tree.With] takes them, whose drivers are loaded.
func NewLab(tb testing.TB, changes Tree) *Kernel {
	tb.Helper()
	k := NewKernel(tb, Lab(tb).With(changes))
	k.Register("vfio-pci")
	k.Register("igb", "8086:10c9")
	k.Register("igbvf", "8086:10ca")
	k.Register("e1000", "8086:100e")
	return k
}
