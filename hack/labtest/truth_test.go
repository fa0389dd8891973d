//go:build lab

package labtest

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/internal/filelock"
	"viaduct/iommu"
)

// lockedDevice locks a device as another viaduct does (vfio/bind/lock.go), until free is called.
func lockedDevice(t *testing.T, address string) (free func()) {
	t.Helper()
	a, err := iommu.ParseAddress(address)
	if err != nil {
		t.Fatal(err)
	}
	f, err := filelock.Open("/run/viaduct/lock")
	if err != nil {
		t.Fatal(err)
	}
	at := int64(a.Domain)<<16 | int64(a.Bus)<<8 | int64(a.Device)<<3 | int64(a.Function)
	if err := f.Wait(context.Background(), at); err != nil {
		t.Fatal(err)
	}
	return func() { f.Close() }
}

// awaitOpen waits until a process has a file open.
func awaitOpen(t *testing.T, pid int, file string) {
	t.Helper()
	for end := time.Now().Add(60 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		dir := fmt.Sprintf("/proc/%d/fd", pid)
		for _, n := range names(dir) {
			if target, _ := os.Readlink(filepath.Join(dir, n)); target == file {
				return
			}
		}
		if time.Now().After(end) {
			t.Fatalf("process %d never opens %s", pid, file)
		}
	}
}

// declareHost declares what the host is to be, until the test ends.
func declareHost(t *testing.T, text string) {
	t.Helper()
	const file = "/etc/viaduct/host.yaml"
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(file) })
}

// TestLateGuest: a guest that comes late opens its device while release --dead waits for a lock. Either it has the
// device, and nothing is reset or given away, or the device was reset before anybody could have it; a process that
// opens the node stands in for it.
func TestLateGuest(t *testing.T) {
	rounds := 10
	if everyWrite() {
		rounds = 200
	}
	pf := ports()[0]
	do(t, "vf", "create", pf, "2", "--driver", "vfio")
	t.Cleanup(func() { do(t, "vf", "destroy", pf) })
	vf := vfs(pf)[0]
	node := "/dev/vfio/" + link(devicesDir, vf, "iommu_group")
	certificate := "/run/viaduct/scrubbed-" + vf + ".json"
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))

	had, lost := 0, 0
	for round := range rounds {
		_ = os.Remove(certificate)
		do(t, "assign", "late", "--from", vf, "--ttl", "1ms")
		if l := leases(t)["late"]; l.State != "dead" {
			t.Fatalf("nobody came, and the lease is %+v", l)
		}
		free := lockedDevice(t, vf)
		cmd := exec.Command(viaduct, "release", "--dead")
		var said strings.Builder
		cmd.Stderr = &said
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		awaitOpen(t, cmd.Process.Pid, "/run/viaduct/lock")

		// Before the lock is free in half of the rounds, and some moment after it in the others.
		late := random.IntN(2) == 1
		if late {
			free()
			time.Sleep(time.Duration(random.IntN(400)) * time.Millisecond)
		}
		fd, err := unix.Open(node, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if !late {
			free()
		}
		_ = cmd.Wait()
		status := cmd.ProcessState.ExitCode()
		_, scrubbed := os.Stat(certificate)
		switch {
		case err == nil && !late:
			had++
			if status == 0 || scrubbed == nil || len(leases(t)) != 1 {
				t.Errorf("round %d: the guest has its device, and release --dead ended with %d: %s", round, status,
					said.String())
			}
		case status == 0:
			lost++
			if scrubbed != nil || len(leases(t)) != 0 {
				t.Errorf("round %d: released without a certificate", round)
			}
		default:
			had++
			if scrubbed == nil {
				t.Errorf("round %d: refused, and scrubbed all the same: %s", round, said.String())
			}
		}
		if err == nil {
			unix.Close(fd)
		}
		run(t, viaduct, "release", "late")
	}
	t.Logf("in %d rounds the guest was in time %d times, and too late %d times", rounds, had, lost)
}

// TestChangedVLAN: a pool's VLAN changes while a guest runs: the guest keeps its own, and its VF goes back to what is
// declared then.
func TestChangedVLAN(t *testing.T) {
	pf := ports()[0]
	mac := attr(devicesDir, pf, "net", netdev(t, pf), "address")
	shell(t, "ip link set "+netdev(t, pf)+" up")
	declared := func(vlan int) {
		declareHost(t, fmt.Sprintf("pfs:\n  - {select: \"mac=%s\", count: 2, vfs: [{driver: vfio, pool: net, vlan: %d}]}\n", mac, vlan))
	}
	declared(10)
	do(t, "apply")
	t.Cleanup(func() {
		forget()
		do(t, "vf", "destroy", pf)
	})
	qemu := guestWith(t, "web", strings.Fields(do(t, "assign", "web", "--from", "net", "--vlan", "100"))...)
	declared(20)
	do(t, "apply")
	if own, other := shown(t, pf, 1), shown(t, pf, 0); !strings.Contains(own, "vlan 100") ||
		!strings.Contains(other, "vlan 20") {
		t.Errorf("while the guest runs its VF is %s, the other %s", own, other)
	}
	qemu.end()
	do(t, "release", "web", "--wait", "30s")
	if now := shown(t, pf, 1); !strings.Contains(now, "vlan 20") {
		t.Errorf("after the guest its VF is %s", now)
	}
	status(t, 0, "plan")
}

