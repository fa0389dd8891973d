//go:build lab

package labtest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// fails runs viaduct, which must end with this exit status, say this, and have changed nothing.
func fails(t *testing.T, status int, says string, args ...string) {
	t.Helper()
	before := fingerprint()
	if r := run(t, viaduct, args...); r.status != status || !strings.Contains(r.stderr, says) ||
		fingerprint() != before {
		t.Errorf("viaduct %s: exit status %d, want %d, %q and nothing changed: %s%s", strings.Join(args, " "), r.status,
			status, says, r.stdout, r.stderr)
	}
}

// vfLine is what ip says of a VF.
func vfLine(t *testing.T, pf string, index int) string {
	t.Helper()
	for line := range strings.Lines(shell(t, "ip -d link show dev "+pf)) {
		if strings.HasPrefix(strings.TrimSpace(line), fmt.Sprintf("vf %d ", index)) {
			return line
		}
	}
	return ""
}

// TestSettings sets all that igb knows, as ip sees it; what it does not know is an error of that setting, and several
// settings are one change.
func TestSettings(t *testing.T) {
	pf := netdev(t, spare)
	do(t, "vf", "create", pf, "2")
	shell(
		t,
		"ip link set "+pf+" up; until [ $(cat /sys/class/net/"+pf+"/operstate) = up ]; do sleep 0.1; done",
	) // rates need a link
	has := func(words ...string) {
		t.Helper()
		line := vfLine(t, pf, 1)
		for _, w := range words {
			if !strings.Contains(line, w) {
				t.Errorf("ip says %q, want %q", line, w)
			}
		}
	}
	do(t, "vf", "set", pf+"/vf1", "mac=52:54:00:77:00:01", "vlan=100", "qos=3", "trust=on", "spoofchk=off",
		"max_tx_rate=100")
	has("52:54:00:77:00:01", "vlan 100, qos 3", "trust on", "spoof checking off", "max_tx_rate 100Mbps")
	if out := do(t, "vf", "set", pf+"/vf1", "vlan=100", "--json"); !strings.Contains(out, `"changed": false`) {
		t.Errorf("what is right already was written: %s", out)
	}
	get := do(t, "vf", "get", pf+"/vf1")
	if want := "mac=52:54:00:77:00:01 vlan=100 qos=3 proto=802.1q trust=on spoofchk=off link=auto max_tx_rate=100 min_tx_rate=0"; !strings.HasPrefix(
		get,
		want,
	) {
		t.Errorf("vf get: %q, want %q", get, want)
	}
	refused := func(says string, words ...string) {
		t.Helper()
		before := vfLine(t, pf, 1)
		fails(t, 1, says, append([]string{"vf", "set", pf + "/vf1"}, words...)...)
		if now := vfLine(t, pf, 1); now != before {
			t.Errorf("%v failed, and ip says %q, said %q", words, now, before)
		}
	}
	refused("only the VLAN protocol 802.1q", "proto=802.1ad")
	refused("does not support the VF setting link", "mac=52:54:00:77:00:02", "vlan=7", "link=enable")
	refused("does not support the VF setting rss_query", "rss_query=on", "trust=off")
	refused("min_tx_rate", "min_tx_rate=10")
	refused("does not support the VF setting msix", "msix=4")
	refused("already belongs to "+pf, "mac="+attr("/sys/class/net", pf, "address"))
	do(t, "vf", "set", pf+"/vf0", "mac=stable")
	stable := strings.TrimPrefix(strings.Fields(do(t, "vf", "get", pf+"/vf0"))[0], "mac=")
	refused("already belongs to vf0", "mac="+stable)
	do(t, "vf", "set", pf+"/vf1", "spoofchk=on", "trust=off", "vlan=0", "qos=0", "max_tx_rate=0",
		"mac=52:54:00:77:00:03")
	has("52:54:00:77:00:03", "spoof checking on", "trust off")
	if line := vfLine(t, pf, 1); strings.Contains(line, "vlan") || strings.Contains(line, "max_tx_rate") {
		t.Errorf("ip says %q", line)
	}

	// What was set is set again after something else lost it.
	shell(t, "ip link set "+pf+" vf 1 mac 52:54:00:77:00:99 vlan 9")
	do(t, "vf", "sync", pf)
	has("52:54:00:77:00:03")
	if line := vfLine(t, pf, 1); strings.Contains(line, "vlan") {
		t.Errorf("after vf sync ip says %q", line)
	}
	if list := do(t, "vf", "list", pf); !strings.Contains(list, stable) ||
		!strings.Contains(list, "52:54:00:77:00:03") {
		t.Errorf("vf list: %s", list)
	}
	do(t, "vf", "destroy", pf)
}

