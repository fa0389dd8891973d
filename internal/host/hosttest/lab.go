package hosttest

import (
	_ "embed"
	"slices"
	"strings"
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
	loadLab(k)
	return k
}

// NewSmallLab is a Kernel of the lab's host with no PCI devices but these, for tests that need many.
func NewSmallLab(tb testing.TB, devices ...string) *Kernel {
	tb.Helper()
	k := NewKernel(tb, Lab(tb).only(devices))
	loadLab(k)
	return k
}

// only is the tree without PCI devices that are not among these, and without what names one.
func (t Tree) only(devices []string) Tree {
	out := Tree{}
	for name, content := range t {
		if !strings.HasPrefix(content, arrow) {
			content = ""
		}
		named := func(part string) bool {
			_, err := routingID(part)
			return err == nil && strings.Count(part, ":") == 2
		}
		other := func(part string) bool { return named(part) && !slices.Contains(devices, part) }
		parts := strings.Split(name+"/"+strings.TrimPrefix(content, arrow), "/")
		if !slices.ContainsFunc(parts, other) {
			out[name] = t[name]
		}
	}
	return out
}

// loadLab loads the lab's drivers.
func loadLab(k *Kernel) {
	k.Register("vfio-pci")
	k.Register("igb", "8086:10c9")
	k.Register("igbvf", "8086:10ca")
	k.Register("e1000", "8086:100e")
}
