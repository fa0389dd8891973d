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

// TestFaultSweep: whichever file cannot be written, that is an error, and a preview says the same; nothing is changed, and
// the next run writes all. What is somebody else's is not removed.
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
		_, _, preview := Changes(root, files)
		changed, err := Write(root, files)
		if there := filesIn(t, root); err == nil || preview == nil || preview.Error() != err.Error() ||
			len(changed) > 0 ||
			!slices.Equal(there, []string{f.Path + "/x"}) {
			t.Errorf("%s cannot be written: %v, the preview says %v; told %q, is %q", f.Path, err, preview,
				changed, there)
		}
		free()
		more, err := Write(root, files)
		if err != nil || len(more) != len(files) || len(filesIn(t, root)) != len(files) {
			t.Errorf("%s can be written again: %v, %d of %d", f.Path, err, len(more), len(files))
		}

		free = blocked(t, root, f)
		removed, err := Remove(root)
		if left := filesIn(t, root); err != nil || len(removed) != len(files)-1 ||
			!slices.Equal(left, []string{f.Path + "/x"}) {
			t.Errorf("%s is somebody else's: %v, told %q, left %q", f.Path, err, removed, left)
		}
		free()
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
	if err := errors.Join(err, statErr); err != nil || !slices.Equal(changed, []string{LibvirtHook}) ||
		st.Mode() != 0o755 {
		t.Errorf("%v, told %q, mode %v", err, changed, st.Mode())
	}
}
