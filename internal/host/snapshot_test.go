package host

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"time"
)

// entry is one entry of a tar archive; head changes its header before it is written.
type entry struct {
	name, content, link string
	kind                byte // file if 0
}

var goodManifest = entry{name: manifestName, content: `{"format":1}`}

func archive(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	w := tar.NewWriter(z)
	for _, e := range entries {
		h := &tar.Header{Name: e.name, Linkname: e.link, Typeflag: e.kind, Mode: 0o644}
		if e.kind == 0 {
			h.Typeflag, h.Size = tar.TypeReg, int64(len(e.content))
		}
		err := w.WriteHeader(h)
		if err == nil && h.Size > 0 {
			_, err = io.WriteString(w, e.content)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(w.Close(), z.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func sampleSnapshot(t testing.TB) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := NewSnapshot(&b)
	if err != nil {
		t.Fatal(err)
	}
	err = errors.Join(w.File("sys/devices/a/id", []byte("0x8086\n")), w.File("sys/devices/a/id", []byte("added twice")),
		w.Link("sys/bus/a", "../devices/a"), w.Link("sys/bus/a", "../devices/b"),
		w.Dir("sys/class"), w.Dir("sys/class"), w.Dir("sys/devices"), w.File("sys/class/empty", nil))
	for i := range 100 { // bytes that do not compress
		err = errors.Join(err, w.File(fmt.Sprintf("sys/devices/%d/id", i), fmt.Appendf(nil, "%x\n", i*i*7919)))
	}
	if err = errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// flat is a tree as a map, for comparison.
func flat(n *node, at string, into map[string]string) map[string]string {
	switch {
	case n.children == nil && n.link == "":
		into[at] = "=" + string(n.data)
	case n.link != "":
		into[at] = ">" + n.link
	case len(n.children) == 0:
		into[at+"/"] = ""
	}
	for name, c := range n.children {
		if c.parent != n {
			into[at+"/"+name] = "wrong parent"
			continue
		}
		flat(c, at+"/"+name, into)
	}
	return into
}

func TestSnapshotRoundTrip(t *testing.T) {
	root, err := decodeSnapshot("s", bytes.NewReader(sampleSnapshot(t)))
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"/sys/devices/a/id": "=0x8086\n", "/sys/bus/a": ">../devices/a", "/sys/class/empty": "="}
	for i := range 100 {
		want[fmt.Sprintf("/sys/devices/%d/id", i)] = fmt.Sprintf("=%x\n", i*i*7919)
	}
	if got := flat(root, "", map[string]string{}); !reflect.DeepEqual(got, want) {
		t.Errorf("got %q\nwant %q", got, want)
	}
}

func TestSnapshotFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "snapshot")
	if err := os.WriteFile(file, sampleSnapshot(t), 0o644); err != nil {
		t.Fatal(err)
	}
	h, err := Open(file)
	if err != nil {
		t.Fatal(err)
	}
	if s, err := h.String("sys/bus/a/id"); s != "0x8086" || err != nil {
		t.Errorf("%q, %v", s, err)
	}
	if h.Live() || h.Close() != nil {
		t.Error("a snapshot is live or cannot be closed")
	}
	if err := os.WriteFile(file, []byte("#!/bin/sh\necho I am no snapshot\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(file); !errors.Is(err, ErrSnapshot) || !strings.Contains(err.Error(), file) {
		t.Errorf("%v", err)
	}
}

func refused(t *testing.T, what string, b []byte) {
	t.Helper()
	if root, err := decodeSnapshot("s", bytes.NewReader(b)); !errors.Is(err, ErrSnapshot) || root != nil {
		t.Errorf("%s: %v, %v; want an ErrSnapshot", what, root, err)
	}
}

func TestSnapshotTruncated(t *testing.T) {
	b := sampleSnapshot(t)
	for n := 0; n < len(b); n += 97 {
		refused(t, fmt.Sprint("first bytes: ", n), b[:n])
	}
	for n := range 30 {
		refused(t, fmt.Sprint("without the last bytes: ", n+1), b[:len(b)-n-1])
	}
	// A writer that was not closed.
	var unfinished bytes.Buffer
	w, err := NewSnapshot(&unfinished)
	if err == nil {
		err = errors.Join(w.File("sys/x", []byte("y")), w.t.Flush(), w.z.Flush())
	}
	if err != nil {
		t.Fatal(err)
	}
	refused(t, "not closed", unfinished.Bytes())
}

// TestSnapshotFlipped: a changed byte is noticed, unless the content is still the same: parts of gzip's header say
// nothing of it, and a repetition can be found in two places.
func TestSnapshotFlipped(t *testing.T) {
	b := sampleSnapshot(t)
	want, err := decodeSnapshot("s", bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	for i := range b {
		if i > 40 && i < len(b)-40 && i%61 != 0 {
			continue
		}
		for _, bit := range []byte{1, 0x10, 0x80} {
			flipped := bytes.Clone(b)
			flipped[i] ^= bit
			root, err := decodeSnapshot("s", bytes.NewReader(flipped))
			switch {
			case err == nil && reflect.DeepEqual(flat(root, "", map[string]string{}),
				flat(want, "", map[string]string{})):
			case !errors.Is(err, ErrSnapshot):
				t.Errorf("bit %#x of byte %d: %v", bit, i, err)
			}
		}
	}
}

func TestSnapshotRefused(t *testing.T) {
	long := strings.Repeat("a", maxName+1)
	good := entry{name: "sys/x", content: "1"}
	for what, entries := range map[string][]entry{
		"no entry":                 {},
		"no manifest":              {good},
		"manifest later":           {good, goodManifest},
		"manifest as a directory":  {{name: manifestName, kind: tar.TypeDir}, good},
		"manifest as a link":       {{name: manifestName, kind: tar.TypeSymlink, link: "sys/x"}, good},
		"manifest in a directory":  {{name: "./" + manifestName, content: goodManifest.content}, good},
		"manifest of another kind": {{name: manifestName, content: `[1]`}, good},
		"manifest with text":       {{name: manifestName, content: `{"format":"1"}`}, good},
		"format 2":                 {{name: manifestName, content: `{"format":2}`}, good},
		"format 0":                 {{name: manifestName, content: `{}`}, good},
		"climbing name":            {goodManifest, {name: "../x", content: "1"}},
		"absolute name":            {goodManifest, {name: "/x", content: "1"}},
		"name that climbs later":   {goodManifest, {name: "a/../../x", content: "1"}},
		"name with dots":           {goodManifest, {name: "a/../x", content: "1"}},
		"name with a dot":          {goodManifest, {name: "./x", content: "1"}},
		"double slash":             {goodManifest, {name: "a//x", content: "1"}},
		"climbing directory":       {goodManifest, {name: "../d/", kind: tar.TypeDir}},
		"root":                     {goodManifest, {name: "/", kind: tar.TypeDir}},
		"climbing link":            {goodManifest, {name: "a/l", kind: tar.TypeSymlink, link: "../../x"}},
		"link that climbs later":   {goodManifest, {name: "a/l", kind: tar.TypeSymlink, link: "b/../../../x"}},
		"link to the outside":      {goodManifest, {name: "l", kind: tar.TypeSymlink, link: ".."}},
		"absolute link":            {goodManifest, {name: "a/l", kind: tar.TypeSymlink, link: "/etc"}},
		"empty link":               {goodManifest, {name: "a/l", kind: tar.TypeSymlink}},
		"file twice":               {goodManifest, good, good},
		"file and directory":       {goodManifest, good, {name: "sys/x/", kind: tar.TypeDir}},
		"directory and file":       {goodManifest, {name: "sys/x/y", content: "1"}, good},
		"directory and link": {goodManifest, {name: "sys/x/", kind: tar.TypeDir},
			{name: "sys/x", kind: tar.TypeSymlink, link: "y"}},
		"link twice": {goodManifest, {name: "l", kind: tar.TypeSymlink, link: "a"},
			{name: "l", kind: tar.TypeSymlink, link: "b"}},
		"below a file":     {goodManifest, good, {name: "sys/x/y", content: "1"}},
		"below a link":     {goodManifest, {name: "sys", kind: tar.TypeSymlink, link: "x"}, good},
		"hard link":        {goodManifest, good, {name: "h", kind: tar.TypeLink, link: "sys/x"}},
		"character device": {goodManifest, {name: "dev/zero", kind: tar.TypeChar}},
		"block device":     {goodManifest, {name: "dev/sda", kind: tar.TypeBlock}},
		"pipe":             {goodManifest, {name: "pipe", kind: tar.TypeFifo}},
		"too deep":         {goodManifest, {name: strings.Repeat("d/", maxNameElements) + "x", content: "1"}},
		"long name":        {goodManifest, {name: long, content: "1"}},
		"long link":        {goodManifest, {name: "l", kind: tar.TypeSymlink, link: long}},
		"large file":       {goodManifest, {name: "large", content: strings.Repeat("\x00", maxEntry+1)}},
	} {
		refused(t, what, archive(t, entries...))
	}

	whole := archive(t, goodManifest, good)
	refused(t, "no gzip", []byte("no gzip at all, but long enough"))
	refused(t, "something behind it", append(bytes.Clone(whole), "more"...))
	if _, err := decodeSnapshot("s", bytes.NewReader(whole)); err != nil {
		t.Errorf("the one without fault: %v", err)
	}
	if _, err := decodeSnapshot("s", bytes.NewReader(archive(t, goodManifest,
		entry{name: strings.Repeat("d/", maxNameElements-1) + "x"}))); err != nil {
		t.Errorf("the deepest: %v", err)
	}
}

// stream is a gzip archive of what write writes, made as it is read.
func stream(t *testing.T, write func(w io.Writer) error) io.Reader {
	r, w := io.Pipe()
	t.Cleanup(func() { r.Close() })
	go func() {
		z, err := gzip.NewWriterLevel(w, gzip.NoCompression)
		if err == nil {
			err = errors.Join(write(z), z.Close())
		}
		w.CloseWithError(err)
	}()
	return r
}

// TestSnapshotBombs: what is huge when unpacked ends fast, in little memory.
func TestSnapshotBombs(t *testing.T) {
	const gigabyte = 1 << 30
	// block is what a tar archive has for one entry.
	block := func(h *tar.Header) []byte {
		var b bytes.Buffer
		h.Mode = 0o644
		if err := tar.NewWriter(&b).WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}

	repeat := func(n int, b []byte) func(io.Writer) error {
		return func(w io.Writer) error {
			var err error
			for i := 0; i < n && err == nil; i++ {
				_, err = w.Write(b)
			}
			return err
		}
	}

	each := func(n int, header func(i int) *tar.Header) func(io.Writer) error {
		return func(w io.Writer) error {
			var err error
			for i := 0; i < n && err == nil; i++ {
				_, err = w.Write(block(header(i)))
			}
			return err
		}
	}

	manifest := append(block(&tar.Header{Name: manifestName, Typeflag: tar.TypeReg, Size: 12}), goodManifest.content...)
	manifest = append(manifest, make([]byte, 500)...)
	zero := make([]byte, 1<<20)
	pax := block(
		&tar.Header{
			Name:       "x",
			Typeflag:   tar.TypeReg,
			PAXRecords: map[string]string{"VIADUCT.x": strings.Repeat("x", 1<<18)},
		},
	)

	pax = pax[:len(pax)-512] // tar reads it, and looks for the entry that it belongs to
	for _, c := range []struct {
		name  string
		bare  bool // without manifest
		write func(w io.Writer) error
		want  string
	}{
		{"zeros", true, repeat(1024, zero), "no manifest"},
		{"zeros after the manifest", false, repeat(1024, zero), "follows its end"},
		{"one file", false, func(w io.Writer) error {
			_, err := w.Write(block(&tar.Header{Name: "zeros", Typeflag: tar.TypeReg, Size: gigabyte}))
			return errors.Join(err, repeat(1024, zero)(w))
		}, "larger"},
		{"many large files", false, func(w io.Writer) error {
			var err error
			for i := 0; i < 100 && err == nil; i++ {
				_, err = w.Write(block(&tar.Header{Name: fmt.Sprint("zeros", i), Typeflag: tar.TypeReg,
					Size: maxEntry}))
				err = errors.Join(err, repeat(maxEntry>>20, zero)(w))
			}
			return err
		}, "larger"},
		{"long names", false, repeat(1<<20, block(&tar.Header{Name: strings.Repeat("n", maxName-1) + "/",
			Typeflag: tar.TypeDir})), "larger"},
		{"deep names", false, each(1<<20, func(i int) *tar.Header {
			return &tar.Header{Name: fmt.Sprint(i) + strings.Repeat("/d", 47), Typeflag: tar.TypeReg}
		}), "larger"},
		{"one directory again and again", false, repeat(1<<20, block(&tar.Header{Name: "d/", Typeflag: tar.TypeDir})),
			"larger"},
		{"headers without end", false, repeat(4*gigabyte/len(pax), pax), "damaged or truncated"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			began := time.Now()
			root, err := decodeSnapshot("s", stream(t, func(w io.Writer) error {
				if !c.bare {
					if _, err := w.Write(manifest); err != nil {
						return err
					}
				}
				return c.write(w)
			}))
			runtime.ReadMemStats(&after)
			if !errors.Is(err, ErrSnapshot) || !strings.Contains(err.Error(), c.want) || root != nil {
				t.Errorf("%v; want an ErrSnapshot with %q", err, c.want)
			}
			// It may also have given some back meanwhile.
			took := int64(after.Sys) - int64(before.Sys)
			t.Logf("%v, %d MiB from the system", time.Since(began), took>>20)
			if took > gigabyte {
				t.Error("it took too much")
			}
		})
	}
}

func FuzzSnapshot(f *testing.F) {
	unpack := func(b []byte) []byte {
		z, err := gzip.NewReader(bytes.NewReader(b))
		if err != nil {
			f.Fatal(err)
		}
		raw, err := io.ReadAll(z)
		if err != nil {
			f.Fatal(err)
		}
		return raw
	}

	f.Add(sampleSnapshot(f), false)
	f.Add(
		unpack(
			archive(f, goodManifest, entry{name: "sys/x", content: "1"},
				entry{name: "l", link: "sys/x", kind: tar.TypeSymlink}),
		),
		true,
	)

	f.Add(
		unpack(
			archive(f, goodManifest, entry{name: "d/", kind: tar.TypeDir},
				entry{name: "d/e/l", link: "../..", kind: tar.TypeSymlink}),
		),
		true,
	)

	f.Fuzz(func(t *testing.T, b []byte, compress bool) { // compressed here, the fuzzer sees the archive itself
		if compress {
			var out bytes.Buffer
			z, err := gzip.NewWriterLevel(&out, gzip.BestSpeed)
			if err == nil {
				_, err = z.Write(b)
			}
			if err = errors.Join(err, z.Close()); err != nil {
				t.Fatal(err)
			}
			b = out.Bytes()
		}
		root, err := decodeSnapshot("s", bytes.NewReader(b))
		if err != nil {
			if !errors.Is(err, ErrSnapshot) || root != nil {
				t.Fatalf("%v, %v", root, err)
			}
			return
		}
		h := Host{Dir: Dir{tree: openMemory(root), path: "s:"}}
		for name, content := range flat(root, "", map[string]string{}) {
			if content == "wrong parent" || strings.Contains(name, "//") && !strings.HasSuffix(name, "/") {
				t.Fatalf("%q: %s", name, content)
			}
			if _, err := h.Read(name[1:]); err != nil && strings.HasPrefix(content, "=") {
				t.Fatalf("%q: %v", name, err)
			}
			if !h.Exists(strings.TrimSuffix(name, "/")[min(1, len(strings.TrimSuffix(name, "/"))):]) {
				t.Fatalf("%q is not there", name)
			}
		}
	})
}
