package vfio

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"viaduct/internal/host"
	"viaduct/iommu"
)

// ErrRefused is matched by every error that says that a safety check refused and nothing was touched.
var ErrRefused = errors.New("refused")

// RefusedError says what was refused and why. It matches ErrRefused.
type RefusedError struct {
	What    string // what was to be done
	Reasons []string
	Cure    string // what the user can do; "" if nothing
}

func (e *RefusedError) Error() string {
	s := "refused to " + e.What + ": " + strings.Join(e.Reasons, "; ")
	if e.Cure != "" {
		s += " (" + e.Cure + ")"
	}
	return s
}

// Is makes it an ErrRefused.
func (e *RefusedError) Is(target error) bool { return target == ErrRefused }

// Holders says who uses the devices in a way that must not be cut off, one sentence each: a default route over one of their
// network interfaces or over what is stacked on it, a mounted file system or swap on one of their disks, a process that has
// one open through VFIO. It looks at the running host only.
func Holders(h *iommu.Host, devices []*iommu.Device) ([]string, error) {
	var out []string
	if !h.Live() {
		return nil, nil // a captured host has no users
	}
	for _, look := range []func(*iommu.Host, []*iommu.Device) ([]string, error){routeHolders, diskHolders, processHolders} {
		found, err := look(h, devices)
		if err != nil {
			return nil, err
		}
		out = append(out, found...)
	}
	return out, nil
}

const netClass = "sys/class/net"

// routeHolders finds default routes of any table, v4 and v6.
func routeHolders(h *iommu.Host, devices []*iommu.Device) ([]string, error) {
	if !slices.ContainsFunc(devices, func(d *iommu.Device) bool { return len(d.Netdevs) > 0 }) {
		return nil, nil
	}
	routes, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	carries, unknown := map[int]bool{}, false
	for _, r := range routes {
		if r.Dst != nil {
			if ones, _ := r.Dst.Mask.Size(); ones > 0 || !r.Dst.IP.IsUnspecified() {
				continue
			}
		}
		if r.Type != unix.RTN_UNICAST {
			continue
		}
		if r.LinkIndex == 0 && len(r.MultiPath) == 0 {
			unknown = true // by a nexthop object only: it may be any interface's
		}
		carries[r.LinkIndex] = true
		for _, hop := range r.MultiPath {
			carries[hop.LinkIndex] = true
		}
	}
	var out []string
	for _, d := range devices {
		for _, n := range d.Netdevs {
			stack, err := stackedOn(h, n)
			if err != nil {
				return nil, err
			}
			for _, top := range stack {
				index, err := h.Int(path.Join(netClass, top, "ifindex"))
				if host.Absent(err) {
					continue
				}
				if err != nil {
					return nil, err
				}
				if unknown {
					out = append(out, fmt.Sprintf("%s (%s) may carry the default route, which names no interface", d.Name, n))
				}
				if carries[index] {
					out = append(out, fmt.Sprintf("%s (%s) carries the default route%s", d.Name, n, over(n, top)))
				}
			}
		}
	}
	return out, nil
}

func over(n, top string) string {
	if n == top {
		return ""
	}
	return " over " + top
}

