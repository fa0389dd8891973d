package holder

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"viaduct/internal/host"
	"viaduct/internal/journal"
	"viaduct/internal/netlink"
	"viaduct/iommu"
)

// Glance says what a handful of files and two questions to the kernel show of who uses devices: leases, file systems
// and swap, routes and addresses, the display, other tools' books. Its cost goes by how much is in use and not by how
// many devices or processes there are, so that a list can have it. What it does not name may be in use all the same:
// who wants to take a device asks [Find]. Each holder has a Brief. A captured host tells what a glance showed then or,
// without that, of leases, the display and books alone. With an error it returns what could be seen all the
// same.
func Glance(h *iommu.Host, t *iommu.Topology) ([]Holder, error) {
	if !h.Live() {
		if found, err := glanceCaptured(h); !errors.Is(err, ErrNotCaptured) {
			return found, err
		}
	}

	var all, displays []*iommu.Device
	t.All(func(d *iommu.Device) bool {
		all = append(all, d)
		if d.Class>>16 == 0x03 {
			displays = append(displays, d)
		}
		return true
	})

	looks := []func() ([]Holder, error){
		func() ([]Holder, error) { return Leases(h, all) },
		func() ([]Holder, error) { return Owners(h, all) },
		func() ([]Holder, error) { return Displays(h, displays) },
	}
	if h.Live() {
		looks = append(looks,
			func() ([]Holder, error) { return glanceDisks(h, t) }, func() ([]Holder, error) { return glanceNet(h, t) })
	}
	var out []Holder
	var errs []error
	for _, look := range looks {
		found, err := look()
		out, errs = append(out, found...), append(errs, err)
	}
	return out, errors.Join(errs...)
}

