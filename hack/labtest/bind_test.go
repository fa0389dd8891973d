//go:build lab

package labtest

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestHolders: whoever uses a device keeps it from being taken, and is named; nothing is written.
func TestHolders(t *testing.T) {
	pf := netdev(t, spare)
	disk := shell(t, "ls /dev/nvme*n1")
	refused := func(what, says string, args ...string) {
		t.Helper()
		before := fingerprint()
		trace := filepath.Join(t.TempDir(), "trace")
		r := run(
			t,
			"strace",
			append(
				[]string{"-f", "--seccomp-bpf", "-o", trace, "-e", "trace=openat,sendto,sendmsg", viaduct},
				args...)...)
		if r.status != 3 || !strings.Contains(r.stderr, says) || fingerprint() != before {
			t.Errorf("%s: exit status %d, want 3, nothing changed, and %q:\n%s", what, r.status, says, r.stderr)
		}
		b, err := os.ReadFile(trace)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(b)) {
			if strings.Contains(line, "\"sys/") &&
				(strings.Contains(line, "O_WRONLY") || strings.Contains(line, "O_RDWR")) ||
				strings.Contains(line, "RTM_SET") ||
				strings.Contains(line, "RTM_NEW") && strings.Contains(line, "sendto") {
				t.Errorf("%s: refused, but %s", what, line)
			}
		}
	}
	for _, use := range []struct{ what, begin, end, says string }{
		{"address", "ip link set $pf up; ip addr add 192.0.2.1/24 dev $pf", "ip addr flush dev $pf",
			"has address 192.0.2.1/24"},
		{"IPv6 address", "ip -6 addr add 2001:db8::1/64 dev $pf nodad", "ip -6 addr flush dev $pf scope global",
			"has address 2001:db8::1/64"},
		{"route", "ip addr add 192.0.2.1/24 dev $pf; ip route add 198.51.100.0/24 via 192.0.2.2 dev $pf",
			"ip addr flush dev $pf", "the route to 198.51.100.0/24"},
		{"IPv6 route only", "ip -6 route add 2001:db8:1::/48 dev $pf", "ip -6 route flush dev $pf proto boot",
			"the route to 2001:db8:1::/48"},
		{"bond", "modprobe bonding max_bonds=0; ip link add b0 type bond; ip link set $pf down; ip link set $pf master b0", "ip link del b0", "under bond b0"},
		{"bridge", "ip link add br0 type bridge; ip link set $pf master br0", "ip link del br0", "under bridge br0"},
		{"VLAN only", "ip link add link $pf name v7 type vlan id 7", "ip link del v7", "under vlan v7"},
		{"macvlan", "ip link add link $pf name m0 type macvlan", "ip link del m0", "under macvlan m0"},
		{"macvlan in another namespace",
			"ip netns add away; ip link add link $pf name m0 type macvlan; ip link set m0 netns away",
			"ip netns del away; until ip link add link $pf name m0 type macvlan; do sleep 0.1; done; ip link del m0",
			"under macvlan m0 in the network namespace of away"},
		{"network namespace", "ip netns add away; ip link set $pf netns away",
			"ip -n away link set $pf netns 1; ip netns del away", "is in the network namespace of away"},
	} {
		shell(t, "pf="+pf+"; "+use.begin)
		refused(use.what, use.says, "bind", spare)
		shell(t, "pf="+pf+"; "+use.end)
	}
	for _, use := range []struct{ what, begin, end, says string }{
		{"device-mapper", "dmsetup create dm-test --table \"0 8192 linear $disk 0\"", "dmsetup remove dm-test",
			"under device-mapper dm-test"},
		{"LVM", "pvcreate -qy $disk; vgcreate -qy vg0 $disk; lvcreate -qy -Zn -L 8M -n lv0 vg0",
			"vgremove -qfy vg0; pvremove -qffy $disk", "under LVM vg0-lv0"},
		{"md", "mdadm --create /dev/md7 --run --force --quiet --level=1 --raid-devices=1 $disk",
			"mdadm --stop --quiet /dev/md7; mdadm --zero-superblock $disk", "under md raid1"},
		{"a mount in another mount namespace",
			"mkfs.ext4 -qF $disk; mkdir -p /run/mnt2; unshare -m sh -c 'mount '$disk' /run/mnt2; echo $$ > /run/mnt2.pid; exec sleep 1000' </dev/null >/dev/null 2>&1 & " +
				"until [ -s /run/mnt2.pid ]; do sleep 0.1; done",
			"kill $(cat /run/mnt2.pid); rm /run/mnt2.pid; until wipefs -qa $disk; do sleep 0.1; done",
			"mounted on /run/mnt2 in the mount namespace"},
		{"its generic node", "sleep 1000 < ${disk/nvme/ng} >/dev/null 2>&1 & echo $! > /run/open.pid",
			"kill $(cat /run/open.pid)", "(sleep)"},
		{"an open disk", "sleep 1000 < $disk >/dev/null 2>&1 & echo $! > /run/open.pid",
			"kill $(cat /run/open.pid)", "(sleep)"},
	} {
		shell(t, "disk="+disk+"; "+use.begin)
		refused(use.what, use.says, "bind", nvme)
		shell(t, "disk="+disk+"; "+use.end)
	}
	// A port that is up, with the address and routes that the kernel gives every link, is free.
	shell(t, "ip link set "+pf+" up; until ip -6 addr show dev "+pf+" scope link | grep -q fe80; do sleep 0.1; done")
	do(t, "bind", spare)
	do(t, "unbind", spare)
	shell(t, "udevadm settle")

	// A kind can be overridden, and only that kind.
	shell(
		t,
		"ip link set "+pf+" up; ip addr add 192.0.2.1/24 dev "+pf+
			"; ip route add 198.51.100.0/24 via 192.0.2.2 dev "+pf,
	)
	refused("force of another kind", "the route to", "bind", spare, "--force=address")
	do(t, "bind", spare, "--force=address", "--force=route")
	do(t, "unbind", spare)
	shell(t, "udevadm settle")
	if r := run(t, "setpriv", "--bounding-set", "-sys_ptrace", "--inh-caps", "-sys_ptrace", viaduct, "bind",
		nvme); r.status != 3 ||
		!strings.Contains(r.stderr, "cannot see who") {
		t.Errorf("without the right to see others' files: exit status %d, %s", r.status, r.stderr)
	}
	away := exec.Command("unshare", "-m", "sleep", "1000") // another mount namespace with the same root
	if err := away.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = away.Process.Kill()
		_ = away.Wait()
	}()
	root := filepath.Base(shell(t, "readlink -f /sys/class/block/vda/device/.."))
	refused("the host's own disk by force", "cannot be forced", "bind", root, "--force=mount", "--force=process")
}

