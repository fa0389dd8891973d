//go:build lab

package labtest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"viaduct/vfio"

	"golang.org/x/sys/unix"
)

// ports are the NICs with VFs, by address.
func ports() []string {
	var out []string
	for _, n := range names(devicesDir) {
		if attr(devicesDir, n, "device") == "0x10c9" && attr(devicesDir, n, "sriov_totalvfs") != "" {
			out = append(out, n)
		}
	}
	return out
}

// pool declares all VFs of these PFs as one pool, and makes them.
func pool(t *testing.T, pfs ...string) {
	t.Helper()
	var b strings.Builder
	b.WriteString("pfs:\n")
	for _, pf := range pfs {
		shell(t, "ip link set "+netdev(t, pf)+" up")
		fmt.Fprintf(&b, "  - select: mac=%s\n    count: 7\n    vfs:\n      - driver: vfio\n        pool: net\n",
			attr(devicesDir, pf, "net", netdev(t, pf), "address"))
	}
	if err := os.MkdirAll("/etc/viaduct", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("/etc/viaduct/host.yaml", []byte(b.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	do(t, "apply")
	t.Cleanup(func() {
		forget()
		_ = os.Remove("/etc/viaduct/host.yaml")
		for _, pf := range pfs {
			do(t, "vf", "destroy", pf)
		}
	})
}

// leases are the guests' devices as viaduct tells, by guest.
func leases(t *testing.T) map[string]leaseSeen {
	t.Helper()
	var v struct{ Leases []leaseSeen }
	decode(t, do(t, "leases", "--json"), &v)
	out := map[string]leaseSeen{}
	for _, l := range v.Leases {
		out[l.Guest] = l
	}
	return out
}

type leaseSeen struct {
	Guest, State string
	Why          *string
	Holders      []string
	Devices      []struct {
		Address   string
		Group     int
		Nodes     []string
		MAC, VLAN *string
	}
}

// shown is what ip says of a VF.
func shown(t *testing.T, pf string, index int) string {
	t.Helper()
	for line := range strings.Lines(shell(t, "ip -d link show "+netdev(t, pf))) {
		if strings.HasPrefix(strings.TrimSpace(line), fmt.Sprintf("vf %d ", index)) {
			return strings.TrimSpace(line)
		}
	}
	t.Fatalf("ip shows no vf %d of %s", index, pf)
	return ""
}

// TestLease: a lease's whole life. ip, sysfs and QEMU judge.
func TestLease(t *testing.T) {
	pf := ports()[1]
	pool(t, pf)
	all := vfs(pf)
	const last = 6 // assign draws from the end of a pool
	drawn := all[last]
	fresh := shown(t, pf, last)

	// assigned, once
	out := strings.TrimSpace(do(t, "assign", "web", "--from", "net", "--vlan", "100", "--mac", "52:54:00:aa:00:01"))
	if out != "-device vfio-pci,host="+drawn {
		t.Fatalf("assign prints %q", out)
	}
	if line := shown(t, pf, last); !strings.Contains(line, "52:54:00:aa:00:01") || !strings.Contains(line, "vlan 100") {
		t.Errorf("the VF is %s", line)
	}
	before := fingerprint() + shown(t, pf, last)
	if again := strings.TrimSpace(do(t, "assign", "web", "--from", "net", "--vlan", "100", "--mac",
		"52:54:00:aa:00:01")); again != out ||
		fingerprint()+shown(t, pf, last) != before {
		t.Errorf("asked again, it is %q", again)
	}
	status(t, 3, "assign", "web", "--from", "net", "--vlan", "200")
	if l := leases(t)["web"]; l.State != "reserved" || l.Devices[0].Address != drawn {
		t.Errorf("lease %+v", l)
	}
	if r := status(t, 3, "unbind", drawn); !strings.Contains(r.stderr, `assigned to guest "web"`) {
		t.Errorf("unbind of what is assigned: %s", r.stderr)
	}
	if r := status(t, 3, "vf", "destroy", pf); !strings.Contains(r.stderr, `assigned to guest "web"`) {
		t.Errorf("vf destroy of what is assigned: %s", r.stderr)
	}
	status(t, 0, "plan") // what the guest has instead of what is declared is no difference
	shell(t, fmt.Sprintf("ip link set %s vf 6 vlan 0", netdev(t, pf)))
	status(t, 4, "plan")
	do(t, "apply")
	if line := shown(t, pf, last); !strings.Contains(line, "vlan 100") {
		t.Errorf("apply does not give a guest's VF its VLAN back: %s", line)
	}

	// every format is printed of the same lease; CDI's goes to its own library, outside
	for _, format := range []string{"json", "env", "libvirt", "cloud-hypervisor", "crosvm", "incus", "kata", "cdi"} {
		text := do(t, "assign", "web", "--from", "net", "--vlan", "100", "--mac", "52:54:00:aa:00:01", "--format",
			format, "--persist=false")
		if format == "cdi" {
			if err := os.WriteFile("/out/cdi.json", []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		} else if !strings.Contains(text, drawn) && !strings.Contains(text, "slot='0x11'") && !strings.Contains(text,
			"/dev/vfio/"+link(devicesDir, drawn, "iommu_group")) {
			t.Errorf("%s: %s", format, text)
		}
	}

	// what QEMU takes, by QEMU
	for _, format := range []string{"qemu", "qemu-iommufd"} {
		args := strings.Fields(
			do(t, "assign", "web", "--from", "net", "--vlan", "100", "--mac", "52:54:00:aa:00:01", "--format", format),
		)
		qemu := guestWith(t, "web", args...)
		if l := leases(t)["web"]; l.State != "active" ||
			!strings.Contains(strings.Join(l.Holders, " "), `guest "web"`) {
			t.Errorf("%s: with a VMM, the lease is %+v", format, l)
		}
		if r := status(t, 3, "release", "web"); !strings.Contains(r.stderr, "qemu") {
			t.Errorf("release while it runs: %s", r.stderr)
		}
		begun := time.Now()
		if r := status(t, 3, "release", "web", "--wait", "1s"); time.Since(begun) < time.Second ||
			time.Since(begun) > 20*time.Second {
			t.Errorf("release --wait 1s while it runs: after %s: %s", time.Since(begun), r.stderr)
		}
		if format == "qemu" {
			_ = qemu.cmd.Process.Kill()
			_ = qemu.cmd.Wait()
			if l := leases(t)["web"]; l.State != "dead" {
				t.Errorf("after SIGKILL of its VMM the lease is %+v", l)
			}
			continue
		}
		// waited for
		go func() {
			time.Sleep(2 * time.Second) // in which release finds the guest running
			_ = qemu.cmd.Process.Kill()
			_ = qemu.cmd.Wait()
		}()
		var certificates []map[string]any
		decode(t, do(t, "release", "web", "--wait", "60s", "--json"), &certificates)
		if len(certificates) != 1 || certificates[0]["result"] != "clean" || certificates[0]["address"] != drawn {
			t.Errorf("certificates %v", certificates)
		}
	}
	if now := shown(t, pf, last); now != fresh {
		t.Errorf("after release the VF is\n%s, a new one is\n%s", now, fresh)
	}
	if bound(drawn) != "vfio-pci" || len(leases(t)) != 0 {
		t.Errorf("after release: on %q, leases %v", bound(drawn), leases(t))
	}

	// dead: nobody came; the process it was to end with ended
	do(t, "assign", "late", "--from", "net", "--ttl", "1ms")
	sleeper := exec.Command("sleep", "1000")
	if err := sleeper.Start(); err != nil {
		t.Fatal(err)
	}
	do(t, "assign", "owned", "--from", "net", "--owner-pid", strconv.Itoa(sleeper.Process.Pid))
	do(t, "assign", "stays", "--from", "net")
	if got := leases(t); got["late"].State != "dead" || got["owned"].State != "reserved" ||
		got["stays"].State != "reserved" {
		t.Errorf("leases %v", got)
	}
	_ = sleeper.Process.Kill()
	_ = sleeper.Wait()
	do(t, "release", "--dead")
	if got := leases(t); len(got) != 1 || got["stays"].State != "reserved" {
		t.Errorf("after release --dead: %v", got)
	}
	do(t, "release", "stays")

	// quarantined: what cannot be scrubbed
	do(t, "assign", "foul", "--from", all[3], "--vlan", "5")
	shell(t, "echo > "+filepath.Join(devicesDir, all[3], "reset_method"))
	if r := status(t, 1, "release", "foul"); !strings.Contains(r.stderr, "quarantine") {
		t.Errorf("release of what cannot be reset: %s", r.stderr)
	}
	if r := status(t, 1, "assign", "next", "--from", all[3]); !strings.Contains(r.stderr, "1 in quarantine") {
		t.Errorf("assign of what is in quarantine: %s", r.stderr)
	}
	shell(t, "echo default > "+filepath.Join(devicesDir, all[3], "reset_method"))
	do(t, "release", "--quarantined", all[3])
	if now := shown(t, pf, 3); strings.Contains(now, "vlan") {
		t.Errorf("after the quarantine: %s", now)
	}

	// lost: its PF's VFs go behind viaduct's back
	do(t, "assign", "gone", "--from", "net")
	shell(t, "echo 0 > "+filepath.Join(devicesDir, pf, "sriov_numvfs"))
	if l := leases(t)["gone"]; l.State != "lost" {
		t.Errorf("without its VF the lease is %+v", l)
	}
	do(t, "release", "gone")
	do(t, "apply")
}

// TestRun: run is the VMM's parent for good and bad, and gets the devices back whatever happens.
func TestRun(t *testing.T) {
	pf := ports()[1]
	pool(t, pf)
	fresh := shown(t, pf, 6)
	got := status(
		t,
		7,
		"run",
		"web",
		"--from",
		"net",
		"--vlan",
		"9",
		"--mac",
		"stable",
		"--",
		"sh",
		"-c",
		`echo "{address} $VIADUCT_GUEST"; ip link show `+netdev(t, pf)+`; exit 7`,
	)
	if !strings.HasPrefix(got.stdout, vfs(pf)[6]+" web\n") || !strings.Contains(got.stdout, "vlan 9") {
		t.Errorf("the command saw:\n%s", got.stdout)
	}
	status(t, 128+9, "run", "web", "--from", "net", "--", "sh", "-c", "kill -9 $$ # {address}")
	status(t, 125, "run", "web", "--from", "net", "--", "/nonexistent")
	status(t, 125, "run", "web", "--from", "nopool", "--", "true")
	if now := shown(t, pf, 6); now != fresh || len(leases(t)) != 0 {
		t.Errorf("after run: %s, leases %v", now, leases(t))
	}

	// the command is a user's, who has the nodes and may lock memory
	got = status(t, 0, "run", "web", "--from", "net", "--user", "nobody", "--", "sh", "-c",
		`id -un; ulimit -l; for n in $VIADUCT_NODES; do case $n in
/dev/iommu | /dev/vfio/vfio) ;; *) [ -w $n ] || echo "no $n" ;; esac; done # {address}`)
	if got.stdout != "nobody\nunlimited\n" {
		t.Errorf("run --user nobody: %q, %s", got.stdout, got.stderr)
	}

	// signals are the command's
	cmd := exec.Command(viaduct, "run", "web", "--from", "net", "--", "sh", "-c",
		"trap 'exit 3' TERM; echo ready {address}; sleep 1000 & wait")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var line [64]byte
	if _, err := out.Read(line[:]); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Process.Signal(unix.SIGTERM)
	_ = cmd.Wait()
	if cmd.ProcessState.ExitCode() != 3 {
		t.Errorf("run ended with %d", cmd.ProcessState.ExitCode())
	}

	// killed itself, the lease is dead once the VMM is gone
	cmd = exec.Command(viaduct, "run", "web", "--from", "net", "--", "sh", "-c",
		"echo ready {address}; exec sleep 1000")
	if out, err = cmd.StdoutPipe(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(line[:]); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if l := leases(t)["web"]; l.State != "active" {
		t.Errorf("while the VMM lives the lease is %+v", l)
	}
	shell(t, "pkill -KILL -f 'sleep 1000'")
	if l := leases(t)["web"]; l.State != "dead" {
		t.Errorf("without its VMM the lease is %+v", l)
	}
	do(t, "release", "--dead")
	if len(leases(t)) != 0 {
		t.Errorf("leases %v", leases(t))
	}
}

// TestManyAssigns: of two hundred at once exactly as many as there are VFs get one, each another; so it is when a third
// of them are killed at any moment, and nothing is leaked.
func TestManyAssigns(t *testing.T) {
	pfs := ports()
	pool(t, pfs...)
	all := map[string]bool{}
	for _, pf := range pfs {
		for _, vf := range vfs(pf) {
			all[vf] = true
		}
	}
	fresh := ""
	for _, pf := range pfs {
		for i := range 7 {
			fresh += shown(t, pf, i) + "\n"
		}
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	most := 60
	if everyWrite() {
		most = 200
	}

	for _, kill := range []bool{false, true} {
		delays := make([]time.Duration, most)
		for i := range delays {
			if kill && random.IntN(3) == 0 {
				delays[i] = time.Duration(random.IntN(20_000)) * time.Millisecond
			}
		}
		var mu sync.Mutex
		got := map[string]string{}
		refused, killed := 0, 0
		var wg sync.WaitGroup
		begun := time.Now()
		for i := range most {
			wg.Go(func() {
				guest := fmt.Sprintf("g%d", i)
				cmd := exec.Command(viaduct, "assign", guest, "--from", "net", "--vlan", "77", "--format", "json",
					"--ttl", "1ms", "--timeout", "300s")
				var stdout, stderr bytes.Buffer
				cmd.Stdout, cmd.Stderr = &stdout, &stderr
				if err := cmd.Start(); err != nil {
					t.Error(err)
					return
				}
				if delays[i] > 0 {
					timer := time.AfterFunc(delays[i]/10, func() { _ = cmd.Process.Kill() })
					defer timer.Stop()
				}
				_ = cmd.Wait()
				mu.Lock()
				defer mu.Unlock()
				switch code := cmd.ProcessState.ExitCode(); {
				case code == 0:
					var l leaseSeen
					if err := json.Unmarshal(stdout.Bytes(), &l); err != nil {
						t.Errorf("%s: %v: %s", guest, err, stdout.String())
						return
					}
					a := l.Devices[0].Address
					if other := got[a]; other != "" || !all[a] {
						t.Errorf("%s is given to %s and %s", a, other, guest)
					}
					got[a] = guest
				case code == 1 && strings.Contains(stderr.String(), "pool exhausted"):
					refused++
				case code == -1:
					killed++
				default:
					t.Errorf("%s: exit status %d: %s", guest, code, stderr.String())
				}
			})
		}
		wg.Wait()
		t.Logf("kill %v: %d got one, %d were told that the pool is exhausted, %d killed, in %s", kill, len(got),
			refused, killed, time.Since(begun).Round(time.Second))
		if !kill && (len(got) != len(all) || refused != most-len(all)) {
			t.Errorf("%d of %d got a VF, %d were refused", len(got), len(all), refused)
		}
		seen := leases(t)
		owners := map[string]string{}
		for guest, l := range seen {
			if a := l.Devices[0].Address; owners[a] != "" {
				t.Errorf("%s is in the leases of %s and %s", a, owners[a], guest)
			} else {
				owners[a] = guest
			}
		}
		for a, guest := range got {
			if owners[a] != guest {
				t.Errorf("%s got %s, which the books have for %q", guest, a, owners[a])
			}
		}
		do(t, "release", "--dead")
		if left := leases(t); len(left) != 0 {
			t.Errorf("%d leases are left: %v", len(left), left)
		}
		now := ""
		for _, pf := range pfs {
			for i := range 7 {
				now += shown(t, pf, i) + "\n"
			}
		}
		if now != fresh {
			t.Errorf("not all VFs are as new ones:\n%s", now)
		}
		var free []struct{ Free, Leased int }
		decode(t, do(t, "pool", "net", "--json"), &free)
		if free[0].Free != len(all) {
			t.Errorf("%d of %d are free", free[0].Free, len(all))
		}
		if left := slices.DeleteFunc(names("/run/viaduct"), func(n string) bool {
			return !strings.HasPrefix(n,
				"change-") && !strings.HasPrefix(n, "lease-")
		}); len(
			left,
		) > 0 {
			t.Errorf("records are left: %v", left)
		}
	}
}

// TestLeaseUnit lends two functions, which only a reset of their bus resets, three times in a row: each time they are reset
// together and go home, and what the last guest wrote to one is gone.
func TestLeaseUnit(t *testing.T) {
	h := openHost(t)
	var pair []string
	for _, n := range of("8086", "100e") {
		if len(names(devicesDir, n, "iommu_group/devices")) > 1 {
			pair = append(pair, n)
		}
	}

	for range 3 {
		do(t, "assign", "tenant", "--from", pair[0])
		write := func(value uint32) (was uint32) {
			c := must(vfio.NewContext(h, vfio.Options{Way: vfio.Container}))
			defer func() { check(t, c.Close()) }()
			d := must(c.Open(pair[1]))
			must(must(d.Region(vfio.Config)).WriteAt([]byte{2, 0}, 4))
			regs := must(must(d.Region(vfio.BAR0)).Map())
			was = must(regs.Load32(0x2820))
			check(t, regs.Store32(0x2820, value))
			return was
		}
		if was := write(0x1234); was != 0 {
			t.Errorf("RDTR is %#x, which the last guest wrote", was)
		}
		var got []struct{ Address, Result, Reset string }
		decode(t, do(t, "release", "tenant", "--json"), &got)
		if len(got) != 2 {
			t.Errorf("%+v", got)
		}
		for _, c := range got {
			if c.Result != "clean" || !strings.HasPrefix(c.Reset, "bus, together: ") ||
				link(devicesDir, c.Address, "driver") != "e1000" {
				t.Errorf("%+v, on %s", c, link(devicesDir, c.Address, "driver"))
			}
		}
	}

	if r := do(t, "leases", "--json"); !strings.Contains(r, `"quarantine": []`) {
		t.Errorf("leases: %s", r)
	}
}
