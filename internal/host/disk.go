package host

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// disk is a directory of a real file system. A captured folder is confined: every name is resolved by the kernel from
// the folder's root (openat2, Linux 5.6), so that no link in it, absolute or climbing, reaches the host it is looked at
// on.
type disk struct {
	fd       int
	confined bool
	root     int    // confined only: the folder's root
	below    string // confined only: where this directory is below root
	sysfs    bool   // the running host's, where raw calls will do
}

func openDisk(name string, confined bool) (*disk, error) {
	fd, err := unix.Open(name, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	return &disk{fd: fd, confined: confined, root: fd}, nil
}

func (d *disk) openat(name string, flags int) (fd int, err error) {
	flags |= unix.O_CLOEXEC | unix.O_NOCTTY
	err = retry(func() error {
		if !d.confined {
			if d.inSysfs(name) {
				fd, err = rawOpenat(d.fd, name, flags)
			} else {
				fd, err = unix.Openat(d.fd, name, flags, 0)
			}
			return err
		}

		how := unix.OpenHow{
			Flags:   uint64(flags | unix.O_NONBLOCK),
			Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
		}
		if flags&unix.O_PATH != 0 {
			// openat2 takes no flag that O_PATH would ignore.
			how.Flags &^= unix.O_NONBLOCK | unix.O_NOCTTY
		}
		if plain(name) && flags&unix.O_PATH == 0 {
			// Attributes: they are no links, and need no way down from the root.
			near := how
			near.Resolve = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS
			if fd, err = unix.Openat2(d.fd, name, &near); !errors.Is(err, unix.ELOOP) {
				return err
			}
		}

		for range 1000 {
			// EAGAIN: something was renamed or mounted meanwhile, and ".." could not be trusted (openat2(2))
			if fd, err = unix.Openat2(d.root, path.Join(d.below, name, "."), &how); !errors.Is(err, unix.EAGAIN) {
				break
			}
		}
		return err
	})
	return fd, err
}

// inSysfs reports whether name, seen from here, is in the running host's sysfs.
func (d *disk) inSysfs(name string) bool {
	return d.sysfs || (!d.confined && strings.HasPrefix(name, "sys/"))
}

func (d *disk) release(fd int, name string) {
	if d.inSysfs(name) {
		rawClose(fd)
		return
	}
	unix.Close(fd)
}

// plain reports whether name is one element, which names nothing but an entry of the directory.
func plain(name string) bool {
	return name != "" && name != "." && name != ".." && strings.IndexByte(name, '/') < 0
}

func (d *disk) open(name string) (tree, error) {
	fd, err := d.openat(name, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	sub := &disk{fd: fd, confined: d.confined, root: d.root, sysfs: d.inSysfs(name)}
	if d.confined {
		sub.below = path.Join(d.below, name)
	}
	return sub, nil
}

func (d *disk) close() error {
	if d.fd < 0 {
		return nil
	}
	d.release(d.fd, "")
	d.fd = -1
	return nil
}

// maxFile bounds a file that is read whole: modules.alias and hwdb.bin are the largest, at a few MiB.
const maxFile = 64 << 20

var pages = sync.Pool{New: func() any { b := make([]byte, 4096); return &b }}

func (d *disk) openRead(name string) (fd int, err error) {
	if fd, err = d.openat(name, unix.O_RDONLY); err != nil || !d.confined {
		return fd, err
	}
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil && st.Mode&unix.S_IFMT != unix.S_IFREG &&
		st.Mode&unix.S_IFMT != unix.S_IFDIR {
		// A captured tree has no pipe or device to wait for.
		err = unix.EINVAL
	}
	if err != nil {
		unix.Close(fd)
	}
	return fd, err
}

func (d *disk) attribute(name string, steady bool) (string, error) {
	fd, err := d.openRead(name)
	if err != nil {
		return "", err
	}
	defer d.release(fd, name)
	page := pages.Get().(*[]byte)
	defer pages.Put(page)
	var n int
	if steady && d.inSysfs(name) {
		n, err = rawRead(fd, *page)
	} else {
		n, err = readOnce(fd, *page)
	}

	if err != nil {
		return "", err
	}
	text := (*page)[:n]
	if n == len(*page) {
		// More than sysfs gives: a file of another kind.
		more := make([]byte, n)
		if n, err = readOnce(fd, more); err != nil {
			return "", err
		}
		text = append(slices.Clip(text), more[:n]...)
	}
	return string(bytes.TrimSuffix(text, []byte("\n"))), nil
}

func (d *disk) read(name string) ([]byte, error) {
	fd, err := d.openRead(name)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	size := 4096
	var st unix.Stat_t // sysfs and proc tell no true size, others do
	if err := unix.Fstat(fd, &st); err == nil && st.Size >= int64(size) && st.Size <= maxFile {
		// And room to see the end.
		size = int(st.Size) + 1
	}

	out := make([]byte, 0, size)
	for {
		if len(out) == cap(out) {
			if len(out) > maxFile {
				return nil, unix.EFBIG
			}
			out = slices.Grow(out, len(out))
		}
		n, err := readOnce(fd, out[len(out):cap(out)])
		if err != nil {
			return nil, err
		}
		if n == 0 {
			return out, nil
		}
		out = out[:len(out)+n]
	}
}

func (d *disk) file(name string) (File, error) {
	fd, err := d.openRead(name)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), name)
	st, err := f.Stat()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return diskFile{f, st.Size()}, nil
}

type diskFile struct {
	*os.File
	size int64
}

func (f diskFile) Size() int64 { return f.size }

func readOnce(fd int, b []byte) (n int, err error) {
	err = retry(func() error { n, err = unix.Read(fd, b); return err })
	return n, err
}

func (d *disk) readlink(name string) (string, error) {
	fd, at := d.fd, name
	if d.confined && !plain(name) {
		dir, base := path.Split(path.Clean(name))
		parent, err := d.openat(dir, unix.O_PATH|unix.O_DIRECTORY)
		if err != nil {
			return "", err
		}
		defer unix.Close(parent)
		fd, at = parent, base
	}

	page := pages.Get().(*[]byte)
	defer pages.Put(page)
	var n int
	var err error
	if d.inSysfs(name) {
		n, err = rawReadlinkat(fd, at, *page)
	} else {
		n, err = unix.Readlinkat(fd, at, *page)
	}

	if err != nil {
		return "", err
	}
	if n == len(*page) {
		return "", unix.ENAMETOOLONG
	}
	return string((*page)[:n]), nil
}

func (d *disk) readdir(name string) ([]string, error) {
	fd, err := d.openat(name, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	defer d.release(fd, name)
	page := pages.Get().(*[]byte)
	defer pages.Put(page)

	var names []string
	for {
		var n int
		if err := retry(func() error {
			if d.inSysfs(name) {
				n, err = rawGetdents(fd, *page)
			} else {
				n, err = unix.ReadDirent(fd, *page)
			}
			return err
		}); err != nil {
			return nil, err
		}
		if n == 0 {
			return names, nil
		}
		_, _, names = unix.ParseDirent((*page)[:n], -1, names)
	}
}

func (d *disk) write(name, value string) error {
	if d.confined {
		return ErrReadOnly
	}
	fd, err := d.openat(name, unix.O_WRONLY)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var n int
	if err := retry(func() error { n, err = unix.Write(fd, []byte(value)); return err }); err != nil {
		return err
	}
	if n != len(value) {
		return unix.EIO
	}
	return nil
}