// TestSSH: the port that somebody is logged in over is not taken, wherever the command is run from: sudo and tmux keep
// no environment that would tell.
func TestSSH(t *testing.T) {
	pf := netdev(t, spare)
	do(t, "vf", "create", spare, "1", "--driver", "home")
	shell(t, "udevadm settle")
	vf := netdev(t, vfs(spare)[0])
	shell(
		t,
		"ip link set "+pf+" up; ip addr add 10.9.0.1/24 dev "+pf+"; ip netns add client; ip link set "+vf+
			" netns client; "+
			"ip -n client link set lo up; ip -n client link set "+vf+" up; ip -n client addr add 10.9.0.2/24 dev "+vf,
	)

	shell(
		t,
		"mkdir -p /root/.ssh /run/sshd; chmod 700 /root/.ssh; rm -f /root/.ssh/id_ed25519; ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id_ed25519; "+
			"cp /root/.ssh/id_ed25519.pub /root/.ssh/authorized_keys; ssh-keygen -A >/dev/null; "+
			"/usr/sbin/sshd -o PidFile=/run/sshd-test.pid -o ListenAddress=10.9.0.1 -o UsePAM=no -o UseDNS=no",
	)

	// The PF's own start may have made the emulated VF deaf; on a busy machine it has become so between two ways, too.
	heard := func() {
		shell(t, "until ip netns exec client ping -c 1 -W 1 10.9.0.1 >/dev/null; do ip -n client link set "+vf+
			" down; ip -n client link set "+vf+" up; done")
	}
	heard()
	shell(
		t,
		"ip netns exec client ssh -o StrictHostKeyChecking=no -o BatchMode=yes root@10.9.0.1 'touch /run/logged-in; exec sleep 1000' </dev/null >/dev/null 2>&1 & "+
			"echo $! >/run/ssh.pid; until [ -e /run/logged-in ]; do sleep 0.2; done",
	)

	for _, way := range []string{
		"env -i setsid -w " + viaduct + " bind " + spare,
		"ip netns exec client ssh -o StrictHostKeyChecking=no -o BatchMode=yes root@10.9.0.1 sudo -i " + viaduct +
			" bind " + spare,
		"ip netns exec client ssh -tt -o StrictHostKeyChecking=no -o BatchMode=yes root@10.9.0.1 'rm -f /run/t*; tmux new-session -d \"" +
			"sudo " + viaduct + " bind " + spare +
			" 2>/run/tmux.err; echo \\$? >/run/tmux.tmp; mv /run/tmux.tmp /run/tmux.status\"' </dev/null >/dev/null && " +
			"until [ -e /run/tmux.status ]; do sleep 0.1; done && cat /run/tmux.err >&2 && exit $(cat /run/tmux.status)",
	} {
		heard()
		before := fingerprint()
		r := run(t, "bash", "-c", way)
		if r.status != 3 || !strings.Contains(r.stderr, "the ssh connection of 10.9.0.2") || fingerprint() != before {
			t.Errorf("%s\nthe port somebody is logged in over: exit status %d, %s; the kernel's last words:\n%s", way, r.status,
				r.stderr, shell(t, "dmesg | tail -n 20"))
		}
	}

	shell(t, "kill $(cat /run/ssh.pid) $(cat /run/sshd-test.pid); ip netns del client; ip addr flush dev "+pf)
	do(t, "vf", "destroy", spare)
}

