package main

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"viaduct/cmd/internal/hostfile"
	"viaduct/cmd/internal/terminal"
	"viaduct/internal/host"
	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

// The sweep lets operations of whole commands fail in turn, and holds their exit status, and what they say, against what
// is.

const (
	sweptPF  = "0000:01:00.0"
	sweptVF  = "0000:01:10.0" // a guest's
	sweptNIC = "0000:07:01.0"
	sweptEDU = "0000:07:02.0" // beside it
)

const sweptFile = "pfs:\n  - select: " + sweptPF + "\n    count: 2\n    vfs:\n      - {range: 0, driver: vfio}\n" +
	"      - {range: 1, driver: home, vlan: 9}\ndevices:\n  - select: " + sweptNIC + "\n"

// sweptHost is a host that is as declared, with a guest that has a VF for good.
func sweptHost(t *testing.T) *hosttest.Kernel {
	t.Helper()
	k := hosttest.NewSmallLab(t, "0000:00:05.0", sweptPF, "0000:00:08.0", sweptNIC, sweptEDU)
	put(t, k, hostfile.File, sweptFile)
	put(t, k, "proc/sys/kernel/random/boot_id", "this\n")
	mustOnKernel(t, k, "apply")
	put(t, k, "sys/bus/pci/devices/"+sweptVF+"/reset", "")
	mustOnKernel(t, k, "assign", "web", "--from", sweptVF, "--persist", "--vlan", "7")
	return k
}

// strayed has what was declared be otherwise: somebody has taken a VF from its driver, and given the NIC back.
func strayed(t *testing.T) *hosttest.Kernel {
	t.Helper()
	k := sweptHost(t)
	mustOnKernel(t, k, "unbind", sweptNIC)
	mustOnKernel(t, k, "bind", sweptPF+"/vf1")
	return k
}

