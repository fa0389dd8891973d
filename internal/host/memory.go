package host

import (
	"bytes"
	"maps"
	"path"
	"slices"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// node is a file, a link or a directory of a snapshot.
type node struct {
	parent   *node            // the root's is itself
	children map[string]*node // a directory's
	link     string           // a link's target
	data     []byte           // a file's content
}

func newRoot() *node {
	n := &node{children: map[string]*node{}}
	n.parent = n
	return n
}

// memory is a directory of a snapshot. Nothing in it can point outside: names are looked up in it and nowhere else.
type memory struct {
	root, at *node
	left     *atomic.Int64 // names that may still be looked at: links can make a small archive endless
}

// maxLooks bounds what is looked at in a snapshot; sixteen thousand devices take some millions of looks.
const maxLooks = 1 << 25

func openMemory(root *node) memory {
	left := new(atomic.Int64)
	left.Store(maxLooks)
	return memory{root, root, left}
}

const maxLinks = 40 // as the kernel's

// find walks name from the directory, following links in all elements but, with keepLast, the last one.
func (m memory) find(name string, keepLast bool) (*node, error) {
	here, todo, links := m.at, strings.Split(name, "/"), 0
	for len(todo) > 0 {
		next := todo[0]
		todo = todo[1:]
		if m.left.Add(-1) < 0 {
			return nil, unix.EFBIG
		}
		if here.children == nil {
			return nil, unix.ENOTDIR
		}
		switch next {
		case "", ".":
			continue
		case "..":
			here = here.parent
			continue
		}

		n := here.children[next]
		switch {
		case n == nil:
			return nil, unix.ENOENT
		case n.link == "" || (keepLast && len(todo) == 0):
			here = n
			continue
		}

		if links++; links > maxLinks {
			return nil, unix.ELOOP
		}
		if path.IsAbs(n.link) {
			here = m.root
		}
		todo = append(strings.Split(n.link, "/"), todo...)
	}
	return here, nil
}

func (m memory) open(name string) (tree, error) {
	n, err := m.find(name, false)
	if err != nil {
		return nil, err
	}
	if n.children == nil {
		return nil, unix.ENOTDIR
	}
	return memory{m.root, n, m.left}, nil
}

func (m memory) attribute(name string, _ bool) (string, error) {
	b, err := m.read(name)
	return strings.TrimSuffix(string(b), "\n"), err
}

func (m memory) read(name string) ([]byte, error) {
	n, err := m.find(name, false)
	if err != nil {
		return nil, err
	}
	if n.children != nil {
		return nil, unix.EISDIR
	}
	return n.data, nil
}

func (m memory) file(name string) (File, error) {
	b, err := m.read(name)
	if err != nil {
		return nil, err
	}
	return memoryFile{bytes.NewReader(b)}, nil
}

type memoryFile struct{ *bytes.Reader }

func (memoryFile) Close() error { return nil }

func (m memory) readlink(name string) (string, error) {
	n, err := m.find(name, true)
	if err != nil {
		return "", err
	}
	if n.link == "" {
		return "", unix.EINVAL
	}
	return n.link, nil
}

func (m memory) readdir(name string) ([]string, error) {
	n, err := m.find(name, false)
	if err != nil {
		return nil, err
	}
	if n.children == nil {
		return nil, unix.ENOTDIR
	}
	if m.left.Add(-int64(len(n.children))) < 0 {
		return nil, unix.EFBIG
	}
	return slices.Collect(maps.Keys(n.children)), nil
}

func (memory) write(string, string) error { return ErrReadOnly }
func (memory) close() error               { return nil }