// TestStuck: a device that somebody has open is given back. The write waits; the command does not, list neither, and
// the next command goes on where it was.
func TestStuck(t *testing.T) {
	do(t, "vf", "create", spare, "2")
	vf := vfs(spare)[0]
	do(t, "bind", vf)
	cdevs := names(devicesDir, vf, "vfio-dev")
	if len(cdevs) != 1 {
		t.Skip("this kernel has no node a device: opening that of the group does not block an unbind")
	}
	node, err := os.OpenFile("/dev/vfio/devices/"+cdevs[0], os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if r := run(t, viaduct, "unbind", vf); r.status != 3 ||
		!strings.Contains(r.stderr, fmt.Sprintf("process %d", os.Getpid())) {
		t.Errorf("unbind of an open device: exit status %d, %s", r.status, r.stderr)
	}
	fails(t, 3, "is open in", "bind", vf, "--driver", "pci-stub") // which would pull it out of a guest
	cmd := exec.Command(viaduct, "unbind", vf, "--force=process", "--timeout", "3s")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	begin := time.Now()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// The write blocks until the node is closed: that each of these ends before is that it does not wait for it.
	for time.Since(begin) < 2*time.Second {
		do(t, "list")
	}
	_ = cmd.Wait()
	if s := stderr.String(); cmd.ProcessState.ExitCode() != 1 || !strings.Contains(s, "is stuck") ||
		!strings.Contains(s, fmt.Sprintf("process %d", os.Getpid())) {
		t.Fatalf("exit status %d, %s", cmd.ProcessState.ExitCode(), s)
	}
	do(t, "list")
	for _, args := range [][]string{{"bind", vf}, {"unbind", vf, "--force=process"}} {
		if r := run(t, viaduct, args...); r.status != 3 || !strings.Contains(r.stderr, "is stuck") {
			t.Errorf("%v while it is stuck: exit status %d, %s", args, r.status, r.stderr)
		}
	}
	other := vfs(spare)[1]
	do(t, "bind", other) // others are not kept from anything
	do(t, "unbind", other)

	m := regexp.MustCompile(`\(process (\d+) goes on waiting`).FindStringSubmatch(stderr.String())
	if m == nil {
		t.Fatalf("no process named: %s", stderr.String())
	}
	pid, _ := strconv.Atoi(m[1])
	writer, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	node.Close()
	if n, err := unix.Poll([]unix.PollFd{{Fd: int32(writer), Events: unix.POLLIN}}, 20000); n != 1 {
		t.Fatalf("the child that writes has not ended: %v", err)
	}
	if out := do(t, "recover"); !strings.Contains(out, vf) {
		t.Errorf("recover: %s", out)
	}
	if bound(vf) != "" || attr(devicesDir, vf, "driver_override") != "none" {
		t.Errorf("in the end it is on %q with override %q, want none of both", bound(vf),
			attr(devicesDir, vf, "driver_override"))
	}
	if left, _ := filepath.Glob("/run/viaduct/*.json"); len(left) > 0 {
		t.Errorf("records are left: %v", left)
	}
	do(t, "vf", "destroy", spare)
}

// TestReprobe: something re-probes each device whenever anything happens to it, and still none ends on the wrong
// driver.
func TestReprobe(t *testing.T) {
	rounds := 30
	if n, err := strconv.Atoi(os.Getenv("LAB_ROUNDS")); err == nil {
		rounds = n
	}

	rule := "/run/udev/rules.d/99-reprobe.rules"
	shell(
		t,
		"mkdir -p /run/udev/rules.d; echo 'SUBSYSTEM==\"pci\", RUN+=\"/bin/sh -c \\\"echo $kernel > /sys/bus/pci/drivers_probe\\\"\"' > "+rule+"; udevadm control --reload",
	)
	defer shell(t, "rm "+rule+"; udevadm control --reload")
	shell(t, "modprobe igbvf")
	do(t, "vf", "create", spare, "3", "--driver", "home")
	shell(t, "udevadm settle")
	all := vfs(spare)
	for i := range rounds {
		do(t, append([]string{"bind"}, all...)...)
		for _, vf := range all {
			if bound(vf) != "vfio-pci" {
				t.Fatalf("round %d: %s taken and on %q", i, vf, bound(vf))
			}
		}
		do(t, append([]string{"unbind"}, all...)...)
		for _, vf := range all {
			if bound(vf) != "igbvf" || attr(devicesDir, vf, "driver_override") != "(null)" {
				t.Fatalf("round %d: %s given back and on %q, override %q", i, vf, bound(vf),
					attr(devicesDir, vf, "driver_override"))
			}
		}
	}

	t.Logf("%d rounds of 3 devices", rounds)
	do(t, "vf", "destroy", spare)
}

// TestNodeOwner: an owner without root opens the nodes, also when they were made again.
func TestNodeOwner(t *testing.T) {
	do(t, "vf", "create", spare, "1")
	vf := vfs(spare)[0]
	for range 2 {
		do(t, "bind", vf, "--node-owner", "nobody")
		shell(t, "udevadm settle")
		node := groupNode(vf)
		if owner := shell(t, "stat -c '%U %a' "+node); owner != "nobody 600" {
			t.Errorf("%s belongs to %s", node, owner)
		}
		shell(
			t,
			"udevadm control --reload; echo "+vf+" > /sys/bus/pci/drivers/vfio-pci/unbind; echo "+vf+
				" > /sys/bus/pci/drivers_probe; udevadm settle",
		)
		if owner := shell(t, "stat -c '%U %a' "+node); owner != "nobody 600" {
			t.Errorf("made again, %s belongs to %s", node, owner)
		}
		do(t, "unbind", vf)
		if left, _ := filepath.Glob("/run/udev/rules.d/*viaduct*"); len(left) > 0 {
			t.Errorf("rules are left: %v", left)
		}
	}

	t.Cleanup(forget)
	do(t, "bind", vf) // and then an owner is declared
	file := declare(t, "devices:\n  - select: "+vf+"\n    node_owner: nobody\n")
	status(t, 4, "plan", "-f", file)
	do(t, "apply", "-f", file)
	if owner := shell(t, "stat -c '%U %a' /dev/vfio/"+link(devicesDir, vf, "iommu_group")); owner != "nobody 600" {
		t.Errorf("as declared, its node belongs to %s", owner)
	}

	status(t, 0, "plan", "-f", file)
	do(t, "unbind", vf)
	do(t, "vf", "destroy", spare)
}

// TestFailures: what the kernel refuses is said with its reason, and the device is back home.
func TestFailures(t *testing.T) {
	do(t, "vf", "create", spare, "1")
	vf := vfs(spare)[0]
	for _, f := range []struct {
		what, says string
		status     int
		args       []string
	}{
		{"a driver that does not exist", "vfio_nonesuch", 1, []string{"bind", vf, "--driver", "vfio-nonesuch"}},
		{"a kind that does not exist", "the kinds of holders are", 2, []string{"bind", vf, "--force=magic"}},
		{"an owner that does not exist", "unknown user", 2, []string{"bind", vf, "--node-owner",
			"nobody-of-that-name"}},
		{"no time at all", "--timeout", 2, []string{"bind", vf, "--timeout", "0s"}},
	} {
		before := fingerprint()
		if r := run(t, viaduct, f.args...); r.status != f.status || !strings.Contains(r.stderr, f.says) ||
			fingerprint() != before {
			t.Errorf("%s: exit status %d, %s", f.what, r.status, r.stderr)
		}
	}

	if r := run(t, "setpriv", "--reuid=nobody", viaduct, "bind", vf); r.status != 1 ||
		!strings.Contains(r.stderr, "needs root") {
		t.Errorf("not root: exit status %d, %s", r.status, r.stderr)
	}

	do(t, "bind", vf)
	do(t, "unbind", vf)
	hidden := func(what, hide, show, says string) {
		t.Helper()
		before := attr(devicesDir, vf, "driver_override")
		shell(t, hide)
		r := run(t, viaduct, "bind", vf, "--timeout", "2s")
		shell(t, show)
		if r.status != 1 || !strings.Contains(r.stderr, says) || bound(vf) != "" ||
			attr(devicesDir, vf, "driver_override") != before {
			t.Errorf("%s: exit status %d, %s; it is on %q with override %q", what, r.status, r.stderr, bound(vf),
				attr(devicesDir, vf, "driver_override"))
		}
	}

	hidden("no module", "modprobe -r vfio_pci; mount -t tmpfs none /lib/modules",
		"umount /lib/modules; modprobe vfio_pci", "vfio_pci")
	hidden("no node", "mount -t tmpfs none /dev/vfio", "umount /dev/vfio", "did not appear")
	do(t, "bind", vf, "--driver", "pci-stub") // of which there are no nodes to wait for
	if bound(vf) != "pci-stub" {
		t.Errorf("--driver pci-stub: it is on %q", bound(vf))
	}

	do(t, "unbind", vf)
	if bound(vf) != "" || attr(devicesDir, vf, "driver_override") != "none" {
		t.Errorf("given back from pci-stub: on %q", bound(vf))
	}

	do(t, "vf", "destroy", spare)
}

// TestReason: a driver that refuses a device says why in the kernel's log only. An NVMe VF has no resources until the
// PF gives it some, and so is of no use to the driver of its home; it stays where it was.
func TestReason(t *testing.T) {
	do(t, "vf", "create", nvme, "1")
	vf := vfs(nvme)[0]
	do(t, "bind", vf)
	shell(t, "rm /run/viaduct/taken-"+vf+".json")                                    // as if another tool had taken it
	shell(t, "nvme virt-mgmt /dev/"+names(devicesDir, nvme, "nvme")[0]+" -c 1 -a 7") // offline, no driver can have it
	r := run(t, viaduct, "unbind", vf)
	if r.status != 1 || !strings.Contains(r.stderr, "did not bind it to nvme; the kernel says: nvme") {
		t.Errorf("exit status %d, %s", r.status, r.stderr)
	}
	if bound(vf) != "vfio-pci" || attr(devicesDir, vf, "driver_override") != "vfio-pci" {
		t.Errorf("it is on %q with override %q", bound(vf), attr(devicesDir, vf, "driver_override"))
	}
	do(t, "vf", "destroy", nvme)
}

// vmm is a QEMU that has devices, and runs nothing.
type vmm struct {
	cmd     *exec.Cmd
	monitor io.Writer
}

func (v vmm) end() {
	_, _ = v.monitor.Write([]byte("quit\n"))
	_ = v.cmd.Wait()
}

// guest starts one, and returns when it has opened the devices.
func guest(t *testing.T, name string, devices ...string) vmm {
	t.Helper()
	var args []string
	for _, d := range devices {
		args = append(args, "-device", "vfio-pci,host="+d)
	}
	return guestWith(t, name, args...)
}

// guestWith starts one with these arguments.
func guestWith(t *testing.T, name string, more ...string) vmm {
	t.Helper()
	args := append(
		[]string{
			"-accel",
			"tcg",
			"-machine",
			"q35",
			"-S",
			"-name",
			"guest=" + name + ",debug-threads=on",
			"-m",
			"64",
			"-nodefaults",
			"-display",
			"none",
			"-monitor",
			"stdio",
		},
		more...)

	qemu := exec.Command("qemu-system-x86_64", args...)
	monitor, err := qemu.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}

	out, err := qemu.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}

	qemu.Stderr = os.Stderr
	if err := qemu.Start(); err != nil {
		t.Fatal(err)
	}

	_, _ = monitor.Write([]byte("info status\n")) // answered once all devices are there
	for lines := bufio.NewScanner(out); ; {
		if !lines.Scan() {
			t.Fatalf("qemu ended: %v", qemu.Wait())
		}
		if strings.HasPrefix(lines.Text(), "VM status") {
			return vmm{qemu, monitor}
		}
	}
}