// TestWrapper: a wrapper that restarts its VMM keeps the lease while none runs, whoever looks in between.
func TestWrapper(t *testing.T) {
	pf := ports()[0]
	do(t, "vf", "create", pf, "2", "--driver", "vfio")
	t.Cleanup(func() { do(t, "vf", "destroy", pf) })
	dir := t.TempDir()
	node := "/dev/vfio/" + link(devicesDir, vfs(pf)[0], "iommu_group")
	// Each VMM is a sleep with the node open, which says when it has it.
	script := fmt.Sprintf("for n in 1 2; do sh -c 'exec 9<>%s; echo >%s/up$1; exec sleep 1000' sh $n; echo >%s/down$n; "+
		"read wait <%s/go; done # {address}", node, dir, dir, dir)
	shell(t, "mkfifo "+dir+"/go")
	cmd := exec.Command(viaduct, "run", "web", "--from", vfs(pf)[0], "--", "sh", "-c", script)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}

	await := func(file string) {
		t.Helper()
		for end := time.Now().Add(60 * time.Second); !there(filepath.Join(dir,
			file)); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s never came", file)
			}
		}
	}

	for n := 1; n <= 2; n++ {
		await(fmt.Sprintf("up%d", n))
		if l := leases(t)["web"]; l.State != "active" {
			t.Errorf("with VMM %d the lease is %+v", n, l)
		}
		shell(t, "pkill -KILL -f '^sleep 1000'")
		await(fmt.Sprintf("down%d", n))
		if l := leases(t)["web"]; l.State == "dead" {
			t.Errorf("between its VMMs the lease is %+v", l)
		}
		do(t, "release", "--dead")
		if len(leases(t)) != 1 {
			t.Fatal("the lease was given away while its wrapper lived")
		}
		shell(t, "echo >"+dir+"/go")
	}

	if err := cmd.Wait(); err != nil {
		t.Errorf("the wrapper: %v", err)
	}
	if left := leases(t); len(left) != 0 {
		t.Errorf("after the wrapper: %v", left)
	}
}

// TestBrokenFile: by a file that cannot be read, a boot uses what was confirmed last and fails, or claims nothing where
// nothing ever was; libvirt's hook starts no domain that has devices, and ends what was started.
func TestBrokenFile(t *testing.T) {
	pf := ports()[0]
	mac := attr(devicesDir, pf, "net", netdev(t, pf), "address")
	shell(t, "ip link set "+netdev(t, pf)+" up")
	forget()
	good := fmt.Sprintf("pfs:\n  - {select: \"mac=%s\", count: 2, vfs: [{driver: vfio, pool: net}]}\n", mac)
	bad := "/etc/viaduct/host.d/50-bad.yaml"
	t.Cleanup(func() {
		_ = os.Remove(bad)
		forget()
		run(t, viaduct, "vf", "destroy", pf)
	})

	declareHost(t, good)
	shell(t, "mkdir -p /etc/viaduct/host.d; echo 'pfs: [ {' >"+bad)
	r := run(t, viaduct, "apply", "--boot", "--wait", "1s")
	if r.status == 0 || strings.Contains(r.stdout+r.stderr, "as declared") || len(vfs(pf)) != 0 {
		t.Errorf("nothing was ever in force: exit status %d, %d VFs: %s%s", r.status, len(vfs(pf)), r.stdout, r.stderr)
	}

	shell(t, "rm "+bad)
	do(t, "apply")
	shell(t, "echo 'pfs: [ {' >"+bad+"; echo 0 >"+filepath.Join(devicesDir, pf, "sriov_numvfs"))
	r = run(t, viaduct, "apply", "--boot", "--wait", "1s")
	if r.status == 0 || len(vfs(pf)) != 2 || !strings.Contains(r.stderr, bad) {
		t.Errorf("by what was confirmed last: exit status %d, %d VFs: %s", r.status, len(vfs(pf)), r.stderr)
	}

	hook := func(operation, part string) result {
		x := "<domain type='kvm'><name>web</name><devices><hostdev mode='subsystem' type='pci' managed='no'><source>" +
			"<address domain='0x0000' bus='0x02' slot='0x10' function='0x0'/></source></hostdev></devices></domain>"
		return run(t, "sh", "-c", "echo \""+x+"\" | "+viaduct+" libvirt-hook -- web "+operation+" "+part+" -")
	}
	if r := hook("prepare", "begin"); r.status != 0 {
		t.Errorf("the hook, by what was confirmed last: exit status %d, %s", r.status, r.stderr)
	}
	forget()
	shell(t, "echo 'pfs: [ {' >"+bad)
	if r := hook("prepare", "begin"); r.status == 0 {
		t.Error("the hook lets a domain start by a file that cannot be read")
	}
	if r := hook("release", "end"); r.status != 0 {
		t.Errorf("the hook, at a domain's end: exit status %d, %s", r.status, r.stderr)
	}
}
