// Package hosttest gives tests hosts made of text: file trees, packed into one file a machine, and a fake of the
// kernel's driver core that acts on one.
package hosttest

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"viaduct/internal/host"
)

// Tree is a host's file trees: by name relative to the root a file's content, or "-> target" of a symbolic link. A name
// that ends in "/" is an empty directory.
type Tree map[string]string

const arrow = "-> "

// With is a copy of the tree with the changes of another; an entry whose content is Gone is left out, with all below
// it.
func (t Tree) With(changes Tree) Tree {
	out := maps.Clone(t)
	for name, content := range changes {
		if content == Gone {
			maps.DeleteFunc(out,
				func(n, _ string) bool { return n == name || strings.HasPrefix(n, strings.TrimSuffix(name, "/")+"/") })
		}
	}
	for name, content := range changes {
		// After all that goes: a directory can come in a file's place.
		if content != Gone {
			out[name] = content
		}
	}
	return out
}

// Gone stands for an entry that [Tree.With] leaves out.
const Gone = "\x00gone"

// Load reads a packed tree: a text file with one entry a line, as [Format] writes it. Empty lines and lines that begin
// with "#" are skipped.
func Load(tb testing.TB, file string) Tree {
	tb.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		tb.Fatal(err)
	}
	t, err := Parse(b)
	if err != nil {
		tb.Fatalf("%s: %v", file, err)
	}
	return t
}

// Parse decodes a packed tree: see [Load].
func Parse(b []byte) (Tree, error) {
	t := Tree{}
	number := 0
	for line := range strings.Lines(string(b)) {
		number++
		line = strings.TrimSuffix(line, "\n")
		if line == "" || line[0] == '#' {
			continue
		}
		name, rest, _ := strings.Cut(line, " ")
		content, isFile := strings.CutPrefix(rest, "= ")
		var err error
		switch {
		case isFile:
			content, err = strconv.Unquote(content)
		case strings.HasPrefix(rest, hexMark):
			content, err = parseHex(rest)
		case strings.HasPrefix(rest, arrow):
			content = rest
		case rest != "" || !strings.HasSuffix(name, "/"):
			err = errors.New("neither file, link nor directory")
		}

		if err == nil && !filepath.IsLocal(name) {
			err = errors.New("not a relative name")
		}
		if _, twice := t[name]; twice && err == nil {
			err = errors.New("there twice")
		}
		if err != nil {
			return nil, fmt.Errorf("line %d: %w: %s", number, err, line)
		}
		t[name] = content
	}
	return t, nil
}

// Format packs a tree, one line an entry, sorted: NAME = "quoted content", NAME hex SIZE OFFSET:BYTES... for what is no
// text, NAME -> TARGET, or NAME/.
func Format(t Tree) []byte {
	var b bytes.Buffer
	for _, name := range slices.Sorted(maps.Keys(t)) {
		switch content := t[name]; {
		case strings.HasSuffix(name, "/"):
			fmt.Fprintln(&b, name)
		case strings.HasPrefix(content, arrow):
			fmt.Fprintln(&b, name, content)
		case len(content) >= standardConfig && strings.Contains(content, "\x00"):
			fmt.Fprintln(&b, name, formatHex(content))
		default:
			fmt.Fprintln(&b, name, "=", strconv.Quote(content))
		}
	}
	return b.Bytes()
}

// FromSnapshot is the tree in a snapshot file, for packing a captured machine.
func FromSnapshot(tb testing.TB, file string) Tree {
	tb.Helper()
	f, err := os.Open(file)
	if err != nil {
		tb.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		tb.Fatalf("%s: %v", file, err)
	}

	t, archive := Tree{}, tar.NewReader(z)
	for entry := 0; ; entry++ {
		h, err := archive.Next()
		if err == io.EOF {
			return t
		}
		if err != nil {
			tb.Fatalf("%s: %v", file, err)
		}
		switch {
		case entry == 0:
			// The manifest.
		case h.Typeflag == tar.TypeSymlink:
			t[h.Name] = arrow + h.Linkname
		default:
			b, err := io.ReadAll(archive)
			if err != nil {
				tb.Fatalf("%s: %v", file, err)
			}
			t[h.Name] = string(b)
		}
	}
}

// Dir unpacks the tree into a folder that lasts as long as the test, and returns its name.
func (t Tree) Dir(tb testing.TB) string {
	tb.Helper()
	dir := tb.TempDir()
	if err := t.unpackAll(dir); err != nil {
		tb.Fatal(err)
	}
	return dir
}

func (t Tree) unpackAll(dir string) error {
	for _, name := range slices.Sorted(maps.Keys(t)) {
		if err := t.unpack(filepath.Join(dir, name), name); err != nil {
			return err
		}
	}
	return nil
}

func (t Tree) unpack(file, name string) error {
	if strings.HasSuffix(name, "/") {
		return os.MkdirAll(file, 0o755)
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	if target, ok := strings.CutPrefix(t[name], arrow); ok {
		return os.Symlink(target, file)
	}
	return os.WriteFile(file, []byte(t[name]), 0o644)
}

// Snapshot writes the tree as a snapshot file that lasts as long as the test, and returns its name.
func (t Tree) Snapshot(tb testing.TB) string {
	tb.Helper()
	name := filepath.Join(tb.TempDir(), "host.vsnap")
	f, err := os.Create(name)
	if err == nil {
		err = errors.Join(t.write(f), f.Close())
	}
	if err != nil {
		tb.Fatal(err)
	}
	return name
}

func (t Tree) write(w io.Writer) error {
	s, err := host.NewSnapshot(w)
	if err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(t)) {
		target, isLink := strings.CutPrefix(t[name], arrow)
		switch {
		case strings.HasSuffix(name, "/"):
			err = s.Dir(strings.TrimSuffix(name, "/"))
		case isLink:
			err = s.Link(name, target)
		default:
			err = s.File(name, []byte(t[name]))
		}
		if err != nil {
			return err
		}
	}
	return s.Close()
}

// Hosts opens the tree both ways, as a folder and as a snapshot: all code must give the same answers for the two.
func (t Tree) Hosts(tb testing.TB) map[string]*host.Host {
	tb.Helper()
	return map[string]*host.Host{"folder": open(tb, t.Dir(tb)), "snapshot": open(tb, t.Snapshot(tb))}
}

// Host opens the tree as a folder.
func (t Tree) Host(tb testing.TB) *host.Host {
	tb.Helper()
	return open(tb, t.Dir(tb))
}

func open(tb testing.TB, name string) *host.Host {
	tb.Helper()
	h, err := host.Open(name)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := h.Close(); err != nil {
			tb.Error(err)
		}
	})
	return h
}
