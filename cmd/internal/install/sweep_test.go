package install

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// blocked has a file be in the way of one of an install: a folder that is not empty.
func blocked(t *testing.T, root string, f *File) (free func()) {
	t.Helper()
	name := filepath.Join(root, f.Path)
	err := errors.Join(os.RemoveAll(name), os.MkdirAll(name, 0o755), os.WriteFile(filepath.Join(name, "x"), nil, 0o600))
	if err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := os.RemoveAll(name); err != nil {
			t.Fatal(err)
		}
	}
}

// TestFaultSweep: whichever file cannot be written or removed, that is an error, what is told as changed is what has
// changed, and the next run does the rest.
func TestFaultSweep(t *testing.T) {
	o := Options{Program: "/usr/sbin/viaduct", Watch: true, Late: true, Libvirt: true, Initramfs: []string{}}
	files, err := o.Files(Dracut)
	if err != nil {
		t.Fatal(err)
	}
	for n := range files {
		f := &files[n]
		root := t.TempDir()
		free := blocked(t, root, f)
		changed, err := Write(root, files)
		there := filesIn(t, root)
		if there = slices.DeleteFunc(there, func(name string) bool { return name == f.Path+"/x" }); err == nil ||
			!slices.Equal(slices.Sorted(slices.Values(changed)), there) {
			t.Errorf("%s cannot be written: %v, told %q, is %q", f.Path, err, changed, there)
		}
		free()
		more, err := Write(root, files)
		if err != nil || len(changed)+len(more) != len(files) || len(filesIn(t, root)) != len(files) {
			t.Errorf("%s can be written again: %v, %d and %d of %d", f.Path, err, len(changed), len(more), len(files))
		}

		free = blocked(t, root, f)
		removed, err := Remove(root)
		left := filesIn(t, root)
		if err == nil || len(removed)+len(left) != len(files) {
			t.Errorf("%s cannot be removed: %v, told %q, left %q", f.Path, err, removed, left)
		}
		free()
		if _, err := Remove(root); err != nil || len(filesIn(t, root)) > 0 {
			t.Errorf("%s can be removed again: %v, left %q", f.Path, err, filesIn(t, root))
		}
	}
}

// A file that has what it is to have, and may not be run as it is to be, is mended, and told.
func TestModeAgain(t *testing.T) {
	root := t.TempDir()
	files, err := (&Options{Program: "/usr/sbin/viaduct", Libvirt: true}).Files(NoGenerator)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Write(root, files); err != nil {
		t.Fatal(err)
	}
	hook := filepath.Join(root, LibvirtHook)
	if err := os.Chmod(hook, 0o644); err != nil {
		t.Fatal(err)
	}
	changed, err := Write(root, files)
	st, statErr := os.Stat(hook)
	if err := errors.Join(err, statErr); err != nil || !slices.Equal(changed, []string{LibvirtHook}) || st.Mode() != 0o755 {
		t.Errorf("%v, told %q, mode %v", err, changed, st.Mode())
	}
}
