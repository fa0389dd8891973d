package qmptest

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// Kernel is the lab's own kernel, and a small root file system for it in a file: busybox, an init, and modules, which
// /modules/order names in the order to load. The test is skipped where the lab is not built.
func Kernel(tb testing.TB, init string, modules ...string) (kernel, initrd string) {
	tb.Helper()
	Command(tb)
	cache := Cache(tb)
	kernel = filepath.Join(cache, "kernel", "vmlinuz")
	busybox, err := os.ReadFile(filepath.Join(cache, "root", "usr", "bin", "busybox"))
	if err != nil {
		tb.Skipf("the lab has no busybox: %v", err)
	}

	var a archive
	for _, dir := range []string{"bin", "dev", "modules", "proc", "sys"} {
		a.add(dir, 0o40755, nil)
	}

	a.add("bin/busybox", 0o100755, busybox)
	a.add("init", 0o100755, []byte(init))
	var order bytes.Buffer
	for _, m := range modules {
		found, err := filepath.Glob(filepath.Join(cache, "kernel", "lib", "modules", "*", "kernel", m+".ko"))
		if err != nil || len(found) != 1 {
			tb.Skipf("the lab's kernel has no module %s: %v", m, err)
		}
		text, err := os.ReadFile(found[0])
		if err != nil {
			tb.Fatal(err)
		}
		name := filepath.Base(found[0])
		a.add("modules/"+name, 0o100644, text)
		fmt.Fprintln(&order, name)
	}

	a.add("modules/order", 0o100644, order.Bytes())
	a.add("TRAILER!!!", 0, nil)
	initrd = filepath.Join(tb.TempDir(), "initrd")
	if err := os.WriteFile(initrd, a.Bytes(), 0o600); err != nil {
		tb.Fatal(err)
	}

	return kernel, initrd
}

// archive is a cpio archive of the new format (Documentation/driver-api/early-userspace/buffer-format.rst).
type archive struct {
	bytes.Buffer
	files int
}

func (a *archive) add(name string, mode int, content []byte) {
	a.files++
	fmt.Fprintf(a, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x", a.files, mode, 0, 0, 1, 0,
		len(content), 0, 0, 0, 0, len(name)+1, 0)
	a.WriteString(name + "\x00")
	a.pad()
	a.Write(content)
	a.pad()
}

func (a *archive) pad() {
	for a.Len()%4 != 0 {
		a.WriteByte(0)
	}
}
