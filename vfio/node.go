package vfio

import (
	"context"
	"errors"
	"fmt"
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

// vfioNodes are the nodes that a device on a vfio driver can have: its group's (CONFIG_VFIO_GROUP) and its own
// (CONFIG_VFIO_DEVICE_CDEV), each with the file of sysfs that is there if the kernel makes it.
func vfioNodes(h *iommu.Host, d *iommu.Device) ([]struct{ file, sign string }, error) {
	group := strconv.Itoa(d.Group)
	out := []struct{ file, sign string }{{"/dev/vfio/" + group, path.Join("sys/class/vfio", group, "dev")}}
	dir := path.Join(devicePath(d.Address), "vfio-dev")
	names, err := h.Names(dir)
	if err != nil && !host.Absent(err) {
		return nil, err
	}
	for _, n := range names {
		out = append(out, struct{ file, sign string }{"/dev/vfio/devices/" + n, path.Join(dir, n, "dev")})
	}
	return out, nil
}

// Nodes are the nodes that the kernel has made for a device on a vfio driver, which a VMM opens. They may come to /dev a moment
// later. On a host that was captured a group is taken to have one.
func Nodes(h *iommu.Host, d *iommu.Device) ([]string, error) {
	all, err := vfioNodes(h, d)
	var out []string
	for i, n := range all {
		if h.Exists(n.sign) || i == 0 && !h.Live() {
			out = append(out, n.file)
		}
	}
	return out, err
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
		files, err := Nodes(b.Host, d)
		if err != nil {
			return err
		}
		if len(files) == 0 {
			return fmt.Errorf("%s: the kernel made no node for it, neither of its group nor its own", d.Name)
		}
		for _, f := range files {
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
	if !there("/run/udev") {
		return nil // no udev here, and none that would change it either
	}
	return journal.WriteFile(ruleFile(d.Address), []byte(b.Owner.rule(d)))
}

// Keeps reports whether a taken device's nodes were handed to this owner, and are kept for it. What others do with them meanwhile, as
// libvirt while its domain runs, is theirs. Without udev that is not known, and taken to be so.
func (o *NodeOwner) Keeps(d *iommu.Device) bool {
	text, err := os.ReadFile(ruleFile(d.Address))
	return !there("/run/udev") || err == nil && string(text) == o.rule(d)
}

func (o *NodeOwner) rule(d *iommu.Device) string {
	owner := fmt.Sprintf(`MODE="%04o"`, o.mode())
	if o.UID >= 0 {
		owner += fmt.Sprintf(`, OWNER="%d"`, o.UID)
	}
	if o.GID >= 0 {
		owner += fmt.Sprintf(`, GROUP="%d"`, o.GID)
	}
	return fmt.Sprintf("# made by viaduct bind --node-owner, removed by viaduct unbind\nSUBSYSTEM==\"vfio\", KERNEL==\"%s\", %s\nSUBSYSTEM==\"vfio-dev\", KERNELS==\"%s\", %s\n",
		strconv.Itoa(d.Group), owner, d.Name, owner)
}

// Disown gives the nodes of a taken device, which stays taken, back to root alone.
func (b *Binder) Disown(d *iommu.Device) error {
	if !b.Host.Live() {
		return nil
	}
	files, err := Nodes(b.Host, d)
	if err != nil {
		return err
	}
	errs := []error{b.disown(d.Address)}
	for _, f := range files {
		errs = append(errs, os.Chown(f, 0, 0), os.Chmod(f, 0o600))
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
