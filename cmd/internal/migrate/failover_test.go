package migrate

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"viaduct/cmd/internal/qmp/qmptest"
	"viaduct/cmd/internal/vmm"
)

// pairInit says, each half second, how many it has said, and its network interfaces with their masters.
const pairInit = `#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r m; do insmod "/modules/$m"; done </modules/order
ip link set eth0 up
n=0
while :; do
	n=$((n + 1))
	out=
	for i in /sys/class/net/*; do
		[ ! -e "$i/device" ] || [ ! -e "$i/master" ] || out="$out $(basename "$(readlink "$i/device/driver")")"
	done
	case $out in *e1000e*) echo "guest $n: pair" ;; *) echo "guest $n: standby" ;; esac
	usleep 500000
done
`

// bootPair is a pair of hosts whose guest is Linux, with a failover pair of a virtio NIC and an emulated one in place of a
// VF, which takes itself out and in again.
func bootPair(t *testing.T) *hostPair {
	t.Helper()
	kernel, initrd := qmptest.Kernel(t, pairInit, "net/core/failover", "drivers/net/net_failover",
		"drivers/net/virtio_net",
		"drivers/net/ethernet/intel/e1000e/e1000e")
	p := &hostPair{way: ByFailover, words: []string{
		"-machine", "q35,accel=tcg,sata=off", "-m", "128M", "-cpu", "qemu64", "-kernel", kernel, "-initrd", initrd,
		"-append", "console=ttyS0 quiet panic=-1 nokaslr no_timer_check noapic mitigations=off tsc=reliable",
		// Its kernel unplugs by PCIe's own ways.
		"-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off",
		"-netdev", "user,id=viaduct-net,restrict=on", "-netdev", "user,id=other,restrict=on",
		"-device", "pcie-root-port,id=viaduct-port0,chassis=240,slot=240",
		"-device", "pcie-root-port,id=viaduct-port1,chassis=241,slot=241",
		"-device", "virtio-net-pci,netdev=viaduct-net,id=" + vmm.StandbyID + ",bus=viaduct-port0,mac=" + theAddress +
			",failover=on",
	}}
	p.device = map[string]any{"driver": "e1000e", "netdev": "other", "mac": theAddress, "id": vmm.PrimaryID,
		"bus": "viaduct-port1", "failover_pair_id": vmm.StandbyID}
	p.first = []string{"-device", "e1000e,netdev=other,mac=" + theAddress + ",id=" + vmm.PrimaryID +
		",bus=viaduct-port1,failover_pair_id=" + vmm.StandbyID}
	// Each host has its own console: the guest's words tell where it runs.
	dir := t.TempDir()
	p.consoles = [2]string{filepath.Join(dir, "from"), filepath.Join(dir, "to")}
	p.start(t)
	return p
}

// says waits until the guest says something on a console, from now on.
func says(t *testing.T, console, what string, most time.Duration) {
	t.Helper()
	before, _ := os.ReadFile(console)
	for end := time.Now().Add(most); ; time.Sleep(50 * time.Millisecond) {
		now, _ := os.ReadFile(console)
		if len(now) > len(before) && strings.Contains(string(now[len(before):]), what) {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("the guest does not say %q: %q", what, now[max(0, len(now)-500):])
		}
	}
}

// A guest of Linux with a failover pair moves and goes on, and has both NICs there; one whose move is taken back has
// them here again; one that does not answer when it is asked for its device keeps it.
func TestFailover(t *testing.T) {
	if os.Getenv("VIADUCT_SWEEP") != "all" {
		t.Skip("a guest boots in software emulation: for VIADUCT_SWEEP=all (hack/test --long)")
	}
	p := bootPair(t)
	const both, one = ": pair", ": standby"
	says(t, p.consoles[0], both, 2*time.Minute)

	t.Log("it is taken back when its memory is on its way")
	r := newRemote(p, nil)
	ctx, cancel := context.WithCancel(t.Context())
	d := p.driver(r, p.record(), func(a Action) error {
		if a == Send {
			cancel()
		}
		return nil
	})
	d.Limits.Unplug = 30 * time.Second
	err := d.Run(ctx, Forward)
	if !errors.Is(err, context.Canceled) || p.from.record != nil {
		t.Fatalf("%v: %+v", err, p.from.record)
	}
	r.serve.Wait()
	p.here(t)
	says(t, p.consoles[0], both, time.Minute)

	t.Log("it stands still when it is asked for its device, and is taken back")
	p.to = place{}
	r = newRemote(p, nil)
	stopped := false
	d = p.driver(r, p.record(), nil)
	d.Tell = func(a Action) error {
		if a != Unplug || stopped {
			return nil
		}
		stopped = true
		return d.vm.(*machine).do("stop", nil, nil)
	}
	d.Limits.Unplug = 10 * time.Second
	if err := d.Run(t.Context(), Forward); err == nil || !strings.Contains(err.Error(), "has not let go of it") {
		t.Fatalf("%v: %+v", err, p.from.record)
	}
	r.serve.Wait()
	p.here(t)
	says(t, p.consoles[0], both, time.Minute)

	t.Log("it moves")
	p.to = place{}
	r = newRemote(p, nil)
	d = p.driver(r, p.record(), func(a Action) error {
		if a == Send {
			says(t, p.consoles[0], one, time.Minute)
		}
		return nil
	})
	d.Limits.Unplug = 30 * time.Second
	if err := d.Run(t.Context(), Forward); err != nil {
		t.Fatal(err)
	}
	r.serve.Wait()
	p.moved(t)
	says(t, p.consoles[1], both, time.Minute)
	t.Logf("%+v", d.Outcome)
}
