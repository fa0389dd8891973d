package vfio

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/user"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/internal/host"
	"viaduct/internal/journal"
	"viaduct/iommu"
)

// NodeOwner is who owns the nodes of a taken device, so that a VMM needs no root to open them.
type NodeOwner struct {
	Text     string // as given: USER, USER:GROUP or :GROUP
	UID, GID int    // -1 leaves it
}

// ParseNodeOwner reads USER, USER:GROUP or :GROUP, each a name or a number, as chown(1) does.
func ParseNodeOwner(s string) (*NodeOwner, error) {
	o := &NodeOwner{Text: s, UID: -1, GID: -1}
	name, group, both := strings.Cut(s, ":")
	if name == "" && group == "" {
		return nil, fmt.Errorf("%q names no owner; want USER, USER:GROUP or :GROUP", s)
	}
	if name != "" {
		u, err := user.Lookup(name)
		if err != nil {
			u, err = user.LookupId(name)
		}
		if err != nil {
			return nil, fmt.Errorf("there is no user %q", name)
		}
		if o.UID, err = strconv.Atoi(u.Uid); err != nil {
			return nil, err
		}
	}
	if both && group != "" {
		g, err := user.LookupGroup(group)
		if err != nil {
			g, err = user.LookupGroupId(group)
		}
		if err != nil {
			return nil, fmt.Errorf("there is no group %q", group)
		}
		if o.GID, err = strconv.Atoi(g.Gid); err != nil {
			return nil, err
		}
	}
	return o, nil
}

// mode lets in whom the node belongs to, and nobody else.
func (o *NodeOwner) mode() uint32 {
	if o.GID >= 0 {
		return 0o660
	}
	return 0o600
}

// nodes waits until a unit's nodes are there, the group's and each device's own, and hands them to their owner.
func (b *Binder) nodes(ctx context.Context, unit []*iommu.Device, results []Result) error {
	if !b.Host.Live() {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, b.timeout())
	defer cancel()
	for i, d := range unit {
		if !iommu.IsVFIODriver(results[i].To) {
			continue // pci-stub makes none
		}
		group := strconv.Itoa(d.Group)
		nodes := map[string]string{"/dev/vfio/" + group: "sys/class/vfio/" + group} // with what says that the kernel has such: CONFIG_VFIO_GROUP
		names, err := b.Host.Names(path.Join(devicePath(d.Address), "vfio-dev"))
		if err != nil && !host.Absent(err) {
			return err
		}
		for _, n := range names {
			nodes["/dev/vfio/devices/"+n] = path.Join(devicePath(d.Address), "vfio-dev", n, "dev") // CONFIG_VFIO_DEVICE_CDEV
		}
		maps.DeleteFunc(nodes, func(node, sign string) bool { return !there(node) && !b.Host.Exists(sign) })
		if len(nodes) == 0 {
			return fmt.Errorf("%s: the kernel made no node for it, neither of its group nor its own", d.Name)
		}
		for f := range nodes {
			if err := appears(ctx, f); err != nil {
				return fmt.Errorf("%s: node %s: %w", d.Name, f, err)
			}
			if b.Owner == nil {
				continue
			}
			if err := errors.Join(os.Chown(f, b.Owner.UID, b.Owner.GID), os.Chmod(f, os.FileMode(b.Owner.mode()))); err != nil {
				return err
			}
		}
		if err := b.own(d); err != nil { // also of one that was taken before
			return err
		}
	}
	return nil
}

func there(file string) bool { return unix.Access(file, unix.F_OK) == nil }

// appears waits for a file.
func appears(ctx context.Context, file string) error {
	if there(file) {
		return nil
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for {
		dir := filepath.Dir(file)
		for !there(dir) { // which is made together with its first node
			dir = filepath.Dir(dir)
		}
		if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_CREATE|unix.IN_MOVED_TO); err != nil {
			return err
		}
		if there(file) { // between the first look and the watch
			return nil
		}
		deadline, _ := ctx.Deadline()
		left := time.Until(deadline)
		if left <= 0 || ctx.Err() != nil {
			return errors.New("it did not appear")
		}
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(min(left, time.Second).Milliseconds())+1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		var events [4096]byte
		_, _ = unix.Read(fd, events[:])
	}
}

const rules = "/run/udev/rules.d"

func ruleFile(a iommu.Address) string {
	return filepath.Join(rules, "70-viaduct-"+strings.ReplaceAll(a.String(), ":", "-")+".rules")
}

// own has udev keep the owner when a node is made again, as after another tool unbound the device and bound it anew. udev
// looks whether there are new rules at most every three seconds.
func (b *Binder) own(d *iommu.Device) error {
	if b.Owner == nil || !b.Host.Live() {
		return nil
	}
	if _, err := os.Stat("/run/udev"); err != nil {
		return nil // no udev here, and none that would change it either
	}
	owner := fmt.Sprintf(`MODE="%04o"`, b.Owner.mode())
	if b.Owner.UID >= 0 {
		owner += fmt.Sprintf(`, OWNER="%d"`, b.Owner.UID)
	}
	if b.Owner.GID >= 0 {
		owner += fmt.Sprintf(`, GROUP="%d"`, b.Owner.GID)
	}
	text := fmt.Sprintf("# made by viaduct bind --node-owner, removed by viaduct unbind\nSUBSYSTEM==\"vfio\", KERNEL==\"%s\", %s\nSUBSYSTEM==\"vfio-dev\", KERNELS==\"%s\", %s\n",
		strconv.Itoa(d.Group), owner, d.Name, owner)
	return journal.WriteFile(ruleFile(d.Address), []byte(text))
}

// Disown gives the nodes of a taken device, which stays taken, back to root alone.
func (b *Binder) Disown(d *iommu.Device) error {
	if !b.Host.Live() {
		return nil
	}
	files := []string{"/dev/vfio/" + strconv.Itoa(d.Group)}
	names, err := b.Host.Names(path.Join(devicePath(d.Address), "vfio-dev"))
	if err != nil && !host.Absent(err) {
		return err
	}
	for _, n := range names {
		files = append(files, "/dev/vfio/devices/"+n)
	}
	errs := []error{b.disown(d.Address)}
	for _, f := range files {
		if there(f) {
			errs = append(errs, os.Chown(f, 0, 0), os.Chmod(f, 0o600))
		}
	}
	return errors.Join(errs...)
}

// disown takes the rule away again.
func (b *Binder) disown(a iommu.Address) error {
	if !b.Host.Live() {
		return nil
	}
	if err := os.Remove(ruleFile(a)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
