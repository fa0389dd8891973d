//go:build lab

package labtest

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// declare writes a declaration and returns its name.
func declare(t *testing.T, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "host.yaml")
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

// status runs viaduct, which must end with that exit status.
func status(t *testing.T, want int, args ...string) result {
	t.Helper()
	r := run(t, viaduct, args...)
	if r.status != want {
		t.Fatalf("viaduct %s: exit status %d, want %d\n%s%s\nkernel log:\n%s", strings.Join(args, " "), r.status, want,
			r.stdout, r.stderr, kernelLog(t))
	}
	return r
}

// forget drops what apply and undo keep, and what was confirmed.
func forget() {
	for _, file := range []string{"/run/viaduct/undo.json", "/var/lib/viaduct/in-force.json"} {
		_ = os.Remove(file)
	}
}

// rootDisk is the PCI device that the root file system is on.
func rootDisk(t *testing.T) string {
	t.Helper()
	dev := shell(t, "mountpoint -d /")
	target, err := filepath.EvalSymlinks("/sys/dev/block/" + dev)
	if err != nil {
		t.Fatal(err)
	}
	last := ""
	for part := range strings.SplitSeq(target, "/") {
		if strings.Count(part, ":") == 2 {
			last = part
		}
	}
	return last
}

const declaration = `pfs:
  - select: mac=52:54:00:00:00:01
    count: 2
  - select: mac=52:54:00:00:00:02
    count: 7
    mtu: 1600
    vfs:
      - range: 0-2
        driver: vfio
        mac: stable
        vlan: 100+index
        pool: fast
      - range: 3
        driver: home
        mac: 52:54:00:55:00:03
      - range: 4-6
        trust: on
        spoofchk: off
  - select: serial=lab0
    count: 2
    vfs:
      - range: 0
        driver: vfio
devices:
  - select: mac=52:54:00:00:00:03
`