// booted loses what dies with a boot.
func booted(t *testing.T) *hosttest.Kernel {
	t.Helper()
	k := sweptHost(t)
	mustOnKernel(t, k, "unbind", sweptNIC)
	for _, w := range [][2]string{{"sriov_drivers_autoprobe", "0"}, {"sriov_numvfs", "0"}} {
		if err := k.Write("sys/bus/pci/devices/"+sweptPF+"/"+w[0], w[1]); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.RemoveAll(filepath.Join(k.Dir(), "run/viaduct")); err != nil {
		t.Fatal(err)
	}
	put(t, k, "proc/sys/kernel/random/boot_id", "next\n")
	return k
}

// sweptState is how devices and VFs are, what is leased, and what is declared beside host.yaml.
func sweptState(t *testing.T, k *hosttest.Kernel) string {
	t.Helper()
	var out strings.Builder
	h := &iommu.Host{Host: k.Host()}
	for _, name := range []string{sweptPF, sweptVF, "0000:01:10.2", sweptNIC, sweptEDU} {
		a, err := iommu.ParseAddress(name)
		if err != nil {
			t.Fatal(err)
		}
		if d, err := iommu.ReadDevice(h, a); err == nil {
			fmt.Fprintf(&out, "%s on %s/%s\n", name, d.Driver, d.DriverOverride)
		}
	}
	out.WriteString(onKernel(k, "vf", "get", sweptPF+"/vf0", "--json").stdout)
	out.WriteString(onKernel(k, "vf", "get", sweptPF+"/vf1", "--json").stdout)
	fmt.Fprintf(&out, "lease %v\n", h.Exists("run/viaduct/lease-web.json"))
	saved, _ := h.Names(hostfile.Dir) // none, mostly
	fmt.Fprintf(&out, "saved %q\n", saved)
	return out.String()
}

// lookOnce is one look of the watch service.
func lookOnce(k *hosttest.Kernel) answer {
	var stdout, stderr bytes.Buffer
	line := terminal.NewProgress(terminal.Of(&stderr, "", os.Getenv))
	defer line.Done()
	e := &env{
		stdout: &stdout, stderr: &stderr, progress: &progress{line: line, pfs: map[string]*pfProgress{}},
		openHost: func(string) (*iommu.Host, error) {
			h, err := host.Fake(k.Dir(), k)
			return &iommu.Host{Host: h}, err
		},
	}
	_, err := e.keep(context.Background(), &declaredOptions{boot: true, watching: true})
	if err != nil {
		return answer{exitFailed, stdout.String(), err.Error()}
	}
	return answer{exitDone, stdout.String(), stderr.String()}
}

// TestFaultSweep: whichever operation of a command fails, it ends with an error that says so, or all is done; and when it
// is run again, all is done.
func TestFaultSweep(t *testing.T) {
	line := func(words ...string) func(*hosttest.Kernel) answer {
		return func(k *hosttest.Kernel) answer { return onKernel(k, words...) }
	}

	for name, c := range map[string]struct {
		host func(*testing.T) *hosttest.Kernel
		do   func(*hosttest.Kernel) answer
	}{
		"watch":        {strayed, lookOnce},
		"apply":        {strayed, line("apply")},
		"apply --boot": {booted, line("apply", "--boot", "--wait", "0s")},
		"undo": {func(t *testing.T) *hosttest.Kernel {
			k := strayed(t)
			mustOnKernel(t, k, "apply")
			return k
		}, line("undo")},
		"release": {sweptHost, line("release", "web")},
		"bind --save": {func(t *testing.T) *hosttest.Kernel {
			k := sweptHost(t)
			mustOnKernel(t, k, "unbind", sweptNIC)
			return k
		}, line("bind", "--save", sweptNIC)},
	} {
		t.Run(name, func(t *testing.T) {
			k := c.host(t)
			var a answer
			all := k.Operations(func() { a = c.do(k) })
			if a.status != exitDone {
				t.Fatalf("%+v", a)
			}
			want := sweptState(t, k)
			for _, n := range hosttest.EveryNth(16, hosttest.Sample(all)) {
				k := c.host(t)
				failed := k.FailNth(n, []error{unix.EIO, unix.EACCES, unix.ENOSPC}[n%3])
				a := c.do(k)
				k.Revive()
				now := sweptState(t, k)
				if a.status == exitDone && now != want || a.status != exitDone && a.stderr == "" {
					t.Errorf("operation %d (%s) fails: %+v\nis %s\nto be %s", n, failed(), a, now, want)
				}
				if name == "release" && a.status != exitDone && strings.Contains(a.stderr, "quarantine") {
					continue
				}
				if a.status != exitDone {
					a = c.do(k)
				}
				if now := sweptState(t, k); a.status != exitDone && name != "release" || now != want {
					t.Errorf("operation %d (%s) fails, and again: %+v\nis %s\nto be %s", n, failed(), a, now, want)
				}
			}
		})
	}
}

// What nobody applied is not changed by the watch: what was undone is left, until the next apply.
func TestWatchHolds(t *testing.T) {
	k := strayed(t)
	if a := lookOnce(k); a.status != exitDone {
		t.Fatalf("%+v", a)
	}
	declared := sweptState(t, k)
	mustOnKernel(t, k, "bind", sweptPF+"/vf1")
	mustOnKernel(t, k, "apply")
	if now := sweptState(t, k); now != declared {
		t.Errorf("applied, it is %s\nnot %s", now, declared)
	}
	mustOnKernel(t, k, "undo")
	undone := sweptState(t, k)
	before := maps.Clone(allOf(t, k))
	if a := lookOnce(k); a.status != exitDone || a.stdout != "" || !maps.Equal(before, allOf(t, k)) {
		t.Errorf("undone, and looked at: %+v", a)
	}
	if a := onKernel(k, "status"); !strings.Contains(a.stdout+a.stderr, "undone") &&
		!strings.Contains(a.stdout+a.stderr, "undo") {
		t.Logf("status: %+v", a)
	}
	if undone == declared {
		t.Error("nothing was undone")
	}
	mustOnKernel(t, k, "apply")
	if now := sweptState(t, k); now != declared {
		t.Errorf("applied again, it is %s\nnot %s", now, declared)
	}
}
