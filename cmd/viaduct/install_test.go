package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"viaduct/cmd/internal/hostfile"
	"viaduct/internal/host/hosttest"
)

const (
	installedUnit  = "etc/systemd/system/viaduct.service"
	installedWatch = "etc/systemd/system/multi-user.target.wants/viaduct-watch.service"
)

// installHost is a host with a declaration, whose PF carries the host. Its root has the tools that are named, which
// write down how they were called, and fail where a file of their name says why.
func installHost(t *testing.T, tools ...string) *hosttest.Kernel {
	t.Helper()
	k := hosttest.NewSmallLab(t, "0000:00:05.0", sweptPF, "0000:00:08.0", sweptNIC, sweptEDU)
	put(t, k, hostfile.File, sweptFile)
	k.Net.Routes = []hosttest.Route{{To: "default", Over: []string{"enp1s0"}}}
	for _, name := range tools {
		put(t, k, "usr/bin/"+name, "#!/bin/sh\ncd "+k.Dir()+"\nline=\""+name+" $*\"\necho \"$line\" >>called\n"+
			"if grep -qxF \"$line\" fails; then echo it is broken >&2; exit 1; fi\n")
		if err := os.Chmod(filepath.Join(k.Dir(), "usr/bin", name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	put(t, k, "fails", "")
	return k
}

// called are the calls of tools since it was asked last.
func called(t *testing.T, k *hosttest.Kernel) []string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(k.Dir(), "called"))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	_ = os.Remove(filepath.Join(k.Dir(), "called"))
	return strings.Split(strings.TrimSpace(string(text)), "\n")
}

func (a *answer) text() string { return strings.Join(strings.Fields(a.stdout+a.stderr), " ") }

// Where systemd does not run, as where an image is built, an install writes its files, says what is left to do, and
// asks no tool of systemd's; an uninstall takes all of them away.
func TestInstallWithoutSystemd(t *testing.T) {
	k := installHost(t, "systemctl", "udevadm")
	before := allOf(t, k)
	a := onKernel(k, "install", "--watch")
	if text := a.text(); a.status != exitDone || !strings.Contains(text, "systemd does not run here") ||
		!strings.Contains(text, "apply --boot") {
		t.Fatalf("%+v", a)
	}
	for _, name := range []string{installedUnit, installedWatch} {
		if !k.Host().Exists(name) || !strings.Contains(a.stdout, "/"+name+"\n") {
			t.Errorf("/%s is missing, or not told: %+v", name, a)
		}
	}
	if text, err := k.Host().String("var/lib/viaduct/protected.json"); err != nil || !strings.Contains(text, sweptPF) {
		t.Errorf("what carries the host is not recorded: %q, %v", text, err)
	}
	if a := onKernel(k, "install", "--watch"); a.status != exitDone ||
		!strings.Contains(a.stdout, "installed already") {
		t.Errorf("again: %+v", a)
	}
	if a := onKernel(k, "install"); a.status != exitDone || k.Host().Exists(installedWatch) {
		t.Errorf("without the watch: %+v", a)
	}
	if a := onKernel(k, "uninstall"); a.status != exitDone || !strings.Contains(a.stdout, installedUnit) {
		t.Errorf("%+v", a)
	}
	if got := called(t, k); !slices.Equal(got, []string{""}) {
		t.Errorf("called %q", got)
	}
	for name, text := range allOf(t, k) {
		if _, was := before[name]; !was && text != "folder" && !strings.HasPrefix(name, "var/lib/viaduct/") {
			t.Errorf("left: /%s", name)
		}
	}
}

// Who may not look at processes cannot record what carries the host: that is told where an image is made, and stops an
// install on a host that runs before it has written anything.
func TestInstallBlind(t *testing.T) {
	for _, runs := range []bool{false, true} {
		k := installHost(t, "systemctl", "udevadm")
		if runs {
			put(t, k, "run/systemd/system/x", "")
		}
		k.Process(4711, "hidden")
		k.SetFault(func(_, name string) error {
			if strings.HasPrefix(name, "proc/4711/") {
				return unix.EACCES
			}
			return nil
		})
		a := onKernel(k, "install")
		if installed := k.Host().Exists(installedUnit); runs == installed || runs == (a.status == exitDone) ||
			!runs && !strings.Contains(a.text(), "run viaduct install again on the host itself") {
			t.Errorf("systemd runs: %v: installed %v, %+v", runs, installed, a)
		}
	}
}

// Where systemd runs it is told what was changed, and what begins or ends at once; whichever of its tools fails, that
// is told, with what the tool said.
func TestInstallTellsSystemd(t *testing.T) {
	reload := []string{"systemctl daemon-reload", "udevadm control --reload"}
	stop := []string{"systemctl stop viaduct-watch.service", "systemctl stop viaduct-hotplug.path"}
	hotplug := "systemctl restart viaduct-hotplug.path"
	steps := []struct {
		line string
		want []string
		may  []string // fail
	}{
		{"install", append(slices.Clone(reload), hotplug), nil},
		{"install", []string{""}, nil},
		{"install --watch", append(slices.Clone(reload), hotplug, "systemctl restart viaduct-watch.service"), nil},
		{"install", slices.Concat(stop[:1], reload, []string{hotplug}), nil},
		{"install --watch", append(slices.Clone(reload), hotplug, "systemctl restart viaduct-watch.service"), nil},
		{"uninstall", append(slices.Clone(stop), reload...), stop[1:]},
		// What does not run cannot be stopped.
		{"uninstall", stop, stop},
	}
	host := func(t *testing.T, upTo int) *hosttest.Kernel {
		t.Helper()
		k := installHost(t, "systemctl", "udevadm")
		put(t, k, "run/systemd/system/x", "")
		for _, s := range steps[:upTo] {
			mustOnKernel(t, k, strings.Fields(s.line)...)
		}
		called(t, k)
		return k
	}
	for n, s := range steps {
		k := host(t, n)
		a := onKernel(k, strings.Fields(s.line)...)
		if got := called(t, k); a.status != exitDone || !slices.Equal(got, s.want) {
			t.Errorf("step %d, %s: called %q, want %q, %+v", n, s.line, got, s.want, a)
		}
		for _, broken := range s.want {
			if broken == "" {
				continue
			}
			k := host(t, n)
			put(t, k, "fails", broken+"\n")
			a := onKernel(k, strings.Fields(s.line)...)
			may, told := slices.Contains(s.may, broken), strings.Contains(a.text(),
				broken+": exit status 1: it is broken")
			if may != (a.status == exitDone) || !may && !told {
				t.Errorf("step %d, %s: %q fails: %+v", n, s.line, broken, a)
			}
		}
	}

	k := installHost(t, "systemctl")
	put(t, k, "run/systemd/system/x", "")
	if a := onKernel(k, "install"); a.status != exitFailed ||
		!strings.Contains(a.text(), "udevadm is not on this host") {
		t.Errorf("without udevadm: %+v", a)
	}
}

// What an install needs of others is told once: the initramfs is to be made anew, libvirt to be restarted, and a hook
// allowed by AppArmor.
func TestInstallNotes(t *testing.T) {
	k := installHost(t, "dracut")
	put(t, k, hostfile.File, strings.ReplaceAll(sweptFile, sweptNIC, sweptEDU+"\n    initramfs: true"))
	put(t, k, "sys/module/apparmor/parameters/enabled", "Y\n")
	put(t, k, "etc/apparmor.d/usr.sbin.libvirtd", "")
	counts := func(line string, notes ...string) {
		t.Helper()
		a := mustOnKernel(t, k, strings.Fields(line)...)
		for _, note := range []string{"rebuild the initramfs: dracut --force", "now restart libvirt,", "AppArmor"} {
			want := 0
			if slices.Contains(notes, note) {
				want = 1
			}
			if got := strings.Count(a.text(), note); got != want {
				t.Errorf("%s: %q is said %d times, not %d: %+v", line, note, got, want, a)
			}
		}
	}
	counts("install")
	counts("install --initramfs --libvirt", "rebuild the initramfs: dracut --force", "now restart libvirt,", "AppArmor")
	counts("install --libvirt", "rebuild the initramfs: dracut --force", "AppArmor")
	counts("install --initramfs", "rebuild the initramfs: dracut --force")
	counts("uninstall", "rebuild the initramfs: dracut --force")
}