// TestDeclared: what is declared is made, twice without a write the second time, and undone. ip, sysfs and lspci judge.
func TestDeclared(t *testing.T) {
	t.Cleanup(forget)
	pf := netdev(t, spare)
	shell(t, "modprobe igbvf; ip link set "+pf+" up")
	for _, a := range []string{uplink, spare, nvme} {
		do(t, "vf", "destroy", a)
	}
	shell(t, "rm -rf /var/lib/viaduct/known-* /run/viaduct/undo.json")
	old := shell(
		t,
		"basename $(dirname $(dirname $(grep -l 52:54:00:00:00:03 /sys/bus/pci/devices/*/net/*/address | xargs dirname)))",
	)
	was, mtu := fingerprint(), attr("/sys/class/net", pf, "mtu")
	file := declare(t, declaration)

	plan := status(t, 4, "plan", "--steps", "-f", file)
	if fingerprint() != was || !strings.Contains(plan.stdout, "echo 7 > /sys/bus/pci/devices/"+spare+"/sriov_numvfs") {
		t.Errorf("plan changed the host, or does not say what is to be done:\n%s", plan.stdout)
	}
	if r := status(t, 4, "status", "-f", file); strings.Count(r.stdout, "differs") != 4 {
		t.Errorf("status:\n%s", r.stdout)
	}

	do(t, "apply", "-f", file)
	all := vfs(spare)
	if len(all) != 7 || len(vfs(uplink)) != 2 || len(vfs(nvme)) != 2 {
		t.Fatalf("VFs %v, %v, %v", all, vfs(uplink), vfs(nvme))
	}
	for i, vf := range all {
		want := []string{"vfio-pci", "vfio-pci", "vfio-pci", "igbvf", "", "", ""}[i]
		if bound(vf) != want {
			t.Errorf("VF %d is on %q, want %q", i, bound(vf), want)
		}
		line := vfLine(t, pf, i)
		for _, says := range [][]string{{"vlan 100"}, {"vlan 101"}, {"vlan 102"}, {"52:54:00:55:00:03"},
			{"trust on", "spoof checking off"}, {"trust on", "spoof checking off"},
			{"trust on", "spoof checking off"}}[i] {
			if !strings.Contains(line, says) {
				t.Errorf("VF %d: %q does not say %s", i, line, says)
			}
		}
	}
	if bound(vfs(nvme)[0]) != "vfio-pci" || bound(vfs(nvme)[1]) != "" || bound(old) != "vfio-pci" {
		t.Errorf("NVMe VFs on %q and %q, %s on %q", bound(vfs(nvme)[0]), bound(vfs(nvme)[1]), old, bound(old))
	}
	if out := shell(t, "lspci -ks "+all[3]); !strings.Contains(out, "in use: igbvf") {
		t.Error(out)
	}
	if now := attr("/sys/class/net", pf, "mtu"); now != "1600" {
		t.Errorf("the MTU is %s", now)
	}

	status(t, 0, "plan", "-f", file)
	status(t, 0, "status", "-f", file)
	trace := filepath.Join(t.TempDir(), "trace")
	shell(t, "strace -f -o "+trace+" -e trace=openat,sendto,sendmsg,ioctl "+viaduct+" apply -f "+file)
	writes := shell(
		t,
		`grep -E 'openat.*"(/sys/|sys/)[^"]*", O_(WRONLY|RDWR)|RTM_(NEW|SET|DEL)LINK|nlmsg_type=0x13|NVME_IOCTL' `+
			trace+` || true`,
	)
	if writes != "" {
		t.Errorf("the second apply wrote:\n%s", writes)
	}

	adopted := declare(t, do(t, "adopt"))
	if r := run(t, viaduct, "plan", "-f", adopted); r.status != 0 {
		text, _ := os.ReadFile(adopted)
		t.Errorf("a plan against what was adopted: %s%s\n%s", r.stdout, r.stderr, text)
	}

	do(t, "vf", "set", spare+"/vf1", "vlan=7")
	do(t, "unbind", spare+"/vf2")
	if r := status(t, 4, "plan", "--steps", "-f", file); !strings.Contains(r.stdout, "vlan 101") ||
		!strings.Contains(r.stdout, all[2]+"/driver_override") ||
		strings.Contains(r.stdout, "numvfs") {
		t.Errorf("after a VF lost its VLAN, and one its driver: %s", r.stdout)
	}
	do(t, "apply", "-f", file)
	status(t, 0, "plan", "-f", file)
	do(t, "undo") // of that
	if !strings.Contains(vfLine(t, pf, 1), "vlan 7") || bound(all[2]) != "" {
		t.Errorf("after undo: %s, VF 2 on %q", vfLine(t, pf, 1), bound(all[2]))
	}
	do(t, "apply", "-f", file)
	do(
		t,
		"apply",
		"-f",
		declare(
			t,
			strings.ReplaceAll(strings.ReplaceAll(declaration, "count: 7", "count: 4"),
				"      - range: 4-6\n        trust: on\n        spoofchk: off\n", ""),
		),
	)
	if len(vfs(spare)) != 4 {
		t.Errorf("%d VFs, want 4", len(vfs(spare)))
	}
	do(t, "undo")
	status(t, 0, "plan", "-f", file)

	for _, a := range []string{uplink, spare, nvme} {
		do(t, "vf", "destroy", a, "--force", "address")
	}
	do(t, "unbind", old)
	do(t, "apply", "-f", file)
	do(t, "undo")
	shell(t, "udevadm settle")
	if now := fingerprint(); now != was {
		t.Errorf("after undo:\n%s\nbefore:\n%s", now, was)
	}
	shell(t, "ip link set "+pf+" mtu "+mtu)
}

