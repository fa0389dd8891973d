package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// What is read in config space of a lab host's devices agrees with what lspci 3.13 printed of it.
func TestLab(t *testing.T) {
	said := func(string) ([]byte, error) { return os.ReadFile("testdata/lab.lspci") }
	n, err := check(said, "testdata/lab.dump")
	if err != nil {
		t.Fatal(err)
	}
	if n["device"] != 8 || n["ACS"] == 0 || n["ARI"] == 0 || n["IOV"] == 0 || n["flr"] == 0 {
		t.Error(n)
	}

	other := func(string) ([]byte, error) {
		b, err := os.ReadFile("testdata/lab.lspci")
		return []byte(strings.Replace(string(b), "ReqRedir+", "ReqRedir-", 1)), err
	}
	if n, err := check(other, "testdata/lab.dump"); err == nil {
		t.Errorf("a difference is not seen: %v", n)
	}
}

// The same of the config spaces of real machines that pciutils has among its tests.
func TestPciutils(t *testing.T) {
	dir := os.Getenv("VIADUCT_PCIUTILS")
	lspci, err := exec.LookPath("lspci")
	if dir == "" || err != nil {
		t.Skip("VIADUCT_PCIUTILS does not name the folder tests of pciutils' source, or there is no lspci (hack/test lspci has both)")
	}
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(files) == 0 {
		t.Fatalf("%s: %v", dir, err)
	}
	total := count{}
	for _, f := range files {
		n, err := check(func(dump string) ([]byte, error) { return exec.Command(lspci, "-vvv", "-F", dump).Output() },
			f)
		if err != nil {
			t.Errorf("%s: %v", f, err)
		}
		total.add(n)
	}
	t.Log(total)
}