// TestCount: VFs that somebody has keep their PF's number from changing; a PF that is down is brought up without an
// address.
func TestCount(t *testing.T) {
	pf := netdev(t, spare)
	shell(t, "ip link set "+pf+" down")
	do(t, "vf", "create", pf, "2", "--driver", "vfio")
	if state := shell(t, "ip -o link show dev "+pf+" | grep -c ',UP'; ip -6 -o addr show dev "+pf+
		" | wc -l; cat /proc/sys/net/ipv6/conf/"+pf+"/addr_gen_mode"); state != "1\n0\n0" {
		t.Errorf("up, addresses, addr_gen_mode: %q, want 1, 0, 0", state)
	}
	vf := vfs(spare)[0]
	node, err := os.OpenFile(groupNode(vf), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	who := fmt.Sprintf("process %d", os.Getpid())
	fails(t, 3, who, "vf", "create", pf, "7")
	fails(t, 3, who, "vf", "destroy", pf)
	node.Close()
	do(t, "vf", "create", pf, "7")
	if n := len(vfs(spare)); n != 7 {
		t.Errorf("%d VFs, want 7", n)
	}
	do(t, "vf", "destroy", pf)

	shell(
		t,
		"modprobe bonding max_bonds=0; ip link add b1 type bond; ip link set "+pf+" down; ip link set "+pf+
			" master b1; ip link set b1 up",
	)
	do(t, "vf", "create", pf, "3")
	if master := link("/sys/class/net", pf, "master"); master != "b1" || len(vfs(spare)) != 3 {
		t.Errorf("a bond's port: %d VFs, in %q", len(vfs(spare)), master)
	}
	do(t, "vf", "destroy", pf)
	shell(t, "ip link del b1")
}

// TestKillsVF: the commands of VFs are killed at each write in turn. What is run next leaves the PF with the VFs it
// had, those it was to have, or none, autoprobe as it was, and no record.
func TestKillsVF(t *testing.T) {
	pf := netdev(t, spare)
	shell(t, "modprobe igbvf")
	kills, whoms := 0, []string{"parent", "child", "both"}
	for _, c := range []struct{ name, before, command string }{
		{"create", "vf create " + spare + " 0", "vf create " + spare + " 2 --driver vfio"},
		{"resize", "vf create " + spare + " 1", "vf create " + spare + " 2"},
		{"destroy", "vf create " + spare + " 2", "vf destroy " + spare},
		{"set", "vf create " + spare + " 2", "vf set " + spare + "/vf0 mac=52:54:00:77:00:01 vlan=7"},
	} {
		for i, whom := range whoms {
			for n := 1; ; n++ {
				if !everyWrite() && (n+i)%9 != 0 {
					continue
				}
				if c.name == "create" {
					shell(t, "ip link set "+pf+" down")
				}
				do(t, strings.Fields(c.before)...)
				if c.name == "set" {
					do(t, strings.Fields("vf set "+spare+"/vf0 mac=52:54:00:77:00:02 vlan=0")...)
				}
				killed, rest := killAt(t, n, whom, strings.Fields(c.command)...)
				if !killed {
					break
				}
				kills++
				r := run(t, viaduct, "recover")
				said := rest()
				all := vfs(spare)
				wrong := attr(devicesDir, spare, "sriov_drivers_autoprobe") != "1" || len(all) > 2
				for _, vf := range all {
					wrong = wrong || bound(vf) != "" && bound(vf) != "vfio-pci" ||
						attr(devicesDir, vf, "driver_override") == "(null)"
				}
				if c.name == "set" {
					line := vfLine(t, pf, 0)
					wrong = wrong || strings.Contains(line, "77:00:01") != strings.Contains(line, "vlan 7")
				}
				left, _ := filepath.Glob("/run/viaduct/change-*")
				if wrong || len(left) > 0 || r.status != 0 {
					t.Errorf(
						"%s killed at write %d of %s, then recover: %v, autoprobe %s, records %v, exit status %d\n%s%s%s%s",
						whom,
						n,
						c.name,
						all,
						attr(devicesDir, spare, "sriov_drivers_autoprobe"),
						left,
						r.status,
						r.stdout,
						r.stderr,
						said,
						vfLine(t, pf, 0),
					)
				}
			}
		}
	}

	t.Logf("%d kills", kills)
	do(t, "vf", "destroy", spare)
}

// TestRace: one process changes the number of VFs while another sets one. What is there in the end is what came of one
// after the other.
func TestRace(t *testing.T) {
	rounds := 20
	if everyWrite() {
		rounds = 100
	}

	pf := netdev(t, spare)
	set := 0
	for i := range rounds {
		want := 2 - i%2*2
		mac := fmt.Sprintf("52:54:00:78:00:%02x", i)
		resize := exec.Command(viaduct, "vf", "create", spare, strconv.Itoa(want))
		if err := resize.Start(); err != nil {
			t.Fatal(err)
		}
		r := run(t, viaduct, "vf", "set", spare+"/vf0", "mac="+mac)
		if err := resize.Wait(); err != nil || len(vfs(spare)) != want {
			t.Errorf("round %d: resize to %d: %v, %d VFs", i, want, err, len(vfs(spare)))
		}
		switch {
		case r.status == 0 && want > 0 && !strings.Contains(vfLine(t, pf, 0), mac):
			t.Errorf("round %d: set reported success, and ip says %q", i, vfLine(t, pf, 0))
		case r.status == 0:
			set++
		case !strings.Contains(r.stderr, "no such VF") && !strings.Contains(r.stderr, "no such device") &&
			!strings.Contains(r.stderr, "it disappeared while"):
			t.Errorf("round %d: %s", i, r.stderr)
		}
		if autoprobe := attr(devicesDir, spare, "sriov_drivers_autoprobe"); autoprobe != "1" {
			t.Errorf("round %d: autoprobe is %s", i, autoprobe)
		}
	}

	t.Logf("%d rounds, in %d the setting came through", rounds, set)
	do(t, "vf", "destroy", spare)
}

// TestNetdevsim runs the package's own tests on the kernel's simulated NIC, which knows more settings than igb, and can
// have more VFs than fit into one answer of the kernel's. With these there, another NIC is taken and given back.
func TestNetdevsim(t *testing.T) {
	shell(t, "modprobe netdevsim; mountpoint -q /sys/kernel/debug || mount -t debugfs none /sys/kernel/debug")
	const tests = "TestNetdevsim|TestFlappingAddress"
	r := run(t, "./sriov.test", "-test.v", "-test.run", tests)
	if r.status != 0 || strings.Count(r.stdout, "\n--- PASS: Test") != 4 {
		t.Errorf("exit status %d\n%s%s", r.status, r.stdout, r.stderr)
	}

	shell(t, "echo '8 1' > /sys/bus/netdevsim/new_device; echo 256 > /sys/kernel/debug/netdevsim/netdevsim8/max_vfs")
	defer shell(t, "echo 8 > /sys/bus/netdevsim/del_device")
	shell(t, "echo 256 > /sys/bus/netdevsim/devices/netdevsim8/sriov_numvfs; udevadm settle")
	do(t, "bind", spare)
	do(t, "vf", "list")
	do(t, "unbind", spare)
}

// TestFaults pulls the PF away from under a command at its writes in turn: its driver is unloaded, the card is removed,
// its interface gets another name. What is reported is so, autoprobe is on again, and what is run next succeeds.
func TestFaults(t *testing.T) {
	pf := netdev(t, spare)
	long, faults := everyWrite(), 0
	back := "; udevadm settle; until [ -e /sys/bus/pci/devices/" + spare + "/net/" + pf + " ]; do sleep 0.1; done"
	for _, f := range []struct{ name, begin, end string }{
		{"unloaded", "modprobe -r igb", "modprobe igb" + back},
		{"removed", "echo 1 > /sys/bus/pci/devices/" + spare + "/remove", "echo 1 > /sys/bus/pci/rescan" + back},
		{"renamed", "ip link set " + pf + " down; ip link set " + pf + " name other",
			"ip link set other down; ip link set other name " + pf},
	} {
		for i, c := range []string{"vf create " + spare + " 2 --driver vfio", "vf destroy " + spare,
			"vf set " + spare + "/vf0 mac=52:54:00:77:00:01 vlan=7"} {
			for n := 1; ; n++ {
				if !long && (n+i)%7 != 0 {
					if n > 30 {
						break
					}
					continue
				}
				do(t, "vf", "create", spare, "0")
				if i > 0 {
					do(t, "vf", "create", spare, "2")
				} else {
					shell(t, "ip link set "+pf+" down")
				}
				r := run(
					t,
					"timeout",
					append(
						[]string{"60", "./killat", strconv.Itoa(n), "run=" + f.begin, viaduct},
						strings.Fields(c)...)...)
				if !strings.HasPrefix(r.stdout, "killed") {
					break
				}
				faults++
				wrong := ""
				switch all := vfs(spare); {
				case r.status != 0 && r.status != 1,
					r.status == 1 && r.stderr == "",
					strings.Contains(r.stderr, "panic"):
					wrong = "no exit status or message of its own"
				case r.status == 0 && i == 0 && (len(all) != 2 || bound(all[0]) != "vfio-pci" ||
					bound(all[1]) != "vfio-pci"):
					wrong = fmt.Sprintf("success, and its VFs are %v", all)
				case r.status == 0 && i == 1 && len(all) != 0:
					wrong = fmt.Sprintf("success, and its VFs are %v", all)
				case r.status == 0 && i == 2:
					name := pf
					if f.name == "renamed" {
						name = "other"
					}
					if line := vfLine(t, name, 0); !strings.Contains(line, "77:00:01") ||
						!strings.Contains(line, "vlan 7") {
						wrong = "success, and ip says " + line
					}
				}
				shell(t, f.end)
				next := run(t, viaduct, "recover")
				left, _ := filepath.Glob("/run/viaduct/change-*")
				if autoprobe := attr(devicesDir, spare, "sriov_drivers_autoprobe"); autoprobe != "1" {
					wrong += "; autoprobe " + autoprobe
				}
				if wrong != "" || next.status != 0 || len(left) > 0 {
					t.Errorf("%s at write %d of %s: %s\nexit status %d, %s%s\nthen recover: %d %s%s, records %v",
						f.name, n, c, wrong, r.status, r.stdout, r.stderr, next.status, next.stdout, next.stderr, left)
				}
			}
		}
	}

	t.Logf("%d faults", faults)
	do(t, "vf", "create", spare, "2")
	do(t, "vf", "destroy", spare)
}

// TestStuckCount: VFs are removed although somebody has one open. The write waits for that; commands that look do not.
func TestStuckCount(t *testing.T) {
	do(t, "vf", "create", spare, "2", "--driver", "vfio")
	vf := vfs(spare)[0]
	cdevs := names(devicesDir, vf, "vfio-dev")
	if len(cdevs) != 1 {
		t.Skip("this kernel has no node a device: opening that of the group does not block a removal")
	}

	node, err := os.OpenFile("/dev/vfio/devices/"+cdevs[0], os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}

	cmd := exec.Command(viaduct, "vf", "destroy", spare, "--force=process", "--timeout", "4s")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	begin := time.Now()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}

	// The removal blocks until the node is closed: that each of these ends before is that it does not wait for it.
	for time.Since(begin) < 3*time.Second {
		for _, args := range [][]string{{"list"}, {"vf", "list"}, {"show", spare}} {
			do(t, args...)
		}
	}

	_ = cmd.Wait()
	if s := stderr.String(); cmd.ProcessState.ExitCode() != 1 || !strings.Contains(s, "is stuck") ||
		!strings.Contains(s, fmt.Sprintf("process %d", os.Getpid())) {
		t.Errorf("exit status %d, %s", cmd.ProcessState.ExitCode(), s)
	}

	if r := run(t, viaduct, "vf", "create", spare, "4"); r.status != 3 || !strings.Contains(r.stderr, "is stuck") {
		t.Errorf("create while it is stuck: exit status %d, %s", r.status, r.stderr)
	}

	node.Close()
	shell(
		t,
		"until [ ! -e /sys/bus/pci/devices/"+spare+"/virtfn0 ] && [ \"$(cat /sys/bus/pci/devices/"+spare+
			"/sriov_numvfs)\" = 0 ]; do sleep 0.1; done",
	)

	do(t, "vf", "create", spare, "4")
	if n := len(vfs(spare)); n != 4 {
		t.Errorf("%d VFs, want 4", n)
	}

	do(t, "vf", "destroy", spare)
	if left, _ := filepath.Glob("/run/viaduct/*.json"); len(left) > 0 {
		t.Errorf("records are left: %v", left)
	}
}
