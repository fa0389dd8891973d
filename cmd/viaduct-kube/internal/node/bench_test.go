package node

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"viaduct/cmd/lease"
	"viaduct/iommu"
)

// BenchmarkRead is a look at a node with 5,000 functions of SR-IOV, all VFs of which are declared.
func BenchmarkRead(b *testing.B) {
	dir := b.TempDir()
	if out, err := exec.Command("go", "run", "viaduct/hack/gentree", "-vfs", dir, "5000").CombinedOutput(); err != nil {
		b.Fatalf("%v\n%s", err, out)
	}
	h, err := iommu.Open(dir)
	if err != nil {
		b.Fatal(err)
	}
	defer h.Close()
	topology, err := iommu.Scan(h)
	if err != nil {
		b.Fatal(err)
	}
	var declared strings.Builder
	declared.WriteString("pfs:\n")
	topology.All(func(d *iommu.Device) bool {
		if d.SRIOV != nil && len(d.SRIOV.VFs) > 0 {
			declared.WriteString("  - {select: '" + d.Name + "', count: 15, vfs: [{driver: vfio, pool: net}]}\n")
		}
		return true
	})
	file := filepath.Join(dir, "etc/viaduct/host.yaml")
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		b.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(declared.String()), 0o644); err != nil {
		b.Fatal(err)
	}

	n := 0
	for b.Loop() {
		books, err := lease.Open(h, lease.Options{})
		if err != nil {
			b.Fatal(err)
		}
		facts, err := Read(h, books)
		if err != nil {
			b.Fatal(err)
		}
		n = len(Functions(facts, ours))
		books.Close()
	}
	b.ReportMetric(float64(n), "functions")
}
