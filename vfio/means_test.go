package vfio

import (
	"errors"
	"io/fs"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// TestMeans has each request fail as the kernel says that it can: what that means is told, and the errno with it.
func TestMeans(t *testing.T) {
	memory := must2(NewMemory(4096, 0))(t)
	mapping := Mapping{IOVA: 1 << 20, Memory: memory, Access: Read}
	bitmap := must2(NewBitmap(Range{0, 1<<20 - 1}, 4096))(t)
	opens := func(c *Context, _ *Device) error { _, err := c.Open(other); return err }
	opensVF := func(c *Context, _ *Device) error { _, err := c.OpenToken(other, Token{}); return err }
	tracks := func(c *Context, _ *Device) error { return c.Dirty(bitmap, false) }
	reset := func(_ *Context, d *Device) error { return d.Reset() }
	hot := func(_ *Context, d *Device) error { return d.HotReset() }
	maps := func(c *Context, _ *Device) error { return c.Map(mapping) }
	unmaps := func(c *Context, _ *Device) error { return c.Unmap(1<<20, 4096) }
	moves := func(_ *Context, d *Device) error { _, err := d.SetState(StateStop); return err }
	logs := func(_ *Context, d *Device) error { return d.StopLog() }
	sleeps := func(_ *Context, d *Device) error { return d.Sleep() }
	region := func(_ *Context, d *Device) error { _, err := d.Region(VGA); return err }
	type means map[unix.Errno]error // nil: it means nothing that is known
	for _, c := range []struct {
		way     Way
		request uintptr
		do      func(c *Context, d *Device) error
		means
	}{
		{Container, 0x3b66, opens, means{unix.EPERM: ErrNotIsolated, unix.ENODEV: ErrUnsupported, unix.EIO: nil}},
		{Container, 0x3b67, opens, means{unix.EIO: nil}},
		{Container, 0x3b68, opens, means{unix.EPERM: ErrInUse, unix.EBUSY: ErrInUse, unix.EIO: nil}},
		{Container, 0x3b6a, opens, means{unix.EACCES: ErrToken, unix.EBUSY: ErrInUse, unix.ENODEV: ErrNotBound,
			unix.EPERM: ErrNotIsolated, unix.EINVAL: nil}},
		{Container, 0x3b6a, opensVF, means{unix.EINVAL: ErrToken, unix.EACCES: ErrToken}},
		{Container, 0x3b71, maps, means{unix.ENOSPC: ErrLimit, unix.EEXIST: ErrRange, unix.EINVAL: ErrRange,
			unix.EOVERFLOW: ErrRange, unix.ENOMEM: nil}},
		{Container, 0x3b72, unmaps, means{unix.EIO: nil}},
		{IOMMUFD, 0x3b76, opens, means{unix.EBUSY: ErrInUse, unix.EPERM: ErrNotIsolated, unix.EACCES: ErrToken,
			unix.ENODEV: ErrFault, unix.EINVAL: nil}},
		{IOMMUFD, 0x3b76, opensVF, means{unix.EINVAL: ErrToken, unix.EACCES: ErrToken}},
		{IOMMUFD, 0x3b77, opens, means{unix.EPERM: ErrNotIsolated, unix.EADDRINUSE: ErrRange, unix.EINVAL: nil}},
		{IOMMUFD, 0x3b81, opens, means{unix.ENOMEM: nil}},
		{IOMMUFD, 0x3b85, maps, means{unix.EADDRINUSE: ErrRange, unix.EINVAL: ErrRange, unix.ENOMEM: nil}},
		{IOMMUFD, 0x3b86, unmaps, means{unix.ENOENT: ErrRange, unix.EIO: nil}},
		{IOMMUFD, 0x3b8c, tracks, means{unix.EINVAL: ErrRange, unix.EIO: nil}},
		{IOMMUFD, 0x3b6b, opens, means{unix.EIO: ErrFault, unix.EINVAL: nil}},
		{IOMMUFD, 0x3b6c, region, means{unix.EIO: ErrFault, unix.ENOMEM: nil}},
		{IOMMUFD, 0x3b6f, reset, means{unix.EINVAL: ErrUnsupported, unix.EAGAIN: ErrInUse, unix.ENODEV: ErrFault,
			unix.ENOTTY: ErrUnsupported, unix.ENOMEM: nil}},
		{IOMMUFD, 0x3b70, hot, means{unix.ENODEV: ErrUnsupported, unix.EPERM: ErrNotOwned, unix.EIO: ErrFault,
			unix.ENOSPC: nil}},
		{IOMMUFD, 0x3b71, hot, means{unix.EAGAIN: ErrInUse, unix.EIO: ErrFault, unix.EINVAL: nil}},
		{IOMMUFD, 0x3b75, moves, means{unix.EINVAL: ErrRefused, unix.ENODEV: ErrFault, unix.ENOTTY: ErrUnsupported}},
		{IOMMUFD, 0x3b75, logs, means{unix.EINVAL: ErrRange, unix.E2BIG: ErrRange, unix.EIO: ErrFault}},
		{IOMMUFD, 0x3b75, sleeps, means{unix.EBUSY: ErrInUse, unix.EINVAL: ErrRefused, unix.EIO: ErrFault}},
	} {
		_, v, host := newVFIO(t)
		v.Dirty = true
		for errno, want := range c.means {
			context := newContext(t, host, Options{Way: c.way, DirtyTracking: c.request == 0x3b8c})
			var d *Device
			// What makes a context's space is asked for its first device.
			if first := []uintptr{0x3b66, 0x3b81}; !slices.Contains(first, c.request) {
				d = must2(context.Open(nic))(t)
			}
			switch c.request {
			case 0x3b72, 0x3b86:
				if err := context.Map(mapping); err != nil {
					t.Fatal(err)
				}
			case 0x3b8c:
				if err := context.TrackDirty(true); err != nil {
					t.Fatal(err)
				}
			}
			before := openFiles(t)
			v.Fail = failing(c.request, errno)
			err := c.do(context, d)
			v.Fail = nil
			told, ok := errors.AsType[*Error](err)
			if !ok || !errors.Is(err, errno) || told.Means != want { //nolint:errorlint // one of this package's own
				t.Errorf("request %#x, %s: %v, want %v", c.request, errno, err, want)
			}
			if after := openFiles(t); after != before {
				t.Errorf("request %#x, %s: %d files are open, before %d", c.request, errno, after, before)
			}
			if err := context.Close(); err != nil {
				t.Error(err)
			}
		}
	}

	for way, node := range map[Way]string{IOMMUFD: "dev/iommu", Container: "dev/vfio/vfio"} {
		for errno, want := range map[unix.Errno]error{unix.ENOENT: ErrUnsupported, unix.ENODEV: ErrUnsupported,
			unix.ENXIO: ErrUnsupported, unix.EACCES: unix.EACCES} {
			k, _, host := newVFIO(t)
			k.SetFault(func(op, name string) error {
				if name == node && op == "open" {
					return errno
				}
				return nil
			})
			_, err := newContext(t, host, Options{Way: way}).Open(nic)
			if !errors.Is(err, want) || !errors.Is(err, errno) {
				t.Errorf("%s, %s: %v", node, errno, err)
			}
		}
	}

	if err := failure("op", "", nil, nil); err != nil {
		t.Error(err)
	}
	if err := failure("op", "", &fs.PathError{Err: unix.EOPNOTSUPP}, nil); !errors.Is(err, ErrUnsupported) {
		t.Error(err)
	}
}
