//go:build lab

package labtest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// libvirtd starts libvirt's daemons, as they are without systemd; they end with the host.
func libvirtd(t *testing.T) {
	t.Helper()
	shell(t, `mkdir -p /run/libvirt
printf 'security_driver = "none"\nuser = "root"\ngroup = "root"\nremember_owner = 0\nnamespaces = []\n' >/etc/libvirt/qemu.conf
[ -e /run/virtlogd.pid ] || virtlogd -d
libvirtd -d
for n in $(seq 60); do virsh -q version >/dev/null 2>&1 && exit; sleep 1; done
virsh version`)
}

// stopLibvirtd ends it. One that hangs at its end, or leaves its file behind, is no matter here: a crash is a restart
// as well.
const stopLibvirtd = `pid=$(cat /run/libvirtd.pid); kill $pid
for n in $(seq 150); do kill -0 $pid 2>/dev/null || break; sleep 0.2; done
kill -9 $pid 2>/dev/null && echo "libvirtd did not end by itself" || true
rm -f /run/libvirtd.pid`

// domain is a machine that starts and waits for a disk, with these devices.
func domain(t *testing.T, name, devices string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), name+".xml")
	text := fmt.Sprintf(
		"<domain type='qemu'><name>%s</name><memory unit='MiB'>64</memory><os><type arch='x86_64' machine='q35'>hvm</type></os><devices><emulator>/usr/bin/qemu-system-x86_64</emulator>%s</devices></domain>\n",
		name,
		devices,
	)
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

// TestLibvirt: libvirt takes what assign and pool print; with the hook a domain has exactly its lease or does not
// start, what it leaves is scrubbed, and a restart of libvirt changes nothing. virsh, virt-xml-validate and ip judge.
func TestLibvirt(t *testing.T) {
	pf := ports()[1]
	pool(t, pf)
	const last = 6 // assign draws from the end of a pool, libvirt from its head
	fresh := shown(t, pf, last)
	shell(
		t,
		"cp "+viaduct+" /usr/local/sbin/viaduct; /usr/local/sbin/viaduct install --libvirt; test -x /etc/libvirt/hooks/qemu.d/viaduct",
	)
	libvirtd(t)
	t.Cleanup(func() {
		run(t, viaduct, "uninstall")
		shell(
			t,
			"for d in $(virsh list --name); do virsh destroy $d; done; for d in $(virsh list --all --name); do virsh undefine $d; done; for n in $(virsh net-list --all --name); do virsh net-destroy $n || true; virsh net-undefine $n; done",
		)
		shell(t, stopLibvirtd)
		for guest := range leases(t) {
			run(t, viaduct, "release", guest)
		}
	})

	xml := do(t, "assign", "dom", "--from", "net", "--vlan", "100", "--mac", "52:54:00:aa:00:01", "--format", "libvirt")
	file := domain(t, "dom", xml)
	shell(t, "virt-xml-validate "+file+" domain; virsh define "+file)
	shell(t, "virsh start dom")
	if l := leases(t)["dom"]; l.State != "active" || !strings.Contains(strings.Join(l.Holders, ""), `guest "dom"`) {
		t.Errorf("with its domain running, the lease is %+v", l)
	}
	if line := shown(t, pf, last); !strings.Contains(line, "vlan 100") || !strings.Contains(line, "52:54:00:aa:00:01") {
		t.Errorf("the domain's VF is %s", line)
	}
	shell(t, stopLibvirtd)
	libvirtd(t)
	if state := shell(t, "virsh domstate dom"); state != "running" || leases(t)["dom"].State != "active" {
		t.Errorf("after libvirtd was restarted the domain is %s, its lease %+v", state, leases(t)["dom"])
	}
	thief := domain(t, "thief", xml)
	shell(t, "virsh define "+thief)
	if r := run(t, "virsh", "start", "thief"); r.status == 0 || !strings.Contains(r.stderr, `assigned to guest "dom"`) {
		t.Errorf("a domain with another's VF: %d, %s", r.status, r.stderr)
	}
	shell(t, "virsh destroy dom")
	if now := shown(t, pf, last); now != fresh {
		t.Errorf("after the domain the VF is\n%s, a new one is\n%s", now, fresh)
	}
	if text := attr("/run/viaduct/scrubbed-" + vfs(pf)[last] + ".json"); !strings.Contains(text, `"result":"clean"`) {
		t.Errorf("its certificate: %s", text)
	}
	if l := leases(t)["dom"]; l.State != "reserved" {
		t.Errorf("between its starts the lease is %+v", l)
	}

	// it outlives a boot: what /run held is gone, and so are the VFs
	shell(t, "rm -rf /run/viaduct; echo 0 > "+filepath.Join(devicesDir, pf, "sriov_numvfs"))
	do(t, "apply", "--boot")
	if line := shown(t, pf, last); !strings.Contains(line, "vlan 100") || leases(t)["dom"].State != "reserved" {
		t.Errorf("after a boot the VF is %s, the lease %+v", line, leases(t)["dom"])
	}
	if other := do(t, "assign", "other", "--from", "net"); strings.Contains(other, vfs(pf)[last]) {
		t.Errorf("another guest is given %s", other)
	}
	do(t, "release", "other")
	shell(t, "virsh start dom; virsh destroy dom")
	do(t, "release", "dom")
	if r := run(t, viaduct, "leases"); r.stdout != "" {
		t.Errorf("leases: %s", r.stdout)
	}

	// a device that is no interface, and a network of the pool
	file = domain(t, "plain", do(t, "assign", "plain", "--from", "net", "--format", "libvirt"))
	shell(t, "virt-xml-validate "+file+" domain; virsh define "+file+"; virsh start plain; virsh destroy plain")
	do(t, "release", "plain")
	network := filepath.Join(t.TempDir(), "net.xml")
	if err := os.WriteFile(network, []byte(do(t, "pool", "net", "--format", "libvirt-network")), 0o644); err != nil {
		t.Fatal(err)
	}
	shell(t, "virt-xml-validate "+network+" network; virsh net-define "+network+"; virsh net-start net")
	file = domain(t, "drawn",
		"<interface type='network'><source network='net'/><mac address='52:54:00:aa:00:07'/></interface>")
	shell(t, "virsh define "+file+"; virsh start drawn")
	l := leases(t)["drawn"]
	if l.State != "active" || len(l.Devices) != 1 {
		t.Fatalf("what the domain drew from the network is in no lease: %v", leases(t))
	}
	index := strings.TrimPrefix(
		shell(t,
			"basename $(find "+filepath.Join(devicesDir, pf)+"/ -lname '*"+l.Devices[0].Address+"' -name 'virtfn*')"),
		"virtfn",
	)
	if l.Devices[0].Address != vfs(pf)[0] {
		t.Errorf("the domain drew %s", l.Devices[0].Address)
	}

	// plugged while it runs: in its lease before it has it, scrubbed alone when it gives it back
	more := filepath.Join(t.TempDir(), "more.xml")
	if err := os.WriteFile(more, []byte("<interface type='network'><source network='net'/>"+
		"<mac address='52:54:00:aa:00:08'/></interface>"), 0o644); err != nil {
		t.Fatal(err)
	}
	shell(t, "virsh attach-device drawn "+more+" --live")
	if l := leases(t)["drawn"]; l.State != "active" || len(l.Devices) != 2 || l.Devices[1].Address != vfs(pf)[1] {
		t.Errorf("with a second VF plugged, the lease is %+v", l)
	}
	if r := run(t, viaduct, "unbind", vfs(pf)[1]); r.status != 3 {
		t.Errorf("unbind of what was plugged: %d, %s", r.status, r.stderr)
	}
	shell(t, "virsh destroy drawn")
	if left := leases(t); len(left) != 0 {
		t.Errorf("after it, leases %v", left)
	}
	if text := attr("/run/viaduct/scrubbed-" + vfs(pf)[1] + ".json"); !strings.Contains(text, `"result":"clean"`) {
		t.Errorf("the certificate of what was plugged: %s", text)
	}
	var n int
	_, _ = fmt.Sscan(index, &n)
	if now := shown(t, pf, n); strings.Contains(now, "52:54:00:aa:00:07") {
		t.Errorf("after the drawn domain the VF is %s", now)
	}

	quarantinedHead(t, pf)
}

