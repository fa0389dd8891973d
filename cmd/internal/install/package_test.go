package install

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// An install on a host with a package's units enables those, and writes none; without them it writes its own.
func TestPackage(t *testing.T) {
	const program = "/usr/sbin/viaduct"
	root := t.TempDir()
	if got := PackageUnits(root, program); got != "" {
		t.Errorf("units without a package: %s", got)
	}
	own := Options{Program: program, Watch: true}
	files, err := own.Files(NoGenerator)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Write(root, files); err != nil {
		t.Fatal(err)
	}

	names, err := WritePackage(root, Packaged(program, DefaultUnits))
	if err != nil || len(names) != len(allUnits)+2 {
		t.Fatalf("%q, %v", names, err)
	}
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil || strings.Contains(string(text), marker) || strings.Contains(string(text), "%s") {
			t.Errorf("%s: %v\n%s", name, err, text)
		}
	}
	if got := PackageUnits(root, "/usr/local/sbin/viaduct"); got != "" {
		t.Errorf("units of another program: %s", got)
	}
	if own.Units = PackageUnits(root, program); own.Units != DefaultUnits {
		t.Fatalf("units: %q", own.Units)
	}
	if files, err = own.Files(NoGenerator); err != nil {
		t.Fatal(err)
	}
	if _, err := Write(root, files); err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		to, err := os.Readlink(filepath.Join(root, f.Path))
		if err != nil || !strings.HasPrefix(to, DefaultUnits+"/viaduct") {
			t.Errorf("%s leads to %q, %v", f.Path, to, err)
		}
	}

	if _, err := Remove(root); err != nil {
		t.Fatal(err)
	}
	if left := filesIn(t, root); len(left) != len(names) {
		t.Errorf("left: %q", left)
	}
}

// No service sees less of the host than it needs, nor may do more.
func TestHardened(t *testing.T) {
	for _, f := range Packaged("/usr/sbin/viaduct", DefaultUnits) {
		if !strings.HasSuffix(f.Path, ".service") {
			continue
		}
		if strings.Count(f.Content, "\nNoNewPrivileges=yes\n") != 1 {
			t.Errorf("%s is not hardened:\n%s", f.Path, f.Content)
		}
		for _, wrong := range []string{"ProtectKernelTunables", "ProtectProc", "PrivateDevices", "ProtectKernelModules",
			"ProcSubset"} {
			if strings.Contains(f.Content, wrong) {
				t.Errorf("%s: with %s it cannot do its work", f.Path, wrong)
			}
		}
	}
}