// stackedOn is an interface and all that stand on it: bonds, bridges, VLANs, through any depth, by their upper_ links.
func stackedOn(h *iommu.Host, name string) ([]string, error) {
	out := []string{name}
	for i := 0; i < len(out); i++ {
		names, err := h.Names(path.Join(netClass, out[i]))
		if host.Absent(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, n := range names {
			if upper, ok := strings.CutPrefix(n, "upper_"); ok && !slices.Contains(out, upper) {
				out = append(out, upper)
			}
		}
	}
	return out, nil
}

// diskHolders finds file systems and swap on the devices' disks, their partitions, and what is stacked on those.
func diskHolders(h *iommu.Host, devices []*iommu.Device) ([]string, error) {
	var used map[string]string
	var out []string
	for _, d := range devices {
		disks, err := blockDevices(h, d)
		if err != nil {
			return nil, err
		}
		if len(disks) == 0 {
			continue
		}
		if used == nil {
			if used, err = usedBlockDevices(h); err != nil {
				return nil, err
			}
		}
		for _, b := range disks {
			if use := used[b]; use != "" {
				out = append(out, fmt.Sprintf("%s (%s) %s", d.Name, b, use))
			}
		}
	}
	return out, nil
}

const blockClass = "sys/class/block"

// blockDevices are a device's disks and all that is made of them, by name.
func blockDevices(h *iommu.Host, d *iommu.Device) ([]string, error) {
	if !d.PCI {
		return nil, nil
	}
	classes, err := iommu.ClassDevices(h, d.Address)
	if err != nil {
		return nil, err
	}
	out := slices.Clone(classes["block"])
	for _, controller := range classes["nvme"] { // with native multipath the disk hangs on the subsystem, not on the controller
		const subsystems = "sys/class/nvme-subsystem"
		names, err := h.Names(subsystems)
		if err != nil && !host.Absent(err) {
			return nil, err
		}
		for _, s := range names {
			if !h.Exists(path.Join(subsystems, s, controller)) {
				continue
			}
			members, err := h.Names(path.Join(subsystems, s))
			if err != nil && !host.Absent(err) {
				return nil, err
			}
			for _, m := range members {
				if h.Exists(path.Join(blockClass, m)) {
					out = append(out, m)
				}
			}
		}
	}
	for i := 0; i < len(out); i++ {
		below, err := h.Names(path.Join(blockClass, out[i]))
		if err != nil && !host.Absent(err) {
			return nil, err
		}
		for _, n := range below {
			if h.Exists(path.Join(blockClass, out[i], n, "partition")) && !slices.Contains(out, n) {
				out = append(out, n)
			}
		}
		stacked, err := h.Names(path.Join(blockClass, out[i], "holders"))
		if err != nil && !host.Absent(err) {
			return nil, err
		}
		for _, n := range stacked {
			if !slices.Contains(out, n) {
				out = append(out, n)
			}
		}
	}
	return out, nil
}

// usedBlockDevices says what each block device is used for, by name.
func usedBlockDevices(h *iommu.Host) (map[string]string, error) {
	used, byNumber, mapped := map[string]string{}, map[string]string{}, map[string]string{}
	names, err := h.Names(blockClass)
	if err != nil && !host.Absent(err) {
		return nil, err
	}
	for _, n := range names {
		if number, err := h.String(path.Join(blockClass, n, "dev")); err == nil {
			byNumber[number] = n
		}
		if name, err := h.String(path.Join(blockClass, n, "dm/name")); err == nil {
			mapped["mapper!"+name] = n
		}
	}
	mounts, err := h.Read("proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(mounts)) {
		// id parent major:minor root mountpoint options [tags...] - type source options (proc_pid_mountinfo(5))
		f := strings.Fields(line)
		sep := slices.Index(f, "-")
		if len(f) < 5 || sep < 0 || sep+2 >= len(f) {
			continue
		}
		name := byNumber[f[2]]
		if name == "" { // btrfs and others have a number of their own; their source is the device
			if source, ok := strings.CutPrefix(f[sep+2], "/dev/"); ok {
				name = deviceNamed(source, mapped)
			}
		}
		if name != "" && used[name] == "" {
			used[name] = "is mounted on " + f[4]
		}
	}
	swaps, err := h.Read("proc/swaps")
	if err != nil && !host.Absent(err) {
		return nil, err
	}
	for line := range strings.Lines(string(swaps)) {
		f := strings.Fields(line)
		if source, ok := strings.CutPrefix(strings.Join(f[:min(1, len(f))], ""), "/dev/"); ok {
			used[deviceNamed(source, mapped)] = "is swap"
		}
	}
	const btrfs = "sys/fs/btrfs" // names every member of every mounted file system
	ids, err := h.Names(btrfs)
	if err != nil && !host.Absent(err) {
		return nil, err
	}
	for _, id := range ids {
		members, err := h.Names(path.Join(btrfs, id, "devices"))
		if err != nil && !host.Absent(err) && !errors.Is(err, unix.ENOTDIR) {
			return nil, err
		}
		for _, m := range members {
			if used[m] == "" {
				used[m] = "is part of a mounted btrfs"
			}
		}
	}
	return used, nil
}

// deviceNamed is the kernel's name of what stands in /dev under source: dm-0 of mapper/root.
func deviceNamed(source string, mapped map[string]string) string {
	name := strings.ReplaceAll(source, "/", "!")
	if dm := mapped[name]; dm != "" {
		return dm
	}
	return name
}

// processHolders finds processes that have a device open: its group's node, its own node, or, where the kernel tells
// (fdinfo of Linux 6.18), the device file itself. Unbinding a device that is open blocks for as long as it is.
func processHolders(h *iommu.Host, devices []*iommu.Device) ([]string, error) {
	nodes := map[string]*iommu.Device{}
	for _, d := range devices {
		if !iommu.IsVFIODriver(d.Driver) {
			continue
		}
		nodes["/dev/vfio/"+strconv.Itoa(d.Group)] = d
		names, err := h.Names(path.Join(devicePath(d.Address), "vfio-dev"))
		if err != nil && !host.Absent(err) {
			return nil, err
		}
		for _, n := range names {
			nodes["/dev/vfio/devices/"+n] = d
		}
	}
	if len(nodes) == 0 {
		return nil, nil
	}
	pids, err := h.Names("proc")
	if err != nil {
		return nil, err
	}
	var out []string
	for _, pid := range pids {
		if pid[0] < '0' || pid[0] > '9' {
			continue
		}
		fds, err := h.Names(path.Join("proc", pid, "fd"))
		if err != nil {
			continue // ended
		}
		for _, fd := range fds {
			target, err := h.Link(path.Join("proc", pid, "fd", fd))
			if err != nil {
				continue
			}
			d := nodes[target]
			if d == nil && strings.HasPrefix(target, "anon_inode:[vfio-device]") {
				d = openDevice(h, pid, fd, devices)
			}
			if d != nil {
				name, _ := h.String(path.Join("proc", pid, "comm"))
				out = append(out, fmt.Sprintf("%s is open in process %s (%s)", d.Name, pid, name))
				break
			}
		}
	}
	return out, nil
}

func openDevice(h *iommu.Host, pid, fd string, devices []*iommu.Device) *iommu.Device {
	info, err := h.Read(path.Join("proc", pid, "fdinfo", fd))
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(info)) {
		if syspath, ok := strings.CutPrefix(strings.TrimSpace(line), "vfio-device-syspath:"); ok {
			i := slices.IndexFunc(devices, func(d *iommu.Device) bool { return d.Name == path.Base(strings.TrimSpace(syspath)) })
			if i >= 0 {
				return devices[i]
			}
		}
	}
	return nil
}
