package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"viaduct/internal/host/hosttest"
)

// Programs of another module can do what viaduct does: hack/importer has three, which are run here on a captured host.
// README shows how such a module names this one.
func TestImporter(t *testing.T) {
	const importer = "../../hack/importer"
	bin := t.TempDir()
	build := exec.Command("go", "build", "-o", bin, "./...")
	build.Dir = importer
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	host := hosttest.Lab(t).Snapshot(t)
	for _, c := range []struct{ command, says string }{
		{"groups", "group 7 (DMA)\n  0000:00:08.0 1b36:000e on \"\"\n  0000:07:01.0 8086:100e on \"e1000\""},
		{"take 0000:07:01.0", "0000:07:02.0 [/sbin/modprobe vfio_pci echo vfio-pci > /sys/bus/pci/devices/0000:07:02.0/driver_override"},
		{"vfs 0000:01:00.0", "echo 2 > /sys/bus/pci/devices/0000:01:00.0/sriov_numvfs\n"},
	} {
		words := append(strings.Fields(c.command), host)
		out, err := exec.Command(filepath.Join(bin, words[0]), words[1:]...).CombinedOutput()
		if err != nil || !strings.Contains(string(out), c.says) {
			t.Errorf("%s: %v\n%s\nwant %q", c.command, err, out, c.says)
		}
	}

	readme, err := os.ReadFile("../../README.md")
	if err != nil || !strings.Contains(string(readme), "require viaduct v0.0.0\n\n    replace viaduct => ") {
		t.Errorf("README does not show how to import the packages: %v", err)
	}
	sources, err := filepath.Glob(importer + "/*/main.go")
	if err != nil || len(sources) != 3 {
		t.Errorf("programs %v, %v", sources, err)
	}
	for _, file := range sources {
		b, err := os.ReadFile(file)
		if lines := bytes.Count(b, []byte("\n")); err != nil || lines > 60 {
			t.Errorf("%s has %d lines, %v", file, lines, err)
		}
	}
}
