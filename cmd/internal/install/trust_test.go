package install

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"viaduct/vfio/holder"
)

// A program is trusted if nobody but root could put another in its place.
func TestTrusted(t *testing.T) {
	if err := Trusted("/bin/sh"); err != nil {
		t.Errorf("the system's own: %v", err)
	}
	dir := t.TempDir()
	program := filepath.Join(dir, "viaduct")
	if err := errors.Join(os.WriteFile(program, nil, 0o755), os.Chmod(program, 0o757)); err != nil {
		t.Fatal(err)
	}
	if err := Trusted(program); !errors.Is(err, holder.ErrRefused) ||
		!strings.Contains(err.Error(), "/usr/local/sbin") {
		t.Errorf("below a folder that all may write to, or another's: %v", err)
	}
	if err := Trusted(program + ".not"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what is not there: %v", err)
	}
}

// A path is one word of a unit, of a shell and of a hook, whatever is in it.
func TestQuotedProgram(t *testing.T) {
	for path, want := range map[string]string{
		"/usr/local/sbin/viaduct": "/usr/local/sbin/viaduct",
		"/opt/my tools/via$duct":  `"/opt/my tools/via$duct"`,
		"/opt/50%/v\"":            `"/opt/50%%/v\""`,
	} {
		if got := inUnit(path); got != want {
			t.Errorf("%s: %s, want %s", path, got, want)
		}
	}
	o := Options{Program: "/opt/my tools/viaduct", Watch: true, Late: true, Libvirt: true}
	files, err := o.Files(Dracut)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		switch {
		case f.Path == LibvirtHook && !strings.Contains(f.Content, `exec '/opt/my tools/viaduct' libvirt-hook -- "$@"`):
			t.Errorf("%s: %s", f.Path, f.Content)
		case strings.Contains(f.Content, "ExecStart=") && !strings.Contains(f.Content,
			`ExecStart="/opt/my tools/viaduct" `):
			t.Errorf("%s: %s", f.Path, f.Content)
		case strings.Contains(f.Content, "Type=oneshot") && !strings.Contains(f.Content, "TimeoutStartSec=30min\n"):
			t.Errorf("%s may take for ever:\n%s", f.Path, f.Content)
		}
	}
}
