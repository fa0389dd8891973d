package migrate

import (
	"slices"
	"testing"

	"viaduct/cmd/internal/vmm"
)

// A move is told in words: what stands in for the device, and whether it leaves the guest at all.
func TestWordsOfMove(t *testing.T) {
	const kept, sent = "1 of net is kept for it on b", "its memory is sent, and it goes on there"
	const end = "what it had here is reset and set as before, and its lease here ends"
	for name, c := range map[string]struct {
		order Order
		want  []string
	}{
		"failover": {Order{Way: ByFailover, VM: vmm.Machine{Standby: "br0"}}, []string{
			kept + ", and a QEMU waits there",
			"the guest here lets go of its device, and its virtio NIC on br0 stands in", sent,
			"it gets its device there", end,
		}},
		"replug": {Order{Way: ByReplug}, []string{
			kept + ", and a QEMU waits there", "the guest here lets go of its device", sent,
			"it gets its device there", end,
		}},
		"its own state": {Order{Way: ByVFIO}, []string{kept + ", and a QEMU waits there", sent, end}},
		"libvirt": {Order{Way: ByReplug, VM: vmm.Machine{Format: "libvirt"}}, []string{
			kept, "the guest here lets go of its device", sent, "it gets its device there", end,
		}},
	} {
		c.order.From, c.order.Count = "net", 1
		if got := Words(&Record{Guest: "web", Peer: "b", Order: c.order}); !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}
