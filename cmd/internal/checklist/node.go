package checklist

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"viaduct/cmd/internal/guest"
	"viaduct/internal/host"
	"viaduct/iommu"
	"viaduct/vfio"
	"viaduct/vfio/bind"
	"viaduct/vfio/holder"
)

// nodes is whether the files that the VMM opens are there, and whether it may open them.
func (c *list) nodes(d *iommu.Device) error {
	if !d.VFIO {
		// What a device on another driver lacks is told by that.
		return nil
	}
	names, err := vfio.Nodes(c.host, d)
	if err != nil {
		return err
	}
	l := Line{Name: "nodes", Device: d.Name, Answer: OK}
	var owners []host.Owner
	for _, n := range names {
		e, o, err := c.owner(strings.TrimPrefix(n, "/"))
		if err != nil {
			return err
		}
		if e.Value == "" {
			l.Answer = No
		}
		owners = append(owners, o)
		l.Evidence = append(l.Evidence, e)
	}

	switch {
	case len(names) == 0:
		l.Answer, l.Text, l.Hint = No, "the kernel has made no node for it", "viaduct verify "+d.Name
	case !c.host.Live():
		l.Answer, l.Text = Unknown, "a captured host does not show who owns its nodes"
	case l.Answer == No:
		l.Text = "a node of it is not in /dev"
		l.Hint = "udevadm trigger --subsystem-match=vfio --subsystem-match=vfio-dev"
	default:
		l.Text = "its nodes are there, for " + l.Evidence[0].Value
		c.reach(&l, d, owners)
	}
	if owner := c.lease.NodeOwner; owner != "" && l.Answer == OK {
		kept, err := bind.ParseNodeOwner(owner)
		if err != nil || !kept.Keeps(c.host, d) {
			l.Answer, l.Text = No, "its nodes are not kept for "+owner+", as the lease has it"
			l.Hint = fmt.Sprintf("chown %s %s", quote(owner), strings.Join(names, " "))
		}
	}
	c.add(l)
	return nil
}

// owner says whose a node is.
func (c *list) owner(node string) (Evidence, host.Owner, error) {
	if !c.host.Live() {
		return Evidence{node, "its owner was not captured"}, host.Owner{}, nil
	}
	o, err := c.host.Owner(node)
	if errors.Is(err, fs.ErrNotExist) {
		return Evidence{File: node}, o, nil
	}
	text := fmt.Sprintf("user %d, group %d, mode %04o", o.UID, o.GID, o.Mode&0o7777)
	if o.Private() {
		text = "root alone"
	}
	return Evidence{node, text}, o, err
}

// reach compares the owners of a device's nodes, which are the line's evidence, with the users that the guest's
// processes run as. What has the device open may be let in no more, and needs not.
func (c *list) reach(l *Line, d *iommu.Device, owners []host.Owner) {
	pids := c.processes()
	if len(pids) == 0 && c.lease.NodeOwner == "" {
		l.Answer = Unknown
		l.Text += "; which user the guest's VMM runs as is not known"
	}

	for _, pid := range pids {
		if c.hasOpen(pid, d) {
			return
		}
	}

	for _, pid := range pids {
		user, known := guest.UserOf(c.host, pid)
		for i, o := range owners {
			switch {
			case !known || o.ACL:
				l.Answer = Unknown
				l.Text = fmt.Sprintf("whether process %d of the guest may open its nodes is not known", pid)
			case !user.Opens(o):
				l.Answer = No
				l.Text = fmt.Sprintf("process %d of the guest runs as user %d, and /%s is for %s", pid, user.UID,
					l.Evidence[i].File, l.Evidence[i].Value)
				l.Hint = fmt.Sprintf("chown %d /%s", user.UID, l.Evidence[i].File)
				if o := c.lease.Owner; o != nil && o.PID == pid {
					// With it the lease ends, and it may have another one start the VMM.
					l.Answer = Unknown
				}
				return
			}
		}
	}
}

func (c *list) hasOpen(pid int, d *iommu.Device) bool {
	return slices.ContainsFunc(c.look.Now, func(h holder.Holder) bool { return h.PID == pid && h.Device == d.Name })
}