// TestGuest: a device that a guest has is named with the guest's name.
func TestGuest(t *testing.T) {
	do(t, "vf", "create", spare, "1", "--driver", "vfio")
	vf := vfs(spare)[0]
	qemu := guest(t, "tenant7", vf)
	for _, args := range [][]string{{"unbind", vf}, {"vf", "destroy", spare}, {"vf", "create", spare, "2"}} {
		before := fingerprint()
		r := run(t, viaduct, args...)
		if r.status != 3 || !strings.Contains(r.stderr, fmt.Sprintf("process %d (qemu-system", qemu.cmd.Process.Pid)) ||
			!strings.Contains(r.stderr, "guest \"tenant7\"") ||
			fingerprint() != before {
			t.Errorf("%v while a guest has it: exit status %d, %s", args, r.status, r.stderr)
		}
	}
	qemu.end()
	do(t, "unbind", vf)
	do(t, "vf", "destroy", spare)
}

// TestVariant: the kernel's variant driver for a device is found, loaded and bound, and the device comes home again.
func TestVariant(t *testing.T) {
	device := shell(
		t,
		"basename $(readlink -f /sys/class/net/$(grep -l 52:54:00:00:00:04 /sys/class/net/*/address | cut -d/ -f5)/device/..)",
	)
	before := bound(device)
	do(t, "bind", device)
	if bound(device) != "virtio_vfio_pci" || attr(devicesDir, device, "driver_override") != "virtio_vfio_pci" {
		t.Errorf("%s is on %q with override %q", device, bound(device), attr(devicesDir, device, "driver_override"))
	}
	do(t, "unbind", device)
	if bound(device) != before || before != "virtio-pci" {
		t.Errorf("given back, %s is on %q, was on %q", device, bound(device), before)
	}
}

