package vfio

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"viaduct/internal/host"
	"viaduct/iommu"
)

// use is what a block device is used for.
type use struct {
	kind  Kind
	text  string
	final bool
}

// diskHolders finds file systems and swap on the devices' disks and their partitions, and what is stacked on those.
func diskHolders(h *iommu.Host, devices []*iommu.Device) ([]Holder, error) {
	var used map[string]use
	var out []Holder
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
			if u, ok := used[b]; ok {
				out = append(out, Holder{Device: d.Name, Kind: u.kind, Final: u.final, What: fmt.Sprintf("(%s) %s", b, u.text)})
			}
			if what := stackKind(h, b); what != "" {
				out = append(out, Holder{Device: d.Name, Kind: Storage, What: fmt.Sprintf("is under %s", what)})
			}
		}
		for _, b := range disks {
			// ZFS, and whatever else takes a disk without a trace in sysfs, does so exclusively.
			if _, known := used[b]; known || carries(h, b) || !h.InUse("dev/"+strings.ReplaceAll(b, "!", "/")) {
				continue
			}
			out = append(out, Holder{Device: d.Name, Kind: Storage, Final: used[rootOnZFS].final, What: fmt.Sprintf("(%s) is in exclusive use, as by ZFS", b)})
		}
	}
	return out, nil
}

// rootOnZFS is the key of a use that no block device has: the host runs on a pool, of which any disk may be part.
const rootOnZFS = "zfs"

// carries reports whether a block device has partitions or is under another one: who uses those uses it.
func carries(h *iommu.Host, name string) bool {
	below, _ := h.Names(path.Join(blockClass, name))
	for _, n := range below {
		if h.Exists(path.Join(blockClass, name, n, "partition")) {
			return true
		}
	}
	holders, _ := h.Names(path.Join(blockClass, name, "holders"))
	return len(holders) > 0
}

// stackKind names a device-mapper or md device, "" if it is none.
func stackKind(h *iommu.Host, name string) string {
	if mapped, err := h.String(path.Join(blockClass, name, "dm/name")); err == nil {
		kind := "device-mapper"
		uuid, _ := h.String(path.Join(blockClass, name, "dm/uuid"))
		switch { // the prefix is the tool that made it
		case strings.HasPrefix(uuid, "LVM-"):
			kind = "LVM"
		case strings.HasPrefix(uuid, "CRYPT-"):
			kind = "dm-crypt"
		}
		return fmt.Sprintf("%s %s (%s)", kind, mapped, name)
	}
	if level, err := h.String(path.Join(blockClass, name, "md/level")); err == nil {
		return fmt.Sprintf("md %s (%s)", level, name)
	}
	return ""
}

const blockClass = "sys/class/block"

// Disks are a device's disks and all that is made of them, by the names of sysfs.
func Disks(h *iommu.Host, d *iommu.Device) ([]string, error) { return blockDevices(h, d) }

// blockDevices are a device's disks and all that is made of them, by name.
func blockDevices(h *iommu.Host, d *iommu.Device) ([]string, error) {
	if !d.PCI || !d.Blocks() {
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
	if len(out) == 0 {
		return nil, nil // most devices: nothing to look for loop devices over
	}
	loops, err := loopDevices(h)
	if err != nil {
		return nil, err
	}
	for i := 0; i < len(out); i++ {
		out = append(out, loops[out[i]]...)
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

// loopDevices are the loop devices over block devices, by those.
func loopDevices(h *iommu.Host) (map[string][]string, error) {
	out := map[string][]string{}
	names, err := h.Names(blockClass)
	if err != nil && !host.Absent(err) {
		return nil, err
	}
	for _, n := range names {
		if !strings.HasPrefix(n, "loop") {
			continue
		}
		if file, err := h.String(path.Join(blockClass, n, "loop/backing_file")); err == nil {
			if source, ok := strings.CutPrefix(file, "/dev/"); ok {
				name := deviceNamed(source, nil)
				out[name] = append(out[name], n)
			}
		}
	}
	return out, nil
}

// usedBlockDevices says what each block device is used for, by name, in whichever mount namespace.
func usedBlockDevices(h *iommu.Host) (map[string]use, error) {
	used, byNumber, mapped := map[string]use{}, map[string]string{}, map[string]string{}
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
	tables, err := mountTables(h)
	if err != nil {
		return nil, err
	}
	for _, m := range tables {
		for line := range strings.Lines(m.table) {
			number, where, kind, source, ok := parseMount(line)
			if !ok {
				continue
			}
			final := m.whose == "" && (where == "/" || where == "/usr")
			if final && kind == "zfs" {
				used[rootOnZFS] = use{final: true}
			}
			name := byNumber[number]
			if name == "" { // btrfs and others have a number of their own; their source is the device
				if source, ok := strings.CutPrefix(source, "/dev/"); ok {
					name = deviceNamed(source, mapped)
				}
			}
			if _, known := used[name]; name == "" || known && !final {
				continue
			}
			text := "is mounted on " + where
			if m.whose != "" {
				text += " in the mount namespace of process " + m.whose
			}
			used[name] = use{Mount, text, final}
		}
	}
	swaps, err := h.Read("proc/swaps")
	if err != nil && !host.Absent(err) {
		return nil, err
	}
	for line := range strings.Lines(string(swaps)) {
		f := strings.Fields(line)
		if source, ok := strings.CutPrefix(strings.Join(f[:min(1, len(f))], ""), "/dev/"); ok {
			used[deviceNamed(source, mapped)] = use{kind: Swap, text: "is swap"}
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
		root := slices.ContainsFunc(members, func(m string) bool { return used[m].final })
		for _, m := range members {
			if _, known := used[m]; !known {
				used[m] = use{kind: Mount, text: "is part of a mounted btrfs", final: root}
			}
		}
	}
	return used, nil
}

// mountTable is what is mounted in one mount namespace: this one's if whose is empty, else that of a process.
type mountTable struct{ table, whose string }

func mountTables(h *iommu.Host) ([]mountTable, error) {
	own, err := h.Read("proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	out := []mountTable{{string(own), ""}}
	if first, err := h.Read("proc/1/mountinfo"); err == nil { // the host's, wherever this runs
		out = append(out, mountTable{string(first), ""})
	}
	err = namespaces(h, "mnt", func(pid string) bool {
		table, err := h.Read(path.Join("proc", pid, "mountinfo"))
		if err == nil {
			out = append(out, mountTable{string(table), pid})
		}
		return err == nil
	})
	return out, err
}

// parseMount reads a line of proc_pid_mountinfo(5):
// id parent major:minor root mountpoint options [tags...] - kind source options.
func parseMount(line string) (number, where, kind, source string, ok bool) {
	f := strings.Fields(line)
	sep := slices.Index(f, "-")
	if sep < 6 || sep+2 >= len(f) {
		return "", "", "", "", false
	}
	return f[2], f[4], f[sep+1], f[sep+2], true
}

// deviceNamed is the kernel's name of what stands in /dev under source: dm-0 of mapper/root.
func deviceNamed(source string, mapped map[string]string) string {
	name := strings.ReplaceAll(source, "/", "!")
	if dm := mapped[name]; dm != "" {
		return dm
	}
	return name
}