// quarantinedHead: a VF in quarantine at the head of a pool stops the domains of a network that was made before, with
// the reason, and no more those of one that is made anew.
func quarantinedHead(t *testing.T, pf string) {
	t.Helper()
	head := vfs(pf)[0]
	do(t, "assign", "foul", "--from", head)
	shell(t, "echo > "+filepath.Join(devicesDir, head, "reset_method"))
	if r := status(t, 1, "release", "foul"); !strings.Contains(r.stderr, "quarantine") {
		t.Errorf("release of what cannot be reset: %s", r.stderr)
	}
	if r := run(t, "virsh", "start", "drawn"); r.status == 0 || !strings.Contains(r.stderr, "quarantine") {
		t.Errorf("a domain that draws what is in quarantine: %d, %s", r.status, r.stderr)
	}
	network := filepath.Join(t.TempDir(), "net.xml")
	text := do(t, "pool", "net", "--format", "libvirt-network")
	if err := os.WriteFile(network, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	shell(t, "virsh net-destroy net; virsh net-undefine net; virsh net-define "+network+"; virsh net-start net")
	shell(t, "virsh start drawn")
	if l := leases(t)["drawn"]; len(l.Devices) != 1 || l.Devices[0].Address != vfs(pf)[1] {
		t.Errorf("from the network that was made anew it drew %+v", l)
	}
	shell(t, "virsh destroy drawn")
	shell(t, "echo default > "+filepath.Join(devicesDir, head, "reset_method"))
	do(t, "release", "--quarantined", head)
}

// TestTwoGuests runs what two guests at once see of each other, and what the next gets; it tells as it goes.
func TestTwoGuests(t *testing.T) {
	cmd := exec.Command("bash", "/job/guests")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stdout
	if err := cmd.Run(); err != nil {
		t.Error(err)
	}
}