// TestSave: what was written down is taken again, if it is what was written down, and as long as it is.
func TestSave(t *testing.T) {
	t.Cleanup(forget)
	home := bound(spare)
	do(t, "bind", spare, "--save", "--node-owner", "nobody")
	shell(t, "udevadm settle")
	if r := run(t, viaduct, "unbind", spare); r.status != 0 || !strings.Contains(r.stderr, "still declared") ||
		bound(spare) != home {
		t.Errorf("unbind: exit status %d, %s, on %q", r.status, r.stderr, bound(spare))
	}
	shell(t, "udevadm settle")
	do(t, "apply")
	shell(t, "udevadm settle")
	if owner := shell(t, "stat -c %U /dev/vfio/"+link(devicesDir, spare, "iommu_group")); bound(spare) != "vfio-pci" ||
		owner != "nobody" {
		t.Errorf("apply: on %q, its node belongs to %s", bound(spare), owner)
	}
	do(t, "unbind", spare)
	shell(t, "udevadm settle; sed -i 's/52:54:00:00:00:02/52:54:00:00:00:99/' /var/lib/viaduct/known-path*.json")
	before := fingerprint()
	if r := run(t, viaduct, "apply"); r.status != 3 ||
		!strings.Contains(r.stderr, "MAC address is 52:54:00:00:00:02 instead of 52:54:00:00:00:99") ||
		fingerprint() != before {
		t.Errorf("another card in its place: exit status %d, %s", r.status, r.stderr)
	}
	do(t, "unbind", spare, "--save")
	if left := names("/etc/viaduct/host.d"); len(left) > 0 {
		t.Errorf("%v is left", left)
	}
}

