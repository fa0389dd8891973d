package main

import (
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"viaduct/cmd/internal/hostfile"
	"viaduct/internal/host/hosttest"
)

// A command that is run has its devices while it runs, is told of them, and ends as it ends; then they are reset and free.
// What cannot be started leaves nothing.
func TestRun(t *testing.T) {
	t.Setenv(asProgram, "1") // which starts the command
	k := hosttest.NewSmallLab(t, "0000:00:05.0", sweptPF)
	put(t, k, hostfile.File,
		"pfs:\n  - select: "+sweptPF+"\n    count: 2\n    vfs: [{range: 0-1, driver: none, pool: net}]\n")
	mustOnKernel(t, k, "apply")
	for _, vf := range []string{sweptVF, "0000:01:10.2"} {
		put(t, k, "sys/bus/pci/devices/"+vf+"/reset", "")
	}
	resets := func() (n int) {
		for _, line := range k.Log {
			if strings.HasSuffix(line, "/reset=1") {
				n++
			}
		}
		return n
	}
	k.Process(os.Getpid(), "viaduct")
	for name, c := range map[string]struct {
		command []string
		status  int
		resets  int
		says    string
	}{
		"ends well": {[]string{"sh", "-c", "exit 0"}, exitDone, 1, ""},
		"is told": {[]string{"sh", "-c",
			`test "$VIADUCT_DEVICES" = 0000:01:10.2 && test "$VIADUCT_GUEST" = web`}, exitDone, 1, ""},
		"ends badly":      {[]string{"sh", "-c", "exit 7"}, 7, 1, ""},
		"is killed":       {[]string{"sh", "-c", "kill -9 $$"}, 128 + 9, 1, ""},
		"is not there":    {[]string{"/no/such/program"}, exitNotRun, 0, "no such file"},
		"is no program":   {[]string{"/proc/self/status"}, exitNotRun, 0, "permission denied"},
		"takes no place":  {[]string{"sh", "{devices}"}, exitNotRun, 0, "is not the name of a VMM"},
		"nothing to run":  {nil, exitNotRun, 0, "after -- the command"},
		"no such device":  {[]string{"--no-such-option", "--", "sh"}, exitNotRun, 0, ""},
		"a wrong setting": {[]string{"--set", "x=1", "--", "sh"}, exitNotRun, 0, ""},
	} {
		k.Log = nil
		line := []string{"run", "web", "--from", "net", "--vlan", "7"}
		if len(c.command) == 0 || c.command[0][0] != '-' {
			line = append(line, "--")
		}
		a := onKernel(k, append(line, c.command...)...)
		if a.status != c.status || resets() != c.resets || !strings.Contains(a.stderr, c.says) {
			t.Errorf("%s: %+v, %d resets", name, a, resets())
		}
		if left := onKernel(k, "leases", "--json").stdout; strings.Contains(left, "web") ||
			boundTo(k, "0000:01:10.2") != "" {
			t.Errorf("%s: left is %s, on %s", name, left, boundTo(k, "0000:01:10.2"))
		}
	}

	// One that runs already is not run again; what cannot be reset afterwards is told, beside how the command ended.
	k.Process(4711, "keeper")
	mustOnKernel(t, k, "assign", "web", "--from", "net", "--owner-pid", "4711")
	if a := onKernel(k, "run", "web", "--from", "net", "--", "sh", "-c", "exit 0"); a.status != exitNotRun ||
		!strings.Contains(a.stderr, "process 4711 has its lease") {
		t.Errorf("run while it runs: %+v", a)
	}
	k.End(4711)
	mustOnKernel(t, k, "release", "web")
	k.Fail["sys/bus/pci/devices/0000:01:10.2/reset"] = unix.EIO
	if a := onKernel(k, "run", "web", "--from", "net", "--", "sh", "-c", "exit 7"); a.status != 7 ||
		!strings.Contains(a.stderr, "is in quarantine") {
		t.Errorf("not reset: %+v", a)
	}
	delete(k.Fail, "sys/bus/pci/devices/0000:01:10.2/reset")
	mustOnKernel(t, k, "release", "--quarantined", "0000:01:10.2")

	// One that ends while it moves keeps its devices until that is over.
	put(t, k, "var/lib/viaduct/move-web.json", `{"guest":"web","source":true,"peer":"there"}`)
	if a := onKernel(k, "run", "web", "--from", "net", "--", "sh", "-c", "exit 7"); a.status != 7 ||
		!strings.Contains(a.stderr, "has ended while it moved") {
		t.Errorf("while it moves: %+v", a)
	}
	if left := onKernel(k, "leases", "--json").stdout; !strings.Contains(left, `"guest": "web"`) {
		t.Errorf("while it moves: %s", left)
	}
}
