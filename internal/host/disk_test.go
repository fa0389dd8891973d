package host

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"golang.org/x/sys/unix"
)

// openLive opens a folder the way the running host is opened, so that it can be written to.
func openLive(t *testing.T) *Host {
	t.Helper()
	dir := t.TempDir()
	tree, err := openDisk(dir, false)
	if err != nil {
		t.Fatal(err)
	}
	h := &Host{Dir: Dir{tree: tree, path: dir}, system: machine{}}
	t.Cleanup(func() { h.Close() })
	return h
}

func TestWrite(t *testing.T) {
	h := openLive(t)
	for _, n := range []string{"dir", "readonly"} {
		if err := os.Mkdir(h.Path(n), 0o755); err != nil {
			t.Fatal(err)
		}
	}

	if err := os.WriteFile(h.Path("dir/file"), []byte("old content\n"), 0o644); err != nil {
		t.Fatal(err)
	}

	dir, err := h.Open("dir")
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	for _, c := range []struct {
		dir         *Dir
		name, value string
		want        unix.Errno
		content     string // of dir/file afterwards
	}{
		{&h.Dir, "dir/file", "new", 0,
			"new content\n"}, // one write at the start: nothing is truncated, as nothing in sysfs needs it
		{dir, "file", "0", 0, "0ew content\n"},
		{dir, "file", "", 0, "0ew content\n"},
		{&h.Dir, "dir/missing", "1", unix.ENOENT, "0ew content\n"},
		{dir, "missing", "1", unix.ENOENT, "0ew content\n"},
		{&h.Dir, "missing/file", "1", unix.ENOENT, "0ew content\n"},
		{&h.Dir, "dir/file/x", "1", unix.ENOTDIR, "0ew content\n"},
		{&h.Dir, "dir", "1", unix.EISDIR, "0ew content\n"},
	} {
		err := c.dir.Write(c.name, c.value)
		if c.want == 0 && err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		if c.want != 0 {
			want := &fs.PathError{Op: "write", Path: c.dir.Path(c.name), Err: c.want}
			if got, ok := errors.AsType[*fs.PathError](err); !ok || !reflect.DeepEqual(got, want) {
				t.Errorf("%s: %v, want %v", c.name, err, want)
			}
		}
		if s, err := h.Read("dir/file"); string(s) != c.content || err != nil {
			t.Errorf("after %s: %q, %v", c.name, s, err)
		}
	}

	if names, err := h.Names("dir"); err != nil || !reflect.DeepEqual(names, []string{"file"}) {
		t.Errorf("names %v, %v: a write made a file", names, err)
	}
}

// TestUnconfined: the running host's own links lead where they say.
func TestUnconfined(t *testing.T) {
	h := openLive(t)
	file := filepath.Join(t.TempDir(), "file")
	if err := errors.Join(os.WriteFile(file, []byte("x"), 0o644), os.Symlink(file, h.Path("link"))); err != nil {
		t.Fatal(err)
	}
	if s, err := h.String("link"); s != "x" || err != nil {
		t.Errorf("%q, %v", s, err)
	}
}

func TestReadIsBounded(t *testing.T) {
	h := openLive(t)
	if err := errors.Join(os.WriteFile(h.Path("huge"), nil, 0o644), os.Truncate(h.Path("huge"), 1<<40)); err != nil {
		t.Fatal(err)
	}
	if b, err := h.Read("huge"); !errors.Is(err, unix.EFBIG) {
		t.Errorf("%d bytes, %v", len(b), err)
	}
	if s, err := h.String("huge"); len(s) > 1<<16 || err != nil {
		t.Errorf("%d bytes, %v", len(s), err)
	}
}