// TestKills: bind and unbind are killed at each of their writes in turn, the command, the child that writes, or both.
// Whatever is run next leaves the device fully taken or fully home, and no record.
func TestKills(t *testing.T) {
	shell(t, "modprobe igbvf")
	do(t, "vf", "create", spare, "1", "--driver", "home")
	shell(t, "udevadm settle")
	kill(t, vfs(spare)[0], func() string { return deviceState(vfs(spare)[0]) }, "vfio-pci vfio-pci", "igbvf (null)", 1)
	do(t, "vf", "destroy", spare)
	every := 5
	if everyWrite() {
		every = 1
	}
	const e1000, edu = "0000:07:01.0", "0000:07:02.0" // one group
	unit := func() string { return deviceState(e1000) + ", " + deviceState(edu) }
	kill(t, e1000, unit, "vfio-pci vfio-pci, vfio-pci vfio-pci", "e1000 (null),  (null)", every)
}

func deviceState(address string) string {
	return bound(address) + " " + attr(devicesDir, address, "driver_override")
}

// eachOf reports whether each device of a unit is in one of two states.
func eachOf(unit, a, b string) bool {
	ofA, ofB := strings.Split(a, ", "), strings.Split(b, ", ")
	for i, d := range strings.Split(unit, ", ") {
		if d != ofA[i] && d != ofB[i] {
			return false
		}
	}
	return true
}

