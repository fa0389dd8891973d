package holder

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
	kind Kind
	text string
	root bool
}

// diskHolders finds file systems and swap on the devices' disks and their partitions, and what is stacked on those.
func diskHolders(h *iommu.Host, devices []*iommu.Device) ([]Holder, error) {
	var used map[string]use
	var blind error
	var out []Holder
	whole, err := wholeControllers(h)
	if err != nil {
		return nil, err
	}
	for _, d := range devices {
		controllers, err := controllersOf(h, d, whole)
		if err != nil {
			return nil, err
		}
		for _, c := range controllers {
			what := fmt.Sprintf("(%s) is exported over NVMe as %s", c, whole[c])
			out = append(out, Holder{Device: d.Name, Kind: Storage, What: what})
		}
		disks, err := Disks(h, d)
		if err != nil {
			return nil, err
		}
		if len(disks) == 0 {
			continue
		}

		if used == nil {
			if used, err = usedBlockDevices(h); errors.Is(err, ErrBlind) {
				blind = err
			} else if err != nil {
				return nil, err
			}
		}
		found, err := diskHoldersOf(h, d, disks, used)
		if err != nil {
			return nil, err
		}
		out = append(out, found...)
	}
	return out, blind
}

// diskHoldersOf are the holders of one device's disks.
func diskHoldersOf(h *iommu.Host, d *iommu.Device, disks []string, used map[string]use) ([]Holder, error) {
	var out []Holder
	for _, b := range disks {
		if u, ok := used[b]; ok {
			out = append(out,
				Holder{Device: d.Name, Kind: u.kind, Root: u.root, What: fmt.Sprintf("(%s) %s", b, u.text)})
		}
		what, err := stackKind(h, b)
		if err != nil {
			return nil, err
		}
		if what != "" {
			out = append(out, Holder{Device: d.Name, Kind: Storage, What: fmt.Sprintf("is under %s", what)})
		}
	}

	// ZFS, and whatever else takes a disk without a trace in sysfs, does so exclusively.
	for _, b := range disks {
		if _, known := used[b]; known {
			continue
		}
		carried, err := carries(h, b)
		if err != nil {
			return nil, err
		}
		if carried {
			continue
		}
		exclusive, err := h.InUse("dev/" + strings.ReplaceAll(b, "!", "/"))
		if err != nil {
			return nil, err
		}
		if exclusive {
			what := fmt.Sprintf("(%s) is in exclusive use, e.g. by ZFS", b)
			out = append(out, Holder{Device: d.Name, Kind: Storage, Root: used[rootOnZFS].root, What: what})
		}
	}
	return out, nil
}

// rootOnZFS is the key of a use that no block device has: the host runs on a pool, of which any disk may be part.
const rootOnZFS = "zfs"

// carries reports whether a block device has partitions or is under another one: who uses those uses it.
func carries(h *iommu.Host, name string) (bool, error) {
	below, err := names(h, path.Join(blockClass, name))
	if err != nil {
		return false, err
	}
	for _, n := range below {
		partition, err := h.Has(path.Join(blockClass, name, n, "partition"))
		if partition || err != nil {
			return partition, err
		}
	}
	holders, err := names(h, path.Join(blockClass, name, "holders"))
	return len(holders) > 0, err
}

// names are the names in a directory, none if it is not there.
func names(h *iommu.Host, dir string) ([]string, error) {
	names, err := h.Names(dir)
	if host.Absent(err) {
		return nil, nil
	}
	return names, err
}

// stackKind names a device-mapper or md device, "" if it is none.
func stackKind(h *iommu.Host, name string) (string, error) {
	mapped, err := h.String(path.Join(blockClass, name, "dm/name"))
	if err == nil {
		kind := "device-mapper"
		uuid, err := h.String(path.Join(blockClass, name, "dm/uuid"))
		if err != nil && !host.Absent(err) {
			return "", err
		}
		// The prefix is the tool that made it.
		switch {
		case strings.HasPrefix(uuid, "LVM-"):
			kind = "LVM"
		case strings.HasPrefix(uuid, "CRYPT-"):
			kind = "dm-crypt"
		}
		return fmt.Sprintf("%s %s (%s)", kind, mapped, name), nil
	}
	if !host.Absent(err) {
		return "", err
	}

	level, err := h.String(path.Join(blockClass, name, "md/level"))
	if host.Absent(err) {
		return "", nil
	}
	return fmt.Sprintf("md %s (%s)", level, name), err
}

const blockClass = "sys/class/block"

