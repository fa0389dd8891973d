package hosttest

import (
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

var sample = Tree{"a/b": "x\n", "a/c": "\x00\xff \"-> =\n", "a/l": "-> ../e/ f", "e/": "", "g": ""}

const packed = `a/b = "x\n"
a/c = "\x00\xff \"-> =\n"
a/l -> ../e/ f
e/
g = ""
`

func TestFormat(t *testing.T) {
	if got := string(Format(sample)); got != packed {
		t.Errorf("got\n%s\nwant\n%s", got, packed)
	}
	file := filepath.Join(t.TempDir(), "machine")
	if err := os.WriteFile(file, []byte("# a machine\n\n"+packed), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := Load(t, file); !reflect.DeepEqual(got, sample) {
		t.Errorf("loaded %q", got)
	}
}

// Binary content is packed by its rows that are not all zeros.
func TestHex(t *testing.T) {
	config := make([]byte, 256)
	copy(config, "\x86\x80\x18\x29")
	config[0xff] = 1
	tree := Tree{"config": string(config)}
	const want = "config hex 100 0:86801829 f0:00000000000000000000000000000001\n"
	if got := string(Format(tree)); got != want {
		t.Errorf("%s\nwant %s", got, want)
	}
	if got, err := Parse([]byte(want)); err != nil || !reflect.DeepEqual(got, tree) {
		t.Errorf("%q, %v", got, err)
	}
}

func TestParseErrors(t *testing.T) {
	for _, s := range []string{"a hex", "a hex 4 3:0000", "a hex 4 0:0", "a hex 4 x:00", "a hex g", "a hex 100000", "a",
		"a = x", `a = "x`, "a ->", "a >b", "/a = \"x\"", "../a = \"x\"", "a/../../b/", "a/\na/", "= \"\"", "a/ = "} {
		if got, err := Parse([]byte(s)); err == nil || !strings.Contains(err.Error(), "line ") {
			t.Errorf("%q: %q, %v", s, got, err)
		}
	}
}

func TestTreeUnpacked(t *testing.T) {
	if got := readTree(t, sample.Dir(t)); !reflect.DeepEqual(got, sample) {
		t.Errorf("folder %q\nwant %q", got, sample)
	}
	if got := FromSnapshot(t, sample.Snapshot(t)); !reflect.DeepEqual(got, sample) {
		t.Errorf("snapshot %q\nwant %q", got, sample)
	}
}

func TestTreeWith(t *testing.T) {
	got := sample.With(Tree{"a": Gone, "a/n": "within", "e/": Gone, "h": "new"})
	if want := (Tree{"a/n": "within", "g": "", "h": "new"}); !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// readTree packs a folder.
func readTree(t *testing.T, dir string) Tree {
	t.Helper()
	out := Tree{}
	err := filepath.WalkDir(dir, func(file string, e fs.DirEntry, err error) error {
		if err != nil || file == dir {
			return err
		}
		name, err := filepath.Rel(dir, file)
		if err != nil {
			return err
		}
		switch {
		case e.Type() == fs.ModeSymlink:
			target, err := os.Readlink(file)
			out[name] = arrow + target
			return err
		case e.IsDir():
			names, err := os.ReadDir(file)
			if len(names) == 0 {
				out[name+"/"] = ""
			}
			return err
		}
		b, err := os.ReadFile(file)
		out[name] = string(b)
		return err
	})

	if err != nil {
		t.Fatal(err)
	}

	return out
}
