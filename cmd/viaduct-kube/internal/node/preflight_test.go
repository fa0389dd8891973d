package node

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"viaduct/internal/host/hosttest"
	"viaduct/iommu"
)

// A folder has to be there, and the host's: what process 1 sees.
func TestNeeds(t *testing.T) {
	if _, err := os.Stat("/proc/1/root/"); err != nil {
		t.Skip("what process 1 sees cannot be seen: ", err)
	}
	dir := t.TempDir()
	if _, err := os.Stat("/proc/1/root" + dir); err != nil {
		t.Skip("process 1 does not see the folder of this test: ", err)
	}
	is := Need{Path: dir, Writes: true}
	if err := is.check(); err != nil {
		t.Errorf("that is the host's: %v", err)
	}
	gone := Need{Path: filepath.Join(dir, "none")}
	if err := gone.check(); err == nil || !strings.Contains(err.Error(), "mount the host's") {
		t.Errorf("that is not there: %v", err)
	}
	// That of this process alone.
	other := Need{Path: "/proc/self/fd"}
	if err := other.check(); err == nil {
		t.Error("that is not the host's")
	}
}

// A link of the host's leads to a place of the host's: /var/run is one to /run, which a container has too.
func TestAtHost(t *testing.T) {
	root := t.TempDir()
	want := filepath.Join(root, "run/cdi")
	if err := errors.Join(os.MkdirAll(want, 0o755), os.MkdirAll(filepath.Join(root, "var"), 0o755),
		os.Symlink("/run", filepath.Join(root, "var/run"))); err != nil {
		t.Fatal(err)
	}
	var is unix.Stat_t
	if err := unix.Stat(want, &is); err != nil {
		t.Fatal(err)
	}
	if got, err := atHost(root, "/var/run/cdi"); err != nil || got.Ino != is.Ino || got.Dev != is.Dev {
		t.Errorf("%+v, %v, want %+v", got, err, is)
	}
}

// All that is missing is said at once, with what it is for; a captured host cannot be served.
func TestPreflight(t *testing.T) {
	captured, err := iommu.Open(hosttest.Lab(t).Snapshot(t))
	if err != nil {
		t.Fatal(err)
	}
	defer captured.Close()
	err = Preflight(captured, []Need{{Path: "/nowhere/at/all", For: "nothing"}, {Path: "/nor/here", For: "less"}})
	for _, want := range []string{"/nowhere/at/all, for nothing", "/nor/here, for less", "captured host"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
}
