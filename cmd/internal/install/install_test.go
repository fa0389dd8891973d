package install

import (
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
		Initramfs: []string{"0000:00:01.0/00.0/1f.3"},
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
	if _, err := Write(root, files); err == nil || !strings.Contains(err.Error(), "is not by viaduct install") {
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
	for place, want := range map[string]map[string]bool{
		"0000:00:01.0/00.0": {
			"/sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0": true, "/sys/devices/pci0000:00/0000:00:01.0/0000:7f:00.0": true,
			"/sys/devices/pci0000:00/0000:00:01.0/0000:01:00.1": false, "/sys/devices/pci0000:00/0000:00:02.0/0000:01:00.0": false,
		},
		"0000:00:1f.3": {"/sys/devices/pci0000:00/0000:00:1f.3": true, "/sys/devices/pci0000:00/0000:00:1f.3/0000:01:00.0": false},
	} {
		for device, yes := range want {
			out, err := exec.Command("/bin/sh", "-c", "case "+device+" in\n"+pattern(place)+") echo yes ;;\n*) echo no ;;\nesac").
				CombinedOutput()
			if got := strings.TrimSpace(string(out)); err != nil ||
				got != map[bool]string{true: "yes", false: "no"}[yes] {
				t.Errorf("%s, %s: %s, %v", place, device, got, err)
			}
		}
	}
}