// glanceDisks finds the devices below what is mounted or swap here: from the few mounts to their devices.
func glanceDisks(h *iommu.Host, t *iommu.Topology) ([]Holder, error) {
	var out []Holder
	seen := map[string]bool{}
	add := func(dir string, kind Kind, root bool, brief, what string) error {
		devices, err := belowBlock(h, t, dir, 8)
		for _, d := range devices {
			if key := d.Name + string(kind) + brief; !seen[key] {
				seen[key] = true
				out = append(out, Holder{Device: d.Name, Kind: kind, Root: root, What: what, Brief: brief})
			}
		}
		return err
	}

	tables, err := mountsHere(h)
	if err != nil {
		return nil, err
	}
	looked := map[string]bool{}
	for line := range strings.Lines(tables) {
		number, where, _, source, ok := parseMount(line)
		if !ok || looked[number] {
			continue
		}
		looked[number] = true
		dir := path.Join("sys/dev/block", number)
		// Btrfs and others have a number that is no device's; their source is the device.
		if source, ok := strings.CutPrefix(source, "/dev/"); ok && !h.Exists(dir) {
			if dir, err = blockNamed(h, source); err != nil {
				return nil, err
			}
		} else if strings.HasPrefix(number, "0:") {
			continue
		}
		root := where == "/" || where == "/usr"
		if err := add(dir, Mount, root, "mounted on "+where, "is mounted on "+where); err != nil {
			return nil, err
		}
	}

	swaps, err := h.Read("proc/swaps")
	if err != nil && !host.Absent(err) {
		return nil, err
	}
	for line := range strings.Lines(string(swaps)) {
		source, ok := strings.CutPrefix(line, "/dev/")
		if !ok {
			continue
		}
		dir, err := blockNamed(h, strings.Fields(source + " ")[0])
		if err == nil {
			err = add(dir, Swap, false, "swap", "is swap")
		}
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

// mountsHere is what is mounted in this mount namespace and in the host's, which is that of the first process.
func mountsHere(h *iommu.Host) (string, error) {
	var out strings.Builder
	for _, process := range []string{"self", "1"} {
		table, err := h.Read(path.Join("proc", process, "mountinfo"))
		if err = unseen("proc/"+process, err); err != nil && !errors.Is(err, ErrBlind) && !host.Absent(err) {
			return "", err
		}
		out.Write(table)
	}
	return out.String(), nil
}

// blockNamed is the directory of what stands in /dev under source.
func blockNamed(h *iommu.Host, source string) (string, error) {
	target, err := h.LinkBase(path.Join("dev", source))
	if err == nil {
		// As those of mapper.
		source = target
	} else if !host.Absent(err) && !errors.Is(err, errNoLink) {
		return "", err
	}
	return path.Join(blockClass, strings.ReplaceAll(source, "/", "!")), nil
}

// belowBlock are the PCI devices that a block device is of: through device-mapper and md, and for a disk of an NVMe
// subsystem all of its controllers'.
func belowBlock(h *iommu.Host, t *iommu.Topology, dir string, deep int) ([]*iommu.Device, error) {
	target, err := h.Link(dir)
	if host.Absent(err) || errors.Is(err, errNoLink) || deep == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	parts := strings.Split(target, "/")
	if d := deviceOn(t, parts); d != nil {
		return []*iommu.Device{d}, nil
	}

	var out []*iommu.Device
	if i := slices.Index(parts, "nvme-subsystem"); i >= 0 && i+1 < len(parts) {
		const class = "sys/class/nvme-subsystem"
		members, err := names(h, path.Join(class, parts[i+1]))
		if err != nil {
			return nil, err
		}
		for _, m := range members {
			controller, err := h.Link(path.Join(class, parts[i+1], m))
			if host.Absent(err) || errors.Is(err, errNoLink) {
				continue
			}
			if err != nil {
				return nil, err
			}
			if d := deviceOn(t, strings.Split(controller, "/")); d != nil {
				out = append(out, d)
			}
		}
		return out, nil
	}

	below, err := names(h, path.Join(dir, "slaves"))
	if err != nil {
		return nil, err
	}
	for _, n := range below {
		some, err := belowBlock(h, t, path.Join(blockClass, n), deep-1)
		if err != nil {
			return nil, err
		}
		out = append(out, some...)
	}
	return out, nil
}

// deviceOn is the PCI device nearest to the end of a sysfs path; nil if there is none.
func deviceOn(t *iommu.Topology, parts []string) *iommu.Device {
	for _, part := range slices.Backward(parts) {
		if a, err := iommu.ParseAddress(part); err == nil {
			d, _ := t.Find(a)
			return d
		}
	}
	return nil
}

// glanceNet finds what stands on the devices' network interfaces in this network namespace.
func glanceNet(h *iommu.Host, t *iommu.Topology) ([]Holder, error) {
	owners := map[string]*iommu.Device{}
	t.All(func(d *iommu.Device) bool {
		if !d.VFIO {
			for _, n := range d.Interfaces() {
				owners[n] = d
			}
		}
		return true
	})
	if len(owners) == 0 {
		return nil, nil
	}
	if err := underWay(h); err != nil {
		return nil, err
	}
	c, err := netlink.Dial(h.Host, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	n := &interfaces{links: map[int]*netlink.Link{}, addrs: map[int][]string{}, routes: map[int][]string{}}
	if _, err := n.readHere(c); err != nil {
		return nil, err
	}

	below := map[int][]int{}
	for index, l := range n.links {
		if l.Master != 0 {
			below[l.Master] = append(below[l.Master], index)
		}
		if l.Over != 0 && l.Over != index && l.Elsewhere == nil {
			below[index] = append(below[index], l.Over)
		}
	}
	var out []Holder
	var tell func(index, top, deep int)
	tell = func(index, top, deep int) {
		l := n.links[index]
		if l == nil || deep == 0 {
			return
		}
		if d := owners[l.Name]; d != nil {
			out = append(out, n.briefly(d, l, n.links[top])...)
		}
		for _, lower := range below[index] {
			tell(lower, top, deep-1)
		}
	}
	for index := range n.links {
		// Also what is in a bridge without an address.
		if n.routes[index] != nil || n.addrs[index] != nil || below[index] != nil {
			tell(index, index, 8)
		}
	}
	slices.SortFunc(out, func(a, b Holder) int { return strings.Compare(a.What, b.What) })
	return out, nil
}

// underWay is an ErrBlind while a change is under way: the kernel may keep the lock that a list of interfaces needs for
// as long as that takes, or for good.
func underWay(h *iommu.Host) error {
	records, err := present(h.Names(journal.Dir))
	for _, n := range records {
		if strings.HasPrefix(n, journal.Changing) {
			return fmt.Errorf("%w: a change is under way, beside which the network cannot be asked", ErrBlind)
		}
	}
	if errors.Is(err, ErrBlind) {
		return nil
	}
	return err
}

// briefly says what an interface of a device carries for the one on top of it, which may be itself.
func (n *interfaces) briefly(d *iommu.Device, l, top *netlink.Link) []Holder {
	by := ""
	if l != top {
		by = " by " + top.Name
	}
	var out []Holder
	add := func(kind Kind, brief, what string) {
		out = append(out, Holder{Device: d.Name, Kind: kind, Brief: brief + by, What: "(" + l.Name + ") " + what + by})
	}
	routes, addrs := n.routes[top.Index], n.addrs[top.Index]
	switch {
	case slices.Contains(routes, defaultRoute):
		add(Route, "default route", "carries "+defaultRoute)
	case len(routes) > 0:
		add(Route, counted(len(routes), "route"), "carries "+strings.Join(routes, ", "))
	}
	if len(addrs) > 0 {
		add(Addressed, addrs[0], "has address "+strings.Join(addrs, ", "))
	}
	if len(out) == 0 && l != top {
		by = ""
		add(Stacked, "in "+top.Name, "is under "+n.kindOf(top.Index)+top.Name)
	}
	return out
}

func counted(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
