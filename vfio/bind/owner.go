package bind

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os/user"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"viaduct/internal/host"
	"viaduct/iommu"
	"viaduct/vfio"
)

// NodeOwner is who owns the nodes of a taken device, so that a VMM needs no root to open them. [ParseNodeOwner] makes
// one.
type NodeOwner struct {
	Text     string // as given: USER, USER:GROUP or :GROUP
	uid, gid int    // -1 leaves it
}

// ParseNodeOwner reads USER, USER:GROUP or :GROUP, each a name or a number, as chown(1) does. A number need not be
// anybody's.
func ParseNodeOwner(s string) (*NodeOwner, error) {
	o := &NodeOwner{Text: s, uid: -1, gid: -1}
	name, group, both := strings.Cut(s, ":")
	if name == "" && group == "" {
		return nil, fmt.Errorf("%q names no owner; want USER, USER:GROUP or :GROUP", s)
	}

	if name != "" {
		u, err := user.Lookup(name)
		if err == nil {
			name = u.Uid
		}
		if o.uid, err = parseID(name); err != nil {
			return nil, fmt.Errorf("there is no user %q", name)
		}
	}
	if both && group != "" {
		g, err := user.LookupGroup(group)
		if err == nil {
			group = g.Gid
		}
		if o.gid, err = parseID(group); err != nil {
			return nil, fmt.Errorf("there is no group %q", group)
		}
	}
	return o, nil
}

// parseID reads the number of a user or group. The last one there could be means none (chown(2)).
func parseID(s string) (int, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err == nil && n == math.MaxUint32 {
		err = strconv.ErrRange
	}
	return int(n), err
}

// mode lets in whom the node belongs to, and nobody else.
func (o *NodeOwner) mode() uint32 {
	if o.gid >= 0 {
		return 0o660
	}
	return 0o600
}

// nodes waits until a unit's nodes are there, the group's and each device's own, and hands them to their owner.
func (b *Handle) nodes(ctx context.Context, unit []*iommu.Device, results []*Result, owner *NodeOwner) error {
	ctx, cancel := context.WithTimeout(ctx, b.Timeout())
	defer cancel()
	for i, d := range unit {
		if to := results[i].To; to == None || to == stub {
			// These make none.
			continue
		}
		files, err := vfio.Nodes(b.host, d)
		if err != nil {
			return err
		}
		if len(files) == 0 {
			return fmt.Errorf("%s: the kernel made no node for it, neither of its group nor its own", d.Name)
		}

		for _, f := range files {
			if err := appears(ctx, b.host.Path(f[1:])); err != nil {
				return fmt.Errorf("%s: node %s: %w", d.Name, f, err)
			}
			if owner == nil {
				continue
			}
			if err := b.host.Own(f[1:], owner.uid, owner.gid, owner.mode()); err != nil {
				return err
			}
		}

		if err := b.own(d, owner); err != nil {
			// Also of one that was taken before.
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
		for !there(dir) {
			// Which is made together with its first node.
			dir = filepath.Dir(dir)
		}
		if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_CREATE|unix.IN_MOVED_TO); err != nil {
			return err
		}
		if there(file) {
			// Between the first look and the watch.
			return nil
		}

		deadline, _ := ctx.Deadline()
		left := time.Until(deadline)
		if left <= 0 || ctx.Err() != nil {
			return errors.New("it did not appear")
		}
		wait := int(min(left, time.Second).Milliseconds()) + 1
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, wait)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		var events [4096]byte
		_, _ = unix.Read(fd, events[:])
	}
}

const rules = "run/udev/rules.d"

func ruleFile(a iommu.Address) string {
	return path.Join(rules, "70-viaduct-"+strings.ReplaceAll(a.String(), ":", "-")+".rules")
}

// own has udev keep the owner when a node is made again, as after another tool unbound the device and bound it anew.
// udev looks whether there are new rules at most every three seconds. Without udev here there is none that would change
// it either.
func (b *Handle) own(d *iommu.Device, owner *NodeOwner) error {
	if owner == nil || !b.host.Exists("run/udev") {
		return nil
	}
	return b.host.Replace(ruleFile(d.Address), []byte(owner.rule(d)))
}

// Keeps reports whether a taken device's nodes were handed to this owner, and are kept for it. What others do with them
// meanwhile, as libvirt while its domain runs, is theirs. Without udev that is not known, and taken to be so.
func (o *NodeOwner) Keeps(h *iommu.Host, d *iommu.Device) bool {
	text, err := h.Read(ruleFile(d.Address))
	return !h.Exists("run/udev") || err == nil && string(text) == o.rule(d)
}

func (o *NodeOwner) rule(d *iommu.Device) string {
	owner := fmt.Sprintf(`MODE="%04o"`, o.mode())
	if o.uid >= 0 {
		owner += fmt.Sprintf(`, OWNER="%d"`, o.uid)
	}
	if o.gid >= 0 {
		owner += fmt.Sprintf(`, GROUP="%d"`, o.gid)
	}

	var b strings.Builder
	b.WriteString("# made by viaduct bind --node-owner, removed by viaduct unbind\n")
	if d.Group != nil {
		fmt.Fprintf(&b, "SUBSYSTEM==\"vfio\", KERNEL==\"%d\", %s\n", *d.Group, owner)
	}
	fmt.Fprintf(&b, "SUBSYSTEM==\"vfio-dev\", KERNELS==\"%s\", %s\n", d.Name, owner)
	return b.String()
}

// Disown gives the nodes of a taken device, which is locked and stays taken, back to root alone.
func (b *Handle) Disown(d *iommu.Device) error {
	if err := errors.Join(b.MayChange(), b.locked(d.Address)); err != nil {
		return err
	}
	files, err := vfio.Nodes(b.host, d)
	if err != nil {
		return err
	}
	errs := []error{b.disown(d.Address)}
	for _, f := range files {
		if err := b.host.Own(f[1:], 0, 0, 0o600); !host.Absent(err) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// disown takes the rule away again.
func (b *Handle) disown(a iommu.Address) error { return b.host.Remove(ruleFile(a)) }
