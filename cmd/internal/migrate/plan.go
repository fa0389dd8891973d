package migrate

import (
	"encoding/json"
	"fmt"

	"viaduct/cmd/internal/vmm"
)

// Plan is what a move would do on both hosts, in order: here and there, and what QEMU is told.
func Plan(r *Record) []string {
	o := &r.Order
	var out []string
	step := func(where, format string, a ...any) {
		out = append(out, fmt.Sprintf("%-6s", where)+fmt.Sprintf(format, a...))
	}
	qmp := func(where, command string, args any) {
		b, _ := json.Marshal(args)
		step(where, "qmp   %s %s", command, b)
	}
	if o.libvirt() {
		return planDomain(r)
	}
	socket := "unix:" + dataSocket(r)

	step("there", "keep %d of %s for %s, without its address", o.Count, o.From, r.Guest)
	step("there", "start QEMU with -S -incoming defer, and without the device")
	if o.Way != ByVFIO {
		step("here", "write %q", Unplugging)
		qmp("here", "device_del", map[string]string{"id": vmm.PrimaryID})
		step("here", "wait for DEVICE_DELETED")
		if o.Address != "" {
			step("here", "take %s off the VF", o.Address)
		}
		if o.VM.Standby != "" {
			qmp("here", "announce-self", map[string]any{"interfaces": []string{vmm.StandbyID}})
		}
	}
	step("here", "write %q", Copying)
	qmp("there", "migrate-incoming", map[string]any{"uri": socket, "exit-on-error": false})
	qmp("here", "migrate", map[string]string{"uri": socket})
	step("here", "wait until it is completed, and write %q", Committed)
	step("there", "write %q", Mine)
	qmp("there", "cont", struct{}{})
	if o.Way != ByVFIO {
		if o.Address != "" {
			step("there", "give the VF %s", o.Address)
		}
		qmp("there", "device_add", map[string]string{"driver": "vfio-pci", "id": vmm.PrimaryID})
	}
	step("here", "write %q", Quitting)
	qmp("here", "quit", struct{}{})
	step("here", "reset the VF, give it the settings it had, and end the lease")
	return out
}

// Words are what a move would do, for people.
func Words(r *Record) []string {
	o := &r.Order
	device := "its device"
	if o.Count > 1 {
		device = fmt.Sprintf("its %d devices", o.Count)
	}
	start := ", and a QEMU waits there"
	if o.libvirt() {
		start = ""
	}
	out := []string{fmt.Sprintf("%d of %s is kept for it on %s%s", o.Count, o.From, r.Peer, start)}
	if o.Way != ByVFIO {
		text := "the guest here lets go of " + device
		if o.VM.Standby != "" {
			text += ", and its virtio NIC on " + o.VM.Standby + " stands in"
		}
		out = append(out, text)
	}
	out = append(out, "its memory is sent, and it goes on there")
	if o.Way != ByVFIO {
		out = append(out, "it gets "+device+" there")
	}
	return append(out, "what it had here is reset and set as before, and its lease here ends")
}

// planDomain is Plan of a guest of libvirt's.
func planDomain(r *Record) []string {
	o := &r.Order
	out := []string{
		fmt.Sprintf("there keep %d of %s for %s, without its address", o.Count, o.From, r.Guest),
		fmt.Sprintf("here  write %q", Unplugging),
		"here  virsh detach-device " + r.Guest + ", and wait until the guest has let go",
	}
	if o.Address != "" {
		out = append(out, "here  take "+o.Address+" off the VF")
	}
	out = append(out, fmt.Sprintf("here  write %q", Copying),
		"here  virsh migrate --live --p2p --tunnelled "+r.Guest+" "+r.URI,
		fmt.Sprintf("here  write %q", Committed), fmt.Sprintf("there write %q", Mine))
	if o.Address != "" {
		out = append(out, "there give the VF "+o.Address)
	}
	return append(out, "there virsh attach-device "+r.Guest, fmt.Sprintf("here  write %q", Quitting),
		"here  reset the VF, give it the settings it had, and end the lease")
}
