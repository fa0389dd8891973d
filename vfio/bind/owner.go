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
		return nil, fmt.Errorf("invalid owner %q; want USER, USER:GROUP or :GROUP", s)
	}

	if name != "" {
		u, err := user.Lookup(name)
		if err == nil {
			name = u.Uid
		}
		if o.uid, err = parseID(name); err != nil {
			return nil, fmt.Errorf("unknown user %q", name)
		}
	}
	if both && group != "" {
		g, err := user.LookupGroup(group)
		if err == nil {
			group = g.Gid
		}
		if o.gid, err = parseID(group); err != nil {
			return nil, fmt.Errorf("unknown group %q", group)
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
		owner := owner
		if d.Role() == iommu.RoleCompanion {
			// Nobody gets it: it is there for the reset of its bus.
			owner = nil
		}
		if len(files) == 0 {
			return fmt.Errorf("%s: the kernel made no node for it or its group", d.Name)
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

// rulePrefix is what the files of udev's rules for a device's nodes begin with.
func rulePrefix(a iommu.Address) string {
	return "70-viaduct-" + strings.ReplaceAll(a.String(), ":", "-")
}

// ruleFile is the rule that keeps a device's nodes for an owner. Each owner's is another file, as the rule asks whether
// its own file is still there: udev may go by a rule for seconds after it was removed.
func (o *NodeOwner) ruleFile(a iommu.Address) string {
	return path.Join(rules, fmt.Sprintf("%s-%d-%d.rules", rulePrefix(a), o.uid, o.gid))
}

// own has udev keep the owner when a node is made again, as after another tool unbound the device and bound it anew.
// udev looks whether there are new rules at most every three seconds. Without udev here there is none that would change
// it either.
func (b *Handle) own(d *iommu.Device, owner *NodeOwner) error {
	if owner == nil || !b.host.Exists("run/udev") {
		return nil
	}
	if err := b.dropRules(d.Address, owner.ruleFile(d.Address)); err != nil {
		return err
	}
	return b.host.Replace(owner.ruleFile(d.Address), []byte(owner.rule(d)))
}

// Keeps reports whether a taken device's nodes were handed to this owner, and are kept for it. What others do with them
// meanwhile, as libvirt while its domain runs, is theirs. Without udev that is not known, and taken to be so.
func (o *NodeOwner) Keeps(h *iommu.Host, d *iommu.Device) bool {
	text, err := h.Read(o.ruleFile(d.Address))
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
	still := fmt.Sprintf("TEST==\"/%s\"", o.ruleFile(d.Address))
	if d.Group != nil {
		fmt.Fprintf(&b, "SUBSYSTEM==\"vfio\", KERNEL==\"%d\", %s, %s\n", *d.Group, still, owner)
	}
	fmt.Fprintf(&b, "SUBSYSTEM==\"vfio-dev\", KERNELS==\"%s\", %s, %s\n", d.Name, still, owner)
	return b.String()
}

// Disown takes the nodes of a taken device, which is locked and stays taken, from everybody but root, whether viaduct
// gave them away or another did, and reads that back. It reports whether somebody else might have opened one: who has
// it open keeps that. [Handle.Settle] gives them whom the host's own rules for udev say.
func (b *Handle) Disown(d *iommu.Device) (shared bool, err error) {
	if err := errors.Join(b.MayChange(), b.locked(d.Address)); err != nil {
		return false, err
	}
	if err := b.dropRules(d.Address, ""); err != nil {
		return false, err
	}
	files, err := vfio.Nodes(b.host, d)
	if err != nil {
		return false, err
	}

	for _, f := range files {
		now, err := b.host.Owner(f[1:])
		if host.Absent(err) {
			// udev has not made it yet.
			continue
		}
		if err == nil && !now.Private() {
			shared = true
			err = b.host.Own(f[1:], 0, 0, 0o600)
		}
		if err != nil {
			return shared, err
		}
	}
	return shared, nil
}

// Settle has udev look at the nodes of a device again that were taken from their owner: a rule of the host's own may
// say whose they are.
func (b *Handle) Settle(d *iommu.Device) error {
	if err := errors.Join(b.MayChange(), b.locked(d.Address)); err != nil {
		return err
	}
	numbers, err := vfio.Numbers(b.host, d)
	if err != nil {
		return err
	}
	var errs []error
	for _, n := range numbers {
		if err := b.host.Write(path.Join(path.Dir(n), "uevent"), "change"); !host.Absent(err) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// dropRules takes a device's rules away again, but for one.
func (b *Handle) dropRules(a iommu.Address, keep string) error {
	names, err := b.host.Names(rules)
	if host.Absent(err) {
		return nil
	}
	for _, n := range names {
		file := path.Join(rules, n)
		if strings.HasPrefix(n, rulePrefix(a)) && file != keep {
			err = errors.Join(err, b.host.Remove(file))
		}
	}
	return err
}