// TestDeclaredRefused: the root disk and the uplink, listed by mistake, are refused, and nothing else is touched
// either, unless that is asked for.
func TestDeclaredRefused(t *testing.T) {
	t.Cleanup(forget)
	do(t, "vf", "destroy", spare, uplink)
	up := netdev(t, uplink)
	shell(t, "ip link set "+up+" up; ip addr add 10.0.2.15/24 dev "+up+"; ip route add default via 10.0.2.2 dev "+up)
	t.Cleanup(func() { shell(t, "ip addr flush dev "+up) })
	was := fingerprint()
	file := declare(
		t,
		"pfs:\n  - select: mac=52:54:00:00:00:02\n    count: 1\ndevices:\n  - select: "+rootDisk(
			t,
		)+"\n  - select: mac=52:54:00:00:00:01\n",
	)

	r := status(t, 3, "apply", "-f", file)
	if !strings.Contains(r.stderr, "mounted") || !strings.Contains(r.stderr, "default route") || fingerprint() != was {
		t.Errorf("%s\nthe host was touched: %v", r.stderr, fingerprint() != was)
	}

	status(t, 1, "apply", "--keep-going", "-f", file)
	if len(vfs(spare)) != 1 || bound(uplink) != "igb" {
		t.Errorf("with --keep-going: VFs %v, %s on %q", vfs(spare), uplink, bound(uplink))
	}

	// At a boot nobody holds anything yet: what carried the host when it last ran is refused.
	shell(t, "ip addr flush dev "+netdev(t, spare)+"; ip addr add 192.0.2.9/24 dev "+netdev(t, spare))
	do(t, "vf", "destroy", spare)
	none := declare(t, "pfs: []\n")
	do(t, "apply", "-f", none) // which records what carries the host
	shell(t, "ip addr del 192.0.2.9/24 dev "+netdev(t, spare))
	mine := declare(t, "devices:\n  - select: mac=52:54:00:00:00:02\n")
	r = status(t, 3, "apply", "--boot", "-f", mine)
	if !strings.Contains(r.stderr, "was using it") || bound(spare) != "igb" {
		t.Errorf("%s, and it is on %q", r.stderr, bound(spare))
	}

	shell(t, "rm -rf /var/lib/viaduct")
	r = status(t, 3, "apply", "--boot", "-f", mine)
	if !strings.Contains(r.stderr, "does not know which NICs") || bound(spare) != "igb" {
		t.Errorf("%s, and it is on %q", r.stderr, bound(spare))
	}

	do(t, "apply", "-f", mine)
	if bound(spare) != "vfio-pci" {
		t.Errorf("%s is on %q", spare, bound(spare))
	}

	do(t, "undo")
}

// TestSideBySide: applies at once wait for each other, whatever the other's PF looks like in the middle, and what looks
// after the host leaves what they did alone.
func TestSideBySide(t *testing.T) {
	t.Cleanup(forget)
	do(t, "vf", "destroy", spare)
	file := func(count int) string {
		return declare(t, fmt.Sprintf("pfs:\n  - select: mac=52:54:00:00:00:02\n    count: %d\n", count))
	}

	do(t, "apply", "-f", file(1)) // from now on, the host is not as host.yaml says on purpose
	rounds := 6
	if everyWrite() {
		rounds = 60
	}

	var wg sync.WaitGroup
	loop := func(files []string, args ...string) {
		wg.Go(func() {
			for n := range rounds {
				if r := run(t, viaduct, append(args, "-f", files[n%len(files)])...); r.status != 0 {
					t.Errorf("round %d of %s: exit status %d\n%s%s", n, args, r.status, r.stdout, r.stderr)
				}
			}
		})
	}

	loop([]string{file(2), file(6)}, "apply")
	loop([]string{file(6), file(3)}, "apply")
	loop([]string{file(7)}, "watch", "--once")
	wg.Wait()
	if n := len(vfs(spare)); n != 6 && n != 3 {
		t.Errorf("%d VFs", n)
	}
	if left, _ := filepath.Glob("/run/viaduct/*-*.json"); len(left) > 0 {
		t.Errorf("records %v", left)
	}

	do(t, "vf", "destroy", spare)
}

