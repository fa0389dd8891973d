package host

import (
	"archive/tar"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"time"
)

// A snapshot is a gzip-compressed tar archive of small files and relative links, the manifest first. It comes from
// other people's machines, so it is read with bounds, into memory, and never unpacked.
const (
	manifestName    = "viaduct-snapshot.json"
	snapshotFormat  = 1
	maxEntries      = 1 << 19 // with the directories that only their content implies
	maxEntry        = 16 << 20
	maxContent      = 256 << 20 // of files, names and links
	maxArchive      = 512 << 20
	maxName         = 4096 // the kernel's PATH_MAX
	maxNameElements = 64
)

type manifest struct {
	Format int `json:"format"`
}

// ErrSnapshot is wrapped by every error about the content of a snapshot.
var ErrSnapshot = errors.New("not a usable snapshot")

func badSnapshot(name, format string, a ...any) error {
	return fmt.Errorf("%s: %w: %s", name, ErrSnapshot, fmt.Sprintf(format, a...))
}

func readSnapshot(name string) (*node, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return decodeSnapshot(name, f)
}

// decodeSnapshot reads a snapshot to its end, so that its checksum is checked, and allocates no more than its bounds.
func decodeSnapshot(name string, r io.Reader) (*node, error) {
	z, err := gzip.NewReader(r)
	if err != nil {
		return nil, badSnapshot(name, "not a gzip archive (%v)", err)
	}
	root, content, nodes := newRoot(), 0, 0
	// Tar reads headers and padding of any length by itself.
	all := io.LimitReader(z, maxArchive)
	archive := tar.NewReader(all)
	for entries := 0; ; entries++ {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) && entries > 0 {
			break
		}
		if errors.Is(err, io.EOF) {
			return nil, badSnapshot(name, "it has no manifest")
		}
		if err != nil {
			return nil, badSnapshot(name, "damaged or truncated after %d entries (%v)", entries, err)
		}

		content += int(min(h.Size, maxContent)) + len(h.Name) + len(h.Linkname)
		if h.Size > maxEntry || len(h.Name) > maxName || len(h.Linkname) > maxName || content > maxContent ||
			max(entries, nodes) > maxEntries {
			return nil, badSnapshot(name, "larger than any real one, at entry %q", shorten(h.Name))
		}
		n := &node{}
		switch h.Typeflag {
		case tar.TypeReg:
			n.data = make([]byte, h.Size)
			if _, err = io.ReadFull(archive, n.data); err != nil {
				return nil, badSnapshot(name, "damaged or truncated in entry %q (%v)", shorten(h.Name), err)
			}
		case tar.TypeSymlink:
			if n.link = h.Linkname; leaves(h.Name, n.link) {
				return nil, badSnapshot(name, "the link %q leaves the tree", shorten(h.Name))
			}
		case tar.TypeDir:
			n.children = map[string]*node{}
		default:
			return nil, badSnapshot(name, "entry %q is neither file, link nor directory", shorten(h.Name))
		}

		if entries == 0 {
			var m manifest
			if h.Name != manifestName || json.Unmarshal(n.data, &m) != nil {
				return nil, badSnapshot(name, "it has no manifest")
			}
			if m.Format != snapshotFormat {
				return nil, badSnapshot(name, "format %d; this viaduct reads format %d", m.Format, snapshotFormat)
			}
			continue
		}

		made, err := root.add(h.Name, n)
		if err != nil {
			return nil, badSnapshot(name, "entry %q: %v", shorten(h.Name), err)
		}
		nodes += made
	}

	// tar stops at its end mark; what follows must be padding only, and reading it makes gzip check its sum.
	if n, err := io.Copy(io.Discard, io.LimitReader(z, 1<<20)); err != nil {
		return nil, badSnapshot(name, "damaged at its end (%v)", err)
	} else if n == 1<<20 {
		return nil, badSnapshot(name, "much follows its end")
	}
	return root, nil
}

func shorten(s string) string {
	if len(s) > 80 {
		return s[:80] + "..."
	}
	return s
}

// leaves says whether a link would climb out of the tree.
func leaves(name, target string) bool {
	return target == "" || path.IsAbs(target) ||
		strings.HasPrefix(path.Join(path.Dir(path.Clean(name)), target)+"/", "../")
}

// add puts leaf at name, with the directories above it, and says how many nodes that made.
func (n *node) add(name string, leaf *node) (made int, err error) {
	elements := strings.Split(strings.TrimSuffix(name, "/"), "/")
	if len(elements) > maxNameElements {
		return made, errors.New("too deep")
	}
	for i, e := range elements {
		if e == "" || e == "." || e == ".." {
			return made, errors.New("not a plain relative name")
		}
		child := n.children[e]
		switch {
		case i == len(elements)-1:
			if child != nil && (child.children == nil || leaf.children == nil) {
				return made, errors.New("there twice")
			}
			if child == nil {
				made++
				leaf.parent = n
				n.children[e] = leaf
			}
		case child == nil:
			made++
			child = &node{parent: n, children: map[string]*node{}}
			n.children[e] = child
		case child.children == nil:
			return made, errors.New("below something that is not a directory")
		}

		n = child
	}
	return made, nil
}

// SnapshotWriter writes a snapshot; what was added once is not added again.
type SnapshotWriter struct {
	z    *gzip.Writer
	t    *tar.Writer
	seen map[string]bool
	now  time.Time
}

// NewSnapshot begins a snapshot on w, which stays the caller's to close.
func NewSnapshot(w io.Writer) (*SnapshotWriter, error) {
	z := gzip.NewWriter(w)
	s := &SnapshotWriter{z: z, t: tar.NewWriter(z), seen: map[string]bool{}, now: time.Now()}
	m, err := json.Marshal(manifest{Format: snapshotFormat})
	if err != nil {
		return nil, err
	}
	return s, s.File(manifestName, m)
}

// File adds a file.
func (s *SnapshotWriter) File(name string, data []byte) error {
	if s.seen[name] {
		return nil
	}
	s.seen[name] = true
	header := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(data)), ModTime: s.now}
	if err := s.t.WriteHeader(header); err != nil {
		return err
	}
	_, err := s.t.Write(data)
	return err
}

// Link adds a symbolic link.
func (s *SnapshotWriter) Link(name, target string) error {
	if s.seen[name] {
		return nil
	}
	s.seen[name] = true
	return s.t.WriteHeader(
		&tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777, ModTime: s.now},
	)
}

// Dir adds a directory, which only an empty one needs.
func (s *SnapshotWriter) Dir(name string) error {
	if s.seen[name] {
		return nil
	}
	s.seen[name] = true
	return s.t.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: 0o755, ModTime: s.now})
}

// Close writes the archive's end; without it the snapshot reads as truncated.
func (s *SnapshotWriter) Close() error {
	if err := s.t.Close(); err != nil {
		return err
	}
	return s.z.Close()
}
