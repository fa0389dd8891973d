// Package host gives the file trees of a host (/sys, /proc, /dev, /etc, /run, /var/lib) as one value: the running host,
// a folder that holds a captured tree, or a snapshot archive. Nothing above it opens a path of its own.
//
// Names are relative and use '/'. Every error is a *fs.PathError with the whole path, so that errors.Is works with
// fs.ErrNotExist, fs.ErrPermission and errnos, and the path need not be added by callers.
package host

import (
	"errors"
	"io"
	"io/fs"
	"path"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// ErrReadOnly is why a captured host refuses a write; it is EROFS.
const ErrReadOnly = unix.EROFS

// Host is one host's file trees, seen from its root directory, and what its kernel answers beside them (see [System]).
type Host struct {
	Dir
	system System // nil: a captured host
}

// Open opens the running host ("" or "/"), a folder holding a captured tree, or a snapshot file. Only the running host
// can be written to. The caller closes it.
func Open(name string) (*Host, error) {
	if name == "" || name == "/" {
		t, err := openDisk("/", false)
		if err != nil {
			return nil, err
		}
		return &Host{Dir: Dir{tree: t, path: "/"}, system: machine{t}}, nil
	}

	var st unix.Stat_t
	if err := retry(func() error { return unix.Stat(name, &st) }); err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		t, err := openDisk(name, true)
		if err != nil {
			return nil, err
		}
		return &Host{Dir: Dir{tree: t, path: path.Clean(name)}}, nil
	}

	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, badSnapshot(name, "neither a folder nor a regular file")
	}
	root, err := readSnapshot(name)
	if err != nil {
		return nil, err
	}
	return &Host{Dir: Dir{tree: openMemory(root), path: name + ":"}}, nil
}

// Live reports whether this is a running host: the only one that has processes, sockets and a kernel to ask.
func (h *Host) Live() bool { return h.system != nil }

// Dir is an opened directory of a host.
type Dir struct {
	tree tree
	path string
}

// tree is what the two kinds of storage have in common; names are relative to the tree's own directory.
type tree interface {
	open(name string) (tree, error)
	read(name string) ([]byte, error)
	attribute(name string, steady bool) (string, error) // one read, without the trailing newline
	readlink(name string) (string, error)
	readdir(name string) ([]string, error)
	file(name string) (File, error)
	write(name, value string) error
	close() error
}

// Path is the whole path of name below this directory, for messages.
func (d *Dir) Path(name string) string {
	switch {
	// path.Join would be a good part of what a small read costs.
	case name == "":
		return d.path
	case d.path == "/":
		return "/" + name
	}
	return d.path + "/" + name
}

func (d *Dir) fail(op, name string, err error) error {
	return &fs.PathError{Op: op, Path: d.Path(name), Err: err}
}

// Open opens a directory below this one, following links. The caller closes it.
func (d *Dir) Open(name string) (*Dir, error) {
	t, err := d.tree.open(name)
	if err != nil {
		return nil, d.fail("open", name, err)
	}
	return &Dir{tree: t, path: d.Path(name)}, nil
}

// Close releases the directory; names read from it stay valid.
func (d *Dir) Close() error { return d.tree.close() }

// Read returns the whole content of a file.
func (d *Dir) Read(name string) ([]byte, error) {
	b, err := d.tree.read(name)
	if err != nil {
		return nil, d.fail("read", name, err)
	}
	return b, nil
}

// File is an opened file that is read in parts.
type File interface {
	io.ReaderAt
	io.Closer
	Size() int64
}

// File opens a file that is too large to be read for a small part of it. The caller closes it.
func (d *Dir) File(name string) (File, error) {
	f, err := d.tree.file(name)
	if err != nil {
		return nil, d.fail("open", name, err)
	}
	return f, nil
}

// String returns a sysfs attribute without its trailing newline. It reads once: an attribute is at most a page.
func (d *Dir) String(name string) (string, error) { return d.attribute(name, false) }

// Steady is String for attributes that the kernel gives from memory, under no lock that a driver may hold for long,
// such as numa_node and modalias (drivers/pci/pci-sysfs.c). It is quicker and cannot be waited for.
func (d *Dir) Steady(name string) (string, error) { return d.attribute(name, true) }

func (d *Dir) attribute(name string, steady bool) (string, error) {
	s, err := d.tree.attribute(name, steady)
	if err != nil {
		return "", d.fail("read", name, err)
	}
	return s, nil
}

// Int returns a decimal, or with "0x" in front hexadecimal, sysfs attribute.
func (d *Dir) Int(name string) (int, error) {
	s, err := d.String(name)
	if err != nil {
		return 0, err
	}
	return d.parseInt(name, s)
}

// SteadyInt is Int for attributes as those of Steady.
func (d *Dir) SteadyInt(name string) (int, error) {
	s, err := d.Steady(name)
	if err != nil {
		return 0, err
	}
	return d.parseInt(name, s)
}

func (d *Dir) parseInt(name, s string) (int, error) {
	n, err := strconv.ParseInt(s, 0, 64)
	if err != nil {
		return 0, d.fail("read", name, err)
	}
	return int(n), nil
}

// Link returns the target of a symbolic link as it stands.
func (d *Dir) Link(name string) (string, error) {
	s, err := d.tree.readlink(name)
	if err != nil {
		return "", d.fail("readlink", name, err)
	}
	return s, nil
}

// LinkBase returns the last element of a link's target: the driver's name of a driver link.
func (d *Dir) LinkBase(name string) (string, error) {
	s, err := d.Link(name)
	if err != nil {
		return "", err
	}
	return path.Base(s), nil
}

// Names returns the names in a directory, sorted.
func (d *Dir) Names(name string) ([]string, error) {
	names, err := d.tree.readdir(name)
	if err != nil {
		return nil, d.fail("readdir", name, err)
	}
	slices.Sort(names)
	return names, nil
}

// Exists reports whether something stands under this name; a link counts by itself, wherever it points. What cannot be
// looked at does not exist.
func (d *Dir) Exists(name string) bool {
	_, err := d.tree.readlink(name)
	// EINVAL: it is there, and no link.
	return err == nil || errors.Is(err, unix.EINVAL)
}

// Has is Exists for where it matters that nobody can look: then it is an error.
func (d *Dir) Has(name string) (bool, error) {
	_, err := d.tree.readlink(name)
	switch {
	case err == nil || errors.Is(err, unix.EINVAL):
		return true, nil
	case Absent(err) || errors.Is(err, unix.ENOTDIR):
		return false, nil
	}
	return false, d.fail("readlink", name, err)
}

// Write writes value to an existing file in one write(2). It never creates a file: a missing sysfs attribute must be
// ErrNotExist, not a permission problem or, on a captured tree, a new file.
func (d *Dir) Write(name, value string) error {
	if err := d.tree.write(name, value); err != nil {
		return d.fail("write", name, err)
	}
	return nil
}

// Error is an error that is a constant, so that nobody can assign another to its name.
type Error string

func (e Error) Error() string { return string(e) }

// Absent reports whether err says that the thing is not there, or went away while it was read: ENOENT, or ENODEV and
// ENXIO as sysfs gives them for a device that was removed.
func Absent(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO)
}

func retry(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
