package host

import (
	"errors"
	"io/fs"
	"path"
	"sync"

	"golang.org/x/sys/unix"
)

// disk is a directory of a real file system. A captured folder is confined: every name is resolved by the kernel from the
// folder's root (openat2, Linux 5.6), so that no link in it, absolute or climbing, reaches the host it is looked at on.
type disk struct {
	fd       int
	confined bool
	below    string // confined only: where this directory is below fd, which stays the root's
	owned    bool
}

func openDisk(name string, confined bool) (tree, error) {
	fd, err := unix.Open(name, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	return &disk{fd: fd, confined: confined, owned: true}, nil
}

func (d *disk) openat(name string, flags int) (fd int, err error) {
	flags |= unix.O_CLOEXEC | unix.O_NOCTTY
	err = retry(func() error {
		if !d.confined {
			fd, err = unix.Openat(d.fd, name, flags, 0)
			return err
		}
		how := unix.OpenHow{Flags: uint64(flags | unix.O_NONBLOCK), Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS}
		if flags&unix.O_PATH != 0 {
			how.Flags &^= unix.O_NONBLOCK | unix.O_NOCTTY // openat2 takes no flag that O_PATH would ignore
		}
		for range 1000 { // EAGAIN: something was renamed or mounted meanwhile, and ".." could not be trusted (openat2(2))
			if fd, err = unix.Openat2(d.fd, path.Join(d.below, name, "."), &how); !errors.Is(err, unix.EAGAIN) {
				break
			}
		}
		return err
	})
	return fd, err
}

func (d *disk) open(name string) (tree, error) {
	if d.confined {
		fd, err := d.openat(name, unix.O_PATH|unix.O_DIRECTORY)
		if err != nil {
			return nil, err
		}
		unix.Close(fd)
		return &disk{fd: d.fd, confined: true, below: path.Join(d.below, name)}, nil
	}
	fd, err := d.openat(name, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	return &disk{fd: fd, owned: true}, nil
}

func (d *disk) close() error {
	if !d.owned {
		return nil
	}
	d.owned = false
	return unix.Close(d.fd)
}

// maxFile bounds a file that is read whole: modules.alias and hwdb.bin are the largest, at a few MiB.
const maxFile = 64 << 20

var pages = sync.Pool{New: func() any { b := make([]byte, 4096); return &b }}

func (d *disk) read(name string, whole bool) ([]byte, error) {
	fd, err := d.openat(name, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	if d.confined {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return nil, err
		}
		if st.Mode&unix.S_IFMT != unix.S_IFREG && st.Mode&unix.S_IFMT != unix.S_IFDIR {
			return nil, unix.EINVAL // a captured tree has no pipe or device to wait for
		}
	}
	page := pages.Get().(*[]byte)
	defer pages.Put(page)
	n, err := readOnce(fd, *page)
	if err != nil {
		return nil, err
	}
	out := append(make([]byte, 0, n), (*page)[:n]...)
	for (whole || n == len(*page)) && n > 0 {
		if len(out) > maxFile {
			return nil, unix.EFBIG
		}
		if len(out) == cap(out) {
			out = append(out, make([]byte, max(len(out), 4096))...)[:len(out)]
		}
		if n, err = readOnce(fd, out[len(out):cap(out)]); err != nil {
			return nil, err
		}
		out = out[:len(out)+n]
		if !whole {
			break
		}
	}
	return out, nil
}

func readOnce(fd int, b []byte) (n int, err error) {
	err = retry(func() error { n, err = unix.Read(fd, b); return err })
	return n, err
}

func (d *disk) readlink(name string) (string, error) {
	fd, at := d.fd, name
	if d.confined {
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
	n, err := unix.Readlinkat(fd, at, *page)
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
	defer unix.Close(fd)
	page := pages.Get().(*[]byte)
	defer pages.Put(page)
	var names []string
	for {
		var n int
		if err := retry(func() error { n, err = unix.ReadDirent(fd, *page); return err }); err != nil {
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