// TestInUse: what a guest's lease has set, neither apply nor undo changes; other settings for a VF that a guest has
// open are refused, but what a reset took from it comes back; and what got hold of new VFs does not keep a rollback
// back.
func TestInUse(t *testing.T) {
	t.Cleanup(forget)
	t.Cleanup(func() { shell(t, "rm -f /run/viaduct/scrubbed-*") }) // the certificates stay otherwise
	do(t, "vf", "destroy", spare)
	pf := netdev(t, spare)
	shell(t, "modprobe igbvf; ip link set "+pf+" up")
	tagged := func(vlan int) string {
		return declare(
			t,
			fmt.Sprintf(
				"pfs:\n  - select: mac=52:54:00:00:00:02\n    count: 3\n    vfs:\n      - driver: vfio\n        vlan: %d\n",
				vlan,
			),
		)
	}
	seen := func(when string, want ...string) {
		t.Helper()
		for n, vlan := range want {
			if line := vfLine(t, pf, n); !strings.Contains(line, "vlan "+vlan+",") {
				t.Errorf("%s, VF %d has not VLAN %s: %s", when, n, vlan, line)
			}
		}
	}
	do(t, "apply", "-f", tagged(5))
	all := vfs(spare)
	do(t, "assign", "tenant", "--from", all[1], "--vlan", "100")
	do(t, "apply", "-f", tagged(6))
	seen("after an apply", "6", "100", "6")
	do(t, "undo")
	seen("after its undo", "5", "100", "5")
	do(t, "apply", "-f", tagged(6))
	do(t, "release", "tenant")
	do(t, "assign", "next", "--from", all[1], "--vlan", "200")
	do(t, "undo")
	seen("after an undo, with the VF another guest's", "5", "200", "5")
	do(t, "release", "next")

	do(t, "apply", "-f", tagged(5))
	bare := declare(t, "pfs:\n  - select: mac=52:54:00:00:00:02\n    count: 3\n    vfs:\n      - driver: vfio\n")
	status(t, 4, "plan", "-f", bare)
	do(t, "apply", "-f", bare)
	for n := range all {
		if line := vfLine(t, pf, n); strings.Contains(line, "vlan") {
			t.Errorf("a VLAN that is not declared any more: %s", line)
		}
	}
	status(t, 0, "plan", "-f", bare)
	do(t, "apply", "-f", tagged(5))

	qemu := guest(t, "plain", all[0])
	if r := status(t, 3, "apply", "-f", tagged(9)); !strings.Contains(r.stderr, `guest "plain"`) ||
		!strings.Contains(r.stderr, "--force=process") {
		t.Errorf("another VLAN below a guest: %s", r.stderr)
	}
	seen("refused", "5")
	shell(t, "ip link set "+pf+" vf 0 vlan 0")
	do(t, "apply", "-f", tagged(5))
	seen("what was lost", "5")
	do(t, "apply", "-f", tagged(9), "--force", "process")
	seen("forced", "9")
	qemu.end()
	do(t, "vf", "destroy", spare)

	do(t, "apply", "--confirm", "4s", "-f",
		declare(t, "pfs:\n  - select: mac=52:54:00:00:00:02\n    count: 1\n    vfs:\n      - driver: home\n"))
	shell(
		t,
		"udevadm settle; vf=$(ls "+filepath.Join(devicesDir, vfs(spare)[0],
			"net")+"); ip addr add 192.0.2.7/24 dev $vf; ip link set $vf up",
	)
	for end := time.Now().Add(time.Minute); len(vfs(spare)) > 0 &&
		time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
	}
	if n := len(vfs(spare)); n != 0 {
		t.Errorf("%d VFs are left although nobody confirmed:\n%s", n, shell(t, "dmesg | grep viaduct | tail -5"))
	}
}