// kill kills the commands at every so many of their writes.
func kill(t *testing.T, vf string, state func() string, taken, home string, every int) {
	t.Helper()
	next := []struct{ command, leaves string }{{"bind " + vf, taken}, {"unbind " + vf, home}, {"recover", ""}}
	kills := 0
	for _, op := range []string{"bind", "unbind"} {
		for i, whom := range []string{"parent", "child", "both"} {
			for n := 1; ; n++ {
				if (n+i)%every != 0 {
					continue
				}
				if op == "bind" {
					do(t, "unbind", vf)
				} else {
					do(t, "bind", vf)
				}
				killed, rest := killAt(t, n, whom, op, vf)
				if !killed {
					if want := map[string]string{"bind": taken, "unbind": home}[op]; n < 3 || state() != want {
						t.Fatalf("%s of %s ended by itself at %d: %q, want %q\n%s", whom, op, n, state(), want, rest())
					}
					break
				}
				then := next[kills%len(next)]
				kills++
				r := run(t, viaduct, strings.Fields(then.command)...)
				said := rest()
				// A command whose child died lives: it puts back what failed, and what is given back is so device by device.
				got, sound := state(), false
				if sound = got == taken || got == home; whom == "child" && op == "unbind" {
					sound = eachOf(got, taken, home)
				}
				if !sound || then.leaves != "" && got != then.leaves || r.status != 0 {
					t.Errorf("%s killed at write %d of %s, then %s: %q, exit status %d\n%s%s%s", whom, n, op,
						then.command, got, r.status, r.stdout, r.stderr, said)
				}
				if left, _ := filepath.Glob("/run/viaduct/change-*"); len(left) > 0 {
					t.Errorf("%s killed at write %d of %s, then %s: records are left: %v", whom, n, op, then.command,
						left)
				}
			}
		}
	}

	t.Logf("%d kills", kills)
	do(t, "unbind", vf)
}

// TestHangup: a login that breaks off in the middle of a command is no reason to leave devices in the middle.
func TestHangup(t *testing.T) {
	do(t, "vf", "create", spare, "7")
	all := vfs(spare)
	cmd := exec.Command(viaduct, append([]string{"bind"}, all...)...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for begun := 0; begun == 0 && cmd.ProcessState == nil; {
		records, _ := filepath.Glob("/run/viaduct/change-*")
		begun = len(records)
	}
	_ = cmd.Process.Signal(unix.SIGHUP)
	_ = cmd.Wait()
	if left, _ := filepath.Glob("/run/viaduct/change-*"); len(left) > 0 || cmd.ProcessState.ExitCode() < 0 {
		t.Errorf("%s, records are left: %v", cmd.ProcessState, left)
	}
	for _, vf := range all {
		if state := deviceState(vf); state != "vfio-pci vfio-pci" && state != " none" {
			t.Errorf("%s: %q", vf, state)
		}
	}
	do(t, "vf", "destroy", spare)
}
