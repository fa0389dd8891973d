package dra

import (
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	resource "k8s.io/api/resource/v1"
	"k8s.io/dynamic-resource-allocation/resourceslice"

	"viaduct/cmd/viaduct-kube/internal/node"
)

// cpu is what this process has computed so far.
func cpu(t *testing.T) time.Duration {
	t.Helper()
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		t.Fatal(err)
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

// A node with 5,000 functions is published, and again when one of them changes; what that takes is told, the fake API
// server's part included.
func TestFiveThousand(t *testing.T) {
	const n = 5000
	pf := at(t, "ffff:01:00.0")
	var all []node.Function
	for i := range n {
		group := i
		all = append(all, node.Function{
			Address: at(t, fmt.Sprintf("%04x:%02x:%02x.%d", i/2048, i/8%256, i/2048%32, i%8)), Kind: node.VF, PF: &pf,
			VFIndex: i, Pool: "net", Group: &group, Root: "pci0000:00", Driver: "vfio-pci", VFIO: true,
		})
	}

	s := newSite(t, newKernel(t))
	publish := func(what string, is func([]resource.Device) bool) {
		begun, computed := time.Now(), cpu(t)
		pool := Pool("viaduct.dev", all, &node.Settings{})
		if err := s.helper.PublishResources(t.Context(),
			resourceslice.DriverResources{Pools: map[string]resourceslice.Pool{"n1": pool}}); err != nil {
			t.Fatal(err)
		}
		s.await(t, what, is)
		t.Logf("%s: %d slices, %s of CPU, in %s", what, len(pool.Slices), cpu(t)-computed, time.Since(begun))
	}

	publish("published", func(d []resource.Device) bool { return len(d) == n })
	all[77].Wrong = []node.Problem{{Reason: node.NoLink, Text: "no link"}}
	publish("updated", func(d []resource.Device) bool {
		tainted := 0
		for i := range d {
			tainted += len(d[i].Taints)
		}
		return len(d) == n && tainted == 1
	})
}