// TestGuard: what undoes an apply that nobody confirms stands before the first write, also where the kernel's log cannot
// be written to; where it cannot stand nothing is written. What is confirmed while the apply works stays.
func TestGuard(t *testing.T) {
	t.Cleanup(forget)
	file := declare(t, "pfs:\n  - select: mac=52:54:00:00:00:02\n    count: 2\n")
	gone := func() bool {
		for end := time.Now().Add(time.Minute); len(vfs(spare)) > 0 &&
			time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		}
		return len(vfs(spare)) == 0
	}
	shell(t, "mv /dev/kmsg /dev/kmsg.away")
	do(t, "apply", "--confirm", "3s", "-f", file)
	if len(vfs(spare)) != 2 || !gone() {
		t.Errorf("without the kernel's log: %d VFs are left", len(vfs(spare)))
	}
	shell(t, "mv /dev/kmsg.away /dev/kmsg")

	do(t, "apply", "--confirm", "3s", "-f", file)
	do(t, "apply", "--confirmed")
	time.Sleep(4 * time.Second) // the time in which it would have been undone
	if len(vfs(spare)) != 2 {
		t.Errorf("confirmed, %d VFs are left", len(vfs(spare)))
	}
	do(t, "vf", "destroy", spare)
}

// TestKillsApply: an apply is killed at its writes, and after viaduct recover each PF is as declared or as before.
func TestKillsApply(t *testing.T) {
	t.Cleanup(forget)
	pf := netdev(t, spare)
	shell(t, "modprobe igbvf; ip link set "+pf+" up")
	first := declare(
		t,
		"pfs:\n  - select: mac=52:54:00:00:00:02\n    count: 2\n    vfs:\n      - range: 0\n        mac: 52:54:00:66:00:00\n        driver: home\n        vlan: 5\n      - range: 1\n        driver: home\n        vlan: 6\n",
	)

	settings := declare(
		t,
		"pfs:\n  - select: mac=52:54:00:00:00:02\n    count: 2\n    vfs:\n      - range: 0\n        mac: 52:54:00:66:00:01\n        vlan: 7\n        driver: vfio\n      - range: 1\n        vlan: 8\n        driver: none\n",
	)

	count := declare(t,
		"pfs:\n  - select: mac=52:54:00:00:00:02\n    count: 3\n    vfs:\n      - vlan: 9\n        driver: vfio\n")
	kills := 0
	for _, c := range []struct{ name, file string }{{"settings", settings}, {"count", count}} {
		for i, whom := range []string{"parent", "child", "both"} {
			for n := 1; ; n++ {
				if !everyWrite() && (n+4*i)%11 != 0 {
					continue
				}
				do(t, "apply", "-f", first)
				killed, rest := killAt(t, n, whom, "apply", "-f", c.file)
				if !killed {
					break
				}
				kills++
				r := run(t, viaduct, "recover")
				said := rest()
				before, after := run(t, viaduct, "plan", "-f", first), run(t, viaduct, "plan", "-f", c.file)
				// by other means: the VLANs that ip shows, and the drivers
				state := strings.Fields(shell(t, "ip link show "+pf+" | grep -o 'vlan [0-9]*' | tr -d ' '"))
				for _, vf := range vfs(spare) {
					state = append(state, "("+bound(vf)+")")
				}
				known := map[string]bool{"vlan5 vlan6 (igbvf) (igbvf)": true,
					"vlan7 vlan8 (vfio-pci) ()":                          c.name == "settings",
					"vlan9 vlan9 vlan9 (vfio-pci) (vfio-pci) (vfio-pci)": c.name == "count"}[strings.Join(state, " ")]
				left, _ := filepath.Glob("/run/viaduct/change-*")
				more, _ := filepath.Glob("/run/viaduct/apply-*")
				if left = append(left, more...); !known || before.status != 0 && after.status != 0 || len(left) > 0 ||
					r.status != 0 {
					t.Errorf(
						"%s killed at write %d of %s, then recover: %q, plans %d and %d, records %v, exit status %d\n%s%s%s%s%s",
						whom,
						n,
						c.name,
						state,
						before.status,
						after.status,
						left,
						r.status,
						r.stdout,
						r.stderr,
						said,
						before.stdout,
						after.stdout,
					)
				}
			}
		}
	}

	t.Logf("%d kills", kills)
	do(t, "vf", "destroy", spare)
}
