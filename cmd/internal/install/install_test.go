package install

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// there are the files below a folder.
func filesIn(t *testing.T, root string) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			out = append(out, strings.TrimPrefix(name, root))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestWrite(t *testing.T) {
	root := t.TempDir()
	o := Options{
		Program:   "/usr/local/sbin/viaduct",
		Watch:     true,
		Late:      true,
		Initramfs: []string{"/sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0"},
	}
	files, err := o.Files(InitramfsTools)
	if err != nil {
		t.Fatal(err)
	}
	changed, err := Write(root, files)
	if err != nil || len(changed) != len(files) || len(filesIn(t, root)) != len(files) {
		t.Fatalf("%v, changed %q, there is %q", err, changed, filesIn(t, root))
	}
	if changed, err = Write(root, files); err != nil || len(changed) > 0 {
		t.Errorf("again: %v, %q", err, changed)
	}
	unit, err := os.ReadFile(filepath.Join(root, wanted, "viaduct.service")) // through the link
	if err == nil {
		t.Errorf("the link leads into %s", unit) // it is absolute: on the host it leads to the unit
	}
	unit, err = os.ReadFile(filepath.Join(root, units, "viaduct.service"))
	if err != nil || !strings.Contains(string(unit), "ExecStart=/usr/local/sbin/viaduct apply --boot\n") ||
		strings.Contains(string(unit), "%!") {
		t.Errorf("%v\n%s", err, unit)
	}

	less := Options{Program: o.Program} // what is no longer wanted goes
	if files, err = less.Files(NoGenerator); err != nil {
		t.Fatal(err)
	}
	if _, err := Write(root, files); err != nil || len(filesIn(t, root)) != len(files) {
		t.Errorf("%v, there is %q", err, filesIn(t, root))
	}

	theirs := filepath.Join(root, units, "viaduct-watch.service")
	if err := os.WriteFile(theirs, []byte("[Service]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if files, err = o.Files(Dracut); err != nil {
		t.Fatal(err)
	}
	if _, err := Write(root, files); err == nil || !strings.Contains(err.Error(), "viaduct install did not write it") {
		t.Errorf("somebody else's file: %v", err)
	}
	if _, err := Remove(root); err != nil {
		t.Fatal(err)
	}
	if left := filesIn(t, root); len(left) != 1 || !strings.HasSuffix(left[0], "viaduct-watch.service") {
		t.Errorf("left: %q", left)
	}
	if _, err := o.Files(NoGenerator); err == nil {
		t.Error("a hook for nothing")
	}
}

// The hook's script, run by a shell: which devices it means.
func TestEarlyScript(t *testing.T) {
	const (
		below = "/sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0"
		root  = "/sys/devices/pci0000:00/0000:00:1f.3"
		vmd   = "/sys/devices/pci0000:00/0000:00:0e.0/pci10000:e0/10000:e0:06.0/10000:e1:00.0"
		arm   = "/sys/devices/platform/40000000.pcie/pci0002:00/0002:00:00.0/0002:01:00.0"
	)
	for folder, want := range map[string]map[string]bool{
		below: {
			below: true, "/sys/devices/pci0000:00/0000:00:01.0/0000:7f:00.0": true,
			"/sys/devices/pci0000:00/0000:00:01.0/0000:01:00.1": false,
			"/sys/devices/pci0000:00/0000:00:02.0/0000:01:00.0": false,
		},
		root: {root: true, root + "/0000:01:00.0": false},
		vmd: {
			vmd: true, strings.ReplaceAll(strings.ReplaceAll(vmd, "10000:", "10001:"), ":e1:", ":e2:"): true,
			strings.Replace(vmd, "06.0", "07.0", 1): false, strings.Replace(vmd, "0e.0", "0f.0", 1): false,
		},
		arm: {arm: true, strings.Replace(arm, ":01:", ":03:", 1): true,
			strings.ReplaceAll(arm, "0002:", "0003:"): false},
	} {
		for device, yes := range want {
			script := "case " + device + " in\n" + pattern(folder) + ") echo yes ;;\n*) echo no ;;\nesac"
			out, err := exec.Command("/bin/sh", "-c", script).CombinedOutput()
			if got := strings.TrimSpace(string(out)); err != nil || (got == "yes") != yes {
				t.Errorf("%s, %s: %s, %v (%s)", folder, device, got, err, pattern(folder))
			}
		}
	}
}

// mkinitcpio's install hook, by the functions that mkinitcpio has for it, puts in what its kind of initramfs runs.
func TestMkinitcpio(t *testing.T) {
	root := t.TempDir()
	o := Options{Program: "/usr/bin/viaduct", Initramfs: []string{"/sys/devices/pci0000:00/0000:00:1f.3"}}
	files, err := o.Files(Mkinitcpio)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Write(root, files); err != nil {
		t.Fatal(err)
	}
	for hooks, want := range map[string]string{
		"base udev":    "add_module vfio_pci\nadd_runscript\n",
		"base systemd": "add_module vfio_pci\nadd_binary bash\nadd_file " + mkinitcpio + "/viaduct-early.sh",
	} {
		script := `for f in add_module add_runscript add_binary add_file add_symlink; do eval "$f() { echo $f \$*; }"; done
HOOKS=(` + hooks + `); . ` + root + mkinitcpio + `/install/viaduct; build`
		out, err := exec.Command("/bin/bash", "-c", script).CombinedOutput()
		if err != nil || !strings.HasPrefix(string(out), want) {
			t.Errorf("%s: %v\n%s", hooks, err, out)
		}
	}
	for _, script := range []string{"/hooks/viaduct", "/viaduct-early.sh"} {
		if out, err := exec.Command("/bin/sh", "-n", root+mkinitcpio+script).CombinedOutput(); err != nil {
			t.Errorf("%s: %v: %s", script, err, out)
		}
	}
}

// A hook that AppArmor would not let run is told of, with what lets it.
func TestConfined(t *testing.T) {
	root := t.TempDir()
	put := func(name, text string) {
		t.Helper()
		file := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755),
			os.WriteFile(file, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	const own = "/usr/local/sbin/viaduct"
	profile := func(program string) string { return Confined(root, program) }
	if why := profile(own); why != "" {
		t.Errorf("without AppArmor: %s", why)
	}
	put("sys/module/apparmor/parameters/enabled", "Y\n")
	if why := profile(own); why != "" {
		t.Errorf("without a profile: %s", why)
	}
	put("etc/apparmor.d/usr.sbin.libvirtd", "/usr/sbin/* PUx,\n")
	if why := profile(own); !strings.Contains(why, own+" PUx,") {
		t.Errorf("confined: %q", why)
	}
	if why := profile("/usr/sbin/viaduct"); why != "" {
		t.Errorf("in the system's folder: %s", why)
	}
	put("etc/apparmor.d/local/usr.sbin.libvirtd", own+" PUx,\n")
	if why := profile(own); why != "" {
		t.Errorf("let: %s", why)
	}
}