// Disks are a device's disks and all that is made of them, by the names of sysfs.
func Disks(h *iommu.Host, d *iommu.Device) ([]string, error) {
	if !d.PCI || !d.Blocks() {
		return nil, nil
	}
	out, err := ownDisks(h, d)
	if err != nil || len(out) == 0 {
		// Of most devices: then there is nothing to look for loop devices over.
		return nil, err
	}

	loops, err := loopDevices(h)
	if err != nil {
		return nil, err
	}
	for i := 0; i < len(out); i++ {
		out = append(out, loops[out[i]]...)
		below, err := names(h, path.Join(blockClass, out[i]))
		if err != nil {
			return nil, err
		}
		for _, n := range below {
			partition, err := h.Has(path.Join(blockClass, out[i], n, "partition"))
			if err != nil {
				return nil, err
			}
			if partition && !slices.Contains(out, n) {
				out = append(out, n)
			}
		}
		stacked, err := names(h, path.Join(blockClass, out[i], "holders"))
		if err != nil {
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

// ownDisks are the disks that a device's driver made. With native multipath an NVMe disk hangs on the subsystem, not on
// the controller.
func ownDisks(h *iommu.Host, d *iommu.Device) ([]string, error) {
	classes, err := iommu.ClassDevices(h, d.Address)
	if err != nil {
		return nil, err
	}
	out := slices.Clone(classes["block"])

	const subsystems = "sys/class/nvme-subsystem"
	for _, controller := range classes["nvme"] {
		all, err := names(h, subsystems)
		if err != nil {
			return nil, err
		}
		for _, s := range all {
			has, err := h.Has(path.Join(subsystems, s, controller))
			if err != nil {
				return nil, err
			}
			if !has {
				continue
			}
			members, err := names(h, path.Join(subsystems, s))
			if err != nil {
				return nil, err
			}
			for _, m := range members {
				disk, err := h.Has(path.Join(blockClass, m))
				if err != nil {
					return nil, err
				}
				if disk {
					out = append(out, m)
				}
			}
		}
	}
	return out, nil
}

// loopDevices are the loop devices over block devices, by those.
func loopDevices(h *iommu.Host) (map[string][]string, error) {
	all, err := names(h, blockClass)
	if err != nil {
		return nil, err
	}

	out := map[string][]string{}
	for _, n := range all {
		if !strings.HasPrefix(n, "loop") {
			continue
		}
		file, err := h.String(path.Join(blockClass, n, "loop/backing_file"))
		if host.Absent(err) {
			// It is over nothing.
			continue
		}
		if err != nil {
			return nil, err
		}
		if source, ok := strings.CutPrefix(file, "/dev/"); ok {
			name := deviceNamed(source, nil)
			out[name] = append(out[name], n)
		}
	}
	return out, nil
}

// usedBlockDevices says what each block device is used for, by name, in whichever mount namespace.
func usedBlockDevices(h *iommu.Host) (map[string]use, error) {
	numbers, err := readBlockNumbers(h)
	if err != nil {
		return nil, err
	}

	var blind error
	used := map[string]use{}
	for _, add := range []func(*iommu.Host, blockNumbers, map[string]use) error{addMounts, addSwaps, addBtrfs,
		addTargets} {
		if err := add(h, numbers, used); errors.Is(err, ErrBlind) {
			blind = err
		} else if err != nil {
			return nil, err
		}
	}
	return used, blind
}

// blockNumbers are the names of block devices, by their number and by the name of device-mapper.
type blockNumbers struct{ byNumber, mapped map[string]string }

func readBlockNumbers(h *iommu.Host) (blockNumbers, error) {
	out := blockNumbers{map[string]string{}, map[string]string{}}
	all, err := names(h, blockClass)
	if err != nil {
		return out, err
	}

	for _, n := range all {
		number, err := h.String(path.Join(blockClass, n, "dev"))
		if err != nil && !host.Absent(err) {
			return out, err
		}
		out.byNumber[number] = n
		name, err := h.String(path.Join(blockClass, n, "dm/name"))
		if err == nil {
			out.mapped["mapper!"+name] = n
		} else if !host.Absent(err) {
			return out, err
		}
	}
	delete(out.byNumber, "")
	return out, nil
}

// addMounts adds what is mounted anywhere.
func addMounts(h *iommu.Host, numbers blockNumbers, used map[string]use) error {
	tables, blind := mountTables(h)
	if blind != nil && !errors.Is(blind, ErrBlind) {
		return blind
	}
	for _, m := range tables {
		for line := range strings.Lines(m.table) {
			number, where, kind, source, ok := parseMount(line)
			if !ok {
				continue
			}
			root := m.whose == "" && (where == "/" || where == "/usr")
			if root && kind == "zfs" {
				used[rootOnZFS] = use{root: true}
			}

			name := numbers.byNumber[number]
			if name == "" {
				// Btrfs and others have a number of their own; their source is the device.
				if source, ok := strings.CutPrefix(source, "/dev/"); ok {
					name = deviceNamed(source, numbers.mapped)
				}
			}
			if _, known := used[name]; name == "" || known && !root {
				continue
			}
			text := "is mounted on " + where
			if m.whose != "" {
				text += " in the mount namespace of process " + m.whose
			}
			used[name] = use{Mount, text, root}
		}
	}
	return blind
}

// addSwaps adds what is swap.
func addSwaps(h *iommu.Host, numbers blockNumbers, used map[string]use) error {
	swaps, err := h.Read("proc/swaps")
	if err != nil && !host.Absent(err) {
		return err
	}
	for line := range strings.Lines(string(swaps)) {
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		if source, ok := strings.CutPrefix(f[0], "/dev/"); ok {
			used[deviceNamed(source, numbers.mapped)] = use{kind: Swap, text: "is swap"}
		}
	}
	return nil
}

// addBtrfs adds every member of every mounted btrfs, which a mount table names only one of.
func addBtrfs(h *iommu.Host, _ blockNumbers, used map[string]use) error {
	const btrfs = "sys/fs/btrfs"
	ids, err := names(h, btrfs)
	if err != nil {
		return err
	}

	for _, id := range ids {
		members, err := names(h, path.Join(btrfs, id, "devices"))
		if errors.Is(err, unix.ENOTDIR) {
			continue
		}
		if err != nil {
			return err
		}
		root := slices.ContainsFunc(members, func(m string) bool { return used[m].root })
		for _, m := range members {
			if _, known := used[m]; !known {
				used[m] = use{kind: Mount, text: "is part of a mounted btrfs", root: root}
			}
		}
	}
	return nil
}

// subsystems are what the kernel exports over NVMe.
const subsystems = "sys/kernel/config/nvmet/subsystems"

// wholeControllers are the controllers of NVMe that are exported as a whole, by name, with what they are exported as
// (drivers/nvme/target/passthru.c).
func wholeControllers(h *iommu.Host) (map[string]string, error) {
	all, err := names(h, subsystems)
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for _, subsystem := range all {
		dir := path.Join(subsystems, subsystem, "passthru")
		enabled, err1 := present(h.String(path.Join(dir, "enable")))
		file, err2 := present(h.String(path.Join(dir, "device_path")))
		if err := errors.Join(err1, err2); err != nil {
			return nil, err
		}
		if enabled == "1" {
			out[path.Base(file)] = subsystem
		}
	}
	return out, nil
}

// controllersOf are those of some controllers that are a device's.
func controllersOf(h *iommu.Host, d *iommu.Device, some map[string]string) ([]string, error) {
	if len(some) == 0 || !d.PCI {
		return nil, nil
	}
	all, err := names(h, path.Join(devicePath(d.Address), "nvme"))
	return slices.DeleteFunc(all, func(n string) bool { return some[n] == "" }), err
}

// addTargets adds what is exported over NVMe: the kernel's target opens a disk as anybody may, and not for itself alone
// (drivers/nvme/target/io-cmd-bdev.c).
func addTargets(h *iommu.Host, numbers blockNumbers, used map[string]use) error {
	all, err := names(h, subsystems)
	if err != nil {
		return err
	}

	for _, subsystem := range all {
		spaces, err := names(h, path.Join(subsystems, subsystem, "namespaces"))
		if err != nil {
			return err
		}
		for _, n := range spaces {
			dir := path.Join(subsystems, subsystem, "namespaces", n)
			enabled, err1 := present(h.String(path.Join(dir, "enable")))
			file, err2 := present(h.String(path.Join(dir, "device_path")))
			if err := errors.Join(err1, err2); err != nil {
				return err
			}
			source, ok := strings.CutPrefix(file, "/dev/")
			if !ok || enabled != "1" {
				continue
			}
			if target, err := h.LinkBase(path.Join("dev", source)); err == nil {
				// As those of disk/by-id.
				source = target
			}
			if name := deviceNamed(source, numbers.mapped); used[name].kind == "" {
				used[name] = use{kind: Storage, text: "is exported over NVMe as " + subsystem}
			}
		}
	}
	return nil
}

// mountTable is what is mounted in one mount namespace: this one's if whose is empty, else that of a process.
type mountTable struct{ table, whose string }

func mountTables(h *iommu.Host) ([]mountTable, error) {
	own, err := h.Read("proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	out := []mountTable{{string(own), ""}}

	// That of the first process is the host's, wherever this runs.
	first, err := h.Read("proc/1/mountinfo")
	blind := unseen("proc/1", err)
	if blind != nil && !errors.Is(blind, ErrBlind) {
		return nil, blind
	}
	if err == nil {
		out = append(out, mountTable{string(first), ""})
	}

	err = namespaces(h, "mnt", func(pid string) (bool, error) {
		table, err := h.Read(path.Join("proc", pid, "mountinfo"))
		if err == nil {
			out = append(out, mountTable{string(table), pid})
		}
		return err == nil, err
	})
	if err == nil {
		err = blind
	}
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
